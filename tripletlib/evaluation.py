"""Measure embeddings by what their nearest neighbours say, with confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property

import numpy as np
import torch
from scipy.stats import binomtest
from torch import Tensor

from tripletlib._validation import check_count, check_labels, check_points

_RESAMPLES = 1000


class Score(float):
    """A mean over queries, usable as the float it is, with its confidence interval.

    Attributes
    ----------
    low, high : float
        Ends of the interval, of confidence 95 %.
    queries : int
        How many queries were measured.
    """

    low: float
    high: float
    queries: int

    def __new__(
        cls, value: float, low: float = math.nan, high: float = math.nan, queries: int = 0
    ) -> Score:
        """Make a score of a value and its interval, which a mean of scores, say, does not have."""
        score = super().__new__(cls, value)
        score.low, score.high, score.queries = low, high, queries
        return score

    def __getnewargs__(self) -> tuple[float, float, float, int]:
        return float(self), self.low, self.high, self.queries

    def __repr__(self) -> str:
        if math.isnan(self.low):
            return f"{float(self):.2%}"
        return f"{float(self):.2%} (95 % interval {self.low:.2%} to {self.high:.2%})"

    __str__ = __repr__

    @classmethod
    def of_successes(cls, successes: int, queries: int) -> Score:
        """Return the fraction of successes with its exact (Clopper-Pearson) interval."""
        interval = binomtest(successes, queries).proportion_ci(0.95, method="exact")
        return cls(successes / queries, interval.low, interval.high, queries)

    @classmethod
    def of_values(cls, values: np.ndarray) -> Score:
        """Return the mean of one number a query with its percentile bootstrap interval.

        Queries are drawn anew, with replacement, 1 000 times; the interval runs from the 2.5th to
        the 97.5th percentile of the means. The seed is fixed, so that the same numbers give the
        same interval. Where all are equal they say nothing of how far others may lie, and the
        interval is a point.
        """
        generator = np.random.default_rng(0)
        draws = (generator.integers(len(values), size=len(values)) for _ in range(_RESAMPLES))
        low, high = np.quantile([values[draw].mean() for draw in draws], [0.025, 0.975])
        return cls(values.mean(), low, high, len(values))


class KNNClassifier:
    """Classify queries by the majority among their k nearest gallery items.

    What depends on the gallery alone is computed once. A query that comes alone is compared in full
    only with the items that a bound cannot rule out, which gives the same neighbours and is fast.

    Parameters
    ----------
    gallery : Tensor, floating point, shape (m, d)
        Embeddings of known label, for instance those of the training images.
    gallery_labels : Tensor of integers, shape (m,)
        Their labels.
    k : int, default 10
        Neighbours that vote, each with one vote; of labels with as many votes the smallest wins,
        as in scikit-learn's ``KNeighborsClassifier``. Distances are Euclidean.

    Raises
    ------
    TypeError, ValueError
        If an argument has the wrong type or shape, the gallery holds NaN or infinity, or `k`
        exceeds it.
    """

    def __init__(self, gallery: Tensor, gallery_labels: Tensor, k: int = 10) -> None:
        _check_gallery(gallery, gallery_labels)
        _check_k(k, len(gallery))
        self._search = _Search(gallery)
        self._k = k
        self._labels = gallery_labels.to(torch.int64)

    def predict(self, embeddings: Tensor) -> Tensor:
        """Return the predicted labels, int64 of shape (n,), of queries of shape (n, d)."""
        winners = [self._labels.new_empty(0)]
        for _, neighbours in self._search.nearest(embeddings, self._k):
            winners.append(self._labels.take(neighbours).mode(dim=1).values)
        return torch.cat(winners)


def knn_accuracy(
    embeddings: Tensor, labels: Tensor, gallery: Tensor, gallery_labels: Tensor, k: int = 10
) -> Score:
    """Return the fraction of queries that their k nearest gallery items classify rightly.

    Parameters
    ----------
    embeddings : Tensor, floating point, shape (n, d)
        The queries.
    labels : Tensor of integers, shape (n,)
        Their true labels.
    gallery, gallery_labels, k
        As for `KNNClassifier`.

    Returns
    -------
    Score
        A float with the exact binomial (Clopper-Pearson) interval of confidence 95 % in ``.low``
        and ``.high``: how far the accuracy on all digits ever written may be from that on these.

    Raises
    ------
    TypeError, ValueError
        As for `KNNClassifier`, and if there is no query or its labels do not fit.
    """
    _check_queries(embeddings, labels)
    predicted = KNNClassifier(gallery, gallery_labels, k).predict(embeddings)
    return Score.of_successes(int((predicted == labels).sum()), len(labels))


def recall_at_k(
    embeddings: Tensor,
    labels: Tensor,
    gallery: Tensor | None = None,
    gallery_labels: Tensor | None = None,
    *,
    k: int = 1,
) -> Score:
    """Return Recall@k: the fraction of queries with one of their class among the k nearest.

    Without a gallery, every item queries all the others, itself left out.

    Parameters
    ----------
    embeddings : Tensor, floating point, shape (n, d)
        The queries.
    labels : Tensor of integers, shape (n,)
        Their labels.
    gallery : Tensor, floating point, shape (m, d), optional
        Where to search, by Euclidean distance.
    gallery_labels : Tensor of integers, shape (m,), optional
        Its labels.
    k : int, default 1
        Neighbours looked at.

    Returns
    -------
    Score
        A float with the exact binomial (Clopper-Pearson) interval of confidence 95 %. A query
        whose class is not in the gallery counts as a miss.

    Raises
    ------
    TypeError, ValueError
        If an argument has the wrong type or shape, holds NaN or infinity, `k` exceeds what there
        is to search, or only one of `gallery` and `gallery_labels` is given.
    """
    gallery, gallery_labels, within = _where_to_search(embeddings, labels, gallery, gallery_labels)
    _check_k(k, len(gallery) - within)
    found = sum(
        int((gallery_labels[neighbours] == labels[rows, None]).any(dim=1).sum())
        for rows, neighbours in _Search(gallery).nearest(embeddings, k, within=within)
    )
    return Score.of_successes(found, len(labels))


def r_precision(
    embeddings: Tensor,
    labels: Tensor,
    gallery: Tensor | None = None,
    gallery_labels: Tensor | None = None,
) -> Score:
    """Return R-precision: the fraction of a query's R nearest that are of its class, on average.

    R is the number of items of the query's class that there are to find, so that 1 means that all
    of them come before anything else. Without a gallery, every item queries all the others.

    Parameters
    ----------
    embeddings : Tensor, floating point, shape (n, d)
        The queries.
    labels : Tensor of integers, shape (n,)
        Their labels.
    gallery : Tensor, floating point, shape (m, d), optional
        Where to search, by Euclidean distance. Of items at the same distance those of other
        classes are taken to be nearer, so that no score is owed to ties.
    gallery_labels : Tensor of integers, shape (m,), optional
        Its labels.

    Returns
    -------
    Score
        A float with the percentile bootstrap interval of confidence 95 % over queries, the gallery
        as it is. Queries with nothing to find (R = 0) are left out, as pytorch-metric-learning
        does (`recall_at_k` counts them as misses); ``.queries`` is the number of the others.

    Raises
    ------
    TypeError, ValueError
        If an argument has the wrong type or shape or holds NaN or infinity, only one of `gallery`
        and `gallery_labels` is given, or no query has anything to find.

    References
    ----------
    K. Musgrave, S. Belongie, S.-N. Lim, "A metric learning reality check", 2020, section 3.2.
    """
    return _mean_at_r(_r_precisions, embeddings, labels, gallery, gallery_labels)


def mean_average_precision_at_r(
    embeddings: Tensor,
    labels: Tensor,
    gallery: Tensor | None = None,
    gallery_labels: Tensor | None = None,
) -> Score:
    """Return MAP@R: R-precision that also counts how early the right items come.

    For each of the R nearest that is of the query's class, take the fraction of that class among
    the items up to it; divide the sum by R; average over queries. The result is at most the
    R-precision.

    Parameters
    ----------
    embeddings, labels, gallery, gallery_labels
        As for `r_precision`, ties too.

    Returns
    -------
    Score
        As for `r_precision`.

    Raises
    ------
    TypeError, ValueError
        As for `r_precision`.

    References
    ----------
    K. Musgrave, S. Belongie, S.-N. Lim, "A metric learning reality check", 2020, section 3.2.
    """
    return _mean_at_r(_average_precisions_at_r, embeddings, labels, gallery, gallery_labels)


def _r_precisions(own: np.ndarray, others: np.ndarray) -> np.ndarray:
    """R-precision of each row of distances to the R own items and to the R nearest others.

    Both are sorted. The i-th own item is among the R nearest of all if fewer than R - i + 1 others
    are as near.
    """
    return (own < others[:, ::-1]).mean(axis=1)


def _average_precisions_at_r(own: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Average precision at R of each row; see `_r_precisions`."""
    r = own.shape[1]
    found = (own < others[:, ::-1]).sum(axis=1)
    places, precisions = np.arange(1.0, r + 1), np.empty(len(own))
    for row, hits in enumerate(found):
        before = others[row, : r - hits].searchsorted(own[row, :hits], side="right")
        precisions[row] = (places[:hits] / (places[:hits] + before)).sum() / r
    return precisions


