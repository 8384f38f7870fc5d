import io
import random
import shutil
import sys
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Subset
from torchvision.datasets import ImageFolder

from tripletlib import ImageFolderDataset, embed, fit, load_fashion_mnist, load_image
from tripletlib.data.mnist import PIXEL_STATISTICS

MODES = {
    "png": "1 L P RGB RGBA LA I;16",
    "tiff": "1 L P RGB RGBA LA CMYK I I;16 F",
    "jpeg": "L RGB CMYK",
    "gif": "1 L P RGB RGBA LA",
    "bmp": "1 L P RGB RGBA",
    "webp": "L RGB RGBA",
}


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
@pytest.mark.parametrize(("kind", "modes"), MODES.items())
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


def a_photograph(seed, size=(40, 30), mode="RGB"):
    """Something smooth, which survives scaling and compression."""
    small = np.random.default_rng(seed).integers(0, 255, (4, 5, 3), np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).convert(mode)


@pytest.fixture
def folder(tmp_path):
    for i in range(12):
        path = tmp_path / "photos" / ["дом", "kaze 風", "oak"][i % 3] / f"no {i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        a_photograph(i).save(path)
    return tmp_path / "photos"


def test_a_folder_of_folders_is_that_of_torchvision(folder):
    ours, theirs = ImageFolderDataset(folder), ImageFolder(folder)
    assert ours.classes == theirs.classes == ["kaze 風", "oak", "дом"]
    assert [(str(file), label) for file, label in zip(ours.files, ours.targets, strict=True)] == (
        theirs.samples
    )
    assert ours.names[:2] == ["kaze 風/no 1.png", "kaze 風/no 10.png"]
    assert repr(ours) == f"ImageFolderDataset of 12 images of 3 classes in {folder}"
    assert [label for _, label in ours] == theirs.targets


def test_only_visible_images_count_at_any_depth_and_in_any_case(folder):
    for name in (".hidden.png", "._no 1.png", "notes.txt", "a.png.part", "film.mpg"):
        (folder / "oak" / name).write_bytes(b"?")
    (folder / "oak" / "deep" / ".thumbnails").mkdir(parents=True)
    (folder / "empty").mkdir()
    a_photograph(0).save(folder / "oak" / "deep" / "A.JPG", "JPEG")
    a_photograph(0).save(folder / "oak" / "deep" / ".thumbnails" / "b.png")
    (folder / "oak" / "loop").symlink_to(folder, target_is_directory=True)
    (folder / "linked").symlink_to(folder / "дом", target_is_directory=True)
    shorter = folder.parent / "photo"  # its path begins that of the folder, which is not in it
    shorter.mkdir()
    a_photograph(0).save(shorter / "a.png")
    (folder / "shorter").symlink_to(shorter, target_is_directory=True)
    photos = ImageFolderDataset(folder)
    assert len(photos) == 12 + 4 + 1 + 1
    assert photos.classes == ["kaze 風", "linked", "oak", "shorter", "дом"]
    assert photos.targets[photos.names.index("oak/deep/A.JPG")] == 2


