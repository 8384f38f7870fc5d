import contextlib

import numpy as np
import pytest
import torch
from devices import DEVICES, FAKE, FakeDevice, NoDouble
from sklearn.neighbors import KNeighborsClassifier

from tripletlib import KNNClassifier, knn_accuracy
from tripletlib.neighbours import Search, _smallest


def clusters(count, dimensions=8, classes=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    centres = torch.randn(classes, dimensions, generator=torch.Generator().manual_seed(99))
    return centres[labels] + torch.randn(count, dimensions, generator=generator), labels


POINTS, LABELS = clusters(10)


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


def test_one_query_at_a_time_gives_the_same_answers():
    gallery, gallery_labels = clusters(100)
    queries, _ = clusters(20, seed=1)
    classifier = KNNClassifier(gallery, gallery_labels)
    alone = torch.cat([classifier.predict(query[None]) for query in queries])
    assert torch.equal(alone, classifier.predict(queries))
    assert classifier.predict(queries[:0]).shape == (0,)


def scattered(kind, generator):
    """Return a gallery of 2 000 and queries among which the search for one has work to do."""
    points = torch.randn(2010, 12, generator=generator)
    if kind == "tight classes":
        points = 5 * torch.eye(12)[torch.randint(7, (2010,), generator=generator)] + points / 20
    elif kind == "flat":
        points[:, 2:] *= 1e-3
    elif kind == "ties":
        points = points.round()
    elif kind == "one point":
        points[:2000] = 1.0
    elif kind == "no spread":
        points[:] = 0.0
    elif kind == "far queries":
        points[2000:] *= 1000
    elif kind == "one column":
        points = points[:, :1].contiguous()
    elif kind == "tiny":
        points *= 1e-30
    elif kind == "huge":
        points *= 1e30
    return points[:2000], points[2000:]


@pytest.mark.parametrize(
    "kind",
    [
        "round",
        "tight classes",
        "flat",
        "ties",
        "one point",
        "no spread",
        "far queries",
        "one column",
        "tiny",
        "huge",
    ],
)
@pytest.mark.parametrize("k", [1, 10, 400, 2000])
def test_the_search_for_one_query_finds_the_k_nearest(kind, k):
    gallery, queries = scattered(kind, torch.Generator().manual_seed(k))
    for dtype in (torch.float32, torch.float64):
        search = Search(gallery.to(dtype))
        exact = (queries[:, None].double() - gallery.double()).square().sum(dim=2)
        rounding = 8 * torch.finfo(dtype).eps * float(exact.max())
        for query, distances in zip(queries.to(dtype), exact, strict=True):
            ((_, (found,)),) = search.nearest(query[None], k)
            assert len(found.unique()) == k
            nearest = distances.sort().values[:k]
            torch.testing.assert_close(distances[found], nearest, atol=rounding, rtol=0)


@pytest.mark.parametrize("size", [1e-10, 1.0, 1e38])
def test_a_query_out_of_reach_of_float32_gets_an_answer(size):
    classifier = KNNClassifier(POINTS * 1e-30, LABELS, k=3)
    assert classifier.predict(POINTS[:1] * size).shape == (1,)


def test_a_gallery_out_of_reach_of_float32_gives_answers():
    classifier = KNNClassifier(POINTS.sign() * 3e38, LABELS, k=3)
    assert classifier.predict(POINTS[:1]).shape == (1,)
    assert classifier.predict(POINTS).shape == (10,)


def by_definition(queries, gallery, k, within=False):
    """The k nearest in 80 bits; of equal distances the first in the gallery."""
    queries, gallery = (of.double().numpy().astype(np.longdouble) for of in (queries, gallery))
    distances = np.stack([np.square(gallery - query).sum(axis=1) for query in queries])
    if within:
        np.fill_diagonal(distances, np.inf)
    return distances.argsort(axis=1, kind="stable")[:, :k].tolist()


def found(queries, gallery, k, within=False):
    parts = Search(gallery).nearest(queries, k, within=within)
    return torch.cat([indices for _, indices in parts]).tolist()


def hard_to_tell_apart():
    """Galleries of 600, and queries."""
    generator = torch.Generator().manual_seed(5)
    g, q = (torch.randn(count, 6, generator=generator) for count in (600, 12))
    corners = torch.tensor([[-1, -1e-4], [-1, 1e-4], [1, -1e-4], [1, 1e-4]])
    tiny = 5e-6 * g
    tiny[:, :2] += corners[torch.arange(600) % 4]
    return {
        "round": (g, q),
        "ties": (g.round(), q.round()),
        "duplicates": (g[torch.randint(40, (600,), generator=generator)], g[:12]),
        "bits": (g.sign(), q.sign()),
        "collapsed": (torch.full((600, 6), 0.3), torch.full((3, 6), 0.3)),
        "nearly collapsed": (0.3 + 1e-7 * g, 0.3 + 1e-7 * q),
        "one place near zero": (torch.full((600, 6), 1e-18), torch.zeros(3, 6)),
        "tiny clusters": (tiny, tiny[:12] + 1e-6 * q),
        "an outlier": (torch.cat([1e-12 * g, torch.full((1, 6), 1e3)]), 1e-12 * q),
        "huge": (6e37 * g, 6e37 * q),
        "the largest": (3e38 * g.sign(), 3e38 * q.sign()),
        "subnormal": (1e-42 * g, 1e-42 * q),
        "far queries": (g, 1e6 * q),
        "queries out of range": (1e-30 * g, 1e30 * q),
        "far from the origin": (1e4 + g, 1e4 + q),
        "one column": (g[:, :1], q[:, :1]),
        "many columns": (g.repeat(1, 512), q.repeat(1, 512)),
    }


@pytest.mark.parametrize("kind", hard_to_tell_apart())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_nearest_are_those_of_brute_force_alone_and_in_a_batch(kind, dtype):
    gallery, queries = (of.to(dtype) for of in hard_to_tell_apart()[kind])
    for k in (1, 10, 400):
        right = by_definition(queries, gallery, k)
        assert found(queries, gallery, k) == right
        assert [found(query[None], gallery, k)[0] for query in queries] == right
    among = gallery[:40]
    assert found(among, among, 7, within=True) == by_definition(among, among, 7, within=True)


def test_float64_queries_are_not_rounded_to_the_gallerys_type():
    gallery = torch.tensor([[1.0], [1.0 + 2**-20]])
    middle = 1 + 2.0**-21
    queries = torch.tensor([[middle - 1e-12], [middle + 1e-12]], dtype=torch.float64)
    assert found(queries, gallery, 1) == [[0], [1]]


def test_most_queries_need_no_comparison_with_all(monkeypatch):
    gallery, _ = clusters(5000)
    queries, _ = clusters(50, seed=1)
    monkeypatch.setattr(Search, "differences", None)
    assert found(queries, gallery, 10) == by_definition(queries, gallery, 10)


def test_autocast_and_a_device_without_float64_change_nothing():
    gallery, queries = 3 + 1e-3 * clusters(500)[0], 3 + 1e-3 * clusters(20, seed=1)[0]
    plain = found(queries, gallery, 10)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert found(queries, gallery, 10) == plain
        assert found(queries[:1], gallery, 10) == plain[:1]
    with NoDouble():
        assert found(queries, gallery, 10) == plain


@pytest.mark.parametrize("device", [*DEVICES, FAKE])
def test_the_classifier_works_on_any_device(device):
    gallery, gallery_labels = clusters(300)
    queries, _ = clusters(20, seed=1)
    right = KNNClassifier(gallery, gallery_labels).predict(queries)
    with FakeDevice():
        for items, labels, asked in (
            (gallery.to(device), gallery_labels.to(device), queries.to(device)),
            (gallery.to(device), gallery_labels, queries),
            (gallery, gallery_labels.to(device), queries.to(device)),
        ):
            predicted = KNNClassifier(items, labels).predict(asked)
            assert predicted.device == labels.device
            assert predicted.tolist() == right.tolist()


def cut(bits):
    """A float32 matrix product that first cuts, or rounds, its factors to so many bits."""
    real = torch.addmm

    def addmm(added, x, y, *, alpha=1, out=None):
        x, y = (
            ((of.contiguous().view(torch.int32) + half) & -(2 ** (23 - bits))).view(torch.float32)
            for of, half in ((x, 0), (y, 2 ** (22 - bits)))
        )
        return real(added, x, y, alpha=alpha, out=out)

    return addmm


def refuse():
    raise RuntimeError("mix of the legacy and new APIs")


@pytest.mark.parametrize(
    ("setting", "bits"),
    [(lambda: "high", 10), (lambda: "medium", 7), (refuse, 7)],
    ids=["high", "medium", "set for a backend"],
)
def test_the_search_is_exact_where_torch_may_round_factors(setting, bits, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    centres = torch.nn.functional.normalize(torch.randn(20, 64, generator=generator))
    gallery = centres.repeat_interleave(300, 0)
    gallery += 0.003 * torch.randn(gallery.shape, generator=generator)
    queries = gallery[::100] + 0.003 * torch.randn(60, 64, generator=generator)
    right = by_definition(queries, gallery, 10)
    monkeypatch.setattr(torch, "addmm", cut(bits))
    assert found(queries, gallery, 10) != right
    monkeypatch.setattr(torch, "get_float32_matmul_precision", setting)
    assert found(queries, gallery, 10) == right


def uneven(dtype):
    """A gallery of 600 at distances from zero over the whole range of the type, in any order."""
    least, most = {torch.float32: (-140, 120), torch.float64: (-1060, 1010)}[dtype]
    generator = torch.Generator().manual_seed(2)
    powers = torch.linspace(least, most, 100, dtype=torch.float64).round().repeat_interleave(6)
    sizes = powers.exp2() * torch.tensor([1.0, 1.125, 1.25, 1.5, 1.625, 1.75]).repeat(100)
    gallery = torch.randn(600, 6, generator=generator).sign() * sizes[:, None]
    return gallery[torch.randperm(600, generator=generator)].to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", [1, 10, 400])
def test_the_nearest_in_a_gallery_of_every_size(dtype, k):
    gallery = uneven(dtype)
    queries = torch.cat([gallery.new_zeros(1, 6), gallery[:30] * 1.03125])
    exact = queries.numpy().astype(np.longdouble)[:, None] - gallery.numpy()
    exact = np.sqrt(np.square(exact).sum(axis=2))
    with NoDouble() if dtype == torch.float32 else contextlib.nullcontext():
        batch = found(queries, gallery, k)
        alone = [found(query[None], gallery, k)[0] for query in queries]
        among = found(gallery[:30], gallery[:30], 7, within=True)
    assert batch == alone
    assert batch[0] == exact[0].argsort(kind="stable")[:k].tolist()
    nearest = np.sort(exact, axis=1)[:, :k]
    got = np.take_along_axis(exact, np.array(batch), axis=1)
    np.testing.assert_allclose((got / nearest).astype(float), 1, rtol=8 * torch.finfo(dtype).eps)
    assert all(row not in indices for row, indices in enumerate(among))


def test_equal_distances_in_an_uneven_gallery_go_to_the_first():
    gallery = torch.tensor([[1e300], [2.0], [-1e-200], [1e-200], [0.0], [0.0]], dtype=torch.float64)
    assert found(torch.zeros(1, 1, dtype=torch.float64), gallery, 6) == [[4, 5, 2, 3, 1, 0]]


def test_points_without_columns_are_all_at_distance_zero():
    labels = torch.tensor([3, 1, 1, 2])
    predicted = KNNClassifier(torch.zeros(4, 0), labels, 3).predict(torch.zeros(2, 0))
    assert predicted.tolist() == [1, 1]


@pytest.mark.parametrize("width", [5, 700, 3328, 3391, 5000])
@pytest.mark.parametrize("count", [1, 13])
def test_the_smallest_of_rows_are_those_of_topk(width, count):
    count = min(count, width)
    rows = torch.stack([torch.randperm(width).float() for _ in range(20)])
    rows[0, :] = 3.0
    rows[1, -1] = -torch.inf
    values, places = _smallest(rows, count)
    expected = rows.topk(count, largest=False)
    assert torch.equal(values, expected.values)
    assert torch.equal(places[1:], expected.indices[1:])
    assert torch.equal(rows.gather(1, places), values)
    assert len(places[0].unique()) == count


@pytest.mark.parametrize("items", [2047, 2048, 2049, 6144, 7000])
def test_the_product_with_one_query_is_that_with_many(items):
    gallery, queries = torch.randn(items, 7), torch.randn(3, 7)
    search = Search(gallery)
    ((_, together, errors),) = search.distances(queries)
    for row, query in enumerate(queries):
        ((_, alone, error),) = search.distances(query[None])
        assert (alone[0] - together[row]).abs().max() <= error + errors[row]
    exact = (queries[:, None].double() - gallery).square().sum(2)
    exact -= exact.mean(dim=1, keepdim=True)
    alone = torch.cat([next(search.distances(query[None]))[1] for query in queries]).double()
    alone -= alone.mean(dim=1, keepdim=True)  # the unit and the query's norm are left out
    scale = (exact * alone).sum() / alone.square().sum()
    torch.testing.assert_close(alone * scale, exact, atol=1e-4, rtol=1e-4)
