import copy
import random

import numpy as np
import problems
import pytest
import torch
from devices import DEVICES, FAKE, FakeDevice, NoDouble
from problems import IMAGES, LABELS, SmallNet, fitted, same_weights
from pytorch_metric_learning import losses as pml_losses
from torch import nn
from torch.nn.utils import parametrizations, prune

import tripletlib.checkpoints
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
)


def test_training_lowers_the_loss_and_leaves_the_network_ready_to_use():
    torch.manual_seed(5)
    before = describe_triplets(embed(SmallNet(), IMAGES), LABELS, margin=0.0)
    network, history = fitted(epochs=30, learning_rate=0.02)
    after = describe_triplets(embed(network, IMAGES), LABELS, margin=0.0)
    assert history["loss"][-7:].mean() < 0.7 * history["loss"][:7].mean()
    assert after.hard < 0.5 * before.hard  # triplets in the wrong order, whatever the scale
    assert not network.training


@pytest.mark.parametrize("steps", range(1, 13))
def test_a_run_may_have_any_number_of_steps(steps):
    _, history = fitted(
        images=IMAGES[: 8 * steps], labels=LABELS[: 8 * steps], batch_size=8, epochs=1
    )
    assert len(history) == steps
    assert np.isfinite(history["loss"]).all()
    assert (history["learning_rate"] > 0).all()


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


def test_the_bar_of_a_run_that_is_only_read_again_shows_no_time(tmp_path, capsys):
    options = {"checkpoint": tmp_path / "run.pt", "epochs": 1}
    fitted(**options, progress=True)
    assert "batch/s" in capsys.readouterr().out
    fitted(**options, progress=True)
    shown = capsys.readouterr().out
    assert "7/7 trained before" in shown
    assert "batch/s" not in shown


class Detached(SmallNet):
    def forward(self, images):
        return super().forward(images).detach()


class Several(SmallNet):
    def forward(self, images):
        return super().forward(images), 0


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"network": len}, TypeError, "network must be an nn.Module with parameters"),
        ({"network": nn.Flatten()}, TypeError, "network must be an nn.Module with parameters"),
        (
            {"images": IMAGES.numpy()},
            TypeError,
            "images must be a torch.Tensor or a map-style torch Dataset, got ndarray",
        ),
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
        ({"augment": True}, TypeError, "augment must be callable, False or None, got True"),
        ({"callback": 3}, TypeError, "callback must be callable, got 3"),
        ({"bf16": "x"}, TypeError, "bf16 must be True, False or None, got 'x'"),
        ({"network": Detached()}, ValueError, "embeddings that depend on its parameters, got det"),
        ({"network": Several()}, TypeError, "embeddings must be a torch.Tensor, got tuple"),
        ({"network": Several(), "bf16": True}, TypeError, "embeddings must be a torch.Tensor"),
        ({"loss": lambda z, _: z.sum() * 1j}, TypeError, "must return a real number, got"),
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
    with pytest.raises(TypeError, match="network must be an nn.Module, got NoneType"):
        embed(None, torch.zeros(2, 1, 28, 28))
    with pytest.raises(TypeError, match="network must give a tensor, got tuple"):
        embed(Several(), IMAGES)


class Margin(nn.Module):
    def __init__(self, margin, squared=True):
        super().__init__()
        self.margin, self.squared = margin, squared

    def forward(self, embeddings, labels):
        return TripletLoss(0.5)(embeddings, labels)


@pytest.mark.parametrize(
    ("margin", "used"),
    [
        (None, 0.2),
        ("soft", 0.2),
        (-0.1, 0.2),
        (float("nan"), 0.2),
        (float("inf"), 0.2),
        (True, 0.2),
        (torch.tensor([0.1, 0.2]), 0.2),
        (torch.tensor(-1.0), 0.2),
        (len, 0.2),
        (0, 0.0),
        (np.float32(0.5), 0.5),
        (torch.tensor(0.5), 0.5),
        (torch.tensor([0.5]), 0.5),
        (nn.Parameter(torch.tensor(0.5)), 0.5),
    ],
)
def test_a_margin_of_any_kind_trains(margin, used):
    network = nn.Sequential(nn.Flatten(), nn.Linear(6, 3))
    before = describe_triplets(embed(network, IMAGES), LABELS, used)
    _, history = fitted(network, loss=Margin(margin), batch_size=100, epochs=1)
    assert history["active"][0] == pytest.approx(before.active, rel=1e-4)


