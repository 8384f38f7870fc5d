"""Embedding networks, and the triplet network made of one of them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tripletlib._validation import check_count


class EmbeddingNet(nn.Module):
    """Map images to points on the unit sphere with five convolutions.

    Parameters
    ----------
    dimensions : int, default 64
        Length of an embedding.
    in_channels : int, default 1
        Channels of an image: 1 for grey, 3 for colour.
    normalize : bool, default True
        Scale every embedding to length one. Losses that need room to move in, such as
        `DistanceRatioLoss`, want False.

    Raises
    ------
    ValueError
        If a parameter is not a whole number of at least 1, or the images do not have shape
        (n, in_channels, height, width) with sides of at least 24 pixels.

    Notes
    -----
    Initial weights come from torch's global generator: call ``torch.manual_seed`` first for the
    same network twice.
    """

    def __init__(
        self, dimensions: int = 64, *, in_channels: int = 1, normalize: bool = True
    ) -> None:
        super().__init__()
        check_count(dimensions, "dimensions")
        check_count(in_channels, "in_channels")
        self.in_channels = in_channels
        self.normalize = normalize
        self.layers = nn.Sequential(
            *_stage(in_channels, 32, 5, pool=True),
            *_stage(32, 64, 3, padding=1),
            *_stage(64, 96, 3, padding=1, pool=True),
            *_stage(96, 192, 3),
            *_stage(192, 192, 3),
            nn.AdaptiveMaxPool2d(2),
            nn.Flatten(),
            nn.Linear(192 * 2 * 2, dimensions, bias=False),
        ).to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        """Embed images of shape (n, channels, height, width) as points of shape (n, dimensions)."""
        if images.dim() != 4 or images.shape[1] != self.in_channels or min(images.shape[2:]) < 24:
            raise ValueError(
                f"images must have shape (n, {self.in_channels}, height, width) with sides of at "
                f"least 24 pixels, got {tuple(images.shape)}"
            )
        points = self.layers(images)
        return F.normalize(points) if self.normalize else points


def _stage(
    in_channels: int, out_channels: int, kernel: int, *, padding: int = 0, pool: bool = False
) -> list[nn.Module]:
    convolution = nn.Conv2d(in_channels, out_channels, kernel, padding=padding, bias=False)
    # Pooling first leaves a quarter of the numbers to normalise and rectify.
    shrink = [nn.MaxPool2d(2)] if pool else []
    return [convolution, *shrink, nn.BatchNorm2d(out_channels), nn.ReLU()]


class ResidualNet(nn.Module):
    """Map images to 768 numbers on the unit sphere with seven convolutions, three of them residual.

    What the last of them gives, at its highest in each quarter of the image, is the embedding: no
    linear layer follows. Made for small colour images and classes to come that are not those of
    the training (``tests/benchmarks/emoji.py`` has both side by side).

    Parameters
    ----------
    in_channels : int, default 3
        Channels of an image: 1 for grey, 3 for colour.
    normalize : bool, default True
        Scale every embedding to length one.

    Raises
    ------
    ValueError
        If `in_channels` is not a whole number of at least 1, or the images do not have shape
        (n, in_channels, height, width) with sides of at least 16 pixels.

    Notes
    -----
    Initial weights come from torch's global generator: call ``torch.manual_seed`` first for the
    same network twice.

    References
    ----------
    K. He, X. Zhang, S. Ren, J. Sun, "Deep residual learning for image recognition", 2016.
    """

    def __init__(self, in_channels: int = 3, *, normalize: bool = True) -> None:
        super().__init__()
        check_count(in_channels, "in_channels")
        self.in_channels = in_channels
        self.normalize = normalize
        self.layers = nn.Sequential(
            *_stage(in_channels, 32, 3, padding=1, pool=True),
            *_stage(32, 48, 3, padding=1),
            _Residual(48),
            *_stage(48, 96, 3, padding=1, pool=True),
            _Residual(96),
            *_stage(96, 192, 3, padding=1, pool=True),
            _Residual(192),
            nn.AdaptiveMaxPool2d(2),
            nn.Flatten(),
        ).to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        """Embed images of shape (n, channels, height, width) as points of shape (n, 768)."""
        if images.dim() != 4 or images.shape[1] != self.in_channels or min(images.shape[2:]) < 16:
            raise ValueError(
                f"images must have shape (n, {self.in_channels}, height, width) with sides of at "
                f"least 16 pixels, got {tuple(images.shape)}"
            )
        points = self.layers(images)
        return F.normalize(points) if self.normalize else points


class _Residual(nn.Module):
    """Add to its input what one convolution makes of it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.change = nn.Sequential(*_stage(channels, channels, 3, padding=1))

    def forward(self, features: Tensor) -> Tensor:
        return features + self.change(features)


