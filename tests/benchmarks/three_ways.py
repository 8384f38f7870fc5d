"""Contrastive and triplet loss, each on a matrix and on a network, compared on equal terms.

    python tests/benchmarks/three_ways.py                        choose the settings, then 3 seeds
    python tests/benchmarks/three_ways.py --settings             choose the settings only
    python tests/benchmarks/three_ways.py --final --seeds 10     the settings of chapter 6, 10 seeds

Two losses times three models: a matrix on pixels that starts from the 64 principal components, one
that starts at random, and chapter 6's network of two convolutions. Both losses are means over the
active terms of a batch; both matrices start with distances like those of random points on the unit
sphere, on which the network ends. All train by `fit` for two epochs in batches of 512, without
jitter.

Each of the six chooses margin and rate on a full grid, by MAP@R on the last 10 000 training images,
trained at full length on the other 50 000 with a seed that is not used again. Then come the seeds:
trained on all 60 000 images and tested on the test set. The gallery is in both cases the first
10 000 training images; MAP@R is that of every fourth query.

Prints the grid, a line a run and, paired by seed on the same test images, how triplet changes the
kNN errors of contrastive, PCA those of random and the network those of the matrix, with McNemar's
exact test for each seed and Student's 95 % interval of the mean over seeds.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterable
from functools import partial

import torch
import torch.nn.functional as F
from accuracy import summary
from machine import THREADS, machine
from scipy.stats import binomtest
from torch import Tensor, nn

from tripletlib import (
    ContrastiveLoss,
    KNNClassifier,
    TripletLoss,
    embed,
    fit,
    load_mnist,
    mean_average_precision_at_r,
    pairwise_distances,
)

SEARCH_SEED = 1000
GALLERY = 10_000


def active_contrastive_loss(embeddings: Tensor, labels: Tensor, margin: float) -> Tensor:
    """Contrastive loss as a mean over the pairs that cost something."""
    with torch.no_grad():
        distances = pairwise_distances(embeddings)
        same = labels[:, None] == labels
        active = torch.where(same, distances > 0, distances < margin)
        share = active.triu(diagonal=1).sum() * 2 / (len(labels) * (len(labels) - 1))
    return ContrastiveLoss(margin)(embeddings, labels) / share.clamp(min=1e-9)


class UnitLength(nn.Module):
    """Scale every row to length one."""

    def forward(self, points: Tensor) -> Tensor:
        """Scale them."""
        return F.normalize(points)


def small_network() -> nn.Module:
    """Make chapter 6's network of two convolutions."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 5, stride=2), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 5, stride=2), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(32 * 4 * 4, 64, bias=False), UnitLength()),
    )


