"""Losses on embeddings: triplets (all, semi-hard, hard), the distance ratio, and pairs."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tripletlib._validation import check_choice, check_labels, check_number, check_points
from tripletlib.distances import distances_of, norm_of_rows, refuse_second_derivative
from tripletlib.triplets import active_triplets, check_batch, count_valid, same_class

REDUCTIONS = ("active", "mean", "sum")
MININGS = ("all", "semihard", "hard")


def batch_all_triplet_loss(
    embeddings: Tensor,
    labels: Tensor,
    margin: float = 0.2,
    *,
    squared: bool = True,
    reduction: str = "active",
    return_active: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Hinge loss max(0, d(a, p) - d(a, n) + margin) over every valid triplet of a batch, exactly.

    Anchor and positive are two samples of one class, the negative is of another. No triplet is
    ever listed: sorting each anchor's distances counts in how many active triplets each pair is,
    which gives value and gradient in n² memory and n² log n time.

    Parameters
    ----------
    embeddings : Tensor of shape (n, d)
        Floating-point rows; float16 and bfloat16 are computed in, and give, float32.
    labels : Tensor of shape (n,)
        Integer classes.
    margin : float, default 0.2
        How much farther than the positive a negative has to be, in the distance used.
    squared : bool, default True
        Use squared Euclidean distances.
    reduction : {"active", "mean", "sum"}, default "active"
        Mean over the triplets with positive loss, mean over all valid triplets, or sum.
    return_active : bool, default False
        Return also how many triplets have positive loss.

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
    check_batch(embeddings, labels, margin)
    check_choice(reduction, REDUCTIONS, "reduction")
    distances = distances_of(embeddings, squared=squared)
    with torch.no_grad():
        labels = labels.to(embeddings.device)
        # The backward of squared distances does not look at them again.
        known = active_triplets(distances.detach(), labels, margin, overwrite=squared)
        counts, active, total = known
        number = {"active": active, "mean": count_valid(labels), "sum": 1}[reduction]
    loss = _Known.apply(distances, total, counts, number)
    return (loss, active) if return_active else loss


class _Known(torch.autograd.Function):
    """A loss whose sum over triplets and gradient by the distances are known, as their mean."""

    @staticmethod
    def forward(
        ctx, distances: Tensor, total: Tensor, slopes: Tensor, number: Tensor | int
    ) -> Tensor:
        ctx.number = number = torch.as_tensor(number, device=total.device).clamp(min=1)
        ctx.save_for_backward(slopes)
        return (total / number).clamp(0.0, torch.finfo(distances.dtype).max).to(distances.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        (slopes,) = ctx.saved_tensors
        return slopes * (grad / ctx.number), None, None, None


def _sum_of_softplus(distances: Tensor, same: Tensor, margin: float) -> tuple[Tensor, Tensor]:
    """Sum of softplus over all valid triplets in float64 and its gradient, anchor by anchor."""
    distances = distances.detach()
    slopes = torch.zeros_like(distances)
    total = distances.new_zeros((), dtype=torch.float64)
    for anchor, (row, alike) in enumerate(zip(distances, same, strict=True)):
        positive = alike.clone()
        positive[anchor] = False
        gaps = row[positive][:, None] - row[~alike][None, :] + margin
        total += F.softplus(gaps).sum(dtype=torch.float64)
        weights = gaps.sigmoid_()
        slopes[anchor, positive] = weights.sum(dim=1)
        slopes[anchor, ~alike] = -weights.sum(dim=0)
    return slopes, total


class TripletLoss(nn.Module):
    """Triplet loss over the triplets that `mining` picks from a batch.

    Called with `(embeddings, labels)` of shapes (n, d) and (n,), it gives a scalar.

    - "all": every valid triplet, mean over those with positive loss (`batch_all_triplet_loss`).
    - "semihard": for each pair of anchor and positive the nearest negative that is farther than the
      positive, or, where none is, the farthest negative; mean over pairs whose anchor has a
      negative. (Whether it is within the margin decides only if its loss is positive.)
    - "hard": for each anchor its farthest positive and nearest negative; mean over the anchors that
      have both.

    Memory is n² in every case. A batch without triplets gives zero, with a gradient of zeros.

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

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Give the loss of a batch."""
        if self.mining == "all" and not self.soft:
            return batch_all_triplet_loss(embeddings, labels, self.margin, squared=self.squared)
        check_batch(embeddings, labels, self.margin)
        distances = distances_of(embeddings, squared=self.squared)
        same = same_class(labels.to(embeddings.device))
        if self.mining == "all":
            slopes, total = _sum_of_softplus(distances, same, self.margin)
            return _Known.apply(distances, total, slopes, count_valid(labels))
        positive, negative = {"hard": _hardest, "semihard": _semihard}[self.mining](distances, same)
        gaps = positive - negative + self.margin
        losses = F.softplus(gaps) if self.soft else gaps.clamp(min=0)
        return _mean(losses, distances)

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
    mean = losses.double().clamp(max=torch.finfo(losses.dtype).max / losses.numel()).sum()
    return (mean / losses.numel()).to(losses.dtype)


def _hardest(distances: Tensor, same: Tensor) -> tuple[Tensor, Tensor]:
    """Farthest positive and nearest negative of every anchor that has both."""
    positive = same.clone().fill_diagonal_(False)
    anchors = positive.any(dim=1) & ~same.all(dim=1)
    if not anchors.any():
        return distances.new_zeros(0), distances.new_zeros(0)
    distances, positive, same = distances[anchors], positive[anchors], same[anchors]
    return (
        distances.masked_fill(~positive, -torch.inf).amax(dim=1),
        distances.masked_fill(same, torch.inf).amin(dim=1),
    )


def _semihard(distances: Tensor, same: Tensor) -> tuple[Tensor, Tensor]:
    """Every pair's distance, and that of its nearest farther, or else the farthest, negative."""
    positive = same.clone().fill_diagonal_(False) & ~same.all(dim=1, keepdim=True)
    anchors, positives = positive.nonzero(as_tuple=True)
    with torch.no_grad():
        ordered, order = distances.masked_fill(same, torch.inf).sort(dim=1)
        farther = torch.searchsorted(ordered, distances.detach().contiguous(), right=True)
        last = (~same).sum(dim=1, keepdim=True) - 1
        negatives = order.gather(1, torch.minimum(farther, last).clamp(min=0))[anchors, positives]
    return distances[anchors, positives], distances[anchors, negatives]


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
        near, far = norm_of_rows((anchor, positive), (anchor, negative))
        kind = torch.promote_types(anchor.dtype, torch.float32)
        return torch.sigmoid(near - far).square().mean().to(kind)


class ContrastiveLoss(nn.Module):
    """Contrastive loss over all pairs of a batch.

    A pair of one class costs ½d², a pair of two classes ½max(0, margin - d)², with d the Euclidean
    distance (not squared). The loss is the mean over all n(n - 1)/2 pairs, of either sort.

    Called with `(embeddings, labels)` of shapes (n, d) and (n,), it gives a scalar, with finite
    gradients where points coincide, in n² memory; zero without a pair. A distance so large that its
    square overflows counts as the largest whose square does not.

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
        same = same_class(labels.to(embeddings.device))
        gaps = torch.where(same, distances, (self.margin - distances).clamp(min=0))
        largest = math.sqrt(torch.finfo(gaps.dtype).max) / max(len(gaps), 1)
        total = gaps.clamp(max=largest).square().sum()
        return total / max(2 * len(gaps) * (len(gaps) - 1), 1)

    def extra_repr(self) -> str:
        """Name the argument that makes this loss."""
        return f"margin={self.margin}"
