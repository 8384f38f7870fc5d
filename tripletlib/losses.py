"""Losses on embeddings: triplets (all, semi-hard, hard), the distance ratio, and pairs."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tripletlib._pairs import Pairs, pairs_of
from tripletlib._precision import at_least_float32, power_of_two, room_to_add, widest, within
from tripletlib._validation import check_choice, check_labels, check_number, check_points
from tripletlib.distances import distances_of, norm_of_rows, refuse_second_derivative
from tripletlib.triplets import active_triplets, nearest_farther, round_margin

REDUCTIONS = ("active", "mean", "sum")
MININGS = ("all", "semihard", "hard")


def batch_all_triplet_loss(
    embeddings: Tensor,
    labels: Tensor | None = None,
    margin: float = 0.2,
    *,
    squared: bool = True,
    reduction: str = "active",
    return_active: bool = False,
    reference: Tensor | None = None,
    reference_labels: Tensor | None = None,
    same: Tensor | None = None,
    anchor_rows: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Hinge loss max(0, d(a, p) - d(a, n) + margin) over every valid triplet of a batch, exactly.

    Anchor and positive are two samples of one class, the negative is of another. No triplet is
    ever listed: sorting each anchor's distances counts in how many active triplets each pair is,
    which gives value and gradient in n² memory and n² log n time.

    With a reference set of r rows (a memory of past batches, say, or the rows of other processes)
    every anchor of the batch has its positives and negatives there, and there alone, in n r memory.

    Parameters
    ----------
    embeddings : Tensor of shape (n, d)
        Floating-point rows; float16 and bfloat16 are computed in, and give, float32.
    labels : Tensor of shape (n,), optional
        Integer classes. Either these or `same` must be given.
    margin : float, default 0.2
        How much farther than the positive a negative has to be, in the distance used.
    squared : bool, default True
        Use squared Euclidean distances.
    reduction : {"active", "mean", "sum"}, default "active"
        Mean over the triplets with positive loss, mean over all valid triplets, or sum.
    return_active : bool, default False
        Return also how many triplets have positive loss.
    reference : Tensor of shape (r, d), optional
        Where positives and negatives are taken from; by default the batch itself. It gets a
        gradient if it requires one.
    reference_labels : Tensor of shape (r,), optional
        Its classes, with `reference` and `labels`.
    same : Tensor of bool, shape (n, n) or (n, r), optional
        Instead of labels, which rows of the batch (or of the reference) are of each anchor's kind:
        its positives; all others are its negatives. For samples of several labels, say, or a graded
        similarity cut at a level. It need not be symmetric.
    anchor_rows : Tensor of int64, shape (n,), optional
        Which row of the reference *is* the anchor, and so neither its positive nor its negative;
        -1 for none. By default those that lie in the same memory, as in a reference of which the
        batch is a slice; a *copy*, as `torch.cat` makes, must be told.

    Returns
    -------
    loss : Tensor of shape ()
        Zero, with a gradient of zeros, where there is nothing to sum. What is too large for its
        type becomes the type's largest finite number. Differentiable once: create_graph=True raises
        RuntimeError.
    active : Tensor of shape (), only if `return_active`
        Int64 number of triplets with positive loss.

    Raises
    ------
    TypeError, ValueError
        If an argument has the wrong type, shape or range, or embeddings are not finite.

    References
    ----------
    F. Schroff, D. Kalenichenko, J. Philbin, "FaceNet: A unified embedding for face recognition and
    clustering", 2015, equation 2. A. Hermans, L. Beyer, B. Leibe, "In defense of the triplet loss
    for person re-identification", 2017, equation 6 ("batch all").
    """
    check_choice(reduction, REDUCTIONS, "reduction")
    pairs = pairs_of(
        embeddings, labels, margin, reference, reference_labels, same=same, anchor_rows=anchor_rows
    )
    distances = distances_of(embeddings, reference, squared=squared)
    with torch.no_grad():
        # The backward of squared distances does not look at them again.
        known = active_triplets(distances.detach(), pairs, margin, overwrite=squared)
        counts, active, total, unit = known
        number = {"active": active, "mean": pairs.count_valid(), "sum": 1}[reduction]
        number = torch.as_tensor(number, device=total.device).clamp(min=1)
    loss = _Known.apply(distances, total / number / unit, counts, number)
    return (loss, active) if return_active else loss


