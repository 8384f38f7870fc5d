"""Where files made on this machine are kept, and how they are written."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from platformdirs import user_cache_path


def cache_folder() -> Path:
    """Return the folder for unpacked data and trained networks, made by whoever writes there.

    It is the user's cache folder of this system, or the one that the environment variable
    ``TRIPLETLIB_CACHE`` names.
    """
    named = os.environ.get("TRIPLETLIB_CACHE")
    return Path(named).expanduser() if named else user_cache_path("tripletlib", appauthor=False)


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let `write` fill a new file, then put it at `path` whole.

    A reader sees the old file or the new one and never a part, also when two processes write at
    once or one is killed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            write(stream)
        os.replace(scratch, path)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise
