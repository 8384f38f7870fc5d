"""Exact nearest neighbours in blocks, and the classifier that lets them vote."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from tripletlib._precision import no_autocast, rounding_of_products, widest
from tripletlib._validation import check_count, check_labels, check_points
from tripletlib.distances import roots_of_squares

_CHUNK_BYTES = 2**27  # of a distance matrix held at once
_PIECE = 2**11  # of the gallery, in rows
_DIFFERENCES = 2**21  # of coordinates, held at once
_SPARE = 22  # candidates beside the k, so that most queries need no second look
_MOST = 8  # of the gallery that fraction; with more candidates, all of it is compared


class KNNClassifier:
    """Classify queries by the majority among their k nearest gallery items.

    What depends on the gallery alone is computed once. Distances are exact to rounding in float64
    (float32 on a device without it), however close the points; of items at the same distance the
    first in the gallery is taken. A query gets the same answer alone and in a batch.

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
        check_gallery(gallery, gallery_labels)
        check_k(k, len(gallery))
        self._search = Search(gallery)
        self._k = k
        self._labels = gallery_labels.to(torch.int64)

    def predict(self, embeddings: Tensor) -> Tensor:
        """Return the predicted labels, int64 of shape (n,), of queries of shape (n, d).

        They are on the device of the gallery's labels.
        """
        winners = [self._labels.new_empty(0)]
        for _, neighbours in self._search.nearest(embeddings, self._k):
            votes = self._labels.take(neighbours.to(self._labels.device))
            winners.append(votes.mode(dim=1).values)
        return torch.cat(winners)


