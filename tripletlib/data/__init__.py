"""Data sets, one file each, and images from files."""

from tripletlib.data.images import load_image
from tripletlib.data.mnist import FASHION_NAMES, load_fashion_mnist, load_mnist
from tripletlib.data.olivetti import load_olivetti

__all__ = ["FASHION_NAMES", "load_fashion_mnist", "load_image", "load_mnist", "load_olivetti"]
