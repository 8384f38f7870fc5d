"""The figures that more than one chapter draws, in one theme and one palette."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from torch import Tensor

from tripletlib._validation import check_count, check_labels, check_points
from tripletlib.distances import pairwise_distances
from tripletlib.training import History

PALETTE = sns.color_palette("colorblind", 10)
"""Ten colours that colour-blind readers tell apart; class c is always ``PALETTE[c % 10]``."""

SAME, DIFFERENT = PALETTE[0], PALETTE[3]
"""The colours of pairs of one class and of two classes, and of hits and misses."""


def use_theme() -> None:
    """Set the book's look for all figures that follow, at twice the resolution in a notebook."""
    sns.set_theme(
        context="notebook",
        style="whitegrid",
        palette=PALETTE,
        rc={
            "axes.titlesize": 12,
            "axes.titleweight": "bold",
            "figure.constrained_layout.use": True,
            "figure.figsize": (8, 4),
            "legend.frameon": False,
        },
    )
    try:
        from matplotlib_inline.backend_inline import set_matplotlib_formats
    except ImportError:  # outside Jupyter there is no notebook to draw into
        return
    set_matplotlib_formats("retina")


def shown_pixels(images: Tensor) -> Tensor:
    """Return images as they are shown, in [0, 1] and of shape (n, height, width, channels).

    Each channel goes from its lowest value in all images to its highest.
    """
    good = isinstance(images, Tensor) and images.dim() == 4
    if not good or images.shape[1] not in (1, 3) or images.numel() == 0:
        got = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"images must be a tensor of shape (n, 1 or 3, height, width), got {got}")
    pixels = images.detach().cpu().float().movedim(1, -1)
    low, high = pixels.amin(dim=(0, 1, 2)), pixels.amax(dim=(0, 1, 2))
    return (pixels - low) / (high - low).clamp(min=torch.finfo(torch.float32).tiny)


def points_on_plane(points: Tensor | np.ndarray) -> Tensor:
    """Return points as float64 of shape (n, 2), of whichever type they came; refuse others."""
    points = torch.as_tensor(points) if isinstance(points, np.ndarray) else points
    if isinstance(points, Tensor) and not points.is_complex():
        points = points.detach().cpu().double()  # drawn in it anyway
    check_points(points, "points")
    if points.shape[1] != 2:
        raise ValueError(f"points must have shape (n, 2), got {tuple(points.shape)}")
    return points


