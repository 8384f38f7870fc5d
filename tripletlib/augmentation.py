"""Small random changes to training images that leave their class as it is."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from tripletlib._precision import at_least_float32, no_autocast
from tripletlib._validation import check_images

_DEGREES, _PIXELS, _STRETCH = 15.0, 2.0, 0.15


def jitter(images: Tensor) -> Tensor:
    """Turn, move and stretch each image a little, by its own random amounts.

    By up to 15 degrees either way, 2 pixels and 15 % along each axis, drawn uniformly from
    torch's global generator. (``torchvision.transforms.v2.RandomAffine`` would draw once for the
    whole batch.)

    Parameters
    ----------
    images : Tensor, floating point, shape (n, channels, height, width)
        What comes in from outside repeats the pixels of the border.

    Returns
    -------
    Tensor, shape (n, channels, height, width)

    Raises
    ------
    TypeError, ValueError
        If images is not a floating-point tensor of that shape.
    """
    check_images(images)
    if images.dim() != 4:
        raise ValueError(
            f"images must have shape (n, channels, height, width), got {tuple(images.shape)}"
        )
    height, width = images.shape[2:]
    wide = at_least_float32(images)  # coordinates need it
    draw = 2 * torch.rand(5, len(images), dtype=wide.dtype, device=images.device) - 1
    angle = draw[0] * math.radians(_DEGREES)
    stretch_x, stretch_y = 1 + _STRETCH * draw[1], 1 + _STRETCH * draw[2]
    move_x, move_y = 2 * _PIXELS / width * draw[3], 2 * _PIXELS / height * draw[4]
    # Coordinates run from -1 to 1 along either axis, so a turn has to know the image's shape.
    aspect = height / width
    rows = [
        torch.stack([stretch_x * angle.cos(), -stretch_y * angle.sin() * aspect, move_x], dim=1),
        torch.stack([stretch_x * angle.sin() / aspect, stretch_y * angle.cos(), move_y], dim=1),
    ]
    with no_autocast(images.device):
        grid = F.affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)
        moved = F.grid_sample(wide, grid, padding_mode="border", align_corners=False)
    return moved.to(images.dtype)
