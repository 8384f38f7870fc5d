"""In which precision to compute: the widest that a device has, whatever autocast says."""

from __future__ import annotations

import contextlib
import math

import torch
from torch import Tensor


def widest(device: torch.device) -> torch.dtype:
    """Give float64, or float32 on a device without it (Apple's MPS).

    The device is asked each time, which costs a microsecond, so that nothing has to be known of it.
    """
    try:
        return torch.zeros((), dtype=torch.float64, device=device).dtype
    except (TypeError, RuntimeError):
        return torch.float32


def no_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """Make matrix products keep the precision of what they are given, inside an autocast too."""
    kind = device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return contextlib.nullcontext()
    return torch.autocast(kind, enabled=False)


def rounding_of_products(dtype: torch.dtype) -> float:
    """Give the part by which a matrix product may change products in rounding what is given."""
    try:
        setting = torch.get_float32_matmul_precision() if dtype == torch.float32 else "highest"
    except RuntimeError:  # set for some backends alone
        setting = "medium"
    # TensorFloat32 may cut both factors to 10 bits after the first, bfloat16 to 7.
    return {"highest": 0.0, "high": 2.0**-9, "medium": 2.0**-6}[setting]


def at_least_float32(x: Tensor) -> Tensor:
    """Widen float16 and bfloat16, with a gradient that stays within their range."""
    kind = torch.promote_types(x.dtype, torch.float32)
    return x if x.dtype == kind else within(x, kind)


def within(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Change to a type; what is too large for it becomes its largest finite number.

    So does, on the way back, a gradient too large for the type of `x`; the bound itself has no
    gradient of its own. Of a tensor that is used twice the result should be, so that autograd adds
    in the wider type.
    """
    return _Within.apply(x, dtype)


class _Within(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.dtype = x.dtype
        return _bounded(x, dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return _bounded(grad, ctx.dtype), None


def _bounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    largest = min(torch.finfo(dtype).max, torch.finfo(x.dtype).max)
    return x.clamp(-largest, largest).to(dtype)


def power_of_two(x: Tensor, dim: int | tuple[int, ...] = ()) -> Tensor:
    """Give one not far below the largest size along `dim`, by which to divide before squaring."""
    largest = x.detach().abs().amax(dim, keepdim=True) if x.numel() else x.new_ones(())
    least = math.log2(torch.finfo(x.dtype).tiny)
    return (largest.log2().floor() - 1).clamp(min=least).exp2()


def room_to_add(x: Tensor, dtype: torch.dtype, margin: float = 0.0) -> float:
    """Give a power of two, times which 2^64 of such numbers, or margins, add up within `dtype`."""
    ceiling = torch.finfo(dtype).max / 2**64
    if torch.finfo(x.dtype).max < ceiling or not x.numel():
        return 1.0
    return 1.0 if max(x.max().item(), margin) < ceiling else 2.0**-65
