"""Emoji: one list of pictures, drawn in up to eight sets, shipped with the package."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tripletlib._validation import check_choice
from tripletlib.data._shipped import unpacked

EMOJI_DESIGNERS = (
    "emojione",
    "emojione-v1",
    "fluent-emoji-flat",
    "fxemoji",
    "noto",
    "noto-v1",
    "openmoji",
    "twemoji",
)
"""Who drew the emoji: designer i of `load_emoji` is ``EMOJI_DESIGNERS[i]``."""

# Mean and standard deviation of red, green and blue over the training images, on the 0-255 scale.
EMOJI_STATISTICS = (
    (208.29536613226347, 200.26805770188764, 188.61987128926336),
    (72.34381345920089, 67.87841537871343, 82.04594546386991),
)
_SIDE, _A_ROW = 32, 40  # pixels of a picture, and pictures a row of a designer's sheet

# Near twins by name: the first pattern that matches gives the family, as written beside it or as
# the part of the name in brackets. All other names are families of their own.
_PEOPLE = r"(?:person|people|man|men|woman|women)"
_TWINS = (
    (r".* (?:oclock|thirty)", "clock face"),
    (r"(?!.*(?:heart|bow |envelope|mobile)).*\barrows?\b.*", "arrow"),
    (r"(?:fast|next|last|play|reverse|upwards|downwards|repeat|shuffle).* button", "arrow"),
    (r"backhand index .*|index pointing up", "pointing hand"),
    (r"keycap .*", "keycap"),
    (r"letter .|input .*|circled m|[abop]+ button.*", "letters"),
    (r"(?:cl|cool|free|id|new|ng|ok|sos|up exclamation|vs) button", "word button"),
    (r"japanese .* button", "japanese button"),
    (r"(?:black|white|red|blue) .*(?:square|circle)(?: button)?", "square or circle"),
    (r"(?:large|small) (?:orange|blue) diamond|red triangle .*", "diamond or triangle"),
    (r"(?:red|blue|green|yellow|purple|black) heart|heart suit", "heart"),
    (r"(?:closed|open|green|blue|orange) book", "book"),
    (r".* banknote", "banknote"),
    (r".* mailbox .*", "mailbox"),
    (r".* (?:moon|moon face)", "moon"),
    (r".* place medal", "medal"),
    (r"globe showing .*", "globe"),
    (r"speaker .*|muted speaker", "speaker"),
    (r"magnifying glass .*", "magnifying glass"),
    (r"locked|unlocked|locked with .*", "lock"),
    (r".*\bcat with .*|kissing cat|pouting cat|crying cat|weary cat|cat face", "cat face"),
    (r"(?:see|hear|speak) no evil monkey|monkey face", "monkey face"),
    (r"(?:left|right) facing fist|oncoming fist|raised fist", "fist"),
    (r"thumbs (?:up|down)", "thumb"),
    (r"hourglass .*", "hourglass"),
    (r"(.*) off", None),
    (r"sun behind .*|cloud with .*|cloud", "cloud"),
    (r"(.*) (?:man man|woman woman)", None),
    (rf"{_PEOPLE} (.*)|{_PEOPLE}", "adult"),
    (r"(?:mrs|santa) claus", "claus"),
    (r"(?:oncoming|open|closed|slightly) (.*)|(.*?) (?:with|without|on) .*|(.*) button", None),
    (r"(?:old|blond) (?:man|woman)|woman blond hair|boy|girl|prince|princess", "adult"),
)


class Emoji(NamedTuple):
    """One split of the emoji; `load_emoji` says what the fields are."""

    images: Tensor
    labels: Tensor
    designers: Tensor
    names: tuple[str, ...]
    groups: tuple[str, ...]
    families: tuple[str, ...]


def load_emoji(split: str = "train") -> Emoji:
    """Load the pictures of one split of the emoji, standardised, and who drew each.

    A class is an emoji: 1 177 of them, each in five to eight of eight sets. The two splits share
    no class, and hardly a near twin either: classes whose *names* tell that their pictures differ
    in a detail by a system (the man, the woman and the person who do the same; clock faces; arrows;
    letters; hearts by colour; "closed umbrella" and "umbrella") make a *family*, which is never
    divided. A dozen twins with unlike names slip through ("mens room", "womens room"). Of the 856
    families in alphabetical order, the fourth, fifth and sixth of every ten are the test split.

    Parameters
    ----------
    split : {"train", "test"}
        827 classes in 598 families with 5 834 pictures, or 350 classes in 258 families with 2 450.

    Returns
    -------
    Emoji
        A named tuple of

        - ``images``, Tensor, float32, shape (n, 3, 32, 32): red, green and blue on white, each
          standardised by its mean and standard deviation over the training images;
        - ``labels``, Tensor, int64, shape (n,): the classes, 0 to 1 176 over both splits;
        - ``designers``, Tensor, int64, shape (n,): 0 to 7, in the order of `EMOJI_DESIGNERS`;
        - ``names``, ``groups`` and ``families``, tuples of 1 177 words: what class c is called,
          Unicode's group of it and its family are ``names[c]``, ``groups[c]``, ``families[c]``.

    Raises
    ------
    ValueError
        If `split` is not one of the two.
    RuntimeError
        As for `load_mnist`; also if Pillow cannot read WebP here.

    Notes
    -----
    The shipped sheets are unpacked once into the user's cache folder, as those of `load_mnist`.
    "emojione" and "emojione-v1", and "noto" and "noto-v1", are redesigns by one studio. Licences
    are in ``LICENSE.md`` beside the data.

    Examples
    --------
    >>> emoji = load_emoji("test")
    >>> emoji.images.shape, emoji.names[emoji.labels[0]]
    (torch.Size([2450, 3, 32, 32]), 'keycap pound')
    """
    check_choice(split, ("train", "test"), "split")
    with unpacked("Emoji", "") as folder:
        table = _read_table(folder / "emoji.csv")
        sheets = [np.fromfile(folder / f"{name}.rgb", np.uint8) for name in EMOJI_DESIGNERS]
    families = tuple(_family(row["name"]) for row in table)
    test = {family for i, family in enumerate(sorted(set(families))) if i % 10 in (3, 4, 5)}
    wanted = np.array([(family in test) == (split == "test") for family in families])
    drawn = np.array([[row[name] == "1" for name in EMOJI_DESIGNERS] for row in table])
    labels, designers = (drawn & wanted[:, None]).nonzero()
    tiles = np.stack([_tiles(sheet, len(table)) for sheet in sheets])[designers, labels]
    mean, deviation = (torch.tensor(row).view(3, 1, 1) for row in EMOJI_STATISTICS)
    images = torch.from_numpy(tiles).permute(0, 3, 1, 2).to(torch.float32).contiguous()
    return Emoji(
        images.sub_(mean).div_(deviation),
        torch.from_numpy(labels),
        torch.from_numpy(designers),
        *(tuple(row[column] for row in table) for column in ("name", "group")),
        families,
    )


def _read_table(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def _tiles(sheet: np.ndarray, count: int) -> np.ndarray:
    """Cut a sheet into its first `count` pictures, of shape (count, side, side, 3)."""
    rows = sheet.reshape(-1, _SIDE, _A_ROW, _SIDE, 3)
    return rows.swapaxes(1, 2).reshape(-1, _SIDE, _SIDE, 3)[:count]


def _family(name: str) -> str:
    for pattern, family in _TWINS:
        if match := re.fullmatch(pattern, name):
            return next(filter(None, match.groups()), family)
    return name
