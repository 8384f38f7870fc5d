import gzip

import numpy as np
import pytest
import torch
from test_data import PACKAGE, copied_package, empty_cache  # noqa: F401
from torch import nn

from tripletlib import load_libraries

FILE = PACKAGE / "Libraries" / "raw" / "projects.tsv.gz"


@pytest.fixture(scope="module")
def libraries():
    return load_libraries()


def test_every_project_has_the_libraries_of_its_line(libraries):
    with gzip.open(FILE, "rt", encoding="utf-8") as stream:
        lines = [line.rstrip("\n").split("\t") for line in stream]
    assert libraries.projects == tuple(project for project, _ in lines)
    used = [
        [libraries.names[column] for column in columns]
        for columns in np.split(libraries.uses.indices, libraries.uses.indptr[1:-1])
    ]
    assert used == [words.split(" ") for _, words in lines]


def test_sizes_order_and_values_are_as_documented(libraries):
    projects, names, uses = libraries
    assert uses.shape == (len(projects), len(names)) == (8279, 1677)
    assert uses.nnz == 67_249
    assert uses.dtype == np.float32
    assert uses.has_canonical_format
    assert (uses.data == 1).all()
    assert list(projects) == sorted(set(projects))
    assert list(names) == sorted(set(names))
    assert uses.sum(axis=1).min() == 4
    assert uses.sum(axis=0).min() == 10
    assert 1 - uses.nnz / np.prod(uses.shape) == pytest.approx(0.995, abs=5e-4)


def test_products_count_and_a_bag_of_torch_reads_the_rows(libraries):
    uses = libraries.uses
    together = uses.T @ uses
    first, second = map(libraries.names.index, ("libgtk-3-dev", "libcairo2-dev"))
    both = {row for row in range(uses.shape[0]) if uses[row, first] and uses[row, second]}
    assert together[first, second] == len(both) > 50
    bag = nn.EmbeddingBag(uses.shape[1], 3, mode="sum")
    sums = bag(*map(torch.from_numpy, (uses.indices, uses.indptr[:-1])))
    expected = torch.from_numpy(uses @ bag.weight.detach().numpy())
    torch.testing.assert_close(sums, expected, atol=1e-4, rtol=1e-4)


def test_unpacked_once_and_the_same_again(empty_cache, libraries):  # noqa: F811
    load_libraries()
    (file,) = empty_cache.rglob("*.tsv")
    written = file.stat().st_mtime_ns
    again = load_libraries()
    assert file.stat().st_mtime_ns == written
    assert (again.projects, again.names) == (libraries.projects, libraries.names)
    assert (again.uses != libraries.uses).nnz == 0


def test_damaged_file_is_named_with_what_to_do(copied_package):  # noqa: F811
    file = copied_package / "Libraries" / "raw" / FILE.name
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(RuntimeError, match=r"projects.tsv.gz is .*damaged.*reinstall"):
        load_libraries()
