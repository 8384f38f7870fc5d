"""MNIST and Fashion-MNIST, shipped with the package; balanced batches and random triplets."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import socket
import tempfile
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Sampler

from tripletlib._cache import cache_folder, write_atomically
from tripletlib._validation import check_choice, check_count, check_labels

_PACKAGE = Path(__file__).parent
_DIGESTS = {
    "MNIST": {
        "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    },
    "FashionMNIST": {
        "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    },
}
# Mean and standard deviation of all pixels of the 60 000 training images, on the 0-255 scale.
_PIXEL_STATISTICS = {
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


def load_olivetti(root: str | os.PathLike | None = None) -> tuple[Tensor, Tensor]:
    """Load the Olivetti faces, ten photographs of each of 40 people, standardised one by one.

    Each image is shifted and scaled to mean 0 and standard deviation 1. That takes off much of the
    lighting, and nothing about one person gets into the images of another.

    Parameters
    ----------
    root : path, optional
        Where scikit-learn keeps the data, or is to download it to; by default its own folder
        (``scikit_learn_data`` in the home folder, or what ``SCIKIT_LEARN_DATA`` names).

    Returns
    -------
    images : Tensor, float32, shape (400, 1, 64, 64)
        Grey images.
    labels : Tensor, int64, shape (400,)
        The person, 0 to 39.

    Raises
    ------
    RuntimeError
        If the data is not there and cannot be downloaded, which is tried for some seconds only, or
        if it is damaged.

    References
    ----------
    F. S. Samaria, A. C. Harter, "Parameterisation of a stochastic model for human face
    identification", 1994; photographs by AT&T Laboratories Cambridge.
    """
    from sklearn.datasets import fetch_olivetti_faces

    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(10)  # seconds; a network that drops packets would keep us for minutes
    try:
        # It prints a path, and warns of its second attempt.
        with redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            faces = fetch_olivetti_faces(data_home=root, n_retries=1, delay=0.1)
    except Exception as error:  # a network, a proxy, a disk and a file fail in ways of their own
        raise RuntimeError(
            f"could not load the Olivetti faces ({type(error).__name__}: {error}). Check that there "
            "is a network to download them, or name in root= the folder that holds scikit-learn's "
            "file of them; if that file is damaged, delete it"
        ) from error
    finally:
        socket.setdefaulttimeout(patience)
    images = torch.from_numpy(faces.images).to(torch.float32).unsqueeze(1)
    deviation, mean = torch.std_mean(images, dim=(2, 3), correction=0, keepdim=True)
    # An image of one grey has no deviation, and becomes 0.
    return (images - mean) / deviation.clamp(min=1e-6), torch.from_numpy(faces.target).long()


def _load(name: str, split: str, root: str | os.PathLike | None) -> tuple[Tensor, Tensor]:
    images, labels = _shipped(name, split) if root is None else _downloaded(name, split, root)
    mean, deviation = _PIXEL_STATISTICS[name]
    return images.unsqueeze(1).to(torch.float32).sub_(mean).div_(deviation), labels.to(torch.int64)


def _shipped(name: str, split: str) -> tuple[Tensor, Tensor]:
    from torchvision.datasets.mnist import read_image_file, read_label_file

    prefix = {"train": "train", "test": "t10k"}[split]
    with _unpacked(name, prefix) as folder:
        images = read_image_file(str(folder / f"{prefix}-images-idx3-ubyte"))
        labels = read_label_file(str(folder / f"{prefix}-labels-idx1-ubyte"))
    return images, labels


def _downloaded(name: str, split: str, root: str | os.PathLike) -> tuple[Tensor, Tensor]:
    from torchvision import datasets

    root = Path(root).expanduser()
    try:
        dataset = getattr(datasets, name)(root, train=split == "train", download=True)
    except (RuntimeError, OSError, ValueError, AssertionError) as error:
        raise RuntimeError(
            f"could not load {name} from root={str(root)!r} ({error}). Check that there is a "
            f"network to download it, or delete {root / name} if its files are damaged; "
            "without root= the files shipped with the package are used"
        ) from error
    return dataset.data, dataset.targets


@contextmanager
def _unpacked(name: str, prefix: str) -> Iterator[Path]:
    """Give a folder with the verified raw files of one split."""
    files = [file for file in _DIGESTS[name] if file.startswith(prefix)]
    cache = cache_folder() / name / "raw"
    try:
        for file in files:
            _unpack(name, file, cache)
    except OSError as error:
        warnings.warn(
            f"cannot keep unpacked data in {cache} ({error}); unpacking it anew each time. "
            "Set TRIPLETLIB_CACHE to a folder that can be written",
            stacklevel=6,
        )
        with tempfile.TemporaryDirectory() as scratch:
            for file in files:
                _unpack(name, file, Path(scratch))
            yield Path(scratch)
    else:
        yield cache


def _unpack(name: str, file: str, folder: Path) -> None:
    """Put one raw file into the folder, unless a sound one is there."""
    target = folder / file
    digest = _DIGESTS[name][file]
    if target.is_file() and hashlib.sha256(target.read_bytes()).hexdigest() == digest:
        return
    source = _PACKAGE / name / "raw" / f"{file}.gz"
    mend = "reinstall tripletlib (pip install --force-reinstall --no-deps -e .) or restore the file"
    try:
        content = gzip.decompress(source.read_bytes())
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise RuntimeError(f"data file {source} is missing or damaged ({error}); {mend}") from error
    if hashlib.sha256(content).hexdigest() != digest:
        raise RuntimeError(f"data file {source} is damaged (its SHA-256 differs); {mend}")
    write_atomically(target, lambda stream: stream.write(content))


def draw_triplets(
    labels: Tensor, count: int, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw triplets at random from a whole data set, each class as often as any other.

    The anchor's class is uniform over the classes of at least two images; anchor and positive are
    two distinct images of it. The negative's class is uniform over all other classes, and the
    negative uniform over its images. Triplets are drawn independently, so a list may hold one
    twice. (`mine_triplets` with kind "random" chooses within an embedded batch instead: one
    triplet for each anchor of the batch, uniform over its valid ones, so larger classes give more.)

    Parameters
    ----------
    labels : Tensor of integers, shape (n,)
        The class of every image.
    count : int
        How many triplets to draw, at least 1.
    generator : torch.Generator, optional
        Where the randomness comes from; by default torch's global one.

    Returns
    -------
    a, p, n : Tensor, int64, shape (count,)
        Indices of anchors, positives and negatives.

    Raises
    ------
    TypeError, ValueError
        If the labels are not integers of shape (n,), hold fewer than two classes or no class of two
        images, or `count` is not a whole number of at least 1.

    Examples
    --------
    >>> import torch
    >>> labels = torch.tensor([0, 0, 1])
    >>> a, p, n = draw_triplets(labels, 100)
    >>> bool((a != p).all()), n.unique()
    (True, tensor([2]))

    References
    ----------
    E. Hoffer, N. Ailon, "Deep metric learning using Triplet network", arXiv 1412.6622, 2014,
    section 3.
    """
    check_labels(labels, len(labels), of="labels")
    check_count(count, "count")
    _, which, sizes = labels.unique(return_inverse=True, return_counts=True)
    several = torch.nonzero(sizes > 1)[:, 0]
    if len(sizes) < 2 or not len(several):
        raise ValueError(
            "labels must hold at least two classes, and a class of at least two images, got "
            f"{len(sizes)} classes, the largest of {int(sizes.max()) if len(sizes) else 0} images"
        )

    def below(limits: Tensor | int) -> Tensor:
        # From so wide a range that the remainders are as good as uniform.
        return torch.randint(2**62, (count,), generator=generator).to(labels.device) % limits

    # Members of a class lie side by side in `order`, from `first` on.
    order, first = which.argsort(), sizes.cumsum(dim=0) - sizes
    like = several[below(len(several))]
    unlike = (like + 1 + below(len(sizes) - 1)) % len(sizes)
    anchor = below(sizes[like])
    positive = (anchor + 1 + below(sizes[like] - 1)) % sizes[like]
    negative = below(sizes[unlike])
    return (
        order[first[like] + anchor],
        order[first[like] + positive],
        order[first[unlike] + negative],
    )


