import contextlib
import copy
import pickle
import statistics

import numpy as np
import pytest
import torch
from devices import DEVICES, FAKE, FakeDevice, NoDouble
from pytorch_metric_learning.distances import LpDistance
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.inference import CustomKNN
from scipy.stats import beta, bootstrap
from sklearn.neighbors import NearestNeighbors
from test_neighbours import LABELS, POINTS, clusters

import tripletlib.neighbours
import tripletlib.scores
from tripletlib import (
    Score,
    knn_accuracy,
    mean_average_precision_at_r,
    r_precision,
    recall_at_k,
)

AT_R = (r_precision, mean_average_precision_at_r)


def test_chunks_do_not_change_the_answer(monkeypatch):
    gallery, gallery_labels = clusters(100)
    queries, labels = clusters(50, seed=1)
    whole = knn_accuracy(queries, labels, gallery, gallery_labels)
    whole_recall = recall_at_k(gallery, gallery_labels, k=3)
    whole_at_r = [at_r(gallery, gallery_labels) for at_r in AT_R]
    monkeypatch.setattr(tripletlib.neighbours, "_CHUNK_BYTES", 2800)
    monkeypatch.setattr(tripletlib.scores, "_BLOCK_ROWS", 2)
    assert knn_accuracy(queries, labels, gallery, gallery_labels) == whole
    assert recall_at_k(gallery, gallery_labels, k=3) == whole_recall
    assert [at_r(gallery, gallery_labels) for at_r in AT_R] == pytest.approx(whole_at_r)


@pytest.mark.parametrize("k", [1, 4])
def test_recall_equals_a_search_by_scikit_learn(k):
    gallery, gallery_labels = clusters(200)
    queries, labels = clusters(100, seed=1)
    search = NearestNeighbors(algorithm="brute").fit(gallery.numpy())
    found = gallery_labels.numpy()[search.kneighbors(queries.numpy(), k, return_distance=False)]
    expected = (found == labels.numpy()[:, None]).any(axis=1).mean()
    assert recall_at_k(queries, labels, gallery, gallery_labels, k=k) == pytest.approx(expected)

    found = gallery_labels.numpy()[search.kneighbors(n_neighbors=k, return_distance=False)]
    expected = (found == gallery_labels.numpy()[:, None]).any(axis=1).mean()
    assert recall_at_k(gallery, gallery_labels, k=k) == pytest.approx(expected)


def test_recall_of_hand_worked_cases():
    points = torch.tensor([[0.0], [1.0], [3.0], [7.0]])
    labels = torch.tensor([0, 1, 0, 2])
    assert recall_at_k(points, labels, k=1) == 0.0  # nearest: 1, 0, 1, 2
    assert recall_at_k(points, labels, k=2) == 0.5  # the two of class 0 find each other
    assert recall_at_k(points, torch.tensor([0, 1, 2, 3]), k=3) == 0.0  # no class has a second


def test_r_precision_and_map_of_hand_worked_cases():
    gallery = torch.tensor([[1.0], [2.0], [3.0], [4.0], [5.0]])
    gallery_labels = torch.tensor([0, 1, 0, 0, 1])
    query = torch.tensor([[0.0]])
    # Class 0, R = 3: right, wrong, right. Class 1, R = 2: wrong, right.
    case = (query, torch.tensor([0]), gallery, gallery_labels)
    assert r_precision(*case) == pytest.approx(2 / 3)
    assert mean_average_precision_at_r(*case) == pytest.approx((1 / 1 + 2 / 3) / 3)
    case = (query, torch.tensor([1]), gallery, gallery_labels)
    assert r_precision(*case) == pytest.approx(1 / 2)
    assert mean_average_precision_at_r(*case) == pytest.approx((1 / 2) / 2)

    # Each point queries the others. Class 0: 0 finds 1 then 5, 1 finds 0 then 5, and 6 finds 5.
    points = torch.tensor([[0.0], [1.0], [5.0], [6.2]])
    labels = torch.tensor([0, 0, 1, 0])
    assert r_precision(points, labels) == pytest.approx((1 / 2 + 1 / 2 + 1 / 2) / 3)
    assert mean_average_precision_at_r(points, labels) == pytest.approx((1 / 2 + 1 / 2 + 1 / 4) / 3)
    assert r_precision(points, labels).queries == 3  # 5 is alone in its class


def test_no_score_is_owed_to_ties():
    gallery = torch.tensor([[1.0], [-1.0], [4.0]])
    query = torch.tensor([[0.0]])
    for labels in ([0, 1, 1], [1, 0, 1]):  # in any order of the gallery
        assert r_precision(query, torch.tensor([0]), gallery, torch.tensor(labels)) == 0.0
    assert r_precision(query, torch.tensor([0]), gallery, torch.tensor([0, 0, 1])) == 1.0
    collapsed = torch.full((30, 4), 0.3)
    for at_r in AT_R:
        assert at_r(collapsed, torch.arange(30) % 3) == 0.0


