import csv
import functools
import gzip
import re

import numpy as np
import pytest
import torch
from PIL import Image
from test_data import PACKAGE, copied_package, empty_cache  # noqa: F401

from tripletlib import load_emoji
from tripletlib.data import EMOJI_DESIGNERS

RAW = PACKAGE / "Emoji" / "raw"


def table():
    with gzip.open(RAW / "emoji.csv.gz", "rt", encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


@functools.cache
def sheet(designer):
    with Image.open(RAW / f"{designer}.webp") as picture:
        return picture.convert("RGB")


def cut_out(designer, place):
    """The picture as a reader would crop it from the designer's sheet."""
    left, top = 32 * (place % 40), 32 * (place // 40)
    return np.array(sheet(designer).crop((left, top, left + 32, top + 32)))


def listed(split):
    return split.labels.tolist(), split.designers.tolist()


@pytest.fixture(scope="module")
def both():
    return load_emoji("train"), load_emoji("test")


def test_splits_hold_every_picture_once(both):
    pairs = [pair for split in both for pair in zip(*listed(split), strict=True)]
    right = [
        (place, i)
        for place, row in enumerate(table())
        for i, name in enumerate(EMOJI_DESIGNERS)
        if row[name] == "1"
    ]
    assert sorted(pairs) == right
    for split, classes, families, images in zip(
        both, (827, 350), (598, 258), (5834, 2450), strict=True
    ):
        assert split.images.shape == (images, 3, 32, 32)
        assert split.images.dtype == torch.float32
        assert split.labels.dtype == split.designers.dtype == torch.int64
        assert len(split.labels.unique()) == classes
        assert len({split.families[label] for label in split.labels}) == families
        assert split.labels.bincount()[split.labels.unique()].min() >= 5


def test_splits_share_no_class_and_no_family(both):
    train, test = (set(split.labels.tolist()) for split in both)
    assert train.isdisjoint(test)
    families = both[0].families
    assert {families[c] for c in train}.isdisjoint({families[c] for c in test})


def test_images_are_those_of_the_sheets_standardised_by_the_training_images(both):
    raw = [
        np.stack([cut_out(EMOJI_DESIGNERS[d], c) for c, d in zip(*listed(split), strict=True)])
        for split in both
    ]
    mean, deviation = raw[0].mean(axis=(0, 1, 2)), raw[0].std(axis=(0, 1, 2))
    for split, pixels in zip(both, raw, strict=True):
        right = torch.from_numpy((pixels - mean) / deviation).permute(0, 3, 1, 2)
        torch.testing.assert_close(split.images.double(), right, atol=1e-5, rtol=0)


def test_words_are_those_of_the_table(both):
    for split in both:
        assert split.names == tuple(row["name"] for row in table())
        assert split.groups == tuple(row["group"] for row in table())


@pytest.mark.parametrize(
    "twins",
    [
        r"\w+ (oclock|thirty)",
        r"((left|right|up|down) )+arrow|(right|left) arrow curving \w+",
        r"keycap .*",
        r"letter \w",
        r"(wo)?man|boy|girl",
        r"(red|blue|green|yellow|purple|black) heart",
        r"(closed )?umbrella.*",
        r"grinning face.*",
        r"(grinning |crying |weary )?cat( face| with .*)?(?<!^cat)",
        r"(?!horse|black )(white|black|red|blue) (\w+ )?(square|circle)",
    ],
)
def test_near_twins_are_of_one_family(both, twins):
    names, families = both[0].names, both[0].families
    alike = [c for c, name in enumerate(names) if re.fullmatch(twins, name)]
    assert len(alike) > 1
    assert len({families[c] for c in alike}) == 1


def test_who_does_the_same_is_of_one_family(both):
    names, families = both[0].names, both[0].families
    who = re.compile(r"(?:person|man|woman) (.+)")
    done = [(m[1], families[c]) for c, name in enumerate(names) if (m := who.fullmatch(name))]
    assert len(done) > 60
    assert len(set(done)) == len({what for what, _ in done})
    by_name = dict(zip(names, families, strict=True))
    for word in ("detective", "guard", "police officer", "construction worker"):
        assert by_name[word] == by_name[f"woman {word}"]


def test_a_family_is_small_but_for_those_of_a_system(both):
    families = both[0].families
    sizes = {family: families.count(family) for family in set(families)}
    assert len(sizes) == 856
    assert sum(size == 1 for size in sizes.values()) > 700
    large = {family for family, size in sizes.items() if size > 9}
    assert large == {
        "arrow", "clock face", "japanese button", "keycap", "letters", "moon", "square or circle",
        "word button",
    }  # fmt: skip


def test_damaged_sheet_is_named_with_what_to_do(copied_package):  # noqa: F811
    sheet = copied_package / "Emoji" / "raw" / "noto.webp"
    whole = sheet.read_bytes()
    for content in (b"", whole[: len(whole) // 2], b"not a picture"):
        sheet.write_bytes(content)
        with pytest.raises(RuntimeError, match=r"noto.webp is .*damaged.*reinstall"):
            load_emoji()
    with Image.open(RAW / "noto.webp") as opened:
        picture = opened.convert("RGB")
    picture.putpixel((0, 0), (1, 2, 3))
    picture.save(sheet, lossless=True)
    with pytest.raises(RuntimeError, match=r"noto.webp is damaged \(its SHA-256 differs\)"):
        load_emoji()


def test_unpacked_once_and_the_same_again(empty_cache, both):  # noqa: F811
    first = load_emoji("test")
    files = {file: file.stat().st_mtime_ns for file in empty_cache.rglob("*.rgb")}
    assert len(files) == 8
    again = load_emoji("test")
    assert {file: file.stat().st_mtime_ns for file in empty_cache.rglob("*.rgb")} == files
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.images, both[1].images)
