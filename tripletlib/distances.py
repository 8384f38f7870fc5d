"""Euclidean distances that are right for close points, coincident points and extreme ones."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from tripletlib._precision import at_least_float32, power_of_two, widest, within
from tripletlib._validation import check_match, check_points

# Below this ratio of squared distance to squared norm, float64 inner products no longer give a
# distance to float32's precision (2^-53 / 1e-9 is about 2^-23), and differences are taken instead.
_CLOSE = 1e-9

# So many close pairs a row are looked at for coincidence; more is a collapse.
_CLOSE_PAIRS = 4

_BLOCK = 2**17
_LEAST_ROWS = 64  # fewer would waste a matrix product


def pairwise_distances(x: Tensor, y: Tensor | None = None, *, squared: bool = False) -> Tensor:
    """Euclidean distance of every row of `x` to every row of `y`.

    Accurate for close points far from the origin; at coincident points the distance is exactly
    zero and so is its gradient. Float16 and bfloat16 are computed in, and give, float32. A distance
    too large for its type becomes the type's largest finite number.

    Parameters
    ----------
    x : Tensor of shape (n, d)
        Floating-point rows.
    y : Tensor of shape (m, d), optional
        Rows to compare with; by default `x` itself, which gives a diagonal of exact zeros.
    squared : bool, default False
        Return squared distances.

    Returns
    -------
    Tensor of shape (n, m)
        Distances, differentiable once: create_graph=True is not supported.

    Raises
    ------
    TypeError, ValueError
        If an argument is no finite floating-point matrix, or the two differ in columns, type or
        device.
    """
    check_points(x, "x")
    if y is not None:
        check_match(y, x, "y", "x")
    return distances_of(x, y, squared=squared)


def distances_of(x: Tensor, y: Tensor | None = None, *, squared: bool = False) -> Tensor:
    """`pairwise_distances` of arguments that were checked before."""
    own = y is None or y is x
    x = at_least_float32(x)
    y = x if own else at_least_float32(y)
    a, b, wide = x.detach(), y.detach(), widest(x.device)
    if x.dtype != wide:
        known = _by_product(a, b, own, squared) if len(a) and len(b) else None
        if known is None:
            return _by_cdist(x, y, squared)
        return _Distances.apply(x, y, [known], squared, True)
    if wide == torch.float64 and not squared and not _extreme(a, b):
        return _by_cdist(x, y, squared)
    known = _by_difference(a, b, own, squared)
    by_product = wide == torch.float64 and not _any_close(known, squared)
    return _Distances.apply(x, y, [known], squared, by_product)


def norm_of_rows(*pairs: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Euclidean distance, in the widest type, between the matching rows of each pair of matrices.

    One too large for the type becomes its largest finite number.
    """
    wide = widest(pairs[0][0].device)
    largest = torch.finfo(wide).max
    norms = []
    for a, b in pairs:
        difference = (a.to(wide) - b.to(wide)).clamp(-largest, largest)
        size = power_of_two(difference, 1) if torch.finfo(a.dtype).max > largest**0.5 else 1.0
        norm = torch.linalg.vector_norm(difference / size, dim=1, keepdim=True)
        norms.append((norm * size).clamp(max=largest)[:, 0])
    return norms


