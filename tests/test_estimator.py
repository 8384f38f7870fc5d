import pickle
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.model_selection import GridSearchCV
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from tripletlib import EmbeddingNet, TripletEmbedder

KINDS = ("linear", "deep")


@parametrize_with_checks([TripletEmbedder(kind=kind, epochs=2) for kind in KINDS])
def test_it_is_a_scikit_learn_estimator(estimator, check):
    check(estimator)


def problem(count=120, noise=4, size=1.0, seed=0):
    """Three classes told apart by three features, beside features of noise of some size."""
    generator = np.random.default_rng(seed)
    y = generator.integers(3, size=count)
    X = 3.0 * np.eye(3)[y] + generator.normal(size=(count, 3))
    return np.hstack([X, generator.normal(scale=size, size=(count, noise))]), y


X, Y = problem()


def small(kind="linear", **options):
    return TripletEmbedder(**{"n_components": 5, "kind": kind, "random_state": 0} | options)


@pytest.mark.parametrize("kind", KINDS)
def test_it_finds_the_classes_among_noisy_features(kind):
    train, test = (problem(300, noise=20, size=3.0, seed=seed) for seed in (0, 1))
    raw = KNeighborsClassifier().fit(*train).score(*test)
    model = make_pipeline(small(kind), KNeighborsClassifier()).fit(*train)
    assert model.score(*test) > raw + 0.2


def test_linear_learns_a_matrix_and_deep_a_point_on_the_sphere():
    shifted = 50 * X + 1e6
    linear = small().fit(shifted, Y)
    assert linear.components_.shape == (5, 7)
    points = linear.transform(shifted)
    np.testing.assert_allclose(points, (shifted - linear.mean_) @ linear.components_.T)
    scaled = torch.from_numpy((shifted - linear.mean_) / linear.scale_).float()
    np.testing.assert_allclose(points, linear.network_(scaled).detach(), atol=1e-5)
    # Neither unit nor origin of the data matters.
    np.testing.assert_allclose(points, small().fit(X, Y).transform(X), rtol=0.02, atol=0.02)
    deep = small("deep").fit(X, Y)
    np.testing.assert_allclose(np.linalg.norm(deep.transform(X), axis=1), 1.0, rtol=1e-6)
    assert not hasattr(deep, "components_")


def test_words_are_labels_and_columns_have_names():
    words = np.array(["cat", "dog", "eel"])[Y]
    frame = pd.DataFrame(X, columns=list("abcdefg"))
    embedder = small().set_output(transform="pandas").fit(frame, words)
    assert embedder.classes_.tolist() == ["cat", "dog", "eel"]
    assert embedder.feature_names_in_.tolist() == list("abcdefg")
    points = embedder.transform(frame)
    assert points.columns.tolist() == [f"tripletembedder{i}" for i in range(5)]
    np.testing.assert_allclose(points, small().fit(X, Y).transform(X))


@pytest.mark.parametrize("kind", KINDS)
def test_the_random_state_fixes_all_and_torch_keeps_its_own(kind):
    torch.manual_seed(8)
    expected = torch.rand(3)
    torch.manual_seed(8)
    points = small(kind, epochs=3).fit_transform(X, Y)
    assert torch.equal(torch.rand(3), expected)
    again = clone(small(kind, epochs=3)).fit(X, Y).transform(X)
    np.testing.assert_array_equal(points, again)
    other = small(kind, epochs=3, random_state=np.random.RandomState(1)).fit_transform(X, Y)
    assert not np.allclose(points, other)


def test_a_pickle_gives_the_same_points_in_another_process(tmp_path):
    embedders = [small(kind, epochs=2).fit(X, Y) for kind in KINDS]
    expected = [embedder.transform(X) for embedder in embedders]
    content = pickle.dumps((embedders, X))
    here = [embedder.transform(X) for embedder in pickle.loads(content)[0]]
    np.testing.assert_array_equal(here, expected)
    (tmp_path / "in").write_bytes(content)
    code = (
        "import pickle, sys; embedders, X = pickle.load(open(sys.argv[1], 'rb'));"
        "points = [embedder.transform(X) for embedder in embedders];"
        "pickle.dump(points, open(sys.argv[2], 'wb'))"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "in", tmp_path / "out"], check=True)
    there = pickle.loads((tmp_path / "out").read_bytes())
    np.testing.assert_allclose(there, expected, atol=1e-6)


