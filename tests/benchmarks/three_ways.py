"""Contrastive loss, triplet loss and a learned matrix compared on equal terms, with EmbeddingNet.

    python tests/benchmarks/three_ways.py                          three seeds, on the test set
    python tests/benchmarks/three_ways.py --seeds 5 --validation   on training images held back

Contrastive and triplet loss train an `EmbeddingNet` by `fit` with its defaults, two epochs in
batches of 512, with jitter; the matrix is one linear layer on pixels, trained in the same way.
Each family first chooses its margin among four and then, with that margin, its learning rate among
four, by MAP@R on 5 000 training images held back and with one seed that is not used again, each
candidate trained on the other 55 000. Then come the seeds. On the test set they train on all 60 000
images; with --validation, on the 55 000, and are measured on the images that chose the settings,
which flatters all alike. The gallery is all that was trained on, but for MAP@R its first 10 000.

Prints the search, a line a run, for each family and metric the mean over seeds, their standard
deviation and the mean's 95 % interval (Student's t), and the same of triplet less contrastive,
paired by seed.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence

import torch
from accuracy import data, summary
from machine import THREADS, machine
from torch import Tensor, nn

from tripletlib import (
    ContrastiveLoss,
    EmbeddingNet,
    TripletLoss,
    embed,
    fit,
    knn_accuracy,
    mean_average_precision_at_r,
    recall_at_k,
)

SEARCH_SEED = 1000
DEFAULT_RATE = 0.004
RATES = (0.002, 0.004, 0.008, 0.016)
AT_R = 10_000  # gallery items for MAP@R, which takes its time


def pixel_matrix() -> nn.Module:
    """Make the linear network whose weight L gives the metric's matrix LᵀL."""
    return nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, 64, bias=False))


FAMILIES = {
    "contrastive": (EmbeddingNet, ContrastiveLoss, (0.25, 0.5, 1.0, 1.5)),
    "triplet": (EmbeddingNet, TripletLoss, (0.1, 0.2, 0.4, 0.8)),
    "matrix": (pixel_matrix, TripletLoss, (1.0, 5.0, 25.0, 125.0)),
}


def run(
    family: str,
    margin: float,
    rate: float,
    seed: int,
    known: Sequence[Tensor],
    asked: Sequence[Tensor],
) -> dict[str, float]:
    """Train on the known images with their labels, and measure on the others with theirs."""
    make_network, make_loss, _ = FAMILIES[family]
    torch.manual_seed(seed)
    network = make_network()
    options = {"loss": make_loss(margin), "learning_rate": rate, "seed": seed}
    history = fit(network, *known, **options, progress=False)
    gallery, gallery_labels = embed(network, known[0]), known[1]
    queries, query_labels = embed(network, asked[0]), asked[1]
    scores = {
        "kNN accuracy": knn_accuracy(queries, query_labels, gallery, gallery_labels),
        "Recall@1": recall_at_k(queries, query_labels, gallery, gallery_labels),
        "MAP@R": mean_average_precision_at_r(
            queries, query_labels, gallery[:AT_R], gallery_labels[:AT_R]
        ),
    }
    shown = ", ".join(f"{name} {score}" for name, score in scores.items())
    print(
        f"{family:12} margin {margin:<5g} rate {rate:<6g} seed {seed:4}: {shown}; "
        f"trained in {history['seconds'][-1]:.1f} s",
        flush=True,
    )
    return scores


def choose(family: str, known: Sequence[Tensor], asked: Sequence[Tensor]) -> tuple[float, float]:
    """Find the best margin at the default rate, and then the best rate at that margin."""

    def quality(margin: float, rate: float) -> float:
        return run(family, margin, rate, SEARCH_SEED, known, asked)["MAP@R"]

    margins = {margin: quality(margin, DEFAULT_RATE) for margin in FAMILIES[family][2]}
    margin = max(margins, key=margins.__getitem__)
    rates = {DEFAULT_RATE: margins[margin]}
    rates |= {rate: quality(margin, rate) for rate in RATES if rate != DEFAULT_RATE}
    return margin, max(rates, key=rates.__getitem__)


def halves(validation: bool) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Give images to train on with their labels, and those to test on with theirs."""
    images, labels, queries, query_labels = data(validation)
    return (images, labels), (queries, query_labels)


def main() -> None:
    """Choose the settings, run the seeds, print what came of it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--validation", action="store_true")
    arguments = parser.parse_args()
    if arguments.seeds < 1:
        parser.error(f"--seeds must be at least 1, got {arguments.seeds}")
    torch.set_num_threads(THREADS)
    print(machine())
    known, asked = halves(validation=True)
    final = halves(arguments.validation)

    print("margin and learning rate, on images held back:")
    chosen = {family: choose(family, known, asked) for family in FAMILIES}
    print("seeds, on", "images held back:" if arguments.validation else "the test set:")
    scores = {
        (family, seed): run(family, *settings, seed, *final)
        for (family, settings), seed in itertools.product(chosen.items(), range(arguments.seeds))
    }
    seeds = range(arguments.seeds)
    for metric in next(iter(scores.values())):
        print(metric)
        columns = {family: [scores[family, seed][metric] for seed in seeds] for family in FAMILIES}
        for family, column in columns.items():
            margin, rate = chosen[family]
            print(f"  {family:12} margin {margin:<5g} rate {rate:<6g} {summary(column)}")
        pairs = zip(columns["triplet"], columns["contrastive"], strict=True)
        print(
            f"  triplet less contrastive              {summary([a - b for a, b in pairs])}",
            flush=True,
        )


if __name__ == "__main__":
    main()