class HofferAilonNet(nn.Module):
    """Map images to 128 numbers, not normalised, with the network of the triplet network paper.

    Four convolutions, each followed by ReLU; pooling by 2 and dropout of a quarter come between
    them. It ends at 1x1. With one input channel it has 501 888 parameters.

    Parameters
    ----------
    in_channels : int, default 1
        Channels of an image: 1 for grey, 3 for colour.

    Raises
    ------
    ValueError
        If `in_channels` is not a whole number of at least 1, or the images do not have shape
        (n, in_channels, height, width) with sides of 24 to 32 pixels.

    Notes
    -----
    Images of less than 32 pixels a side are padded to that by repeating their border.

    References
    ----------
    E. Hoffer, N. Ailon, "Deep metric learning using Triplet network", arXiv 1412.6622, 2014,
    section 4; sizes and dropout are those of the authors' Torch code.
    """

    def __init__(self, in_channels: int = 1) -> None:
        super().__init__()
        check_count(in_channels, "in_channels")
        self.in_channels = in_channels
        self.layers = nn.Sequential(
            *_paper_stage(in_channels, 64, 5),
            *_paper_stage(64, 128, 3),
            *_paper_stage(128, 256, 3),
            nn.Conv2d(256, 128, 2),
            nn.ReLU(),
            nn.Flatten(),
        ).to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        """Embed images of shape (n, channels, height, width) as points of shape (n, 128)."""
        sides = images.shape[2:]
        if images.dim() != 4 or images.shape[1] != self.in_channels or not _fits(*sides):
            raise ValueError(
                f"images must have shape (n, {self.in_channels}, height, width) with sides of 24 "
                f"to 32 pixels, got {tuple(images.shape)}"
            )
        (top, bottom), (left, right) = (((32 - s) // 2, (33 - s) // 2) for s in sides)
        return self.layers(F.pad(images, (left, right, top, bottom), mode="replicate"))


def _fits(height: int, width: int) -> bool:
    return min(height, width) >= 24 and max(height, width) <= 32


def _paper_stage(in_channels: int, out_channels: int, kernel: int) -> list[nn.Module]:
    convolution = nn.Conv2d(in_channels, out_channels, kernel)
    return [convolution, nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.25)]


class TripletNet(nn.Module):
    """Apply one embedding network, with one set of weights, to anchor, positive and negative.

    Parameters
    ----------
    embedding_net : nn.Module
        The shared network.

    References
    ----------
    E. Hoffer, N. Ailon, "Deep metric learning using Triplet network", arXiv 1412.6622, 2014,
    section 2 and figure 1.
    """

    def __init__(self, embedding_net: nn.Module) -> None:
        super().__init__()
        if not isinstance(embedding_net, nn.Module):
            raise TypeError(
                f"embedding_net must be an nn.Module, got {type(embedding_net).__name__}"
            )
        self.embedding_net = embedding_net

    def forward(
        self, anchor: Tensor, positive: Tensor, negative: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Embed three batches of images of one shape (n, ...); return their embeddings in order."""
        if not anchor.shape == positive.shape == negative.shape:
            shapes = ", ".join(str(tuple(part.shape)) for part in (anchor, positive, negative))
            raise ValueError(f"anchor, positive and negative must have one shape, got {shapes}")
        return (
            self.embedding_net(anchor),
            self.embedding_net(positive),
            self.embedding_net(negative),
        )
