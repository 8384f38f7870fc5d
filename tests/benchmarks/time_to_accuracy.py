"""Time until kNN accuracy passes what pytorch-metric-learning's MNIST example reaches.

    python tests/benchmarks/time_to_accuracy.py

The example, rebuilt from its public description: a network of two convolutions (32 and 64
channels, 3x3), pooling, dropout and a linear layer to 128 numbers; triplets of a semi-hard cosine
miner; Adam at 0.01; one epoch in batches of 256. It is given its images as tensors in memory, which
spares it the loading of image files. Ours is `fit` with one epoch over the first images, as few as
were found enough on validation images. Both are trained in turn, three times, with seeds 0 to 2;
only training is timed. Accuracy is that of the ten nearest of all 60 000 training images, on the
test set.
"""

from __future__ import annotations

import statistics
import time

import torch
from machine import THREADS, machine
from pytorch_metric_learning import distances, losses, miners, reducers
from torch import nn

from tripletlib import EmbeddingNet, embed, fit, knn_accuracy, load_mnist

GOAL = 0.9807
FEW = 8192


def example(images: torch.Tensor, labels: torch.Tensor) -> tuple[nn.Module, float]:
    """Train the example's network for one epoch; return it and the seconds it took."""
    network = nn.Sequential(
        nn.Conv2d(1, 32, 3),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Dropout2d(0.25),
        nn.Flatten(),
        nn.Linear(9216, 128),
    )
    distance = distances.CosineSimilarity()
    loss = losses.TripletMarginLoss(0.2, distance=distance, reducer=reducers.ThresholdReducer(0))
    miner = miners.TripletMarginMiner(0.2, distance=distance, type_of_triplets="semihard")
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    start = time.perf_counter()
    for batch in torch.randperm(len(images)).split(256):
        optimizer.zero_grad()
        embeddings = network(images[batch])
        loss(embeddings, labels[batch], miner(embeddings, labels[batch])).backward()
        optimizer.step()
    return network.eval(), time.perf_counter() - start


def ours(images: torch.Tensor, labels: torch.Tensor) -> tuple[nn.Module, float]:
    """Train our network on the first images for one epoch; return it and the seconds it took."""
    network = EmbeddingNet()
    start = time.perf_counter()
    fit(network, images[:FEW], labels[:FEW], epochs=1, progress=False)
    return network, time.perf_counter() - start


def main() -> None:
    """Print a line a run, and the ratio of times."""
    torch.set_num_threads(THREADS)
    print(machine())
    images, labels = load_mnist("train")
    queries, query_labels = load_mnist("test")
    taken = {"example": [], "ours": []}
    for seed in range(3):
        for train in (example, ours):
            torch.manual_seed(seed)
            network, seconds = train(images, labels)
            gallery = nn.functional.normalize(embed(network, images))
            found = nn.functional.normalize(embed(network, queries))
            accuracy = knn_accuracy(found, query_labels, gallery, labels)
            passed = "passes" if accuracy > GOAL else "does not pass"
            print(f"{train.__name__}: {seconds:.1f} s, {accuracy}, {passed} {GOAL:.2%}", flush=True)
            taken[train.__name__].append(seconds)
    ratios = [a / b for a, b in zip(taken["example"], taken["ours"], strict=True)]
    print(
        f"the example takes {statistics.median(ratios):.1f} times as long "
        f"({min(ratios):.1f} to {max(ratios):.1f})"
    )


if __name__ == "__main__":
    main()
