import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    """Keep the reader's own cache folder out of the tests."""
    monkeypatch.setenv("TRIPLETLIB_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(autouse=True)
def _same_randomness():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """Build the site with every warning an error, and no way to the network."""
    needed = ("bs4", "latex2mathml", "myst_nb", "numpydoc", "sphinx", "sphinx_book_theme")
    if missing := [name for name in needed if find_spec(name) is None]:
        pytest.skip(f"the site needs {', '.join(missing)}: pip install --group docs")
    folder = tmp_path_factory.mktemp("site") / "html"
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "all_proxy"), "http://127.0.0.1:9")
    command = [sys.executable, "-m", "sphinx", "-W", "-n", "-q", "-c", "docs", ".", str(folder)]
    built = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **nowhere}, capture_output=True, encoding="utf-8"
    )
    assert built.returncode == 0, built.stdout + built.stderr
    return folder
