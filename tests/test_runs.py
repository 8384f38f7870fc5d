import copy
import functools
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from problems import DIFFERENT, IMAGES, LABELS, Locked, SmallNet, Stop, same_weights, stop_at
from torch import nn

from tripletlib import BalancedBatchSampler, load_or_fit


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRIPLETLIB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "networks"


options = {"batch_size": 16, "progress": False, "augment": False}


def test_load_or_fit_trains_once(cache):
    first, history = load_or_fit(SmallNet, IMAGES, LABELS, **options)
    torch.manual_seed(123)
    second, same = load_or_fit(SmallNet, IMAGES, LABELS, callback=stop_at(1), **options)
    assert same_weights(first, second)
    assert same.rows == history.rows
    assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"images": IMAGES + 1},
        {"epochs": 1},
        {"make_network": functools.partial(nn.Sequential, nn.Flatten(), nn.Linear(6, 2))},
    ],
)
def test_load_or_fit_trains_anew_what_differs(cache, change):
    arguments = {"make_network": SmallNet, "images": IMAGES, "labels": LABELS}
    load_or_fit(**arguments, **options)
    with pytest.raises(Stop):
        load_or_fit(**(arguments | change), callback=stop_at(1), **options)


def test_load_or_fit_trains_anew_when_told(cache):
    first, _ = load_or_fit(SmallNet, IMAGES, LABELS, **options)
    with pytest.raises(Stop):
        load_or_fit(SmallNet, IMAGES, LABELS, retrain=True, callback=stop_at(1), **options)
    again, _ = load_or_fit(SmallNet, IMAGES, LABELS, retrain=True, **options)
    assert same_weights(first, again)
    assert len(list(cache.iterdir())) == 1


