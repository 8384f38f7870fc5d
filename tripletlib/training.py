"""Train an embedding network, keep and resume the result, and embed images with it."""

from __future__ import annotations

import hashlib
import inspect
import math
import os
import pickle
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, RandomSampler
from tqdm import tqdm

from tripletlib._cache import cache_folder, write_atomically
from tripletlib._optimizer import optimizers
from tripletlib._validation import check_count, check_images, check_labels, check_number
from tripletlib.augmentation import jitter
from tripletlib.losses import TripletLoss
from tripletlib.triplets import describe_triplets


class History:
    """What happened at each step of a training run, a row a step.

    ``history["loss"]`` is one column as a NumPy array, ``len(history)`` the number of steps and
    ``history.frame()`` the whole as a pandas data frame. The columns:

    - ``epoch`` and ``step``, both counted from 0, the step through all epochs;
    - ``loss``, of the batch, before the step's update;
    - ``active``, the fraction of the batch's valid triplets that violate the margin;
    - ``positive_distance`` and ``negative_distance``, the mean over the batch's pairs of one and of
      different classes, squared if the loss is;
    - ``spread``, how far the batch's embeddings lie apart (see `describe_triplets`);
    - ``learning_rate``, and ``seconds`` since training began, resting times left out.
    """

    def __init__(self, rows: Iterable[dict[str, float]] = ()) -> None:
        self.rows = list(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, column: str) -> np.ndarray:
        if self.rows and column not in self.rows[0]:
            raise KeyError(f"no column {column!r}; there are {', '.join(self.rows[0])}")
        return np.array([row[column] for row in self.rows])

    def __repr__(self) -> str:
        if not self.rows:
            return "History of 0 steps"
        last = self.rows[-1]
        return (
            f"History of {len(self)} steps: loss {last['loss']:.4f}, "
            f"active {last['active']:.2%} at the last one"
        )

    def frame(self) -> pd.DataFrame:
        """Return the history as a data frame with one row a step."""
        return pd.DataFrame(self.rows)


