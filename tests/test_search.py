import builtins
import hashlib
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from devices import DEVICES, FAKE, FakeDevice
from hypothesis import given, settings
from hypothesis import strategies as st

import tripletlib.search
from tripletlib import SearchIndex

faiss = pytest.importorskip("faiss")


KINDS = ("exact", "hnsw", "ivf")


def points(count, dimensions=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(20, dimensions, generator=torch.Generator().manual_seed(99))
    noise = torch.randn(count, dimensions, generator=generator)
    return torch.nn.functional.normalize(
        centres[torch.randint(20, (count,), generator=generator)] + 0.5 * noise
    )


def brute_force(queries, gallery, k):
    return torch.cdist(queries.double(), gallery.double()).topk(k, largest=False)


def recall(index, queries, gallery, k=10, **options):
    _, found = index.search(queries, k, **options)
    right = brute_force(queries, gallery, k).indices
    return (found[:, :, None] == right[:, None, :]).any(dim=2).float().mean()


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 60),
    st.integers(1, 40),
    st.integers(1, 12),
    st.sampled_from(KINDS),
    st.integers(0, 10**6),
    st.data(),
)
def test_distances_belong_to_their_indices_and_exact_ones_are_smallest(n, m, d, kind, seed, data):
    generator = torch.Generator().manual_seed(seed)
    gallery = torch.randn(n, d, generator=generator)
    queries = torch.randn(m, d, generator=generator)
    k = data.draw(st.integers(1, n))
    distances, indices = SearchIndex(gallery, kind).search(queries, k)
    assert distances.shape == indices.shape == (m, k)
    assert distances.dtype == torch.float32
    assert indices.dtype == torch.int64
    assert indices.min() >= 0
    assert all(len(set(row)) == k for row in indices.tolist())
    own = torch.cdist(queries.double(), gallery.double()).gather(1, indices)
    torch.testing.assert_close(distances.double(), own, atol=2e-3, rtol=1e-4)
    assert (distances.diff(dim=1) >= 0).all()
    if kind == "exact":
        smallest = brute_force(queries, gallery, k).values
        torch.testing.assert_close(own, smallest, atol=1e-4, rtol=1e-4)


def test_exact_search_finds_what_brute_force_finds():
    gallery, queries = points(3000), points(200, seed=1)
    distances, indices = SearchIndex(gallery).search(queries, 5)
    right = brute_force(queries, gallery, 5)
    torch.testing.assert_close(distances.double(), right.values, atol=1e-4, rtol=0)
    assert (indices == right.indices).float().mean() > 0.999


@pytest.mark.parametrize("kind", ["hnsw", "ivf"])
def test_approximate_search_finds_nearly_all_and_more_with_more_effort(kind):
    gallery, queries = points(5000), points(300, seed=1)
    index = SearchIndex(gallery, kind)
    assert recall(index, queries, gallery) > 0.9
    assert recall(index, queries, gallery, effort=500) > 0.995
    low, high = (recall(index, queries, gallery, effort=effort) for effort in (1, 500))
    assert low < high - 0.005


def test_all_cells_are_an_exact_search():
    gallery, queries = points(1000), points(50, seed=1)
    _, everywhere = SearchIndex(gallery, "ivf").search(queries, 7, effort=10**9)
    assert torch.equal(everywhere, SearchIndex(gallery).search(queries, 7)[1])


def test_the_same_ivf_index_twice():
    gallery, queries = points(2000), points(50, seed=1)
    one, two = (SearchIndex(gallery, "ivf").search(queries, effort=1)[1] for _ in range(2))
    assert torch.equal(one, two)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 2, 3, 10, 50])
def test_small_galleries_give_every_item_and_no_warning(kind, count, capfd):
    index = SearchIndex(points(count), kind)
    _, indices = index.search(points(4, seed=1), count, effort=None if kind == "exact" else 1)
    assert indices.sort(dim=1).values.tolist() == [list(range(count))] * 4
    assert len(index) == count
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("kind", KINDS)
def test_equal_points_are_all_found_at_distance_zero(kind):
    same = torch.ones(300, 4)
    distances, indices = SearchIndex(same, kind).search(same[:2], 300)
    assert indices.sort(dim=1).values.tolist() == [list(range(300))] * 2
    assert distances.max() == 0


