import collections
import gzip
import itertools
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from torchvision import datasets

import tripletlib.data
from tripletlib import BalancedBatchSampler, draw_triplets, load_fashion_mnist, load_mnist

PACKAGE = Path(tripletlib.data.__file__).parent


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("TRIPLETLIB_CACHE", str(folder))
    return folder


@pytest.fixture
def copied_package(tmp_path, monkeypatch, empty_cache):
    """A copy of the shipped files that a test may damage."""
    copy = tmp_path / "package"
    for name in ("MNIST", "FashionMNIST"):
        shutil.copytree(PACKAGE / name, copy / name)
    monkeypatch.setattr(tripletlib.data, "_PACKAGE", copy)
    return copy


def raw_images(file, count):
    content = gzip.decompress((PACKAGE / file).read_bytes())
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=16).view(count, 28, 28)


@pytest.mark.parametrize(("split", "count"), [("train", 60_000), ("test", 10_000)])
def test_mnist_has_all_images_of_all_classes(split, count):
    images, labels = load_mnist(split)
    assert images.shape == (count, 1, 28, 28)
    assert images.dtype == torch.float32
    assert labels.shape == (count,)
    assert labels.dtype == torch.int64
    assert labels.bincount().min() > 0.08 * count
    assert len(labels.bincount()) == 10


def test_mnist_is_standardised_by_its_training_pixels():
    raw = raw_images("MNIST/raw/train-images-idx3-ubyte.gz", 60_000).double()
    images, _ = load_mnist("train")
    expected = (raw - raw.mean()) / raw.std(correction=0)
    torch.testing.assert_close(images[:, 0].double(), expected, atol=1e-5, rtol=0)
    raw_test = raw_images("MNIST/raw/t10k-images-idx3-ubyte.gz", 10_000).double()
    images, _ = load_mnist("test")
    expected = (raw_test - raw.mean()) / raw.std(correction=0)
    torch.testing.assert_close(images[:, 0].double(), expected, atol=1e-5, rtol=0)


def test_fashion_mnist_ships_its_test_split():
    images, labels = load_fashion_mnist()
    assert images.shape == (10_000, 1, 28, 28)
    assert labels.bincount().tolist() == [1000] * 10
    raw = raw_images("FashionMNIST/raw/t10k-images-idx3-ubyte.gz", 10_000).double() / 255
    # The published statistics of the training split, to four digits.
    torch.testing.assert_close(images[:, 0].double(), (raw - 0.2860) / 0.3530, atol=5e-4, rtol=5e-4)


def test_fashion_training_split_is_not_shipped():
    with pytest.raises(ValueError, match=r"'train' of Fashion-MNIST is not shipped.*root="):
        load_fashion_mnist("train")


@pytest.mark.parametrize("load", [load_mnist, load_fashion_mnist])
def test_unknown_split_lists_the_valid_ones(load):
    with pytest.raises(ValueError, match=r"split must be one of .*'t.*'t.*got 'valid'"):
        load("valid")


