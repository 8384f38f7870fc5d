import math

import pytest
import torch
from devices import FAKE, FakeDevice
from scipy import ndimage

from tripletlib import jitter, jitter_colours


def drawn(monkeypatch, *fractions):
    """Let each of the five random amounts be a given fraction of its range."""
    row = (torch.tensor(fractions)[:, None] + 1) / 2
    monkeypatch.setattr(torch, "rand", lambda *shape, **_: row.expand(shape[0], shape[1]))


def blob(height=20, width=24):
    image = torch.zeros(1, 1, height, width)
    image[0, 0, 6:15, 8:15] = torch.randn(9, 7).abs()
    return image


def test_amounts_of_zero_change_nothing(monkeypatch):
    drawn(monkeypatch, 0, 0, 0, 0, 0)
    image = blob()
    torch.testing.assert_close(jitter(image), image, atol=1e-5, rtol=0)


@pytest.mark.parametrize("place", [3, 4])
def test_a_move_is_of_so_many_pixels(monkeypatch, place):
    amounts = [0.0] * 5
    amounts[place] = 1.0
    drawn(monkeypatch, *amounts)
    image = blob()
    axis = 3 if place == 3 else 2
    torch.testing.assert_close(jitter(image), image.roll(-2, axis), atol=1e-5, rtol=0)


@pytest.mark.parametrize("amounts", [(1, 0, 0), (-1, 0, 0), (0.4, 1, -0.5)])
def test_a_turn_and_a_stretch_equal_those_of_scipy(monkeypatch, amounts):
    drawn(monkeypatch, *amounts, 0, 0)
    image = blob()
    angle = math.radians(15) * amounts[0]
    across, down = 1 + 0.15 * amounts[1], 1 + 0.15 * amounts[2]
    matrix = [
        [down * math.cos(angle), across * math.sin(angle)],
        [-down * math.sin(angle), across * math.cos(angle)],
    ]
    centre = torch.tensor([9.5, 11.5], dtype=torch.float64)
    offset = centre - torch.tensor(matrix, dtype=torch.float64) @ centre
    expected = ndimage.affine_transform(image[0, 0].numpy(), matrix, offset.numpy(), order=1)
    torch.testing.assert_close(jitter(image)[0, 0], torch.tensor(expected), atol=1e-4, rtol=0)


def test_each_image_is_changed_in_its_own_way_and_the_seed_fixes_how():
    images = blob().expand(8, -1, -1, -1)
    torch.manual_seed(4)
    first = jitter(images)
    torch.manual_seed(4)
    second = jitter(images)
    assert torch.equal(first, second)
    assert len(first.flatten(1).unique(dim=0)) == 8
    assert first.shape == images.shape


def test_what_comes_in_from_outside_repeats_the_border():
    images = torch.full((4, 3, 8, 8), -0.4)
    torch.testing.assert_close(jitter(images), images)


@pytest.mark.parametrize(
    "change",
    [jitter, jitter_colours],
)
@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (torch.zeros(4, 8), ValueError, r"shape \(n, channels, height, width\), got \(4, 8\)"),
        (torch.zeros(4, 1, 8, 8, dtype=torch.uint8), TypeError, "images must be floating point"),
        (torch.zeros(0, 1, 8, 8), ValueError, "at least one image"),
    ],
)
def test_bad_images_are_refused(change, images, error, message):
    with pytest.raises(error, match=message):
        change(images)


@pytest.mark.parametrize("change", [jitter, jitter_colours])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_autocast_changes_nothing(dtype, change):
    images = torch.randn(6, 3, 12, 10, dtype=dtype)
    results = []
    for autocast in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            results.append(change(images))
    assert torch.equal(*results)


@pytest.mark.parametrize("change", [jitter, jitter_colours])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rounds_pixels_not_places(dtype, change):
    images = torch.randn(6, 3, 64, 64).to(dtype)
    torch.manual_seed(0)
    expected = change(images.float())
    torch.manual_seed(0)
    assert torch.equal(change(images), expected.to(dtype))


@pytest.mark.parametrize("change", [jitter, jitter_colours])
def test_on_a_device_of_its_own_without_float64(change):
    images = torch.randn(6, 3, 12, 10)
    torch.manual_seed(0)
    expected = change(images)
    torch.manual_seed(0)
    with FakeDevice():
        assert torch.equal(change(images.to(FAKE)).cpu(), expected)


def test_white_stays_white_and_images_of_one_colour_stay_as_they_are():
    white = torch.tensor([0.6, 0.8, 0.9])[:, None, None]
    images = white - torch.rand(32, 3, 8, 8)
    images[:, :, 0, :] = white[:, 0]
    changed = jitter_colours(images)
    assert changed.shape == images.shape
    torch.testing.assert_close(changed[:, :, 0], images[:, :, 0])
    assert (changed <= white + 1e-6).all()
    flat = torch.randn(8, 3, 1, 1).expand(-1, -1, 4, 4)
    torch.testing.assert_close(jitter_colours(flat), flat)


def test_colours_are_exchanged_faded_and_scaled_as_often_as_is_said():
    torch.manual_seed(0)
    ink = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.5, 0.25]]).T.reshape(1, 3, 1, 2)
    changed = jitter_colours(-ink.expand(4000, -1, -1, -1))
    boldness = -changed[:, :, 0, 1].mean(dim=1) / ink.mean() / 2
    torch.testing.assert_close(
        boldness.aminmax(),
        torch.return_types.aminmax((torch.tensor(0.6), torch.tensor(1.4))),
        atol=0.01,
        rtol=0,
    )
    assert abs(boldness.mean() - 1) < 0.01
    parts = -changed[:, :, 0, 1] / boldness[:, None]
    grey = parts.std(dim=1) < 1e-5
    assert abs(grey.float().mean() - 0.2) < 0.02
    coloured = parts[~grey]
    assert torch.allclose(coloured.sort(dim=1).values, torch.tensor([0.25, 0.5, 1.0]), atol=1e-5)
    kept = (coloured - ink[0, :, 0, 1]).abs().amax(dim=1) < 1e-5
    # A half is exchanged at random, and of that a sixth comes out as it was.
    assert abs(kept.float().mean() - (0.5 + 0.5 / 6)) < 0.03


def test_grey_images_are_only_made_bolder_or_fainter():
    images = torch.rand(64, 1, 6, 6)
    changed = jitter_colours(images)
    brightest = images.amax(dim=(2, 3), keepdim=True)
    ratio = (brightest - changed).flatten(1).sum(1) / (brightest - images).flatten(1).sum(1)
    expected = brightest - ratio.view(-1, 1, 1, 1) * (brightest - images)
    torch.testing.assert_close(changed, expected)
    assert 0.6 <= ratio.min() < 0.7 < 1.3 < ratio.max() <= 1.4
