"""Measure embeddings by what their nearest neighbours say, with confidence intervals."""

from __future__ import annotations

from collections.abc import Callable, Iterator

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

    def __new__(cls, value: float, low: float, high: float, queries: int) -> Score:
        """Make a score of a value and its interval."""
        score = super().__new__(cls, value)
        score.low, score.high, score.queries = low, high, queries
        return score

    def __getnewargs__(self) -> tuple[float, float, float, int]:
        return float(self), self.low, self.high, self.queries

    def __repr__(self) -> str:
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

    What depends on the gallery alone is computed once, so that asking for one query at a time is
    fast.

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
        self._search = _Search(gallery, gallery_labels, k)
        self._k = k
        self._classes, self._class_of = gallery_labels.unique(return_inverse=True)

    def predict(self, embeddings: Tensor) -> Tensor:
        """Return the predicted labels, int64 of shape (n,), of queries of shape (n, d)."""
        winners = [self._classes.new_empty(0)]
        for _, neighbours in self._search(embeddings, self._k):
            cast = self._class_of[neighbours]
            votes = torch.zeros(len(cast), len(self._classes), dtype=torch.int64)
            votes.scatter_add_(1, cast, torch.ones_like(cast))
            winners.append(self._classes[votes.argmax(dim=1)])  # argmax: the first of equals
        return torch.cat(winners).to(torch.int64)


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
    found = sum(
        int((gallery_labels[neighbours] == labels[rows, None]).any(dim=1).sum())
        for rows, neighbours in _Search(gallery, gallery_labels, k + within)(
            embeddings, k, within=within
        )
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
    precisions = np.empty(len(own))
    for row, hits in enumerate(found):
        before = others[row, : r - hits].searchsorted(own[row, :hits], side="right")
        place = np.arange(1, hits + 1)
        precisions[row] = (place / (place + before)).sum() / r
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
    # In the order of labels, a class is a stretch of queries and a stretch of the gallery.
    search = _Search(gallery, gallery_labels, order=gallery_labels.argsort())
    labels, order = labels.sort()
    gallery_labels = gallery_labels.sort().values
    values = []
    for rows, distances in search.distances(embeddings[order], within=within):
        stop = 0
        for label, count in zip(*labels[rows].unique_consecutive(return_counts=True), strict=True):
            start, stop = stop, stop + int(count)
            first = int(torch.searchsorted(gallery_labels, label))
            last = int(torch.searchsorted(gallery_labels, label, right=True))
            r = last - first - within
            if r > 0:
                block = distances[start:stop].numpy()
                # A query within the gallery is at infinity from itself, and sorted off.
                own = np.sort(block[:, first:last], axis=1)[:, :r]
                block[:, first:last] = np.inf
                block.partition(r - 1, axis=1)
                values.append(measure(own, np.sort(block[:, :r], axis=1)))
    if not values:
        raise ValueError("labels must share a class with what is searched, got no query that does")
    return Score.of_values(np.concatenate(values))


_CHUNK_ELEMENTS = 2**24  # of a distance matrix held at once: 64 MB in float32


class _Search:
    """Exact nearest neighbours in a gallery, by Euclidean distance."""

    def __init__(self, gallery: Tensor, gallery_labels: Tensor, k: int) -> None:
        check_points(gallery, "gallery")
        check_labels(gallery_labels, len(gallery), "gallery_labels", of="gallery")
        check_count(k, "k")
        if k > len(gallery):
            raise ValueError(f"k must be at most the {len(gallery)} items to search, got {k}")
        # About their centre the points lie nearest to zero, where rounding hurts least.
        self.centre = gallery.mean(dim=0)
        self.gallery = gallery - self.centre
        self.squared_norms = self.gallery.square().sum(dim=1)

    def __call__(
        self, queries: Tensor, k: int, *, within: bool = False
    ) -> Iterator[tuple[slice, Tensor]]:
        """Yield the indices of the k nearest gallery items, nearest first, for slices of queries.

        With `within`, the queries are the gallery, and each leaves itself out.
        """
        check_points(queries)
        if queries.shape[1] != self.gallery.shape[1]:
            raise ValueError(
                f"embeddings must have the {self.gallery.shape[1]} columns of the gallery, "
                f"got {queries.shape[1]}"
            )
        rows_at_once = max(1, _CHUNK_ELEMENTS // len(self.gallery))
        for start in range(0, len(queries), rows_at_once):
            rows = slice(start, min(start + rows_at_once, len(queries)))
            # The query's own norm is the same along its row: the order does not need it.
            distances = torch.addmm(
                self.squared_norms, queries[rows] - self.centre, self.gallery.T, alpha=-2
            )
            if within:
                own = torch.arange(rows.start, rows.stop, device=distances.device)
                distances[own - rows.start, own] = torch.inf
            yield rows, distances.topk(k, dim=1, largest=False).indices


def _check_queries(embeddings: Tensor, labels: Tensor) -> None:
    check_points(embeddings)
    check_labels(labels, len(embeddings))
    if len(labels) == 0:
        raise ValueError("embeddings must hold at least one query, got none")