def test_a_loss_whose_squared_is_no_truth_value_is_described_in_squared_distance():
    network = nn.Sequential(nn.Flatten(), nn.Linear(6, 3))
    before = describe_triplets(embed(network, IMAGES), LABELS, 0.2)
    _, history = fitted(network, loss=Margin(0.2, squared="no"), batch_size=100, epochs=1)
    assert history["positive_distance"][0] == pytest.approx(before.positive_distance, rel=1e-4)


PML = {
    "ContrastiveLoss": {},
    "TripletMarginLoss": {},
    "MultiSimilarityLoss": {},
    "NTXentLoss": {},
    "CircleLoss": {},
    "ArcFaceLoss": {"num_classes": 4, "embedding_size": 3},
    "ProxyNCALoss": {"num_classes": 4, "embedding_size": 3},
    "SoftTripleLoss": {"num_classes": 4, "embedding_size": 3},
    "MarginLoss": {},
}


@pytest.mark.parametrize("name", PML)
@pytest.mark.parametrize("kind", [torch.int64, torch.int32, torch.uint8])
def test_losses_of_pytorch_metric_learning_train_with_labels_of_any_integer_type(name, kind):
    _, history = fitted(loss=getattr(pml_losses, name)(**PML[name]), labels=LABELS.to(kind))
    assert np.isfinite(history["loss"]).all()


@pytest.mark.parametrize("kind", [torch.int64, torch.int32, torch.uint8])
def test_losses_of_torch_train(kind):
    labels = (LABELS % 3).to(kind)
    for loss in (nn.CrossEntropyLoss(), nn.MultiMarginLoss(), nn.functional.cross_entropy):
        _, history = fitted(loss=loss, labels=labels, epochs=10)
        assert history["loss"][-7:].mean() < history["loss"][:7].mean()


def test_a_loss_may_give_a_bare_zero_for_a_batch_that_holds_nothing():
    def loss(embeddings, labels):
        return TripletLoss()(embeddings, labels) if len(labels) > 10 else torch.tensor(0.0)

    _, history = fitted(loss=loss)
    assert history["loss"][6] == 0.0


@pytest.mark.parametrize(
    ("value", "got"), [(lambda z: z.sum(dim=1), r"\(16,\)"), (lambda z: {"loss": z}, "dict")]
)
def test_a_loss_that_is_no_number_is_refused(value, got):
    with pytest.raises(TypeError, match=f"loss must return a tensor of one number, got {got}"):
        fitted(loss=lambda embeddings, _: value(embeddings))


def images_of(count=32):
    torch.manual_seed(0)
    return torch.randn(count, 1, 10, 10), torch.arange(count) % 4


def convolutions(wrap):
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.ReLU(),
        wrap(nn.Conv2d(4, 4, 3)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


WRAPS = {
    "weight norm": parametrizations.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "orthogonal": lambda layer: parametrizations.orthogonal(layer),
    "pruning": lambda layer: prune.l1_unstructured(layer, "weight", 0.3),
    "depthwise": lambda layer: nn.Conv2d(4, 4, 3, groups=4),
    "transposed": lambda layer: nn.ConvTranspose2d(4, 4, 3),
    "lazy": lambda layer: nn.LazyConv2d(4, 3),
    "none": lambda layer: layer,
}


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
def test_a_convolution_of_any_kind_trains(wrap):
    torch.manual_seed(0)
    network = convolutions(wrap)
    images, labels = images_of()
    fit(network, images, labels, epochs=1, progress=False)  # gives lazy weights their values
    before = copy.deepcopy(network.state_dict())
    fit(network, images, labels, epochs=4, progress=False, seed=1)
    moved = {name: not torch.equal(w, before[name]) for name, w in network.state_dict().items()}
    assert all(moved[name] for name, _ in network.named_parameters())


def test_a_pruned_weight_stays_zero():
    network = convolutions(lambda layer: prune.l1_unstructured(layer, "weight", 0.3))
    mask = network[2].weight_mask.clone()
    fit(network, *images_of(), progress=False)
    assert torch.equal(network[2].weight_mask, mask)
    assert (network[2].weight[mask == 0] == 0).all()


@pytest.mark.filterwarnings("error")
def test_a_kernel_that_two_layers_share_is_stepped_once():
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3))
    network[2].weight = network[1].weight
    network.extend([nn.AdaptiveAvgPool2d(1), nn.Flatten()])
    before = network[1].weight.detach().clone()
    images, labels = images_of()
    history = fit(network, images, labels, epochs=1, progress=False, augment=False)
    # Muon's update has singular values of about its rate, in one step of the rate at its start.
    step = torch.linalg.matrix_norm((network[1].weight - before).flatten(1), 2)
    assert len(history) == 1
    assert step < 1.3 * 12.5 * history["learning_rate"][0]
    assert network[2].weight is network[1].weight


