"""Data sets, one file each, and images from files."""

from tripletlib.data.emoji import EMOJI_DESIGNERS, Emoji, load_emoji
from tripletlib.data.images import ImageFolderDataset, load_image
from tripletlib.data.libraries import Libraries, load_libraries
from tripletlib.data.mnist import FASHION_NAMES, load_fashion_mnist, load_mnist
from tripletlib.data.olivetti import load_olivetti

__all__ = [
    "EMOJI_DESIGNERS",
    "FASHION_NAMES",
    "Emoji",
    "ImageFolderDataset",
    "Libraries",
    "load_emoji",
    "load_fashion_mnist",
    "load_image",
    "load_libraries",
    "load_mnist",
    "load_olivetti",
]
