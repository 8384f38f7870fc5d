import gzip
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torchvision import datasets

import tripletlib.data._shipped
from tripletlib import load_emoji, load_fashion_mnist, load_mnist

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
    for name in ("MNIST", "FashionMNIST", "Emoji", "Libraries"):
        shutil.copytree(PACKAGE / name, copy / name)
    monkeypatch.setattr(tripletlib.data._shipped, "_PACKAGE", copy)
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


@pytest.mark.parametrize("load", [load_mnist, load_fashion_mnist, load_emoji])
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
    packed, shipped = (
        {path.name for path in folder.rglob("*") if path.suffix in (".gz", ".webp")}
        for folder in (target / "tripletlib" / "data", PACKAGE)
    )
    assert packed == shipped
    assert len(packed) == 14


def test_loading_warns_of_nothing(empty_cache):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_mnist("test")


def test_without_a_home_folder_the_warning_comes_and_data_loads(monkeypatch):
    def homeless():
        raise OSError("no home folder")

    monkeypatch.setattr(tripletlib.data._shipped, "cache_folder", homeless)
    with pytest.warns(UserWarning, match="no home folder.*TRIPLETLIB_CACHE") as caught:
        images, _ = load_fashion_mnist()
    assert len(images) == 10_000
    assert caught[0].filename == __file__


def test_the_tilde_in_root_is_the_home_folder(tmp_path, empty_cache, monkeypatch):
    load_mnist("train")
    expected, _ = load_mnist("test")
    shutil.copytree(empty_cache / "MNIST", tmp_path / "root" / "MNIST")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    images, _ = load_mnist("test", root="~/root")
    assert torch.equal(images, expected)