def test_any_float_any_layout_and_no_query():
    gallery = points(100)
    index = SearchIndex(gallery.double().T.contiguous().T)
    queries = points(5, seed=1).requires_grad_()
    distances, indices = index.search(queries, 3)
    assert not distances.requires_grad
    right = SearchIndex(gallery).search(queries.detach().double(), 3)
    assert torch.equal(indices, right[1])
    none = index.search(queries[:0], 3)
    assert none[0].shape == none[1].shape == (0, 3)


def test_what_is_indexed_is_a_copy():
    gallery = points(50)
    index = SearchIndex(gallery)
    before = index.search(gallery[:5].clone(), 2)
    asked = gallery[:5].clone()
    gallery.zero_()
    assert torch.equal(index.search(asked, 2)[1], before[1])


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: SearchIndex([[1.0]]), TypeError, "embeddings must be a torch.Tensor"),
        (lambda: SearchIndex(torch.ones(3)), ValueError, r"shape \(n, d\)"),
        (lambda: SearchIndex(torch.ones(3, 2, dtype=torch.int64)), TypeError, "floating point"),
        (lambda: SearchIndex(torch.tensor([[0.0], [torch.nan]])), ValueError, "row 1"),
        (lambda: SearchIndex(1e200 * torch.ones(1, 1).double()), ValueError, "got 1e.200"),
        (lambda: SearchIndex(torch.ones(0, 2)), ValueError, "not be empty"),
        (lambda: SearchIndex(torch.ones(2, 0)), ValueError, "not be empty"),
        (lambda: SearchIndex(points(5), "fast"), ValueError, "kind must be one of"),
    ],
)
def test_bad_embeddings_are_refused(make, error, words):
    with pytest.raises(error, match=words):
        make()


@pytest.mark.parametrize(
    ("queries", "options", "error", "words"),
    [
        (torch.ones(1, 15), {}, ValueError, "16 columns of the index, got 15"),
        (torch.full((1, 16), torch.inf), {}, ValueError, "queries must be finite"),
        (np.ones((1, 16)), {}, TypeError, "queries must be a torch.Tensor"),
        (torch.ones(1, 16), {"k": 21}, ValueError, "at most the 20 embeddings, got 21"),
        (torch.ones(1, 16), {"k": 0}, ValueError, "k must be a whole number"),
        (torch.ones(1, 16), {"effort": 0}, ValueError, "effort must be a whole number"),
        (torch.ones(1, 16), {"effort": 2.5}, ValueError, "effort must be a whole number"),
    ],
)
@pytest.mark.parametrize("kind", ["hnsw", "ivf"])
def test_bad_queries_are_refused(kind, queries, options, error, words):
    with pytest.raises(error, match=words):
        SearchIndex(points(20), kind).search(queries, **options)


def test_an_exact_index_takes_no_effort():
    with pytest.raises(ValueError, match="approximate indices only"):
        SearchIndex(points(20)).search(points(1), effort=3)


PATCHED = """
import faiss.contrib.torch_utils  # replaces methods of FAISS, for this process
import torch
from tripletlib import SearchIndex
points = torch.randn(300, 8, generator=torch.Generator().manual_seed(0))
for kind in ("exact", "hnsw", "ivf"):
    index = SearchIndex(points, kind)
    assert index.search(points, 300)[1].sort().values.eq(torch.arange(300)).all()
    if kind != "exact":
        assert index.search(points, 1, effort=300)[1][:, 0].eq(torch.arange(300)).all()
"""


def test_beside_a_package_that_has_changed_faiss():
    subprocess.run([sys.executable, "-c", PATCHED], check=True)


def test_without_faiss_the_error_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "faiss":
            raise ImportError("no faiss")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match="pip install faiss-cpu"):
        SearchIndex(points(5))


@pytest.mark.parametrize("kind", KINDS)
def test_a_loaded_index_answers_as_the_saved_one(kind, tmp_path):
    index, queries = SearchIndex(points(500), kind), points(30, seed=1)
    file = tmp_path / "new folder" / "index"
    index.save(file)
    loaded = SearchIndex.load(str(file))
    for one, two in zip(index.search(queries), loaded.search(queries), strict=True):
        assert torch.equal(one, two)
    assert (loaded.kind, len(loaded), repr(loaded)) == (kind, 500, repr(index))
    assert [path.name for path in file.parent.iterdir()] == ["index"]


def test_the_payload_is_plain_faiss(tmp_path):
    gallery = points(50)
    SearchIndex(gallery).save(tmp_path / "index")
    content = (tmp_path / "index").read_bytes()
    header = content.index(b"\n") + 1 + 32
    assert content[header - 32 : header] == hashlib.sha256(content[header:]).digest()
    theirs = faiss.deserialize_index(np.frombuffer(content[header:], np.uint8))
    assert np.array_equal(theirs.reconstruct_n(0, 50), gallery.numpy())