def matrix(start: Tensor | None, images: Tensor) -> nn.Module:
    """Make the linear network whose weight L gives the metric's matrix LᵀL."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, 64, bias=False))
    layer = network[1]
    with torch.no_grad():
        if start is not None:
            layer.weight.copy_(start)
        # The mean squared distance of two images becomes 2.
        variance = network(images[:GALLERY]).var(dim=0).sum()
        layer.weight /= variance.sqrt()
    return network


def principal_components(images: Tensor) -> Tensor:
    """Give the 64 directions of widest spread, one a row."""
    covariance = torch.cov(images.flatten(1).T)
    return torch.linalg.eigh(covariance).eigenvectors[:, -64:].T


LOSSES = ("contrastive", "triplet")
MODELS = ("matrix from random", "matrix from PCA", "network")
MARGINS = {
    ("contrastive", "matrix"): (1.0, 2.0, 4.0),
    ("contrastive", "network"): (1.0, 1.4, 1.8),
    ("triplet", "matrix"): (1.0, 4.0, 16.0),
    ("triplet", "network"): (0.4, 0.8, 1.6),
}
RATES = {"matrix": (0.0002, 0.0006, 0.002, 0.006), "network": (0.016, 0.032, 0.064, 0.128)}
CHOSEN = {  # by --settings
    ("contrastive", "matrix from random"): (2.0, 0.002),
    ("contrastive", "matrix from PCA"): (2.0, 0.0006),
    ("contrastive", "network"): (1.4, 0.032),
    ("triplet", "matrix from random"): (16.0, 0.002),
    ("triplet", "matrix from PCA"): (16.0, 0.002),
    ("triplet", "network"): (0.8, 0.064),
}


class Data:
    """What to train on, where to search, and what to ask."""

    def __init__(self, *, final: bool) -> None:
        images, labels = load_mnist("train")
        self.gallery, self.gallery_labels = images[:GALLERY], labels[:GALLERY]
        if final:
            self.images, self.labels = images, labels
            self.queries, self.query_labels = load_mnist("test")
        else:
            self.images, self.queries = images[:50_000], images[50_000:]
            self.labels, self.query_labels = labels[:50_000], labels[50_000:]
        self.components = principal_components(self.images)

    def make(self, model: str, seed: int) -> nn.Module:
        """Make an untrained model."""
        torch.manual_seed(seed)
        if model == "network":
            return small_network()
        return matrix(self.components if model.endswith("PCA") else None, self.images)

    def measure(self, network: nn.Module) -> tuple[Tensor, float]:
        """Tell which queries their ten nearest neighbours classify rightly, and MAP@R."""
        gallery, queries = embed(network, self.gallery), embed(network, self.queries)
        right = KNNClassifier(gallery, self.gallery_labels).predict(queries) == self.query_labels
        few = queries[::4], self.query_labels[::4]
        return right, float(mean_average_precision_at_r(*few, gallery, self.gallery_labels))


def train(loss: str, model: str, margin: float, rate: float, seed: int, data: Data) -> nn.Module:
    """Train one of the six at full length."""
    network = data.make(model, seed)
    of_pairs = partial(active_contrastive_loss, margin=margin)
    options = {"loss": TripletLoss(margin) if loss == "triplet" else of_pairs, "seed": seed}
    options |= {"learning_rate": rate, "augment": False, "progress": False}
    fit(network, data.images, data.labels, **options)
    return network


def choose(data: Data) -> dict[tuple[str, str], tuple[float, float]]:
    """Print the grid of each of the six; return the margin and rate with the best MAP@R."""
    chosen = {}
    print(f"on {len(data.queries)} held-back training images: kNN errors, MAP@R")
    for model in MODELS:
        right, quality = data.measure(data.make(model, SEARCH_SEED))
        print(f"{model}, untrained: {int((~right).sum())}, {quality:.1%}", flush=True)
    for loss, model in itertools.product(LOSSES, MODELS):
        kind, found = model.split()[0], {}
        print(f"{loss}, {model}")
        print("  margin  rate" + "".join(f"{rate:>14g}" for rate in RATES[kind]))
        for margin in MARGINS[loss, kind]:
            row = f"  {margin:<12g}"
            for rate in RATES[kind]:
                network = train(loss, model, margin, rate, SEARCH_SEED, data)
                right, found[margin, rate] = data.measure(network)
                row += f"{int((~right).sum()):>7} {found[margin, rate]:>6.2%}"
            print(row, flush=True)
        chosen[loss, model] = max(found, key=found.__getitem__)
        print("  chosen: margin {:g}, rate {:g}".format(*chosen[loss, model]), flush=True)
    return chosen


def compare(right: dict[tuple[str, str, int], Tensor], seeds: Iterable[int]) -> None:
    """Print paired comparisons: relative errors, tests by seed, the mean over seeds."""
    pairs = [((m, "contrastive"), (m, "triplet")) for m in MODELS]
    pairs += [(("matrix from random", of), ("matrix from PCA", of)) for of in LOSSES]
    pairs += [(("matrix from PCA", of), ("network", of)) for of in LOSSES]
    for (model, loss), (other_model, other_loss) in pairs:
        differences, changes, tests = [], [], []
        for seed in seeds:
            before, after = right[loss, model, seed], right[other_loss, other_model, seed]
            lost, won = int((before & ~after).sum()), int((after & ~before).sum())
            differences.append((lost - won) / len(before))
            changes.append((lost - won) / int((~before).sum()))
            tests.append(f"{lost}:{won} p={binomtest(lost, lost + won).pvalue:.2g}")
        print(f"{model}, {loss} → {other_model}, {other_loss}: lost:won {', '.join(tests)}")
        print(f"  of the queries {summary(differences)}")
        print(f"  of the errors {summary(changes)}")


def main() -> None:
    """Choose the settings, run the seeds, print what came of it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--settings", action="store_true")
    parser.add_argument("--final", action="store_true")
    arguments = parser.parse_args()
    if arguments.seeds < 1:
        parser.error(f"--seeds must be at least 1, got {arguments.seeds}")
    torch.set_num_threads(THREADS)
    print(machine())
    chosen = CHOSEN if arguments.final else choose(Data(final=False))
    if arguments.settings:
        return
    data, right, seeds = Data(final=True), {}, range(arguments.seeds)
    print(f"on {len(data.queries)} test images: kNN errors, MAP@R")
    for model, seed in itertools.product(MODELS, seeds):
        correct, quality = data.measure(data.make(model, seed))
        print(f"untrained {model}, seed {seed}: {int((~correct).sum())}, {quality:.1%}", flush=True)
    for (loss, model), seed in itertools.product(chosen, seeds):
        network = train(loss, model, *chosen[loss, model], seed, data)
        right[loss, model, seed], quality = data.measure(network)
        errors = int((~right[loss, model, seed]).sum())
        print(f"{loss}, {model}, seed {seed}: {errors}, {quality:.2%}", flush=True)
    compare(right, seeds)


if __name__ == "__main__":
    main()
