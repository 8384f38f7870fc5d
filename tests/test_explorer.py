import base64
import io
import json
import re
import shutil
import subprocess
from importlib.resources import files

import numpy as np
import pytest
import torch
from devices import DEVICES, FAKE, FakeDevice
from PIL import Image
from scipy.spatial.distance import cdist

from tripletlib import explore, load_mnist


def problem(n=60, classes=3, channels=1, side=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(n, 2, generator=generator)
    images = torch.rand(n, channels, side, side, generator=generator)
    return points, images, torch.arange(n) % classes


POINTS, IMAGES, LABELS = problem()
NAMES = ["one", "two", "three"]


def data_of(explorer):
    """Return what the script is given, as a browser reads it."""
    (call,) = re.findall(r"parentElement, (.*)\);\n\}\)\(\);", explorer.html)
    data = json.loads(call)
    kinds = {"points": "<u2", "labels": "<u2", "neighbours": "<u4"}
    for name, kind in kinds.items():
        data[name] = np.frombuffer(base64.b64decode(data[name]), kind).astype(int)
    data["points"] = data["points"].reshape(-1, 2)
    data["neighbours"] = data["neighbours"].reshape(-1, data["k"])
    return data


def thumbnails(data):
    """Cut the sheet into the images that the script will show, in [0, 255]."""
    picture = Image.open(io.BytesIO(base64.b64decode(data["sheet"].split(",")[1])))
    sheet = np.asarray(picture.convert("RGB")).astype(int)
    for place in range(data["count"]):
        row, column = divmod(place, data["columns"])
        y, x = row * data["pitch"], column * data["pitch"]
        yield sheet[y : y + data["height"], x : x + data["width"]]


def test_five_thousand_digits_make_less_than_a_megabyte():
    images, labels = (of[:5000] for of in load_mnist("test"))
    points = images.flatten(1)[:, [300, 400]] + torch.randn(5000, 2)
    bundle = explore(points, images, labels)._repr_mimebundle_()
    assert len(json.dumps(bundle)) < 1_000_000
    assert data_of(explore(points, images, labels))["count"] == 5000


def test_the_same_input_makes_the_same_bytes_and_another_does_not():
    first, second = (explore(*problem(), names=NAMES) for _ in range(2))
    assert first == second
    assert explore(*problem(seed=1), names=NAMES).html != first.html


def test_points_labels_and_neighbours_are_those_given():
    embeddings = torch.randn(60, 5)
    data = data_of(explore(POINTS, IMAGES, LABELS, embeddings=embeddings, k=4))
    assert (data["count"], data["k"], data["space"]) == (60, 4, "by embedding")
    assert data["labels"].tolist() == LABELS.tolist()
    # In place but for one scale and one shift, to a fraction of a thousandth.
    spans = [np.ptp(of, axis=0) for of in (data["points"], POINTS.numpy())]
    assert spans[0].max() == 65_535
    scale = 65_535 / spans[1].max()
    drawn = (data["points"] - data["points"][0]) / scale
    np.testing.assert_allclose(drawn, POINTS - POINTS[0], atol=2 / scale)
    distances = cdist(embeddings, embeddings)
    np.fill_diagonal(distances, np.inf)
    np.testing.assert_array_equal(data["neighbours"], distances.argsort(axis=1)[:, :4])


def test_without_embeddings_neighbours_are_those_on_the_map():
    data = data_of(explore(POINTS, IMAGES, LABELS, k=3))
    distances = cdist(POINTS, POINTS)
    np.fill_diagonal(distances, np.inf)
    np.testing.assert_array_equal(data["neighbours"], distances.argsort(axis=1)[:, :3])
    assert data["space"] == "on the map"


def test_an_image_is_no_neighbour_of_itself_even_where_all_lie_at_one_place():
    data = data_of(explore(torch.zeros(5, 2), IMAGES[:5], LABELS[:5], k=4))
    for place, found in enumerate(data["neighbours"].tolist()):
        assert sorted([place, *found]) == list(range(5))
    assert len(np.unique(data["points"])) == 1


def test_grey_images_are_dark_on_light_in_sixteen_shades():
    shown = np.stack(list(thumbnails(data_of(explore(POINTS, IMAGES, LABELS)))))
    low, high = IMAGES.min(), IMAGES.max()
    wanted = 255 * (1 - (IMAGES - low) / (high - low)).movedim(1, -1).numpy()
    assert shown.shape == (60, 8, 8, 3)
    np.testing.assert_allclose(shown, np.broadcast_to(wanted, shown.shape), atol=255 / 15 / 2 + 1)
    assert len(np.unique(shown)) == 16


def test_coloured_images_keep_their_colours():
    images = torch.rand(30, 3, 1, 1).expand(-1, -1, 20, 20)
    points, _, labels = problem(30)
    shown = np.stack(list(thumbnails(data_of(explore(points, images, labels)))))
    low, high = images.amin(dim=(0, 2, 3), keepdim=True), images.amax(dim=(0, 2, 3), keepdim=True)
    wanted = 255 * ((images - low) / (high - low)).movedim(1, -1).numpy()
    # With some loss, which is greatest at the edges.
    np.testing.assert_allclose(shown[:, 3:-3, 3:-3], wanted[:, 3:-3, 3:-3], atol=20)
    assert abs(shown - wanted).mean() < 4


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("shape", "thumbnail", "wanted"),
    [
        ((8, 8), 28, (8, 8)),
        ((64, 32), 16, (16, 8)),
        ((30, 61), 28, (14, 28)),
        ((200, 1), 8, (8, 1)),
    ],
)
def test_large_images_become_small_and_keep_their_shape(channels, shape, thumbnail, wanted):
    images = torch.rand(60, channels, *shape)
    data = data_of(explore(POINTS, images, LABELS, thumbnail=thumbnail))
    assert (data["height"], data["width"]) == wanted
    assert all(picture.shape == (*wanted, 3) for picture in thumbnails(data))


