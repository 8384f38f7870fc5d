"""A map of embeddings to move about in, with the image and the neighbours of each point.

Its script is our own because no library's fits. A map is to take less than 1 MB with 5 000 images,
without a network, in JupyterLab as on a web page. Of scripts alone, Bokeh 3.9's takes 1.3 MB,
jupyter-scatter 1.0's 2.1 (and its widget a kernel), Plotly 7.1's 4.8, and ours 0.02.
"""

from __future__ import annotations

import base64
import html
import io
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from tripletlib._validation import check_count, check_labels, check_points
from tripletlib.neighbours import Search, check_k
from tripletlib.plotting import PALETTE, points_on_plane, scatter_classes, shown_pixels

_LARGEST_SHEET = 16_383  # the longest side of a WebP picture, in pixels
_GREYS = 16  # shades of a grey thumbnail
_QUALITY = 50  # of a coloured thumbnail, in WebP's measure from 0 to 100


@dataclass(frozen=True, repr=False)
class Explorer:
    """A map that a notebook shows; see `explore`.

    Attributes
    ----------
    html : str
        The map, its script and its data, to stand inside a page.
    png : bytes
        A still picture of it, for where no scripts run.
    title : str
        What it shows, in words.
    """

    html: str
    png: bytes
    title: str

    def save(self, path: str | os.PathLike) -> None:
        """Write the map to a file as a page of its own, which any browser opens."""
        page = (
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{html.escape(self.title)}</title>\n</head>\n<body>\n<main>\n"
            f"{self.html}\n</main>\n</body>\n</html>\n"
        )
        Path(path).write_text(page, encoding="utf-8")

    def __repr__(self) -> str:
        return f"<{self.title}>"

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict[str, str]:
        picture = base64.b64encode(self.png).decode()
        return {"text/html": self.html, "image/png": picture, "text/plain": repr(self)}


def explore(
    points: Tensor | np.ndarray,
    images: Tensor,
    labels: Tensor,
    *,
    embeddings: Tensor | None = None,
    k: int = 8,
    names: Sequence[str] | None = None,
    thumbnail: int = 28,
) -> Explorer:
    """Make a map of embeddings to move about in: point at an image to see it and what is near it.

    As the last value of a notebook's cell it is shown there. One drags and zooms it, picks classes
    from a list, and follows lines from an image to its neighbours, by mouse, finger or keys. It is
    one piece of HTML, so it also stands on a web page, and needs no network and no kernel. Where
    scripts do not run there is a still picture.

    Parameters
    ----------
    points : Tensor or array, shape (n, 2)
        Where to draw each image, as t-SNE or a projection has it.
    images : Tensor, shape (n, channels, height, width)
        Of one channel or three, shown as `tripletlib.plotting.show_images` does: each channel from
        its lowest value to its highest, and grey ones dark on light.
    labels : Tensor of integers, shape (n,)
        The class of each.
    embeddings : Tensor, floating point, shape (n, d), optional
        In what to look for neighbours, by Euclidean distance; by default in `points`.
    k : int, default 8
        Neighbours of each image.
    names : sequence of str, optional
        What to call class c; by default its number.
    thumbnail : int, default 28
        The longer side of an image in pixels; larger images are made smaller.

    Returns
    -------
    Explorer
        With ``save(path)`` for a page of its own.

    Raises
    ------
    TypeError, ValueError
        If an argument has the wrong type or shape, or holds NaN or infinity, or if so many images
        do not fit into one picture.

    Notes
    -----
    All images are packed into one picture: grey ones in 16 shades, coloured ones with some loss.
    5 000 digits of MNIST make 0.9 MB of HTML, and it grows as n does.
    """
    points, pixels = points_on_plane(points), shown_pixels(images)
    check_labels(labels, len(points), of="points")
    if len(pixels) != len(points):
        raise ValueError(f"images must be one for each of {len(points)} points, got {len(pixels)}")
    if not torch.isfinite(pixels).all():
        raise ValueError("images must be finite, got NaN or infinity")
    if embeddings is not None:
        check_points(embeddings)
        if len(embeddings) != len(points):
            raise ValueError(
                f"embeddings must have one row for each of {len(points)} points, "
                f"got {len(embeddings)}"
            )
    check_k(k, len(points) - 1)
    check_count(thumbnail, "thumbnail")
    classes, places = labels.cpu().unique(return_inverse=True)
    if names is not None and not 0 <= classes[0] <= classes[-1] < len(names):
        wanted = f"from {min(0, int(classes[0]))} to {int(classes[-1])}"
        raise ValueError(f"names must hold one for each label {wanted}, got {len(names)}")

    space = points if embeddings is None else embeddings
    found = [rows for _, rows in Search(space).nearest(space, int(k), within=True)]
    title = f"Map of {len(points)} images in {len(classes)} classes"
    png = _still(points, labels, names)
    data = {
        "title": title,
        "count": len(points),
        "k": int(k),
        "points": _packed(_in_square(points), np.uint16),
        "labels": _packed(places, np.uint16),
        "classes": [
            {
                "name": str(c) if names is None else str(names[c]),
                "color": mpl.colors.to_hex(PALETTE[c % len(PALETTE)]),
            }
            for c in classes.tolist()
        ],
        "neighbours": _packed(torch.cat(found).cpu(), np.uint32),
        "space": "on the map" if embeddings is None else "by embedding",
        **_sheet(pixels, int(thumbnail)),
        "style": _read("explorer.css"),
    }
    # In a script "<" could end it; JSON has another way to write it.
    written = json.dumps(data).replace("<", "\\u003c")
    page = (
        '<div class="tripletlib-explorer">\n'
        f'<img alt="{title}" src="{_uri("png", png)}" style="max-width: 100%">\n'
        f"<script>\n(() => {{\n{_read('explorer.js')}\n"
        f"explorer(document.currentScript.parentElement, {written});\n}})();\n</script>\n</div>"
    )
    return Explorer(page, png, title)


