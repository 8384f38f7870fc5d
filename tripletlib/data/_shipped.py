"""Files that come with the package: unpacked once, verified, kept in the user's cache folder."""

from __future__ import annotations

import gzip
import hashlib
import tempfile
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tripletlib._cache import cache_folder, write_atomically

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
}


@contextmanager
def unpacked(name: str, prefix: str) -> Iterator[Path]:
    """Give a folder with the verified raw files of one split."""
    files = [file for file in _DIGESTS[name] if file.startswith(prefix)]
    try:
        cache = cache_folder() / name / "raw"
        for file in files:
            _unpack(name, file, cache)
    except OSError as error:
        warnings.warn(
            f"cannot keep unpacked data in the cache folder ({error}); unpacking it anew each time. "
            "Set TRIPLETLIB_CACHE to a folder that can be written",
            stacklevel=6,
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
    source = _PACKAGE / name / "raw" / f"{file}.gz"
    mend = "reinstall tripletlib (pip install --force-reinstall --no-deps -e .) or restore the file"
    try:
        content = gzip.decompress(source.read_bytes())
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise RuntimeError(f"data file {source} is missing or damaged ({error}); {mend}") from error
    if hashlib.sha256(content).hexdigest() != digest:
        raise RuntimeError(f"data file {source} is damaged (its SHA-256 differs); {mend}")
    write_atomically(target, lambda stream: stream.write(content))
