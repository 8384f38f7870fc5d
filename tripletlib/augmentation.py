"""Small random changes to training images that leave their class as it is."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from tripletlib._precision import at_least_float32, no_autocast
from tripletlib._validation import check_images

_DEGREES, _PIXELS, _STRETCH = 15.0, 2.0, 0.15
_EXCHANGED, _GREY, _BOLDNESS = 0.5, 0.2, 0.4


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
    _check_shape(images)
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


def jitter_colours(images: Tensor) -> Tensor:
    """Exchange the colours of each image, take them away, and make it bolder or fainter.

    What differs from white, or more exactly from the brightest value of each channel in the image,
    is changed: in half of the images the channels are exchanged at random, in a fifth each becomes
    the channels' mean, and in all it is multiplied by a number from 0.6 to 1.4. All is drawn
    uniformly from torch's global generator, by each image's own chance.

    Parameters
    ----------
    images : Tensor, floating point, shape (n, channels, height, width)
        Standardised or not. With one channel only the last of the three is seen.

    Returns
    -------
    Tensor, shape (n, channels, height, width)

    Raises
    ------
    TypeError, ValueError
        If images is not a floating-point tensor of that shape.
    """
    _check_shape(images)
    wide = at_least_float32(images)
    brightest = wide.amax(dim=(2, 3), keepdim=True)
    ink = brightest - wide
    draw = torch.rand(3, len(images), 1, 1, 1, dtype=wide.dtype, device=wide.device)
    order = torch.rand(ink.shape[:2], device=wide.device).argsort(dim=1)
    exchanged = ink.gather(1, order[:, :, None, None].expand_as(ink))
    ink = torch.where(draw[0] < _EXCHANGED, exchanged, ink)
    ink = torch.where(draw[1] < _GREY, ink.mean(dim=1, keepdim=True), ink)
    return (brightest - ink * (1 + _BOLDNESS * (2 * draw[2] - 1))).to(images.dtype)


def _check_shape(images: Tensor) -> None:
    check_images(images)
    if images.dim() != 4:
        raise ValueError(
            f"images must have shape (n, channels, height, width), got {tuple(images.shape)}"
        )
