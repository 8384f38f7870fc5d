"""Euclidean distances that are right for close points, coincident points and extreme ones."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tripletlib._validation import check_points

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
        check_points(y, "y")
        if (y.shape[1], y.dtype, y.device) != (x.shape[1], x.dtype, x.device):
            raise ValueError(
                f"y must match x in columns, dtype and device: ({x.shape[1]}, {x.dtype}, "
                f"{x.device}), got ({y.shape[1]}, {y.dtype}, {y.device})"
            )
    return distances_of(x, y, squared=squared)


def distances_of(x: Tensor, y: Tensor | None = None, *, squared: bool = False) -> Tensor:
    """`pairwise_distances` of arguments that were checked before."""
    if x.dtype in (torch.float16, torch.bfloat16):
        x, y = x.float(), None if y is None else y.float()
    if x.dtype == torch.float32 and x.shape[0] and (y is None or y.shape[0]):
        by_product = _by_product(x.detach(), None if y is None else y.detach(), squared)
        if by_product is not None:
            return _Distances.apply(x, x if y is None else y, [by_product], squared)
    if x.dtype == torch.float64 and squared:
        other = x if y is None else y
        return _Distances.apply(x, other, [_squares(x.detach(), other.detach())], True)
    return _by_difference(x, y, squared)


def norm_of_rows(*pairs: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Euclidean distance, in float64, between the matching rows of each pair of matrices."""
    scale = _size(*(t for pair in pairs for t in pair))
    ceiling = torch.finfo(torch.float64).max / 4
    return [
        torch.linalg.vector_norm(a.double() / scale - b.double() / scale, dim=1)
        .mul(scale)
        .clamp(max=ceiling)
        for a, b in pairs
    ]


def _size(*tensors: Tensor) -> Tensor:
    """Find the power of two below the largest coordinate, by which to divide before squaring."""
    sizes = [t.detach().abs().max().double() for t in tensors if t.numel()]
    if not sizes:
        return tensors[0].new_ones((), dtype=torch.float64)
    exponent = torch.stack(sizes).max().frexp().exponent
    return torch.ldexp(torch.ones_like(sizes[0]), exponent - 1)


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


def _by_product(x: Tensor, y: Tensor | None, squared: bool) -> Tensor | None:
    """Float32 distances from one float64 matrix product, or None where points are too close.

    Points that coincide are no harm: their distance is known.
    """
    a, b = _centred(x, x if y is None else y)
    a_norms = a.square().sum(dim=1)
    b_norms = b.square().sum(dim=1)
    close = _CLOSE * (a_norms.max() + b_norms.max())
    distances = x.new_empty(len(a), len(b))
    for rows in blocks(*distances.shape):
        block = torch.addmm(b_norms, a[rows], b.T, alpha=-2).add_(a_norms[rows, None])
        itself = block.diagonal(rows.start) if y is None else block[:0]
        itself.fill_(torch.inf)
        if block.amin() < close:
            i, j = (block < close).nonzero(as_tuple=True)
            few = len(i) <= _CLOSE_PAIRS * len(block)
            if not few or (a[rows][i] != b[j]).any():
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


class _Distances(torch.autograd.Function):
    """Distances known already, with a gradient of two matrix products."""

    @staticmethod
    def forward(ctx, x: Tensor, y: Tensor, known: list[Tensor], squared: bool) -> Tensor:
        (distances,) = known  # in a list, because an output may not be an input
        ctx.save_for_backward(x, y, *([] if squared else [distances]))
        ctx.own = x is y
        return distances

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        x, y, *distances = ctx.saved_tensors
        known = distances[0] if distances else None
        a, b = _centred(x, y)
        if ctx.own:
            return _pull_back(grad, known, a, a, own=True).to(x.dtype), None, None, None
        known_t = None if known is None else known.T
        for_x, for_y = _pull_back(grad, known, a, b), _pull_back(grad.T, known_t, b, a)
        return for_x.to(x.dtype), for_y.to(x.dtype), None, None


def _pull_back(
    grad: Tensor, distances: Tensor | None, a: Tensor, b: Tensor, *, own: bool = False
) -> Tensor:
    """Gradient by `a` from that by its (if not given, squared) distances to `b`, in float64.

    These sums cancel where points are much closer than the cloud is wide, and dividing by a small
    distance then magnifies what is left; float32 would not do.
    """
    out = torch.empty_like(a)
    for rows in blocks(*grad.shape):
        block = (grad[rows] + grad[:, rows].T if own else grad[rows]).double()
        if distances is not None:
            block = block.div(distances[rows]).masked_fill_(distances[rows] == 0, 0.0)
        out[rows] = (block.sum(dim=1, keepdim=True) * a[rows]).addmm_(block, b, alpha=-1)
    out = out.mul_(2) if distances is None else out
    largest = torch.finfo(grad.dtype).max
    return out.nan_to_num_(0.0, largest, -largest).clamp_(-largest, largest)


def _by_difference(x: Tensor, y: Tensor | None, squared: bool) -> Tensor:
    """Distances from differences of coordinates: slower, and exact however close the points."""
    a, b = x.double(), (x if y is None else y).double()
    scale = _size(a, b)
    unit = torch.cdist(a / scale, b / scale, compute_mode="donot_use_mm_for_euclid_dist")
    distances = (unit * scale).clamp(max=torch.finfo(torch.float64).max)
    distances = distances.square() if squared else distances
    return distances.clamp(max=torch.finfo(x.dtype).max).to(x.dtype)


def _squares(x: Tensor, y: Tensor) -> Tensor:
    """Squared distances in float64, not by way of a root, whose rounding would break ties."""
    scale = _size(x, y)
    a, b = x / scale, y / scale
    squares = x.new_zeros(len(a), len(b))
    for rows in blocks(*squares.shape):
        for of_a, of_b in zip(a[rows].T, b.T, strict=True):
            difference = of_a[:, None] - of_b
            squares[rows].addcmul_(difference, difference)
    return squares.mul_(scale).mul_(scale).clamp_(max=torch.finfo(x.dtype).max)
