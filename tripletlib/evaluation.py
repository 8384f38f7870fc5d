"""Measure embeddings by what their nearest neighbours say, with confidence intervals."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from scipy.stats import binomtest
from torch import Tensor

from tripletlib._validation import check_count, check_labels, check_points


class Score(float):
    """A fraction of queries, usable as the float it is, with its confidence interval.

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
    _check_queries(embeddings, labels)
    if (gallery is None) != (gallery_labels is None):
        raise ValueError("gallery and gallery_labels must be given together, got one of them")
    within = gallery is None
    gallery, gallery_labels = (embeddings, labels) if within else (gallery, gallery_labels)
    found = sum(
        int((gallery_labels[neighbours] == labels[rows, None]).any(dim=1).sum())
        for rows, neighbours in _Search(gallery, gallery_labels, k + within)(
            embeddings, k, within=within
        )
    )
    return Score.of_successes(found, len(labels))


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