def _mean_at_r(
    measure: Callable[[np.ndarray, np.ndarray], np.ndarray],
    embeddings: Tensor,
    labels: Tensor,
    gallery: Tensor | None,
    gallery_labels: Tensor | None,
) -> Score:
    """Average over queries a measure that needs only their R own and R nearest other distances."""
    gallery, gallery_labels, within = _where_to_search(embeddings, labels, gallery, gallery_labels)
    if len(gallery) == 0:
        raise ValueError("gallery must hold at least one item, got none")
    # In the order of labels, a class is a stretch of queries and a stretch of the gallery.
    order = labels.argsort(stable=True)
    gallery_order = gallery_labels.argsort(stable=True)
    labels, gallery_labels = labels[order].numpy(), gallery_labels[gallery_order].numpy()
    search, values = _Search(gallery[gallery_order]), []
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for rows, distances in search.distances(search.placed(embeddings[order]), within=within):
            blocks = _blocks_of_one_class(distances.numpy(), labels[rows], gallery_labels)
            values += pool.map(lambda block: measure(*_own_and_others(*block, within)), blocks)
    values = np.concatenate(values)
    if not len(values):
        raise ValueError("labels must share a class with what is searched, got no query that does")
    return Score.of_values(values)


def _blocks_of_one_class(
    distances: np.ndarray, labels: np.ndarray, gallery_labels: np.ndarray
) -> Iterator[tuple[np.ndarray, slice]]:
    """Yield the distances of a few queries of one class, and which columns are of that class."""
    classes = np.unique(labels)
    for label, start, stop in zip(
        classes, labels.searchsorted(classes), labels.searchsorted(classes, "right"), strict=True
    ):
        columns = slice(*(gallery_labels.searchsorted(label, side) for side in ("left", "right")))
        for first in range(start, stop, _BLOCK_ROWS):
            yield distances[first : min(first + _BLOCK_ROWS, stop)], columns


