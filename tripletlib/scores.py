"""Scores with confidence intervals: of an embedding by its nearest neighbours, and of lists."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from scipy.stats import binomtest
from torch import Tensor

from tripletlib._precision import at_least_float32
from tripletlib._validation import check_labels, check_points
from tripletlib.neighbours import KNNClassifier, Search, check_gallery, check_k

_RESAMPLES = 1000
_BLOCK_ROWS = 32  # small enough to share out among threads
_LISTS = 1024  # sorted at a time


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
    right = predicted.cpu() == labels.cpu().to(torch.int64)
    return Score.of_successes(int(right.sum()), len(labels))


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
    check_k(k, len(gallery) - within)
    gallery_labels, labels = (of.cpu().to(torch.int64) for of in (gallery_labels, labels))
    found = sum(
        int((gallery_labels[neighbours.cpu()] == labels[rows, None]).any(dim=1).sum())
        for rows, neighbours in Search(gallery).nearest(embeddings, k, within=within)
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


def list_recall_at_k(
    scores: Tensor, wanted: Tensor, *, k: int = 10, return_values: bool = False
) -> Score | tuple[Score, np.ndarray]:
    """Return which fraction of its wanted items are among the k best of a query, on average.

    The fraction is of *all* that is wanted, even where that is more than `k`. (`recall_at_k` asks
    whether any of the nearest is of the right class.)

    Parameters
    ----------
    scores : Tensor, floating point, shape (n, items)
        How well each item suits each query: the greater, the better. Minus infinity marks what is
        not to be recommended and so never found, though it be wanted. Items with equal scores
        stand in random order; the value is what that gives on average.
    wanted : Tensor of booleans, shape (n, items)
        What there is to find.
    k : int, default 10
        Length of the lists.
    return_values : bool, default False
        Return also each query's own value: ``Score.of_values(values - others)`` compares two ways
        of scoring on the same queries.

    Returns
    -------
    score : Score
        A float with the percentile bootstrap interval of confidence 95 % over queries. Those that
        want nothing are left out; ``.queries`` is the number of the others.
    values : ndarray, float64, shape (score.queries,), only if `return_values`
        One number a query that wants something, in the order of the queries.

    Raises
    ------
    TypeError, ValueError
        If an argument has the wrong type or shape, scores hold NaN or plus infinity, `k` exceeds
        the number of items, or no query wants anything.
    """
    places = _places_of_lists(scores, wanted, k)
    worth = (places < k).astype(np.float64)
    return _mean_of_lists(scores, wanted, worth, np.ones(len(places)), return_values)


def ndcg_at_k(
    scores: Tensor, wanted: Tensor, *, k: int = 10, return_values: bool = False
) -> Score | tuple[Score, np.ndarray]:
    """Return NDCG@k, which asks also how early in its list a query's wanted items come.

    A wanted item at place i (from 1) of the k best is worth 1 / log2(i + 1), any other nothing. The
    sum is divided by that of a perfect list, which begins with the wanted items, as many as fit in
    k places; then averaged over queries.

    Parameters
    ----------
    scores, wanted, k, return_values
        As for `list_recall_at_k`, ties too.

    Returns
    -------
    score, values
        As for `list_recall_at_k`.

    Raises
    ------
    TypeError, ValueError
        As for `list_recall_at_k`.

    References
    ----------
    K. Järvelin, J. Kekäläinen, "Cumulated gain-based evaluation of IR techniques", 2002. Ties: F.
    McSherry, M. Najork, "Computing information retrieval performance measures efficiently in the
    presence of tied scores", 2008, as scikit-learn's ``ndcg_score`` has them.
    """
    places = _places_of_lists(scores, wanted, k)
    worth = np.where(places < k, 1 / np.log2(places + 2), 0.0)
    return _mean_of_lists(scores, wanted, worth, worth, return_values)


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
    labels, gallery_labels = labels.to(torch.int64), gallery_labels.to(torch.int64)
    # In the order of labels, a class is a stretch of queries and a stretch of the gallery.
    order, gallery_order = labels.argsort(stable=True), gallery_labels.argsort(stable=True)
    labels = labels[order].cpu().numpy()
    gallery_labels = gallery_labels[gallery_order].cpu().numpy()
    queries = embeddings[order.to(embeddings.device)]
    search = Search(gallery[gallery_order.to(gallery.device)], wide=True)
    search.check(queries)
    values = [np.empty(0)]

    def at_r(
        distances: np.ndarray, columns: slice, errors: np.ndarray | float = 0.0
    ) -> tuple[np.ndarray, np.ndarray]:
        """Measure each row, and say which rows its errors might have changed."""
        own, others = _own_and_others(distances, columns, within)
        most, least = measure(own - 2 * errors, others), measure(own + 2 * errors, others)
        return most, ~((most == least) & np.isfinite(np.ravel(errors)))

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for rows, distances, errors in search.distances(queries, within=within):
            distances, errors = distances.cpu().numpy(), errors.cpu().numpy()[:, None]
            blocks = list(_blocks_of_one_class(labels[rows], gallery_labels, within))
            measured = pool.map(
                at_r,
                (distances[some] for some, _ in blocks),
                (columns for _, columns in blocks),
                (errors[some] for some, _ in blocks),
            )
            for (some, columns), (found, unsure) in zip(blocks, measured, strict=True):
                if unsure.any():
                    doubtful = rows.start + some.start + np.flatnonzero(unsure)
                    exact = search.differences(queries[torch.from_numpy(doubtful)]).cpu().numpy()
                    if within:
                        exact[np.arange(len(exact)), doubtful] = np.inf
                    found[unsure] = at_r(exact, columns)[0]
                values.append(found)
    values = np.concatenate(values)
    if not len(values):
        raise ValueError("labels must share a class with what is searched, got no query that does")
    return Score.of_values(values)


def _blocks_of_one_class(
    labels: np.ndarray, gallery_labels: np.ndarray, within: bool
) -> Iterator[tuple[slice, slice]]:
    """Yield places of a few queries of one class, and which columns are of that class.

    A class of which there is nothing to find is left out.
    """
    classes = np.unique(labels)
    for label, start, stop in zip(
        classes, labels.searchsorted(classes), labels.searchsorted(classes, "right"), strict=True
    ):
        columns = slice(*(gallery_labels.searchsorted(label, side) for side in ("left", "right")))
        if columns.stop - columns.start > within:
            for first in range(start, stop, _BLOCK_ROWS):
                yield slice(first, min(first + _BLOCK_ROWS, stop)), columns


def _own_and_others(
    distances: np.ndarray, columns: slice, within: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Sort the distances to the R items of the queries' class, and to the R nearest others.

    The distances are overwritten.
    """
    r = columns.stop - columns.start - within
    # A query within the gallery is at infinity from itself, and sorted off.
    own = np.sort(distances[:, columns], axis=1)[:, :r]
    distances[:, columns] = np.inf
    distances.partition(r - 1, axis=1)
    return own, np.sort(distances[:, :r], axis=1)