def test_a_grid_search_chooses_components_and_margin():
    model = make_pipeline(StandardScaler(), small(epochs=40), KNeighborsClassifier())
    grid = {"tripletembedder__n_components": [1, 4], "tripletembedder__margin": [0.1, 1.0]}
    search = GridSearchCV(model, grid, cv=2).fit(X, Y)
    assert search.best_params_["tripletembedder__n_components"] == 4
    assert search.best_score_ > 0.8


@pytest.mark.parametrize(
    ("shape", "seen"),
    [((8, 8), (28, 28)), ((20, 40), (28, 40)), ((3, 24, 26), (24, 26))],
)
def test_images_go_through_the_embedding_network(shape, seen, monkeypatch):
    sizes = []
    forward = EmbeddingNet.forward
    monkeypatch.setattr(
        EmbeddingNet, "forward", lambda net, x: sizes.append(tuple(x.shape[2:])) or forward(net, x)
    )
    images = np.random.default_rng(0).integers(256, size=(20, *shape), dtype=np.uint8)
    labels = np.arange(20) % 2
    embedder = small("deep", epochs=1).fit(images, labels)
    assert isinstance(embedder.network_, EmbeddingNet)
    assert embedder.sample_shape_ == shape
    assert embedder.n_features_in_ == np.prod(shape)
    points = embedder.transform(images)
    assert points.shape == (20, 5)
    assert set(sizes) == {seen}
    np.testing.assert_array_equal(embedder.transform(images.reshape(20, -1)), points)
    tensors = small("deep", epochs=1).fit(torch.from_numpy(images), torch.from_numpy(labels))
    np.testing.assert_array_equal(tensors.transform(torch.from_numpy(images)), points)
    flat = small(epochs=1).fit(images, labels)
    assert flat.components_.shape == (5, np.prod(shape))
    with pytest.raises(ValueError, match=r"X must hold samples of shape .*, got \(5, 5\)"):
        embedder.transform(np.zeros((2, 5, 5)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(8, 8), (3, 24, 26)])
def test_a_list_of_images_is_as_good_as_an_array(kind, shape):
    images = np.random.default_rng(0).integers(256, size=(20, *shape), dtype=np.uint8)
    labels = np.arange(20) % 2
    right = small(kind, epochs=1).fit(images, labels).transform(images)
    lists = [list(images), tuple(map(torch.from_numpy, images)), images.tolist()]
    lists += [[Image.fromarray(image) for image in images]] if len(shape) == 2 else []
    for listed in lists:
        embedder = small(kind, epochs=1).fit(listed, labels)
        assert embedder.sample_shape_ == shape
        np.testing.assert_allclose(embedder.transform(listed), right, rtol=1e-6)
    with pytest.raises(ValueError, match=r"of one shape, got .* and \(5, 5\)"):
        small(kind).fit([*images, np.zeros((5, 5))], [*labels, 0])


def test_channels_that_seem_to_come_last_are_told():
    images = np.random.default_rng(0).random((20, 24, 30, 3), np.float32)
    labels = np.arange(20) % 2
    for given in (images, list(images)):
        with pytest.raises(ValueError, match=r"got images of shape \(24, 30, 3\), where they seem"):
            small("deep").fit(given, labels)
    assert small("deep", epochs=1).fit(np.moveaxis(images, -1, 1), labels).network_.in_channels == 3
    assert small("linear", epochs=1).fit(images, labels).n_features_in_ == 24 * 30 * 3


def test_deep_learns_digits_from_small_images():
    images, labels = load_digits().images[:400], load_digits().target[:400]
    embedder = small("deep", n_components=16, epochs=3, batch_size=50)
    model = make_pipeline(embedder, KNeighborsClassifier()).fit(images[:200], labels[:200])
    assert model.score(images[200:], labels[200:]) > 0.7
    assert len(embedder.history_) == 12


