import copy
import functools
import random
import warnings

import numpy as np
import pytest
import torch
from problems import (
    DIFFERENT,
    IMAGES,
    LABELS,
    Locked,
    Shift,
    SmallNet,
    Stop,
    Taught,
    fitted,
    same_weights,
    stop_at,
)
from torch import nn

import tripletlib.checkpoints
import tripletlib.training
from tripletlib import BalancedBatchSampler, TripletLoss, batch_all_triplet_loss


def test_a_broken_run_resumes_to_the_same_weights(tmp_path):
    path = tmp_path / "folder" / "run.pt"
    whole, whole_history = fitted(epochs=3)
    with pytest.raises(Stop):
        fitted(epochs=3, checkpoint=path, callback=stop_at(10))
    steps = []
    torch.manual_seed(77)  # a new process starts from other weights
    resumed, history = fitted(
        SmallNet(), epochs=3, checkpoint=path, callback=lambda history: steps.append(len(history))
    )
    assert steps == list(range(8, 22))
    assert same_weights(resumed, whole)
    assert history["loss"].tolist() == whole_history["loss"].tolist()
    assert (np.diff(history["seconds"]) > 0).all()
    assert [file.name for file in path.parent.iterdir()] == ["run.pt"]
    again, same_history = fitted(SmallNet(), epochs=3, checkpoint=path, callback=stop_at(1))
    assert same_weights(again, whole)
    assert same_history.rows == history.rows


def test_a_finished_checkpoint_is_just_loaded(tmp_path):
    path = tmp_path / "run.pt"
    trained, history = fitted(checkpoint=path)
    again, same_history = fitted(SmallNet(), checkpoint=path, callback=stop_at(1))
    assert same_weights(trained, again)
    assert same_history.rows == history.rows
    assert not again.training
    torch.load(path, weights_only=True)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"images": IMAGES + 1}, "data"),
        ({"labels": LABELS.flip(0)}, "data"),
        ({"epochs": 3}, "settings"),
        ({"learning_rate": 1e-4}, "settings"),
        ({"loss": TripletLoss(margin=0.5)}, r"settings \(loss\)"),
        ({"augment": torch.neg, "seed": 7}, r"settings \(augment, seed\)"),
        ({"network": nn.Sequential(nn.Flatten(), nn.Linear(6, 3))}, "network"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path, change, part):
    path = tmp_path / "run.pt"
    fitted(checkpoint=path)
    content = path.read_bytes()
    with pytest.raises(ValueError, match=f"run.pt was made with other {part}: delete it"):
        fitted(checkpoint=path, **change)
    assert path.read_bytes() == content


def test_a_checkpoint_of_other_code_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "run.pt"
    fitted(checkpoint=path)
    monkeypatch.setattr(torch, "__version__", "0.0")
    with pytest.raises(ValueError, match="made with other code"):
        fitted(checkpoint=path)


@pytest.mark.parametrize("content", [b"", b"no checkpoint", "half", {"epoch": 1}])
def test_a_damaged_checkpoint_is_named(tmp_path, content):
    path = tmp_path / "run.pt"
    fitted(checkpoint=path)
    if content == "half":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif isinstance(content, dict):
        torch.save(content, path)
    else:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"run.pt is damaged or not a checkpoint"):
        fitted(checkpoint=path)


def test_a_checkpoint_that_cannot_be_written_is_found_out_before_training(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="file"):
        fitted(checkpoint=tmp_path / "file" / "run.pt", callback=stop_at(1))


def test_a_killed_write_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "run.pt"
    with pytest.raises(Stop):
        fitted(epochs=3, checkpoint=path, callback=stop_at(8))
    content = path.read_bytes()

    def half(state, stream):
        stream.write(b"half")
        raise Stop

    monkeypatch.setattr(tripletlib.checkpoints.torch, "save", half)
    with pytest.raises(Stop):
        fitted(epochs=3, checkpoint=path)
    assert path.read_bytes() == content
    assert [file.name for file in tmp_path.iterdir()] == ["run.pt"]