@pytest.mark.parametrize("kind", KINDS)
def test_flipped_bytes_and_truncation_are_noticed(kind, tmp_path):
    file = tmp_path / "index"
    SearchIndex(points(12, 4), kind).save(file)
    sound = file.read_bytes()
    for place in (*range(min(300, len(sound))), *range(300, len(sound), 13)):
        file.write_bytes(sound[:place] + bytes([sound[place] ^ 0x10]) + sound[place + 1 :])
        with pytest.raises(ValueError, match=str(file)):
            SearchIndex.load(file)
    for length in range(0, len(sound), 29):
        file.write_bytes(sound[:length])
        with pytest.raises(ValueError, match=str(file)):
            SearchIndex.load(file)
    file.write_bytes(sound + b"\0")
    with pytest.raises(ValueError, match="damaged"):
        SearchIndex.load(file)


def test_other_files_are_refused(tmp_path):
    for name, content in {
        "empty": b"",
        "text": b"hello",
        "faiss": faiss.serialize_index(faiss.IndexFlatL2(3)).tobytes(),
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} is not an index"):
            SearchIndex.load(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="missing"):
        SearchIndex.load(tmp_path / "missing")


@pytest.mark.parametrize("payload", [b"", b"nothing that FAISS knows", b"IxPQ" + bytes(500)])
def test_a_payload_that_faiss_does_not_understand_is_named(payload, tmp_path):
    file = tmp_path / "future"
    file.write_bytes(tripletlib.search._MAGIC + hashlib.sha256(payload).digest() + payload)
    with pytest.raises(ValueError, match="future was written by another version"):
        SearchIndex.load(file)


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "index"
    SearchIndex(points(10)).save(file)
    sound = file.read_bytes()

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        SearchIndex(points(20)).save(file)
    assert file.read_bytes() == sound
    assert [path.name for path in tmp_path.iterdir()] == ["index"]


def test_a_folder_that_is_a_file_is_an_error(tmp_path):
    (tmp_path / "file").write_text("here")
    with pytest.raises(OSError, match="file"):
        SearchIndex(points(10)).save(tmp_path / "file" / "index")


def with_equal_ones(count=600, dimensions=8):
    gallery = points(count, dimensions)
    gallery = torch.cat([gallery, gallery[:1].repeat(count, 1), gallery[:50]])
    return gallery[torch.randperm(len(gallery), generator=torch.Generator().manual_seed(3))]


@pytest.mark.parametrize("kind", KINDS)
def test_many_equal_embeddings_hide_no_other(kind, tmp_path):
    gallery = with_equal_ones()
    index = SearchIndex(gallery, kind)
    assert len(index) == len(gallery) == 1250
    queries, options = gallery[::7], {} if kind == "exact" else {"effort": 1000}
    index.save(tmp_path / "index")
    for of in (index, SearchIndex.load(tmp_path / "index")):
        assert (len(of), of.kind) == (1250, kind)
        for k in (1, 3, 700, 1250):
            distances, indices = of.search(queries, k, **options)
            assert all(len(set(row)) == k for row in indices.tolist())
            right = brute_force(queries, gallery, k).values
            torch.testing.assert_close(distances.double(), right, atol=2e-3, rtol=0)
            own = torch.cdist(queries.double(), gallery.double()).gather(1, indices)
            torch.testing.assert_close(own, right, atol=2e-3, rtol=0)


def test_a_graph_holds_equal_embeddings_once_and_zeros_of_both_signs_are_equal():
    gallery = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, -0.0], [2.0, 0.0], [0.0, 1.0]])
    index = SearchIndex(gallery, "hnsw")
    assert index.index.ntotal == 3
    _, indices = index.search(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), 4)
    assert indices.tolist() == [[0, 2, 3, 1], [1, 4, 0, 2]]


@pytest.mark.parametrize("code", [b"IxPQ", b"IxFI", b"IHNs", b"IwPQ", b"IBxF", b"\0\0\0\0"])
def test_other_kinds_of_faiss_never_reach_it(code, tmp_path, monkeypatch):
    payload = code + bytes(500)
    file = tmp_path / "other"
    file.write_bytes(tripletlib.search._MAGIC + hashlib.sha256(payload).digest() + payload)
    monkeypatch.setattr(faiss, "deserialize_index", None)
    with pytest.raises(ValueError, match="other was written by another version"):
        SearchIndex.load(file)


def test_the_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    SearchIndex(points(5)).save("~/folder/index")
    assert (tmp_path / "folder" / "index").is_file()
    assert len(SearchIndex.load("~/folder/index")) == 5


@pytest.mark.parametrize("device", [*DEVICES, FAKE])
@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_and_queries_on_any_device(device, kind):
    gallery, queries = points(50), points(4, seed=1)
    right = SearchIndex(gallery, kind).search(queries, 5)
    with FakeDevice():
        answers = SearchIndex(gallery.to(device), kind).search(queries.to(device), 5)
    assert all(map(torch.equal, answers, right))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("power", [60, -51])
def test_the_unit_does_not_matter_within_the_range_of_squares(kind, power):
    gallery, queries = points(600, 8), points(40, 8, seed=1)
    distances, indices = SearchIndex(gallery, kind).search(queries, 5)
    index = SearchIndex(gallery.double() * 2.0**power, kind)
    scaled, same = index.search(queries.double() * 2.0**power, 5)
    assert (same == indices).float().mean() > 0.99
    torch.testing.assert_close(scaled * 2.0**-power, distances, atol=1e-3, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_largest_that_is_taken_gives_finite_distances(kind, capfd):
    corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 8)
    largest = (torch.finfo(torch.float32).max / 64) ** 0.5 * (1 - 1e-6)
    distances, indices = SearchIndex(corners * largest, kind).search(
        corners * largest, 256, **({} if kind == "exact" else {"effort": 256})
    )
    assert indices.sort(dim=1).values.eq(torch.arange(256)).all()
    right = torch.cdist(corners.double(), corners.double()).sort(dim=1).values
    torch.testing.assert_close(distances.double() / largest, right, atol=1e-3, rtol=0)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1e200, 1e20, 1e19, 1e-17, 1e-25, 1e-40, 1e-60])
def test_embeddings_whose_squares_leave_float32_are_refused(kind, size):
    gallery = points(600, 8).double()
    words = "embeddings must have a largest coordinate from 3.14e-16 to 2.31e.18, .* got"
    for of in (gallery * size, (gallery * size).float()):
        if of.isfinite().all() and of.any():
            with pytest.raises(ValueError, match=words):
                SearchIndex(of, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_queries_may_be_near_zero_but_not_too_large(kind):
    gallery, queries = points(600, 8), points(40, 8, seed=1)
    index = SearchIndex(gallery, kind)
    for size in (1e19, 1e25, 1e100):
        with pytest.raises(ValueError, match="queries must have a largest coordinate"):
            index.search(queries.double() * size, 3)
    distances, _ = index.search(queries.double() * 1e-60, 1)
    smallest = gallery.norm(dim=1).min().expand(40, 1)
    torch.testing.assert_close(distances, smallest, atol=1e-3, rtol=0)
    assert SearchIndex(0 * gallery, kind).search(queries, 600)[1].shape == (40, 600)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("integer", [np.int64, np.uint8, np.int16])
def test_numpy_integers_are_counts(kind, integer):
    index, queries = SearchIndex(points(50), kind), points(4, seed=1)
    options = [{}, {}] if kind == "exact" else [{"effort": 20}, {"effort": integer(20)}]
    right = index.search(queries, 3, **options[0])
    assert all(map(torch.equal, index.search(queries, integer(3), **options[1]), right))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_added_is_found_as_if_it_had_been_there(kind, tmp_path):
    gallery, queries = points(3000), points(100, seed=1)
    index = SearchIndex(gallery[:1000], kind)
    index.add(gallery[1000:1700])
    index.save(tmp_path / "kept.index")
    index = SearchIndex.load(tmp_path / "kept.index")
    index.add(gallery[1700:])
    index.add(gallery[:0])
    assert len(index) == 3000
    options = {} if kind == "exact" else {"effort": 3000}  # all cells, all candidates
    assert recall(index, queries, gallery, **options) > 0.999
    distances, found = index.search(queries, 5, **options)
    own = (queries[:, None] - gallery[found]).norm(dim=2)
    torch.testing.assert_close(distances, own, atol=2e-3, rtol=0)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(KINDS), st.lists(st.integers(1, 12), min_size=2, max_size=4), st.data())