def test_epochs_are_as_many_as_make_a_hundred_batches():
    assert len(small().fit(X, Y).history_) == 100
    assert len(small(batch_size=2).fit(X, Y).history_) == 120


def test_verbose_shows_the_bar(capsys):
    small(epochs=1, verbose=True).fit(X, Y)
    assert "loss=" in capsys.readouterr().out
    small(epochs=1).fit(X, Y)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("options", "X", "y", "message"),
    [
        ({"kind": "wide"}, X, Y, "kind must be one of 'linear', 'deep', got 'wide'"),
        ({"n_components": 0}, X, Y, "n_components must be a whole number of at least 1, got 0"),
        ({"margin": -1}, X, Y, "margin must be a finite number of at least 0"),
        ({"epochs": 0}, X, Y, "epochs must be a whole number of at least 1"),
        ({"batch_size": 0}, X, Y, "batch_size must be a whole number of at least 2"),
        ({"learning_rate": 0}, X, Y, "learning_rate must be a finite number above 0"),
        ({}, X, Y * 0.3, "Unknown label type: continuous"),
        ({}, X, Y * 0, "y must hold at least two classes, got one class"),
        ({}, X, Y[:9], "inconsistent numbers of samples"),
        ({}, X * np.nan, Y, "Input X contains NaN"),
        ({}, X[:, :, None, None, None], Y, "Found array with dim 5"),
        ({}, X, None, "requires y to be passed"),
    ],
)
def test_bad_arguments_are_named(options, X, y, message):
    with pytest.raises(ValueError, match=message):
        small(**options).fit(X, y)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("power", [-990, 1000])
def test_the_unit_of_the_data_does_not_matter_however_extreme(kind, power):
    unit = 2.0**power
    usual, extreme = small(kind).fit(X, Y), small(kind).fit(X * unit, Y)
    assert extreme.scale_ == usual.scale_ * unit
    np.testing.assert_allclose(extreme.transform(X * unit), usual.transform(X), rtol=1e-12)


def test_data_that_have_no_mean_in_float64_are_named():
    with np.errstate(over="ignore", invalid="ignore"):
        for far in (np.where(X > 0, 1.7e308, -1.7e308), np.where(X > 9, 1.0, 1.7e308)):
            with pytest.raises(ValueError, match="X must have a mean in float64's range"):
                small().fit(far, Y)


def test_data_of_one_value_or_nearly_are_not_divided_by_nothing():
    for flat in (X * 0 + 3, X * 5e-324, X * 1e-310):
        assert np.isfinite(small().fit(flat, Y).transform(flat)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_numpy_integers_are_counts(kind):
    counts = {"n_components": 5, "epochs": 2, "batch_size": 32}
    usual, numpys = (
        small(kind, **counts),
        small(kind, **{n: np.int64(c) for n, c in counts.items()}),
    )
    np.testing.assert_array_equal(*(of.fit(X, Y).transform(X) for of in (usual, numpys)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA"])
def test_colour_images_of_pil_are_taken_with_their_channels_first(kind, mode):
    channels = len(mode)
    pixels = np.random.default_rng(0).integers(256, size=(20, 24, 30, channels), dtype=np.uint8)
    images, labels = [Image.frombytes(mode, (30, 24), of.tobytes()) for of in pixels], Y[:20]
    first = np.moveaxis(pixels, -1, 1)
    embedder = small(kind, epochs=1).fit(images, labels)
    assert embedder.sample_shape_ == (channels, 24, 30)
    right = small(kind, epochs=1).fit(first, labels).transform(first)
    np.testing.assert_allclose(embedder.transform(images), right, rtol=1e-6)
    np.testing.assert_allclose(embedder.transform(first), right, rtol=1e-6)


def test_grey_images_of_pil_stay_as_they_are():
    images = [Image.new("L", (30, 24), i) for i in range(20)]
    assert small(epochs=1).fit(images, Y[:20]).sample_shape_ == (24, 30)
