import collections
import itertools

import pytest
import torch
from devices import DEVICES, FAKE, FakeDevice, NoDouble
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from tripletlib import BalancedBatchSampler, draw_triplets


def sampled(labels, classes, images, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return BalancedBatchSampler(labels, classes, images, generator=generator)


def test_batches_are_balanced():
    labels = torch.arange(1000) % 10
    batches = list(sampled(labels, 4, 5))
    assert len(batches) == len(sampled(labels, 4, 5)) == 1000 // 20
    for batch in batches:
        values, counts = labels[batch].unique(return_counts=True)
        assert len(values) == 4
        assert counts.tolist() == [5] * 4
        assert len(set(batch)) == 20


def test_epoch_shows_every_image_once_where_the_classes_are_equal():
    labels = torch.arange(1000) % 10
    shown = torch.tensor([index for batch in sampled(labels, 5, 20) for index in batch])
    assert shown.sort().values.tolist() == list(range(1000))


def test_unequal_classes_are_shown_equally_often_and_no_image_twice_before_all():
    labels = torch.repeat_interleave(torch.tensor([7, -3, 40]), torch.tensor([4, 100, 1000]))
    sampler = sampled(labels, 2, 4)
    shown = torch.tensor([index for batch in sampler for index in batch])
    assert len(shown) == (1104 // 8) * 8
    counts = shown.bincount(minlength=1104)
    per_class = torch.tensor([counts[labels == label].sum() for label in (7, -3, 40)])
    assert per_class.max() - per_class.min() <= 4
    for label in (7, -3, 40):
        assert counts[labels == label].max() - counts[labels == label].min() <= 1


def test_class_smaller_than_its_share_repeats_its_images():
    labels = torch.tensor([0, 1, 1, 1, 1, 1, 1, 1])
    for batch in sampled(labels, 2, 3):
        assert (labels[batch] == 0).sum() == 3
        assert len({index for index in batch if labels[index] == 1}) == 3


def test_epochs_differ_and_a_seed_repeats_them():
    labels = torch.arange(200) % 10
    first, again = sampled(labels, 10, 4), sampled(labels, 10, 4)
    epochs = [list(first), list(first)]
    assert epochs[0] != epochs[1]
    assert [list(again), list(again)] == epochs


@pytest.mark.parametrize(
    ("labels", "classes", "images", "message"),
    [
        (torch.arange(10) % 2, 3, 2, "classes_per_batch must be at most .* 2, got 3"),
        (torch.arange(10) % 2, 1, 2, "classes_per_batch must be a whole number of at least 2"),
        (torch.arange(10) % 2, 2, 1, "images_per_class must be a whole number of at least 2"),
        (torch.arange(10) % 2, 2.0, 2, "classes_per_batch must be a whole number"),
        (torch.zeros(0, dtype=torch.int64), 2, 2, "classes_per_batch must be at most"),
        (torch.zeros(4, 2, dtype=torch.int64), 2, 2, "labels must have shape"),
    ],
)
def test_bad_arguments_are_named(labels, classes, images, message):
    with pytest.raises(ValueError, match=message):
        BalancedBatchSampler(labels, classes, images)


def test_floating_labels_are_refused():
    with pytest.raises(TypeError, match="labels must be integers, got torch.float32"):
        BalancedBatchSampler(torch.zeros(4), 2, 2)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


several_classes = st.lists(st.integers(-3, 3), min_size=3, max_size=40).filter(
    lambda labels: 1 < len(set(labels)) < len(labels)
)


@settings(deadline=None)
@given(several_classes, st.integers(1, 200), st.sampled_from([torch.int64, torch.int32]))
def test_drawn_triplets_are_valid(labels, count, dtype):
    labels = torch.tensor(labels, dtype=dtype)
    a, p, n = draw_triplets(labels, count, seeded())
    for column in (a, p, n):
        assert column.shape == (count,)
        assert column.dtype == torch.int64
    assert (labels[a] == labels[p]).all()
    assert (labels[a] != labels[n]).all()
    assert (a != p).all()


def test_every_triplet_is_drawn_as_often_as_documented():
    labels = torch.tensor([5, 8, 5, 2, 8, 5, 2, 9, 8, 8])
    expected = {}
    for a, p, n in itertools.product(range(10), repeat=3):
        kind, other = labels[a].item(), labels[n].item()
        if a != p and kind == labels[p] and kind != other:
            size, far = (labels == kind).sum().item(), (labels == other).sum().item()
            # Three of the four classes have two images, and there are three other classes.
            expected[a, p, n] = 1 / 3 / size / (size - 1) / 3 / far
    assert sum(expected.values()) == pytest.approx(1)
    count = 200_000
    drawn = collections.Counter(
        zip(*(column.tolist() for column in draw_triplets(labels, count, seeded())), strict=True)
    )
    assert drawn.keys() == expected.keys()
    observed = [drawn[triplet] for triplet in expected]
    assert chisquare(observed, [count * share for share in expected.values()]).pvalue > 0.001


def test_a_generator_repeats_triplets_and_goes_on_to_others():
    labels = torch.arange(100) % 10
    generator = seeded(3)
    first, second = draw_triplets(labels, 50, generator), draw_triplets(labels, 50, generator)
    again = draw_triplets(labels, 50, seeded(3))
    assert all(map(torch.equal, first, again))
    assert not all(map(torch.equal, first, second))
    torch.manual_seed(1)
    unseeded = draw_triplets(labels, 50)
    torch.manual_seed(1)
    assert all(map(torch.equal, unseeded, draw_triplets(labels, 50)))


@pytest.mark.parametrize(
    ("labels", "count", "message"),
    [
        ([], 1, "labels must hold at least two classes.*got 0 classes"),
        ([4, 4, 4], 1, "labels must hold at least two classes.*got 1 classes"),
        ([1, 2, 3], 1, "a class of at least two images.*the largest of 1 images"),
        ([0, 0, 1], 0, "count must be a whole number of at least 1, got 0"),
        ([0, 0, 1], 2.0, "count must be a whole number of at least 1, got 2.0"),
        ([[0, 0], [1, 1]], 1, "labels must have shape"),
    ],
)
def test_what_triplets_cannot_be_drawn_from_is_refused(labels, count, message):
    with pytest.raises(ValueError, match=message):
        draw_triplets(torch.tensor(labels, dtype=torch.int64), count)


@pytest.mark.parametrize("labels", [[0, 0, 1], torch.tensor([0.0, 0.0, 1.0])])
def test_labels_of_triplets_must_be_an_integer_tensor(labels):
    with pytest.raises(TypeError, match="labels must be"):
        draw_triplets(labels, 1)


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 7), min_size=2, max_size=9),
    st.integers(2, 9),
    st.integers(2, 9),
    st.integers(0, 10**6),
)
def test_the_documented_promises_hold_at_every_batch(sizes, classes, images, seed):
    classes = min(classes, len(sizes))
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    labels = labels[torch.randperm(len(labels), generator=seeded(seed))]
    sampler = sampled(labels, classes, images, seed)
    drawn, shown = [0] * len(sizes), [0] * len(labels)
    batches = list(sampler)
    assert len(batches) == len(sampler) == max(1, len(labels) // (classes * images))
    for batch in batches:
        hands = [batch[i : i + images] for i in range(0, len(batch), images)]
        own = [set(labels[hand].tolist()) for hand in hands]
        assert all(len(kinds) == 1 for kinds in own)
        assert len(set().union(*own)) == len(hands) == classes
        for hand, (kind,) in zip(hands, own, strict=True):
            drawn[kind] += 1
            assert len(set(hand)) == min(images, sizes[kind])
            for index in hand:
                shown[index] += 1
            members = (labels == kind).nonzero()[:, 0].tolist()
            times = [shown[index] for index in members]
            assert max(times) - min(times) <= 1
            within = [hand.count(index) for index in members]
            assert max(within) - min(within) <= 1
        assert max(drawn) - min(drawn) <= 1


def test_all_pairs_of_a_class_come_equally_often():
    labels = torch.tensor([0] * 5 + [1] * 5)
    sampler, pairs = sampled(labels, 2, 3), collections.Counter()
    for _ in range(4000):
        for batch in sampler:
            pairs.update(itertools.combinations(sorted(index for index in batch if index < 5), 2))
    assert len(pairs) == 10
    assert chisquare(list(pairs.values())).pvalue > 0.001


def test_drawing_leaves_nothing_behind_but_the_generator():
    sampler = sampled(torch.arange(50) % 7, 3, 4)
    before = {name: str(value) for name, value in vars(sampler).items() if name != "generator"}
    state = sampler.generator.get_state()
    first = list(sampler)
    assert {k: str(v) for k, v in vars(sampler).items() if k != "generator"} == before
    sampler.generator.set_state(state)
    assert list(sampler) == first


@pytest.mark.parametrize("device", [*DEVICES, FAKE])
def test_labels_may_be_on_any_device(device):
    labels = torch.arange(60) % 5
    with FakeDevice():
        batches = list(sampled(labels.to(device), 3, 4))
        triplets = draw_triplets(labels.to(device), 20, seeded())
        assert all(column.device.type == torch.device(device).type for column in triplets)
        triplets = [column.tolist() for column in triplets]
    assert batches == list(sampled(labels, 3, 4))
    assert triplets == [column.tolist() for column in draw_triplets(labels, 20, seeded())]
    with NoDouble():
        assert list(sampled(labels, 3, 4)) == batches


def test_the_default_device_and_that_of_the_generator_do_not_matter():
    labels = torch.arange(40) % 4

    def drawn():
        generator = torch.Generator().manual_seed(3)
        sampler = BalancedBatchSampler(labels, 4, 2, generator=generator)
        return list(sampler), draw_triplets(labels, 5, generator=generator)

    batches, triplets = drawn()
    with torch.device("meta"):
        again, same = drawn()
    assert again == batches
    assert all(torch.equal(*pair) for pair in zip(triplets, same, strict=True))


@pytest.mark.parametrize(
    "make", [lambda x: BalancedBatchSampler(x, 2, 2), lambda x: draw_triplets(x, 3)]
)
@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (None, TypeError, "labels must be a torch.Tensor, got NoneType"),
        (torch.tensor(3), ValueError, r"labels must have shape \(n,\), got \(\)"),
        (torch.zeros(3, 2, dtype=torch.int64), ValueError, r"labels must have shape \(n,\)"),
    ],
)
def test_labels_of_another_kind_are_named(make, labels, error, message):
    with pytest.raises(error, match=message):
        make(labels)