def test_a_folder_keeps_runs_from_other_weights_apart(tmp_path):
    first, _ = fitted(checkpoint=tmp_path)
    torch.manual_seed(6)
    second, _ = fitted(SmallNet(), checkpoint=tmp_path)
    again, _ = fitted(checkpoint=tmp_path, callback=stop_at(1))
    assert len(list(tmp_path.iterdir())) == 2
    assert same_weights(first, again)
    assert not same_weights(first, second)


def sampled(**options):
    """Train with a sampler whose generator is its own."""
    torch.manual_seed(5)
    sampler = options.pop("batch_sampler", None) or BalancedBatchSampler(
        LABELS, 4, 3, generator=torch.Generator().manual_seed(3)
    )
    return fitted(SmallNet(), batch_sampler=sampler, epochs=3, **options)[0]


def test_a_broken_run_resumes_with_a_sampler_that_has_a_generator(tmp_path):
    whole = sampled()
    with pytest.raises(Stop):
        sampled(checkpoint=tmp_path / "run.pt", callback=stop_at(20))
    assert same_weights(sampled(checkpoint=tmp_path / "run.pt"), whole)


def test_a_broken_run_resumes_in_the_same_session_with_the_same_sampler(tmp_path):
    sampler = BalancedBatchSampler(LABELS, 4, 3, generator=torch.Generator().manual_seed(3))
    whole = sampled()
    with pytest.raises(Stop):
        sampled(batch_sampler=sampler, checkpoint=tmp_path / "run.pt", callback=stop_at(20))
    again = sampled(batch_sampler=sampler, checkpoint=tmp_path / "run.pt")
    assert same_weights(again, whole)
    other = BalancedBatchSampler(LABELS, 4, 3, generator=torch.Generator().manual_seed(4))
    with pytest.raises(ValueError, match="made with other settings"):
        sampled(batch_sampler=other, checkpoint=tmp_path / "run.pt")


class Sampler:
    """Shuffles anew each epoch by a generator of NumPy, Python, or the number of the epoch."""

    def __init__(self, kind):
        self.epoch = 0
        self.kind = kind
        self.generator = {"numpy": np.random.default_rng(3), "python": random.Random(3)}.get(kind)

    def __len__(self):
        return 5

    def __iter__(self):
        order = list(range(len(LABELS)))
        if self.kind == "epoch":
            np.random.default_rng(self.epoch).shuffle(order)
        elif self.kind == "global":
            np.random.shuffle(order)  # noqa: NPY002
            random.shuffle(order)
        else:
            self.generator.shuffle(order)
        self.epoch += 1
        return iter([order[i : i + 20] for i in range(0, 100, 20)])


@pytest.mark.parametrize("kind", ["numpy", "python", "epoch", "global"])
def test_a_broken_run_resumes_with_a_sampler_of_ones_own(kind, tmp_path):
    whole = sampled(batch_sampler=Sampler(kind))
    with pytest.raises(Stop):
        sampled(batch_sampler=Sampler(kind), checkpoint=tmp_path / "run.pt", callback=stop_at(8))
    resumed = sampled(batch_sampler=Sampler(kind), checkpoint=tmp_path / "run.pt")
    assert same_weights(resumed, whole)