def test_frozen_parts_stay_as_they_were_whichever_way_they_are_frozen():
    def backbone():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))

    for freeze in (
        lambda part: part.requires_grad_(False),
        lambda part: part.requires_grad_(False).eval(),
    ):
        frozen = freeze(backbone())
        before = copy.deepcopy(frozen.state_dict())
        network = nn.Sequential(frozen, nn.Linear(8, 3), nn.BatchNorm1d(3))
        seen = []
        frozen[3].register_forward_hook(lambda module, *_, seen=seen: seen.append(module.training))
        for _ in range(2):  # the second time from evaluation mode, in which training ends
            fitted(network)
        assert all(torch.equal(w, before[name]) for name, w in frozen.state_dict().items())
        assert not any(seen)
        assert network[2].num_batches_tracked == 2 * 14
    # A trainable part in evaluation mode keeps its running means, but its weights move.
    network = nn.Sequential(backbone(), nn.Linear(8, 3))
    network[0][2].eval()
    before = copy.deepcopy(network.state_dict())
    fitted(network)
    assert torch.equal(network[0][2].running_mean, before["0.2.running_mean"])
    assert not torch.equal(network[0][2].weight, before["0.2.weight"])


def test_frozen_parts_of_a_loss_stay_as_they_were():
    class Projected(nn.Module):
        def __init__(self):
            super().__init__()
            self.frozen = nn.BatchNorm1d(3).requires_grad_(False)
            self.trained = nn.BatchNorm1d(3)

        def forward(self, embeddings, labels):
            return TripletLoss()(self.trained(self.frozen(embeddings)), labels)

    loss = Projected()
    before = copy.deepcopy(loss.state_dict())
    fitted(loss=loss)
    after = loss.state_dict()
    assert torch.equal(after["frozen.running_mean"], before["frozen.running_mean"])
    assert not torch.equal(after["trained.running_mean"], before["trained.running_mean"])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_training_inside_a_mode_without_gradients_is_training(mode):
    expected, _ = fitted()
    torch.manual_seed(5)
    network = SmallNet()
    with mode():
        fitted(network)
    assert same_weights(network, expected)


@pytest.mark.parametrize("make", [lambda: SmallNet(), lambda: EmbeddingNet(4)])
def test_a_network_in_float16_trains(make):
    torch.manual_seed(0)
    network = make().half()
    images = IMAGES if isinstance(network, SmallNet) else torch.randn(100, 1, 24, 24)
    before = copy.deepcopy(network.state_dict())
    images, labels = images[:32].half(), LABELS[:32]
    _, history = fitted(network, images=images, labels=labels, epochs=2)
    assert np.isfinite(history["loss"]).all()
    assert all(torch.isfinite(weight).all() for weight in network.parameters())
    for name, weight in network.named_parameters():
        assert not torch.equal(before[name], weight)