def show_images(
    images: Tensor,
    titles: Sequence[str] | None = None,
    *,
    columns: int = 10,
    colors: Sequence | None = None,
    size: float = 0.9,
) -> Figure:
    """Draw images in a grid.

    Parameters
    ----------
    images : Tensor, shape (n, channels, height, width)
        Grey ones, of one channel, are drawn dark on light. Of three channels, red, green and blue,
        each is drawn from its lowest value to its highest. All images are on one scale.
    titles : sequence of str, optional
        A word above each.
    columns : int, default 10
        Images a row.
    colors : sequence of colours, optional
        A frame around each, and its title's colour; None for no frame.
    size : float, default 0.9
        Side of an image in inches.

    Returns
    -------
    Figure
    """
    pixels = shown_pixels(images)
    check_count(columns, "columns")
    columns = int(columns)
    rows = -(-len(images) // columns)
    height = size * (1.28 if titles is not None else 1.08)
    figure, axes = plt.subplots(
        rows, columns, figsize=(size * columns, height * rows), squeeze=False
    )
    for place, ax in enumerate(axes.flat):
        ax.set(xticks=[], yticks=[])
        if place >= len(images):
            ax.axis("off")
            continue
        ax.imshow(pixels[place].squeeze(-1).numpy(), cmap="gray_r", vmin=0, vmax=1)
        color = colors[place] if colors is not None else None
        ax.spines[:].set(visible=color is not None, color=color, linewidth=2.5)
        if titles is not None:
            ax.set_title(titles[place], fontsize=9, fontweight="normal", color=color or "black")
    return figure


def scatter_classes(
    points: Tensor | np.ndarray,
    labels: Tensor,
    *,
    ax: Axes | None = None,
    names: Sequence[str] | None = None,
    size: float = 4,
) -> Axes:
    """Draw points in the plane, coloured by class, each class named at its median.

    Parameters
    ----------
    points : Tensor or array, shape (n, 2)
        Where to draw.
    labels : Tensor of integers, shape (n,)
        The class of each, which chooses its colour.
    ax : Axes, optional
        Where to draw; by default the current axes.
    names : sequence of str, optional
        What to call class c; by default its number.
    size : float, default 4
        Area of a point.

    Returns
    -------
    Axes
    """
    points = points_on_plane(points)
    check_labels(labels, len(points), of="points")
    ax, labels = plt.gca() if ax is None else ax, labels.cpu()
    for label in labels.unique().tolist():
        cluster = points[labels == label]
        color = PALETTE[label % len(PALETTE)]
        ax.scatter(*cluster.T, s=size, color=color, alpha=0.6, linewidths=0, rasterized=True)
        text = ax.annotate(
            str(label) if names is None else names[label],
            cluster.median(dim=0).values.tolist(),
            ha="center",
            va="center",
            fontsize=13 if names is None else 9,
            fontweight="bold",
            color="black",
        )
        text.set_path_effects([withStroke(linewidth=3, foreground="white")])
    return ax


def plot_distances(
    embeddings: Tensor, labels: Tensor, *, ax: Axes | None = None, squared: bool = False
) -> Axes:
    """Draw how far apart pairs of one class and pairs of different classes are.

    Parameters
    ----------
    embeddings : Tensor, shape (n, d)
        All n (n - 1) / 2 pairs are counted: a few thousand rows are enough.
    labels : Tensor of integers, shape (n,)
        Their classes.
    ax : Axes, optional
        Where to draw; by default the current axes.
    squared : bool, default False
        Draw the squared Euclidean distance instead of the distance.

    Returns
    -------
    Axes
    """
    check_points(embeddings)
    check_labels(labels, len(embeddings))
    if len(embeddings) < 2:
        raise ValueError(f"embeddings must hold at least two rows, got {len(embeddings)}")
    distances = pairwise_distances(embeddings.detach(), squared=squared).cpu()
    labels = labels.cpu()
    upper = torch.ones_like(distances, dtype=torch.bool).triu(diagonal=1)
    same = labels[:, None] == labels
    ax = plt.gca() if ax is None else ax
    bins = np.linspace(0, distances.max().item() or 1.0, 80)  # of some width if all is 0
    for mask, name, color in (
        (same & upper, "same class", SAME),
        (~same & upper, "different classes", DIFFERENT),
    ):
        values = distances[mask].numpy()
        if len(values):  # of no pairs there is no density
            ax.hist(values, bins, density=True, color=color, alpha=0.6, label=name)
    ax.set(xlabel="squared distance" if squared else "distance", ylabel="density of pairs")
    ax.legend()
    return ax


def plot_history(history: History) -> Figure:
    """Draw the loss, the fraction of active triplets and the mean distances of a training run.

    Parameters
    ----------
    history : History
        What `fit` returned.

    Returns
    -------
    Figure
    """
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.6))
    steps, loss, active = (history[column] for column in ("step", "loss", "active"))
    left.plot(steps, loss, color=PALETTE[7])
    bottom = None if (loss < 0).any() else 0
    left.set(title="Loss", ylabel="mean over active triplets", ylim=(bottom, None))
    middle.plot(steps, active, color=PALETTE[1])
    scale = "log" if (active > 0).any() else "linear"  # zero has no place on a log scale
    middle.set(title="Active triplets", ylabel="fraction of all valid triplets", yscale=scale)
    right.plot(steps, history["positive_distance"], color=SAME, label="same class")
    right.plot(steps, history["negative_distance"], color=DIFFERENT, label="different classes")
    right.set(title="Distances", ylabel="mean over pairs", ylim=(0, None))
    right.legend()
    for ax in (left, middle, right):
        ax.set_xlabel("step")
        for boundary in np.flatnonzero(np.diff(history["epoch"])) + 0.5:
            ax.axvline(steps[0] + boundary, color="grey", linestyle=":", linewidth=1)
    return figure


def show_neighbours(
    queries: Tensor,
    query_labels: Tensor,
    found: Tensor,
    found_labels: Tensor,
    *,
    names: Sequence[str] | None = None,
    size: float = 0.8,
) -> Figure:
    """Draw each query beside what a search found for it, hits framed in blue and misses in orange.

    Parameters
    ----------
    queries : Tensor, shape (n, channels, height, width)
        One a row, of one channel or three.
    query_labels : Tensor of integers, shape (n,)
        Their classes.
    found : Tensor, shape (n, k, channels, height, width)
        What was found for each, nearest first.
    found_labels : Tensor of integers, shape (n, k)
        Their classes.
    names : sequence of str, optional
        What to call class c; by default its number.
    size : float, default 0.8
        Side of an image in inches.

    Returns
    -------
    Figure
    """
    queries, query_labels, found, found_labels = (
        of.cpu() for of in (queries, query_labels, found, found_labels)
    )
    images = torch.cat([queries[:, None], found], dim=1)
    hits = found_labels == query_labels[:, None]
    labels = torch.cat([query_labels[:, None], found_labels], dim=1)
    colors = [
        color
        for row in hits.tolist()
        for color in ("black", *(SAME if hit else DIFFERENT for hit in row))
    ]
    words = [str(label) if names is None else names[label] for label in labels.flatten().tolist()]
    return show_images(
        images.flatten(0, 1), words, columns=images.shape[1], colors=colors, size=size
    )
