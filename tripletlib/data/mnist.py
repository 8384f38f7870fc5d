"""MNIST and Fashion-MNIST, shipped with the package or in torchvision's own copy."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from tripletlib._validation import check_choice
from tripletlib.data._shipped import unpacked

# Mean and standard deviation of all pixels of the 60 000 training images, on the 0-255 scale.
PIXEL_STATISTICS = {
    "MNIST": (33.318421449829934, 78.56748998339798),
    "FashionMNIST": (72.94035223214286, 90.02118235130519),
}


def load_mnist(
    split: str = "train", root: str | os.PathLike | None = None
) -> tuple[Tensor, Tensor]:
    """Load the images and labels of one split of MNIST, standardised.

    Pixels are shifted and scaled by the mean and standard deviation of the training images, for
    both splits, so that nothing about the test images leaks into their own scaling.

    Parameters
    ----------
    split : {"train", "test"}
        60 000 training images or 10 000 test images.
    root : path, optional
        Read torchvision's own copy below this folder instead (``<root>/MNIST/raw``), downloading
        it if it is not there. By default the files shipped with the package are used; no network
        is needed.

    Returns
    -------
    images : Tensor, float32, shape (n, 1, 28, 28)
        Standardised images.
    labels : Tensor, int64, shape (n,)
        The digits, 0 to 9.

    Raises
    ------
    ValueError
        If `split` is not one of the two.
    RuntimeError
        If a shipped file is missing or damaged, or `root` holds no data and it cannot be
        downloaded. The message names the file and says how to mend it.

    Notes
    -----
    The shipped files are unpacked once into the user's cache folder (``TRIPLETLIB_CACHE`` names
    another) and checked by SHA-256 at every load. Where the cache cannot be written, a warning
    says so and the files are unpacked anew each time.

    References
    ----------
    Y. LeCun, C. Cortes, C. J. C. Burges, "The MNIST database of handwritten digits", 1998.
    """
    check_choice(split, ("train", "test"), "split")
    return _load("MNIST", split, root)


def load_fashion_mnist(
    split: str = "test", root: str | os.PathLike | None = None
) -> tuple[Tensor, Tensor]:
    """Load the images and labels of one split of Fashion-MNIST, standardised.

    The package ships the 10 000 images of the test split; the training split needs `root`.

    Parameters
    ----------
    split : {"test", "train"}
        10 000 test images, shipped, or 60 000 training images through `root`.
    root : path, optional
        Read torchvision's own copy below this folder instead (``<root>/FashionMNIST/raw``),
        downloading it if it is not there.

    Returns
    -------
    images : Tensor, float32, shape (n, 1, 28, 28)
        Images standardised by the pixel statistics of the training split.
    labels : Tensor, int64, shape (n,)
        The products, 0 to 9; `FASHION_NAMES` says what they are.

    Raises
    ------
    ValueError
        If `split` is not one of the two, or is "train" without `root`.
    RuntimeError
        As for `load_mnist`.

    References
    ----------
    H. Xiao, K. Rasul, R. Vollgraf, "Fashion-MNIST: a novel image dataset for benchmarking
    machine learning algorithms", arXiv 1708.07747, 2017.
    """
    check_choice(split, ("test", "train"), "split")
    if split == "train" and root is None:
        raise ValueError(
            "split 'train' of Fashion-MNIST is not shipped: name a folder in root= "
            "(torchvision downloads it there), or use split 'test'"
        )
    return _load("FashionMNIST", split, root)


FASHION_NAMES = (
    "T-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)


def _load(name: str, split: str, root: str | os.PathLike | None) -> tuple[Tensor, Tensor]:
    images, labels = _shipped(name, split) if root is None else _downloaded(name, split, root)
    mean, deviation = PIXEL_STATISTICS[name]
    return images.unsqueeze(1).to(torch.float32).sub_(mean).div_(deviation), labels.to(torch.int64)


def _shipped(name: str, split: str) -> tuple[Tensor, Tensor]:
    from torchvision.datasets.mnist import read_image_file, read_label_file

    prefix = {"train": "train", "test": "t10k"}[split]
    with unpacked(name, prefix) as folder:
        images = read_image_file(str(folder / f"{prefix}-images-idx3-ubyte"))
        labels = read_label_file(str(folder / f"{prefix}-labels-idx1-ubyte"))
    return images, labels


def _downloaded(name: str, split: str, root: str | os.PathLike) -> tuple[Tensor, Tensor]:
    from torchvision import datasets

    root = Path(os.path.expanduser(root))
    try:
        dataset = getattr(datasets, name)(root, train=split == "train", download=True)
    except (RuntimeError, OSError, ValueError, AssertionError) as error:
        raise RuntimeError(
            f"could not load {name} from root={str(root)!r} ({error}). Check that there is a "
            f"network to download it, or delete {root / name} if its files are damaged; "
            "without root= the files shipped with the package are used"
        ) from error
    return dataset.data, dataset.targets