class _Known(torch.autograd.Function):
    """A mean of losses that is known, and so is the gradient of their sum by the distances."""

    @staticmethod
    def forward(
        ctx, distances: Tensor, mean: Tensor, slopes: Tensor, number: Tensor | int
    ) -> Tensor:
        ctx.number = number
        ctx.save_for_backward(slopes)
        return mean.clamp(0.0, torch.finfo(distances.dtype).max).to(distances.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        (slopes,) = ctx.saved_tensors
        return slopes * (grad / ctx.number), None, None, None


def _mean_of_softplus(
    distances: Tensor, pairs: Pairs, margin: float, number: int
) -> tuple[Tensor, Tensor]:
    """Mean of softplus over all valid triplets, and its sum's gradient."""
    wide = widest(distances.device)
    unit = room_to_add(distances, wide, margin)
    slopes = torch.zeros_like(distances)
    total = torch.zeros((), dtype=wide, device=distances.device)
    rows = zip(distances, pairs.positive, pairs.alike, strict=True)
    for anchor, (row, positive, alike) in enumerate(rows):
        gaps = row[positive][:, None] - row[~alike][None, :] + margin
        total += F.softplus(gaps).mul_(unit).sum(dtype=wide)
        weights = gaps.sigmoid_()
        slopes[anchor, positive] = weights.sum(dim=1)
        slopes[anchor, ~alike] = -weights.sum(dim=0)
    return total / number / unit, slopes


class TripletLoss(nn.Module):
    """Triplet loss over the triplets that `mining` picks from a batch.

    Called with `(embeddings, labels)` of shapes (n, d) and (n,), it gives a scalar. It takes a
    `reference` set with its `reference_labels`, the boolean matrix `same` instead of labels, and
    `anchor_rows`, as `batch_all_triplet_loss` does.

    - "all": every valid triplet, mean over those with positive loss (`batch_all_triplet_loss`).
    - "semihard": for each pair of anchor and positive the nearest negative that is farther than the
      positive, or, where none is, the farthest negative; mean over pairs whose anchor has a
      negative. (Whether it is within the margin decides only if its loss is positive.)
    - "hard": for each anchor its farthest positive and nearest negative; mean over the anchors that
      have both.

    Memory is n² (with a reference n r, and r² for "all" with `soft`) in every case. A batch without
    triplets gives zero, with a gradient of zeros.

    Parameters
    ----------
    margin : float, default 0.2
        How much farther than the positive a negative has to be, in the distance used.
    mining : {"all", "semihard", "hard"}, default "all"
        Which triplets count.
    squared : bool, default True
        Use squared Euclidean distances.
    soft : bool, default False
        Replace the hinge max(0, x) by softplus, log(1 + exp(x)), of the same x = d(a, p) - d(a, n)
        + margin; the soft margin of Hermans et al. is that with margin 0. Every triplet then has a
        positive loss, so "all" is the mean over all valid ones, and takes n³ time.

    Raises
    ------
    ValueError
        If an argument is out of range; when called, also TypeError, as `batch_all_triplet_loss`.

    References
    ----------
    F. Schroff, D. Kalenichenko, J. Philbin, "FaceNet: A unified embedding for face recognition and
    clustering", 2015, section 3.2 (semi-hard). A. Hermans, L. Beyer, B. Leibe, "In defense of the
    triplet loss for person re-identification", 2017, equations 5 (hard) and 6 (all).
    """

    def __init__(
        self,
        margin: float = 0.2,
        mining: str = "all",
        *,
        squared: bool = True,
        soft: bool = False,
    ) -> None:
        super().__init__()
        check_number(margin, "margin")
        check_choice(mining, MININGS, "mining")
        self.margin = margin
        self.mining = mining
        self.squared = squared
        self.soft = soft

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        *,
        reference: Tensor | None = None,
        reference_labels: Tensor | None = None,
        same: Tensor | None = None,
        anchor_rows: Tensor | None = None,
    ) -> Tensor:
        """Give the loss of a batch."""
        options = {"reference": reference, "reference_labels": reference_labels}
        options |= {"same": same, "anchor_rows": anchor_rows}
        if self.mining == "all" and not self.soft:
            return batch_all_triplet_loss(
                embeddings, labels, self.margin, squared=self.squared, **options
            )
        pairs = pairs_of(embeddings, labels, self.margin, **options)
        distances = distances_of(embeddings, reference, squared=self.squared)
        margin = round_margin(self.margin, distances.dtype)
        if self.mining == "all":
            number = max(pairs.count_valid(), 1)
            mean, slopes = _mean_of_softplus(distances.detach(), pairs, margin, number)
            return _Known.apply(distances, mean, slopes, number)
        pick = {"hard": _hardest, "semihard": _semihard}[self.mining]
        positive, negative = pick(distances, pairs)
        gaps = positive - negative + margin
        # (At zero, the gradient of a clamp is 1 in some versions of torch.)
        return _mean(F.softplus(gaps) if self.soft else gaps.relu(), distances)

    def extra_repr(self) -> str:
        """Name the arguments that make this loss."""
        return (
            f"margin={self.margin}, mining={self.mining!r}, squared={self.squared}, "
            f"soft={self.soft}"
        )


def _mean(losses: Tensor, distances: Tensor) -> Tensor:
    """Mean of the losses, or a zero that still has a gradient; never beyond the type's range."""
    if not losses.numel():
        return (distances * 0.0).sum()
    wide = within(losses, widest(losses.device))
    unit = room_to_add(losses.detach(), wide.dtype)
    return within((wide * unit).sum() / losses.numel() / unit, losses.dtype)


