"""Search many embeddings quickly with FAISS, and keep the index in a file."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from tripletlib._cache import write_atomically
from tripletlib._validation import check_choice, check_count, check_points

# What FAISS calls them: to its factory, and in the first four bytes of what it writes.
_KINDS = {"exact": "Flat", "hnsw": "HNSW32", "ivf": "IVF{cells},Flat"}
_CODES = {b"IxF2": "exact", b"IHNf": "hnsw", b"IwFl": "ivf"}
_EFFORT = {"hnsw": 64, "ivf": 16}
_MOST_EFFORT = 2**31 - 1  # what FAISS's integers hold
_MAGIC = b"tripletlib search index 1\n"
_MAGIC_GROUPED = b"tripletlib search index 2\n"  # with a table of equal embeddings before FAISS's
_MAGIC_IDS = b"tripletlib search index 3\n"  # with the ids, and the table if there is one
_DIGEST_BYTES = hashlib.sha256().digest_size
# A smaller number's square is lost to float32's least, as it would be to rounding beside 1.
_LEAST = (torch.finfo(torch.float32).tiny / torch.finfo(torch.float32).eps) ** 0.5


class SearchIndex:
    """Find the nearest of many embeddings with FAISS, exactly or approximately.

    A thin cover around one FAISS index: tensors in and out, checked arguments, Euclidean distances,
    files that are known to be whole, and ids of your own, say file names, in ``.ids``. The FAISS
    index itself is in ``.index``. Threads may search at once, each with an effort of its own, as
    long as none adds or removes.

    Parameters
    ----------
    embeddings : Tensor, floating point, shape (n, d)
        What is searched, at least one row. Kept in float32.
    kind : {"exact", "hnsw", "ivf"}, default "exact"
        - "exact" compares a query with every embedding.
        - "hnsw" walks a graph of 32 neighbours an embedding from one to the next that is nearer:
          fast to search, slow to build, and a quarter of a kilobyte more an embedding. Out of many
          that are the same its walk would not find the way, so it holds those that are *equal*
          once (all their rows are found nevertheless); of hundreds of *nearly* equal ones it may
          miss what lies behind them, unless `effort` is larger than their number.
        - "ivf" sorts the embeddings into about sqrt(n) cells by k-means, with a fixed seed, and
          looks into the cells nearest to the query: quick to build.
    ids : sequence of str or of int, optional
        A name for each embedding, no two the same. What `search` returns are rows, and
        ``index.ids[row]`` is the name.

    Raises
    ------
    TypeError, ValueError
        If embeddings is not a finite floating-point matrix of at least one row and column, its
        squared distances leave float32's range, kind is none of the three, or ids are not one a
        row, of another type, or not distinct.
    ImportError
        If FAISS is not installed (``pip install faiss-cpu``).

    Notes
    -----
    FAISS compares squared distances in float32, which orders neighbours well as long as the points
    do not lie far from the origin compared with their distances, as those on the unit sphere do
    not. There a distance of zero may come out as up to 0.001.

    Examples
    --------
    >>> import torch
    >>> index = SearchIndex(torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 2.0]]))
    >>> distances, indices = index.search(torch.zeros(1, 2), k=3)
    >>> distances, indices
    (tensor([[0., 2., 5.]]), tensor([[0, 2, 1]]))
    >>> index.add(torch.tensor([[0.0, 1.0]]))
    >>> index.search(torch.zeros(1, 2), k=2)
    (tensor([[0., 1.]]), tensor([[0, 3]]))
    >>> photographs = SearchIndex(torch.eye(2), ids=["dog.png", "cat.png"])
    >>> _, rows = photographs.search(torch.tensor([[0.1, 0.9]]), k=1)
    >>> photographs.ids[int(rows)]
    'cat.png'
    >>> photographs.remove(["cat.png"])
    >>> photographs.ids
    ['dog.png']

    References
    ----------
    M. Douze et al., "The Faiss library", arXiv 2401.08281, 2024. Y. Malkov, D. Yashunin,
    "Efficient and robust approximate nearest neighbor search using hierarchical navigable small
    world graphs", arXiv 1603.09320, 2016.
    """

    def __init__(
        self,
        embeddings: Tensor,
        kind: Literal["exact", "hnsw", "ivf"] = "exact",
        *,
        ids: Sequence[str] | Sequence[int] | None = None,
    ) -> None:
        check_choice(kind, _KINDS, "kind")
        points = _as_array(embeddings, "embeddings", _LEAST)
        if points.size == 0:
            raise ValueError(f"embeddings must not be empty, got shape {points.shape}")
        self.ids = None if ids is None else _checked_ids(ids, len(points))
        cells = max(1, round(len(points) ** 0.5))
        self.kind = kind
        self._group = None
        if kind == "hnsw":
            points, self._group = _distinct(points)
        self.index = _faiss().index_factory(points.shape[1], _KINDS[kind].format(cells=cells))
        if kind == "ivf":
            self.index.cp.min_points_per_centroid = 1  # fewer than FAISS likes, and no warning
            self.index.train(points)
        self.index.add(points)

    def __len__(self) -> int:
        """Return the number of embeddings."""
        return self.index.ntotal if self._group is None else len(self._group)

    def __repr__(self) -> str:
        return f"SearchIndex of {len(self)} embeddings of {self.index.d} numbers, {self.kind}"

    def add(self, embeddings: Tensor, ids: Sequence[str] | Sequence[int] | None = None) -> None:
        """Add embeddings, whose rows are counted on from those that are there.

        Parameters
        ----------
        embeddings : Tensor, floating point, shape (m, d)
            None at all is allowed. The cells of "ivf" stay where the first embeddings put them:
            make a new index when it has grown manifold, or when what is added lies elsewhere.
        ids : sequence of str or of int
            Their names, if the index has names, and none otherwise.

        Raises
        ------
        TypeError, ValueError
            As when the index was made, if the columns are not those of the index, or ids are given
            to an index without or not given to one with. The index is then as it was before.
        """
        points = _as_array(embeddings, "embeddings", _LEAST)
        self._check_columns(points, "embeddings")
        if (ids is None) != (self.ids is None):
            has = "no ids" if self.ids is None else "ids"
            raise ValueError(f"ids must be given to an index with ids only; this one has {has}")
        new_ids = [] if ids is None else _checked_ids(ids, len(points), self.ids)
        if self.kind == "hnsw":
            held = self.index.reconstruct_n(0, self.index.ntotal)
            kept, group = _distinct(np.concatenate([held, points]))
            if group is not None or self._group is not None:
                group = np.arange(len(kept)) if group is None else group
                before = group[: len(held)] if self._group is None else self._group
                self._group = np.concatenate([before, group[len(held) :]])
            points = kept[len(held) :]
        self.index.add(points)
        if self.ids is not None:
            self.ids += new_ids

    def remove(self, which: Iterable[str] | Iterable[int] | Tensor) -> None:
        """Take embeddings out; the rows of those that follow move up, as in a list.

        An index of kind "hnsw" builds its graph anew, which takes as long as at first; the cells of
        "ivf" stay where they are.

        Parameters
        ----------
        which : iterable of ids, or of rows if the index has no ids
            At least one embedding must stay.

        Raises
        ------
        KeyError
            If one of them is not in the index, which is then as it was before.
        TypeError, ValueError
            If a lone string is given, or anything in `which` is neither int nor str (a mask's
            booleans are not), or none would stay.
        """
        rows = self._rows(which)
        kept = np.delete(np.arange(len(self)), rows)
        if len(kept) == 0:
            raise ValueError("which must leave at least one embedding, got all of them")
        points = self._vectors()[kept]
        if self.kind == "hnsw":
            points, self._group = _distinct(points)
        self.index.reset()  # forgets what was added, and keeps the cells of "ivf"
        self.index.add(points)
        if self.ids is not None:
            self.ids = [self.ids[row] for row in kept]

    def _rows(self, which: Iterable[str] | Iterable[int] | Tensor) -> list[int]:
        """Give the rows of ids, or check rows."""
        what = "rows" if self.ids is None else "ids"
        names = range(len(self)) if self.ids is None else self.ids
        row_of = {name: row for row, name in enumerate(names)}
        which = _listed(which, "which")
        for name in which:
            # True == 1 and 1.0 == 1, so that a mask or floats would be found, and mean other rows.
            if type(name) not in (int, str):
                got = type(name).__name__
                raise TypeError(f"which must hold {what} as int or str, and no mask, got {got}")
            if name not in row_of:
                raise KeyError(f"which must hold {what} of the index, got {name!r}")
        return sorted({row_of[name] for name in which})

    def _vectors(self) -> np.ndarray:
        """Give the embeddings back, row by row."""
        if self.kind == "ivf":
            self.index.make_direct_map()  # where each row lies
        held = self.index.reconstruct_n(0, self.index.ntotal)
        if self.kind == "ivf":
            self.index.make_direct_map(False)
        return held if self._group is None else held[self._group]

    def _check_columns(self, points: np.ndarray, name: str) -> None:
        if points.shape[1] != self.index.d:
            raise ValueError(
                f"{name} must have the {self.index.d} columns of the index, got {points.shape[1]}"
            )

    def search(
        self, queries: Tensor, k: int = 10, *, effort: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return distances and indices of the k nearest embeddings of each query.

        Parameters
        ----------
        queries : Tensor, floating point, shape (m, d)
            One a row.
        k : int, default 10
            Neighbours wanted, at most as many as there are embeddings.
        effort : int, optional
            How hard an approximate index tries: the candidates that "hnsw" keeps in mind (FAISS's
            ``efSearch``, 64 by default; below k it is k) or the cells that "ivf" looks into
            (``nprobe``, 16 by default). More finds more and takes longer.

        Returns
        -------
        distances : Tensor, float32, shape (m, k)
            Euclidean, not squared, smallest first.
        indices : Tensor, int64, shape (m, k)
            Rows of the embeddings, in the order in which they came. Never -1: a query for which an
            approximate search meets fewer than k is searched exactly. Both are on the CPU.

        Raises
        ------
        TypeError, ValueError
            If queries is not a finite floating-point matrix of d columns, its squared distances
            leave float32's range, k or effort is out of range, or an exact index is given effort.
        """
        points = _as_array(queries, "queries")
        self._check_columns(points, "queries")
        check_count(k, "k")
        if k > len(self):
            raise ValueError(f"k must be at most the {len(self)} embeddings, got {k}")
        options = self._options(effort)
        k = int(k)  # FAISS takes no integer of NumPy's
        entries = min(k, self.index.ntotal)
        squared, indices = _search(self.index, points, entries, options)
        short = (indices < 0).any(axis=1)
        if short.any():
            squared[short], indices[short] = self._search_exactly(points[short], entries)
        if self._group is not None:
            squared, indices = _ungrouped(squared, indices, self._group, k)
        # Rounding may leave a zero a little below zero.
        return torch.from_numpy(np.sqrt(squared.clip(min=0))), torch.from_numpy(indices)

    def _options(self, effort: int | None) -> object | None:
        """Tell FAISS how hard to try, in a search and not as an attribute that others share."""
        if self.kind == "exact":
            if effort is not None:
                raise ValueError(f"effort is for approximate indices only, got {effort!r}")
            return None
        effort = _EFFORT[self.kind] if effort is None else effort
        check_count(effort, "effort")
        if effort > _MOST_EFFORT:
            raise ValueError(f"effort must be at most {_MOST_EFFORT}, got {effort}")
        if self.kind == "hnsw":
            # More candidates than points find nothing more, and FAISS would make room for them.
            return _faiss().SearchParametersHNSW(efSearch=min(int(effort), self.index.ntotal))
        return _faiss().SearchParametersIVF(nprobe=min(int(effort), self.index.nlist))

    def _search_exactly(self, points: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        if self.kind == "hnsw":
            return _search(self.index.storage, points, k, None)
        every = _faiss().SearchParametersIVF(nprobe=self.index.nlist)
        return _search(self.index, points, k, every)

    def save(self, path: str | os.PathLike) -> None:
        """Write the index to a file, whole or not at all.

        Parameters
        ----------
        path : path
            Where to; a file that is there is replaced, and kept if writing fails. ``~`` is the home
            folder, here and in `load`.

        Raises
        ------
        OSError
            If the file cannot be written.
        """
        parts = [memoryview(_faiss().serialize_index(self.index))]
        if self._group is not None:
            parts = [len(self).to_bytes(8, "little"), self._group.astype("<i8").tobytes(), *parts]
        magic = _MAGIC if self._group is None else _MAGIC_GROUPED
        if self.ids is not None:
            about = json.dumps({"ids": self.ids, "grouped": self._group is not None}).encode()
            magic, parts = _MAGIC_IDS, [len(about).to_bytes(8, "little"), about, *parts]
        digest = hashlib.sha256()
        for part in parts:
            digest.update(part)
        write_atomically(
            Path(os.path.expanduser(path)),
            lambda stream: stream.writelines((magic, digest.digest(), *parts)),
        )

    @classmethod
    def load(cls, path: str | os.PathLike) -> SearchIndex:
        """Read an index that `save` wrote.

        Parameters
        ----------
        path : path
            The file.

        Returns
        -------
        SearchIndex
            Gives the same answers as the one that was saved.

        Raises
        ------
        OSError
            If the file is not there or cannot be read.
        ValueError
            If it is not such a file, is damaged, or was written by a FAISS that this one does not
            understand.

        Notes
        -----
        The file carries its SHA-256, so that damage is found. That does not make a stranger's file
        safe: load only what you trust.
        """
        content = memoryview(Path(os.path.expanduser(path)).read_bytes())
        magic, header = content[: len(_MAGIC)], len(_MAGIC) + _DIGEST_BYTES
        if magic not in (_MAGIC, _MAGIC_GROUPED, _MAGIC_IDS):
            raise ValueError(f"{path} is not an index saved by SearchIndex")
        if hashlib.sha256(content[header:]).digest() != content[len(_MAGIC) : header]:
            raise ValueError(f"{path} is damaged (its SHA-256 differs): build and save it anew")
        payload, loaded = content[header:], cls.__new__(cls)
        loaded.ids, loaded._group, grouped = None, None, magic == _MAGIC_GROUPED
        if magic == _MAGIC_IDS:
            end = 8 + int.from_bytes(payload[:8], "little")
            about, payload = json.loads(bytes(payload[8:end])), payload[end:]
            loaded.ids, grouped = about["ids"], about["grouped"]
        if grouped:
            end = 8 * (1 + int.from_bytes(payload[:8], "little"))
            loaded._group, payload = np.frombuffer(payload[8:end], "<i8"), payload[end:]
        # Before FAISS sees it: some versions kill the process over a code that they do not know.
        loaded.kind = _CODES.get(bytes(payload[:4]))
        try:
            if loaded.kind is None:
                raise RuntimeError("it is of no kind known here")
            loaded.index = _faiss().deserialize_index(np.frombuffer(payload, np.uint8))
        except RuntimeError as error:
            raise ValueError(f"{path} was written by another version of FAISS ({error})") from error
        return loaded


def _checked_ids(
    ids: Sequence[str] | Sequence[int], length: int, taken: Iterable[str | int] | None = None
) -> list[str] | list[int]:
    """Refuse anything but one id an embedding, all strings or all whole numbers, none twice."""
    ids = _listed(ids, "ids")
    if len(ids) != length:
        raise ValueError(f"ids must be {length}, one for each row of embeddings, got {len(ids)}")
    before = [] if taken is None else list(taken)
    kinds = {type(name) for name in before + ids}
    if len(kinds) > 1 or not kinds <= {str, int}:
        names = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise TypeError(f"ids must be all str or all int, got {names}: convert them, by str() say")
    twice = next((name for name, count in Counter(before + ids).items() if count > 1), None)
    if twice is not None:
        raise ValueError(f"ids must be distinct, got {twice!r} twice")
    return ids


def _listed(names: Iterable | Tensor, argument: str) -> list:
    """List ids or rows, with those of torch and of NumPy as Python's own."""
    lone = isinstance(names, (str, bytes)) or getattr(names, "ndim", 1) == 0
    if lone or not isinstance(names, Iterable):
        got = type(names).__name__
        raise TypeError(f"{argument} must be a sequence of str or of int, got {got}")
    names = names.tolist() if isinstance(names, (Tensor, np.ndarray)) else names
    return [name.tolist() if isinstance(name, (Tensor, np.generic)) else name for name in names]


def _search(
    index: object, points: np.ndarray, k: int, options: object | None
) -> tuple[np.ndarray, np.ndarray]:
    """Search with options that hold for this search alone.

    By the method in C, which FAISS keeps under this name: ``search(..., params=...)`` is lost where
    another package has imported faiss.contrib.torch_utils, as pytorch-metric-learning does.
    """
    squared = np.empty((len(points), k), np.float32)
    indices = np.empty((len(points), k), np.int64)
    at = _faiss().swig_ptr
    index.search_c(len(points), at(points), k, at(squared), at(indices), options)
    return squared, indices


def _distinct(points: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Keep the first of equal points, and say of each which was kept (None: there are none)."""
    _, first, group = np.unique(points + 0.0, axis=0, return_index=True, return_inverse=True)
    if len(first) == len(points):
        return points, None
    kept = np.sort(first)
    return points[kept], kept.searchsorted(first[group.reshape(-1)])


def _ungrouped(
    squared: np.ndarray, found: np.ndarray, group: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Put in the place of every group that was found its rows, as far as the k nearest reach."""
    rows, sizes = group.argsort(kind="stable"), np.bincount(group)
    starts, wanted = (sizes.cumsum() - sizes)[found], sizes[found]
    wanted = (k - (wanted.cumsum(axis=1) - wanted)).clip(0, wanted).ravel()
    # Of each group, the places from its start on.
    places = np.arange(wanted.sum()) + (starts.ravel() - (wanted.cumsum() - wanted)).repeat(wanted)
    shape = (len(found), k)
    return squared.ravel().repeat(wanted).reshape(shape), rows[places].reshape(shape)


def _as_array(points: Tensor, name: str, least: float = 0.0) -> np.ndarray:
    """Check points, and return them as FAISS wants them."""
    check_points(points, name)
    points = points.detach().cpu()
    largest = max(map(abs, map(float, points.aminmax()))) if points.numel() else 0.0
    # Of two such points the squared distance, and either half of it, is half of what float32 holds.
    most = (torch.finfo(torch.float32).max / 8 / max(1, points.shape[1])) ** 0.5
    if not (largest == 0 or least <= largest <= most):
        raise ValueError(
            f"{name} must have a largest coordinate from {least:.3g} to {most:.3g}, whose square "
            f"float32 holds, got {largest:.3g}"
        )
    return np.ascontiguousarray(points.to(torch.float32).numpy())


def _faiss() -> ModuleType:
    on_mac = sys.platform == "darwin"
    if on_mac:
        # There torch and FAISS each bring an OpenMP of their own, and two of them abort or crash
        # (github.com/pytorch/pytorch/issues/149201) unless told to bear it and FAISS to use one
        # thread.
        os.environ.setdefault("KMP_DUPLICATE_LIB_OK", "TRUE")
    try:
        import faiss
    except ImportError as error:
        raise ImportError(
            "SearchIndex needs FAISS: pip install faiss-cpu, or tripletlib[search]"
        ) from error
    if on_mac:
        faiss.omp_set_num_threads(1)
    return faiss
