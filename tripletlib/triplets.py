"""Which triplets a batch holds: counting, describing and listing them in n² memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tripletlib._pairs import Pairs, pairs_of
from tripletlib._precision import power_of_two, room_to_add, widest
from tripletlib._validation import check_choice
from tripletlib.distances import blocks, distances_of

KINDS = ("all", "random", "hard", "semihard", "easy")

# The most that `mine_triplets` takes while it lists triplets, of which each needs _BYTES_EACH.
MEMORY_LIMIT = 4 * 2**30
_BYTES_EACH = 48

# A search of sorted rows begins by comparing with one pivot less than this. An anchor with fewer
# positives needs no search: each is compared with all negatives. (For the nearest farther negative
# that is the quicker way up to half as many.)
_PIVOTS = 8


@dataclass(frozen=True)
class TripletDescription:
    """What `describe_triplets` saw in a batch.

    Attributes
    ----------
    triplets : int
        Number of valid triplets.
    active : float
        Fraction of them with positive loss, d(a, n) < d(a, p) + margin; equal to `semihard` +
        `hard`.
    semihard : float
        Fraction with d(a, p) ≤ d(a, n) < d(a, p) + margin.
    hard : float
        Fraction with d(a, n) < d(a, p).
    positive_distance, negative_distance : float
        Mean distance over the pairs of one class, and over those of two classes.
    spread : float
        Root mean square distance (never squared) of the embeddings from their centroid; it goes to
        zero when they collapse to a point.
    """

    triplets: int
    active: float
    semihard: float
    hard: float
    positive_distance: float
    negative_distance: float
    spread: float


def describe_triplets(
    embeddings: Tensor,
    labels: Tensor | None = None,
    margin: float = 0.2,
    *,
    squared: bool = True,
    reference: Tensor | None = None,
    reference_labels: Tensor | None = None,
    same: Tensor | None = None,
    anchor_rows: Tensor | None = None,
) -> TripletDescription:
    """Describe all triplets of a batch by the numbers that tell convergence from collapse.

    Parameters
    ----------
    embeddings : Tensor of shape (n, d)
        Floating-point rows.
    labels : Tensor of shape (n,), optional
        Integer classes.
    margin : float, default 0.2
        How much farther than the positive a negative has to be, in the distance used.
    squared : bool, default True
        Use squared Euclidean distances, as the losses do.
    reference, reference_labels, same, anchor_rows : optional
        As in `batch_all_triplet_loss`.

    Returns
    -------
    TripletDescription
        Fractions and means are 0.0 where there is nothing to average. The spread is that of the
        embeddings, whatever the reference.

    Raises
    ------
    TypeError, ValueError
        If an argument has the wrong type, shape or range, or embeddings are not finite.
    """
    pairs = pairs_of(
        embeddings, labels, margin, reference, reference_labels, same=same, anchor_rows=anchor_rows
    )
    with torch.no_grad():
        distances = distances_of(embeddings, reference, squared=squared)
        active, hard, near, far = _count_and_add(distances, pairs, margin)
    valid = pairs.count_valid()
    return TripletDescription(
        triplets=valid,
        active=active / max(valid, 1),
        semihard=(active - hard) / max(valid, 1),
        hard=hard / max(valid, 1),
        positive_distance=near,
        negative_distance=far,
        spread=_spread(embeddings.detach()),
    )


def _count_and_add(distances: Tensor, pairs: Pairs, margin: float) -> tuple[int, int, float, float]:
    """Count active and hard triplets, and give the mean distances of positives and negatives."""
    columns, positive = pairs.table
    near = distances.gather(1, columns)
    limits = torch.cat([_add_up(near, margin), near], dim=1)
    near.mul_(positive)
    wide = widest(distances.device)
    unit = room_to_add(distances, wide)
    counts = torch.zeros(2, dtype=torch.int64, device=distances.device)
    sums = torch.zeros(2, dtype=wide, device=distances.device)
    for rows in blocks(*distances.shape):
        far = pairs.negatives_of(distances, rows, torch.inf)
        below = _below(far, limits[rows]).view(len(far), 2, positive.shape[1])
        below.mul_(positive[rows, None])
        counts += below.sum(dim=(0, 2), dtype=torch.int64)
        far = pairs.negatives_of(distances, rows, 0.0)
        parts = (near[rows].mul(unit), far.mul_(unit))
        sums += torch.stack([part.sum(dtype=wide) for part in parts])
    numbers = (pairs.positives, pairs.negatives)
    means = [
        total / max(int(number.sum()), 1) / unit
        for total, number in zip(sums.tolist(), numbers, strict=True)
    ]
    return (*counts.tolist(), *means)


def _spread(points: Tensor) -> float:
    """Root mean square distance from the centroid."""
    if not len(points):
        return 0.0
    points, size = _from_the_first(points)
    square = (points - points.mean(dim=0)).square().sum(dim=1).mean()
    return min((square.sqrt() * size).item(), torch.finfo(points.dtype).max)


def _from_the_first(points: Tensor) -> tuple[Tensor, Tensor]:
    """Count points from the first, so that equal ones give zero; give also what divides them."""
    points = points.to(widest(points.device))
    size = power_of_two(points)
    return points / size - points[0] / size, size


def squared_distances_and_spread(embeddings: Tensor, pairs: Pairs) -> tuple[float, float, float]:
    """Give the mean squared distances of positives and of negatives by labels, and the spread.

    The squared distances of all pairs of n points add up to n times those from their mean, twice,
    so that no pair has to be looked at.
    """
    points, size = _from_the_first(embeddings)
    which, sizes = pairs.classes[0], pairs.classes[1].to(points)
    sums = points.new_zeros(len(sizes), points.shape[1]).index_add_(0, which, points)
    own = (points - (sums / sizes[:, None])[which]).square().sum(dim=1)
    mean_square = (points - points.mean(dim=0)).square().sum(dim=1).mean()
    n = len(points)
    positives, negatives = pairs.positives.sum(), pairs.negatives.sum()
    near, every = 2 * (sizes[which] * own).sum(), 2 * n * n * mean_square
    scale = size.square()
    most = torch.finfo(points.dtype).max
    means = (
        near / positives.clamp(min=1) * scale,
        (every - near).clamp(min=0) / negatives.clamp(min=1) * scale,
    )
    return tuple(min(of.item(), most) for of in (*means, mean_square.sqrt() * size))


def mine_triplets(
    embeddings: Tensor,
    labels: Tensor | None = None,
    kind: str = "all",
    *,
    margin: float = 0.2,
    squared: bool = True,
    generator: torch.Generator | None = None,
    reference: Tensor | None = None,
    reference_labels: Tensor | None = None,
    same: Tensor | None = None,
    anchor_rows: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """List triplets of a batch as indices of anchors, positives and negatives.

    A triplet is valid when anchor and positive are two samples of one class and the negative is of
    another. "hard" (d(a, n) < d(a, p)), "semihard" (d(a, p) ≤ d(a, n) < d(a, p) + margin) and
    "easy" (the rest) share out "all" between them; hard and semihard together are those with
    positive loss. "random" draws one triplet for each anchor that has any.

    Parameters
    ----------
    embeddings : Tensor of shape (n, d)
        Floating-point rows.
    labels : Tensor of shape (n,), optional
        Integer classes.
    kind : {"all", "random", "hard", "semihard", "easy"}, default "all"
        Which triplets to list.
    margin : float, default 0.2
        Where "semihard" ends and "easy" begins, in the distance used.
    squared : bool, default True
        Compare squared Euclidean distances.
    generator : torch.Generator, optional
        Source of "random"; by default torch's global one.
    reference, reference_labels, same, anchor_rows : optional
        As in `batch_all_triplet_loss`.

    Returns
    -------
    a, p, n : Tensor of shape (t,)
        Int64 indices into the batch (p and n: into the reference, if there is one), ordered by
        anchor and then positive: the `indices_tuple` that losses of pytorch-metric-learning take.

    Raises
    ------
    MemoryError
        If listing would take more than `tripletlib.triplets.MEMORY_LIMIT` bytes.
    TypeError, ValueError
        If an argument has the wrong type, shape or range, or embeddings are not finite.

    References
    ----------
    F. Schroff, D. Kalenichenko, J. Philbin, "FaceNet: A unified embedding for face recognition and
    clustering", 2015, section 3.2.
    """
    check_choice(kind, KINDS, "kind")
    pairs = pairs_of(
        embeddings, labels, margin, reference, reference_labels, same=same, anchor_rows=anchor_rows
    )
    with torch.no_grad():
        if kind == "random":
            return _draw(pairs, generator)
        if kind == "all":
            listed = pairs.positive.nonzero(as_tuple=True)
            last = pairs.negatives[listed[0]]
            negatives = pairs.alike.byte().argsort(dim=1, stable=True)
            return _expand(listed, torch.zeros_like(last), last, negatives)
        return _mine(distances_of(embeddings, reference, squared=squared), pairs, kind, margin)


class Active(NamedTuple):
    """What is known of a batch's active triplets, those with d(a, n) < d(a, p) + margin.

    `counts` of shape (n, r) tells in how many of them each pair is, with minus for anchor and
    negative; `number` is how many there are, `total` the sum of their hinge losses, in the widest
    type and times `unit`, a power of two that leaves it room.
    """

    counts: Tensor
    number: Tensor
    total: Tensor
    unit: float


def active_triplets(
    distances: Tensor, pairs: Pairs, margin: float, *, overwrite: bool = False
) -> Active:
    """Count, and sum the hinge losses of, all active triplets of a batch.

    The counts are the gradient of the sum by the distances. For each anchor the thresholds
    d(a, p) + margin are sorted and every d(a, n) is placed among them: the thresholds above it are
    the active triplets of that negative, and the negatives placed below a threshold are those of
    that positive. So only positives are sorted, of which a batch has far fewer than of negatives.
    With `overwrite` the counts take the distances' memory.
    """
    columns, positive = pairs.table
    near = distances.gather(1, columns)
    thresholds = _add_up(near, margin).masked_fill_(~positive, -torch.inf)
    near.mul_(positive)
    counts = distances if overwrite else torch.empty_like(distances)
    margin = round_margin(margin, distances.dtype)
    wide = widest(distances.device)
    unit = room_to_add(distances, wide, margin)
    number = torch.zeros((), dtype=torch.int64, device=distances.device)
    total = torch.zeros((), dtype=wide, device=distances.device)
    for rows in blocks(*distances.shape):
        block = distances[rows]
        # No threshold is above infinity, so that what is no negative is in no active triplet.
        far = pairs.negatives_of(distances, rows, torch.inf)
        mine, signed = _counts(thresholds[rows], far)
        signed.scatter_add_(1, columns[rows], mine)
        number += mine.sum(dtype=torch.int64)
        # A row's counts sum to zero, so that any origin may be taken off.
        shifted = block.to(wide)
        if block.dtype == wide:
            # From the farthest positive, what has to cancel is no larger than the losses
            # themselves. (Float32 needs none: then float64 adds a row without error.)
            farthest = torch.nn.functional.pad(near[rows], (0, 1)).amax(dim=1, keepdim=True)
            shifted = (block - farthest).mul_(unit)
        total += shifted.mul_(signed).sum(dim=1).sum()
        counts[rows] = signed
    return Active(counts, number, total + margin * unit * number.to(wide), unit)


def _counts(thresholds: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """How many values of its row are below each threshold, and minus how many are above each value.

    Both as floats, which hold such numbers without error.
    """
    if thresholds.shape[1] < _PIVOTS:
        signed, below = torch.zeros_like(values), torch.empty_like(values)
        mine = torch.empty_like(thresholds)
        for place in range(thresholds.shape[1]):
            torch.lt(values, thresholds[:, place : place + 1], out=below)
            mine[:, place] = below.sum(dim=1)
            signed.sub_(below)
        return mine, signed
    ordered = _padded(_sorted(thresholds.clone()))
    place, index = _places(ordered, values)
    below = place.new_zeros(len(values), ordered.shape[1] + 1)
    below = below.scatter_add_(1, index, torch.ones_like(values)).cumsum(dim=1)
    # Equal thresholds all have the place after the last of them.
    last = _places(ordered, thresholds)[1].sub_(1)
    return below.gather(1, last), place.sub_(ordered.shape[1])


def _below(values: Tensor, limits: Tensor) -> Tensor:
    """How many values of its row are below each limit, as floats; may sort the values in place."""
    if limits.shape[1] < _PIVOTS:
        below = torch.empty_like(values)
        columns = limits.unbind(dim=1)
        sums = [torch.lt(values, c[:, None], out=below).sum(dim=1) for c in columns]
        return torch.stack(sums, dim=1) if sums else limits.clone()
    ordered = _padded(_sorted(values))
    places = _places(ordered, limits.nextafter(limits.new_tensor(-torch.inf)))[0]
    return places.sub_(ordered.shape[1] - values.shape[1])


def nearest_farther(distances: Tensor, pairs: Pairs) -> Tensor:
    """For each positive of the table the nearest negative that is farther, and -1 if none is."""
    columns = pairs.table.columns
    near, found = distances.gather(1, columns), torch.empty_like(columns)
    for rows in blocks(*distances.shape):
        found[rows] = _next_above(near[rows], pairs.negatives_of(distances, rows, torch.inf))
    return found


def _next_above(limits: Tensor, values: Tensor) -> Tensor:
    """Where in its row the least value above each limit is, and -1 if none is below infinity."""
    if limits.shape[1] < _PIVOTS // 2:
        found = torch.empty_like(limits, dtype=torch.int64)
        above = torch.empty_like(values)
        for place in range(limits.shape[1]):
            # Plus 0 where it is above, and infinity elsewhere: quicker than a masked fill.
            torch.gt(values, limits[:, place : place + 1], out=above)
            found[:, place] = _argmin(above.reciprocal_().sub_(1.0).add_(values))
        return found
    # Between two limits that follow each other only the least value can be the next above one, and
    # above a limit it is the least of all that lie after it.
    ordered = _padded(_sorted(limits.clone()))
    index = _places(_just_above(ordered), values)[1]
    least = values.new_full((len(values), ordered.shape[1] + 1), torch.inf)
    least.scatter_reduce_(1, index, values, "amin")
    is_least = (values == least.gather(1, index)).logical_and_(values < torch.inf)
    row, column = is_least.nonzero(as_tuple=True)
    where = torch.full_like(least, -1, dtype=torch.int64)
    cell = row * where.shape[1] + index[row, column]
    where.view(-1).scatter_reduce_(0, cell, column, "amax")  # of equal ones the last
    source = least.flip(1).cummin(dim=1).indices
    after = ordered.shape[1] - _places(ordered, limits)[1]
    return where.flip(1).gather(1, source).gather(1, after)


def round_margin(margin: float, dtype: torch.dtype) -> float:
    """Give the margin as the type of the distances has it."""
    margin = min(float(margin), torch.finfo(dtype).max)
    return torch.tensor(margin, dtype=dtype, device="cpu").item()


def _add_up(distances: Tensor, margin: float) -> Tensor:
    """Distance plus margin, rounded up.

    A float is below the exact sum if and only if it is below the sum rounded up, so comparisons
    are exact even where the margin is lost in a huge distance.
    """
    margin = float(margin)
    total = distances + margin
    shadow = total - distances
    lost = (distances - (total - shadow)) + (margin - shadow)
    return torch.where(lost > 0, total.nextafter(total.new_tensor(torch.inf)), total)


def _sorted(values: Tensor) -> Tensor:
    """Rows in ascending order, in place where that can be."""
    if values.device.type != "cpu":
        return values.sort(dim=1).values
    values.numpy().sort(axis=1)  # ten times faster than torch's sort on a CPU
    return values


def _argmin(values: Tensor) -> Tensor:
    """Where the least of each row is, and -1 in a row of infinities."""
    if values.device.type != "cpu":
        least = values.min(dim=1)
        return least.indices.masked_fill(least.values == torch.inf, -1)
    where = torch.from_numpy(values.numpy().argmin(axis=1))  # nine times faster than torch's
    return where.masked_fill_(values.amin(dim=1) == torch.inf, -1)


def _width(least: int) -> int:
    """Columns that `_places` can search, as few as hold `least`: pivots and equal gaps."""
    return (least // _PIVOTS + 1) * _PIVOTS - 1


def _places(ordered: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """How many of a row's ordered numbers are at most each value, as floats and as an index.

    A binary search by whole matrices, because `torch.searchsorted` goes value by value and waits
    at every step for a comparison that cannot be predicted. It begins with seven pivots at once.
    """
    gap = (ordered.shape[1] + 1) // _PIVOTS
    place, found = torch.zeros_like(values), torch.empty_like(values)
    for pivot in range(gap - 1, ordered.shape[1], gap):
        place.add_(torch.ge(values, ordered[:, pivot : pivot + 1], out=found))
    place.mul_(gap)
    index = place.int().long()  # by way of int32, since float to int64 is not vectorised
    left = gap - 1
    while left:
        half = (left + 1) // 2
        torch.gather(ordered[:, half - 1 :], 1, index, out=found)
        place.add_(found.le_(values), alpha=half)
        index.copy_(place.int())
        left -= half
    return place, index


def _padded(ordered: Tensor) -> Tensor:
    """As many negative infinities at each row's start as make a width that `_places` can search."""
    n = ordered.shape[1]
    return torch.nn.functional.pad(ordered, (_width(n) - n, 0), value=-torch.inf)


