"""Trained networks from this machine's cache, where the very same run was made before."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from tripletlib._cache import cache_folder
from tripletlib._validation import check_count, warn
from tripletlib.checkpoints import CANNOT_KEEP, CachedRun
from tripletlib.training import History, fit, materialise, own_randomness, seed_all


def load_or_fit(
    make_network: Callable[[], nn.Module],
    images: Tensor | Dataset,
    labels: Tensor | Sequence[str] | None = None,
    *,
    seed: int = 0,
    retrain: bool = False,
    **options: object,
) -> tuple[nn.Module, History]:
    """Return a trained network, from this machine's cache if the very same run was made before.

    If anything of what a run is known by changes, the network is trained anew; see Notes. Where
    the cache cannot be written, a warning says so and the network is trained each time. A damaged
    file in it is replaced, with a warning.

    Parameters
    ----------
    make_network : callable
        Builds the untrained network, for instance ``EmbeddingNet``.
    images, labels
        As for `fit`.
    seed : int, default 0
        Fixes the initial weights too.
    retrain : bool, default False
        Train even if the cache has the run, and keep the new one.
    **options
        What else `fit` takes, but `checkpoint`.

    Returns
    -------
    network : nn.Module
        Trained, in evaluation mode.
    history : History
        How it was trained.

    Notes
    -----
    A run is known by all that determines its result:

    - images and labels, number for number; of a data set its attributes, transforms and code, and
      of each file that its attributes name the path, the size and the time of its last change (by
      paths, or by names in a folder that is an attribute as well; in lists, sets, dictionaries,
      arrays, tables and dataclasses too);
    - what `make_network` built: its initial weights, all its attributes, and its code;
    - the loss, the augmentation and the batch sampler, with their attributes (whether ``repr``
      prints them or not), weights, hooks, closures, default arguments and random generators, and
      the code of their classes and functions, down to the global names and the reader's own modules
      that they use;
    - the other settings of `fit`, the code of this package, the versions of Python and torch, and
      of other installed libraries where the above uses them.

    What holds something that cannot be told from others of its kind (a lock, an open file, compiled
    code) is trained each time, and a warning names it. Not looked at are the `callback`, which
    watches, files that only code names or that no data set holds, the order of attributes,
    annotations, and machine and threads, which may round differently.
    """
    if "checkpoint" in options:
        raise TypeError("load_or_fit keeps its own checkpoint; with one of yours, use fit")
    if isinstance(make_network, nn.Module) or not callable(make_network):
        raise TypeError(
            "make_network must be a function or class that builds a network, got "
            f"{type(make_network).__name__}"
        )
    check_count(seed, "seed", low=0)
    with torch.random.fork_rng(), own_randomness(torch.device("cpu")):
        seed_all(int(seed))  # of NumPy and Python as well
        torch.manual_seed(int(seed) % 2**63)
        network = make_network()
        materialise(network, images)
    try:
        kept = CachedRun(cache_folder() / "networks", anew=retrain)
    except OSError as error:  # there is no home folder
        warn(CANNOT_KEEP.format(error=error))
        kept = None
    history = fit(network, images, labels, seed=seed, checkpoint=kept, **options)
    return network, history
