"""Runs in files: what a run comes from, and its state after each epoch."""

from __future__ import annotations

import io
import os
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from tripletlib._cache import user_path, write_atomically
from tripletlib._validation import warn
from tripletlib.identity import UnidentifiableError, identify, set_state, state_of

Parts = Mapping[str, Mapping[str, object]]
_FIELDS = {"origin", "seed", "moved", "after", "parts", "history", "epoch", "finished", "best"}


class Origin:
    """What a run comes from, but for its initial weights.

    Parameters
    ----------
    seed : int
        Unless it was given, that of a checkpoint which is found takes its place.
    fixed : mapping
        Parts that stay as they are (data, code), each a mapping of its things by name.
    moving : mapping
        Parts that may change as the run goes on (network, settings), likewise.
    modules : list of nn.Module
        Those of them whose weights are kept by whoever keeps the run.
    seed_given : bool
        Whether the reader chose the seed.
    """

    def __init__(
        self, seed: int, fixed: Parts, moving: Parts, modules: list[nn.Module], *, seed_given: bool
    ) -> None:
        self.seed, self.seed_given = seed, seed_given
        self._parts, self._modules = moving, modules
        digests, _, unknown = _identify(fixed, [])
        more, self._moving, unknown_too = _identify(moving, self._learned())
        self.digests = digests | more
        self.unknown = unknown + unknown_too

    def name(self) -> str:
        """Return a name that only this run from these weights has."""
        weights = [module.state_dict() for module in self._modules]
        seed = self.seed if self.seed_given else None
        return identify(of=[self.digests, seed, weights, self._moved()]).digest[:16]

    def differences(self, state: dict) -> list[str]:
        """Return the parts in which a checkpoint's run was another, with what of them it was."""
        parts = []
        for part, things in self.digests.items():
            kept = state["origin"].get(part, {})
            other = [name for name in things if things[name] != kept.get(name)]
            if part == "settings" and self.seed_given and self.seed != state["seed"]:
                other.append("seed")
            if other or things.keys() != kept.keys():
                named = ", ".join(name for name in other if name != part)
                parts.append(f"{part} ({named})" if named else part)
        return parts

    def state(self) -> dict[str, object]:
        """Return what a checkpoint has to hold of it."""
        after = _identify(self._parts, self._learned())[0]
        return {"origin": self.digests, "seed": self.seed, "moved": self._moved(), "after": after}

    def restore(self, state: dict) -> list[str]:
        """Bring seed, generators and whatever else moves on to where they were.

        Returns
        -------
        list of str
            What changed in a way that a checkpoint cannot hold.
        """
        self.seed = state["seed"]
        for thing, moved in zip(self._moving, state["moved"], strict=True):
            set_state(thing, moved)
        now, after = _identify(self._parts, self._learned())[0], state["after"]
        return [name for part in now for name in now[part] if now[part][name] != after[part][name]]

    def _moved(self) -> list[object]:
        learned = {id(tensor) for tensor in self._learned()}
        return [state_of(thing, learned) for thing in self._moving]

    def _learned(self) -> list[Tensor]:
        states = [module.state_dict(keep_vars=True) for module in self._modules]
        return [value for state in states for value in state.values() if isinstance(value, Tensor)]


def _identify(
    parts: Parts, learned: list[Tensor]
) -> tuple[dict[str, dict[str, str]], list[object], list[str]]:
    """Return digests, what moves on, and what cannot be told from others of its kind."""
    digests: dict[str, dict[str, str]] = {}
    moving: list[object] = []
    unknown: list[str] = []
    for part, things in parts.items():
        digests[part] = dict.fromkeys(things, "unknown")
        for name, thing in things.items():
            try:
                digests[part][name], more = identify(learned, **{name: thing})
            except UnidentifiableError as error:
                unknown.append(str(error))
            else:
                moving += more
    return digests, moving, unknown


