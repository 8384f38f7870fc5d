"""Several processes against one: each test starts torchrun as a reader would."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import together
import torch
from problems import IMAGES

from tripletlib import embed

HERE = Path(__file__).parent


def torchrun(number, *arguments):
    """Start together.py in so many processes; return how it ended and what it said."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(number), str(HERE / "together.py")]
    paths = os.pathsep.join([str(HERE.parent), *sys.path])
    return subprocess.run(
        [*command, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )


@pytest.fixture(scope="module", params=[2, 3])
def results(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("together")
    ended = torchrun(request.param, "all", folder)
    assert ended.returncode == 0, ended.stderr
    return [torch.load(folder / f"{request.param}.{rank}.pt", weights_only=False)
            for rank in range(request.param)]  # fmt: skip


@pytest.fixture(scope="module")
def alone():
    return together.exact_runs()


def test_several_processes_take_the_steps_of_one(results, alone):
    for of_process in results:
        assert of_process["exact"].keys() == alone.keys()
        for name, run in alone.items():
            for got, wanted in zip(of_process["exact"][name], run, strict=True):
                np.testing.assert_allclose(got, wanted, rtol=1e-9, atol=1e-12, err_msg=name)


def test_all_processes_end_with_the_same_network(results):
    first, *others = results
    for other in others:
        for name, run in first["uneven"].items():
            assert all(map(torch.equal, run, other["uneven"][name])), name


def test_what_is_too_little_for_several_processes_is_refused_in_all(results):
    number = len(results)
    least = f"at least {2 * number}"
    for of_process in results:
        for name, words in of_process["errors"].items():
            assert words.startswith(name)
            assert least in words
            assert str(2 * number - 1) in words


def test_embeddings_are_written_to_one_file(results):
    expected = embed(together.plain().float(), IMAGES)
    for of_process in results:
        found = of_process["embeddings"]
        assert found["one"].shape == (1, 3)
        for name in ("tensor", "set"):
            torch.testing.assert_close(found[name], expected)


def test_a_process_that_dies_ends_all_and_the_checkpoint_goes_on(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir(), broken.mkdir()
    ended = torchrun(2, "kept", whole)
    assert ended.returncode == 0, ended.stderr
    ended = torchrun(2, "kept", broken, 18)  # in the third epoch
    assert ended.returncode != 0
    assert [file.name for file in broken.iterdir()] == ["run.pt"]
    again = torchrun(2, "kept", broken)
    assert again.returncode == 0, again.stderr
    runs = [torch.load(folder / f"kept.{rank}.pt", weights_only=False)
            for folder in (whole, broken) for rank in (0, 1)]  # fmt: skip
    for run in runs[1:]:
        assert all(np.array_equal(got, wanted) for got, wanted in zip(run, runs[0], strict=True))
    # What one process would make of it is another run, for its random numbers are others.
    with pytest.raises(ValueError, match="was made with other settings"):
        together.kept(broken, 0, 1)


def test_data_of_which_each_process_has_a_part_are_refused(tmp_path):
    ended = torchrun(2, "own part", tmp_path)
    assert ended.returncode != 0
    assert "images and labels must be the same in all processes" in ended.stderr
