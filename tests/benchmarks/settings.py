"""How margin, learning rate, size of a batch and classes in it change the error: chapter 4's grid.

    python tests/benchmarks/settings.py

Each run trains an `EmbeddingNet` by `fit` with its defaults, but for the two settings of its grid,
for one epoch of 10 000 training images, and classifies 5 000 other training images by their ten
nearest of the 10 000. The test set is not touched. Prints the kNN error of pixels and of untrained
networks, and for each cell of a grid the mean error over the seeds and each seed's. With P classes
in a batch, it holds P x K images, K being the batch size over P, rounded down. Last comes
batch-hard for five epochs in batches of 512, squared and not, with seed 0: how far its embeddings
spread at the end (they collapse), and its error.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Sequence

import torch
from machine import THREADS, machine
from torch import Tensor

from tripletlib import (
    BalancedBatchSampler,
    EmbeddingNet,
    History,
    TripletLoss,
    embed,
    fit,
    knn_accuracy,
    load_mnist,
)

MARGINS, RATES = (0.05, 0.2, 0.8), (0.001, 0.004, 0.016)
BATCH_SIZES, CLASSES = (64, 512), (2, 5, 10)
DEFAULTS = {"margin": 0.2, "learning rate": 0.004, "batch size": 512, "classes": None}
DEFAULTS |= {"mining": "all", "squared": True}
GRIDS = (
    {"margin": MARGINS, "learning rate": RATES},
    {"batch size": BATCH_SIZES, "classes": CLASSES},
)


def error(points: Tensor, labels: Tensor, queries: Tensor, query_labels: Tensor) -> float:
    """Return the share of queries that their ten nearest points name wrongly."""
    return 1 - knn_accuracy(queries, query_labels, points, labels)


def train(
    settings: dict, seed: int, epochs: int, images: Tensor, labels: Tensor
) -> tuple[EmbeddingNet, History]:
    """Train a network with the default settings but for these."""
    settings = DEFAULTS | settings
    torch.manual_seed(seed)
    network = EmbeddingNet()
    size, classes = settings["batch size"], settings["classes"]
    sampler = BalancedBatchSampler(labels, classes, size // classes) if classes else None
    history = fit(
        network,
        images,
        labels,
        epochs=epochs,
        loss=TripletLoss(settings["margin"], settings["mining"], squared=settings["squared"]),
        learning_rate=settings["learning rate"],
        batch_size=size,
        batch_sampler=sampler,
        seed=seed,
        progress=False,
    )
    return network, history


def shown(errors: Sequence[float]) -> str:
    """Give the mean and what it is the mean of."""
    return f"{statistics.mean(errors):.2%} ({', '.join(f'{one:.2%}' for one in errors)})"


def main() -> None:
    """Print the baselines and a line a cell."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    print(machine())
    images, labels = load_mnist("train")
    known, known_labels = images[:10_000], labels[:10_000]
    asked, asked_labels = images[10_000:15_000], labels[10_000:15_000]
    seeds = range(arguments.seeds)

    def measure(network: EmbeddingNet) -> float:
        points, queries = embed(network, known), embed(network, asked)
        return error(points, known_labels, queries, asked_labels)

    untrained = []
    for seed in seeds:
        torch.manual_seed(seed)
        untrained.append(measure(EmbeddingNet()))
    pixels = error(known.flatten(1), known_labels, asked.flatten(1), asked_labels)
    print(f"kNN error of pixels: {pixels:.2%}; untrained: {shown(untrained)}", flush=True)
    for grid in GRIDS:
        names = list(grid)
        print(" x ".join(names), "(others as usual):")
        for cell in itertools.product(*grid.values()):
            settings = dict(zip(names, cell, strict=True))
            runs = (train(settings, seed, arguments.epochs, known, known_labels) for seed in seeds)
            errors = [measure(network) for network, _ in runs]
            where = ", ".join(f"{name} {one:<5g}" for name, one in zip(names, cell, strict=True))
            print(f"  {where}: {shown(errors)}", flush=True)
    print("batch-hard, five epochs:")
    for squared in (True, False):
        settings = {"mining": "hard", "squared": squared}
        network, history = train(settings, 0, 5, known, known_labels)
        spread = history["spread"][-5:].mean()
        name = "squared" if squared else "not squared"
        print(f"  {name}: {measure(network):.2%}, spread {spread:.3f}", flush=True)


if __name__ == "__main__":
    main()