def test_load_or_fit_without_a_cache_warns_and_trains(tmp_path, monkeypatch):
    expected, _ = load_or_fit(SmallNet, IMAGES, LABELS, **options)
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("TRIPLETLIB_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="TRIPLETLIB_CACHE") as caught:
        network, _ = load_or_fit(SmallNet, IMAGES, LABELS, **options)
    assert caught[0].filename == __file__
    assert same_weights(network, expected)


def test_load_or_fit_without_a_home_folder_warns_and_trains(monkeypatch):
    expected, _ = load_or_fit(SmallNet, IMAGES, LABELS, **options)

    def unknown(self):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", unknown)
    with pytest.warns(UserWarning, match="cannot keep trained networks .no home folder") as caught:
        network, _ = load_or_fit(SmallNet, IMAGES, LABELS, **options)
    assert [warning.filename for warning in caught] == [__file__]
    assert same_weights(network, expected)


def test_a_cache_that_fails_in_the_middle_loses_no_training(cache, monkeypatch):
    expected, _ = load_or_fit(SmallNet, IMAGES, LABELS, **options)
    for file in cache.iterdir():
        file.unlink()

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.warns(UserWarning, match="cannot keep trained networks .no space left") as caught:
        network, _ = load_or_fit(SmallNet, IMAGES, LABELS, **options)
    assert len(caught) == 1
    assert same_weights(network, expected)
    assert list(cache.iterdir()) == []


def test_an_error_of_ones_own_loss_is_not_taken_for_the_caches(cache):
    def loss(embeddings, labels):
        raise FileNotFoundError("my own file")

    with pytest.raises(FileNotFoundError, match="my own file"):
        load_or_fit(SmallNet, IMAGES, LABELS, loss=loss, **options)


@pytest.mark.parametrize("content", [b"", b"no checkpoint", "half", "flipped"])
def test_a_damaged_file_in_the_cache_is_replaced_with_a_warning(cache, content):
    expected, _ = load_or_fit(SmallNet, IMAGES, LABELS, **options)
    (file,) = cache.iterdir()
    sound = file.read_bytes()
    weight = sound.index(expected[1].weight.detach().numpy().tobytes())
    flipped = sound[:weight] + bytes([sound[weight] ^ 1]) + sound[weight + 1 :]
    broken = {"half": sound[: len(sound) // 2], "flipped": flipped}
    file.write_bytes(broken.get(content, content))
    with pytest.warns(UserWarning, match=r"is damaged .*; training anew, and replacing it"):
        again, _ = load_or_fit(SmallNet, IMAGES, LABELS, **options)
    assert same_weights(again, expected)
    loaded, _ = load_or_fit(SmallNet, IMAGES, LABELS, callback=stop_at(1), **options)
    assert same_weights(loaded, expected)


@pytest.mark.parametrize("change", DIFFERENT.values(), ids=DIFFERENT)
def test_load_or_fit_tells_apart_what_no_text_shows(cache, change):
    def run(value, **more):
        arguments = options | change(value) | more
        network = arguments.pop("network", None)
        make = SmallNet if network is None else lambda: copy.deepcopy(network)
        return load_or_fit(make, IMAGES, LABELS, **arguments)

    torch.manual_seed(0)
    run(0.2)
    torch.manual_seed(0)
    run(0.2, callback=stop_at(1))
    torch.manual_seed(0)
    with pytest.raises(Stop):
        run(0.4, callback=stop_at(1))


def test_load_or_fit_tells_apart_a_generator_that_has_moved_on(cache):
    generator = torch.Generator().manual_seed(3)
    sampler = BalancedBatchSampler(LABELS, 4, 3, generator=generator)
    first, _ = load_or_fit(SmallNet, IMAGES, LABELS, batch_sampler=sampler, **options)
    with pytest.raises(Stop):
        load_or_fit(SmallNet, IMAGES, LABELS, batch_sampler=sampler, callback=stop_at(1), **options)
    generator.manual_seed(3)
    again, _ = load_or_fit(
        SmallNet, IMAGES, LABELS, batch_sampler=sampler, callback=stop_at(1), **options
    )
    assert same_weights(first, again)


def test_what_cannot_be_identified_is_not_cached_and_that_is_said_once(cache):
    for _ in range(2):
        with pytest.warns(UserWarning, match=r"not kept: loss.lock, of type _thread") as caught:
            load_or_fit(SmallNet, IMAGES, LABELS, loss=Locked(), **options)
        assert [warning.filename for warning in caught] == [__file__]
    assert not cache.exists()


class Counting(BalancedBatchSampler):
    """Its number of images a class grows in a list, which no checkpoint holds."""

    def __init__(self):
        super().__init__(LABELS, 4, 3)
        self.epochs = []

    def __iter__(self):
        self.epochs.append(0)
        batches = super().__iter__()
        return batches if len(self.epochs) % 2 else (batch[::-1] for batch in batches)


def test_a_run_that_was_broken_off_and_cannot_go_on_is_made_anew(cache):
    expected, _ = load_or_fit(
        SmallNet, IMAGES, LABELS, batch_sampler=Counting(), retrain=True, **options
    )
    for file in cache.iterdir():
        file.unlink()
    with pytest.raises(Stop):
        load_or_fit(
            SmallNet, IMAGES, LABELS, batch_sampler=Counting(), callback=stop_at(10), **options
        )
    with pytest.warns(UserWarning, match="broken off, and does not hold how batch_sampler changed"):
        network, history = load_or_fit(
            SmallNet, IMAGES, LABELS, batch_sampler=Counting(), **options
        )
    assert same_weights(network, expected)
    assert len(history) == 2 * len(Counting())
    again, _ = load_or_fit(
        SmallNet, IMAGES, LABELS, batch_sampler=Counting(), callback=stop_at(1), **options
    )
    assert same_weights(again, expected)


@pytest.mark.parametrize("learning_rate", np.logspace(-3, -2, 2))
def test_load_or_fit_keeps_a_run_whose_numbers_are_numpys(cache, learning_rate):
    arguments = options | {"learning_rate": learning_rate, "seed": np.int64(3)}
    first, _ = load_or_fit(SmallNet, IMAGES, LABELS, **arguments)
    again, _ = load_or_fit(SmallNet, IMAGES, LABELS, callback=stop_at(1), **arguments)
    assert same_weights(first, again)


def test_load_or_fit_builds_the_network_itself():
    with pytest.raises(TypeError, match="make_network must be a function or class .* SmallNet"):
        load_or_fit(SmallNet(), IMAGES, LABELS, **options)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float64])
def test_load_or_fit_keeps_networks_of_any_precision(kind, cache):
    def make():
        return nn.Sequential(nn.Flatten(), nn.Linear(6, 3)).to(kind)

    first, _ = load_or_fit(make, IMAGES.to(kind), LABELS, **options)
    again, _ = load_or_fit(make, IMAGES.to(kind), LABELS, callback=stop_at(1), **options)
    assert same_weights(first, again)


def test_load_or_fit_keeps_its_own_checkpoint():
    with pytest.raises(TypeError, match="load_or_fit keeps its own checkpoint"):
        load_or_fit(SmallNet, IMAGES, LABELS, checkpoint="run.pt", **options)


def test_initial_weights_by_any_generator_are_those_of_the_seed():
    def make():
        network = nn.Sequential(nn.Flatten(), nn.Linear(6, 3))
        network[1].weight.data = torch.from_numpy(np.random.randn(3, 6)).float()  # noqa: NPY002
        network[1].bias.data.fill_(random.random())
        return network

    before = np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
    one, other = (load_or_fit(make, IMAGES, LABELS, epochs=1, progress=False) for _ in range(2))
    assert all(map(torch.equal, one[0].parameters(), other[0].parameters()))
    assert (np.random.get_state()[1].tolist(), random.getstate()) == before  # noqa: NPY002
    load_or_fit(make, IMAGES, LABELS, epochs=1, progress=False, seed=2**70)