def test_a_network_of_complex_numbers_trains():
    class Complex(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Conv2d(1, 4, 3, dtype=torch.cfloat)
            self.second = nn.Conv2d(4, 6, 3, dtype=torch.cfloat)

        def forward(self, images):
            return self.second(self.first(images.cfloat())).abs().mean((2, 3))

    torch.manual_seed(0)
    images = torch.randn(100, 1, 12, 12) + LABELS[:, None, None, None]
    _, history = fitted(Complex(), images=images, epochs=20)
    assert history["loss"][-7:].mean() < 0.9 * history["loss"][:7].mean()


def test_sparse_gradients_are_followed_as_dense_ones():
    def words(sparse):
        torch.manual_seed(0)
        return nn.Sequential(Whole(), nn.EmbeddingBag(9, 3, sparse=sparse, mode="mean"))

    class Whole(nn.Module):
        def forward(self, images):
            return images.long()

    images = torch.randint(9, (100, 4)).float()
    pair = [fitted(words(sparse), images=images)[0] for sparse in (False, True)]
    assert same_weights(*pair)


def test_the_loss_alone_may_be_trained():
    network = SmallNet().requires_grad_(False)
    loss = pml_losses.ProxyAnchorLoss(num_classes=4, embedding_size=3)
    before = loss.proxies.detach().clone()
    fitted(network, loss=loss)
    assert not torch.equal(loss.proxies, before)
    with pytest.raises(ValueError, match="network must have a parameter that requires a gradient"):
        fitted(network)


BATCHES = {
    "tuples": tuple,
    "lists": list,
    "ranges": lambda batch: range(batch[0], batch[-1] + 1),
    "arrays": np.array,
    "reversed arrays": lambda batch: np.array(batch[::-1])[::-1],
    "arrays of another byte order": lambda batch: np.array(batch, dtype=">i4"),
    "arrays of objects": lambda batch: np.array(batch, dtype=object),
    "short arrays": lambda batch: np.array(batch, dtype=np.int16),
    "tensors": torch.tensor,
    "short tensors": lambda batch: torch.tensor(batch, dtype=torch.int32),
    "lists of tensors": lambda batch: list(torch.tensor(batch)),
    "negative": lambda batch: [place - len(LABELS) for place in batch],
}


@pytest.mark.parametrize("kind", BATCHES.values(), ids=BATCHES)
def test_batches_may_be_any_sequence_of_places(kind):
    batches = [list(range(start, start + 20)) for start in range(0, 100, 20)]
    expected, _ = fitted(batch_sampler=batches)
    network, _ = fitted(batch_sampler=[kind(batch) for batch in batches])
    assert same_weights(network, expected)


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        ([0, 100], ValueError, "places in the 100 images, got 100"),
        ([0, -101], ValueError, "places in the 100 images, got -101"),
        ([], TypeError, r"sequences of places in images, got \[\]"),
        ([[0, 1]], TypeError, "sequences of places"),
        (["a"], TypeError, "sequences of places"),
        (3, TypeError, "sequences of places in images, got 3"),
        ([0.5, 1.5], TypeError, "sequences of places"),
        (np.arange(100) < 9, TypeError, "sequences of places"),
        ([1j, 2j], TypeError, "sequences of places"),
    ],
)
def test_batches_of_anything_else_are_refused(batch, error, message):
    with pytest.raises(error, match=message):
        fitted(batch_sampler=[batch])


def test_a_sampler_that_gives_more_than_it_says_or_nothing_is_refused():
    class Long(list):
        def __len__(self):
            return 1

    with pytest.raises(ValueError, match="batch_sampler gave more batches than its length"):
        fitted(batch_sampler=Long([[0, 1], [2, 3], [4, 5]]))
    with pytest.raises(ValueError, match="batch_sampler must have at least one batch"):
        fitted(batch_sampler=[])


@pytest.mark.parametrize("labels", [torch.arange(100), torch.zeros(100, dtype=torch.int64)])
def test_labels_without_a_single_triplet_are_told(labels):
    with pytest.warns(UserWarning, match="labels hold no triplet") as caught:
        fitted(labels=labels)
    assert [warning.filename for warning in caught] == [problems.__file__]


def test_a_network_that_gives_not_one_row_an_image_is_refused():
    with pytest.raises(ValueError, match=r"labels must have shape \(32,\), .* of embeddings"):
        fitted(nn.Sequential(nn.Flatten(), nn.Unflatten(1, (2, 3)), nn.Flatten(0, 1), SmallNet(3)))


def test_the_random_states_of_numpy_and_python_follow_the_seed_and_stay_as_they_were():
    def augment(images):
        return images * (1 + np.random.rand() + random.random())  # noqa: NPY002

    state = random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    first, _ = fitted(augment=augment)
    second, _ = fitted(augment=augment)
    assert same_weights(first, second)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == state  # noqa: NPY002


def test_autocast_around_training_and_embedding_changes_nothing():
    images, labels = images_of(64)
    expected = convolutions(nn.Identity)
    network = copy.deepcopy(expected)
    options = {"seed": 0, "progress": False, "batch_size": 16}
    history = fit(expected, images, labels, **options)
    with torch.autocast("cpu", torch.bfloat16):
        same = fit(network, images, labels, **options)
        rows = embed(network, images)
    assert same_weights(network, expected)
    assert same["loss"].tolist() == history["loss"].tolist()
    assert torch.equal(rows, embed(expected, images))