def test_an_image_that_fits_comes_as_it_is(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    (image,) = ImageFolderDataset(tmp_path, 32)
    assert image.dtype == torch.float32
    torch.testing.assert_close(image, torch.from_numpy(pixels).permute(2, 0, 1) / 255)
    grey = ImageFolderDataset(tmp_path, 32, mode="L")[0]
    luma = (pixels * [0.299, 0.587, 0.114]).sum(axis=2) / 255
    assert grey.shape == (1, 32, 32)
    assert np.abs(grey[0].numpy() - luma).max() < 0.005


@pytest.mark.parametrize(
    ("size", "at"), [((80, 40), (16, 0)), ((40, 80), (0, 16)), ((2000, 1), ())]
)
def test_the_longer_side_fits_and_the_rest_is_the_border_s_median(size, at, tmp_path):
    image = Image.new("RGB", size, (200, 30, 60))
    image.paste((0, 0, 255), (size[0] // 4, size[1] // 4, size[0] // 2, size[1] // 2))
    image.save(tmp_path / "a.png")
    (item,) = ImageFolderDataset(tmp_path, 64)
    ground = torch.tensor([200, 30, 60]) / 255
    assert item.shape == (3, 64, 64)
    if at:
        top, left = at
        inner = item[:, top : 64 - top, left : 64 - left]
        reference = np.asarray(image.resize(inner.shape[:0:-1], Image.Resampling.LANCZOS)) / 255
        np.testing.assert_allclose(inner.permute(1, 2, 0), reference, atol=1e-6)
        outer = item.clone()
        outer[:, top : 64 - top, left : 64 - left] = ground[:, None, None]
        torch.testing.assert_close(outer, ground[:, None, None].expand(3, 64, 64))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_upright(orientation, tmp_path):
    ways = Image.Transpose
    undo = [
        *(None, ways.FLIP_LEFT_RIGHT, ways.ROTATE_180, ways.FLIP_TOP_BOTTOM),
        *(ways.TRANSPOSE, ways.ROTATE_270, ways.TRANSVERSE, ways.ROTATE_90),
    ][orientation - 1]
    image, exif = a_photograph(3), Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "a.png", exif=exif)
    upright = image if undo is None else image.transpose(undo)
    photos = ImageFolderDataset(tmp_path)
    assert torch.equal(photos[0], photos.read(upright))
    with Image.open(tmp_path / "a.png") as opened:
        assert torch.equal(photos.read(opened), photos[0])


@pytest.mark.parametrize(("kind", "modes"), MODES.items())
@pytest.mark.parametrize("channels", [1, 3])
def test_every_kind_and_mode_becomes_bytes_of_the_mode_asked_for(kind, modes, channels, tmp_path):
    image = shape_on(255, 0)
    expected = np.asarray(image) / 255
    for mode in modes.split():
        if mode in ("I", "I;16"):
            deep = np.asarray(image, np.uint16) * 257
            changed = Image.fromarray(deep if mode == "I;16" else deep.astype(np.int32))
        else:
            changed = image.convert(mode)
        path = saved(changed, tmp_path / f"image {channels}.{kind}")
        photos = ImageFolderDataset(tmp_path, 60, mode={1: "L", 3: "RGB"}[channels])
        assert len(photos) == 1
        assert photos[0].shape == (channels, 60, 60)
        difference = np.abs(photos[0].numpy() - expected)
        lossy = kind in ("jpeg", "webp")  # at edges
        assert (difference.mean() if lossy else difference.max()) < 0.02, mode
        path.unlink()


def test_what_is_transparent_is_white_and_what_is_red_is_red(tmp_path):
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    image.paste((255, 0, 0, 255), (0, 0, 4, 8))
    image.save(tmp_path / "a.png")
    image.convert("P").save(tmp_path / "b.gif", transparency=image.convert("P").getpixel((7, 7)))
    for item in ImageFolderDataset(tmp_path, 8):
        assert item[:, :, 1].mean(dim=1).tolist() == [1, 0, 0]
        assert item[:, :, 6].mean(dim=1).tolist() == [1, 1, 1]


def test_large_jpegs_are_decoded_in_part_and_look_the_same(tmp_path):
    image = a_photograph(5, (1600, 1200))
    image.save(tmp_path / "a.jpg", quality=95)
    photos = ImageFolderDataset(tmp_path, 64)
    assert (photos[0] - photos.read(image)).abs().max() < 0.02


def spoil(folder):
    whole = (folder / "oak" / "no 2.png").read_bytes()
    jpeg = io.BytesIO()
    a_photograph(0, (400, 300)).save(jpeg, "JPEG")
    spoilt = {
        "oak/a half.png": whole[: len(whole) // 2],
        "oak/half.jpg": jpeg.getvalue()[:2000],
        "oak/empty.png": b"",
        "дом/words.png": "слова".encode(),
        "phone/IMG 1.HEIC": b"\x00\x00\x00\x18ftypheic what this Pillow does not read",
    }
    for name, content in spoilt.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    return sorted(spoilt)


def test_damaged_files_are_skipped_and_listed(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # as if it were not installed
    right = ImageFolderDataset(folder)
    names = spoil(folder)
    photos = ImageFolderDataset(folder, damaged="skip")
    assert [name for name, _ in photos.left_out] == names
    for name, wrong in photos.left_out:
        assert name in wrong
        assert ("without pillow-heif" if "HEIC" in name else "is not an image") in wrong
    assert (photos.names, photos.targets, photos.classes) == (
        *(right.names, right.targets, right.classes),
    )
    shutil.rmtree(folder / "oak")
    shutil.rmtree(folder / "kaze 風")
    for file in (folder / "дом").glob("no*"):
        file.unlink()
    with pytest.raises(ValueError, match="without any, only 2 damaged ones"):
        ImageFolderDataset(folder, damaged="skip")


def test_a_damaged_file_is_named_when_it_is_asked_for(folder):
    spoil(folder)
    photos = ImageFolderDataset(folder)
    assert len(photos) == 17
    place = photos.names.index("дом/words.png")
    with pytest.raises(ValueError, match=r"words\.png is not an image, or it is damaged"):
        photos[place]
    with pytest.raises(RuntimeError, match=r"images\[1\] could not be read .*words\.png is not"):
        embed(torch.nn.Flatten(), Subset(photos, [0, place]), workers=2)


def test_without_subfolders_there_are_no_labels(folder):
    flat = folder / "oak"
    photos = ImageFolderDataset(flat)
    assert (photos.targets, photos.classes) == (None, [])
    assert isinstance(photos[0], torch.Tensor)
    assert embed(torch.nn.Flatten(), photos, workers=0).shape == (4, 3 * 64 * 64)
    with pytest.raises(TypeError, match=r"must be \(image, label\), as labels are not given"):
        fit(torch.nn.Linear(2, 2), photos)
    a_photograph(0).save(folder / "stray.png")
    with pytest.raises(ValueError, match=r"in subfolders only, got stray\.png beside them"):
        ImageFolderDataset(folder)
    with pytest.raises(ValueError, match="in subfolders only"):
        ImageFolderDataset(flat, labelled=True)
    assert len(ImageFolderDataset(folder, labelled=False)) == 13


def test_a_folder_trains_as_its_images_in_memory_do(folder):
    photos = ImageFolderDataset(folder, 16)
    images, labels = torch.stack([image for image, _ in photos]), torch.tensor(photos.targets)
    weights = []
    for data, workers in (((photos,), 0), ((photos,), 2), ((images, labels), None)):
        torch.manual_seed(0)
        network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 16 * 16, 4))
        options = {"batch_size": 6, "seed": 1, "augment": False, "progress": False}
        fit(network, *data, workers=workers, **options)
        weights.append(network[1].weight)
    assert torch.equal(weights[0], weights[1])
    assert torch.equal(weights[0], weights[2])


def test_a_transform_takes_the_place_of_the_scaling(folder):
    seen = []

    def transform(image):
        seen.append((image.size, image.mode))
        return torch.zeros(1)

    assert ImageFolderDataset(folder, transform=transform, mode="L")[0][0].shape == (1,)
    assert seen == [((40, 30), "L")]


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"size": 0}, ValueError, "size must be a whole number of at least 1"),
        ({"mode": "RGBA"}, ValueError, "mode must be"),
        ({"damaged": "drop"}, ValueError, "damaged must be"),
        ({"transform": 3}, TypeError, "transform must be callable, got 3"),
        ({"labelled": "yes"}, TypeError, "labelled must be True, False or None"),
    ],
)
def test_wrong_options_of_a_folder_are_named(options, error, words, folder):
    with pytest.raises(error, match=words):
        ImageFolderDataset(folder, **options)


