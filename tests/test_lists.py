import itertools
import math

import numpy as np
import pytest
import torch
from devices import DEVICES, FAKE, FakeDevice, NoDouble
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import ndcg_score

import tripletlib.scores
from tripletlib import Score, list_recall_at_k, ndcg_at_k

OF_LISTS = (list_recall_at_k, ndcg_at_k)
NEVER = -torch.inf
SCORES = torch.tensor([[0.9, 0.5, 0.1, 0.7], [0.2, 0.4, 0.6, 0.8]])
WANTED = torch.tensor([[True, False, True, False], [False, False, True, False]])


def lists(n=60, items=30, *, grid=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(n, items, generator=generator, dtype=torch.float64)
    wanted = torch.rand(n, items, generator=generator) < 0.15
    return scores.round() if grid else scores, wanted


def of_one_order(order, wanted, k):
    """Recall and NDCG of one list, given as the places of items, by their definitions."""
    hits = [wanted[item] for item in order[:k]]
    gain = sum(hit / math.log2(place + 2) for place, hit in enumerate(hits))
    perfect = sum(1 / math.log2(place + 2) for place in range(min(k, sum(wanted))))
    return sum(hits) / sum(wanted), gain / perfect


def by_definition(scores, wanted, k):
    """Mean over all orders that the scores allow, of what is not minus infinity."""
    items = [i for i, score in enumerate(scores) if score != NEVER]
    orders = [
        order
        for order in itertools.permutations(items)
        if all(scores[a] >= scores[b] for a, b in itertools.pairwise(order))
    ]
    return np.mean([of_one_order(order, wanted, k) for order in orders], axis=0)


def test_hand_worked_cases():
    # The first list is right, wrong, wrong, right; the second wrong, right.
    assert list_recall_at_k(SCORES, WANTED, k=1) == (1 / 2 + 0) / 2
    assert list_recall_at_k(SCORES, WANTED, k=2) == (1 / 2 + 1) / 2
    assert list_recall_at_k(SCORES, WANTED, k=4) == 1.0
    first = (1 + 1 / math.log2(5)) / (1 + 1 / math.log2(3))
    assert ndcg_at_k(SCORES, WANTED, k=4) == pytest.approx((first + 1 / math.log2(3)) / 2)
    assert ndcg_at_k(SCORES, WANTED, k=1) == (1 + 0) / 2
    # Of three wanted items one place can hold one: recall is a third, the list is perfect.
    wanted = torch.tensor([[True, True, False, True]])
    assert list_recall_at_k(SCORES[:1], wanted, k=1) == pytest.approx(1 / 3)
    assert ndcg_at_k(SCORES[:1], wanted, k=1) == 1.0


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_equal_their_definition_also_with_ties_and_items_never_recommended(data):
    items = data.draw(st.integers(1, 6))
    score = st.sampled_from([NEVER, -1.5, 0.0, 0.25, 3.0])
    scores = data.draw(st.lists(score, min_size=items, max_size=items))
    wanted = data.draw(st.lists(st.booleans(), min_size=items, max_size=items).filter(any))
    k = data.draw(st.integers(1, items))
    right = by_definition(scores, wanted, k)
    case = (torch.tensor([scores]), torch.tensor([wanted]))
    assert [of(*case, k=k) for of in OF_LISTS] == pytest.approx(right, abs=1e-12)


@pytest.mark.parametrize("grid", [False, True])
@pytest.mark.parametrize("k", [1, 3, 10, 30])
def test_ndcg_equals_scikit_learn(k, grid):
    scores, wanted = lists(grid=grid)
    kept = wanted.any(dim=1)
    expected = ndcg_score(wanted[kept].numpy(), scores[kept].numpy(), k=k)
    assert ndcg_at_k(scores, wanted, k=k) == pytest.approx(expected)


def test_what_is_never_recommended_is_never_found_yet_wanted():
    scores = torch.tensor([[0.5, NEVER, NEVER, NEVER]])
    assert list_recall_at_k(scores, torch.tensor([[False, True, True, False]]), k=4) == 0.0
    half = torch.tensor([[True, True, False, False]])
    assert list_recall_at_k(scores, half, k=4) == 0.5
    assert ndcg_at_k(scores, half, k=4) == pytest.approx(1 / (1 + 1 / math.log2(3)))
    for of in OF_LISTS:
        assert of(torch.full((3, 4), NEVER), half.repeat(3, 1), k=2) == 0.0


def test_queries_that_want_nothing_are_left_out():
    scores, wanted = lists()
    wanted[::3] = False
    kept = wanted.any(dim=1)
    for of in OF_LISTS:
        score, values = of(scores, wanted, return_values=True)
        assert score == of(scores[kept], wanted[kept]) == of(scores, wanted)
        assert score.queries == len(values) == int(kept.sum()) < len(scores)


def test_values_are_those_of_the_queries_and_the_interval_is_theirs():
    scores, wanted = lists()
    wanted[:, 0] = True
    for of in OF_LISTS:
        score, values = of(scores, wanted, k=5, return_values=True)
        assert values.tolist() == [of(scores[[i]], wanted[[i]], k=5) for i in range(len(scores))]
        expected = Score.of_values(values)
        assert (score, score.low, score.high) == (expected, expected.low, expected.high)


def test_blocks_do_not_change_the_answer(monkeypatch):
    case = lists(grid=True)
    whole = [of(*case) for of in OF_LISTS]
    monkeypatch.setattr(tripletlib.scores, "_LISTS", 7)
    assert [of(*case) for of in OF_LISTS] == whole


def test_other_types_autocast_and_a_device_without_float64():
    scores, wanted = lists(grid=True)
    right = [of(scores, wanted) for of in OF_LISTS]
    for kind in (torch.float16, torch.bfloat16, torch.float32):
        with torch.autocast("cpu", dtype=torch.bfloat16), NoDouble():
            assert [of(scores.to(kind).requires_grad_(), wanted) for of in OF_LISTS] == right
    tiny = torch.tensor([[1.0, 1.0 + 1e-15]], dtype=torch.float64)
    assert list_recall_at_k(tiny, torch.tensor([[False, True]]), k=1) == 1.0


@pytest.mark.parametrize("device", [*DEVICES, FAKE])
@pytest.mark.parametrize("moved", [(0, 1), (0,), (1,)])
def test_lists_may_be_on_any_device(device, moved):
    case = [of.float() if i == 0 else of for i, of in enumerate(lists())]
    right = [of(*case) for of in OF_LISTS]
    with FakeDevice():
        placed = [of.to(device) if i in moved else of for i, of in enumerate(case)]
        assert [of(*placed) for of in OF_LISTS] == right


@pytest.mark.parametrize("of", OF_LISTS)
@pytest.mark.parametrize(
    ("scores", "wanted", "k", "error", "message"),
    [
        (SCORES.numpy(), WANTED, 2, TypeError, "scores must be a torch.Tensor, got ndarray"),
        (SCORES, WANTED.numpy(), 2, TypeError, "wanted must be a torch.Tensor, got ndarray"),
        (SCORES.long(), WANTED, 2, TypeError, "scores must be floating point, got torch.int64"),
        (SCORES, WANTED.long(), 2, TypeError, "wanted must be booleans, got torch.int64"),
        (SCORES[0], WANTED, 2, ValueError, r"scores must have shape \(n, items\), got \(4,\)"),
        (SCORES, WANTED[:1], 2, ValueError, r"shape of scores, \(2, 4\), got \(1, 4\)"),
        (SCORES, WANTED, 5, ValueError, "k must be at most the 4 items to search, got 5"),
        (SCORES, WANTED, 0, ValueError, "k must be a whole number of at least 1, got 0"),
        (SCORES * torch.nan, WANTED, 2, ValueError, "got NaN or plus infinity in row 0"),
        (SCORES / 0, WANTED, 2, ValueError, "minus infinity for what is not to be recommended"),
        (SCORES, ~WANTED & WANTED, 2, ValueError, "wanted must hold something to find, got none"),
        (SCORES[:0], WANTED[:0], 2, ValueError, "wanted must hold something to find, got none"),
    ],
)
def test_bad_arguments_are_named(of, scores, wanted, k, error, message):
    with pytest.raises(error, match=message):
        of(scores, wanted, k=k)
