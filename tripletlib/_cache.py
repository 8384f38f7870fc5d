"""Where files made on this machine are kept, and how they are written."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from platformdirs import user_cache_path


def user_path(path: str | os.PathLike) -> Path:
    """Return a path that a user named, in which ``~`` is the home folder.

    Raises
    ------
    OSError
        If there is no such home folder.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise OSError(f"no home folder is known for {str(path)!r}") from error


def cache_folder() -> Path:
    """Return the folder for unpacked data and trained networks, made by whoever writes there.

    It is the user's cache folder of this system, or the one that the environment variable
    ``TRIPLETLIB_CACHE`` names.

    Raises
    ------
    OSError
        If that would be below a home folder, and there is none.
    """
    named = os.environ.get("TRIPLETLIB_CACHE")
    return user_path(named or user_cache_path("tripletlib", appauthor=False))


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let `write` fill a new file, then put it at `path` whole.

    A reader sees the old file or the new one and never a part, also when two processes write at
    once or one is killed. As with ``open``, a new file gets the permissions that the umask gives,
    one that is replaced keeps its own, and a link stays a link.
    """
    target = Path(os.path.realpath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_name(f".tripletlib.{secrets.token_hex(8)}")
    try:
        with open(scratch, "xb") as stream:
            write(stream)
        if target.exists():
            shutil.copymode(target, scratch)
        os.replace(scratch, target)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise
