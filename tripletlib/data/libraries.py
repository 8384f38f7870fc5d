"""Libraries: what 8 279 projects of the Debian archive use, shipped with the package."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.sparse import csr_array

from tripletlib.data._shipped import unpacked


class Libraries(NamedTuple):
    """Who uses what; `load_libraries` says what the fields are."""

    projects: tuple[str, ...]
    names: tuple[str, ...]
    uses: csr_array


def load_libraries() -> Libraries:
    """Load which of 1 677 libraries each of 8 279 projects uses: 67 249 uses.

    A project is a source package of Debian 12 ("bookworm"), main; the libraries are those that it
    needs to be built, packaging tools left out. Each library has at least ten projects, and each
    project at least four libraries. That a project does *not* list a library says little: it may
    need it tomorrow, or never have heard of it (*implicit feedback*).

    Returns
    -------
    Libraries
        A named tuple of

        - ``projects``, tuple of 8 279 words, in alphabetical order;
        - ``names``, tuple of 1 677 words, in alphabetical order: what the libraries are called;
        - ``uses``, `scipy.sparse.csr_array`, float32, shape (8279, 1677): 1 where the project uses
          the library. Sparse, because 99.5 % would be zeros; numbers rather than truth values,
          because products count (``uses.T @ uses``: projects that use both). Row i's libraries,
          ``uses.indices[uses.indptr[i] : uses.indptr[i + 1]]``, are in ascending order.

    Raises
    ------
    RuntimeError
        As for `load_mnist`.

    Notes
    -----
    Source: the package index of the Debian project, https://www.debian.org. Of an alternative the
    first was taken. The shipped file is unpacked once into the user's cache folder, as those of
    `load_mnist`.

    Examples
    --------
    >>> libraries = load_libraries()
    >>> row = libraries.projects.index("3depict")
    >>> [libraries.names[column] for column in libraries.uses[[row]].indices][:3]
    ['libftgl-dev', 'libgl1-mesa-dev', 'libgsl-dev']
    """
    with unpacked("Libraries", "") as folder:
        lines = (folder / "projects.tsv").read_text(encoding="utf-8").splitlines()
    projects, lists = zip(*(line.split("\t") for line in lines), strict=True)
    used = [words.split(" ") for words in lists]
    names, columns = np.unique([word for words in used for word in words], return_inverse=True)
    ends = np.cumsum([0, *map(len, used)])
    shape = (len(projects), len(names))
    uses = csr_array((np.ones(len(columns), np.float32), columns, ends), shape=shape)
    return Libraries(projects, tuple(names.tolist()), uses)
