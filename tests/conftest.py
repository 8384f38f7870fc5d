import pytest
import torch


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    """Keep the reader's own cache folder out of the tests."""
    monkeypatch.setenv("TRIPLETLIB_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(autouse=True)
def _same_randomness():
    torch.manual_seed(0)
