from __future__ import annotations

import contextlib
import functools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from devices import DEVICES, FAKE, FakeDevice, NoDouble
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_metric_learning import losses as pml
from pytorch_metric_learning.distances import LpDistance
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tripletlib.losses import (
    ContrastiveLoss,
    DistanceRatioLoss,
    TripletLoss,
    batch_all_triplet_loss,
)
from tripletlib.triplets import describe_triplets, mine_triplets

REDUCTIONS = ["active", "mean", "sum"]


def distances_by_definition(x, squared):
    square = (x[:, None] - x[None]).square().sum(dim=2)
    return square if squared else torch.where(square > 0, square, 1.0).sqrt() * (square > 0)


def brute(x, labels, margin, squared=True, reduction="active", soft=False):
    """Every triplet in an (n, n, n) tensor."""
    d = distances_by_definition(x, squared)
    same = labels[:, None] == labels[None]
    valid = (same & ~torch.eye(len(x), dtype=torch.bool))[:, :, None] & ~same[:, None, :]
    gaps = (d[:, :, None] - d[:, None, :] + margin)[valid]
    # At zero, the gradient of a clamp is 1 in some versions of torch.
    losses = torch.nn.functional.softplus(gaps) if soft else gaps.relu()
    active = int((losses > 0).sum())
    number = {"active": active, "mean": len(gaps), "sum": 1}[reduction]
    return losses.sum() / max(number, 1), active


def both(x, labels, loss, reference, **tolerance):
    """Assert that value and gradient are those of the reference, which is taken in float64."""
    a, b = x.clone().requires_grad_(), x.double().requires_grad_()
    got, expected = loss(a, labels), reference(b, labels)
    got.backward()
    expected.backward()
    assert got.shape == ()
    assert torch.isfinite(got)
    torch.testing.assert_close(got.double(), expected, **tolerance)
    torch.testing.assert_close(a.grad.double(), b.grad, **tolerance)


@st.composite
def batches(draw):
    """Grid points (ties, duplicates) of up to six classes, and a scale that keeps them exact."""
    n = draw(st.integers(0, 14))
    point = st.lists(st.integers(-2, 2), min_size=3, max_size=3)
    x = torch.tensor(draw(st.lists(point, min_size=n, max_size=n))).float().reshape(n, 3)
    labels = draw(st.lists(st.integers(0, draw(st.integers(0, 5))), min_size=n, max_size=n))
    scale = 2.0 ** draw(st.sampled_from([0, 0, 0, -40, -10, 12, 40]))
    return x * scale, torch.tensor(labels).long()


@settings(deadline=None, max_examples=80)
@given(batches(), st.sampled_from([0.0, 0.25, 2.0]), st.sampled_from(REDUCTIONS), st.booleans())
def test_batch_all_equals_brute_force(batch, margin, reduction, double):
    x, labels = batch
    x = x.double() if double else x
    _, active = batch_all_triplet_loss(x, labels, margin, reduction=reduction, return_active=True)
    assert active.dtype == torch.int64
    assert active.shape == ()
    # Float32 comparisons are exact in this loss, so that the reference must be taken in float64,
    # where these are.
    assert int(active) == brute(x.double(), labels, margin)[1]
    size = 1 + x.abs().max().item() if len(x) else 1
    both(
        x,
        labels,
        lambda a, y: batch_all_triplet_loss(a, y, margin, reduction=reduction),
        lambda a, y: brute(a, y, margin, True, reduction)[0],
        rtol=2e-6,
        atol=1e-7 * size,
    )


