"""Images from files of any kind."""

from __future__ import annotations

import os

import numpy as np
import torch
from PIL import Image, ImageOps, ImageStat
from torch import Tensor

from tripletlib._validation import check_count
from tripletlib.data.mnist import PIXEL_STATISTICS


def load_image(path: str | os.PathLike, size: int = 28) -> Tensor:
    """Read an image file as the networks of Fashion-MNIST want it: grey, square, bright on black.

    The image is turned upright as its camera noted, made grey, turned into its negative if its
    background is bright, scaled until its longer side fits, padded to a square with the colour of
    its background, and standardised like `load_fashion_mnist`. The background is the median of the
    pixels along the border. Transparent parts become black or white, whichever is farther from what
    is to be seen. It is not cropped: do that first if the product does not fill the image.

    Parameters
    ----------
    path : path
        A file of any kind, size and colour that Pillow reads; of an animation, the first image.
        ``~`` is the home folder.
    size : int, default 28
        Height and width of the result.

    Returns
    -------
    Tensor, float32, shape (1, 1, size, size)
        A test image of Fashion-MNIST that was saved as a PNG comes back as it is in
        `load_fashion_mnist`.

    Raises
    ------
    OSError
        If the file is not there or may not be read.
    ValueError
        If it is not an image, is damaged or has too many pixels to open safely (Pillow's limit,
        ``PIL.Image.MAX_IMAGE_PIXELS``); the message names the file. Also if size is not a whole
        number of at least 1.

    Examples
    --------
    A wide drawing on transparent ground becomes a square one, bright on black:

    >>> from PIL import Image, ImageDraw
    >>> boot = Image.new("RGBA", (320, 230))
    >>> ImageDraw.Draw(boot).polygon([(170, 10), (295, 10), (300, 190), (15, 190)], fill="brown")
    >>> boot.save("boot.png")
    >>> load_image("boot.png").shape
    torch.Size([1, 1, 28, 28])

    A download that broke off is no image:

    >>> from pathlib import Path
    >>> _ = Path("cut.png").write_bytes(Path("boot.png").read_bytes()[:200])
    >>> load_image("cut.png")
    Traceback (most recent call last):
    ValueError: cut.png is not an image, or it is damaged
    """
    check_count(size, "size")
    try:
        with Image.open(os.path.expanduser(path)) as file:
            grey = _grey(ImageOps.exif_transpose(file))
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path} has too many pixels to open safely ({error})") from error
    except Exception as error:  # Pillow's readers raise nearly anything on a damaged file
        if isinstance(error, MemoryError) or getattr(error, "errno", None) is not None:
            raise  # it is not the file's content
        raise ValueError(f"{path} is not an image, or it is damaged") from error
    background = float(np.median(_border(np.asarray(grey))))
    shrink = size / max(grey.size)
    sides = tuple(max(1, round(side * shrink)) for side in grey.size)
    square = Image.new("F", (size, size), background)
    corner = tuple((size - side) // 2 for side in sides)
    square.paste(grey.convert("F").resize(sides, Image.Resampling.LANCZOS), corner)
    pixels = torch.from_numpy(np.array(square)).clamp(0, 255)
    mean, deviation = PIXEL_STATISTICS["FashionMNIST"]
    pixels = 255 - pixels if background > 127 else pixels
    return pixels.sub(mean).div(deviation)[None, None]


def _grey(image: Image.Image) -> Image.Image:
    """Return an image of one channel whose values run from 0 to 255."""
    if image.mode.startswith("I"):  # 16 bits
        return Image.fromarray(np.asarray(image, np.float32) / 257)
    if image.mode == "F":  # any range
        values = np.asarray(image)
        low, high = values.min(), values.max()
        if not np.isfinite([low, high]).all():
            raise ValueError("pixels must be finite")
        return Image.fromarray((values - low) * (255 / max(high - low, np.float32(1e-12))))
    if not (image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info):
        return image.convert("RGB").convert("L")
    image = image.convert("RGBA")
    grey, alpha = image.convert("L"), image.getchannel("A")
    seen = ImageStat.Stat(grey, alpha)
    dark = seen.count[0] == 0 or seen.mean[0] < 128
    return Image.composite(grey, Image.new("L", image.size, 255 if dark else 0), alpha)


def _border(pixels: np.ndarray) -> np.ndarray:
    return np.concatenate([pixels[[0, -1]].ravel(), pixels[1:-1, [0, -1]].ravel()])
