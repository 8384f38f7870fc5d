import dataclasses
import functools
import os
import random
from collections import Counter

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from problems import IMAGES, LABELS, SmallNet, same_weights
from torch.utils.data import ConcatDataset, Dataset, IterableDataset, Subset, TensorDataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from tripletlib import BalancedBatchSampler, embed, fit, load_or_fit
from tripletlib._reading import file_stamps, labels_of

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


class Named(Dataset):
    """Images in files that are named in no attribute that is walked but in those given."""

    def __init__(self, files, **attributes):
        self.__dict__.update(attributes)
        self.length = len(files)
        self.read = functools.partial(_read_grey, tuple(files))

    def __len__(self):
        return self.length

    def __getitem__(self, place):
        return self.read(place), place % 3


def _read_grey(files, place):
    return torch.from_numpy(np.array(Image.open(files[place]), np.float32))[None] / 255


@dataclasses.dataclass
class Row:
    name: str
    label: int


def as_frame(files):
    frame = pd.DataFrame({"file": map(str, files), "label": 0})
    return pd.concat([frame, frame], axis=1)  # of two columns of one name


WAYS = {
    "strings": lambda files: {"paths": np.array([str(file) for file in files])},
    "bytes": lambda files: {"paths": np.array([os.fsencode(file) for file in files])},
    "objects": lambda files: {"paths": np.array(files, object).reshape(2, -1)},
    "records": lambda files: {"rows": np.array([(str(f), 1) for f in files], "U200,i8")},
    "series": lambda files: {"paths": pd.Series([str(file) for file in files])},
    "category": lambda files: {"paths": pd.Series(map(str, files), dtype="category")},
    "index": lambda files: {"labels": pd.Series(range(len(files)), index=map(str, files))},
    "frame": lambda files: {"table": as_frame(files)},
    "set": lambda files: {"paths": {str(file) for file in files}},
    "keys": lambda files: {"labels": {str(file): 1 for file in files}},
    "dataclasses": lambda files: {"rows": [Row(str(file), 1) for file in files]},
    "folder": lambda files: {"root": files[0].parent, "names": [file.name for file in files]},
    "folder, rows": lambda files: {
        "names": [Row(file.name, 1) for file in files],
        "root": str(files[0].parent),
    },
    "folder, table": lambda files: {
        "root": str(files[0].parent),
        "table": pd.DataFrame({"label": 1, "file": [file.name for file in files]}),
    },
    "two folders": lambda files: {
        "names": (names := [file.name for file in files]),
        "root": str(files[0].parent.parent),
        "other": Named(files, folder=files[0].parent, names=names),
    },
}


@pytest.fixture
def six_files(tmp_path):
    files = [tmp_path / "images" / f"no {i}.png" for i in range(6)]
    files[0].parent.mkdir()
    for i, file in enumerate(files):
        Image.new("L", (3, 2), 40 * i).save(file)
    return files


@pytest.mark.parametrize("way", WAYS)
def test_a_changed_file_is_noticed_however_its_name_is_held(way, six_files):
    data = ConcatDataset([Named(six_files, **WAYS[way](six_files)), Listed()])
    stamps = file_stamps(data)
    assert [name for name, *_ in stamps] == [str(file) for file in six_files]
    assert file_stamps(data) == stamps
    os.utime(six_files[4], ns=(1, 1))
    assert [new == old for new, old in zip(file_stamps(data), stamps, strict=True)] == [
        place != 4 for place in range(6)
    ]


@pytest.mark.parametrize("way", ["strings", "frame", "folder, table"])
def test_no_run_of_other_files_is_given_out(way, six_files, tmp_path, monkeypatch):
    monkeypatch.setenv("TRIPLETLIB_CACHE", str(tmp_path / "cache"))

    def run():
        data, labels = Named(six_files, **WAYS[way](six_files)), torch.arange(6) % 3
        options = {"epochs": 1, "augment": False, "progress": False, "workers": 0}
        return load_or_fit(SmallNet, data, labels, **options)[0]

    first = run()
    assert same_weights(run(), first)
    assert len(list((tmp_path / "cache" / "networks").iterdir())) == 1
    for i, file in enumerate(six_files):
        Image.new("L", (3, 2), 250 - 40 * i).save(file)
    assert not same_weights(run(), first)


def test_each_place_is_looked_at_once_and_numbers_not_at_all(six_files, monkeypatch):
    looked, look, copied = Counter(), os.stat, []
    names = [file.name for file in six_files]
    numbers = [np.zeros(3), pd.Series([0.5] * 3), torch.zeros(3), pd.DataFrame({"x": [1]})]
    data = Named(six_files, root=six_files[0].parent, numbers=numbers, names=names * 5)
    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", lambda path, **o: looked.update([str(path)]) or look(path, **o))
        patch.setattr(np, "asarray", copied.append)
        assert len(file_stamps(data)) == 6
    assert copied == []
    assert {looked[str(file)] for file in six_files} == {looked[name] for name in names} == {1}


def test_targets_go_through_the_target_transform_and_those_of_a_part_only(folder):
    images = ImageFolder(folder, TO_TENSOR)
    images.target_transform = {0: 7, 2: torch.tensor(5)}.__getitem__  # as if there were no class 1
    chosen = [place for place, target in enumerate(images.targets) if target != 1][::-1]
    part = ConcatDataset([Subset(Subset(images, chosen), range(4, 16)), ImageFolder(folder)])
    found = labels_of(part, 0, progress=False).tolist()
    assert found == [int(images[place][1]) for place in chosen[4:]] + images.targets
    images.target_transform = lambda target: torch.eye(3)[target]
    with pytest.raises(
        ValueError, match=r"images\[0\] must have one whole number or word .* \(3,\)"
    ):
        labels_of(images, 0, progress=False)


def test_a_target_transform_that_draws_leaves_the_random_states(folder):
    images = ImageFolder(folder, target_transform=lambda target: int(torch.randint(9, ())))
    state = torch.get_rng_state()
    found = labels_of(images, 0, progress=False)
    assert torch.equal(found, labels_of(images, 0, progress=False))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("workers", [0, 2])
def test_labels_of_items_may_be_arrays_of_one_and_one_hot_ones_are_named(workers):
    for form in (np.array, lambda label: np.array([label]), lambda label: torch.tensor([label])):
        data = Listed(labels=[form(label) for label in LABELS.tolist()])
        assert torch.equal(labels_of(data, workers, progress=False), LABELS)
    words = Listed(labels=[np.array(word) for word in WORDS])
    assert torch.equal(labels_of(words, workers, progress=False), LABELS % 4)
    for one_hot in (torch.eye(3)[0], np.eye(3)[0]):
        data = Listed(labels=[*LABELS.tolist()[:70], one_hot, *LABELS.tolist()[71:]])
        message = r"images\[70\] must have one whole number or word .* \(3,\): .* its argmax"
        with pytest.raises(ValueError, match=message):
            labels_of(data, workers, progress=False)