def test_equal_embeddings_added_in_parts_are_all_found(kind, sizes, data):
    few = torch.eye(4)
    rows = [data.draw(st.integers(0, 3)) for _ in range(sum(sizes))]
    first, *others = few[rows].split(sizes)
    index = SearchIndex(first, kind)
    for part in others:
        index.add(part)
    assert len(index) == len(rows)
    distances, found = index.search(few, len(rows))
    assert torch.equal(found.sort(dim=1).values, torch.arange(len(rows)).expand(4, -1))
    right = torch.cdist(few, few[rows]).sort(dim=1).values
    torch.testing.assert_close(distances, right, atol=1e-3, rtol=0)
    own = torch.cdist(few, few[rows]).gather(1, found)
    torch.testing.assert_close(distances, own, atol=1e-3, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("added", "message"),
    [
        (torch.rand(3, 15), "embeddings must have the 16 columns of the index, got 15"),
        (torch.full((3, 16), torch.nan), "embeddings must be finite"),
        (torch.ones(3, 16, dtype=torch.int64), "embeddings must be floating point"),
        (1e30 * torch.rand(3, 16), "embeddings must have a largest coordinate"),
        (torch.rand(16), r"embeddings must have shape \(n, d\)"),
    ],
)
def test_what_cannot_be_added_leaves_the_index_as_it_was(kind, added, message):
    index, queries = SearchIndex(points(300), kind), points(20, seed=1)
    before = index.search(queries, 5)
    with pytest.raises((TypeError, ValueError), match=message):
        index.add(added)
    assert len(index) == 300
    assert all(torch.equal(a, b) for a, b in zip(index.search(queries, 5), before, strict=True))


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(KINDS), st.integers(2, 40), st.booleans(), st.booleans(), st.data())
def test_after_removing_an_index_answers_as_one_made_of_the_rest(kind, n, equal, named, data):
    gallery = torch.randn(n, 4, generator=torch.Generator().manual_seed(n))
    gallery = gallery[torch.arange(n) // 2] if equal else gallery
    gone = data.draw(st.sets(st.integers(0, n - 1), max_size=n - 1))
    names = [f"{i}.png" for i in range(n)]
    index = SearchIndex(gallery, kind, ids=names if named else None)
    index.remove([names[row] for row in gone] if named else torch.tensor(sorted(gone)).long())
    kept = [row for row in range(n) if row not in gone]
    assert len(index) == len(kept)
    assert index.ids == ([names[row] for row in kept] if named else None)
    options = {} if kind == "exact" else {"effort": 100}
    for rest in (gallery[kept], torch.cat([gallery[kept], gallery[:3]])):
        distances, found = index.search(gallery, len(rest), **options)
        assert torch.equal(found.sort(dim=1).values, torch.arange(len(rest)).expand(n, -1))
        right = torch.cdist(gallery, rest)
        torch.testing.assert_close(distances, right.sort(dim=1).values, atol=2e-3, rtol=0)
        torch.testing.assert_close(distances, right.gather(1, found), atol=2e-3, rtol=0)
        if len(rest) == len(kept):
            index.add(gallery[:3], [f"{i}.jpg" for i in range(min(n, 3))] if named else None)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("equal", [False, True])
@pytest.mark.parametrize("ids", [["a/é.png", "b/名.png", "c"], [7, -1, 10**12]])
def test_ids_go_into_the_file_and_come_back(kind, equal, ids, tmp_path):
    gallery = torch.eye(3)[[0, 0, 1]] if equal else torch.eye(3)
    SearchIndex(gallery, kind, ids=ids).save(tmp_path / "kept.index")
    index = SearchIndex.load(tmp_path / "kept.index")
    assert index.ids == ids
    assert [index.ids[row] for row in index.search(gallery[2:], 1)[1][0]] == ids[2:]
    index.remove(ids[:1])
    index.add(gallery[:1], ids[:1])
    assert index.ids == [*ids[1:], ids[0]]


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        ("abc", TypeError, "ids must be a sequence of str or of int, got str"),
        (3, TypeError, "ids must be a sequence of str or of int, got int"),
        (["a", "b"], ValueError, "ids must be 3, one for each row of embeddings, got 2"),
        (["a", "b", "a"], ValueError, "ids must be distinct, got 'a' twice"),
        (["a", "b", 3], TypeError, "ids must be all str or all int, got int, str"),
        ([1, 2, True], TypeError, "ids must be all str or all int, got bool, int"),
        ([0.5, 1.0, 2.0], TypeError, "ids must be all str or all int, got float"),
    ],
)
def test_bad_ids_are_refused_and_leave_the_index_as_it_was(ids, error, message):
    with pytest.raises(error, match=message):
        SearchIndex(torch.eye(3), ids=ids)
    index = SearchIndex(torch.eye(2, 3), ids=["x", "y"])
    with pytest.raises((TypeError, ValueError), match="ids must be"):
        index.add(torch.eye(3), ids)
    assert (len(index), index.ids, index.index.ntotal) == (2, ["x", "y"], 2)