def by_definition(queries, labels, gallery, gallery_labels, within):
    """R-precision and average precision at R of each query that has anything to find."""
    values = []
    for i, (query, label) in enumerate(zip(queries.double(), labels, strict=True)):
        distances = (gallery.double() - query).norm(dim=1)
        others = [j for j in range(len(gallery)) if not (within and i == j)]
        others.sort(key=lambda j: (distances[j].item(), bool(gallery_labels[j] == label)))
        right = [bool(gallery_labels[j] == label) for j in others]
        if r := sum(right):
            precisions = [sum(right[: k + 1]) / (k + 1) for k in range(r) if right[k]]
            values.append((sum(right[:r]) / r, sum(precisions) / r))
    return np.array(values)


@pytest.mark.parametrize("classes", [2, 7, 40])
@pytest.mark.parametrize("grid", [True, False])
def test_r_precision_and_map_equal_their_definition(classes, grid):
    gallery, gallery_labels = clusters(120, dimensions=3, classes=classes)
    queries, labels = clusters(60, dimensions=3, classes=classes + 1, seed=1)
    if grid:  # with many ties
        gallery, queries = gallery.round(), queries.round()
    for case in ((queries, labels, gallery, gallery_labels), (gallery, gallery_labels)):
        expected = by_definition(*(case * 2)[:4], within=len(case) == 2)
        for at_r, values in zip(AT_R, expected.T, strict=True):
            score = at_r(*case)
            assert score == pytest.approx(values.mean(), abs=1e-12)
            assert score.queries == len(values)
            assert score.low <= score <= score.high


@pytest.mark.parametrize("classes", [3, 30])
def test_r_precision_and_map_equal_pytorch_metric_learning(classes):
    gallery, gallery_labels = clusters(300, classes=classes)
    queries, labels = clusters(200, classes=classes + 1, seed=1)
    names = ("r_precision", "mean_average_precision_at_r")
    calculator = AccuracyCalculator(
        names,
        k="max_bin_count",
        device=torch.device("cpu"),
        knn_func=CustomKNN(LpDistance(normalize_embeddings=False)),
        kmeans_func=len,  # never called; the default would want faiss
    )
    for case in ((queries, labels, gallery, gallery_labels), (gallery, gallery_labels)):
        expected = calculator.get_accuracy(*case)
        for at_r, name in zip(AT_R, names, strict=True):
            assert at_r(*case) == pytest.approx(expected[name], abs=1e-12)


def test_r_precision_and_map_of_other_types_and_places():
    points, labels = clusters(100)
    for at_r in AT_R:
        expected = at_r(points.double(), labels)
        assert at_r(points.requires_grad_(), labels.to(torch.uint8)) == pytest.approx(expected)
        assert at_r(points + 1000, labels) == pytest.approx(expected, abs=1e-3)
        for unit in (2.0**-90, 2.0**90):
            assert at_r(points * unit, labels) == pytest.approx(expected)
        assert at_r(points.half(), labels) == pytest.approx(expected, abs=1e-2)
        order = torch.randperm(100)
        assert at_r(points[order], labels[order] - 50) == pytest.approx(expected)


@pytest.mark.parametrize("at_r", AT_R)
def test_r_precision_and_map_name_bad_arguments(at_r):
    with pytest.raises(ValueError, match="given together"):
        at_r(POINTS, LABELS, POINTS)
    with pytest.raises(ValueError, match="at least one query, got none"):
        at_r(POINTS[:0], LABELS[:0])
    with pytest.raises(ValueError, match="gallery must hold at least one item, got none"):
        at_r(POINTS, LABELS, POINTS[:0], LABELS[:0])
    with pytest.raises(ValueError, match="columns of the gallery, got 8"):
        at_r(POINTS, LABELS, POINTS[:, :3], LABELS)
    with pytest.raises(ValueError, match="gallery must be finite"):
        at_r(POINTS, LABELS, POINTS / 0, LABELS)
    with pytest.raises(TypeError, match="labels must be integers"):
        at_r(POINTS, LABELS.float())
    with pytest.raises(ValueError, match="labels must share a class with what is searched"):
        at_r(POINTS, LABELS, POINTS, LABELS + 100)
    with pytest.raises(ValueError, match="labels must share a class with what is searched"):
        at_r(POINTS, torch.arange(10))


