import math

import pytest
import torch
from devices import FAKE, FakeDevice
from scipy import ndimage

from tripletlib import jitter


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
    ("images", "error", "message"),
    [
        (torch.zeros(4, 8), ValueError, r"shape \(n, channels, height, width\), got \(4, 8\)"),
        (torch.zeros(4, 1, 8, 8, dtype=torch.uint8), TypeError, "images must be floating point"),
        (torch.zeros(0, 1, 8, 8), ValueError, "at least one image"),
    ],
)
def test_bad_images_are_refused(images, error, message):
    with pytest.raises(error, match=message):
        jitter(images)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_autocast_changes_nothing(dtype):
    images = torch.randn(6, 3, 12, 10, dtype=dtype)
    results = []
    for autocast in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            results.append(jitter(images))
    assert torch.equal(*results)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rounds_pixels_not_places(dtype):
    images = torch.randn(6, 1, 64, 64).to(dtype)
    torch.manual_seed(0)
    expected = jitter(images.float())
    torch.manual_seed(0)
    assert torch.equal(jitter(images), expected.to(dtype))


def test_on_a_device_of_its_own_without_float64():
    images = torch.randn(6, 1, 12, 10)
    torch.manual_seed(0)
    expected = jitter(images)
    torch.manual_seed(0)
    with FakeDevice():
        assert torch.equal(jitter(images.to(FAKE)).cpu(), expected)
