import os
import random

import numpy as np
import pytest
import torch
from PIL import Image
from problems import IMAGES, LABELS, SmallNet, same_weights
from torch.utils.data import ConcatDataset, Dataset, IterableDataset, Subset, TensorDataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from tripletlib import BalancedBatchSampler, embed, fit, load_or_fit

TO_TENSOR = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
WORDS = [["cat", "dog", "emu", "fox"][label] for label in (LABELS % 4).tolist()]


class Listed(Dataset):
    """Images in a list, and nothing that tells their labels but the items."""

    def __init__(self, images=IMAGES, labels=None, noise=0.0):
        labels = LABELS.tolist() if labels is None else labels
        self.images, self.labels, self.noise = list(images), labels, noise

    def __len__(self):
        return len(self.images)

    def __getitem__(self, place):
        image = self.images[place]
        drawn = torch.rand(()), np.random.rand(), random.random()  # noqa: NPY002
        return image + self.noise * float(sum(drawn)), self.labels[place]


class Broken(Listed):
    def __getitem__(self, place):
        if place == 7:
            raise OSError("the disk is gone")
        return super().__getitem__(place)


@pytest.fixture
def folder(tmp_path):
    for i in range(24):
        pixels = np.random.default_rng(i).integers(0, 255, (12, 10, 3), np.uint8)
        path = tmp_path / "ImageFolder" / ["дом", "kaze 風", "oak"][i % 3] / f"no {i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return tmp_path / "ImageFolder"


class ColourNet(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3 * 12 * 10, 8)

    def forward(self, images):
        return self.layer(images.flatten(1))


def trained(*data, make=SmallNet, **options):
    torch.manual_seed(0)
    network = make()
    history = fit(network, *data, **{"seed": 1, "progress": False, "batch_size": 20} | options)
    return network, history


@pytest.mark.parametrize("workers", [0, 2])
def test_the_same_data_in_a_data_set_give_the_same_weights(workers):
    right, history = trained(IMAGES, LABELS, augment=False)
    for data in (Listed(), TensorDataset(IMAGES, LABELS), ConcatDataset([Listed(), Listed()])):
        part = Subset(data, range(len(IMAGES)))
        network, its_history = trained(part, workers=workers)
        assert same_weights(network, right)
        assert np.array_equal(its_history["loss"], history["loss"])
        sampler = BalancedBatchSampler(LABELS, 4, 3, generator=torch.Generator().manual_seed(3))
        again = BalancedBatchSampler(LABELS, 4, 3, generator=torch.Generator().manual_seed(3))
        network, _ = trained(part, workers=workers, batch_sampler=sampler)
        assert same_weights(network, trained(IMAGES, LABELS, augment=False, batch_sampler=again)[0])
    assert torch.equal(embed(right, Listed(), workers=workers), embed(right, IMAGES))
    assert torch.equal(
        embed(right, Listed(), 7, workers=workers).argmax(1), embed(right, IMAGES).argmax(1)
    )


def test_what_items_draw_at_random_does_not_depend_on_the_processes():
    right, _ = trained(Listed(noise=1.0), workers=0)
    assert not same_weights(right, trained(Listed(), workers=0)[0])
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    for workers in (0, 1, 2):
        assert same_weights(trained(Listed(noise=1.0), workers=workers)[0], right)
        assert torch.equal(
            embed(right, Listed(noise=1.0), workers=workers),
            embed(right, Listed(noise=1.0), workers=0),
        )
    torch.manual_seed(0)
    SmallNet()
    after = torch.get_rng_state(), np.random.get_state()[1], random.getstate()  # noqa: NPY002
    assert torch.equal(states[0], after[0])
    assert np.array_equal(states[1], after[1])
    assert states[2] == after[2]