class Counting(nn.Module):
    """A loss with weights, a queue that is no buffer, and a margin that grows."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(3))
        self.queue = torch.zeros(3)
        self.margin = 0.1

    def forward(self, embeddings, labels):
        self.margin *= 1.05
        self.queue = 0.9 * self.queue + 0.1 * embeddings.detach().mean(dim=0)
        return TripletLoss(self.margin)((embeddings - self.queue) * self.scale, labels)


def test_a_broken_run_resumes_with_a_loss_that_has_weights_and_a_memory(tmp_path):
    def run(**options):
        torch.manual_seed(6)
        loss = Counting()
        torch.manual_seed(5)
        network, history = fitted(SmallNet(), loss=loss, epochs=3, **options)
        return network, loss, history

    network, loss, history = run()
    with pytest.raises(Stop):
        run(checkpoint=tmp_path / "run.pt", callback=stop_at(10))
    again, same_loss, same_history = run(checkpoint=tmp_path / "run.pt")
    assert same_weights(network, again)
    assert torch.equal(loss.scale, same_loss.scale)
    assert loss.margin == same_loss.margin
    assert history["loss"].tolist() == same_history["loss"].tolist()
    # In a new process the weights of the loss begin elsewhere; the checkpoint's hold.
    torch.manual_seed(99)
    finished, _ = fitted(SmallNet(), loss=Counting(), epochs=3, checkpoint=tmp_path / "run.pt")
    assert same_weights(network, finished)


class Remembering(Sampler):
    """Remembers in a way that no checkpoint holds."""

    def __init__(self):
        super().__init__("epoch")
        self.seen = []

    def __iter__(self):
        self.seen.append(len(self.seen))
        return super().__iter__()


def test_what_a_checkpoint_cannot_hold_is_told(tmp_path):
    with pytest.raises(Stop):
        sampled(batch_sampler=Remembering(), checkpoint=tmp_path / "run.pt", callback=stop_at(8))
    with pytest.warns(UserWarning, match="batch_sampler changed while training in a way") as caught:
        sampled(batch_sampler=Remembering(), checkpoint=tmp_path / "run.pt")
    assert len(caught) == 1


@pytest.mark.parametrize("make", [lambda: {"augment": Shift(0)}, lambda: {"loss": Taught(0.1)}])
def test_a_broken_run_resumes_with_weights_that_are_not_the_networks(make, tmp_path):
    whole, _ = fitted(epochs=3, **make())
    with pytest.raises(Stop):
        fitted(epochs=3, checkpoint=tmp_path / "run.pt", callback=stop_at(10), **make())
    again, _ = fitted(epochs=3, checkpoint=tmp_path / "run.pt", **make())
    assert same_weights(again, whole)


def test_nothing_is_told_of_a_run_that_does_not_go_on(tmp_path):
    sampled(batch_sampler=Remembering(), checkpoint=tmp_path / "run.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sampled(batch_sampler=Remembering(), checkpoint=tmp_path / "run.pt")


def test_numbers_of_numpy_are_kept_like_pythons(tmp_path):
    def note(history):
        history.rows[-1]["accuracy"] = np.float64(0.5)

    numbers = {"epochs": np.int64(2), "batch_size": np.int64(16), "seed": np.int64(1)}
    numbers["learning_rate"] = np.float32(1e-3)
    path = tmp_path / "run.pt"
    first, history = fitted(checkpoint=path, callback=note, **numbers)
    again, same = fitted(checkpoint=path, callback=stop_at(1), **numbers)
    assert same_weights(first, again)
    assert same["accuracy"].tolist() == history["accuracy"].tolist()
    python = {name: number.item() for name, number in numbers.items()}
    fitted(checkpoint=path, callback=stop_at(1), **python)


def test_a_folder_knows_a_run_without_a_seed_again(tmp_path):
    first, _ = fitted(seed=None, checkpoint=tmp_path)
    again, _ = fitted(seed=None, checkpoint=tmp_path, callback=stop_at(1))
    assert same_weights(first, again)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_seed_left_out_is_remembered(tmp_path):
    network = SmallNet()
    fitted(network, seed=None, checkpoint=tmp_path / "run.pt")
    weights = copy.deepcopy(network.state_dict())
    fitted(network, seed=None, checkpoint=tmp_path / "run.pt", callback=stop_at(1))
    assert all(torch.equal(w, network.state_dict()[name]) for name, w in weights.items())
    with pytest.raises(ValueError, match="made with other settings"):
        fitted(network, seed=1, checkpoint=tmp_path / "run.pt")


def test_a_broken_run_without_a_seed_resumes_to_the_same_weights(tmp_path):
    def run(**options):
        torch.manual_seed(5)
        return fitted(SmallNet(), seed=None, epochs=3, **options)[0]

    whole = run()
    with pytest.raises(Stop):
        run(checkpoint=tmp_path / "run.pt", callback=stop_at(10))
    torch.manual_seed(1234)
    assert same_weights(
        fitted(SmallNet(), seed=None, epochs=3, checkpoint=tmp_path / "run.pt")[0], whole
    )


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float64])
def test_a_broken_run_resumes_in_other_precisions(kind, tmp_path):
    def run(**options):
        torch.manual_seed(5)
        network = SmallNet().to(kind)
        return fitted(network, IMAGES.to(kind), epochs=3, **options)[0]

    whole = run()
    with pytest.raises(Stop):
        run(checkpoint=tmp_path / "run.pt", callback=stop_at(10))
    assert same_weights(run(checkpoint=tmp_path / "run.pt"), whole)


@pytest.mark.parametrize("options", DIFFERENT.values(), ids=DIFFERENT)
def test_runs_that_differ_in_what_no_text_shows_are_told_apart(options, tmp_path):
    fitted(checkpoint=tmp_path / "run.pt", epochs=1, **options(0.2))
    fitted(checkpoint=tmp_path / "run.pt", epochs=1, callback=stop_at(1), **options(0.2))
    with pytest.raises(
        ValueError, match=r"made with other (settings|network)( \(\w+\))?: delete it"
    ):
        fitted(checkpoint=tmp_path / "run.pt", epochs=1, **options(0.4))


def test_a_run_that_cannot_be_told_from_others_is_taken_at_its_word_from_a_file_only(tmp_path):
    first, _ = fitted(loss=Locked(), checkpoint=tmp_path / "run.pt")
    match = r"taken to be of this run, .* by loss.lock, of type .*, nor how that changed"
    with pytest.warns(UserWarning, match=match) as caught:
        again, _ = fitted(loss=Locked(), checkpoint=tmp_path / "run.pt", callback=stop_at(1))
    assert same_weights(first, again)
    assert len(caught) == 1
    with pytest.raises(ValueError, match=r"checkpoint must be a file, .* loss.lock"):
        fitted(loss=Locked(), checkpoint=tmp_path)


def test_every_flipped_byte_of_the_weights_is_noticed(tmp_path):
    path = tmp_path / "run.pt"
    network, _ = fitted(checkpoint=path, epochs=1)
    sound = path.read_bytes()
    weights = network[1].weight.detach().numpy().tobytes()
    start = sound.index(weights)
    for place in range(start, start + len(weights), 5):
        path.write_bytes(sound[:place] + bytes([sound[place] ^ 1]) + sound[place + 1 :])
        with pytest.raises(ValueError, match="run.pt is damaged"):
            fitted(checkpoint=path, epochs=1)
    path.write_bytes(sound)
    fitted(checkpoint=path, epochs=1, callback=stop_at(1))


def test_files_of_the_readers_home_and_links(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    fitted(checkpoint="~/run.pt", epochs=1)
    assert (tmp_path / "run.pt").is_file()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link.pt").symlink_to(tmp_path / "elsewhere" / "run.pt")
    fitted(checkpoint=tmp_path / "link.pt", epochs=1)
    assert (tmp_path / "link.pt").is_symlink()
    assert [file.name for file in (tmp_path / "elsewhere").iterdir()] == ["run.pt"]


def test_a_partial_goes_on_in_the_same_process(tmp_path):
    options = {
        "optimizer": functools.partial(torch.optim.SGD, lr=0.1),
        "loss": functools.partial(batch_all_triplet_loss, margin=0.3),
    }
    first, _ = fitted(checkpoint=tmp_path / "run.pt", **options)
    again, _ = fitted(checkpoint=tmp_path / "run.pt", callback=stop_at(1), **options)
    assert same_weights(first, again)


def test_arrays_of_a_callback_are_kept_and_what_cannot_be_is_refused(tmp_path):
    def note(value):
        return lambda history: history.rows[-1].update(extra=value)

    fitted(checkpoint=tmp_path / "run.pt", callback=note(np.ones(2)))
    _, history = fitted(checkpoint=tmp_path / "run.pt")
    assert history.rows[-1]["extra"] == [1.0, 1.0]
    with pytest.raises(TypeError, match="history must hold .* got set for 'extra'"):
        fitted(checkpoint=tmp_path / "other.pt", callback=note({1}))
    assert not (tmp_path / "other.pt").exists()
