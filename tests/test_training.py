import copy
import functools

import numpy as np
import pytest
import torch
from pytorch_metric_learning import losses as pml_losses
from torch import nn

import tripletlib.training
from tripletlib import (
    BalancedBatchSampler,
    EmbeddingNet,
    History,
    TripletLoss,
    describe_triplets,
    embed,
    fit,
    jitter,
    load_or_fit,
)


class SmallNet(nn.Sequential):
    """A network that has what makes training hard to repeat: batch statistics and dropout."""

    def __init__(self, inputs=6):
        super().__init__(
            nn.Flatten(),
            nn.Linear(inputs, 8),
            nn.BatchNorm1d(8),
            nn.ReLU(),
            nn.Dropout(0.2),
            nn.Linear(8, 3),
        )


def problem(count=100, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (count,), generator=generator)
    centres = 2 * torch.randn(4, 1, 2, 3, generator=generator)
    return centres[labels] + torch.randn(count, 1, 2, 3, generator=generator), labels


IMAGES, LABELS = problem()


def fitted(network=None, images=IMAGES, labels=LABELS, **options):
    if network is None:
        torch.manual_seed(5)
        network = SmallNet()
    options = {"batch_size": 16, "seed": 1, "progress": False, "augment": False} | options
    history = fit(network, images, labels, **options)
    return network, history


def same_weights(first, second):
    pairs = zip(first.state_dict().items(), second.state_dict().items(), strict=True)
    return all(name == other and torch.equal(a, b) for (name, a), (other, b) in pairs)


def test_training_lowers_the_loss_and_leaves_the_network_ready_to_use():
    torch.manual_seed(5)
    before = describe_triplets(embed(SmallNet(), IMAGES), LABELS, margin=0.0)
    network, history = fitted(epochs=30, learning_rate=0.02)
    after = describe_triplets(embed(network, IMAGES), LABELS, margin=0.0)
    assert history["loss"][-7:].mean() < 0.7 * history["loss"][:7].mean()
    assert after.hard < 0.5 * before.hard  # triplets in the wrong order, whatever the scale
    assert not network.training


def test_images_are_jittered_by_default_and_feature_rows_are_not():
    seen = []

    class Spy(SmallNet):
        def forward(self, images):
            seen.append(images)
            return super().forward(images)

    everything = {"epochs": 1, "batch_size": 100}
    fitted(Spy(), augment=None, **everything)
    fitted(Spy(), augment=jitter, **everything)
    fitted(Spy(), augment=False, **everything)
    fitted(Spy(), augment=None, images=IMAGES.flatten(1), **everything)
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])
    assert torch.equal(seen[2].flatten(1), seen[3])


def test_history_has_a_row_a_step_that_says_what_happened():
    network = nn.Sequential(nn.Flatten(), nn.Linear(6, 3))
    untrained = copy.deepcopy(network)
    loss = TripletLoss(margin=0.7, squared=False)
    _, history = fitted(network, batch_size=100, epochs=3, loss=loss)
    assert len(history) == 3
    assert history["epoch"].tolist() == [0, 1, 2]
    assert history["step"].tolist() == [0, 1, 2]
    assert (np.diff(history["seconds"]) > 0).all()
    embeddings = untrained(IMAGES).detach()
    assert history["loss"][0] == pytest.approx(loss(embeddings, LABELS).item(), rel=1e-5)
    state = describe_triplets(embeddings, LABELS, 0.7, squared=False)
    for column in ("active", "positive_distance", "negative_distance", "spread"):
        assert history[column][0] == pytest.approx(getattr(state, column), rel=1e-4)
    assert list(history.frame().columns) == list(history.rows[0])
    assert history.frame().shape[0] == 3
    with pytest.raises(KeyError, match="no column 'accuracy'; there are"):
        history["accuracy"]
    assert repr(history).startswith("History of 3 steps: loss ")
    assert repr(History()) == "History of 0 steps"


