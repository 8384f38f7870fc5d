import builtins
import hashlib
import io
import os
import random
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import tripletlib.search
from tripletlib import SearchIndex, load_fashion_mnist, load_image

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
        (lambda: SearchIndex(torch.full((1, 1), 1e200, dtype=torch.float64)), ValueError, "finite"),
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


def pixels(image):
    mean, deviation = tripletlib.search._PIXEL_STATISTICS["FashionMNIST"]
    return image[0, 0] * deviation + mean


def saved(image, path, **options):
    image.save(path, **options)
    return path


def shape_on(background, ink, size=(60, 60)):
    image = Image.new("L", size, background)
    image.paste(ink, (size[0] // 4, size[1] // 4, 3 * size[0] // 4, 3 * size[1] // 4))
    return image


def test_test_images_come_back_as_they_are(tmp_path):
    images, _ = load_fashion_mnist("test")
    for row in range(0, 10_000, 500):
        image = images[row : row + 1]
        grey = Image.fromarray(pixels(image).round().byte().numpy())
        torch.testing.assert_close(load_image(saved(grey, tmp_path / "a.png")), image)


def test_no_test_image_is_taken_for_a_negative():
    images, _ = load_fashion_mnist("test")
    border = torch.cat([images[..., [0, -1], :].flatten(1), images[..., [0, -1]].flatten(1)], dim=1)
    mean, deviation = tripletlib.search._PIXEL_STATISTICS["FashionMNIST"]
    assert (border.median(dim=1).values * deviation + mean).max() < 127


@pytest.mark.parametrize("background", [0, 255])
@pytest.mark.parametrize(
    ("kind", "modes"),
    {
        "png": "1 L P RGB RGBA LA I;16",
        "tiff": "1 L P RGB RGBA LA CMYK I I;16 F",
        "jpeg": "L RGB CMYK",
        "gif": "1 L P RGB RGBA LA",
        "bmp": "1 L P RGB RGBA",
        "webp": "L RGB RGBA",
    }.items(),
)
def test_every_kind_and_mode_shows_a_bright_shape_on_black(background, kind, modes, tmp_path):
    for mode in modes.split():
        image = shape_on(background, 255 - background)
        if mode in ("I", "I;16"):
            deep = np.asarray(image, np.uint16) * 257
            image = Image.fromarray(deep if mode == "I;16" else deep.astype(np.int32))
        else:
            image = image.convert(mode)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.simplefilter("ignore", DeprecationWarning)
            found = load_image(saved(image, tmp_path / f"image.{kind}"))
        assert found.shape == (1, 1, 28, 28)
        assert found.dtype == torch.float32
        values = pixels(found)
        assert values[9:19, 9:19].min() > 245, mode
        assert torch.cat([values[:5].flatten(), values[:, :5].flatten()]).max() < 10, mode


def test_colour_becomes_luma(tmp_path):
    image = Image.new("RGB", (28, 28), (200, 30, 60))
    luma = 0.299 * 200 + 0.587 * 30 + 0.114 * 60
    assert pixels(load_image(saved(image, tmp_path / "a.png"))).mean() == pytest.approx(luma, abs=1)


@pytest.mark.parametrize("ink", [0, 255])
@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_stands_on_transparency_is_seen(ink, mode, tmp_path):
    alpha = shape_on(0, 255)
    image = Image.merge("LA", [Image.new("L", alpha.size, ink), alpha])
    image = image.convert("RGBA") if mode == "RGBA" else image
    if mode == "P":
        image = shape_on(0, 1).copy()
        image = Image.fromarray(np.asarray(image), "L").convert("P")
        image.putpalette([90, 90, 90] + [ink] * 3)
        file = saved(image, tmp_path / "a.png", transparency=0)
    else:
        file = saved(image, tmp_path / "a.png")
    values = pixels(load_image(file))
    assert values[9:19, 9:19].min() > 245
    assert values[:5].max() < 10


def test_what_is_not_there_at_all_is_black(tmp_path):
    file = saved(Image.new("RGBA", (9, 9), (255, 0, 0, 0)), tmp_path / "a.png")
    assert pixels(load_image(file)).abs().max() < 1e-3


def test_a_turned_photo_is_set_upright(tmp_path):
    upright = Image.new("L", (56, 56))
    upright.paste(255, (0, 0, 56, 14))  # a bar along the top
    options = Image.Exif()
    options[0x0112] = 6  # "turn by 90 degrees clockwise to see it upright"
    file = saved(upright.rotate(90), tmp_path / "a.jpg", exif=options, quality=100)
    values = pixels(load_image(file))
    assert values[:6].min() > 240
    assert values[9:].max() < 15


@pytest.mark.parametrize("size", [(1, 1), (3, 200), (200, 3), (1, 5000), (900, 901), (28, 27)])
def test_any_shape_is_fitted_without_distortion(size, tmp_path):
    image = Image.new("L", size, 80)
    values = pixels(load_image(saved(image, tmp_path / "a.png"), size=32))
    assert values.shape == (32, 32)
    torch.testing.assert_close(values, torch.full((32, 32), 80.0), atol=0.5, rtol=0)


def test_a_wide_image_is_padded_above_and_below(tmp_path):
    image = Image.new("L", (280, 140))
    image.paste(255, (70, 35, 210, 105))
    values = pixels(load_image(saved(image, tmp_path / "a.png")))
    right = torch.zeros(28, 28)
    right[7 + 3 : 7 + 11, 7:21] = 255
    torch.testing.assert_close(values[12:16], right[12:16], atol=40, rtol=0)
    assert values[:9].abs().max() < 12
    assert values[19:].abs().max() < 12


def test_floats_of_any_range_are_stretched(tmp_path):
    for scale, shift in ((1.0, 0.0), (1e-6, -3.0), (1e6, 0.0)):
        image = Image.fromarray(np.asarray(shape_on(0, 1), np.float32) * scale + shift)
        values = pixels(load_image(saved(image, tmp_path / "a.tiff")))
        assert values.min() == pytest.approx(0, abs=1e-3)
        assert values.max() == pytest.approx(255, abs=1e-3)


def test_size_is_checked(tmp_path):
    with pytest.raises(ValueError, match="size must be a whole number"):
        load_image(saved(Image.new("L", (5, 5)), tmp_path / "a.png"), size=0)


def encoded(kind, size=(40, 40), **options):
    stream = io.BytesIO()
    generator = np.random.default_rng(0)
    image = Image.fromarray(generator.integers(256, size=(*size, 3), dtype=np.uint8))
    image.save(stream, kind, **options)
    return stream.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not an image",
        b"\x89PNG\r\n\x1a\n",
        encoded("png")[:-1000],
        encoded("jpeg")[:500],
        encoded("gif")[:300],
        encoded("tiff")[:200],
        encoded("webp")[:200],
        encoded("bmp")[:100],
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"%PDF-1.4",
    ],
    ids=lambda content: repr(content[:8]),
)
def test_what_is_no_whole_image_is_named(content, tmp_path):
    file = tmp_path / "photo.png"
    file.write_bytes(content)
    with pytest.raises(ValueError, match="photo.png is not an image, or it is damaged"):
        load_image(file)


