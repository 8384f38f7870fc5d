from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_metric_learning.utils.loss_and_miner_utils import get_all_triplets_indices

import tripletlib.triplets as module
from tripletlib.triplets import describe_triplets, mine_triplets


def explicit(x, labels, squared=True):
    """All valid triplets in an (n, n, n) mask, and the distances, from grid points exact."""
    difference = x[:, None] - x[None]
    distances = difference.square().sum(dim=2)
    distances = distances if squared else distances.sqrt()
    same = labels[:, None] == labels[None]
    valid = (same & ~torch.eye(len(x), dtype=torch.bool))[:, :, None] & ~same[:, None, :]
    return valid, distances


@st.composite
def batches(draw, largest=14):
    """Points of a small grid, so that ties and duplicates abound and distances are exact."""
    n = draw(st.integers(0, largest))
    points = st.lists(st.integers(-2, 2), min_size=2, max_size=2)
    x = draw(st.lists(points, min_size=n, max_size=n))
    labels = draw(st.lists(st.integers(-1, draw(st.integers(-1, 5))), min_size=n, max_size=n))
    return torch.tensor(x, dtype=torch.float32).reshape(n, 2), torch.tensor(labels).long()


def as_set(triplets):
    listed = list(zip(*(t.tolist() for t in triplets), strict=True))
    assert len(set(listed)) == len(listed)
    return set(listed)


@settings(deadline=None, max_examples=80)
@given(batches(), st.sampled_from([0.0, 1.0, 2.0]))
def test_kinds_are_what_their_definitions_say(batch, margin):
    x, labels = batch
    valid, d = explicit(x, labels)
    gap = d[:, None, :] - d[:, :, None]
    kinds = {
        "all": valid,
        "hard": valid & (gap < 0),
        "semihard": valid & (gap >= 0) & (gap < margin),
        "easy": valid & (gap >= margin),
    }
    for kind, mask in kinds.items():
        got = mine_triplets(x, labels, kind, margin=margin)
        assert all(t.dtype == torch.int64 for t in got)
        assert as_set(got) == as_set(mask.nonzero(as_tuple=True)), kind


@settings(deadline=None, max_examples=40)
@given(batches())
def test_all_has_the_order_of_pytorch_metric_learning(batch):
    x, labels = batch
    for got, expected in zip(
        mine_triplets(x, labels), get_all_triplets_indices(labels), strict=True
    ):
        assert torch.equal(got, expected)


@settings(deadline=None, max_examples=40)
@given(batches())
def test_random_is_one_valid_triplet_for_each_anchor_that_has_any(batch):
    x, labels = batch
    valid, _ = explicit(x, labels)
    a, p, n = mine_triplets(x, labels, "random")
    assert a.tolist() == valid.any(dim=2).any(dim=1).nonzero()[:, 0].tolist()
    assert valid[a, p, n].all()


def test_random_is_uniform_and_follows_its_generator():
    labels = torch.tensor([0, 0, 0, 1, 1, 2])
    x = torch.randn(6, 2)
    seen = torch.zeros(6, 6)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2000):
        _, p, n = mine_triplets(x, labels, "random", generator=generator)
        seen[p[0], n[0]] += 1
    assert ((seen[1:3, 3:] / 2000 - 1 / 6).abs() < 0.04).all()
    first, second = (
        mine_triplets(x, labels, "random", generator=torch.Generator().manual_seed(3))
        for _ in range(2)
    )
    assert all(torch.equal(*both) for both in zip(first, second, strict=True))


@settings(deadline=None, max_examples=80)
@given(batches(), st.sampled_from([0.0, 1.0, 2.0]), st.booleans())
def test_description_equals_the_explicit_count(batch, margin, squared):
    x, labels = batch
    valid, d = explicit(x, labels, squared)
    got = describe_triplets(x, labels, margin, squared=squared)
    gap = (d[:, None, :] - d[:, :, None])[valid]
    count = max(len(gap), 1)
    assert got.triplets == len(gap)
    if squared:  # roots are not exact, so that their ties may break
        assert got.active == pytest.approx(int((gap < margin).sum()) / count)
        assert got.hard == pytest.approx(int((gap < 0).sum()) / count)
        assert got.semihard == pytest.approx(int(((gap >= 0) & (gap < margin)).sum()) / count)
    same = labels[:, None] == labels[None]
    for mask, mean in (
        (same & ~torch.eye(len(x), dtype=torch.bool), got.positive_distance),
        (~same, got.negative_distance),
    ):
        assert mean == pytest.approx(d[mask].mean().item() if mask.any() else 0.0, rel=1e-5)
    spread = (x - x.mean(dim=0)).square().sum(dim=1).mean().sqrt().item() if len(x) else 0.0
    assert got.spread == pytest.approx(spread, abs=1e-6)


@pytest.mark.parametrize("n", [300, 450])
def test_description_of_a_batch_in_several_blocks(n):
    x, labels = torch.randn(n, 3), torch.randint(0, 7, (n,))
    valid, d = explicit(x.double(), labels)
    gap = (d[:, None, :] - d[:, :, None])[valid]
    got = describe_triplets(x, labels)
    assert got.triplets == len(gap)
    assert got.active == pytest.approx((gap < 0.2).double().mean().item(), abs=1e-6)
    assert got.hard == pytest.approx((gap < 0).double().mean().item(), abs=1e-6)


def test_collapse_shows():
    labels = torch.arange(20) % 4
    got = describe_triplets(torch.ones(20, 8), labels)
    assert (got.active, got.hard, got.semihard) == (1.0, 0.0, 1.0)
    assert got.spread == got.positive_distance == got.negative_distance == 0.0


def test_too_many_triplets_are_refused_with_their_count(monkeypatch):
    x, labels = torch.randn(40, 2), torch.arange(40) % 2
    count = 40 * 19 * 20
    monkeypatch.setattr(module, "MEMORY_LIMIT", count * module._BYTES_EACH - 1)
    with pytest.raises(MemoryError, match=f"{count} triplets would take {count * 48} bytes"):
        mine_triplets(x, labels)
    monkeypatch.setattr(module, "MEMORY_LIMIT", count * module._BYTES_EACH)
    assert len(mine_triplets(x, labels)[0]) == count


def test_a_huge_batch_is_refused_before_its_triplets_are_listed():
    with pytest.raises(MemoryError, match="limit"):
        mine_triplets(torch.randn(3000, 2), torch.arange(3000) % 10)


@pytest.mark.parametrize("call", [describe_triplets, mine_triplets])
def test_errors(call):
    x, labels = torch.randn(4, 2), torch.tensor([0, 0, 1, 1])
    with pytest.raises(ValueError, match="embeddings must be finite, got NaN or infinity in row 0"):
        call(x * torch.nan, labels)
    with pytest.raises(ValueError, match=r"labels must have shape \(4,\).*got \(3,\)"):
        call(x, labels[:3])
    with pytest.raises(TypeError, match="labels must be integers, got torch.float32"):
        call(x, labels.float())
    with pytest.raises(ValueError, match="margin must be a finite number of at least 0, got -1"):
        call(x, labels, margin=-1)


def test_unknown_kind():
    with pytest.raises(ValueError, match=r"kind must be one of 'all', .* got 'hardest'"):
        mine_triplets(torch.randn(4, 2), torch.tensor([0, 0, 1, 1]), "hardest")