def test_classes_have_the_names_and_the_colours_of_the_other_figures():
    from matplotlib.colors import to_rgb

    from tripletlib.plotting import PALETTE

    labels = torch.tensor([7, 12, -3])[LABELS]
    data = data_of(explore(POINTS, IMAGES, labels))
    assert [kind["name"] for kind in data["classes"]] == ["-3", "7", "12"]
    colors = [to_rgb(kind["color"]) for kind in data["classes"]]
    np.testing.assert_allclose(colors, [PALETTE[7], PALETTE[7], PALETTE[2]], atol=1 / 255)
    named = data_of(explore(POINTS, IMAGES, LABELS + 1, names=["none", *NAMES]))
    assert [kind["name"] for kind in named["classes"]] == NAMES


def test_a_name_is_no_code_wherever_it_stands():
    nasty = ["</script><script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "<!--$x$"]
    explorer = explore(POINTS, IMAGES, LABELS, names=nasty)
    assert explorer.html.count("<script") == explorer.html.count("</script") == 1
    assert explorer.html.count("<img") == 1
    assert "<!--" not in explorer.html
    assert [kind["name"] for kind in data_of(explorer)["classes"]] == nasty


def test_nothing_is_fetched_and_no_name_is_read_as_code():
    explorer = explore(POINTS, IMAGES, LABELS)
    text = re.sub(r"data:image/\w+;base64,[\w+/=]+", "", explorer.html)
    assert not re.search(
        r"https?:|[\"'(]//|\bimport\b|@import|url\(|fetch|XMLHttp|\bsrc=\"[^\"]", text
    )
    script = files("tripletlib").joinpath("explorer.js").read_text(encoding="utf-8")
    assert not re.search(r"innerHTML|insertAdjacentHTML|document\.write|eval", script)
    assert "</" not in script


@pytest.mark.skipif(shutil.which("node") is None, reason="Node, which checks scripts, is not here")
def test_the_script_is_one_that_an_engine_takes(tmp_path):
    file = tmp_path / "explorer.js"
    (script,) = re.findall("<script>(.*)</script>", explore(*problem()).html, re.DOTALL)
    file.write_text(script, encoding="utf-8")
    subprocess.run(["node", "--check", file], check=True)


def test_where_no_script_runs_there_is_a_picture_with_words():
    explorer = explore(POINTS, IMAGES, LABELS)
    bundle = explorer._repr_mimebundle_()
    assert set(bundle) == {"text/html", "image/png", "text/plain"}
    assert bundle["text/plain"] == "<Map of 60 images in 3 classes>"
    assert base64.b64decode(bundle["image/png"]) == explorer.png
    picture = Image.open(io.BytesIO(explorer.png))
    assert picture.size == (700, 500)
    assert len(picture.convert("RGB").getcolors()) > 3
    still, script = explorer.html.split("<script>")
    assert 'alt="Map of 60 images in 3 classes"' in still
    assert bundle["image/png"] in still
    assert bundle["image/png"] not in script


def test_it_is_saved_as_a_page_of_its_own(tmp_path):
    explorer = explore(POINTS, IMAGES, LABELS)
    explorer.save(tmp_path / "map.html")
    page = (tmp_path / "map.html").read_text(encoding="utf-8")
    assert page.startswith('<!doctype html>\n<html lang="en">')
    assert "<title>Map of 60 images in 3 classes</title>" in page
    assert explorer.html in page


@pytest.mark.parametrize("device", [*DEVICES, FAKE])
def test_tensors_may_lie_on_any_device_and_points_be_an_array(device):
    wanted = explore(POINTS, IMAGES, LABELS, embeddings=POINTS)
    with FakeDevice():
        placed = (of.to(device) for of in (POINTS, IMAGES, LABELS))
        assert explore(*placed, embeddings=POINTS.to(device)) == wanted
    assert explore(POINTS.double().numpy(), IMAGES, LABELS, embeddings=POINTS) == wanted


def test_no_figure_is_left_open_and_the_readers_own_stays():
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    explore(POINTS, IMAGES, LABELS)
    assert plt.get_fignums() == before


def test_points_of_any_size_are_placed():
    near = data_of(explore(POINTS, IMAGES, LABELS))["points"]
    for factor in (1e-30, 1e30):
        far = data_of(explore(POINTS.double() * factor, IMAGES, LABELS))["points"]
        np.testing.assert_allclose(far, near, atol=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"points": None}, "points must be a torch.Tensor, got NoneType"),
        ({"points": torch.rand(60, 3)}, r"points must have shape \(n, 2\), got \(60, 3\)"),
        ({"points": POINTS * torch.inf}, "points must be finite, got NaN or infinity in row 0"),
        ({"images": IMAGES[0]}, r"images must be a tensor of shape .* got \(1, 8, 8\)"),
        ({"images": IMAGES[:, :, :0]}, r"images must be a tensor of shape .* got \(60, 1, 0, 8\)"),
        ({"images": IMAGES[:59]}, "images must be one for each of 60 points, got 59"),
        ({"images": IMAGES * torch.nan}, "images must be finite, got NaN or infinity"),
        ({"labels": LABELS[:59]}, r"labels must have shape \(60,\), one for each row of points"),
        ({"labels": LABELS.float()}, "labels must be integers, got torch.float32"),
        ({"embeddings": POINTS[:59]}, "embeddings must have one row for each of 60 points, got 59"),
        ({"embeddings": LABELS[:, None]}, "embeddings must be floating point"),
        ({"k": 0}, "k must be a whole number of at least 1, got 0"),
        ({"k": 60}, "k must be at most the 59 items to search, got 60"),
        ({"thumbnail": 0}, "thumbnail must be a whole number of at least 1, got 0"),
        ({"names": NAMES[:2]}, "names must hold one for each label from 0 to 2, got 2"),
        (
            {"names": NAMES, "labels": LABELS - 1},
            "names must hold one for each label from -1 to 1, got 3",
        ),
        (
            {"images": torch.rand(60, 1, 2100, 1), "thumbnail": 2100},
            "60 images of 2100 pixels do not fit into one picture",
        ),
    ],
)
def test_bad_arguments_are_named(change, message):
    given = {"points": POINTS, "images": IMAGES, "labels": LABELS} | change
    with pytest.raises((TypeError, ValueError), match=message):
        explore(given.pop("points"), given.pop("images"), given.pop("labels"), **given)
