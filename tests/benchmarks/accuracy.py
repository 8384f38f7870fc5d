"""Accuracy of the defaults over five seeds.

    python tests/benchmarks/accuracy.py                on the test set
    python tests/benchmarks/accuracy.py --validation   on 5 000 training images held back

For each seed a new `EmbeddingNet` is trained by `fit` with its defaults, two epochs in batches of
512, and each query classified by its ten nearest training images. Prints the accuracy of each seed,
their mean, standard deviation and the mean's 95 % interval over seeds (Student's t).
"""

from __future__ import annotations

import argparse
import statistics

import torch
from machine import THREADS, machine
from scipy.stats import t as student

from tripletlib import EmbeddingNet, embed, fit, knn_accuracy, load_mnist

SEEDS = range(5)


def data(validation: bool) -> tuple[torch.Tensor, ...]:
    """Give training images and labels, and those to test on."""
    images, labels = load_mnist("train")
    if not validation:
        return images, labels, *load_mnist("test")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(1))
    held_back, training = order[:5000], order[5000:]
    return images[training], labels[training], images[held_back], labels[held_back]


def summary(values: list[float]) -> str:
    """Give the mean, its interval over seeds and their standard deviation."""
    if len(values) < 2:
        return f"{values[0]:.3%} (one seed: no interval)"
    mean, deviation = statistics.mean(values), statistics.stdev(values)
    half = student.ppf(0.975, len(values) - 1) * deviation / len(values) ** 0.5
    return f"{mean:.3%} ± {half:.3%} (95 %), standard deviation {deviation:.3%}"


def main() -> None:
    """Print a line a seed, and the summary."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--validation", action="store_true")
    images, labels, queries, query_labels = data(parser.parse_args().validation)
    torch.set_num_threads(THREADS)
    print(machine())
    scores = []
    for seed in SEEDS:
        torch.manual_seed(seed)
        network = EmbeddingNet()
        history = fit(network, images, labels, seed=seed, progress=False)
        gallery = embed(network, images)
        accuracy = knn_accuracy(embed(network, queries), query_labels, gallery, labels)
        scores.append(float(accuracy))
        print(f"seed {seed}: {accuracy}, trained in {history['seconds'][-1]:.1f} s", flush=True)
    print(f"mean {summary(scores)}")


if __name__ == "__main__":
    main()
