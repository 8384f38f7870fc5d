"""Which triplets a batch holds: counting, describing and listing them in n² memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tripletlib._precision import power_of_two, room_to_add, widest
from tripletlib._validation import check_choice, check_labels, check_number, check_points
from tripletlib.distances import blocks, distances_of

KINDS = ("all", "random", "hard", "semihard", "easy")

# The most that `mine_triplets` takes while it lists triplets, of which each needs _BYTES_EACH.
MEMORY_LIMIT = 4 * 2**30
_BYTES_EACH = 48

# A search of sorted rows begins by comparing with one pivot less than this.
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
    embeddings: Tensor, labels: Tensor, margin: float = 0.2, *, squared: bool = True
) -> TripletDescription:
    """Describe all triplets of a batch by the numbers that tell convergence from collapse.

    Parameters
    ----------
    embeddings : Tensor of shape (n, d)
        Floating-point rows.
    labels : Tensor of shape (n,)
        Integer classes.
    margin : float, default 0.2
        How much farther than the positive a negative has to be, in the distance used.
    squared : bool, default True
        Use squared Euclidean distances, as the losses do.

    Returns
    -------
    TripletDescription
        Fractions and means are 0.0 where there is nothing to average.

    Raises
    ------
    TypeError, ValueError
        If an argument has the wrong type, shape or range, or embeddings are not finite.
    """
    check_batch(embeddings, labels, margin)
    n = len(embeddings)
    labels = labels.to(embeddings.device)
    with torch.no_grad():
        distances = distances_of(embeddings, squared=squared)
        members, positive = _members(labels)
        wide = widest(distances.device)
        unit = room_to_add(distances, wide)
        counts = torch.zeros(2, dtype=torch.int64, device=distances.device)
        sums = torch.zeros(2, dtype=wide, device=distances.device)
        for rows in blocks(n, n):
            near, others = distances[rows].gather(1, members[rows]), positive[rows]
            ordered = _padded(_sorted(distances[rows].scatter(1, members[rows], torch.inf)))
            below = [_below(ordered, _add_up(near, m)).mul_(others) for m in (margin, 0.0)]
            counts += torch.stack([part.sum(dtype=torch.int64) for part in below])
            near.mul_(others)
            far = distances[rows].scatter(1, members[rows], 0.0)
            sums += torch.stack([part.mul_(unit).sum(dtype=wide) for part in (near, far)])
        active, hard = counts.tolist()
        within, between = sums.tolist()
    valid, pairs = count_valid(labels), int(positive.sum())
    return TripletDescription(
        triplets=valid,
        active=active / max(valid, 1),
        semihard=(active - hard) / max(valid, 1),
        hard=hard / max(valid, 1),
        positive_distance=within / max(pairs, 1) / unit,
        negative_distance=between / max(n * n - n - pairs, 1) / unit,
        spread=_spread(embeddings.detach()) if n else 0.0,
    )


def _spread(points: Tensor) -> float:
    """Root mean square distance from the centroid."""
    points = points.to(widest(points.device))
    size = power_of_two(points)
    # From the first point on, so that points that coincide give zero and not what rounding leaves.
    points = points / size - points[0] / size
    square = (points - points.mean(dim=0)).square().sum(dim=1).mean()
    return min((square.sqrt() * size).item(), torch.finfo(points.dtype).max)


def mine_triplets(
    embeddings: Tensor,
    labels: Tensor,
    kind: str = "all",
    *,
    margin: float = 0.2,
    squared: bool = True,
    generator: torch.Generator | None = None,
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
    labels : Tensor of shape (n,)
        Integer classes.
    kind : {"all", "random", "hard", "semihard", "easy"}, default "all"
        Which triplets to list.
    margin : float, default 0.2
        Where "semihard" ends and "easy" begins, in the distance used.
    squared : bool, default True
        Compare squared Euclidean distances.
    generator : torch.Generator, optional
        Source of "random"; by default torch's global one.

    Returns
    -------
    a, p, n : Tensor of shape (t,)
        Int64 indices into the batch, ordered by anchor and then positive: the `indices_tuple` that
        losses of pytorch-metric-learning take.

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
    check_batch(embeddings, labels, margin)
    check_choice(kind, KINDS, "kind")
    with torch.no_grad():
        labels = labels.to(embeddings.device)
        same = same_class(labels)
        if kind == "random":
            return _draw(same, generator)
        if kind == "all":
            negatives = _columns(~same)
            pairs = _pairs(same)
            last = (~same).sum(dim=1)[pairs[0]]
            return _expand(pairs, torch.zeros_like(last), last, negatives)
        return _mine(distances_of(embeddings, squared=squared), labels, kind, margin)


def check_batch(embeddings: Tensor, labels: Tensor, margin: float) -> None:
    """Refuse what no function of embeddings, labels and margin can use."""
    check_points(embeddings)
    check_labels(labels, len(embeddings))
    check_number(margin, "margin")


def same_class(labels: Tensor) -> Tensor:
    """Which pairs are of one class, the pair of a sample with itself included."""
    return labels[:, None] == labels[None, :]


def count_valid(labels: Tensor) -> int:
    """Count the triplets of two samples of one class and a third of another."""
    sizes = labels.unique(return_counts=True)[1]
    return int((sizes * (sizes - 1) * (len(labels) - sizes)).sum())


class Active(NamedTuple):
    """What is known of a batch's active triplets, those with d(a, n) < d(a, p) + margin.

    `counts` of shape (n, n) tells in how many of them each pair is, with minus for anchor and
    negative; `number` is how many there are, `total` the sum of their hinge losses, in the widest
    type and times `unit`, a power of two that leaves it room.
    """

    counts: Tensor
    number: Tensor
    total: Tensor
    unit: float


def active_triplets(
    distances: Tensor, labels: Tensor, margin: float, *, overwrite: bool = False
) -> Active:
    """Count, and sum the hinge losses of, all active triplets of a batch.

    The counts are the gradient of the sum by the distances. For each anchor the thresholds
    d(a, p) + margin are sorted and every d(a, n) is placed among them: the thresholds above it are
    the active triplets of that negative, and the negatives placed below a threshold are those of
    that positive. So only positives are sorted, of which a batch has far fewer than of negatives.
    With `overwrite` the counts take the distances' memory.
    """
    n = len(distances)
    members, positive = _members(labels)
    near = distances.gather(1, members)
    wanted = _add_up(near, margin).masked_fill_(~positive, -torch.inf)
    ordered = _sorted(wanted.clone())
    counts = distances if overwrite else torch.empty_like(distances)
    margin = round_margin(margin, distances.dtype)
    wide = widest(distances.device)
    unit = room_to_add(distances, wide, margin)
    number = torch.zeros((), dtype=torch.int64, device=distances.device)
    total = torch.zeros((), dtype=wide, device=distances.device)
    for rows in blocks(n, n):
        block, columns = distances[rows], members[rows]
        values = block.scatter(1, columns, wanted[rows])
        place, index = _places(ordered[rows], values)
        negative = values.fill_(1.0).scatter_(1, columns, 0.0)
        below = place.new_zeros(len(block), members.shape[1] + 1)
        below = below.scatter_add_(1, index, negative).cumsum(dim=1)
        # Equal thresholds all have the place after the last of them.
        last = index.gather(1, columns).sub_(1).clamp_(min=0)
        mine = below.gather(1, last).mul_(positive[rows])
        signed = place.sub_(members.shape[1]).scatter_(1, columns, mine)
        number += mine.sum(dtype=torch.int64)
        # A row's counts sum to zero, so that any origin may be taken off.
        shifted = block.to(wide)
        if block.dtype == wide:
            # From the farthest positive, what has to cancel is no larger than the losses
            # themselves. (Float32 needs none: then float64 adds a row without error.)
            farthest = (near[rows] * positive[rows]).amax(dim=1, keepdim=True)
            shifted = (block - farthest).mul_(unit)
        total += shifted.mul_(signed).sum(dim=1).sum()
        counts[rows] = signed
    return Active(counts, number, total + margin * unit * number.to(wide), unit)


def round_margin(margin: float, dtype: torch.dtype) -> float:
    """Give the margin as the type of the distances has it."""
    margin = min(float(margin), torch.finfo(dtype).max)
    return torch.tensor(margin, dtype=dtype, device="cpu").item()


def _members(labels: Tensor) -> tuple[Tensor, Tensor]:
    """For every sample the samples of its class, filled up with itself, and which are others."""
    _, which, sizes = labels.unique(return_inverse=True, return_counts=True)
    place = torch.arange(_width(int(sizes.max())) if len(labels) else 0, device=labels.device)
    first = (sizes.cumsum(dim=0) - sizes)[:, None]
    table = which.argsort()[(first + place).clamp_(max=len(labels) - 1)]
    real = (place < sizes[:, None]).index_select(0, which)
    itself = torch.arange(len(labels), device=labels.device)[:, None]
    members = torch.where(real, table.index_select(0, which), itself)
    return members, members != itself


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


def _padded(values: Tensor) -> Tensor:
    """As many infinities at the end of each row as make it a width that `_places` can search."""
    n = values.shape[1]
    return torch.nn.functional.pad(values, (0, _width(n) - n), value=torch.inf)


def _below(ordered: Tensor, limits: Tensor) -> Tensor:
    """How many of a row's ordered numbers are below each limit, as floats."""
    return _places(ordered, limits.nextafter(limits.new_tensor(-torch.inf)))[0]