def fit(
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    epochs: int = 2,
    batch_size: int = 512,
    learning_rate: float = 4e-3,
    seed: int | None = None,
    augment: Callable[[Tensor], Tensor] | Literal[False] | None = None,
    batch_sampler: Iterable[Sequence[int]] | None = None,
    bf16: bool | None = None,
    checkpoint: str | os.PathLike | None = None,
    callback: Callable[[History], None] | None = None,
    progress: bool = True,
) -> History:
    """Train a network so that its embeddings satisfy a loss.

    Convolution kernels but the first are trained by Muon, all other weights by AdamW, both with a
    one-cycle schedule.

    Parameters
    ----------
    network : nn.Module
        Maps a batch of images to embeddings of shape (n, d). It is trained in place, on the device
        where its parameters are.
    images : Tensor, floating point, shape (n, ...)
        All training images. Each is looked at once an epoch.
    labels : Tensor of integers, shape (n,)
        Their classes.
    loss : callable, optional
        Takes (embeddings, labels) and returns a scalar; any loss of this package or of
        pytorch-metric-learning. Parameters of its own are trained too. By default
        ``TripletLoss()``.
    epochs : int, default 2
        Passes over the images.
    batch_size : int, default 512
        Images a step. What is left at the end of an epoch makes a smaller batch, unless it is a
        single image, which can form no triplet.
    learning_rate : float, default 4e-3
        Peak of the one-cycle schedule for AdamW. That of Muon is 12.5 times as high.
    seed : int, optional
        Fixes order, augmentation and dropout: the same network, data and seed give the same
        weights on the same machine. The global random state is left as it was. By default drawn
        from torch's global generator.
    augment : callable or False, optional
        Changes a batch of images before the network sees it. By default `jitter` if the images
        have shape (n, channels, height, width), and nothing otherwise; False for nothing.
    batch_sampler : iterable of sequences of indices, optional
        Replaces the shuffled batches, for instance a `BalancedBatchSampler`; it has a length, and
        `batch_size` is then of no effect.
    bf16 : bool, optional
        Run the network in bfloat16 (autocast). By default only where that is faster without doubt:
        on a CPU with AMX. The loss is always computed in float32.
    checkpoint : path, optional
        Written whole after each epoch. If it exists, training goes on from there, to the same
        weights as without a break; a finished one is just loaded. In an existing folder, the file
        is named after the run's initial weights, data, settings and code.
    callback : callable, optional
        Called with the history so far after every step.
    progress : bool, default True
        Show a bar with the loss and the active fraction.

    Returns
    -------
    History
        A row a step.

    Raises
    ------
    TypeError, ValueError
        If an argument is of the wrong type, shape or range, embeddings are not finite, or the
        checkpoint was made with other code, data or settings.
    FloatingPointError
        If the loss is not finite.
    OSError
        If the checkpoint cannot be written there; found out before training begins.

    Notes
    -----
    The schedule is that of L. N. Smith and N. Topin, "Super-convergence", arXiv 1708.07120, 2018,
    rising for a fifth of the steps. Muon is that of K. Jordan et al., 2024.
    """
    loss = TripletLoss() if loss is None else loss
    _check_arguments(network, images, labels, epochs, batch_size, learning_rate, batch_sampler)
    seed = int(torch.randint(2**31, ())) if seed is None else seed
    check_count(seed, "seed", low=0)
    augment = jitter if augment is None and images.dim() == 4 else augment
    device = next(network.parameters()).device
    bf16 = _has_fast_bf16(device) if bf16 is None else bf16
    if batch_sampler is None:
        lone = len(images) % batch_size == 1
        batch_sampler = BatchSampler(RandomSampler(images), batch_size, drop_last=lone)
    run = _Run(network, loss, learning_rate, steps=epochs * len(batch_sampler))
    if checkpoint is not None:
        settings = (epochs, batch_size, learning_rate, seed, bf16, len(batch_sampler))
        origin = _origin(network, loss, images, labels, augment, settings)
        run.attach(_checkpoint_file(Path(checkpoint), network, origin), origin)

    network.train()
    start = time.perf_counter() - (run.history.rows[-1]["seconds"] if run.history else 0.0)
    with torch.random.fork_rng(), _progress_bar(run, progress) as bar:
        for epoch in range(run.epoch, epochs):
            # A stream of its own for each epoch, so that resuming needs no random state.
            torch.manual_seed(int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0]))
            for batch in batch_sampler:
                views, batch_labels = images[batch].to(device), labels[batch].to(device)
                views = augment(views) if augment else views
                with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                    embeddings = network(views)
                embeddings = embeddings.float() if bf16 else embeddings
                row = run.step(loss(embeddings, batch_labels))
                row |= _triplet_columns(embeddings, batch_labels, loss)
                row |= {"epoch": epoch, "seconds": time.perf_counter() - start}
                run.history.rows.append(row)
                shown = {"loss": f"{row['loss']:.3f}", "active": f"{row['active']:.1%}"}
                bar.set_postfix(shown, refresh=False)
                bar.update()
                if callback is not None:
                    callback(run.history)
            run.epoch = epoch + 1
            run.save()
    network.eval()
    return run.history