def _own_and_others(
    distances: np.ndarray, columns: slice, within: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Sort the distances to the R items of the queries' class, and to the R nearest others.

    Where there is nothing to find, no row is left. The distances are overwritten.
    """
    r = columns.stop - columns.start - within
    if r <= 0:
        return np.empty((0, 1)), np.empty((0, 1))
    # A query within the gallery is at infinity from itself, and sorted off.
    own = np.sort(distances[:, columns], axis=1)[:, :r]
    distances[:, columns] = np.inf
    distances.partition(r - 1, axis=1)
    return own, np.sort(distances[:, :r], axis=1)


_BLOCK_ROWS = 32  # small enough to share out among threads
_CHUNK_ELEMENTS = 2**25  # of a distance matrix held at once: 128 MB in float32
_LEADING_SHARE = 0.9  # less leaves more items to look at, more makes the first look longer


class _Search:
    """Euclidean distances to a gallery of at least one item."""

    def __init__(self, gallery: Tensor) -> None:
        gallery = gallery.detach().to(torch.promote_types(gallery.dtype, torch.float32))
        # About their centre the points lie nearest to zero, where rounding hurts least. Rounded to
        # a 32nd of their width or so, it keeps small whole numbers, and their ties, exact.
        centre = gallery.mean(dim=0)
        width = (gallery - centre).abs().max()
        self.unit = torch.ldexp(torch.ones_like(width), width.frexp().exponent.clamp(min=-100))
        self.centre = (32 * centre / self.unit).round() * self.unit / 32
        self.items = (gallery - self.centre) / self.unit
        self.squared_norms = self.items.square().sum(dim=1)
        self.largest = float(self.squared_norms.max())

    def placed(self, queries: Tensor) -> Tensor:
        """Check queries, and move them as the items were."""
        check_points(queries)
        width = self.items.shape[1]
        if queries.shape[1] != width:
            raise ValueError(
                f"embeddings must have the {width} columns of the gallery, got {queries.shape[1]}"
            )
        return (queries.detach().to(self.items.dtype) - self.centre) / self.unit

    def distances(self, queries: Tensor, *, within: bool = False) -> Iterator[tuple[slice, Tensor]]:
        """Yield squared distances for slices of queries, each block in the memory of the last.

        They are in a unit of their own and lack the query's squared norm; along a row that does not
        change the order. The queries are as `placed` returns them. With `within`, they are the
        gallery, and each is at infinity from itself.
        """
        rows_at_once = max(1, _CHUNK_ELEMENTS // len(self.items))
        memory = queries.new_empty(min(rows_at_once, len(queries)), len(self.items))
        for start in range(0, len(queries), rows_at_once):
            rows = slice(start, min(start + rows_at_once, len(queries)))
            block = memory[: rows.stop - start]
            torch.addmm(self.squared_norms, queries[rows], self.items.T, alpha=-2, out=block)
            if within:
                block.diagonal(start).fill_(torch.inf)
            yield rows, block

    def nearest(
        self, queries: Tensor, k: int, *, within: bool = False
    ) -> Iterator[tuple[slice, Tensor]]:
        """Yield the indices of the k nearest gallery items, nearest first, for slices of queries.

        `within` is as for `distances`.
        """
        queries = self.placed(queries)
        # Where the gallery overflows its type there are no axes to be found.
        if len(queries) == 1 and not within and math.isfinite(self.largest):
            yield slice(0, 1), self._nearest_to_one(queries, k)
            return
        for rows, distances in self.distances(queries, within=within):
            yield rows, distances.topk(k, dim=1, largest=False).indices

    @np.errstate(over="ignore", invalid="ignore")
    def _nearest_to_one(self, query: Tensor, k: int) -> Tensor:
        """Return the indices of shape (1, k) that `nearest` yields, reading little of the gallery.

        No item is nearer than its short form is to the query's. So the distances of any k items
        tell which short forms are too far, and the others are few.
        """
        items, point = self.items.numpy(), query.numpy()
        short = torch.from_numpy(self._shortened(point))
        bounds = torch.addmm(self.squared_norms, short, self._short_items, alpha=-2)[0].numpy()

        def squared_distances(chosen: np.ndarray) -> np.ndarray:
            return np.square(items[chosen] - point).sum(axis=1)

        # k items that are near: of stretches of the gallery the nearest, of those the k nearest.
        stretch = max(1, len(items) // max(k, 256))
        stretches = bounds[: len(items) // stretch * stretch].reshape(-1, stretch)
        best = stretches.min(axis=1).argpartition(k - 1)[:k]
        best = best * stretch + stretches[best].argmin(axis=1)
        square = np.square(point).sum()
        rounding = 4 * point.size * np.finfo(point.dtype).eps * (square + self.largest)
        limit = squared_distances(best).max() - square + rounding
        near = np.flatnonzero(~(bounds > limit))  # not <=: a NaN, of overflow, rules nothing out
        if len(near) > max(k, len(items) // 16):  # the query is far from all
            return next(self.distances(query))[1].topk(k, largest=False).indices
        nearest = near[squared_distances(near).argsort(kind="stable")[:k]]
        return torch.from_numpy(nearest)[None]

    @cached_property
    def _axes(self) -> tuple[np.ndarray, int]:
        """Orthonormal axes as columns, and how many lead.

        Those along which the items vary most come first, and so many lead as hold most of it.
        """
        squares, axes = torch.linalg.eigh((self.items.T @ self.items).double())
        squares, axes = squares.flip(0).cumsum(dim=0), axes.flip(1).to(self.items.dtype)
        leading = int((squares < _LEADING_SHARE * squares[-1]).sum()) + 1
        return axes.numpy(), min(leading, len(squares) - 1)

    @cached_property
    def _short_items(self) -> Tensor:
        """The items' short forms as columns, so that a query adds up whole rows."""
        return torch.from_numpy(self._shortened(self.items.numpy())).T.contiguous()

    def _shortened(self, points: np.ndarray) -> np.ndarray:
        """Turn points to the axes; replace what follows the leading coordinates by its length.

        By the Cauchy-Schwarz inequality that brings no two points farther apart.
        """
        axes, leading = self._axes
        turned = points @ axes
        turned[:, leading] = np.linalg.norm(turned[:, leading:], axis=1)
        return turned[:, : leading + 1]


def _check_queries(embeddings: Tensor, labels: Tensor) -> None:
    check_points(embeddings)
    check_labels(labels, len(embeddings))
    if len(labels) == 0:
        raise ValueError("embeddings must hold at least one query, got none")


def _check_gallery(gallery: Tensor, gallery_labels: Tensor) -> None:
    check_points(gallery, "gallery")
    check_labels(gallery_labels, len(gallery), "gallery_labels", of="gallery")


def _check_k(k: int, items: int) -> None:
    check_count(k, "k")
    if k > items:
        raise ValueError(f"k must be at most the {items} items to search, got {k}")


def _where_to_search(
    embeddings: Tensor, labels: Tensor, gallery: Tensor | None, gallery_labels: Tensor | None
) -> tuple[Tensor, Tensor, bool]:
    """Check all; return gallery, its labels, and whether the queries search among themselves."""
    _check_queries(embeddings, labels)
    if (gallery is None) != (gallery_labels is None):
        raise ValueError("gallery and gallery_labels must be given together, got one of them")
    if gallery is None:
        return embeddings, labels, True
    _check_gallery(gallery, gallery_labels)
    return gallery, gallery_labels, False