class Search:
    """Exact Euclidean distances to a gallery of at least one item.

    A matrix product is quick and loses close points to rounding. So it only rules out, by a bound
    of its error, what is certainly too far; what is left is told apart by differences of
    coordinates, in the widest type. A query finds the same alone and in company.

    Parameters
    ----------
    gallery : Tensor, floating point, shape (m, d)
        The items, checked before.
    wide : bool, default False
        Whether the matrix product, too, is in the widest type.
    """

    def __init__(self, gallery: Tensor, *, wide: bool = False) -> None:
        self.gallery = gallery.detach()
        self._widest = widest(gallery.device)
        dtype = self._widest if wide else torch.promote_types(gallery.dtype, torch.float32)
        # A power of two divides without rounding; the items' coordinates become 4 at the most.
        size = 4 * torch.finfo(gallery.dtype).tiny
        size = max(float(self.gallery.abs().max()), size) if self.gallery.numel() else size
        self._unit = math.ldexp(1.0, math.frexp(size)[1] - 2)
        # Beside a coordinate so much larger, squares of small ones' differences would be lost.
        limits = torch.finfo(self._widest)
        least = size * math.sqrt(limits.tiny / limits.eps) / limits.eps
        self._uneven = torch.finfo(gallery.dtype).max > math.sqrt(limits.max) and bool(
            ((self.gallery != 0) & (self.gallery.abs() < least)).any()
        )
        self._items = self.gallery.to(dtype, copy=True).div_(self._unit)
        # About their centre the points lie nearest to zero, where rounding hurts least.
        self._centre = self._items.mean(dim=0)
        self._items -= self._centre
        self._squared_norms = self._items.square().sum(dim=1)
        self._largest = self._squared_norms.max()

    def distances(
        self, queries: Tensor, *, within: bool = False
    ) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yield squared distances for slices of queries, each block in the memory of the last.

        They are in a unit of their own and lack the query's squared norm; along a row that does not
        change the order. With them comes, for each query, how much they may be wrong, which is not
        finite where they are not. With `within`, the queries are the gallery, and each is at
        infinity from itself.
        """
        points = self._placed(queries).sub_(self._centre).to(self._items.dtype)
        squares = points.square().sum(dim=1)
        # By the usual bound of an inner product's error, d halves of an epsilon for |x| |y|, of
        # which there are two; the rest is for what is rounded before and after.
        eps = torch.finfo(points.dtype).eps
        inner = points.shape[1] + 2 * rounding_of_products(points.dtype) / eps
        inner = inner * (squares * self._largest).sqrt()
        errors = eps * (inner + 8 * (squares + self._largest))
        rows_at_once = max(1, _CHUNK_BYTES // (points.element_size() * len(self.gallery)))
        memory = points.new_empty(min(rows_at_once, len(points)), len(self.gallery))
        for start in range(0, len(points), rows_at_once):
            rows = slice(start, min(start + rows_at_once, len(points)))
            block = memory[: rows.stop - start]
            with no_autocast(block.device):
                self._multiply(points[rows], block)
            if within:
                block.diagonal(start).fill_(torch.inf)
            yield rows, block, errors[rows]

    def _multiply(self, points: Tensor, block: Tensor) -> None:
        """Write the items' squared norms less twice their inner products with each point."""
        norms, items = self._squared_norms, self._items
        # BLAS leaves a matrix times one vector to one thread, unless it comes in pieces.
        whole = len(items) // _PIECE * _PIECE if len(points) == 1 else 0
        if whole:
            pieces = items[:whole].unflatten(0, (-1, _PIECE))
            vectors = points.T.expand(len(pieces), -1, 1)
            out = block[0, :whole].view(-1, _PIECE, 1)
            torch.baddbmm(norms[:whole].view(-1, _PIECE, 1), pieces, vectors, alpha=-2, out=out)
        torch.addmm(norms[whole:], points, items[whole:].T, alpha=-2, out=block[:, whole:])

    def check(self, queries: Tensor) -> None:
        """Refuse queries that have not the columns of the gallery."""
        check_points(queries)
        width = self.gallery.shape[1]
        if queries.shape[1] != width:
            raise ValueError(
                f"embeddings must have the {width} columns of the gallery, got {queries.shape[1]}"
            )

    def differences(self, queries: Tensor) -> Tensor:
        """Return distances of shape (n, m) from differences of coordinates, in the same unit.

        Equal ones are those of equal items, whichever the query.
        """
        pieces = self.gallery.split(max(1, _DIFFERENCES // max(1, queries.shape[1])))
        with no_autocast(self.gallery.device):
            return torch.cat([self._lengths(queries, piece) for piece in pieces], dim=1)

    def nearest(
        self, queries: Tensor, k: int, *, within: bool = False
    ) -> Iterator[tuple[slice, Tensor]]:
        """Yield the indices of the k nearest gallery items, nearest first, for slices of queries.

        Of items at the same distance the first in the gallery counts as nearer. `within` is as for
        `distances`.
        """
        self.check(queries)
        queries = queries.to(self.gallery.device)
        for rows, block, errors in self.distances(queries, within=within):
            itself = torch.arange(rows.start, rows.stop, device=block.device) if within else None
            yield rows, self._nearest(queries[rows], block, errors, k, itself, k + _SPARE)

    def _nearest(
        self,
        queries: Tensor,
        block: Tensor,
        errors: Tensor,
        k: int,
        itself: Tensor | None,
        width: int,
    ) -> Tensor:
        """Return the k nearest by differences of coordinates, of as few items as are sure to do."""
        if _MOST * width >= len(self.gallery):
            return self._by_differences(queries, k, itself)
        values, indices = _smallest(block, width)
        # Whatever is not among them is farther than k of them.
        sure = values[:, -1] - values[:, k - 1] > 2 * errors
        if sure.all():
            return self._sorted(queries, indices, k)
        found, rest = torch.empty_like(indices[:, :k]), ~sure
        if sure.any():
            found[sure] = self._sorted(queries[sure], indices[sure], k)
        itself = None if itself is None else itself[rest]
        found[rest] = self._nearest(queries[rest], block[rest], errors[rest], k, itself, 4 * width)
        return found

    def _placed(self, points: Tensor) -> Tensor:
        """Bring points to the gallery's device, unit and widest type, and within its range.

        What is brought within range is so far away that all distances to it are equal.
        """
        points = points.detach().to(self.gallery.device, self._widest) / self._unit
        far = torch.finfo(self._widest).max ** 0.25
        return points.clamp_(-far, far)

    def _lengths(self, queries: Tensor, items: Tensor) -> Tensor:
        if self._uneven:  # no unit brings all within range
            wide = (of.detach().to(items.device, self._widest) for of in (queries, items))
            return roots_of_squares(*wide).clamp_(max=torch.finfo(self._widest).max)
        queries, items = self._placed(queries), self._placed(items)
        return torch.cdist(queries, items, compute_mode="donot_use_mm_for_euclid_dist")

    def _sorted(self, queries: Tensor, indices: Tensor, k: int) -> Tensor:
        """Of the items at those indices of shape (n, width), return the k nearest to each query."""
        indices = indices.sort(dim=1).values
        rows_at_once = max(1, _DIFFERENCES // (indices.shape[1] * max(1, queries.shape[1])))
        lengths = [
            self._lengths(some[:, None], self.gallery[few])[:, 0]
            for some, few in zip(
                queries.split(rows_at_once), indices.split(rows_at_once), strict=True
            )
        ]
        return indices.gather(1, _order(torch.cat(lengths))[:, :k])

    def _by_differences(self, queries: Tensor, k: int, itself: Tensor | None) -> Tensor:
        """Return the k nearest of the whole gallery, but for the items themselves if given."""
        found = queries.new_empty(len(queries), k, dtype=torch.int64)
        for some in torch.arange(len(queries)).split(max(1, _DIFFERENCES // len(self.gallery))):
            distances = self.differences(queries[some])
            if itself is not None:
                distances.scatter_(1, itself[some, None], torch.inf)
            farthest = distances.topk(k, largest=False).values[:, -1:]
            nearer, equal = distances < farthest, distances == farthest
            equal &= equal.cumsum(dim=1) <= k - nearer.sum(dim=1, keepdim=True)
            indices = (nearer | equal).nonzero()[:, 1].view(-1, k)
            found[some] = indices.gather(1, _order(distances.gather(1, indices)))
        return found


def _smallest(rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the smallest numbers of each row in order, and their places, as `topk` does.

    They are among the groups whose minima are smallest, which takes a third of the time to find.
    """
    group = 64
    whole = rows.shape[1] // group * group
    if whole < 4 * count * group:
        return rows.topk(count, largest=False)
    minima = rows[:, :whole].unflatten(1, (-1, group)).amin(dim=2)
    groups = minima.topk(count, largest=False).indices
    members = (groups[:, :, None] * group + torch.arange(group, device=rows.device)).flatten(1)
    rest = torch.arange(whole, rows.shape[1], device=rows.device).expand(len(rows), -1)
    places = torch.cat([members, rest], dim=1)
    values, found = rows.gather(1, places).topk(count, largest=False)
    return values, places.gather(1, found)


def _order(distances: Tensor) -> Tensor:
    return distances.sort(dim=1, stable=True).indices


def check_gallery(gallery: Tensor, gallery_labels: Tensor) -> None:
    """Refuse anything but embeddings, each with its label."""
    check_points(gallery, "gallery")
    check_labels(gallery_labels, len(gallery), "gallery_labels", of="gallery")


def check_k(k: int, items: int) -> None:
    """Refuse to look for more neighbours than there are items."""
    check_count(k, "k")
    if k > items:
        raise ValueError(f"k must be at most the {items} items to search, got {k}")
