"""How many classes and images does a search among new classes take? For chapter 10.

    python tests/benchmarks/own_images.py

Trains `ResidualNet` on some of the training emoji, with some of the drawings of each, all at half
size (16 pixels), and prints MAP@R among the test emoji: a row for each number of classes, a column
for each number of drawings a class, the mean over seeds 0 and 1 and in brackets the two values;
before them those of the untrained network.
Which classes take part is drawn anew with the seed; the drawings are the first of each. All
networks look at 36 000 images, changed at random each time, so that only what they look at differs.
"""

from __future__ import annotations

import statistics

import torch
import torch.nn.functional as F
from emoji import redraw
from machine import THREADS, machine
from torch import Tensor

from tripletlib import (
    BalancedBatchSampler,
    ResidualNet,
    TripletLoss,
    embed,
    fit,
    load_emoji,
    mean_average_precision_at_r,
)

CLASSES, EACH, SEEDS = (20, 80, 320, 827), (2, 4, 8), (0, 1)
LOOKS, BATCH = 36_000, 192


def trained(images: Tensor, labels: Tensor, each: int, seed: int) -> ResidualNet:
    """Train on these drawings."""
    each = min(each, 6)  # of one class in a batch, as in chapter 8
    classes = min(BATCH // each, len(labels.unique()))
    generator = torch.Generator().manual_seed(seed)
    batches = BalancedBatchSampler(labels, classes, each, generator=generator)
    torch.manual_seed(seed)
    network = ResidualNet()
    fit(
        network,
        images,
        labels,
        loss=TripletLoss(margin=0.1, mining="semihard"),
        epochs=max(1, round(LOOKS / (classes * each) / len(batches))),
        batch_sampler=batches,
        augment=redraw,
        seed=seed,
        progress=False,
    )
    return network


def main() -> None:
    """Print the table, row by row."""
    torch.set_num_threads(THREADS)
    print(machine())
    train, test = load_emoji("train"), load_emoji("test")
    images, queries = (F.avg_pool2d(part.images, 2) for part in (train, test))
    nth = (train.labels[:, None] == train.labels).tril(-1).sum(dim=1)  # within its class
    untrained = []
    for seed in SEEDS:
        torch.manual_seed(seed)
        points = embed(ResidualNet(), queries)
        untrained.append(float(mean_average_precision_at_r(points, test.labels)))
    print("untrained", *(f"{value:.1%}" for value in untrained))
    for classes in CLASSES:
        words = []
        for each in EACH:
            values = []
            for seed in SEEDS:
                order = torch.randperm(827, generator=torch.Generator().manual_seed(seed))
                chosen = train.labels.unique()[order[:classes]]
                used = torch.isin(train.labels, chosen) & (nth < each)
                network = trained(images[used], train.labels[used], each, seed)
                points = embed(network, queries)
                values.append(float(mean_average_precision_at_r(points, test.labels)))
            all_values = ", ".join(f"{value:.1%}" for value in values)
            words.append(f"{each} each: {statistics.mean(values):.1%} ({all_values})")
        print(f"{classes:4} classes", *words, sep="   ", flush=True)


if __name__ == "__main__":
    main()
