"""The checks that public functions make of their arguments, each with one wording; warnings."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Iterable
from numbers import Integral, Real

import torch
from torch import Tensor


def check_points(points: Tensor, name: str = "embeddings") -> None:
    """Refuse anything but a finite floating-point matrix, one row a sample."""
    if not isinstance(points, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(points).__name__}")
    if points.dim() != 2:
        raise ValueError(f"{name} must have shape (n, d), got {tuple(points.shape)}")
    if not points.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {points.dtype}")
    # A finite sum has finite terms, and is quick to see. A sum may overflow, so then look closely.
    if not math.isfinite(points.detach().sum()) and not torch.isfinite(points).all():
        row = int((~torch.isfinite(points)).any(dim=1).nonzero()[0])
        raise ValueError(f"{name} must be finite, got NaN or infinity in row {row}")


def check_match(points: Tensor, others: Tensor, name: str, others_name: str) -> None:
    """Refuse `points` that cannot be compared, row by row, with checked `others`."""
    check_points(points, name)
    wanted, got = ((p.shape[1], p.dtype, p.device) for p in (others, points))
    if got != wanted:
        raise ValueError(
            f"{name} must match {others_name} in columns, dtype and device: "
            f"({', '.join(map(str, wanted))}), got ({', '.join(map(str, got))})"
        )


def check_labels(
    labels: Tensor, length: int | None = None, name: str = "labels", of: str = "embeddings"
) -> None:
    """Refuse anything but one integer label for each of `length` samples, or of any number."""
    if not isinstance(labels, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(labels).__name__}")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"{name} must be integers, got {labels.dtype}")
    if length is None and labels.dim() != 1:
        raise ValueError(f"{name} must have shape (n,), got {tuple(labels.shape)}")
    if length is not None and labels.shape != (length,):
        raise ValueError(
            f"{name} must have shape ({length},), one for each row of {of}, "
            f"got {tuple(labels.shape)}"
        )


def check_images(images: Tensor, name: str = "images") -> None:
    """Refuse anything but a floating-point tensor of at least one image."""
    if not isinstance(images, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(images).__name__}")
    if not images.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {images.dtype}")
    if images.dim() < 2 or len(images) == 0:
        raise ValueError(f"{name} must hold at least one image, got shape {tuple(images.shape)}")


def check_choice(value: str, choices: Iterable[str], name: str) -> None:
    """Refuse a word that is not among the choices, and list them."""
    choices = tuple(choices)
    if value not in choices:
        listed = ", ".join(map(repr, choices))
        raise ValueError(f"{name} must be one of {listed}, got {value!r}")


def check_number(value: float, name: str, *, low: float = 0.0, strict: bool = False) -> None:
    """Refuse anything but a finite real number of at least (or, if strict, above) `low`."""
    try:
        good = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer beyond the range of float
        good = False
    if not good or (value <= low if strict else value < low):
        relation = "above" if strict else "of at least"
        raise ValueError(f"{name} must be a finite number {relation} {low:g}, got {value!r}")


def check_count(value: int, name: str, *, low: int = 1) -> None:
    """Refuse anything but a whole number of at least `low`."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < low:
        raise ValueError(f"{name} must be a whole number of at least {low}, got {value!r}")


def warn(message: str) -> None:
    """Warn, with the line outside this package (and a context manager's frame) that led here."""
    level, frame = 1, sys._getframe()
    inside = ("tripletlib", "contextlib")
    while frame.f_back and frame.f_globals["__name__"].partition(".")[0] in inside:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