@pytest.mark.parametrize("content", [b"", b"not gzip", "truncated", "flipped", None])
def test_damaged_shipped_file_is_named_with_what_to_do(copied_package, content):
    file = copied_package / "MNIST" / "raw" / "t10k-labels-idx1-ubyte.gz"
    whole = file.read_bytes()
    if content is None:
        file.unlink()
    elif content == "truncated":
        file.write_bytes(whole[: len(whole) // 2])
    elif content == "flipped":
        labels = bytearray(gzip.decompress(whole))
        labels[-1] ^= 1
        file.write_bytes(gzip.compress(bytes(labels)))
    else:
        file.write_bytes(content)
    with pytest.raises(RuntimeError, match=r"t10k-labels-idx1-ubyte.gz is .*damaged.*reinstall"):
        load_mnist("test")


def test_damaged_cache_is_mended(empty_cache):
    expected, _ = load_mnist("test")
    cached = empty_cache / "MNIST" / "raw" / "t10k-images-idx3-ubyte"
    content = bytearray(cached.read_bytes())
    content[-1] ^= 255
    cached.write_bytes(content)
    images, _ = load_mnist("test")
    assert torch.equal(images, expected)
    cached.write_bytes(content[:1000])
    images, _ = load_mnist("test")
    assert torch.equal(images, expected)


def test_unwritable_cache_warns_and_still_loads(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("TRIPLETLIB_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="TRIPLETLIB_CACHE") as caught:
        images, _ = load_fashion_mnist()
    assert len(images) == 10_000
    assert caught[0].filename == __file__


def test_nothing_is_written_into_the_package(copied_package):
    def listing():
        return {path: path.stat().st_mtime_ns for path in copied_package.rglob("*")}

    before = listing()
    load_mnist("test")
    load_fashion_mnist()
    assert listing() == before


def test_two_processes_may_start_at_once(empty_cache):
    code = "from tripletlib import load_mnist; print(load_mnist('test')[1].sum().item())"
    starts = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    answers = {start.communicate()[0] for start in starts}
    assert [start.returncode for start in starts] == [0, 0]
    assert answers == {f"{load_mnist('test')[1].sum().item()}\n"}
    leftovers = [path.name for path in empty_cache.rglob("*") if path.name.startswith(".")]
    assert leftovers == []


def test_root_reads_torchvisions_own_copy(tmp_path, empty_cache):
    expected, expected_labels = load_mnist("test")
    load_mnist("train")
    root = tmp_path / "root"
    shutil.copytree(empty_cache / "MNIST", root / "MNIST")
    assert len(datasets.MNIST(root, train=False)) == 10_000
    images, labels = load_mnist("test", root=str(root))
    assert torch.equal(images, expected)
    assert torch.equal(labels, expected_labels)


def test_root_that_cannot_be_filled_says_so(tmp_path, monkeypatch):
    def no_network(*_, **__):
        raise RuntimeError("Error downloading train-images-idx3-ubyte.gz")

    monkeypatch.setattr(datasets.MNIST, "download", no_network)
    with pytest.raises(RuntimeError, match=r"could not load MNIST from root=.*network"):
        load_mnist("train", root=tmp_path)


def test_root_with_a_damaged_file_says_so(tmp_path, empty_cache):
    load_mnist("train")
    load_mnist("test")
    root = tmp_path / "root"
    shutil.copytree(empty_cache / "MNIST", root / "MNIST")
    (root / "MNIST" / "raw" / "t10k-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03\0\0")
    with pytest.raises(RuntimeError, match=r"could not load MNIST from root=.*delete"):
        load_mnist("test", root=root)


def test_wheel_holds_the_data(tmp_path):
    project = PACKAGE.parents[1]
    copy = tmp_path / "project"
    ignored = shutil.ignore_patterns(".git", "*.egg-info", "build", "notebooks", "__pycache__")
    shutil.copytree(project, copy, ignore=ignored)
    built = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "-q", "-w", str(tmp_path), str(copy)],
        capture_output=True,
        text=True,
    )
    if "No matching distribution found for setuptools" in built.stderr:
        pytest.skip("building a wheel fetches setuptools, and there is no network")
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("tripletlib-*.whl")
    target = tmp_path / "unpacked"
    shutil.unpack_archive(wheel, target, "zip")
    packed = {path.name for path in (target / "tripletlib" / "data").rglob("*.gz")}
    assert packed == {path.name for path in PACKAGE.rglob("*.gz")}
    assert len(packed) == 4


def sampled(labels, classes, images, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return BalancedBatchSampler(labels, classes, images, generator=generator)


def test_batches_are_balanced():
    labels = torch.arange(1000) % 10
    batches = list(sampled(labels, 4, 5))
    assert len(batches) == len(sampled(labels, 4, 5)) == 1000 // 20
    for batch in batches:
        values, counts = labels[batch].unique(return_counts=True)
        assert len(values) == 4
        assert counts.tolist() == [5] * 4
        assert len(set(batch)) == 20


def test_epoch_shows_every_image_once_where_the_classes_are_equal():
    labels = torch.arange(1000) % 10
    shown = torch.tensor([index for batch in sampled(labels, 5, 20) for index in batch])
    assert shown.sort().values.tolist() == list(range(1000))


def test_unequal_classes_are_shown_equally_often_and_no_image_twice_before_all():
    labels = torch.repeat_interleave(torch.tensor([7, -3, 40]), torch.tensor([4, 100, 1000]))
    sampler = sampled(labels, 2, 4)
    shown = torch.tensor([index for batch in sampler for index in batch])
    assert len(shown) == (1104 // 8) * 8
    counts = shown.bincount(minlength=1104)
    per_class = torch.tensor([counts[labels == label].sum() for label in (7, -3, 40)])
    assert per_class.max() - per_class.min() <= 4
    for label in (7, -3, 40):
        assert counts[labels == label].max() - counts[labels == label].min() <= 1


def test_class_smaller_than_its_share_repeats_its_images():
    labels = torch.tensor([0, 1, 1, 1, 1, 1, 1, 1])
    for batch in sampled(labels, 2, 3):
        assert (labels[batch] == 0).sum() == 3
        assert len({index for index in batch if labels[index] == 1}) == 3


def test_epochs_differ_and_a_seed_repeats_them():
    labels = torch.arange(200) % 10
    first, again = sampled(labels, 10, 4), sampled(labels, 10, 4)
    epochs = [list(first), list(first)]
    assert epochs[0] != epochs[1]
    assert [list(again), list(again)] == epochs


@pytest.mark.parametrize(
    ("labels", "classes", "images", "message"),
    [
        (torch.arange(10) % 2, 3, 2, "classes_per_batch must be at most .* 2, got 3"),
        (torch.arange(10) % 2, 1, 2, "classes_per_batch must be a whole number of at least 2"),
        (torch.arange(10) % 2, 2, 1, "images_per_class must be a whole number of at least 2"),
        (torch.arange(10) % 2, 2.0, 2, "classes_per_batch must be a whole number"),
        (torch.zeros(0, dtype=torch.int64), 2, 2, "classes_per_batch must be at most"),
        (torch.zeros(4, 2, dtype=torch.int64), 2, 2, "labels must have shape"),
    ],
)
def test_bad_arguments_are_named(labels, classes, images, message):
    with pytest.raises(ValueError, match=message):
        BalancedBatchSampler(labels, classes, images)


def test_floating_labels_are_refused():
    with pytest.raises(TypeError, match="labels must be integers, got torch.float32"):
        BalancedBatchSampler(torch.zeros(4), 2, 2)


def test_loading_warns_of_nothing(empty_cache):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_mnist("test")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


several_classes = st.lists(st.integers(-3, 3), min_size=3, max_size=40).filter(
    lambda labels: 1 < len(set(labels)) < len(labels)
)


@settings(deadline=None)
@given(several_classes, st.integers(1, 200), st.sampled_from([torch.int64, torch.int32]))
def test_drawn_triplets_are_valid(labels, count, dtype):
    labels = torch.tensor(labels, dtype=dtype)
    a, p, n = draw_triplets(labels, count, seeded())
    for column in (a, p, n):
        assert column.shape == (count,)
        assert column.dtype == torch.int64
    assert (labels[a] == labels[p]).all()
    assert (labels[a] != labels[n]).all()
    assert (a != p).all()


def test_every_triplet_is_drawn_as_often_as_documented():
    labels = torch.tensor([5, 8, 5, 2, 8, 5, 2, 9, 8, 8])
    expected = {}
    for a, p, n in itertools.product(range(10), repeat=3):
        kind, other = labels[a].item(), labels[n].item()
        if a != p and kind == labels[p] and kind != other:
            size, far = (labels == kind).sum().item(), (labels == other).sum().item()
            # Three of the four classes have two images, and there are three other classes.
            expected[a, p, n] = 1 / 3 / size / (size - 1) / 3 / far
    assert sum(expected.values()) == pytest.approx(1)
    count = 200_000
    drawn = collections.Counter(
        zip(*(column.tolist() for column in draw_triplets(labels, count, seeded())), strict=True)
    )
    assert drawn.keys() == expected.keys()
    observed = [drawn[triplet] for triplet in expected]
    assert chisquare(observed, [count * share for share in expected.values()]).pvalue > 0.001


def test_a_generator_repeats_triplets_and_goes_on_to_others():
    labels = torch.arange(100) % 10
    generator = seeded(3)
    first, second = draw_triplets(labels, 50, generator), draw_triplets(labels, 50, generator)
    again = draw_triplets(labels, 50, seeded(3))
    assert all(map(torch.equal, first, again))
    assert not all(map(torch.equal, first, second))
    torch.manual_seed(1)
    unseeded = draw_triplets(labels, 50)
    torch.manual_seed(1)
    assert all(map(torch.equal, unseeded, draw_triplets(labels, 50)))


@pytest.mark.parametrize(
    ("labels", "count", "message"),
    [
        ([], 1, "labels must hold at least two classes.*got 0 classes"),
        ([4, 4, 4], 1, "labels must hold at least two classes.*got 1 classes"),
        ([1, 2, 3], 1, "a class of at least two images.*the largest of 1 images"),
        ([0, 0, 1], 0, "count must be a whole number of at least 1, got 0"),
        ([0, 0, 1], 2.0, "count must be a whole number of at least 1, got 2.0"),
        ([[0, 0], [1, 1]], 1, "labels must have shape"),
    ],
)
def test_what_triplets_cannot_be_drawn_from_is_refused(labels, count, message):
    with pytest.raises(ValueError, match=message):
        draw_triplets(torch.tensor(labels, dtype=torch.int64), count)


@pytest.mark.parametrize("labels", [[0, 0, 1], torch.tensor([0.0, 0.0, 1.0])])
def test_labels_of_triplets_must_be_an_integer_tensor(labels):
    with pytest.raises(TypeError, match="labels must be"):
        draw_triplets(labels, 1)