def test_ids_are_for_all_embeddings_or_for_none():
    with pytest.raises(ValueError, match="this one has no ids"):
        SearchIndex(torch.eye(3)).add(torch.eye(3), ["a", "b", "c"])
    with pytest.raises(ValueError, match="this one has ids"):
        SearchIndex(torch.eye(3), ids=[1, 2, 3]).add(torch.eye(3))
    with pytest.raises(ValueError, match="ids must be distinct, got 2 twice"):
        SearchIndex(torch.eye(3), ids=[1, 2, 3]).add(torch.eye(1, 3), [2])


@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_be_removed_leaves_the_index_as_it_was(kind):
    index = SearchIndex(points(30), kind)
    wrong = (([3, 30], KeyError), ([-1], KeyError), (range(30), ValueError), ("3", TypeError))
    for which, error in wrong:
        with pytest.raises(error, match="which must"):
            index.remove(which)
        assert len(index) == index.index.ntotal == 30
    index.remove([])
    index.remove([4, 4])
    assert len(index) == 29


@pytest.mark.parametrize("kind", ["hnsw", "ivf"])
def test_threads_that_search_with_different_effort_do_not_disturb_each_other(kind):
    index, queries = SearchIndex(points(5000), kind), points(500, seed=1)
    efforts = [1, 2, 4, 300] * 8
    alone = {effort: index.search(queries, 10, effort=effort)[1] for effort in set(efforts)}
    assert not torch.equal(alone[1], alone[300])
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda e: index.search(queries, 10, effort=e)[1], efforts))
    for effort, found in zip(efforts, together, strict=True):
        assert torch.equal(found, alone[effort])


@pytest.mark.parametrize("kind", ["hnsw", "ivf"])
def test_effort_has_a_largest_value(kind):
    index = SearchIndex(points(50), kind)
    index.search(points(3), 5, effort=2**31 - 1)
    with pytest.raises(ValueError, match="effort must be at most 2147483647, got 2147483648"):
        index.search(points(3), 5, effort=2**31)


NO_ROWS = [
    (torch.tensor([False, False, True, True]), "bool"),
    (np.array([False, False, True, True]), "bool"),
    ([False, False, True, True], "bool"),
    ([np.True_], "bool"),
    ([torch.tensor(True)], "bool"),
    (torch.tensor([2.0]), "float"),
    ([np.float32(2)], "float"),
    ([None], "NoneType"),
    (torch.tensor([[2]]), "list"),
]


@pytest.mark.parametrize("ids", [None, [0, 1, 2, 3]])
@pytest.mark.parametrize(("which", "got"), NO_ROWS)
def test_masks_and_floats_remove_nothing(ids, which, got):
    index = SearchIndex(torch.eye(4), ids=ids)
    what = "rows" if ids is None else "ids"
    words = f"which must hold {what} as int or str, and no mask, got {got}$"
    with pytest.raises(TypeError, match=words):
        index.remove(which)
    assert (len(index), index.ids) == (4, ids)


@pytest.mark.parametrize("lone", [2, torch.tensor(2), np.array(2), "2", None])
def test_rows_and_ids_come_in_a_sequence(lone):
    words = f"must be a sequence of str or of int, got {type(lone).__name__}$"
    index = SearchIndex(torch.eye(4))
    with pytest.raises(TypeError, match=f"which {words}"):
        index.remove(lone)
    if lone is not None:
        with pytest.raises(TypeError, match=f"ids {words}"):
            SearchIndex(torch.eye(1, 4), ids=lone)
    assert len(index) == 4


def test_integers_and_words_of_numpy_and_torch_are_ids_and_rows():
    for of in (torch.tensor([1, 3]), np.array([1, 3], np.uint8), np.array([1, 3], object)):
        for which in (of, list(of), iter(of)):
            index, named = SearchIndex(torch.eye(4)), SearchIndex(torch.eye(2, 4), ids=list(of))
            index.remove(which)
            assert (len(index), named.ids) == (2, [1, 3])
            assert all(type(name) is int for name in named.ids)
    index = SearchIndex(torch.eye(3), ids=list(np.array(["a", "b", "c"])))
    index.remove(np.array(["b"]))
    assert index.ids == ["a", "c"]