def test_every_image_is_seen_once_an_epoch():
    seen = []

    class Spy(SmallNet):
        def forward(self, images):
            seen.append(images.flatten(1).sum(dim=1))
            return super().forward(images)

    fitted(Spy(), epochs=2, batch_size=32)
    assert [len(batch) for batch in seen] == [32, 32, 32, 4] * 2
    expected = IMAGES.flatten(1).sum(dim=1).sort().values
    for epoch in (seen[:4], seen[4:]):
        torch.testing.assert_close(torch.cat(epoch).sort().values, expected)
    assert not torch.equal(seen[0], seen[4])


def test_a_last_batch_of_one_is_left_out():
    _, history = fitted(images=IMAGES[:33], labels=LABELS[:33], epochs=1)
    assert len(history) == 2


def test_the_same_seed_gives_the_same_weights():
    first, _ = fitted()
    second, _ = fitted()
    other, _ = fitted(seed=2)
    assert same_weights(first, second)
    assert not same_weights(first, other)


def test_the_global_random_state_is_left_as_it_was():
    network = SmallNet()
    torch.manual_seed(8)
    expected = torch.rand(3)
    torch.manual_seed(8)
    fitted(network)
    assert torch.equal(torch.rand(3), expected)


def test_without_a_seed_runs_differ_but_follow_the_global_one():
    def run(global_seed):
        torch.manual_seed(5)
        network = SmallNet()
        torch.manual_seed(global_seed)
        return fitted(network, seed=None)[0]

    assert same_weights(run(1), run(1))
    assert not same_weights(run(1), run(2))


class Stop(Exception):
    pass


def stop_at(step):
    def callback(history):
        if len(history) == step:
            raise Stop

    return callback


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
        ({"loss": TripletLoss(margin=0.5)}, "settings"),
        ({"augment": torch.neg}, "settings"),
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

    monkeypatch.setattr(tripletlib.training.torch, "save", half)
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


def test_augment_changes_what_the_network_sees_and_follows_the_seed():
    def augment(images):
        return images + torch.randn_like(images)

    first, _ = fitted(augment=augment)
    second, _ = fitted(augment=augment)
    plain, _ = fitted()
    assert same_weights(first, second)
    assert not same_weights(first, plain)


def test_a_batch_sampler_replaces_the_shuffled_batches():
    sampler = BalancedBatchSampler(LABELS, 4, 3)
    sizes = []

    class Spy(SmallNet):
        def forward(self, images):
            sizes.append(len(images))
            return super().forward(images)

    _, history = fitted(Spy(), batch_sampler=sampler)
    assert sizes == [12] * 16
    assert len(history) == 16


def test_losses_of_pytorch_metric_learning_work_and_their_own_weights_are_trained():
    _, history = fitted(loss=pml_losses.SupConLoss(), epochs=6)
    assert history["loss"][-1] < history["loss"][0]
    loss = pml_losses.ProxyAnchorLoss(num_classes=4, embedding_size=3)
    before = loss.proxies.detach().clone()
    fitted(loss=loss)
    assert not torch.equal(loss.proxies, before)


def test_bf16_trains_the_network_in_bfloat16_and_hands_the_loss_float32():
    seen = []

    class Spy(TripletLoss):
        def forward(self, embeddings, labels):
            seen.append(embeddings.dtype)
            return super().forward(embeddings, labels)

    class SpyNet(SmallNet):
        def forward(self, images):
            points = super().forward(images)
            seen.append(points.dtype)
            return points

    _, history = fitted(SpyNet(), loss=Spy(), bf16=True, epochs=10)
    assert set(seen[::2]) == {torch.bfloat16}
    assert set(seen[1::2]) == {torch.float32}
    assert history["loss"][-7:].mean() < history["loss"][:7].mean()
    seen.clear()
    fitted(SpyNet(), loss=Spy(), bf16=False)
    assert set(seen) == {torch.float32}


@pytest.mark.parametrize("capabilities", [{}, {"amx_bf16": False}, {"amx_bf16": True}])
def test_bf16_is_chosen_only_with_amx(monkeypatch, capabilities):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    chosen = tripletlib.training._has_fast_bf16(torch.device("cpu"))
    assert chosen == capabilities.get("amx_bf16", False)
    assert not tripletlib.training._has_fast_bf16(torch.device("cuda"))