@pytest.mark.parametrize("kind", ["png", "jpeg", "gif", "tiff", "webp", "bmp"])
def test_damage_gives_an_image_or_the_error_and_nothing_else(kind, tmp_path):
    sound, draw = encoded(kind, (12, 12)), random.Random(0)
    file = tmp_path / "photo"
    for _ in range(150):
        damaged = bytearray(sound)
        for _ in range(draw.randint(1, 8)):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        file.write_bytes(damaged[: draw.randint(1, len(damaged))])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                assert torch.isfinite(load_image(file)).all()
            except ValueError as error:
                assert str(file) in str(error)  # noqa: PT017


def test_a_bomb_is_refused(tmp_path, monkeypatch):
    file = saved(Image.new("1", (300, 300)), tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match="bomb.png has too many pixels"):
        load_image(file)


def test_errors_of_the_file_system_are_left_as_they_are(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing.png"):
        load_image(tmp_path / "missing.png")
    with pytest.raises((IsADirectoryError, PermissionError)):
        load_image(tmp_path)


def test_floats_that_are_not_finite_are_refused(tmp_path):
    values = np.ones((30, 30), np.float32)
    values[3, 3] = np.nan
    with pytest.raises(ValueError, match="a.tiff is not an image"):
        load_image(saved(Image.fromarray(values), tmp_path / "a.tiff"))