def _centred(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Both in float64 about the centroid of `x`, where inner products lose the least."""
    x_wide = x.double()
    centre = x_wide.mean(dim=0)
    x_wide = x_wide - centre
    return x_wide, (x_wide if y is x else y.double() - centre)


def blocks(n: int, m: int) -> Iterator[slice]:
    """Rows of an (n, m) matrix in stretches small enough to stay in a core's cache."""
    step = max(_LEAST_ROWS, _BLOCK // max(m, 1))
    return (slice(start, min(start + step, n)) for start in range(0, n, step))


def _by_product(x: Tensor, y: Tensor, own: bool, squared: bool) -> Tensor | None:
    """Float32 distances from one float64 matrix product, or None where points are too close.

    Points that coincide are no harm: their distance is known. (Whether they do is asked of the
    points as given, since beside a far one others may coincide about the centroid.)
    """
    a, b = _centred(x, x if own else y)
    a_norms = a.square().sum(dim=1)
    b_norms = b.square().sum(dim=1)
    close = _CLOSE * (a_norms.max() + b_norms.max())
    distances = x.new_empty(len(a), len(b))
    for rows in blocks(*distances.shape):
        block = torch.addmm(b_norms, a[rows], b.T, alpha=-2).add_(a_norms[rows, None])
        itself = block.diagonal(rows.start) if own else block[:0]
        itself.fill_(torch.inf)
        if block.amin() < close:
            i, j = (block < close).nonzero(as_tuple=True)
            few = len(i) <= _CLOSE_PAIRS * len(block)
            if not few or (x[rows][i] != y[j]).any():
                return None
            block[i, j] = 0.0
        itself.zero_()
        block.clamp_(max=_ceiling(x.dtype, squared))
        distances[rows] = block if squared else block.sqrt_()
    return distances


def _ceiling(dtype: torch.dtype, squared: bool) -> float:
    """Largest squared distance whose result still fits `dtype`."""
    largest = torch.finfo(dtype).max
    return largest if squared else largest**2


def refuse_second_derivative() -> None:
    """Raise where autograd records a backward pass, which would take our gradients for constants.

    (`once_differentiable` raises only if the incoming gradient, too, is to be differentiated.)
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            "tripletlib's distances and losses are differentiable only once; "
            "create_graph=True is not supported"
        )


def _any_close(distances: Tensor, squared: bool) -> bool:
    """Whether the gradient of some pair would be lost in a matrix product beside the others."""
    if not distances.numel():
        return False
    nearest = distances.masked_fill(distances == 0, torch.inf).amin()
    return bool(nearest < (_CLOSE if squared else math.sqrt(_CLOSE)) * distances.amax())


class _Distances(torch.autograd.Function):
    """Distances known already, with a gradient by matrix products or by differences."""

    @staticmethod
    def forward(
        ctx, x: Tensor, y: Tensor, known: list[Tensor], squared: bool, by_product: bool
    ) -> Tensor:
        (distances,) = known  # in a list, because an output may not be an input
        ctx.save_for_backward(x, y, *([] if squared else [distances]))
        ctx.own, ctx.by_product = x is y, by_product
        return distances

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        x, y, *distances = ctx.saved_tensors
        known = distances[0] if distances else None
        pull_back = _pull_back if ctx.by_product else _pull_back_by_difference
        if ctx.own:
            return pull_back(grad, known, x, x, own=True), None, None, None, None
        for_x = pull_back(grad, known, x, y) if ctx.needs_input_grad[0] else None
        known = None if known is None else known.T
        for_y = pull_back(grad.T, known, y, x) if ctx.needs_input_grad[1] else None
        return for_x, for_y, None, None, None


def _pull_back(
    grad: Tensor, distances: Tensor | None, x: Tensor, y: Tensor, *, own: bool = False
) -> Tensor:
    """Gradient by `x` from that by its (if not given, squared) distances to `y`, in float64.

    These sums cancel where points are much closer than the cloud is wide, and dividing by a small
    distance then magnifies what is left; float32 would not do.
    """
    a, b = _centred(x, x if own else y)
    out = torch.empty_like(a)
    for rows in blocks(*grad.shape):
        block = (_both_ways(grad, rows) if own else grad[rows]).double()
        if distances is not None:
            block = block.div(distances[rows]).masked_fill_(distances[rows] == 0, 0.0)
        out[rows] = (block.sum(dim=1, keepdim=True) * a[rows]).addmm_(block, b, alpha=-1)
    out = out.mul_(2) if distances is None else out
    return _finite(out, x.dtype)


def _pull_back_by_difference(
    grad: Tensor, distances: Tensor | None, x: Tensor, y: Tensor, *, own: bool = False
) -> Tensor:
    """`_pull_back` without its matrix product, coordinate by coordinate, in the widest type."""
    wide = widest(x.device)
    a, b, largest = x.to(wide), y.to(wide), torch.finfo(wide).max
    out = torch.empty_like(a)
    for rows in blocks(*grad.shape):
        block = (_both_ways(grad, rows) if own else grad[rows]).to(wide)
        if distances is not None:
            lengths = distances[rows].to(wide).masked_fill(distances[rows] == 0, torch.inf)
        for of_out, of_a, of_b in zip(out[rows].T, a[rows].T, b.T, strict=True):
            slopes = (of_a[:, None] - of_b).clamp_(-largest, largest)
            slopes = slopes if distances is None else slopes.div_(lengths)
            of_out.copy_(slopes.mul_(block).sum(dim=1))
    out = out.mul_(2) if distances is None else out
    return _finite(out, x.dtype)


def _both_ways(grad: Tensor, rows: slice) -> Tensor:
    """Rows of the gradient and of its transpose, added up."""
    # Copied twice, a transpose is quicker than read across.
    return grad[:, rows].contiguous().T.contiguous().add_(grad[rows])


def _finite(gradient: Tensor, dtype: torch.dtype) -> Tensor:
    largest = torch.finfo(dtype).max
    return gradient.nan_to_num_(0.0, largest, -largest).clamp_(-largest, largest).to(dtype)


def _by_cdist(x: Tensor, y: Tensor, squared: bool) -> Tensor:
    """Distances from differences of coordinates in float64: exact however close the points."""
    a = within(x, torch.float64)
    b = a if y is x else within(y, torch.float64)
    distances = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
    return within(distances.square() if squared else distances, x.dtype)


def _extreme(*points: Tensor) -> bool:
    """Whether squares of coordinates' differences might leave float64's range.

    (A difference of two numbers is zero or not below the smaller's last place.)
    """
    sizes = torch.cat([p.abs().flatten() for p in points])
    return bool(((sizes > 1e140) | ((sizes < 1e-120) & (sizes > 0))).any())


def _by_difference(x: Tensor, y: Tensor, own: bool, squared: bool) -> Tensor:
    """Distances from differences of coordinates, one after another, in their own type.

    Squared ones do not go by way of a root, whose rounding would break ties, and roots are right
    even where the square leaves the type's range.
    """
    distances = x.new_empty(len(x), len(y))
    for rows in blocks(*distances.shape):
        first = rows.start if own else None
        distances[rows] = _squares(x[rows], y) if squared else roots_of_squares(x[rows], y, first)
    return distances.clamp_(max=torch.finfo(x.dtype).max)


def roots_of_squares(x: Tensor, y: Tensor, diagonal: int | None = None) -> Tensor:
    """Distances, of matrices or batches of them, right wherever their squares may lie."""
    roots = _squares(x, y).sqrt_()
    for beyond, scale in _beyond(roots, diagonal):
        roots = torch.where(beyond, _squares(x, y, scale).sqrt_().div_(scale), roots)
    return roots


def _beyond(roots: Tensor, diagonal: int | None) -> Iterator[tuple[Tensor, float]]:
    """Where squares were too large or too small, with the scale on which they are not."""
    limits = torch.finfo(roots.dtype)
    scale = 2.0 ** int(0.78 * math.log2(limits.max))
    large, small = roots == torch.inf, roots < math.sqrt(limits.tiny / limits.eps)
    if diagonal is not None:
        small.diagonal(diagonal).fill_(False)
    return ((where, by) for where, by in ((large, 1 / scale), (small, scale)) if where.any())


def _squares(x: Tensor, y: Tensor, scale: float = 1.0) -> Tensor:
    """Squared distances on a scale."""
    squares = x.new_zeros(*x.shape[:-1], y.shape[-2])
    for of_x, of_y in zip(x.unbind(-1), y.unbind(-1), strict=True):
        difference = of_x[..., :, None] - of_y[..., None, :]
        difference = difference if scale == 1.0 else difference.mul_(scale)
        squares.addcmul_(difference, difference)
    return squares
