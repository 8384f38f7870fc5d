"""Choose chapter 8's training without looking at the kinds that it searches.

    python tests/benchmarks/search.py

Of the five kinds that split 0 trains on, three train and two are searched, in two ways. Each row is
a way to train; the columns are Recall@1 and MAP@R on the searched two, and the seconds it took.
About ten minutes on two slow cores.
"""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F
from machine import machine
from torch import Tensor, nn

from tripletlib import (
    EmbeddingNet,
    embed,
    fit,
    load_fashion_mnist,
    mean_average_precision_at_r,
    recall_at_k,
)

FOLDS = (((0, 1, 2), (3, 4)), ((2, 3, 4), (0, 1)))


class Classify(nn.Module):
    """Cross-entropy of a linear layer upon the embeddings."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.head, self.scale = nn.Linear(64, 10), scale

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Return the mean over the batch."""
        return F.cross_entropy(self.scale * self.head(embeddings), labels)


WAYS = {
    "triplets, 1 epoch of 128": (EmbeddingNet, None, 1, 128),
    "triplets, 2 epochs of 128": (EmbeddingNet, None, 2, 128),
    "triplets, 4 epochs of 128": (EmbeddingNet, None, 4, 128),
    "triplets, 2 epochs of 64": (EmbeddingNet, None, 2, 64),
    "classes, length one, times 16, 2 epochs of 128": (EmbeddingNet, Classify(16), 2, 128),
}


def report(name: str, points: Tensor, labels: Tensor, seconds: float = 0.0) -> None:
    """Print a row."""
    recall = recall_at_k(points, labels, k=1)
    at_r = mean_average_precision_at_r(points, labels)
    print(f"  {name:48} {recall:.4f}  {at_r:.4f}  {seconds:5.1f} s", flush=True)


def main() -> None:
    """Print the tables."""
    print(machine())
    images, labels = load_fashion_mnist()
    for seen, searched in FOLDS:
        train, asked = (torch.isin(labels, torch.tensor(kinds)) for kinds in (seen, searched))
        print(f"trained on {seen}, searched {searched}")
        pixels = images[asked].flatten(1)
        report("pixels", pixels, labels[asked])
        report(
            "pixels from black, scaled to length one",
            F.normalize(pixels - pixels.min()),
            labels[asked],
        )
        torch.manual_seed(0)
        untrained = EmbeddingNet()
        report("untrained", embed(untrained, images[asked]), labels[asked])
        earlier = F.normalize(embed(untrained.layers[:-1], images[asked]))
        report("  one layer earlier", earlier, labels[asked])
        for name, (make, loss, epochs, batch_size) in WAYS.items():
            torch.manual_seed(0)
            network = make()
            if loss is not None:
                loss.head.reset_parameters()
            start = time.perf_counter()
            fit(
                network,
                images[train],
                labels[train],
                loss=loss,
                epochs=epochs,
                batch_size=batch_size,
                seed=0,
                progress=False,
            )
            seconds = time.perf_counter() - start
            report(name, embed(network, images[asked]), labels[asked], seconds)
            earlier = F.normalize(embed(network.layers[:-1], images[asked]))
            report("  one layer earlier", earlier, labels[asked])


if __name__ == "__main__":
    main()