def test_labels_come_from_targets_through_parts_or_from_the_items_or_as_words(folder):
    images = ImageFolder(folder, TO_TENSOR)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0)).tolist()
    part = ConcatDataset([Subset(images, order[:10]), Subset(Subset(images, order), range(10, 24))])
    targets = torch.tensor(images.targets)[order]
    right, _ = trained(part, targets, make=ColourNet)
    assert same_weights(trained(part, make=ColourNet)[0], right)
    words = [images.classes[target] for target in targets]
    assert same_weights(trained(part, words, make=ColourNet)[0], right)
    right, _ = trained(Listed(), LABELS % 4, workers=0)
    assert same_weights(trained(Listed(labels=WORDS), workers=2)[0], right)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_item_that_raises_is_named(workers, folder):
    for data, place in ((Broken(), 7), (Subset(Broken(), range(5, 40)), 2)):
        message = rf"images\[{place}\] could not be read \(OSError: the disk is gone\)"
        with pytest.raises(RuntimeError, match=message):
            trained(data, LABELS[: len(data)], workers=workers)
        with pytest.raises(RuntimeError, match=message):
            embed(SmallNet(), data, workers=workers)
    images = ImageFolder(folder, TO_TENSOR)
    file = images.samples[3][0]
    with open(file, "wb") as stream:
        stream.write(b"no image")
    data = ConcatDataset([Subset(images, range(20, 24)), images])
    with pytest.raises(RuntimeError, match=r"images\[7\] \(.*no .*\.png\) could not be read"):
        embed(ColourNet(), data, workers=workers)


class Stream(IterableDataset):
    def __iter__(self):
        return iter([])


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (
            (Stream(), LABELS),
            TypeError,
            "images must be a torch.Tensor or a map-style torch Dataset",
        ),
        (([IMAGES], LABELS), TypeError, "images must be a torch.Tensor or .*, got list"),
        (
            (Listed([], ()),),
            ValueError,
            "images must hold at least one image, got an empty data set",
        ),
        ((Listed(), LABELS[:-1]), ValueError, "labels must have shape"),
        ((Listed(), LABELS.double()), TypeError, "labels must be integers"),
        (
            (Listed(labels=[0.5] * 100),),
            TypeError,
            "labels must be all integers or all words, got float",
        ),
        ((Listed(labels=[True] * 100),), TypeError, "labels must be all .* words, got bool"),
        (
            (TensorDataset(IMAGES.byte(), LABELS),),
            TypeError,
            r"images\[\d+\] must be floating point",
        ),
        (
            (Listed(["x"] * 100), LABELS),
            RuntimeError,
            r"images\[\d+\] could not be read \(TypeError",
        ),
        ((TensorDataset(IMAGES),), TypeError, r"images\[0\] must be \(image, label\), as labels"),
        ((Listed([*IMAGES[:-1], IMAGES[0, :, 1:]]), LABELS), ValueError, "must be of one shape"),
    ],
)
@pytest.mark.parametrize("workers", [0, 1])
def test_bad_data_sets_get_a_clear_error(data, error, message, workers):
    with pytest.raises(error, match=message):
        trained(*data, workers=workers)


@pytest.mark.parametrize("workers", [-1, 1.5, "all"])
def test_bad_workers_are_refused(workers):
    with pytest.raises(ValueError, match="workers must be a whole number of at least 0"):
        trained(Listed(), workers=workers)
    with pytest.raises(ValueError, match="workers must be a whole number of at least 0"):
        embed(SmallNet(), Listed(), workers=workers)


def test_pillow_images_are_refused_with_what_to_do(folder):
    with pytest.raises(TypeError, match=r"images\[0\] \(.*\) must be a tensor, .* got Image: end"):
        embed(ColourNet(), ImageFolder(folder), workers=0)


def test_a_run_from_files_is_kept_until_a_file_changes(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("TRIPLETLIB_CACHE", str(tmp_path / "cache"))

    def run():
        data = ImageFolder(folder, TO_TENSOR)
        load_or_fit(ColourNet, data, epochs=1, batch_size=8, progress=False, workers=0)
        return len(list((tmp_path / "cache" / "networks").iterdir()))

    assert [run(), run()] == [1, 1]
    file = ImageFolder(folder).samples[5][0]
    Image.new("RGB", (10, 12), "red").save(file)
    assert [run(), run()] == [2, 2]
    os.utime(file, ns=(1, 1))
    assert run() == 3


def test_a_broken_off_run_goes_on_as_without_the_break(tmp_path):
    right, _ = trained(Listed(noise=1.0), epochs=3, workers=2)

    class Stop(Exception):
        pass

    def stop(history):
        if len(history) == 8:
            raise Stop

    torch.manual_seed(0)
    network = SmallNet()
    data, options = Listed(noise=1.0), {"seed": 1, "epochs": 3, "batch_size": 20, "progress": False}
    with pytest.raises(Stop):
        fit(network, data, checkpoint=tmp_path / "run.pt", callback=stop, workers=1, **options)
    torch.manual_seed(0)
    network = SmallNet()
    history = fit(network, data, checkpoint=tmp_path / "run.pt", workers=0, **options)
    assert len(history) == 15
    assert same_weights(network, right)