def _hardest(distances: Tensor, pairs: Pairs) -> tuple[Tensor, Tensor]:
    """Farthest positive and nearest negative of every anchor that has both."""
    anchors = (pairs.positives * pairs.negatives) > 0
    if not anchors.any():
        return distances.new_zeros(0), distances.new_zeros(0)
    distances, positive, alike = distances[anchors], pairs.positive[anchors], pairs.alike[anchors]
    return (
        distances.masked_fill(~positive, -torch.inf).amax(dim=1),
        distances.masked_fill(alike, torch.inf).amin(dim=1),
    )


def _semihard(distances: Tensor, pairs: Pairs) -> tuple[Tensor, Tensor]:
    """Every pair's distance, and that of its nearest farther, or else the farthest, negative."""
    columns, positive = pairs.table
    with torch.no_grad():
        known = distances.detach()
        negatives = nearest_farther(known, pairs)
        alone = (negatives < 0).any(dim=1).nonzero()[:, 0]  # (-1 fills up the table, too)
        farthest = pairs.negatives_of(known, alone, -torch.inf)
        if farthest.numel():
            farthest = farthest.argmax(dim=1, keepdim=True)
            negatives[alone] = torch.where(negatives[alone] < 0, farthest, negatives[alone])
        anchors, place = (positive & (pairs.negatives > 0)[:, None]).nonzero(as_tuple=True)
        row = anchors * distances.shape[1]
        ends = torch.stack([row + columns[anchors, place], row + negatives[anchors, place]])
    return distances.reshape(-1).gather(0, ends.view(-1)).view_as(ends).unbind()


class DistanceRatioLoss(nn.Module):
    """The loss of the triplet network paper: squared softmax weight of the positive's distance.

    With d⁺ = ‖a - p‖₂ and d⁻ = ‖a - n‖₂ (not squared, embeddings not normalised) and
    s⁺ = exp(d⁺) / (exp(d⁺) + exp(d⁻)) = sigmoid(d⁺ - d⁻), the loss is the mean of (s⁺)².

    Called with `(anchor, positive, negative)`, each of shape (t, d), it gives a scalar, stable for
    any distance and with finite gradients where points coincide; zero for t = 0.

    References
    ----------
    E. Hoffer, N. Ailon, "Deep metric learning using triplet network", 2014, section 2; the paper's
    (s⁺)² + (1 - s⁻)² is twice this.
    """

    def forward(self, anchor: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        """Give the loss of a batch of triplets."""
        check_points(anchor, "anchor")
        for name, other in (("positive", positive), ("negative", negative)):
            check_points(other, name)
            if other.shape != anchor.shape:
                raise ValueError(
                    f"{name} must have the shape of anchor, {tuple(anchor.shape)}, "
                    f"got {tuple(other.shape)}"
                )
        if not anchor.numel():
            return (anchor.sum() + positive.sum() + negative.sum()) * 0.0
        anchor, positive, negative = map(at_least_float32, (anchor, positive, negative))
        near, far = norm_of_rows((anchor, positive), (anchor, negative))
        return torch.sigmoid(near - far).square().mean().to(anchor.dtype)


class ContrastiveLoss(nn.Module):
    """Contrastive loss over all pairs of a batch.

    A pair of one class costs ½d², a pair of two classes ½max(0, margin - d)², with d the Euclidean
    distance (not squared). The loss is the mean over all n(n - 1)/2 pairs, of either sort.

    Called with `(embeddings, labels)` of shapes (n, d) and (n,), it gives a scalar, with finite
    gradients where points coincide, in n² memory; zero without a pair. What is too large for its
    type becomes the type's largest finite number.

    Parameters
    ----------
    margin : float, default 1.0
        Distance from which two classes are far enough apart; above zero.

    References
    ----------
    R. Hadsell, S. Chopra, Y. LeCun, "Dimensionality reduction by learning an invariant mapping",
    2006, equation 4.
    """

    def __init__(self, margin: float = 1.0) -> None:
        super().__init__()
        check_number(margin, "margin", strict=True)
        self.margin = margin

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Give the loss of a batch."""
        check_points(embeddings)
        check_labels(labels, len(embeddings))
        distances = distances_of(embeddings)
        same = Pairs(labels.to(embeddings.device)).alike
        with torch.no_grad():
            margin = round_margin(self.margin, distances.dtype)
            gaps = torch.where(same, distances, (margin - distances).relu())
            number = max(len(gaps) * (len(gaps) - 1), 1)
            size = power_of_two(gaps)
            squares = (gaps / size).to(widest(gaps.device)).square_()
            mean = (squares.sum() / (2 * number) * size * size).reshape(())
            slopes = gaps * torch.where(same, 1.0, -1.0)
        return _Known.apply(distances, mean, slopes, number)

    def extra_repr(self) -> str:
        """Name the argument that makes this loss."""
        return f"margin={self.margin}"