def test_training_needs_no_float64():
    with NoDouble():
        _, history = fitted()
    _, wide = fitted()
    assert history["loss"] == pytest.approx(wide["loss"], rel=1e-3)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mining", ["all", "semihard", "hard"])
def test_training_on_any_device(device, mining):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    _, expected = fitted(copy.deepcopy(network), loss=TripletLoss(mining=mining))
    network, history = fitted(network.to(device), loss=TripletLoss(mining=mining))
    assert history["loss"] == pytest.approx(expected["loss"], rel=1e-3)
    assert embed(network, IMAGES.to(device)).device.type == "cpu"


def test_training_on_a_device_without_float64_or_numpy():
    with FakeDevice():
        network = SmallNet()
        for module in network.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    elsewhere = tensor.detach().to(FAKE)
                    trained = isinstance(tensor, nn.Parameter)
                    tensors[name] = nn.Parameter(elsewhere) if trained else elsewhere
        _, history = fitted(network, epochs=5, learning_rate=0.02)
        rows = embed(network, IMAGES)
    assert history["loss"][-7:].mean() < history["loss"][:7].mean()
    assert rows.device.type == "cpu"


def test_hooks_of_the_default_loss_are_called():
    for kind in ("forward_pre", "forward", "full_backward_pre", "full_backward"):
        loss, called = TripletLoss(), []
        getattr(loss, f"register_{kind}_hook")(lambda *_, called=called: called.append(1))
        history = fitted(loss=loss)[1]
        assert len(called) == len(history), kind
    loss, called = TripletLoss(), []
    forward = loss.forward
    loss.forward = lambda *given: called.append(1) or forward(*given)
    history = fitted(loss=loss)[1]
    assert len(called) == len(history)


@pytest.mark.parametrize("collapse", [False, True])
def test_what_the_loss_counts_is_what_a_look_at_all_pairs_gives(collapse):
    images = torch.zeros_like(IMAGES) if collapse else IMAGES

    def pairs_and_all(embeddings, labels):  # which `fit` knows nothing of
        return TripletLoss(margin=0.3)(embeddings, labels)

    pairs_and_all.margin = 0.3
    expected = fitted(images=images, loss=pairs_and_all)[1].frame().drop(columns="seconds")
    found = fitted(images=images, loss=TripletLoss(margin=0.3))[1].frame()[expected.columns]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("rows", [lambda x: x[::2], lambda x: x.mean(), lambda x: x.repeat(2, 1)])
def test_embed_refuses_other_than_one_row_an_image(rows, tmp_path):
    class Wrong(nn.Flatten):
        def forward(self, images):
            return rows(super().forward(images))

    for out in (None, tmp_path / "points.npy"):
        with pytest.raises(ValueError, match="network must give one row an image, got shape"):
            embed(Wrong(), IMAGES, 50, out=out)
    assert not list(tmp_path.iterdir())


def test_embeddings_in_bfloat16_are_written_as_float32(tmp_path):
    network = nn.Sequential(nn.Flatten(), nn.Linear(6, 2)).bfloat16()
    images = IMAGES.bfloat16()
    written = embed(network, images, 30, out=tmp_path / "points.npy")
    assert torch.equal(written, embed(network, images, 30).float())


def test_embed_leaves_files_beside_its_own_alone(tmp_path):
    beside = tmp_path / "points.npy.part"
    beside.write_text("mine")
    embed(nn.Flatten(), IMAGES, out=tmp_path / "points.npy")
    assert beside.read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 2


def test_what_needs_more_than_a_step_is_refused_by_name():
    with pytest.raises(TypeError, match="optimizer must take its steps .* LBFGS does not"):
        fitted(optimizer=torch.optim.LBFGS)
    with pytest.raises(TypeError, match="schedule must take its steps .* ReduceLROnPlateau does"):
        fitted(
            optimizer=torch.optim.SGD,
            schedule=lambda of, _: torch.optim.lr_scheduler.ReduceLROnPlateau(of),
        )


def test_a_validation_of_several_numbers_is_refused():
    with pytest.raises(ValueError, match="what validate returns"):
        fitted(validate=lambda _: torch.ones(2))
    fitted(validate=lambda _: np.ones(1))
