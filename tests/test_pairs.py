"""Reference sets, boolean matrices instead of labels, and anchors that are in the reference."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_losses import LargestTensor
from test_triplets import as_set, kinds_of

from tripletlib import TripletLoss, batch_all_triplet_loss, describe_triplets, mine_triplets

LOSSES = {
    "all": TripletLoss(0.25),
    "all, soft": TripletLoss(0.25, soft=True),
    "semihard": TripletLoss(0.25, "semihard"),
    "semihard, not squared": TripletLoss(0.25, "semihard", squared=False),
    "hard": TripletLoss(0.25, "hard"),
    "hard, soft": TripletLoss(0.25, "hard", soft=True),
}


@dataclasses.dataclass
class Case:
    """A batch, a reference, which pairs are alike and which row of it each anchor is."""

    x: torch.Tensor
    reference: torch.Tensor
    same: torch.Tensor
    rows: torch.Tensor

    @property
    def masks(self):
        itself = torch.arange(len(self.reference)) == self.rows[:, None]
        return self.same & ~itself, ~self.same & ~itself

    @property
    def options(self):
        return {"reference": self.reference, "same": self.same, "anchor_rows": self.rows}


@st.composite
def cases(draw, most=9):
    """Grid points, so that ties and duplicates abound; rows of `same` may be empty or full."""
    n, r = draw(st.integers(0, most)), draw(st.integers(0, most))
    point = st.lists(st.integers(-2, 2), min_size=2, max_size=2)
    x, reference = (
        torch.tensor(draw(st.lists(point, min_size=k, max_size=k))).float().reshape(k, 2)
        for k in (n, r)
    )
    same = torch.tensor(draw(st.lists(st.booleans(), min_size=n * r, max_size=n * r)))
    rows = torch.tensor(draw(st.lists(st.integers(-1, r - 1), min_size=n, max_size=n))).long()
    for anchor, row in enumerate(rows.tolist()):
        if row >= 0:
            x[anchor] = reference[row]
    return Case(x, reference, same.bool().reshape(n, r), rows)


def large(n=70, r=90, classes=5, seed=0):
    """Beyond a few positives an anchor, where positives are sorted and searched."""
    generator = torch.Generator().manual_seed(seed)
    x, reference = (torch.randn(k, 3, generator=generator) for k in (n, r))
    labels, names = (torch.randint(classes, (k,), generator=generator) for k in (n, r))
    rows = torch.full((n,), -1)
    rows[:20] = torch.arange(20) * 3
    x[:20] = reference[rows[:20]]
    return Case(x, reference, labels[:, None] == names, rows)


def brute(case, mining, soft, squared, margin=0.25):
    """Take one anchor after the other, and list what counts for it."""
    d = (case.x[:, None] - case.reference[None]).square().sum(dim=2)
    d = d if squared else torch.where(d > 0, d, 1.0).sqrt() * (d > 0)
    losses = []
    for row, positive, negative in zip(d, *case.masks, strict=True):
        near, far = row[positive], row[negative]
        if not len(near) or not len(far):
            continue
        if mining == "hard":
            near, far = near.max()[None], far.min()[None]
        gaps = near[:, None] - far[None, :] + margin
        if mining == "semihard":
            chosen = [far[far > p].min() if (far > p).any() else far.max() for p in near.detach()]
            gaps = near - torch.stack(chosen) + margin
        losses.append(gaps.flatten())
    gaps = torch.cat(losses) if losses else d.sum() * torch.zeros(1).to(d)
    if soft:
        return torch.nn.functional.softplus(gaps).mean() if losses else gaps.sum()
    hinge = gaps.relu()
    number = int((gaps > 0).sum()) if mining == "all" else len(gaps)
    return hinge.sum() / max(number, 1)


def assert_like_brute_force(loss, case):
    """Value and both gradients (where equal distances do not make the choice a matter of taste)."""
    leaves = [t.clone().requires_grad_() for t in (case.x, case.reference)]
    wide = [t.double().requires_grad_() for t in (case.x, case.reference)]
    got = loss(leaves[0], reference=leaves[1], same=case.same, anchor_rows=case.rows)
    expected = brute(
        dataclasses.replace(case, x=wide[0], reference=wide[1]),
        *(loss.mining, loss.soft, loss.squared),
    )
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)
    got.backward()
    expected.backward()
    assert all(leaf.grad.isfinite().all() for leaf in leaves)
    return [(leaf.grad.double(), other.grad) for leaf, other in zip(leaves, wide, strict=True)]


@settings(deadline=None, max_examples=80)
@given(cases(), st.sampled_from(list(LOSSES)))
def test_losses_equal_brute_force(case, name):
    gradients = assert_like_brute_force(LOSSES[name], case)
    if name.startswith("all"):
        for got, expected in gradients:
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("classes", [2, 5, 40])
def test_losses_of_many_positives_equal_brute_force(name, classes):
    for got, expected in assert_like_brute_force(LOSSES[name], large(classes=classes)):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


@settings(deadline=None, max_examples=60)
@given(cases(), st.sampled_from([0.0, 1.0, 2.0]), st.booleans())
def test_triplets_are_what_the_masks_say(case, margin, squared):
    d = (case.x[:, None] - case.reference[None]).square().sum(dim=2)
    d = d if squared else d.sqrt()
    positive, negative = case.masks
    valid = positive[:, :, None] & negative[:, None, :]
    gap = d[:, None, :] - d[:, :, None]
    kinds = kinds_of(valid, gap, margin)
    options = case.options | {"margin": margin, "squared": squared}
    for kind, mask in kinds.items():
        got = mine_triplets(case.x, kind=kind, **options)
        pairs = list(zip(got[0].tolist(), got[1].tolist(), strict=True))
        assert pairs == sorted(pairs)
        assert as_set(got) == as_set(mask.nonzero(as_tuple=True)), kind
    drawn = mine_triplets(case.x, kind="random", **options)
    assert drawn[0].tolist() == valid.flatten(1).any(dim=1).nonzero()[:, 0].tolist()
    assert valid[drawn].all()
    told = describe_triplets(case.x, **options)
    number = max(int(valid.sum()), 1)
    assert told.triplets == int(valid.sum())
    assert told.hard == pytest.approx(int(kinds["hard"].sum()) / number)
    assert told.semihard == pytest.approx(int(kinds["semihard"].sum()) / number)
    assert told.active == pytest.approx(told.hard + told.semihard)
    for mean, mask in ((told.positive_distance, positive), (told.negative_distance, negative)):
        assert mean == pytest.approx(float(d[mask].mean()) if mask.any() else 0.0, rel=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_labels_and_the_matrix_that_they_make_are_the_same(name):
    torch.manual_seed(0)
    x, labels = torch.randn(60, 4), torch.randint(7, (60,))
    gradients = []
    for given_as in ({"labels": labels}, {"same": labels[:, None] == labels}):
        leaf = x.clone().requires_grad_()
        value = LOSSES[name](leaf, **given_as)
        value.backward()
        gradients.append((value.detach(), leaf.grad))
    for got, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(got, expected)
    assert describe_triplets(x, labels) == describe_triplets(x, same=labels[:, None] == labels)


@pytest.mark.parametrize("name", LOSSES)
def test_the_batch_as_its_own_reference(name):
    torch.manual_seed(1)
    x, labels = torch.randn(40, 4), torch.randint(4, (40,))
    expected = LOSSES[name](x, labels)
    for reference in (x, x.detach(), x[:], torch.as_strided(x, (40, 4), (4, 1))):
        got = LOSSES[name](x, labels, reference=reference, reference_labels=labels)
        torch.testing.assert_close(got, expected)
    copied = {"reference": x.clone(), "reference_labels": labels}
    told = LOSSES[name](x, labels, **copied, anchor_rows=torch.arange(40))
    torch.testing.assert_close(told, expected)
    # A copy that is not told has each anchor among its own positives, at distance zero.
    assert describe_triplets(x, labels, **copied).triplets > describe_triplets(x, labels).triplets


def test_a_slice_of_the_reference_is_found_by_where_it_lies():
    torch.manual_seed(2)
    bank, names = torch.randn(50, 4), torch.randint(4, (50,))
    for places in (slice(10, 30), slice(0, 50, 3), slice(1, 50, 7)):
        rows = torch.arange(50)[places]
        got = batch_all_triplet_loss(
            bank[places], names[places], reference=bank, reference_labels=names
        )
        told = batch_all_triplet_loss(
            bank[places].clone(), names[places], reference=bank, reference_labels=names,
            anchor_rows=rows,
        )  # fmt: skip
        torch.testing.assert_close(got, told)
    # Other rows of the same memory are others: each anchor keeps all its positives.
    odd, even = bank[1::2], bank[::2]
    described = describe_triplets(odd, names[1::2], reference=even, reference_labels=names[::2])
    same = names[1::2, None] == names[::2]
    assert described.triplets == int((same.sum(dim=1) * (~same).sum(dim=1)).sum())
    # And a matrix seen through other columns shares memory, but no row.
    part = bank[:, :2]
    assert (
        describe_triplets(part, names, reference=bank[:, 2:], reference_labels=names).triplets
        == int(((names[:, None] == names).sum(1) * (names[:, None] != names).sum(1)).sum())
    )  # fmt: skip


@pytest.mark.parametrize("squared", [True, False])
def test_shares_of_a_batch_against_all_of_it_add_up_to_the_whole(squared):
    """As processes do that hold each a share of the anchors, and gather all embeddings."""
    torch.manual_seed(3)
    x, labels = torch.randn(31, 4, dtype=torch.float64), torch.randint(4, (31,))
    whole, parts = x.clone().requires_grad_(), x.clone().requires_grad_()
    total, active = batch_all_triplet_loss(
        whole, labels, squared=squared, reduction="sum", return_active=True
    )
    total.backward()
    values, numbers = [], []
    for rows in torch.arange(31).tensor_split(3):
        value, number = batch_all_triplet_loss(
            parts[rows], labels[rows], squared=squared, reduction="sum", return_active=True,
            reference=parts, reference_labels=labels, anchor_rows=rows,
        )  # fmt: skip
        values.append(value)
        numbers.append(number)
    sum(values).backward()
    torch.testing.assert_close(sum(values), total)
    assert sum(numbers) == active
    torch.testing.assert_close(parts.grad, whole.grad)


def test_several_labels_an_item():
    """Alike are those that share a label; that is no equivalence."""
    has = torch.tensor([[1, 1, 0], [0, 1, 1], [0, 0, 1], [1, 0, 0]], dtype=torch.int64)
    same = (has @ has.T) > 0
    a, p, n = mine_triplets(torch.randn(4, 2), same=same)
    listed = list(zip(a.tolist(), p.tolist(), n.tolist(), strict=True))
    assert listed == [(0, 1, 2), (0, 3, 2), (1, 0, 3), (1, 2, 3), (2, 1, 0), (2, 1, 3),
                      (3, 0, 1), (3, 0, 2)]  # fmt: skip


@pytest.mark.parametrize("trained", ["embeddings", "reference"])
def test_gradient_only_where_one_is_wanted(trained):
    case = large()
    leaf = getattr(case, "x" if trained == "embeddings" else "reference").requires_grad_()
    TripletLoss()(case.x, **case.options).backward()
    assert leaf.grad.abs().sum() > 0


def test_memory_goes_with_the_pairs_and_not_with_the_triplets():
    case = large(n=50, r=400, classes=3)
    for loss in (loss for name, loss in LOSSES.items() if name != "all, soft"):
        leaf = case.x.clone().requires_grad_()
        with LargestTensor() as seen:
            loss(leaf, **case.options).backward()
        assert 50 * 400 <= seen.numbers <= 50 * 408


X, Y = torch.randn(4, 3), torch.tensor([0, 0, 1, 1])
BAD = {
    "neither": ({}, ValueError, "labels or same must be given, got neither"),
    "both": (
        {"labels": Y, "same": torch.eye(4).bool()}, ValueError, "must be given, got both",
    ),
    "labels alone": (
        {"labels": Y, "reference": X}, TypeError, "reference_labels must be a torch.Tensor",
    ),
    "no reference": (
        {"labels": Y, "reference_labels": Y}, ValueError, "reference_labels must come with a ref",
    ),
    "rows, no reference": (
        {"labels": Y, "anchor_rows": Y}, ValueError, "anchor_rows must come with a reference",
    ),
    "columns": (
        {"labels": Y, "reference": torch.randn(4, 2), "reference_labels": Y}, ValueError,
        "reference must match embeddings in columns, dtype and device: .3, torch.float32, cpu.",
    ),
    "dtype": (
        {"labels": Y, "reference": X.double(), "reference_labels": Y}, ValueError,
        "reference must match embeddings",
    ),
    "nan": (
        {"labels": Y, "reference": X * torch.nan, "reference_labels": Y}, ValueError,
        "reference must be finite",
    ),
    "length": (
        {"labels": Y, "reference": X, "reference_labels": Y[:3]}, ValueError,
        r"reference_labels must have shape \(4,\), one for each row of reference",
    ),
    "same of numbers": ({"same": torch.eye(4)}, TypeError, "same must be a torch.Tensor of bool"),
    "same's shape": (
        {"same": torch.eye(3).bool()}, ValueError, r"same must have shape \(4, 4\)",
    ),
    "same and names": (
        {"same": torch.eye(4).bool(), "reference": X, "reference_labels": Y}, ValueError,
        "reference_labels must come with labels",
    ),
    "row beyond": (
        {"labels": Y, "reference": X, "reference_labels": Y, "anchor_rows": Y + 3}, ValueError,
        "anchor_rows must be from -1 .none. to 3, got 3 to 4",
    ),
    "rows' shape": (
        {"labels": Y, "reference": X, "reference_labels": Y, "anchor_rows": Y[:2]}, ValueError,
        r"anchor_rows must have shape \(4,\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("call", [batch_all_triplet_loss, TripletLoss(mining="hard"),
                                  describe_triplets, mine_triplets])  # fmt: skip
@pytest.mark.parametrize("name", BAD)
def test_errors(call, name):
    options, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call(X, **options)