class _Run:
    """The parts of a training run that change, so that a checkpoint can hold them all."""

    def __init__(
        self, network: nn.Module, loss: Callable[..., Tensor], learning_rate: float, steps: int
    ) -> None:
        self.network = network
        self.loss = loss
        self.optimizers = optimizers(network, loss, learning_rate)
        self.schedules = [
            torch.optim.lr_scheduler.OneCycleLR(
                optimizer,
                optimizer.defaults["lr"],
                total_steps=max(1, steps),
                pct_start=0.2,
                cycle_momentum=False,
            )
            for optimizer in self.optimizers
        ]
        self.steps = steps
        self.history = History()
        self.epoch = 0
        self.path: Path | None = None

    def step(self, value: Tensor) -> dict[str, float]:
        """Follow the gradient of a loss once, and say what was done."""
        row = {
            "step": len(self.history),
            "loss": value.item(),
            "learning_rate": self.schedules[0].get_last_lr()[0],
        }
        if not math.isfinite(row["loss"]):
            raise FloatingPointError(
                f"loss is {row['loss']} at step {row['step']}: try a lower learning_rate"
            )
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        value.backward()
        for optimizer, schedule in zip(self.optimizers, self.schedules, strict=True):
            optimizer.step()
            schedule.step()
        return row

    def attach(self, path: Path, origin: dict[str, str]) -> None:
        """Keep the run at `path`, and go on from there if it holds one."""
        self.path, self.origin = path, origin
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):  # raises now what would be raised later
            pass
        if not path.exists():
            return
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            theirs = state["origin"]
        except (OSError, RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as e:
            raise ValueError(f"checkpoint {path} is damaged or not a checkpoint ({e})") from e
        if changed := [part for part in origin if theirs.get(part) != origin[part]]:
            raise ValueError(
                f"checkpoint {path} was made with other {' and '.join(changed)}: delete it to "
                "train anew, or name another file"
            )
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        self.history.rows[:] = state["history"]
        self.epoch = state["epoch"]

    def save(self) -> None:
        """Write the checkpoint whole, if there is to be one."""
        if self.path is not None:
            state = {name: part.state_dict() for name, part in self._parts().items()}
            state |= {"origin": self.origin, "history": self.history.rows, "epoch": self.epoch}
            write_atomically(self.path, lambda stream: torch.save(state, stream))

    def _parts(self) -> dict:
        parts = {"network": self.network}
        parts |= {f"optimizer {i}": part for i, part in enumerate(self.optimizers)}
        parts |= {f"schedule {i}": part for i, part in enumerate(self.schedules)}
        return parts | ({"loss": self.loss} if isinstance(self.loss, nn.Module) else {})


def load_or_fit(
    make_network: Callable[[], nn.Module],
    images: Tensor,
    labels: Tensor,
    *,
    seed: int = 0,
    retrain: bool = False,
    **options: object,
) -> tuple[nn.Module, History]:
    """Return a trained network, from this machine's cache if the very same run was made before.

    The run is known by its data, its settings, the network and the code of this package; if any
    of them changes, the network is trained anew. Where the cache folder cannot be written, a
    warning says so and the network is trained each time.

    Parameters
    ----------
    make_network : callable
        Builds the untrained network, for instance ``EmbeddingNet``.
    images, labels : Tensor
        As for `fit`.
    seed : int, default 0
        Fixes the initial weights too.
    retrain : bool, default False
        Train even if the cache has the run, and keep the new one.
    **options
        What else `fit` takes, but `checkpoint`.

    Returns
    -------
    network : nn.Module
        Trained, in evaluation mode.
    history : History
        How it was trained.
    """
    folder = cache_folder() / "networks"
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = make_network()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            place = scratch if retrain else folder
            history = fit(network, images, labels, seed=seed, checkpoint=place, **options)
            for file in Path(scratch).iterdir():
                os.replace(file, folder / file.name)
    except OSError as error:
        warnings.warn(
            f"cannot keep trained networks in {folder} ({error}); training each time. "
            "Set TRIPLETLIB_CACHE to a folder that can be written",
            stacklevel=2,
        )
        history = fit(network, images, labels, seed=seed, **options)
    return network, history


def embed(network: nn.Module, images: Tensor, batch_size: int = 512) -> Tensor:
    """Return the embeddings of images, in batches and without gradients.

    Parameters
    ----------
    network : nn.Module
        Put in evaluation mode for the while, so that a row does not depend on its batch.
    images : Tensor, floating point, shape (n, ...)
        What the network takes.
    batch_size : int, default 512
        Images at a time; the rows are the same for any, up to rounding.

    Returns
    -------
    Tensor, shape (n, d)
        On the CPU, without gradient.

    Raises
    ------
    TypeError, ValueError
        If images is not a floating-point tensor of at least one image, or batch_size is below 1.
    """
    check_images(images)
    check_count(batch_size, "batch_size")
    device = next(network.parameters(), torch.empty(0)).device
    training = [module for module in network.modules() if module.training]
    if training:
        network.eval()
    try:
        with torch.no_grad():
            return torch.cat([network(part.to(device)).cpu() for part in images.split(batch_size)])
    finally:
        for module in training:
            module.training = True


def _check_arguments(
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    batch_sampler: object,
) -> None:
    if not isinstance(network, nn.Module) or next(network.parameters(), None) is None:
        raise TypeError(f"network must be an nn.Module with parameters, got {network!r}")
    check_images(images)
    check_labels(labels, len(images), of="images")
    if len(images) < 2:
        raise ValueError(f"images must be at least 2, got {len(images)}")
    check_count(epochs, "epochs")
    check_count(batch_size, "batch_size", low=2)
    check_number(learning_rate, "learning_rate", strict=True)
    if batch_sampler is not None and not hasattr(batch_sampler, "__len__"):
        raise TypeError(
            f"batch_sampler must have a length, got {type(batch_sampler).__name__} without one"
        )


def _has_fast_bf16(device: torch.device) -> bool:
    # A torch too old to tell is treated as a CPU without.
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return device.type == "cpu" and capabilities.get("amx_bf16", False)


def _progress_bar(run: _Run, progress: bool) -> tqdm:
    return tqdm(
        total=run.steps,
        initial=len(run.history),
        disable=not progress,
        file=sys.stdout,
        mininterval=1.0,
        unit="batch",
    )


def _triplet_columns(embeddings: Tensor, labels: Tensor, loss: object) -> dict[str, float]:
    # A loss that knows no margin, or no squared distance, is described with the defaults.
    margin, squared = getattr(loss, "margin", 0.2), getattr(loss, "squared", True)
    state = describe_triplets(embeddings.detach(), labels, margin, squared=squared)
    return {
        "active": state.active,
        "positive_distance": state.positive_distance,
        "negative_distance": state.negative_distance,
        "spread": state.spread,
    }


def _origin(
    network: nn.Module,
    loss: object,
    images: Tensor,
    labels: Tensor,
    augment: object,
    settings: tuple,
) -> dict[str, str]:
    """Say by digests what a run comes from, but for its initial weights."""
    modules = [sys.modules[f"tripletlib.{name}"] for name in _TRAINING_MODULES]
    return {
        "data": _digest(images, labels),
        "network": _digest(_identity(network)),
        "settings": _digest(_identity(loss), _identity(augment), repr(settings)),
        "code": _digest(torch.__version__, *map(inspect.getsource, modules)),
    }


_TRAINING_MODULES = (
    "_optimizer",
    "augmentation",
    "distances",
    "losses",
    "networks",
    "training",
    "triplets",
)


def _identity(thing: object) -> str:
    """Describe an object by its text and the source of its class or function."""
    named = inspect.isroutine(thing)
    try:
        source = inspect.getsource(thing if named else type(thing))
    except (OSError, TypeError):  # built in, or typed at a prompt
        source = ""
    return (thing.__qualname__ if named else repr(thing)) + source


def _checkpoint_file(path: Path, network: nn.Module, origin: dict[str, str]) -> Path:
    if not path.is_dir():
        return path
    return path / f"{_digest(*network.state_dict().values(), *origin.values())[:16]}.pt"


def _digest(*parts: Tensor | str) -> str:
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            digest.update(repr((tuple(part.shape), part.dtype)).encode())
            digest.update(part.detach().cpu().contiguous().numpy())
        else:
            digest.update(part.encode() + b"\0")
    return digest.hexdigest()