def test_the_bootstrap_is_that_of_scipy_and_the_same_each_time():
    values = np.random.default_rng(1).beta(8, 2, size=400)
    score = Score.of_values(values)
    again = Score.of_values(values)
    assert (score, score.low, score.high) == (again, again.low, again.high)
    assert score == pytest.approx(values.mean())
    assert score.queries == 400
    expected = bootstrap((values,), np.mean, method="percentile").confidence_interval
    assert score.low == pytest.approx(expected.low, abs=2e-3)
    assert score.high == pytest.approx(expected.high, abs=2e-3)
    alone = Score.of_values(np.array([0.5]))
    assert (alone.low, alone, alone.high) == (0.5, 0.5, 0.5)


def test_the_bootstrap_covers_the_truth_about_as_often_as_it_says():
    generator = np.random.default_rng(0)
    scores = [Score.of_values(generator.beta(8, 2, size=200)) for _ in range(200)]
    assert 0.9 <= np.mean([score.low <= 0.8 <= score.high for score in scores]) <= 0.99


def test_the_interval_is_clopper_pearson():
    score = Score.of_successes(9950, 10_000)
    assert score == 0.995
    assert score.low == pytest.approx(beta.ppf(0.025, 9950, 51))
    assert score.high == pytest.approx(beta.ppf(0.975, 9951, 50))
    assert Score.of_successes(5, 5).high == 1.0
    assert Score.of_successes(0, 5).low == 0.0


def test_the_interval_covers_the_truth_as_often_as_it_says():
    draws = np.random.default_rng(0).binomial(200, 0.9, size=1000)
    successes, times = np.unique(draws, return_counts=True)
    scores = [Score.of_successes(int(count), 200) for count in successes]
    covered = np.average([score.low <= 0.9 <= score.high for score in scores], weights=times)
    assert covered >= 0.94


