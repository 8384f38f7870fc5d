"""What `fit` costs over a bare loop, and one image at a time over the network's bare forward.

    python tests/benchmarks/training.py

The bare loop is forward, loss, backward and the same optimisers' steps on tensors in memory. It and
`fit` train in turn, 20 steps of 512 each, in one process; the ratio of a pair is taken within the
pair. `fit` also shuffles, jitters and describes the triplets of each batch. For the latency,
a test image is embedded and classified by its ten nearest of 60 000, in turn with the forward
alone: with a trained network, and with an untrained one, whose embeddings the search for neighbours
finds harder to tell apart.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from machine import THREADS, machine

from tripletlib import EmbeddingNet, KNNClassifier, TripletLoss, embed, fit, load_mnist, load_or_fit
from tripletlib._optimizer import optimizers

STEPS, BATCH = 20, 512


def bare(images: torch.Tensor, labels: torch.Tensor) -> float:
    """Time a loop with nothing else in it."""
    network, loss = EmbeddingNet(), TripletLoss()
    ours = optimizers(network, loss, 4e-3)
    start = time.perf_counter()
    for batch, batch_labels in zip(images.split(BATCH), labels.split(BATCH), strict=True):
        value = loss(network(batch), batch_labels)
        for optimizer in ours:
            optimizer.zero_grad()
        value.backward()
        for optimizer in ours:
            optimizer.step()
    return time.perf_counter() - start


def fitted(images: torch.Tensor, labels: torch.Tensor) -> float:
    """Time `fit` on the same images."""
    network = EmbeddingNet()
    start = time.perf_counter()
    fit(network, images, labels, epochs=1, batch_size=BATCH)
    return time.perf_counter() - start


def overhead(images: torch.Tensor, labels: torch.Tensor) -> None:
    """Print how much longer `fit` takes than the bare loop."""
    images, labels = images[: STEPS * BATCH], labels[: STEPS * BATCH]
    bare(images, labels)
    ratios = []
    for turn in range(10):
        first, second = (bare, fitted) if turn % 2 else (fitted, bare)
        times = {run: run(images, labels) for run in (first, second)}
        ratios.append(times[fitted] / times[bare])
    print(
        f"fit takes {statistics.median(ratios):.3f} times as long as the bare loop "
        f"({min(ratios):.3f} to {max(ratios):.3f})"
    )


def latency(network: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> str:
    """Say how much longer it takes to embed and classify an image than to run the network."""
    classifier = KNNClassifier(embed(network, images), labels)

    def forward(image: torch.Tensor) -> None:
        with torch.no_grad():
            network(image)

    def classify(image: torch.Tensor) -> None:
        classifier.predict(embed(network, image))

    times: dict[Callable, list[float]] = {forward: [], classify: []}
    queries, _ = load_mnist("test")
    for image in queries[:1000, None]:
        for run, taken in times.items():
            start = time.perf_counter()
            run(image)
            taken.append(time.perf_counter() - start)
    medians = {run: statistics.median(taken) for run, taken in times.items()}
    return (
        f"embed and classify one image: {medians[classify] * 1e3:.2f} ms, forward alone "
        f"{medians[forward] * 1e3:.2f} ms, ratio {medians[classify] / medians[forward]:.2f}"
    )


def main() -> None:
    """Print both."""
    torch.set_num_threads(THREADS)
    print(machine())
    images, labels = load_mnist("train")
    overhead(images, labels)
    trained, _ = load_or_fit(EmbeddingNet, images, labels)
    print("trained network:", latency(trained, images, labels))
    print("untrained network:", latency(EmbeddingNet().eval(), images, labels))


if __name__ == "__main__":
    main()