def _sheet(pixels: Tensor, side: int) -> dict[str, object]:
    """Pack images of shape (n, height, width, channels) into one picture, row by row."""
    count, height, width, channels = pixels.shape
    if max(height, width) > side:
        shape = [max(1, round(of * side / max(height, width))) for of in (height, width)]
        pixels = F.interpolate(pixels.movedim(-1, 1), shape, mode="bilinear", antialias=True)
        pixels = pixels.clamp(0, 1).movedim(1, -1)
        height, width = shape
    # Lossy WebP works in squares of 16 pixels, so that no two images should share one.
    pitch = max(height, width)
    pitch = pitch if channels == 1 else -(-pitch // 16) * 16
    columns = int(np.ceil(np.sqrt(count)))
    rows = -(-count // columns)
    if columns * pitch > _LARGEST_SHEET:
        raise ValueError(
            f"{count} images of {pitch} pixels do not fit into one picture: take fewer, or a "
            "smaller thumbnail"
        )
    top = _GREYS - 1
    shades = ((1 - pixels) * top).round() * (255 / top) if channels == 1 else pixels * 255
    cells = shades.round().byte().numpy()
    wider = ((0, rows * columns - count), (0, pitch - height), (0, pitch - width), (0, 0))
    cells = np.pad(cells, wider, mode="edge").repeat(3 // channels, axis=3)
    cells = cells.reshape(rows, columns, pitch, pitch, 3).swapaxes(1, 2)
    picture = Image.fromarray(cells.reshape(rows * pitch, columns * pitch, 3))
    packed = io.BytesIO()
    picture.save(packed, "WEBP", lossless=channels == 1, quality=_QUALITY)
    return {
        "sheet": _uri("webp", packed.getvalue()),
        "columns": columns,
        "pitch": pitch,
        "height": height,
        "width": width,
    }


def _still(points: Tensor, labels: Tensor, names: Sequence[str] | None) -> bytes:
    """Draw the map once, in so few colours that it stays small."""
    figure = Figure(figsize=(7, 5), dpi=100, layout="constrained")
    ax = scatter_classes(points, labels, ax=figure.subplots(), names=names)
    ax.set(xticks=[], yticks=[], aspect="equal", adjustable="datalim")
    drawn, packed = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png")
    Image.open(drawn).convert("RGB").quantize(64, dither=Image.Dither.NONE).save(
        packed, "PNG", optimize=True
    )
    return packed.getvalue()


def _in_square(points: Tensor) -> Tensor:
    """Shift and scale points to whole numbers from 0 to 65 535, both axes by as much."""
    low, high = points.amin(dim=0), points.amax(dim=0)
    middle, half = low / 2 + high / 2, (high / 2 - low / 2).max()
    if half == 0:
        return torch.full_like(points, 32_768)
    return ((points / 2 - middle / 2) / half * 65_535 + 32_767.5).round().clamp(0, 65_535)


def _packed(numbers: Tensor, kind: type) -> str:
    little = np.dtype(kind).newbyteorder("<")
    return base64.b64encode(numbers.numpy().astype(little).tobytes()).decode()


def _uri(kind: str, picture: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"


def _read(name: str) -> str:
    return files("tripletlib").joinpath(name).read_text(encoding="utf-8")
