import copy
import pickle

import numpy as np
import pytest
import torch
from scipy.stats import beta
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors

import tripletlib.evaluation
from tripletlib import KNNClassifier, Score, knn_accuracy, recall_at_k


def clusters(count, dimensions=8, classes=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    centres = torch.randn(classes, dimensions, generator=torch.Generator().manual_seed(99))
    return centres[labels] + torch.randn(count, dimensions, generator=generator), labels


@pytest.mark.parametrize("k", [1, 2, 7, 30])
def test_knn_equals_scikit_learn(k):
    gallery, gallery_labels = clusters(300)
    queries, labels = clusters(200, seed=1)
    reference = KNeighborsClassifier(k).fit(gallery.numpy(), gallery_labels.numpy())
    predicted = KNNClassifier(gallery, gallery_labels, k).predict(queries)
    assert predicted.tolist() == reference.predict(queries.numpy()).tolist()
    accuracy = knn_accuracy(queries, labels, gallery, gallery_labels, k=k)
    assert accuracy == pytest.approx(reference.score(queries.numpy(), labels.numpy()))


def test_knn_is_right_far_from_the_origin():
    gallery, gallery_labels = clusters(300)
    queries, _ = clusters(200, seed=1)
    near = KNNClassifier(gallery.double(), gallery_labels, 5).predict(queries.double())
    far = KNNClassifier(gallery + 1000, gallery_labels, 5).predict(queries + 1000)
    assert (near == far).float().mean() > 0.99


def test_labels_of_any_value_come_back_and_ties_go_to_the_smallest():
    gallery = torch.tensor([[0.0], [1.0]])
    classifier = KNNClassifier(gallery, torch.tensor([70, -5]), k=2)
    assert classifier.predict(torch.tensor([[0.1], [0.9]])).tolist() == [-5, -5]
    classifier = KNNClassifier(gallery, torch.tensor([70, -5]), k=1)
    assert classifier.predict(torch.tensor([[0.1], [0.9]])).tolist() == [70, -5]


def test_chunks_do_not_change_the_answer(monkeypatch):
    gallery, gallery_labels = clusters(100)
    queries, labels = clusters(50, seed=1)
    whole = knn_accuracy(queries, labels, gallery, gallery_labels)
    whole_recall = recall_at_k(gallery, gallery_labels, k=3)
    monkeypatch.setattr(tripletlib.evaluation, "_CHUNK_ELEMENTS", 700)
    assert knn_accuracy(queries, labels, gallery, gallery_labels) == whole
    assert recall_at_k(gallery, gallery_labels, k=3) == whole_recall


def test_one_query_at_a_time_gives_the_same_answers():
    gallery, gallery_labels = clusters(100)
    queries, _ = clusters(20, seed=1)
    classifier = KNNClassifier(gallery, gallery_labels)
    alone = torch.cat([classifier.predict(query[None]) for query in queries])
    assert torch.equal(alone, classifier.predict(queries))
    assert classifier.predict(queries[:0]).shape == (0,)


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


def test_the_interval_is_clopper_pearson():
    score = Score.of_successes(9950, 10_000)
    assert score == 0.995
    assert score.low == pytest.approx(beta.ppf(0.025, 9950, 51))
    assert score.high == pytest.approx(beta.ppf(0.975, 9951, 50))
    assert Score.of_successes(5, 5).high == 1.0
    assert Score.of_successes(0, 5).low == 0.0


def test_the_interval_covers_the_truth_as_often_as_it_says():
    draws = np.random.default_rng(0).binomial(200, 0.9, size=1000)
    scores = [Score.of_successes(int(successes), 200) for successes in draws]
    covered = np.mean([score.low <= 0.9 <= score.high for score in scores])
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


POINTS, LABELS = clusters(10)


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
