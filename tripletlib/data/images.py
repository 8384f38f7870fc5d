"""Images from files of any kind: one of them, or a folder."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps, ImageStat, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from tripletlib._validation import check_choice, check_count
from tripletlib.data.mnist import PIXEL_STATISTICS

# Also what Pillow may have no reader for: better an error than photographs left out in silence.
_ENDINGS = (
    *(".avif", ".bmp", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg"),
    *(".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"),
)
_CHECKED_AT_ONCE = 4  # files whose pixels are in memory together


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
    ValueError: cut.png is not an image, or it is damaged (image file is truncated)
    """
    check_count(size, "size")
    grey = _read(path, _grey)
    background = float(np.median(_border(np.asarray(grey))))
    sides = _sides_within(size, grey)
    square = Image.new("F", (size, size), background)
    corner = tuple((size - side) // 2 for side in sides)
    square.paste(grey.convert("F").resize(sides, Image.Resampling.LANCZOS), corner)
    pixels = torch.from_numpy(np.array(square)).clamp(0, 255)
    mean, deviation = PIXEL_STATISTICS["FashionMNIST"]
    pixels = 255 - pixels if background > 127 else pixels
    return pixels.sub(mean).div(deviation)[None, None]


class ImageFolderDataset(Dataset):
    """The images of a folder, each read from its file when it is asked for.

    Every file in the folder and below whose name ends as those of images do is one, whatever its
    size and colours, but for hidden ones (names that begin with a dot). If the images lie in
    subfolders, these are the classes; one without a readable image is none. An image is turned
    upright as its camera noted and made RGB or grey, transparent parts white.

    Parameters
    ----------
    folder : path
        Where the images are. ``~`` is the home folder.
    size : int, default 64
        Height and width that an image is brought to: scaled until its longer side fits, and padded
        to a square with the median colour of its border.
    mode : {"RGB", "L"}, default "RGB"
        Three channels, or one: grey.
    transform : callable, optional
        Takes an upright ``PIL.Image`` of that mode and returns a floating-point tensor of shape
        (channels, height, width), in place of the scaling to `size`: one of torchvision's, or the
        ``weights.transforms()`` of a pretrained network.
    labelled : bool, optional
        Whether the subfolders are classes. By default they are if there are any with images, and it
        is an error if other images lie beside them. With False, all images have no label: to be
        embedded and searched.
    damaged : {"raise", "skip"}, default "raise"
        What to do with files that cannot be read: raise an error when one is asked for, or leave
        them out. To find them, "skip" reads every file once, at the beginning.
    progress : bool, default True
        Show a bar while files are checked, if that takes more than a second.

    Attributes
    ----------
    files : list of pathlib.Path
        Of each image, in the order of their names.
    names : list of str
        Their paths from the folder on, with forward slashes on every system: ids for `SearchIndex`.
    targets : list of int, or None
        The label of each, a place in `classes`; None without labels.
    classes : list of str
        The names of the subfolders, sorted as Python sorts, capitals first.
    left_out : list of (str, str)
        Names of the damaged files that were skipped, and what is wrong with each.

    Raises
    ------
    FileNotFoundError, NotADirectoryError
        If the folder is not there.
    TypeError, ValueError
        If an argument is of the wrong type or range, the folder holds no images, or some beside
        those in subfolders. Also when an item is asked for whose file is damaged or is no image;
        the message names it.

    Notes
    -----
    Of a JPEG much larger than `size`, only as many pixels are decoded as make about twice the size,
    which saves most of the time. Whole numbers of more than 8 bits are taken to run to 65 535:
    those of a 12-bit scan come out dark, and want a `transform`. HEIC, as iPhones write it, is read
    where the package pillow-heif is installed.

    Examples
    --------
    >>> from PIL import Image
    >>> from pathlib import Path
    >>> for name in ("cats/tom.png", "cats/felix.png", "dogs/rex.png"):
    ...     Path("pets", name).parent.mkdir(parents=True, exist_ok=True)
    ...     Image.new("RGB", (40, 30), "brown").save(Path("pets", name))
    >>> pets = ImageFolderDataset("pets", size=32)
    >>> pets.names, pets.targets, pets.classes
    (['cats/felix.png', 'cats/tom.png', 'dogs/rex.png'], [0, 0, 1], ['cats', 'dogs'])
    >>> image, label = pets[2]
    >>> image.shape, label
    (torch.Size([3, 32, 32]), 1)
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        size: int = 64,
        *,
        mode: Literal["RGB", "L"] = "RGB",
        transform: Callable[[Image.Image], Tensor] | None = None,
        labelled: bool | None = None,
        damaged: Literal["raise", "skip"] = "raise",
        progress: bool = True,
    ) -> None:
        check_count(size, "size")
        check_choice(mode, ("RGB", "L"), "mode")
        check_choice(damaged, ("raise", "skip"), "damaged")
        if not callable(transform) and transform is not None:
            raise TypeError(f"transform must be callable, got {transform!r}")
        if labelled not in (None, True, False):
            raise TypeError(f"labelled must be True, False or None, got {labelled!r}")
        self.folder = Path(os.path.expanduser(folder))
        self.size, self.mode, self.transform = int(size), mode, transform
        self.names = _images_below(self.folder)
        self.left_out: list[tuple[str, str]] = []
        if damaged == "skip":
            self._leave_out_damaged(progress=progress)
        if not self.names:
            left = f", only {len(self.left_out)} damaged ones" if self.left_out else ""
            raise ValueError(f"folder must hold images, got {self.folder} without any{left}")
        self.files = [self.folder / name for name in self.names]
        self.classes, self.targets = _classes_of(self.names, labelled)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, place: int) -> Tensor | tuple[Tensor, int]:
        """Read an image, and give it with its label if there are labels."""
        image = self.read(self.files[place])
        return image if self.targets is None else (image, self.targets[place])

    def __repr__(self) -> str:
        labels = f" of {len(self.classes)} classes" if self.classes else ""
        return f"ImageFolderDataset of {len(self)} images{labels} in {self.folder}"

    def read(self, image: str | os.PathLike | Image.Image) -> Tensor:
        """Make of any image what an item of this data set is, for a query, say.

        Parameters
        ----------
        image : path or PIL.Image
            A file, wherever it lies, or an image already in memory.

        Returns
        -------
        Tensor, float32, shape (channels, size, size)
            With values from 0 to 1; with a `transform`, what that gives.

        Raises
        ------
        OSError
            If the file is not there or may not be read.
        TypeError, ValueError
            If it is neither path nor image; if the file is no image, is damaged or has too many
            pixels to open safely.
        """
        if not isinstance(image, (str, os.PathLike, Image.Image)):
            raise TypeError(f"image must be a path or a PIL.Image, got {type(image).__name__}")
        if isinstance(image, Image.Image):
            upright = _coloured(ImageOps.exif_transpose(image), self.mode)
        else:
            upright = self._read_upright(image)
        return _square(upright, self.size) if self.transform is None else self.transform(upright)

    def _read_upright(self, path: str | os.PathLike) -> Image.Image:
        least = 2 * self.size if self.transform is None else None
        return _read(path, lambda file: _coloured(file, self.mode), least)

    def _leave_out_damaged(self, *, progress: bool) -> None:
        def wrong_with(name: str) -> str | None:
            try:
                self._read_upright(self.folder / name)
            except (OSError, ValueError) as error:
                return str(error)
            return None

        with ThreadPoolExecutor(_CHECKED_AT_ONCE) as pool:
            found = pool.map(wrong_with, self.names)
            bar = tqdm(found, "checking files", len(self.names), disable=not progress, delay=1)
            found = list(bar)
        pairs = list(zip(self.names, found, strict=True))
        self.left_out = [(name, wrong) for name, wrong in pairs if wrong is not None]
        self.names = [name for name, wrong in pairs if wrong is None]


def _images_below(folder: Path) -> list[str]:
    """List the image files of a folder by their paths from there on, in order."""
    if not folder.is_dir():
        os.stat(folder)  # says that it is not there
        raise NotADirectoryError(f"folder must be a folder, got the file {folder}")
    names = []
    for place, inner, files in os.walk(folder, followlinks=True):
        inner[:] = [
            name
            for name in inner
            if not (name.startswith(".") or _leads_back(os.path.join(place, name)))
        ]
        names += [
            Path(place, name).relative_to(folder).as_posix()
            for name in files
            if not name.startswith(".") and name.lower().endswith(_ENDINGS)
        ]
    return sorted(names)


def _leads_back(path: str) -> bool:
    """Whether a folder is a link to one that it lies in."""
    lies_in = Path(os.path.realpath(os.path.dirname(path)))
    return os.path.islink(path) and lies_in.is_relative_to(os.path.realpath(path))


def _classes_of(names: list[str], labelled: bool | None) -> tuple[list[str], list[int] | None]:
    """Find the classes of images, and the label of each, or that there are none."""
    tops = [name.split("/")[0] if "/" in name else None for name in names]
    if labelled is False or (labelled is None and not any(tops)):
        return [], None
    if None in tops:
        raise ValueError(
            f"folder must hold images in subfolders only, got {names[tops.index(None)]} beside "
            "them; with labelled=False they are images without labels"
        )
    classes = sorted(set(tops))
    place = {name: label for label, name in enumerate(classes)}
    return classes, [place[name] for name in tops]


def _read(
    path: str | os.PathLike, take: Callable[[Image.Image], object], least: int | None = None
) -> object:
    """Open a file, and give what is taken of the upright image; `least` pixels a side will do."""
    if os.fspath(path).lower().endswith((".heic", ".heif")):
        try:
            import pillow_heif
        except ImportError as error:
            raise ValueError(
                f"{path} cannot be read without pillow-heif (pip install it)"
            ) from error
        pillow_heif.register_heif_opener()
    try:
        with Image.open(os.path.expanduser(path)) as file:
            if least is not None:
                file.draft(None, (least, least))
            return take(ImageOps.exif_transpose(file))
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path} has too many pixels to open safely ({error})") from error
    except Exception as error:  # Pillow's readers raise nearly anything on a damaged file
        if isinstance(error, MemoryError) or getattr(error, "errno", None) is not None:
            raise  # it is not the file's content
        says_more = not isinstance(error, UnidentifiedImageError)
        reason = f" ({str(error) or type(error).__name__})" if says_more else ""
        raise ValueError(f"{path} is not an image, or it is damaged{reason}") from error


def _coloured(image: Image.Image, mode: str) -> Image.Image:
    """Make an image RGB or grey with values from 0 to 255, its transparent parts white."""
    if image.mode.startswith("I") or image.mode == "F":
        grey = _grey(image).convert("F").point(lambda value: value + 0.5)  # "L" cuts off
        return grey.convert("L").convert(mode)
    if _may_be_transparent(image):
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB").convert(mode)


def _sides_within(size: int, image: Image.Image) -> tuple[int, int]:
    """Width and height of an image scaled until its longer side is `size`."""
    shrink = size / max(image.size)
    return tuple(max(1, round(side * shrink)) for side in image.size)


def _square(image: Image.Image, size: int) -> Tensor:
    """Scale an image until its longer side fits, and pad it to a square; values from 0 to 1."""
    sides = _sides_within(size, image)
    image = image.resize(sides, Image.Resampling.LANCZOS)
    pixels = np.asarray(image).reshape(sides[1], sides[0], -1)
    background = np.median(_border(pixels), axis=0).astype(np.uint8)
    square = np.tile(background, (size, size, 1))
    top, left = (size - sides[1]) // 2, (size - sides[0]) // 2
    square[top : top + sides[1], left : left + sides[0]] = pixels
    return torch.from_numpy(square).permute(2, 0, 1).to(torch.float32).div(255)


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
    if not _may_be_transparent(image):
        return image.convert("RGB").convert("L")
    image = image.convert("RGBA")
    grey, alpha = image.convert("L"), image.getchannel("A")
    seen = ImageStat.Stat(grey, alpha)
    dark = seen.count[0] == 0 or seen.mean[0] < 128
    return Image.composite(grey, Image.new("L", image.size, 255 if dark else 0), alpha)


def _may_be_transparent(image: Image.Image) -> bool:
    return image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info


def _border(pixels: np.ndarray) -> np.ndarray:
    """Give the pixels along the border, of shape (n, ...), from those of shape (h, w, ...)."""
    return np.concatenate([pixels[0], pixels[-1], pixels[1:-1, 0], pixels[1:-1, -1]])
