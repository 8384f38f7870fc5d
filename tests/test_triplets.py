from __future__ import annotations

import dataclasses

import pytest
import torch
from devices import FAKE, FakeDevice, NoDouble
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


def kinds_of(valid, gap, margin):
    """Share out the valid triplets by d(a, n) - d(a, p)."""
    return {
        "all": valid,
        "hard": valid & (gap < 0),
        "semihard": valid & (gap >= 0) & (gap < margin),
        "easy": valid & (gap >= margin),
    }


@settings(deadline=None, max_examples=80)
@given(batches(), st.sampled_from([0.0, 1.0, 2.0]))
def test_kinds_are_what_their_definitions_say(batch, margin):
    x, labels = batch
    valid, d = explicit(x, labels)
    gap = d[:, None, :] - d[:, :, None]
    for kind, mask in kinds_of(valid, gap, margin).items():
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


def described(x, labels, squared):
    return dataclasses.asdict(describe_triplets(x, labels, squared=squared))


@pytest.mark.parametrize("squared", [True, False])
def test_without_float64_as_good_as_with_it(squared):
    x, labels = torch.randn(90, 8) + 10, torch.arange(90) % 7
    expected = described(x, labels, squared)
    with NoDouble():
        alone = described(x, labels, squared)
        mined = mine_triplets(x, labels, "hard", squared=squared)
    with FakeDevice():
        elsewhere = described(x.to(FAKE), labels, squared)
        mined_elsewhere = [
            t.cpu() for t in mine_triplets(x.to(FAKE), labels, "hard", squared=squared)
        ]
    assert alone == pytest.approx(expected, rel=1e-6)
    assert elsewhere == pytest.approx(alone, rel=1e-6)
    assert all(map(torch.equal, mined, mined_elsewhere))
    # A rounding may let a tie, or what is nearly one, fall the other way.
    differ = as_set(mined) ^ as_set(mine_triplets(x, labels, "hard", squared=squared))
    assert len(differ) <= 2 < len(mined[0])


@pytest.mark.parametrize("kind", ["all", "random", "hard", "semihard", "easy"])
def test_autocast_changes_nothing(kind):
    x, labels = torch.randn(60, 8), torch.arange(60) % 7
    results = []
    for autocast in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            results.append((describe_triplets(x, labels), *mine_triplets(x, labels, kind)))
    assert results[0][0] == results[1][0]
    assert all(map(torch.equal, results[0][1:], results[1][1:]))


@pytest.mark.parametrize("squared", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_means_over_nothing_are_exactly_zero(squared, dtype):
    x = torch.randn(40, 3, dtype=dtype)
    one = describe_triplets(x, torch.zeros(40, dtype=torch.long), squared=squared)
    assert (one.triplets, one.negative_distance) == (0, 0.0)
    assert one.positive_distance > 0
    none = describe_triplets(x, torch.arange(40), squared=squared)
    assert (none.triplets, none.positive_distance) == (0, 0.0)
    assert none.negative_distance == pytest.approx(one.positive_distance)


def test_spread_of_points_that_coincide_is_exactly_zero():
    for x in (torch.full((30, 3), 0.1), torch.full((30, 3), 1e300, dtype=torch.float64)):
        assert describe_triplets(x, torch.arange(30) % 2).spread == 0.0


@pytest.mark.parametrize(("dtype", "power"), [(torch.float32, 120), (torch.float64, 1010)])
def test_description_at_the_end_of_the_range(dtype, power):
    """On a scale of powers of two, means are so much larger, though their sums would overflow."""
    x, labels = torch.rand(30, 2, dtype=dtype), torch.arange(30) % 3
    small, large = (describe_triplets(x * 2.0**p, labels, 0.0, squared=False) for p in (0, power))
    for name in ("positive_distance", "negative_distance", "spread"):
        assert getattr(large, name) / 2.0**power == pytest.approx(getattr(small, name), rel=1e-6)
    assert (large.active, large.hard) == (small.active, small.hard)
