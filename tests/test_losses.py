from __future__ import annotations

import math

import pytest
import torch
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
from tripletlib.triplets import mine_triplets

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
    losses = torch.nn.functional.softplus(gaps) if soft else gaps.clamp(min=0)
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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("mining", ["all", "hard", "semihard"])
def test_cuda_equals_cpu(mining):
    x, labels = torch.randn(300, 16), torch.arange(300) % 7
    values = []
    for device in ("cpu", "cuda"):
        a = x.to(device).requires_grad_()
        loss = TripletLoss(mining=mining)(a, labels)
        loss.backward()
        values.append((loss.cpu().detach(), a.grad.cpu()))
    torch.testing.assert_close(*values, rtol=1e-5, atol=1e-6)