def _just_above(values: Tensor) -> Tensor:
    return values.nextafter(values.new_tensor(torch.inf))


def _draw(pairs: Pairs, generator: torch.Generator | None) -> tuple[Tensor, Tensor, Tensor]:
    """One positive and one negative, uniformly, for every anchor that has both."""
    anchors = (pairs.positives * pairs.negatives).nonzero()[:, 0]
    if not len(anchors):
        return anchors, anchors.clone(), anchors.clone()
    place = anchors.device if generator is None else generator.device
    positives, negatives = (
        torch.multinomial(mask[anchors].float().to(place), 1, generator=generator)[:, 0]
        for mask in (pairs.positive, ~pairs.alike)
    )
    return anchors, positives.to(anchors.device), negatives.to(anchors.device)


def _mine(
    distances: Tensor, pairs: Pairs, kind: str, margin: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Hard, semi-hard and easy negatives of a pair: stretches of the anchor's sorted negatives."""
    listed = pairs.positive.nonzero(as_tuple=True)
    ends = [
        torch.zeros_like(listed[0]),
        active_triplets(distances, pairs, 0.0).counts[listed].long(),
        active_triplets(distances, pairs, margin).counts[listed].long(),
        pairs.negatives[listed[0]],
    ]
    start = ("hard", "semihard", "easy").index(kind)
    negatives = distances.masked_fill(pairs.alike, torch.inf).argsort(dim=1, stable=True)
    return _expand(listed, ends[start], ends[start + 1], negatives)


def _expand(
    pairs: tuple[Tensor, Tensor], first: Tensor, last: Tensor, negatives: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Each pair with its anchor's negatives from place `first` up to `last`."""
    length = last - first
    total = int(length.sum())
    if total * _BYTES_EACH > MEMORY_LIMIT:
        raise MemoryError(
            f"listing {total} triplets would take {total * _BYTES_EACH} bytes, more than the "
            f"limit of {MEMORY_LIMIT} (tripletlib.triplets.MEMORY_LIMIT); a loss over all "
            "triplets needs no list: see batch_all_triplet_loss"
        )
    anchors, positives = pairs
    starts = first - (length.cumsum(dim=0) - length)
    place = torch.arange(total, device=anchors.device) + starts.repeat_interleave(length)
    a = anchors.repeat_interleave(length)
    return a, positives.repeat_interleave(length), negatives[a, place]
