"""The triplet network paper reproduced on MNIST, as far as a budget of triplets goes.

    python tests/benchmarks/paper.py --triplets 100000 --checkpoint run.pt
    python tests/benchmarks/paper.py --triplets 100000 --checkpoint run.pt --validation

The paper's network, loss and optimiser (Hoffer and Ailon 2014, and the authors' Torch code): SGD
with learning rate 0.1, momentum 0.9, weight decay 1e-4, batches of 128 random triplets. Torch's SGD
multiplied each new gradient by 1 - momentum; --dampening 0.9 does so too, for steps a tenth as
long, which suit budgets of millions of triplets. Training uses all 60 000 images, or with
--validation all but 5 000, which then take the place of the test set.

Prints triplets seen, loss and triplet error as it goes. At the end: the triplet error on 64 000
triplets of the images tested, and the accuracy on them of a linear classifier and of kNN (k = 10),
both fed with the frozen embeddings of all training images. State is kept in the checkpoint every
--minutes; a run that was stopped goes on from there with the same command, and a larger --triplets
makes a finished run longer.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from accuracy import data
from machine import THREADS, machine
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from tripletlib import (
    DistanceRatioLoss,
    HofferAilonNet,
    Score,
    TripletNet,
    draw_triplets,
    embed,
    knn_accuracy,
)
from tripletlib._cache import write_atomically

BATCH = 128
# Triplets are drawn anew for each part of this size, from a seed that the part's number gives, so
# that a resumed run sees what an uninterrupted one would.
PART = 64 * BATCH
RECIPE = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4}
TESTED_TRIPLETS = 64_000


class Run:
    """Network, optimiser and the count of triplets seen, which a checkpoint holds."""

    def __init__(self, file: Path, **settings: float) -> None:
        self.file = file
        self.settings = {**RECIPE, "batch": BATCH, **settings}
        self.seen, self.seconds = 0, 0.0
        torch.manual_seed(settings["seed"])
        self.network = HofferAilonNet()
        self.optimizer = torch.optim.SGD(
            self.network.parameters(), **RECIPE, dampening=settings["dampening"]
        )
        if file.exists():
            self._load()

    def _load(self) -> None:
        state = torch.load(self.file, weights_only=True)
        if state["settings"] != self.settings:
            raise SystemExit(
                f"{self.file} is of a run with {state['settings']}, not {self.settings}: "
                "name another --checkpoint"
            )
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        self.seen, self.seconds = state["seen"], state["seconds"]

    def save(self) -> None:
        """Write all that changes; the old file stays until the new one is whole."""
        state = {
            "settings": self.settings,
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": torch.get_rng_state(),
            "seen": self.seen,
            "seconds": self.seconds,
        }
        write_atomically(self.file, lambda stream: torch.save(state, stream))

    def batches(self, labels: Tensor, triplets: int) -> Iterator[list[Tensor]]:
        """Yield indices of anchors, positives and negatives, from where the run stands."""
        while self.seen < triplets:
            part, place = divmod(self.seen, PART)
            stop = min(PART, place + triplets - self.seen)
            generator = torch.Generator().manual_seed(2**32 * self.settings["seed"] + part)
            drawn = draw_triplets(labels, PART, generator)
            for start in range(place, stop, BATCH):
                yield [column[start : min(start + BATCH, stop)] for column in drawn]

    def train(self, images: Tensor, labels: Tensor, triplets: int, minutes: float) -> None:
        """Train until so many triplets have been seen in all; print progress and keep it."""
        triplet_net, loss_of = TripletNet(self.network), DistanceRatioLoss()
        losses, errors, kept = [], [], time.perf_counter()
        for indices in self.batches(labels, triplets):
            start = time.perf_counter()
            embedded = triplet_net(*(images[column] for column in indices))
            loss = loss_of(*embedded)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.seen += len(indices[0])
            self.seconds += time.perf_counter() - start
            losses.append(loss.item())
            errors.append(triplet_error(*embedded))
            if len(losses) == 25 or self.seen == triplets:
                means = [sum(values) / len(values) for values in (losses, errors)]
                print(
                    f"{self.seen:9d} triplets, loss {means[0]:.4f}, error {means[1]:.2%} in "
                    f"training, {self.seconds / 60:.1f} min",
                    flush=True,
                )
                losses, errors = [], []
            if time.perf_counter() - kept > 60 * minutes:
                self.save()
                kept = time.perf_counter()
        self.save()


def triplet_error(anchor: Tensor, positive: Tensor, negative: Tensor) -> float:
    """Return the fraction of triplets whose negative is as near as the positive, or nearer."""
    with torch.no_grad():
        wrong = (anchor - positive).norm(dim=1) >= (anchor - negative).norm(dim=1)
    return wrong.double().mean().item()


def report(network: torch.nn.Module, data: tuple[Tensor, ...], seed: int) -> None:
    """Print what the frozen embeddings are worth."""
    images, labels, queries, query_labels = data
    gallery, tested = embed(network, images), embed(network, queries)
    generator = torch.Generator().manual_seed(seed)
    drawn = draw_triplets(query_labels, TESTED_TRIPLETS, generator)
    print(f"triplet error {triplet_error(*(tested[column] for column in drawn)):.3%}")
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    classifier.fit(gallery.numpy(), labels.numpy())
    right = int((classifier.predict(tested.numpy()) == query_labels.numpy()).sum())
    print(f"linear classifier {Score.of_successes(right, len(queries))}")
    print(f"kNN, k = 10: {knn_accuracy(tested, query_labels, gallery, labels)}")


def main() -> None:
    """Train, or go on, then report."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--triplets", type=int, required=True)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--validation", action="store_true")
    parser.add_argument("--dampening", type=float, default=0.0)
    parser.add_argument("--minutes", type=float, default=2.0, help="between checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=THREADS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{machine()}; this run uses {options.threads}")
    everything = data(options.validation)
    run = Run(
        options.checkpoint,
        validation=options.validation,
        dampening=options.dampening,
        seed=options.seed,
    )
    run.train(*everything[:2], options.triplets, options.minutes)
    print(
        f"{run.seen} triplets are {3 * run.seen} images seen, trained in {run.seconds / 60:.1f} min"
    )
    report(run.network, everything, options.seed)


if __name__ == "__main__":
    main()