@settings(deadline=None, max_examples=40)
@given(batches(), st.sampled_from(REDUCTIONS))
def test_batch_all_unsquared_equals_brute_force(batch, reduction):
    x, labels = batch
    # Off the grid, on any scale, because ties of rounded roots may break.
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    x = x + 0.05 * noise * (x.abs().max() if len(x) else 1.0)
    both(
        x,
        labels,
        lambda a, y: batch_all_triplet_loss(a, y, 0.25, squared=False, reduction=reduction),
        lambda a, y: brute(a, y, 0.25, False, reduction)[0],
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize("sizes", [[150, 150], [290, 3, 1, 6], [2] * 150, [100, 1, 99, 100]])
@pytest.mark.parametrize("squared", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_batches_of_several_blocks_and_unequal_classes(sizes, squared, dtype, monkeypatch):
    monkeypatch.setattr("tripletlib.distances._BLOCK", 2**14)
    torch.manual_seed(1)
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    labels = labels[torch.randperm(len(labels))] * 7 - 3
    both(
        torch.randn(len(labels), 5).to(dtype),
        labels,
        lambda a, y: batch_all_triplet_loss(a, y, squared=squared),
        lambda a, y: brute(a, y, 0.2, squared)[0],
        rtol=1e-5,
        atol=1e-7,
    )


@pytest.mark.parametrize("n", [60, 200])
@pytest.mark.parametrize("power", [1, 2])
def test_batch_all_equals_pytorch_metric_learning(n, power):
    x = torch.nn.functional.normalize(torch.randn(n, 16))
    distance = LpDistance(power=power, normalize_embeddings=False)
    both(
        x,
        torch.arange(n) % 7,
        lambda a, y: batch_all_triplet_loss(a, y, squared=power == 2),
        pml.TripletMarginLoss(margin=0.2, distance=distance),
        rtol=1e-5,
        atol=1e-7,
    )


def test_batch_all_equals_torch_on_the_mined_triplets():
    x, labels = torch.randn(30, 4, dtype=torch.float64), torch.arange(30) % 4
    a, p, n = (x[t] for t in mine_triplets(x, labels))
    expected = torch.nn.TripletMarginLoss(margin=0.3, eps=0)(a, p, n)
    got = batch_all_triplet_loss(x, labels, 0.3, squared=False, reduction="mean")
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("squared", [True, False])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradcheck_of_batch_all(squared, reduction):
    torch.manual_seed(2)
    x = torch.randn(12, 3, dtype=torch.float64, requires_grad=True)
    labels = torch.arange(12) % 3
    assert torch.autograd.gradcheck(
        lambda a: batch_all_triplet_loss(a, labels, squared=squared, reduction=reduction), x
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_margin_counts_even_beside_distances_in_which_it_is_lost(dtype):
    """Anchor, positive and negative at the very same huge distance: the hinge is the margin."""
    x = torch.tensor([[0.0, 0.0], [1e6, 0.0], [0.0, 1e6], [0.0, 1e6 + 1]], dtype=dtype)
    labels = torch.tensor([0, 0, 1, 2])
    got, active = batch_all_triplet_loss(
        x, labels, 0.2, reduction="sum", return_active=True, squared=False
    )
    expected, count = brute(x.double(), labels, 0.2, False, "sum")
    assert active == count == 1
    torch.testing.assert_close(got.double(), expected)
    tied, active = batch_all_triplet_loss(x[:3], labels[:3], 0.2, return_active=True)
    assert active == 1
    torch.testing.assert_close(tied, torch.tensor(0.2, dtype=dtype))


@pytest.mark.parametrize("loss", ["all", "hard", "semihard", "soft", "contrastive"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1.0, 1e10, 1e19, 3e38])
def test_finite_for_any_finite_batch(loss, dtype, scale):
    module = {
        "soft": TripletLoss(soft=True),
        "contrastive": ContrastiveLoss(),
    }.get(loss) or TripletLoss(mining=loss)
    torch.manual_seed(3)
    x = torch.randn(20, 3).clamp(-1, 1)
    x[4] = x[5]
    x[7] = x[8] = 0.0
    x = (x * scale).to(dtype).requires_grad_()
    value = module(x, torch.arange(20) % 4)
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(x.grad).all()
    total = batch_all_triplet_loss(x.detach(), torch.arange(20) % 4, reduction="sum")
    assert torch.isfinite(total)


@pytest.mark.parametrize("n", [0, 1, 3])
@pytest.mark.parametrize("distinct", [True, False])
@pytest.mark.parametrize("mining", ["all", "hard", "semihard"])
@pytest.mark.parametrize("soft", [True, False])
def test_without_a_triplet_zero_with_a_gradient_of_zeros(n, distinct, mining, soft):
    x = torch.randn(n, 3, requires_grad=True)
    labels = torch.arange(n) if distinct else torch.zeros(n, dtype=torch.long)
    loss = TripletLoss(mining=mining, soft=soft)(x, labels)
    loss.backward()
    assert loss == 0
    assert (x.grad == 0).all()


def test_without_an_active_triplet_zero_with_a_gradient_of_zeros():
    x = torch.tensor([[0.0], [0.1], [9.0], [9.1]], requires_grad=True)
    loss, active = batch_all_triplet_loss(x, torch.tensor([0, 0, 1, 1]), return_active=True)
    loss.backward()
    assert (loss, active) == (0, 0)
    assert (x.grad == 0).all()


@pytest.mark.parametrize("mining", ["all", "hard", "semihard"])
@pytest.mark.parametrize("soft", [True, False])
def test_order_of_samples_does_not_matter(mining, soft):
    x, labels, order = torch.randn(40, 4), torch.arange(40) % 6, torch.randperm(40)
    loss = TripletLoss(mining=mining, soft=soft)
    a, b = x.clone().requires_grad_(), x[order].clone().requires_grad_()
    first, second = loss(a, labels), loss(b, labels[order])
    first.backward()
    second.backward()
    torch.testing.assert_close(first, second, rtol=1e-6, atol=0)
    torch.testing.assert_close(a.grad[order], b.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_computed_in_float32(dtype):
    x = torch.randn(20, 4).to(dtype).requires_grad_()
    loss = batch_all_triplet_loss(x, torch.arange(20) % 3)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, batch_all_triplet_loss(x.float(), torch.arange(20) % 3))
    assert torch.autograd.grad(loss, x)[0].dtype == dtype


@pytest.mark.parametrize("labels_type", [torch.int64, torch.int32, torch.uint8])
def test_labels_of_any_integer_type(labels_type):
    x, labels = torch.randn(20, 4), torch.arange(20) % 3
    expected = batch_all_triplet_loss(x, labels)
    assert torch.equal(batch_all_triplet_loss(x, labels.to(labels_type)), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_second_derivative_is_refused(dtype):
    x = torch.randn(9, 2, dtype=dtype, requires_grad=True)
    for loss in (TripletLoss(), TripletLoss(soft=True)):
        value = loss(x, torch.arange(9) % 3)
        with pytest.raises(RuntimeError, match="differentiable only once"):
            torch.autograd.grad(value, x, create_graph=True)


class LargestTensor(TorchDispatchMode):
    """Remember the most numbers that any tensor held."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.numbers = max(self.numbers, leaf.numel())
        return out


@pytest.mark.parametrize("classes", [2, 10, 100])
@pytest.mark.parametrize("mining", ["all", "hard", "semihard", "soft"])
def test_no_tensor_is_larger_than_the_pairs(mining, classes):
    n = 200
    loss = TripletLoss(soft=True) if mining == "soft" else TripletLoss(mining=mining)
    x = torch.randn(n, 8, requires_grad=True)
    with LargestTensor() as seen:
        loss(x, torch.arange(n) % classes).backward()
    assert n * n <= seen.numbers <= n * (n + 8)
    with LargestTensor() as seen:
        brute(x, torch.arange(n) % classes, 0.2)
    assert seen.numbers == n**3


def test_two_thousand_samples_take_little_memory():
    n = 2048
    x = torch.randn(n, 8, requires_grad=True)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        batch_all_triplet_loss(x, torch.arange(n) % 10).backward()
    held, peak = 0, 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    assert 4 * n * n < peak < 64 * n * n


@pytest.mark.parametrize("soft", [True, False])
@pytest.mark.parametrize("squared", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_hard_is_farthest_positive_and_nearest_negative(soft, squared, seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 8, (20,), generator=generator)

    def reference(x, labels):
        d = distances_by_definition(x, squared)
        gaps = []
        for a in range(len(x)):
            positives = [d[a, p] for p in range(len(x)) if p != a and labels[p] == labels[a]]
            negatives = [d[a, n] for n in range(len(x)) if labels[n] != labels[a]]
            if positives and negatives:
                gaps.append(max(positives) - min(negatives) + 0.5)
        gaps = torch.stack(gaps)
        return (torch.nn.functional.softplus(gaps) if soft else gaps.relu()).mean()

    x = torch.randn(20, 4, generator=generator)
    loss = TripletLoss(0.5, "hard", squared=squared, soft=soft)
    both(x, labels, loss, reference, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("soft", [True, False])
@pytest.mark.parametrize("squared", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_semihard_is_the_nearest_farther_negative_or_the_farthest(soft, squared, seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 8, (20,), generator=generator)

    def reference(x, labels):
        d = distances_by_definition(x, squared)
        gaps = []
        for a in range(len(x)):
            negatives = [d[a, n] for n in range(len(x)) if labels[n] != labels[a]]
            for p in range(len(x)):
                if p != a and labels[p] == labels[a] and negatives:
                    farther = [n for n in negatives if n > d[a, p]]
                    chosen = min(farther) if farther else max(negatives)
                    gaps.append(d[a, p] - chosen + 0.5)
        gaps = torch.stack(gaps)
        return (torch.nn.functional.softplus(gaps) if soft else gaps.relu()).mean()

    x = torch.randn(20, 4, generator=generator)
    loss = TripletLoss(0.5, "semihard", squared=squared, soft=soft)
    both(x, labels, loss, reference, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("squared", [True, False])
@pytest.mark.parametrize("classes", [2, 5, 30])
def test_soft_over_all_triplets_equals_brute_force(squared, classes):
    both(
        torch.randn(40, 4),
        torch.arange(40) % classes,
        TripletLoss(0.1, soft=True, squared=squared),
        lambda a, y: brute(a, y, 0.1, squared, "mean", soft=True)[0],
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.parametrize("mining", ["all", "hard", "semihard"])
@pytest.mark.parametrize("soft", [True, False])
def test_gradcheck_of_triplet_loss(mining, soft):
    torch.manual_seed(4)
    x = torch.randn(10, 3, dtype=torch.float64, requires_grad=True)
    loss = TripletLoss(mining=mining, soft=soft)
    assert torch.autograd.gradcheck(lambda a: loss(a, torch.arange(10) % 3), x)


def test_repr_names_the_options():
    loss = TripletLoss(0.3, "hard", soft=True)
    assert repr(loss) == "TripletLoss(margin=0.3, mining='hard', squared=True, soft=True)"
    assert repr(ContrastiveLoss(2.0)) == "ContrastiveLoss(margin=2.0)"


def test_distance_ratio_equals_the_papers_formula():
    a, p, n = torch.randn(3, 50, 4, dtype=torch.float64).requires_grad_()
    near, far = (a - p).norm(dim=1).exp(), (a - n).norm(dim=1).exp()
    expected = (near / (near + far)).square().mean()
    torch.testing.assert_close(DistanceRatioLoss()(a, p, n), expected)
    triplets = [t.detach().requires_grad_() for t in (a, p, n)]
    assert torch.autograd.gradcheck(DistanceRatioLoss(), triplets)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1.0, 1e4, 1e19, 3e38])
def test_distance_ratio_is_stable(dtype, scale):
    if dtype == torch.float16 and scale > 1e4:
        return
    a = (torch.tensor([[0.0, 0.0], [1.0, 1.0], [-1.0, 1.0]]) * scale).to(dtype).requires_grad_()
    p = (torch.tensor([[0.0, 0.0], [1.0, -1.0], [1.0, 1.0]]) * scale).to(dtype).requires_grad_()
    n = (torch.tensor([[0.0, 1.0], [1.0, 1.0], [1.0, 1.0]]) * scale).to(dtype).requires_grad_()
    loss = DistanceRatioLoss()(a, p, n)
    loss.backward()
    assert 0 <= loss <= 1
    assert all(torch.isfinite(t.grad).all() for t in (a, p, n))
    if scale >= 1e4:  # one triplet right, one wrong, one undecided
        torch.testing.assert_close(loss.double(), torch.tensor((0 + 1 + 0.25) / 3).double())


def test_distance_ratio_of_no_triplets_and_of_unlike_shapes():
    empty = torch.zeros(0, 3, requires_grad=True)
    loss = DistanceRatioLoss()(empty, empty, empty)
    loss.backward()
    assert loss == 0
    with pytest.raises(ValueError, match=r"negative must have the shape of anchor, \(2, 3\)"):
        DistanceRatioLoss()(torch.ones(2, 3), torch.ones(2, 3), torch.ones(2, 4))
    with pytest.raises(ValueError, match="positive must be finite"):
        DistanceRatioLoss()(torch.ones(2, 3), torch.ones(2, 3) / 0, torch.ones(2, 3))


@settings(deadline=None, max_examples=40)
@given(batches(), st.sampled_from([0.25, 1.0, 3.0]))
def test_contrastive_equals_the_sum_over_pairs(batch, margin):
    x, labels = batch

    def reference(x, labels):
        total, pairs = (x * 0).sum(), math.comb(len(x), 2)
        for i in range(len(x)):
            for j in range(i):
                square = (x[i] - x[j]).square().sum()
                if labels[i] == labels[j]:
                    total = total + square / 2
                elif 0 < square < margin**2:
                    total = total + (margin - square.sqrt()) ** 2 / 2
                elif square == 0:  # where the distance has no gradient, we take it as zero
                    total = total + margin**2 / 2
        return total / max(pairs, 1)

    size = 1 + x.abs().max().item() if len(x) else 1
    both(x, labels, ContrastiveLoss(margin), reference, rtol=1e-5, atol=1e-6 * size)


def test_gradcheck_of_contrastive():
    x = torch.randn(10, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a: ContrastiveLoss(2.0)(a, torch.arange(10) % 3), x)


@pytest.mark.parametrize(
    "loss",
    [batch_all_triplet_loss, ContrastiveLoss()]
    + [TripletLoss(mining=mining) for mining in ("all", "hard", "semihard")],
)
def test_errors_of_a_batch(loss):
    x, labels = torch.randn(4, 2), torch.tensor([0, 0, 1, 1])
    with pytest.raises(TypeError, match="embeddings must be a torch.Tensor, got list"):
        loss([[1.0]], labels)
    with pytest.raises(ValueError, match=r"embeddings must have shape \(n, d\)"):
        loss(x[0], labels)
    with pytest.raises(ValueError, match="embeddings must be finite, got NaN or infinity in row 2"):
        loss(x.index_fill(0, torch.tensor(2), torch.nan), labels)
    with pytest.raises(ValueError, match=r"labels must have shape \(4,\).*got \(3,\)"):
        loss(x, labels[:3])
    with pytest.raises(TypeError, match="labels must be integers, got torch.float32"):
        loss(x, labels.float())


def test_errors_of_options():
    x, labels = torch.randn(4, 2), torch.tensor([0, 0, 1, 1])
    with pytest.raises(ValueError, match=r"reduction must be one of 'active', 'mean', 'sum', got"):
        batch_all_triplet_loss(x, labels, reduction="none")
    with pytest.raises(ValueError, match=r"margin must be a finite number of at least 0, got -0.1"):
        batch_all_triplet_loss(x, labels, -0.1)
    with pytest.raises(ValueError, match=r"mining must be one of 'all', 'semihard', 'hard', got"):
        TripletLoss(mining="easy")
    with pytest.raises(ValueError, match="margin must be a finite number of at least 0, got nan"):
        TripletLoss(math.nan)
    with pytest.raises(ValueError, match="margin must be a finite number above 0, got 0"):
        ContrastiveLoss(0)


def ratio_loss(x, labels):
    return DistanceRatioLoss()(x, x.roll(1, 0), x.roll(2, 0))


def all_losses(margin=0.2):
    """Every loss with every option, as functions of embeddings and labels."""
    losses = {
        f"{mining}-{soft=}-{squared=}": TripletLoss(margin, mining, squared=squared, soft=soft)
        for mining in ("all", "hard", "semihard")
        for soft in (True, False)
        for squared in (True, False)
    }
    for reduction in ("mean", "sum"):
        losses[reduction] = functools.partial(
            batch_all_triplet_loss, margin=margin, reduction=reduction
        )
    return {**losses, "contrastive": ContrastiveLoss(max(margin, 1e-3)), "ratio": ratio_loss}


every_loss = pytest.mark.parametrize("loss", all_losses().values(), ids=all_losses())


def value_and_gradient(loss, x, labels):
    x = x.detach().requires_grad_()
    value = loss(x, labels)
    (gradient,) = torch.autograd.grad(value, x)
    return value.detach(), gradient


def clusters(dtype=torch.float32):
    """Points of five classes, some of them close, some the same, all far from the origin."""
    labels = torch.arange(60) % 5
    x = torch.randn(5, 16)[labels] + 0.5 * torch.randn(60, 16)
    x[3], x[4] = x[8], x[9] + 1e-3
    return (x + 10).to(dtype), labels


@every_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_without_float64_as_good_as_with_it(loss, dtype):
    x, labels = clusters(dtype)
    with NoDouble():
        value, gradient = value_and_gradient(loss, x, labels)
    expected = value_and_gradient(loss, x.double(), labels)
    # A gap, what is left of distances of about ten, is of their precision.
    torch.testing.assert_close(value.double(), expected[0], rtol=1e-6, atol=1e-8)
    assert gradient.dtype == dtype
    limits, size = torch.finfo(dtype), expected[1].abs().max().item()
    least = limits.smallest_normal * limits.eps
    if loss is ratio_loss:  # autograd adds three gradients, each rounded
        least = max(least, 2 * limits.eps * size)
    torch.testing.assert_close(
        gradient.double(), expected[1], rtol=max(limits.eps, 5e-6), atol=max(least, 1e-6 * size)
    )


@every_loss
def test_on_a_device_of_its_own_without_float64(loss):
    x, labels = clusters()
    with NoDouble():
        expected = value_and_gradient(loss, x, labels)
    with FakeDevice():
        got = value_and_gradient(loss, x.to(FAKE), labels)
        assert all(t.device == FAKE for t in got)
        got = [t.cpu() for t in got]
    torch.testing.assert_close(got, list(expected), rtol=1e-6, atol=1e-7)


@every_loss
@pytest.mark.parametrize("close", [True, False])
@pytest.mark.parametrize("wide", [True, False])
def test_autocast_changes_nothing(loss, close, wide):
    x, labels = clusters()
    x = x if close else torch.randn(60, 16)
    with contextlib.nullcontext() if wide else NoDouble():
        expected = value_and_gradient(loss, x, labels)
        with torch.autocast("cpu", torch.bfloat16):
            got = value_and_gradient(loss, x, labels)
    assert all(map(torch.equal, got, expected))


def degenerate(draw):
    """A batch that coincides, or overflows, or vanishes in part or as a whole."""
    pick = lambda *choices: choices[int(torch.randint(0, len(choices), (), generator=draw))]  # noqa: E731
    dtype = pick(torch.float16, torch.bfloat16, torch.float32, torch.float64)
    limits, n = torch.finfo(dtype), pick(0, 1, 2, 3, 6, 17)
    x = torch.randn(n, pick(1, 2, 5), generator=draw, dtype=torch.float64).clamp(-1, 1)
    x *= pick(0.0, limits.tiny, limits.tiny**0.5, 1.0, limits.max**0.5, limits.max / 4, limits.max)
    if n and pick(True, False):
        x[: n // 2] = x[0].clone()
    if n and pick(True, False):
        x[0], x[-1] = limits.max, pick(-limits.max, 0.0)
    labels = torch.randint(0, pick(1, 2, 4, 30), (n,), generator=draw)
    return x.to(dtype), labels, pick(0.0, 0.2, 1e4, 1e38, 1.7e308)


@pytest.mark.parametrize("seed", range(60))
def test_finite_for_degenerate_batches(seed):
    x, labels, margin = degenerate(torch.Generator().manual_seed(seed))
    for name, loss in all_losses(margin).items():
        for mode in (contextlib.nullcontext(), NoDouble()):
            if x.dtype == torch.float64 and isinstance(mode, NoDouble):
                continue
            with mode:
                value, gradient = value_and_gradient(loss, x, labels)
            assert torch.isfinite(value), name
            assert torch.isfinite(gradient).all(), name


def longest(dtype):
    """Six points in a line, so long that the sum of its squares overflows, and their mean not."""
    x = torch.tensor([0.0, 3.0, 1.0, 4.0, 2.0, 3.5], dtype=dtype)[:, None]
    power = {torch.float32: 61, torch.float64: 509}[dtype]
    return x, power, torch.tensor([0, 0, 0, 1, 1, 1])


@pytest.mark.parametrize("mining", ["all", "hard", "semihard"])
@pytest.mark.parametrize("squared", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_mean_within_range_of_losses_at_its_end(mining, squared, dtype):
    """On a scale of powers of two, value and gradient are exactly so much larger."""
    x, power, labels = longest(dtype)
    power = power if squared else 2 * power
    degree = 2 if squared else 1
    loss = TripletLoss(0.0, mining, squared=squared)
    expected = value_and_gradient(loss, x, labels)
    for mode in (contextlib.nullcontext(), NoDouble()):
        if dtype == torch.float64 and isinstance(mode, NoDouble):
            continue
        with mode:
            value, gradient = value_and_gradient(loss, x * 2.0**power, labels)
        torch.testing.assert_close(value / 2.0 ** (power * degree), expected[0])
        torch.testing.assert_close(gradient / 2.0 ** (power * (degree - 1)), expected[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("far", [False, True])
def test_contrastive_of_distances_at_its_end(dtype, far):
    """Of one class the loss is homogeneous; beyond the range it is clamped, its gradient not."""
    x, power, _ = longest(dtype)
    labels = torch.zeros(6, dtype=torch.long)
    value, gradient = value_and_gradient(ContrastiveLoss(), x, labels)
    power += 5 if far else 0
    got, got_gradient = value_and_gradient(ContrastiveLoss(), x * 2.0**power, labels)
    if far:
        assert got == torch.finfo(dtype).max
    else:
        torch.testing.assert_close(got / 2.0 ** (2 * power), value)
    torch.testing.assert_close(got_gradient / 2.0**power, gradient)


@pytest.mark.parametrize("mining", ["all", "hard", "semihard"])
@pytest.mark.parametrize("squared", [True, False])
def test_a_tie_has_no_loss_and_no_gradient(mining, squared):
    """Anchor 0 has a loss; anchor 2 has its positive and its negative at one distance."""
    x = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    labels = torch.tensor([0, 1, 0])
    value, gradient = value_and_gradient(TripletLoss(0.0, mining, squared=squared), x, labels)
    slope = (2.0 if squared else 1.0) * (1.0 if mining == "all" else 0.5)
    assert value == (1.0 if mining == "all" else 0.5)
    assert torch.equal(gradient, torch.tensor([[0, 0, -slope], [0, 0, 0], [0, 0, slope]]))


@every_loss
@pytest.mark.parametrize("device", DEVICES)
def test_every_device_equals_the_cpu(loss, device):
    x, labels = clusters()
    got = value_and_gradient(loss, x.to(device), labels)
    assert got[0].device.type == got[1].device.type == device
    expected = value_and_gradient(loss, x, labels)
    torch.testing.assert_close([t.cpu() for t in got], list(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [TripletLoss, functools.partial(TripletLoss, mining="hard")])
def test_a_margin_may_be_any_real_number(kind):
    embeddings, labels = torch.randn(20, 3), torch.arange(20) % 4
    expected = kind(0.25)(embeddings, labels)
    for margin in (Fraction(1, 4), np.float32(0.25), np.float16(0.25)):
        assert kind(margin)(embeddings, labels) == expected
        assert describe_triplets(embeddings, labels, margin) == describe_triplets(
            embeddings, labels, 0.25
        )
    assert kind(10**300)(embeddings, labels).isfinite()
    with pytest.raises(ValueError, match="margin must be a finite number of at least 0, got 1000"):
        kind(10**400)