def test_a_folder_must_be_there_and_hold_images(tmp_path):
    with pytest.raises(FileNotFoundError):
        ImageFolderDataset(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="folder must hold images"):
        ImageFolderDataset(tmp_path)
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(NotADirectoryError):
        ImageFolderDataset(tmp_path / "a.txt")
    a_photograph(0).save(tmp_path / "a.png")
    with pytest.raises(FileNotFoundError):
        ImageFolderDataset(tmp_path).read(tmp_path / "no.png")
    for wrong in (np.zeros((3, 3)), slice(2), [tmp_path / "a.png"]):
        with pytest.raises(TypeError, match=r"image must be a path or a PIL\.Image, got "):
            ImageFolderDataset(tmp_path).read(wrong)


def test_floats_that_are_not_finite_are_skipped_as_an_item_of_them_would_fail(folder):
    right = ImageFolderDataset(folder)
    values = np.full((30, 30), np.nan, np.float32)
    file = saved(Image.fromarray(values), folder / "oak" / "nan.tiff")
    place = ImageFolderDataset(folder).names.index("oak/nan.tiff")
    wrong = rf"{file} is not an image, or it is damaged \(pixels must be finite\)"
    for options in ({}, {"mode": "L"}, {"transform": lambda image: 1 / 0}):
        with pytest.raises(ValueError, match=wrong):
            ImageFolderDataset(folder, **options)[place]
        photos = ImageFolderDataset(folder, damaged="skip", **options)
        assert photos.names == right.names
        assert [name for name, _ in photos.left_out] == ["oak/nan.tiff"]
        assert "pixels must be finite" in photos.left_out[0][1]


def test_what_is_wrong_with_a_damaged_file_is_said(folder):
    spoil(folder)
    with pytest.raises(ValueError, match=r"half\.jpg is not .* damaged \(image file is truncated"):
        load_image(folder / "oak" / "half.jpg")
    with pytest.raises(ValueError, match=r"words\.png is not an image, or it is damaged$"):
        load_image(folder / "дом" / "words.png")  # of which Pillow has no more to say