def _pairs(same: Tensor) -> tuple[Tensor, Tensor]:
    """Anchors and positives."""
    positive = same.clone().fill_diagonal_(False)
    return positive.nonzero(as_tuple=True)


def _columns(negative: Tensor) -> Tensor:
    """For every row first its negatives and then the rest, each in ascending order."""
    return negative.logical_not().byte().argsort(dim=1, stable=True)


def _draw(same: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor, Tensor]:
    """One positive and one negative, uniformly, for every anchor that has both."""
    positive = same.clone().fill_diagonal_(False)
    anchors = (positive.any(dim=1) & ~same.all(dim=1)).nonzero()[:, 0]
    if not len(anchors):
        return anchors, anchors.clone(), anchors.clone()
    place = same.device if generator is None else generator.device
    positives, negatives = (
        torch.multinomial(mask[anchors].float().to(place), 1, generator=generator)[:, 0]
        for mask in (positive, ~same)
    )
    return anchors, positives.to(same.device), negatives.to(same.device)


def _mine(
    distances: Tensor, labels: Tensor, kind: str, margin: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Hard, semi-hard and easy negatives of a pair: stretches of the anchor's sorted negatives."""
    same = same_class(labels)
    pairs = _pairs(same)
    ends = [
        torch.zeros_like(pairs[0]),
        active_triplets(distances, labels, 0.0).counts[pairs].long(),
        active_triplets(distances, labels, margin).counts[pairs].long(),
        (~same).sum(dim=1)[pairs[0]],
    ]
    start = ("hard", "semihard", "easy").index(kind)
    negatives = distances.masked_fill(same, torch.inf).argsort(dim=1, stable=True)
    return _expand(pairs, ends[start], ends[start + 1], negatives)


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
