import io
import random
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from tripletlib import load_fashion_mnist, load_image
from tripletlib.data.mnist import PIXEL_STATISTICS


def pixels(image):
    mean, deviation = PIXEL_STATISTICS["FashionMNIST"]
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
    mean, deviation = PIXEL_STATISTICS["FashionMNIST"]
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


def test_the_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    saved(Image.new("L", (5, 5)), tmp_path / "a.png")
    assert load_image("~/a.png").shape == (1, 1, 28, 28)
