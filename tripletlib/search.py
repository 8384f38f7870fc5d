"""Search many embeddings quickly with FAISS, keep the index in a file, and read images to ask."""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps, ImageStat
from torch import Tensor

from tripletlib._cache import write_atomically
from tripletlib._validation import check_choice, check_count, check_points
from tripletlib.data import _PIXEL_STATISTICS

# What FAISS calls them: to its factory, and as classes.
_KINDS = {"exact": "Flat", "hnsw": "HNSW32", "ivf": "IVF{cells},Flat"}
_CLASSES = {"IndexFlatL2": "exact", "IndexHNSWFlat": "hnsw", "IndexIVFFlat": "ivf"}
_EFFORT = {"hnsw": 64, "ivf": 16}
_MAGIC = b"tripletlib search index 1\n"
_DIGEST_BYTES = hashlib.sha256().digest_size


class SearchIndex:
    """Find the nearest of many embeddings with FAISS, exactly or approximately.

    A thin cover around one FAISS index: tensors in and out, checked arguments, Euclidean distances,
    and files that are known to be whole. The FAISS index itself is in ``.index``.

    Parameters
    ----------
    embeddings : Tensor, floating point, shape (n, d)
        What is searched, at least one row. Kept in float32.
    kind : {"exact", "hnsw", "ivf"}, default "exact"
        - "exact" compares a query with every embedding.
        - "hnsw" walks a graph of 32 neighbours an embedding from one to the next that is nearer:
          fast to search, slow to build, and a quarter of a kilobyte more an embedding.
        - "ivf" sorts the embeddings into about sqrt(n) cells by k-means, with a fixed seed, and
          looks into the cells nearest to the query: quick to build.

    Raises
    ------
    TypeError, ValueError
        If embeddings is not a finite floating-point matrix of at least one row and column, or kind
        is none of the three.
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

    References
    ----------
    M. Douze et al., "The Faiss library", arXiv 2401.08281, 2024. Y. Malkov, D. Yashunin,
    "Efficient and robust approximate nearest neighbor search using hierarchical navigable small
    world graphs", arXiv 1603.09320, 2016.
    """

    def __init__(self, embeddings: Tensor, kind: Literal["exact", "hnsw", "ivf"] = "exact") -> None:
        check_choice(kind, _KINDS, "kind")
        points = _as_array(embeddings, "embeddings")
        if points.size == 0:
            raise ValueError(f"embeddings must not be empty, got shape {points.shape}")
        cells = max(1, round(len(points) ** 0.5))
        self.kind = kind
        self.index = _faiss().index_factory(points.shape[1], _KINDS[kind].format(cells=cells))
        if kind == "ivf":
            self.index.cp.min_points_per_centroid = 1  # fewer than FAISS likes, and no warning
            self.index.train(points)
        self.index.add(points)

    def __len__(self) -> int:
        """Return the number of embeddings."""
        return self.index.ntotal

    def __repr__(self) -> str:
        return f"SearchIndex of {len(self)} embeddings of {self.index.d} numbers, {self.kind}"

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
            Rows of the embeddings that the index was made of. Never -1: a query for which an
            approximate search meets fewer than k is searched exactly.

        Raises
        ------
        TypeError, ValueError
            If queries is not a finite floating-point matrix of d columns, k or effort is out of
            range, or effort is given to an exact index.
        """
        points = _as_array(queries, "queries")
        if points.shape[1] != self.index.d:
            raise ValueError(
                f"queries must have the {self.index.d} columns of the index, got {points.shape[1]}"
            )
        check_count(k, "k")
        if k > len(self):
            raise ValueError(f"k must be at most the {len(self)} embeddings, got {k}")
        self._try_as_hard_as(effort)
        squared, indices = self.index.search(points, k)
        short = (indices < 0).any(axis=1)
        if short.any():
            squared[short], indices[short] = self._search_exactly(points[short], k)
        # Rounding may leave a zero a little below zero.
        return torch.from_numpy(np.sqrt(squared.clip(min=0))), torch.from_numpy(indices)

    def _try_as_hard_as(self, effort: int | None) -> None:
        # As attributes of the index: search(..., params=...) is lost where another package has
        # imported faiss.contrib.torch_utils, as pytorch-metric-learning does.
        if self.kind == "exact":
            if effort is not None:
                raise ValueError(f"effort is for approximate indices only, got {effort!r}")
            return
        effort = _EFFORT[self.kind] if effort is None else effort
        check_count(effort, "effort")
        if self.kind == "hnsw":
            self.index.hnsw.efSearch = int(effort)
        else:
            self.index.nprobe = min(int(effort), self.index.nlist)

    def _search_exactly(self, points: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        if self.kind == "hnsw":
            return self.index.storage.search(points, k)
        self.index.nprobe = self.index.nlist
        return self.index.search(points, k)

    def save(self, path: str | os.PathLike) -> None:
        """Write the index to a file, whole or not at all.

        Parameters
        ----------
        path : path
            Where to; a file that is there is replaced, and kept if writing fails.

        Raises
        ------
        OSError
            If the file cannot be written.
        """
        payload = _faiss().serialize_index(self.index)
        digest = hashlib.sha256(payload).digest()
        write_atomically(
            Path(path), lambda stream: stream.writelines((_MAGIC, digest, memoryview(payload)))
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
        content = memoryview(Path(path).read_bytes())
        header = len(_MAGIC) + _DIGEST_BYTES
        if content[: len(_MAGIC)] != _MAGIC:
            raise ValueError(f"{path} is not an index saved by SearchIndex")
        if hashlib.sha256(content[header:]).digest() != content[len(_MAGIC) : header]:
            raise ValueError(f"{path} is damaged (its SHA-256 differs): build and save it anew")
        loaded = cls.__new__(cls)
        try:
            loaded.index = _faiss().deserialize_index(np.frombuffer(content[header:], np.uint8))
        except RuntimeError as error:
            raise ValueError(f"{path} was written by another version of FAISS ({error})") from error
        loaded.kind = _CLASSES[type(loaded.index).__name__]
        return loaded


def _as_array(points: Tensor, name: str) -> np.ndarray:
    """Check points, and return them as FAISS wants them."""
    check_points(points, name)
    single = points.detach().cpu().to(torch.float32)
    check_points(single, name)  # a large double may have become infinite
    return np.ascontiguousarray(single.numpy())


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


def load_image(path: str | os.PathLike, size: int = 28) -> Tensor:
    """Read an image file as the networks of Fashion-MNIST want it: grey, square, bright on black.

    The image is turned upright as its camera noted, made grey, turned into its negative if its
    background is bright, scaled until its longer side fits, padded to a square with the colour of
    its background, and standardised like `load_fashion_mnist`. The background is the median of the
    pixels along the border. Transparent parts become black or white, whichever is farther from what
    is to be seen. It is not cropped: do that first if the product does not fill the image.

    Parameters
    ----------
    path : path
        A file of any kind, size and colour that Pillow reads; of an animation, the first image.
    size : int, default 28
        Height and width of the result.

    Returns
    -------
    Tensor, float32, shape (1, 1, size, size)
        A test image of Fashion-MNIST that was saved as a PNG comes back as it is in
        `load_fashion_mnist`.

    Raises
    ------
    OSError
        If the file is not there or may not be read.
    ValueError
        If it is not an image, is damaged or has too many pixels to open safely (Pillow's limit,
        ``PIL.Image.MAX_IMAGE_PIXELS``); the message names the file. Also if size is not a whole
        number of at least 1.
    """
    check_count(size, "size")
    try:
        with Image.open(path) as file:
            grey = _grey(ImageOps.exif_transpose(file))
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path} has too many pixels to open safely ({error})") from error
    except Exception as error:  # Pillow's readers raise nearly anything on a damaged file
        if isinstance(error, MemoryError) or getattr(error, "errno", None) is not None:
            raise  # it is not the file's content
        raise ValueError(f"{path} is not an image, or it is damaged") from error
    background = float(np.median(_border(np.asarray(grey))))
    shrink = size / max(grey.size)
    sides = tuple(max(1, round(side * shrink)) for side in grey.size)
    square = Image.new("F", (size, size), background)
    corner = tuple((size - side) // 2 for side in sides)
    square.paste(grey.convert("F").resize(sides, Image.Resampling.LANCZOS), corner)
    pixels = torch.from_numpy(np.array(square)).clamp(0, 255)
    mean, deviation = _PIXEL_STATISTICS["FashionMNIST"]
    pixels = 255 - pixels if background > 127 else pixels
    return pixels.sub(mean).div(deviation)[None, None]


def _grey(image: Image.Image) -> Image.Image:
    """Return an image of one channel whose values run from 0 to 255."""
    if image.mode.startswith("I"):  # 16 bits
        return Image.fromarray(np.asarray(image, np.float32) / 257)
    if image.mode == "F":  # any range
        values = np.asarray(image)
        low, high = values.min(), values.max()
        if not np.isfinite([low, high]).all():
            raise ValueError("pixels must be finite")
        return Image.fromarray((values - low) * (255 / max(high - low, np.float32(1e-12))))
    if not (image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info):
        return image.convert("RGB").convert("L")
    image = image.convert("RGBA")
    grey, alpha = image.convert("L"), image.getchannel("A")
    seen = ImageStat.Stat(grey, alpha)
    dark = seen.count[0] == 0 or seen.mean[0] < 128
    return Image.composite(grey, Image.new("L", image.size, 255 if dark else 0), alpha)


def _border(pixels: np.ndarray) -> np.ndarray:
    return np.concatenate([pixels[[0, -1]].ravel(), pixels[1:-1, [0, -1]].ravel()])