def _places_of_lists(scores: Tensor, wanted: Tensor, k: int) -> np.ndarray:
    """Check all; return the places of a list of all items, from 0."""
    for name, of in (("scores", scores), ("wanted", wanted)):
        if not isinstance(of, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(of).__name__}")
    if not scores.is_floating_point():
        raise TypeError(f"scores must be floating point, got {scores.dtype}")
    if wanted.dtype != torch.bool:
        raise TypeError(f"wanted must be booleans, got {wanted.dtype}")
    if scores.dim() != 2:
        raise ValueError(f"scores must have shape (n, items), got {tuple(scores.shape)}")
    if wanted.shape != scores.shape:
        raise ValueError(
            f"wanted must have the shape of scores, {tuple(scores.shape)}, "
            f"got {tuple(wanted.shape)}"
        )
    check_k(k, scores.shape[1])
    if (wrong := (scores.isnan() | scores.isposinf()).any(dim=1)).any():
        raise ValueError(
            "scores must be finite, or minus infinity for what is not to be recommended, "
            f"got NaN or plus infinity in row {int(wrong.nonzero()[0])}"
        )
    if not wanted.any():
        raise ValueError("wanted must hold something to find, got none in any row")
    return np.arange(scores.shape[1])


def _mean_of_lists(
    scores: Tensor, wanted: Tensor, worth: np.ndarray, best: np.ndarray, return_values: bool
) -> Score | tuple[Score, np.ndarray]:
    """Average over queries what the places of their wanted items are worth.

    `worth` is of the places of a list, `best` of those of a list that nothing can better.
    """
    total, most = (np.concatenate([[0.0], of.cumsum()]) for of in (worth, best))
    some = wanted.any(dim=1)
    values = []
    for rows, right in zip(
        scores[some.to(scores.device)].detach().split(_LISTS),
        wanted[some].split(_LISTS),
        strict=True,
    ):
        rows, right = at_least_float32(rows.cpu()), right.cpu()
        ordered = rows.sort(dim=1).values
        # From the best: where the items as good as this one begin, and where they end.
        start, stop = (
            (len(worth) - torch.searchsorted(ordered, rows, right=end)).numpy()
            for end in (True, False)
        )
        gains = (total[stop] - total[start]) / (stop - start)
        found = (right & rows.isfinite()).numpy()
        values.append((gains * found).sum(axis=1) / most[right.sum(dim=1).numpy()])
    values = np.concatenate(values)
    return (Score.of_values(values), values) if return_values else Score.of_values(values)


def _check_queries(embeddings: Tensor, labels: Tensor) -> None:
    check_points(embeddings)
    check_labels(labels, len(embeddings))
    if len(labels) == 0:
        raise ValueError("embeddings must hold at least one query, got none")


def _where_to_search(
    embeddings: Tensor, labels: Tensor, gallery: Tensor | None, gallery_labels: Tensor | None
) -> tuple[Tensor, Tensor, bool]:
    """Check all; return gallery, its labels, and whether the queries search among themselves."""
    _check_queries(embeddings, labels)
    if (gallery is None) != (gallery_labels is None):
        raise ValueError("gallery and gallery_labels must be given together, got one of them")
    if gallery is None:
        return embeddings, labels, True
    check_gallery(gallery, gallery_labels)
    return gallery, gallery_labels, False
