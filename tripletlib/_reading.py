"""Data sets that are read item by item: their labels, their files, and batches of their images."""

from __future__ import annotations

import dataclasses
import itertools
import math
import multiprocessing
import os
import random
import stat
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    default_collate,
    get_worker_info,
)
from tqdm import tqdm

from tripletlib._validation import check_count


def check_dataset(dataset: object, name: str = "images") -> None:
    """Refuse anything but a map-style data set of at least one item."""
    if not isinstance(dataset, Dataset) or isinstance(dataset, IterableDataset):
        raise TypeError(
            f"{name} must be a torch.Tensor or a map-style torch Dataset, "
            f"got {type(dataset).__name__}"
        )
    if len(dataset) == 0:
        raise ValueError(f"{name} must hold at least one image, got an empty data set")


def number_of_workers(workers: int | None) -> int:
    """Check a number of processes, or choose it: where forking is the rule, one a core, up to 4.

    Processes that torchrun started on this machine share out its cores.
    """
    if workers is not None:
        check_count(workers, "workers", low=0)
        return int(workers)
    if multiprocessing.get_start_method() != "fork":
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(4, max(1, (cores or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


class Reader:
    """Reads batches of a data set's images, ahead of their use, by processes that stay alive.

    Every batch is read with random numbers of its own, whichever process reads it. Used in a
    ``with`` statement, at whose end the processes end.

    Parameters
    ----------
    dataset : Dataset
        Of images, or of tuples that begin with one.
    workers : int
        Processes; with 0 this one reads, and its random states are left as they were.
    what : {"images", "labels"}
        Which part of the items is wanted.
    """

    def __init__(self, dataset: Dataset, workers: int, what: str = "images") -> None:
        self._batches: list[list[int]] = []
        self._loader = DataLoader(
            _Items(dataset, what),
            batch_sampler=self,
            num_workers=workers,
            persistent_workers=workers > 0,
            collate_fn=_collate,
            generator=torch.Generator(),  # else the global one would move on
        )

    def __iter__(self) -> Iterator[list[int]]:
        """Give the keys of the batches to the loader: a seed, and the places."""
        return iter(self._batches)

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *error: object) -> None:
        # Left to the garbage collector, the processes of a run that failed would stay as long as
        # its traceback, and complain when they are gone.
        running = getattr(self._loader, "_iterator", None)
        if running is not None:
            running._shutdown_workers()
            self._loader._iterator = None

    def read(self, batches: Iterable[Sequence[int]], seeds: Sequence[int]) -> Iterator:
        """Yield what is wanted of the items of each batch, in order."""
        self._batches = [
            [_mixed(*seeds, number), *map(int, batch)] for number, batch in enumerate(batches)
        ]
        for batch in self._loader:
            if isinstance(batch, _Failure):
                raise batch.error(batch.message)
            yield batch


def _mixed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


class _Failure(NamedTuple):
    """What went wrong, as it comes out of another process."""

    error: type[Exception]
    message: str


class _Items(Dataset):
    def __init__(self, dataset: Dataset, what: str) -> None:
        self.dataset, self.take = dataset, {"images": _image, "labels": _label}[what]

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, key: list[int]) -> list:
        seed, *places = key
        with _random_numbers_of(seed):
            return [self._item(place) for place in places]

    def _item(self, place: int) -> object:
        name = f"images[{place}]{_file_of(self.dataset, place)}"
        try:
            item = self.dataset[place]
        except Exception as error:  # the reader's data sets may raise anything
            words = f"{name} could not be read ({type(error).__name__}: {error})"
            return _Failure(RuntimeError, words)
        return self.take(item, name)


@contextmanager
def _random_numbers_of(seed: int) -> Iterator[None]:
    """Seed the global generators, and in the main process set them back."""
    in_worker = get_worker_info() is not None
    if not in_worker:
        of_torch, of_numpy = torch.get_rng_state(), np.random.get_state()  # noqa: NPY002
        of_python = random.getstate()
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    random.seed(seed)
    try:
        yield
    finally:
        if not in_worker:
            torch.set_rng_state(of_torch)
            np.random.set_state(of_numpy)  # noqa: NPY002
            random.setstate(of_python)


def _image(item: object, name: str) -> Tensor | _Failure:
    image = item[0] if isinstance(item, (tuple, list)) and item else item
    image = torch.as_tensor(image) if isinstance(image, np.ndarray) else image
    if not isinstance(image, Tensor):
        return _Failure(
            TypeError,
            f"{name} must be a tensor, or a tuple that begins with one, got {type(image).__name__}:"
            " end the transform of the data set with one that makes tensors",
        )
    if not image.is_floating_point():
        return _Failure(
            TypeError,
            f"{name} must be floating point, got {image.dtype}: end the transform of the data set "
            "with ToDtype(torch.float32, scale=True)",
        )
    return image


def _label(item: object, name: str) -> object:
    if not isinstance(item, (tuple, list)) or len(item) < 2:
        got = type(item).__name__
        return _Failure(TypeError, f"{name} must be (image, label), as labels are not given: {got}")
    return _one_label(item[1], name)


def _one_label(label: object, name: str) -> object:
    """Take a label out of the tensor or array that holds it, and it alone."""
    if not isinstance(label, (Tensor, np.ndarray, np.generic)):
        return label
    if math.prod(label.shape) != 1:
        return _Failure(
            ValueError,
            f"{name} must have one whole number or word as its label, got "
            f"{type(label).__name__} of shape {tuple(label.shape)}: of a one-hot label give "
            "the place of the 1, its argmax",
        )
    return label.item()


def _collate(items: list) -> Tensor | list | _Failure:
    failure = next((item for item in items if isinstance(item, _Failure)), None)
    if failure is not None or not isinstance(items[0], Tensor):
        return failure or items
    shapes = {tuple(image.shape): None for image in items}
    if len(shapes) > 1:
        some = " and ".join(map(str, list(shapes)[:2]))
        return _Failure(
            ValueError, f"images of one batch must be of one shape, got {some}: resize or crop them"
        )
    return default_collate(items)


def labels_of(dataset: Dataset, workers: int, *, progress: bool) -> Tensor:
    """Return a data set's labels: its targets, or else those of its items, all read once."""
    targets = _targets(dataset)
    if targets is not None:
        return as_labels(_transformed(targets))
    batches = list(torch.arange(len(dataset)).split(64))
    with Reader(dataset, workers, "labels") as reader:
        parts = reader.read(batches, [0])
        bar = tqdm(parts, "reading labels", len(batches), disable=not progress, delay=1)
        return as_labels(list(itertools.chain.from_iterable(bar)))


_Target = tuple[object, "Callable[[object], object] | None"]  # and what makes it the item's label


def _targets(dataset: Dataset) -> list[_Target] | None:
    """Return the targets of a data set, of one of its parts, or of several together, if known."""
    targets = getattr(dataset, "targets", None)
    if targets is not None:
        targets = targets.tolist() if isinstance(targets, (Tensor, np.ndarray)) else list(targets)
        if len(targets) != len(dataset):
            raise ValueError(
                f"images.targets must be {len(dataset)}, one an item, got {len(targets)}"
            )
        transform = getattr(dataset, "target_transform", None)
        return [(target, transform) for target in targets]
    if isinstance(dataset, Subset):
        targets = _targets(dataset.dataset)
        return None if targets is None else [targets[place] for place in dataset.indices]
    if isinstance(dataset, ConcatDataset):
        parts = [_targets(part) for part in dataset.datasets]
        return None if None in parts else list(itertools.chain.from_iterable(parts))
    return None


def _transformed(targets: list[_Target]) -> list:
    """Make targets labels. Not before parts are chosen: a transform may know those classes only."""
    labels = []
    with _random_numbers_of(0):
        for place, (label, transform) in enumerate(targets):
            if transform is not None:
                label = _one_label(transform(label), f"images[{place}]")
            if isinstance(label, _Failure):
                raise label.error(label.message)
            labels.append(label)
    return labels


def as_labels(found: Sequence[int] | Sequence[str]) -> Tensor:
    """Make labels a tensor of integers, words by their place in the alphabetical order."""
    kinds = {bool if isinstance(label, bool) else type(label) for label in found}
    if all(issubclass(kind, str) for kind in kinds):
        return torch.from_numpy(np.unique(np.array(found), return_inverse=True)[1]).long()
    if not all(issubclass(kind, (int, np.integer)) and kind is not bool for kind in kinds):
        names = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise TypeError(f"labels must be all integers or all words, got {names}")
    return torch.tensor([int(label) for label in found])


def _file_of(dataset: Dataset, place: int) -> str:
    """Name the file of an item, in brackets, if the data set lists its samples."""
    place = place + len(dataset) if place < 0 else place
    while isinstance(dataset, (Subset, ConcatDataset)):
        if isinstance(dataset, Subset):
            dataset, place = dataset.dataset, dataset.indices[place]
            continue
        part = next(i for i, end in enumerate(dataset.cumulative_sizes) if place < end)
        place -= [0, *dataset.cumulative_sizes][part]
        dataset = dataset.datasets[part]
    try:
        file = dataset.samples[place][0]
    except Exception:
        return ""
    return f" ({file})" if isinstance(file, (str, Path)) else ""


_NUMBERS = {bool, int, float, type(None)}  # passed by in haste, as there may be millions


def file_stamps(dataset: object) -> list[tuple[str, int, int]]:
    """List the files of a data set with their sizes and times, sorted by name.

    A file is any string or path that names one, by itself or in a folder that an attribute of the
    same object names. Looked through are the attributes of the data set, lists, tuples, sets,
    dictionaries, arrays, tables and dataclasses there, and the data sets within it.
    """
    stamps: dict[str, tuple[str, int, int] | None] = {}
    # For each choice of folders what was met, kept alive so that no address comes twice.
    seen: dict[tuple[str, ...], dict[int, object]] = defaultdict(dict)
    stack: list[tuple[object, tuple[str, ...]]] = [(dataset, ())]
    while stack:
        thing, folders = stack.pop()
        if isinstance(thing, (str, Path)):
            _add_stamps(stamps, os.fspath(thing), folders)
        elif type(thing) not in _NUMBERS and id(thing) not in seen[folders]:
            seen[folders][id(thing)] = thing
            attributes = _attributes(thing)
            folders = _folders(attributes) or folders
            stack += [(part, folders) for part in attributes or _parts(thing)]
    return sorted(stamp for stamp in stamps.values() if stamp is not None)


def _attributes(thing: object) -> list[object]:
    """List the values of a data set's attributes, or of a dataclass's fields."""
    if isinstance(thing, Dataset):
        return list(vars(thing).values())
    if dataclasses.is_dataclass(thing) and not isinstance(thing, type):
        return [getattr(thing, field.name, None) for field in dataclasses.fields(thing)]
    return []


def _folders(attributes: list[object]) -> tuple[str, ...]:
    """Return the folders among attributes, each with a separator at its end."""
    names = [os.fspath(value) for value in attributes if isinstance(value, (str, Path))]
    return tuple(os.path.join(name, "") for name in names if os.path.isdir(name))


def _parts(thing: object) -> Iterable[object]:
    """Give what a container holds; of an array or table only what is not numbers."""
    if isinstance(thing, dict):
        return [*thing, *thing.values()]
    if isinstance(thing, (list, tuple, set, frozenset)):
        return thing
    if isinstance(thing, np.ndarray) and thing.dtype.names:
        return [thing[name] for name in thing.dtype.names]
    if isinstance(thing, np.ndarray):
        words = thing.ravel().tolist() if thing.dtype.kind in "OUST" else []
        return map(os.fsdecode, words) if thing.dtype.kind == "S" else words
    # The class, as an object's own look-up may do anything.
    return _parts_of_table(thing) if hasattr(type(thing), "to_numpy") else []


def _parts_of_table(table: object) -> list[object]:
    """Give index and columns of a pandas frame, or index and values of another of its kind."""
    index = getattr(table, "index", None)
    parts = [] if type(index) is type(table) else [index]  # an index of its own kind has another
    if getattr(table, "ndim", 1) == 2 and hasattr(table, "items"):
        return [*parts, *(column for _, column in table.items())]
    if getattr(getattr(table, "dtype", None), "kind", "O") in "OUST":
        with suppress(Exception):  # of a library that keeps words elsewhere, on a GPU, say
            parts.append(np.asarray(table))
    return parts


def _add_stamps(
    stamps: dict[str, tuple[str, int, int] | None], name: str, folders: tuple[str, ...]
) -> None:
    """Look for a name's file, each place once; words are file names in a folder only."""
    places = [name] if os.sep in name or "." in name else []
    if not os.path.isabs(name):
        places += [folder + name for folder in folders if not name.startswith(folder)]
    for place in places:
        if place not in stamps:
            stamps[place] = _stamp(place)


def _stamp(path: str) -> tuple[str, int, int] | None:
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return None if stat.S_ISDIR(found.st_mode) else (path, found.st_size, found.st_mtime_ns)
