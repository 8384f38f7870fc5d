"""Files that come with the package: unpacked once, verified, kept in the user's cache folder."""

from __future__ import annotations

import gzip
import hashlib
import io
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from tripletlib._cache import cache_folder, write_atomically
from tripletlib._validation import warn

_PACKAGE = Path(__file__).parent
# SHA-256 of the unpacked files.
_DIGESTS = {
    "MNIST": {
        "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    },
    "FashionMNIST": {
        "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    },
    "Emoji": {
        "emoji.csv": "ad4275cf64a0529276cf33f5ac010e8facebee1d2aababef1d3c21c3c459abdc",
        "emojione-v1.rgb": "c527edc238998d08c20e139028aeb393f08887f7f1139d8720524d6f3daa909b",
        "emojione.rgb": "c62f0845631cee4e5f7d355102acddca8c405d6237d988c0590321feac1924a1",
        "fluent-emoji-flat.rgb": "12974b3a25bfcff836bc302e54c58617724bd097029970b2864bc5af5c80c630",
        "fxemoji.rgb": "9299fde253769f3db48b42d7cf968803145f1c61109cd392ff32ab1a2fbc3986",
        "noto-v1.rgb": "8e814cf555970458b07f341ebda0e7495508f003f6a17d59a211fd18c489210d",
        "noto.rgb": "b0106c35adf40dd47ab7ae1f9917ac4696a9776e759f3f5d7f72aa8571fa54cc",
        "openmoji.rgb": "6d59eb22d4eaef17859cff82fa8f13942a65aaff1b27aecc9701a13164e89f6a",
        "twemoji.rgb": "eee8ae18b0a85711f734bdb114b498517c8471f3bc488df39334d663a25e8418",
    },
    "Libraries": {
        "projects.tsv": "dbc3ea68263f2592e22f808a6d3a267bed6e6ce25d875e00151e236a2b66df8e",
    },
}


@contextmanager
def unpacked(name: str, prefix: str) -> Iterator[Path]:
    """Give a folder with the verified raw files whose names begin with the prefix."""
    files = [file for file in _DIGESTS[name] if file.startswith(prefix)]
    try:
        cache = cache_folder() / name / "raw"
        for file in files:
            _unpack(name, file, cache)
    except OSError as error:
        warn(
            f"cannot keep unpacked data in the cache folder ({error}); unpacking it anew each time. "
            "Set TRIPLETLIB_CACHE to a folder that can be written"
        )
        with tempfile.TemporaryDirectory() as scratch:
            for file in files:
                _unpack(name, file, Path(scratch))
            yield Path(scratch)
    else:
        yield cache


def _unpack(name: str, file: str, folder: Path) -> None:
    """Put one raw file into the folder, unless a sound one is there."""
    target = folder / file
    digest = _DIGESTS[name][file]
    if target.is_file() and hashlib.sha256(target.read_bytes()).hexdigest() == digest:
        return
    packed, unpack = (".webp", _pixels) if file.endswith(".rgb") else (".gz", gzip.decompress)
    source = _PACKAGE / name / "raw" / f"{file.removesuffix('.rgb')}{packed}"
    mend = "reinstall tripletlib (pip install --force-reinstall --no-deps -e .) or restore the file"
    try:
        content = unpack(source.read_bytes())
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise RuntimeError(f"data file {source} is missing or damaged ({error}); {mend}") from error
    if hashlib.sha256(content).hexdigest() != digest:
        raise RuntimeError(f"data file {source} is damaged (its SHA-256 differs); {mend}")
    write_atomically(target, lambda stream: stream.write(content))


def _pixels(picture: bytes) -> bytes:
    """Return red, green and blue, 0 to 255, row by row, of an image file's content."""
    with Image.open(io.BytesIO(picture)) as opened:
        return opened.convert("RGB").tobytes()