def test_a_score_is_a_float_that_says_its_interval():
    score = Score.of_successes(9950, 10_000)
    assert f"{score:.3f}" == "0.995"
    assert str(score) == "99.50% (95 % interval 99.34% to 99.63%)"
    for copied in (copy.copy(score), copy.deepcopy(score), pickle.loads(pickle.dumps(score))):
        assert (copied, copied.low, copied.high, copied.queries) == (
            score,
            score.low,
            score.high,
            10_000,
        )


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((POINTS.numpy(), LABELS, POINTS, LABELS), TypeError, "embeddings must be a torch.Tensor"),
        ((POINTS.long(), LABELS, POINTS, LABELS), TypeError, "embeddings must be floating point"),
        ((POINTS[0], LABELS, POINTS, LABELS), ValueError, r"embeddings must have shape \(n, d\)"),
        ((POINTS, LABELS[:9], POINTS, LABELS), ValueError, r"labels must have shape \(10,\)"),
        ((POINTS, LABELS.float(), POINTS, LABELS), TypeError, "labels must be integers"),
        ((POINTS * torch.nan, LABELS, POINTS, LABELS), ValueError, "embeddings must be finite"),
        ((POINTS, LABELS, POINTS / 0, LABELS), ValueError, "gallery must be finite.*row 0"),
        ((POINTS, LABELS, POINTS, LABELS[:3]), ValueError, r"gallery_labels must have shape"),
        ((POINTS, LABELS, POINTS[:, :3], LABELS), ValueError, "columns of the gallery, got 8"),
        ((POINTS[:0], LABELS[:0], POINTS, LABELS), ValueError, "at least one query, got none"),
        ((POINTS, LABELS, POINTS[:3], LABELS[:3]), ValueError, "k must be at most the 3 .* got 5"),
        ((POINTS, LABELS, POINTS[:0], LABELS[:0]), ValueError, "k must be at most the 0"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        knn_accuracy(*arguments, k=5)
    with pytest.raises(error, match=message):
        recall_at_k(*arguments, k=5)


@pytest.mark.parametrize("k", [0, -1, 1.5, True])
def test_k_is_a_count(k):
    with pytest.raises(ValueError, match="k must be a whole number of at least 1"):
        knn_accuracy(POINTS, LABELS, POINTS, LABELS, k=k)


def test_recall_leaves_the_query_out_of_what_k_may_be():
    assert recall_at_k(POINTS, LABELS, k=9) >= 0
    with pytest.raises(ValueError, match="k must be at most"):
        recall_at_k(POINTS, LABELS, k=10)
    with pytest.raises(ValueError, match="given together"):
        recall_at_k(POINTS, LABELS, POINTS)


def test_scores_can_be_averaged_and_a_mean_has_no_interval():
    scores = [Score.of_successes(9, 10), Score.of_successes(7, 10)]
    assert statistics.mean(scores) == pytest.approx(0.8)
    assert repr(Score(0.8)) == "80.00%"
    assert "interval" in repr(scores[0])


def test_tiny_clusters_in_a_wide_cloud_are_told_apart():
    labels = torch.arange(200) % 4
    points = 5e-6 * torch.randn(200, 16)
    points[:, 0] += torch.tensor([-1.0, -1, 1, 1])[labels]
    points[:, 1] += torch.tensor([-1e-4, 1e-4, -1e-4, 1e-4])[labels]
    for dtype in (torch.float32, torch.float64):
        case = (points.to(dtype), labels)
        assert recall_at_k(*case) == 1.0
        assert knn_accuracy(*case, *case, k=5) == 1.0
        assert [at_r(*case) for at_r in AT_R] == [1.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("at_r", AT_R)
def test_identical_points_of_two_classes_tie(at_r, dtype):
    gallery = torch.randn(40, 37, dtype=dtype).repeat(2, 1)
    labels = torch.arange(80) // 40
    # The nearest own item is as near as the same point of the other class, which comes first.
    assert at_r(gallery[:1], labels[:1], gallery[[0, 40]], labels[[0, 40]]) == 0.0
    expected = by_definition(gallery, labels, gallery, labels, within=False)
    assert at_r(gallery, labels, gallery, labels) == pytest.approx(
        expected[:, AT_R.index(at_r)].mean(), abs=1e-12
    )


@pytest.mark.parametrize("size", [1e-30, 1e-18, 1e30, 1e38])
def test_extreme_sizes_give_the_same_scores(size):
    points, labels = clusters(100)
    points = points.clamp(-3, 3)
    for at_r in AT_R:
        assert at_r(points * size, labels) == pytest.approx(at_r(points, labels))


def every_score(queries, labels, gallery, gallery_labels):
    case = (queries, labels, gallery, gallery_labels)
    scores = [knn_accuracy(*case), recall_at_k(*case, k=3), *(at_r(*case) for at_r in AT_R)]
    scores += [recall_at_k(*case[:2]), *(at_r(*case[:2]) for at_r in AT_R)]
    return [(score, score.low, score.high) for score in scores]


def test_autocast_and_a_device_without_float64_change_no_score():
    case = (*clusters(60), *clusters(150, seed=1))
    plain = every_score(*case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert every_score(*case) == plain
    with NoDouble():
        assert every_score(*case) == plain


@pytest.mark.parametrize("device", [*DEVICES, FAKE])
@pytest.mark.parametrize("moved", [(0, 1, 2, 3), (0, 2), (1, 3), (0, 3)])
def test_scores_work_on_any_device_and_labels_may_be_elsewhere(device, moved):
    case = (*clusters(60), *clusters(150, seed=1))
    with FakeDevice():
        placed = [of.to(device) if i in moved else of for i, of in enumerate(case)]
        assert every_score(*placed) == every_score(*case)


@pytest.mark.parametrize("kind", ["uint8", "uint16", "uint32", "uint64", "int8", "int32"])
def test_labels_of_any_integer_type_give_the_same_scores(kind):
    gallery, gallery_labels = clusters(300)
    queries, labels = clusters(40, seed=1)
    right = every_score(queries, labels, gallery, gallery_labels)
    for of, other in ((kind, kind), (kind, "int64"), ("int64", kind), (kind, "uint16")):
        own, known = labels.to(getattr(torch, of)), gallery_labels.to(getattr(torch, other))
        assert every_score(queries, own, gallery, known) == right


def test_points_without_columns_all_tie():
    points, labels = torch.zeros(4, 0), torch.tensor([0, 0, 1, 1])
    same, others = torch.zeros(4, 2), torch.zeros(4, 0)
    assert recall_at_k(others, labels, k=2) == recall_at_k(same, labels, k=2)
    assert [at_r(points, labels) for at_r in AT_R] == [0.0, 0.0]
    assert knn_accuracy(points, labels, points, labels, k=1) == 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_item_far_away_does_not_spoil_the_scores_of_tiny_clusters(dtype):
    gallery, gallery_labels = clusters(300)
    queries, labels = clusters(40, seed=1)
    small, far = {torch.float32: (2.0**-110, 1e35), torch.float64: (2.0**-900, 1e250)}[dtype]
    with_far = torch.cat([gallery.to(dtype) * small, torch.full((1, 8), far, dtype=dtype)])
    its_label = torch.cat([gallery_labels, torch.tensor([99])])
    with NoDouble() if dtype == torch.float32 else contextlib.nullcontext():
        got = every_score(queries.to(dtype) * small, labels, with_far, its_label)
    assert got == every_score(queries, labels, gallery, gallery_labels)