class Checkpoint:
    """A file that the reader named, in which a run is kept after each epoch.

    Parameters
    ----------
    path : path
        The file, or a folder in which it gets a name of the run's own.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = user_path(path)

    def open(self, origin: Origin) -> dict | None:
        """Return the state that is kept, if any, and make sure that another can be written.

        Raises
        ------
        ValueError
            If the file is damaged, or of a run that is not known to be this one.
        OSError
            If it cannot be read or written.
        """
        if origin.unknown and self.path.is_dir():
            raise ValueError(
                f"checkpoint must be a file, got the folder {self.path}, because the run cannot be "
                f"told from others by {' and '.join(origin.unknown)}"
            )
        self._place(origin)
        return self._find()

    def save(self, run: dict[str, object]) -> None:
        """Write the state of a run, whole or not at all."""
        state = self.origin.state() | run
        write_atomically(self.path, lambda stream: torch.save(state, stream))

    def _place(self, origin: Origin) -> None:
        self.origin = origin
        if self.path.is_dir():
            self.path /= f"{origin.name()}.pt"
        folder = Path(os.path.realpath(self.path)).parent
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):  # raises now what would be raised later
            pass

    def _find(self) -> dict | None:
        if not self.path.exists():
            return None
        state = _read(self.path)
        if changed := self.origin.differences(state):
            raise ValueError(
                f"checkpoint {self.path} was made with other {' and '.join(changed)}: delete it to "
                "train anew, or name another file (what has been used in this process, and keeps "
                "something of it, is another thing than it was: make it anew to go on)"
            )
        if self.origin.unknown:
            warn(
                f"checkpoint {self.path} is taken to be of this run, which cannot be told from "
                f"others by {' and '.join(self.origin.unknown)}, nor how that changed in training"
            )
        before = self.origin.state()
        lost = self.origin.restore(state)
        if lost and not state["finished"]:
            self._go_on_without(lost, before)
        return state

    def _go_on_without(self, lost: list[str], before: dict) -> None:
        warn(
            f"{' and '.join(lost)} changed while training in a way that a checkpoint cannot "
            "hold: the run goes on, perhaps to other weights than without the break"
        )


class CachedRun(Checkpoint):
    """A file of the package's own, made anew with a warning where anything is amiss.

    Parameters
    ----------
    folder : path
        Where it is kept, under a name of the run's own.
    anew : bool
        Do not look whether the run is there.
    """

    def __init__(self, folder: Path, *, anew: bool) -> None:
        super().__init__(folder)
        self.anew = anew

    def open(self, origin: Origin) -> dict | None:
        """Return the state that is kept, if any."""
        self.kept = not origin.unknown
        if not self.kept:
            warn(f"this run is not kept: {' and '.join(origin.unknown)} may be another each time")
            return None
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._place(origin)
            return None if self.anew else self._find()
        except OSError as error:
            self._give_up(error)
        except ValueError as error:
            warn(f"{error}; training anew, and replacing it")
        return None

    def save(self, run: dict[str, object]) -> None:
        """Write the state of a run, if that can be done."""
        if self.kept:
            try:
                super().save(run)
            except OSError as error:
                self._give_up(error)

    def _go_on_without(self, lost: list[str], before: dict) -> None:
        self.origin.restore(before)
        raise ValueError(
            f"{self.path} is of a run that was broken off, and does not hold how "
            f"{' and '.join(lost)} changed"
        )

    def _give_up(self, error: OSError) -> None:
        self.kept = False
        warn(CANNOT_KEEP.format(error=error))


CANNOT_KEEP = (
    "cannot keep trained networks ({error}); training each time. Set TRIPLETLIB_CACHE to a folder "
    "that can be written"
)


def _read(path: Path) -> dict:
    content = path.read_bytes()
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            damaged: object = archive.testzip()  # checks the sums, at which torch does not look
        if damaged is None:
            state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
            damaged = ", ".join(sorted(_FIELDS - state.keys()))
    except Exception as error:  # a damaged file breaks its readers in ways of their own
        damaged = str(error) or type(error).__name__
    if damaged:
        raise ValueError(f"checkpoint {path} is damaged or not a checkpoint ({damaged})")
    return state