class BalancedBatchSampler(Sampler[list[int]]):
    """Draw batches of the same number of images from each of a number of classes (P x K).

    An epoch is ``len(labels) // (classes_per_batch * images_per_class)`` batches, and at least
    one. Within an epoch no class is drawn again before every other has been drawn as often, and no
    image before every other image of its class; so classes of unequal size are seen equally
    often, a small one's images more often each. A class of fewer than `images_per_class` images
    repeats them within the batch.

    Parameters
    ----------
    labels : Tensor of integers, shape (n,)
        The class of every image.
    classes_per_batch : int
        P, at most the number of classes and at least 2, or there would be no negative.
    images_per_class : int
        K, at least 2, or there would be no positive.
    generator : torch.Generator, optional
        Where the randomness comes from; by default torch's global one.

    Yields
    ------
    list of int
        P * K indices, those of one class side by side.

    Raises
    ------
    TypeError, ValueError
        If the labels are not integers of shape (n,), or P or K is out of range.

    Examples
    --------
    >>> import torch
    >>> labels = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2])
    >>> batch = next(iter(BalancedBatchSampler(labels, classes_per_batch=2, images_per_class=2)))
    >>> labels[batch].unique(return_counts=True)[1]
    tensor([2, 2])

    References
    ----------
    A. Hermans, L. Beyer, B. Leibe, "In defense of the triplet loss for person
    re-identification", arXiv 1703.07737, 2017, section 2.
    """

    def __init__(
        self,
        labels: Tensor,
        classes_per_batch: int,
        images_per_class: int,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        check_labels(labels, len(labels), of="labels")
        check_count(classes_per_batch, "classes_per_batch", low=2)
        check_count(images_per_class, "images_per_class", low=2)
        self._members = [torch.nonzero(labels == label)[:, 0] for label in labels.unique()]
        if classes_per_batch > len(self._members):
            raise ValueError(
                f"classes_per_batch must be at most the number of classes in labels, "
                f"{len(self._members)}, got {classes_per_batch}"
            )
        self.classes_per_batch = classes_per_batch
        self.images_per_class = images_per_class
        self.generator = generator
        self._length = max(1, len(labels) // (classes_per_batch * images_per_class))

    def __len__(self) -> int:
        """Return the number of batches in an epoch."""
        return self._length

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the batches of one epoch."""
        class_draws = torch.zeros(len(self._members), dtype=torch.float64)
        image_draws = [torch.zeros(len(members), dtype=torch.float64) for members in self._members]
        for _ in range(self._length):
            classes = self._least_drawn(class_draws, self.classes_per_batch)
            yield [
                int(index)
                for label in classes
                for index in self._members[label][
                    self._least_drawn(image_draws[label], self.images_per_class)
                ]
            ]

    def _least_drawn(self, draws: Tensor, count: int) -> Tensor:
        """Choose what was drawn least so far, ties at random, and count it as drawn."""
        chosen: list[Tensor] = []
        while (missing := count - sum(map(len, chosen))) > 0:
            noise = torch.rand(len(draws), dtype=draws.dtype, generator=self.generator)
            several = min(missing, len(draws))
            chosen.append((draws + noise).topk(several, largest=False).indices)
            draws[chosen[-1]] += 1
        return torch.cat(chosen)