def test_one_class_only_trains_without_harm():
    network, history = fitted(labels=torch.zeros_like(LABELS))
    assert history["loss"].tolist() == [0.0] * len(history)
    assert all(torch.isfinite(weight).all() for weight in network.parameters())


def test_the_bar_shows_loss_and_active_fraction(capsys):
    fitted(progress=True)
    shown = capsys.readouterr().out
    assert "14/14" in shown
    assert "loss=" in shown
    assert "active=" in shown
    fitted(progress=False)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"network": len}, TypeError, "network must be an nn.Module with parameters"),
        ({"network": nn.Flatten()}, TypeError, "network must be an nn.Module with parameters"),
        ({"images": IMAGES.numpy()}, TypeError, "images must be a torch.Tensor, got ndarray"),
        ({"images": IMAGES.byte()}, TypeError, "images must be floating point, got torch.uint8"),
        ({"images": IMAGES[:0], "labels": LABELS[:0]}, ValueError, "at least one image"),
        ({"images": IMAGES[:1], "labels": LABELS[:1]}, ValueError, "at least 2, got 1"),
        ({"labels": LABELS[:5]}, ValueError, r"labels must have shape \(100,\), .* of images"),
        ({"labels": LABELS.float()}, TypeError, "labels must be integers"),
        ({"epochs": 0}, ValueError, "epochs must be a whole number of at least 1, got 0"),
        ({"batch_size": 1}, ValueError, "batch_size must be a whole number of at least 2"),
        ({"seed": -1}, ValueError, "seed must be a whole number of at least 0, got -1"),
        ({"learning_rate": 0.0}, ValueError, "learning_rate must be a finite number above 0"),
        ({"learning_rate": float("nan")}, ValueError, "learning_rate must be a finite number"),
        ({"batch_sampler": iter([])}, TypeError, "batch_sampler must have a length"),
        ({"images": IMAGES * torch.nan}, ValueError, "embeddings must be finite"),
        ({"loss": lambda z, _: z.sum() * torch.inf}, FloatingPointError, "loss is -?(inf|nan)"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    with pytest.raises(error, match=message):
        fitted(**change)


def test_embed_gives_the_same_rows_for_any_batch_size():
    images = torch.randn(23, 1, 28, 28)
    network = EmbeddingNet()
    network(images)  # moves the batch statistics away from their start
    rows = embed(network, images)
    assert rows.shape == (23, 64)
    assert not rows.requires_grad
    for batch_size in (1, 7, 23):
        torch.testing.assert_close(embed(network, images, batch_size), rows, atol=1e-6, rtol=0)
    network.eval()
    torch.testing.assert_close(network(images).detach(), rows, atol=1e-6, rtol=0)


def test_embed_leaves_the_mode_as_it_was_even_if_it_fails():
    network = EmbeddingNet().train()
    embed(network, torch.randn(2, 1, 28, 28))
    assert network.training
    with pytest.raises(ValueError, match="images must have shape"):
        embed(network, torch.randn(2, 3, 28, 28))
    assert network.training
    frozen = network.layers[1].eval()
    embed(network, torch.randn(2, 1, 28, 28))
    assert network.training
    assert not frozen.training
    embed(network.eval(), torch.randn(2, 1, 28, 28))
    assert not network.training


@pytest.mark.parametrize(
    ("images", "batch_size", "error", "message"),
    [
        (torch.zeros(0, 1, 28, 28), 8, ValueError, "images must hold at least one image"),
        (torch.zeros(2, 1, 28, 28, dtype=torch.uint8), 8, TypeError, "floating point"),
        (torch.zeros(2, 1, 28, 28), 0, ValueError, "batch_size must be a whole number"),
    ],
)
def test_embed_refuses_bad_arguments(images, batch_size, error, message):
    with pytest.raises(error, match=message):
        embed(EmbeddingNet(), images, batch_size)
