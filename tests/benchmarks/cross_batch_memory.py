"""Does a memory of past batches help, and what else would the same seconds buy?

    python tests/benchmarks/cross_batch_memory.py          # choose, on training families held back
    python tests/benchmarks/cross_batch_memory.py --final  # measure, on the test families
    python tests/benchmarks/cross_batch_memory.py --cost   # a step's time and memory, by rows kept
    python tests/benchmarks/cross_batch_memory.py --drift  # how far embeddings of fixed images move

To choose and to measure take about a quarter of an hour each, the others a minute.

Chapter 12's memory (Wang et al. 2020) on chapter 8's emoji at 16 x 16 pixels, all with
`ResidualNet` (unit length), `TripletLoss(0.2)` of squared distances over all triplets unless named
otherwise, and the optimisers of `fit`. To choose, the families of the training classes are divided
into three as in `emoji.py`, each held back once with a seed of its own (0 to 2). To measure,
seeds 10 to 14 train on all training classes and are asked for the test classes.

What a way costs is seconds of CPU on one thread, measured side by side. A memory makes a step
dearer, so its rivals get the more epochs that these seconds allow: 4 instead of 3, or 6 for batches
of 256, whose steps cost less an image.

Prints a line a run; for each way the mean of Recall@1 and its standard deviation over seeds; and
its difference from "memory of 2048", with the 95 % interval of Student's t over seeds (the same
seed, so the same start and the same queries), and that over classes (mean of the seeds, the same
queries). Choosing, seeds go with divisions, and only the means are told.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time

import torch
import torch.nn.functional as F
from accuracy import summary
from machine import machine
from torch import Tensor, nn

from tripletlib import (
    BalancedBatchSampler,
    History,
    ResidualNet,
    Score,
    TripletLoss,
    embed,
    fit,
    jitter,
    jitter_colours,
    load_emoji,
    pairwise_distances,
)

REFERENCE = "memory of 2048"
COMMON: dict = {"batch": 64, "rows": 0, "start": 0, "mining": "all", "epochs": 3, "rate": 4e-3}
WAYS: dict[str, dict] = {
    "random of 64, 3 epochs": {},
    "random of 64": {"epochs": 4},
    "random of 256": {"batch": 256, "epochs": 6},
    "balanced 16 x 4": {"batch": (16, 4), "epochs": 4},
    "balanced 64 x 4": {"batch": (64, 4), "epochs": 6},
    "memory of 512": {"rows": 512},
    "memory of 2048": {"rows": 2048},
    "memory of 4096": {"rows": 4096},
    "memory of 2048, from 1000 on": {"rows": 2048, "start": 1000},
    "memory of 2048, from 6000 on": {"rows": 2048, "start": 6000},
    "memory of 2048, rate / 4": {"rows": 2048, "rate": 1e-3},
    "memory of 2048, semi-hard": {"rows": 2048, "mining": "semihard"},
    "balanced, memory of 2048": {"batch": (16, 4), "rows": 2048},
    "balanced, memory from half-way": {"batch": (16, 4), "rows": 2048, "start": 6000},
}
FINAL = (
    "random of 64, 3 epochs",
    "random of 64",
    "random of 256",
    "balanced 16 x 4",
    "memory of 2048",
    "balanced, memory of 2048",
)


class CrossBatchMemory(nn.Module):
    """A loss whose positives and negatives come from the batch and from the batches before."""

    def __init__(self, loss: nn.Module, rows: int, dimensions: int = 768, start: int = 0) -> None:
        super().__init__()
        self.loss, self.start = loss, start
        self.register_buffer("points", torch.zeros(rows, dimensions))
        self.register_buffer("labels", torch.zeros(rows, dtype=torch.int64))
        self.register_buffer("seen", torch.tensor(0))

    def forward(self, points: Tensor, labels: Tensor) -> Tensor:
        """Compare a batch with itself and with the memory, then remember it."""
        own = torch.arange(len(points), device=points.device)
        filled = min(int(self.seen), len(self.points)) if self.seen >= self.start else 0
        value = self.loss(
            points,
            labels,
            reference=torch.cat([points, self.points[:filled]]),
            reference_labels=torch.cat([labels, self.labels[:filled]]),
            anchor_rows=own,
        )
        rows = (self.seen + own) % len(self.points)
        self.points[rows], self.labels[rows] = points.detach(), labels
        self.seen += len(points)
        return value


def redraw(images: Tensor) -> Tensor:
    """Change a batch as another designer might."""
    return jitter_colours(jitter(images))


def data(division: int | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Give images and classes to train on, and to be asked for; no division means the test set."""
    train = load_emoji("train")
    if division is None:
        asked, held = load_emoji("test"), torch.zeros(len(train.labels), dtype=torch.bool)
        queries, kinds = asked.images, asked.labels
    else:
        families = [train.families[label] for label in train.labels]
        order = {family: place for place, family in enumerate(sorted(set(families)))}
        held = torch.tensor([order[family] % 3 == division for family in families])
        queries, kinds = train.images[held], train.labels[held]
    known = train.labels[~held].unique(return_inverse=True)[1]
    return F.avg_pool2d(train.images[~held], 2), known, F.avg_pool2d(queries, 2), kinds


def train(name: str, seed: int, images: Tensor, labels: Tensor, **more: object) -> tuple:
    """Train in one way; return the network, its history and the seconds of CPU it took."""
    way = COMMON | WAYS[name]
    torch.manual_seed(seed)
    network, loss = ResidualNet(), TripletLoss(0.2, way["mining"])
    if way["rows"]:
        loss = CrossBatchMemory(loss, way["rows"], start=way["start"])
    batches = {"batch_size": way["batch"]}
    if isinstance(way["batch"], tuple):
        batches = {"batch_sampler": BalancedBatchSampler(labels, *way["batch"])}
    start = time.process_time()
    history = fit(
        network,
        images,
        labels,
        loss=loss,
        epochs=way["epochs"],
        learning_rate=way["rate"],
        augment=redraw,
        seed=seed,
        progress=False,
        **batches,
        **(more["watch"](network) if more else {}),
    )
    return network, history, time.process_time() - start


def hits(network: nn.Module, queries: Tensor, kinds: Tensor) -> Tensor:
    """Tell whether the nearest other is of the query's class."""
    distances = pairwise_distances(embed(network, queries)).fill_diagonal_(torch.inf)
    return (kinds[distances.argmin(dim=1)] == kinds).double()


def compare(names: list[str], *, final: bool, seeds: list[int]) -> None:
    """Print Recall@1 of each way, and the differences."""
    found: dict[tuple[str, int], Tensor] = {}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for seed in seeds:
        images, labels, queries, kinds = data(None if final else seed % 3)
        for name in names:
            network, _, took = train(name, seed, images, labels)
            found[name, seed] = hits(network, queries, kinds)
            seconds[name].append(took)
            print(f"seed {seed}  {name:32}{found[name, seed].mean():6.1%}{took:6.1f} s", flush=True)
    print(f"\n{'':32}Recall@1  sd over seeds  CPU s   less that of {REFERENCE!r}")
    for name in names:
        values = [float(found[name, seed].mean()) for seed in seeds]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        cost = statistics.median(seconds[name])
        line = f"{name:32}{statistics.mean(values):8.1%}{spread:12.1%}{cost:10.1f}"
        if final and name != REFERENCE and REFERENCE in names:
            gains = [found[name, seed] - found[REFERENCE, seed] for seed in seeds]
            mean = torch.stack(gains).mean(dim=0)
            classes = kinds.unique(return_inverse=True)[1]
            by_class = torch.zeros(int(classes.max()) + 1, dtype=mean.dtype)
            by_class = by_class.index_add(0, classes, mean) / classes.bincount()
            interval = Score.of_values(by_class.numpy())
            only = [sum(int((sign * gain > 0).sum()) for gain in gains) for sign in (1, -1)]
            line += f"   {summary([float(gain.mean()) for gain in gains])}; over classes "
            line += f"{interval.low:+.1%} to {interval.high:+.1%}; right alone {only}"
        print(line, flush=True)


def cost(n: int = 64) -> None:
    """Print what a step of the loss takes, by rows kept, beside that of the network."""
    images, labels, *_ = data(None)
    network, options = ResidualNet(), TripletLoss(0.2)
    sizes = (0, 1024, 4096, 16_384)
    times: dict[object, list[float]] = {key: [] for key in ("network", *sizes)}
    for _ in range(9):  # in turn, so that what else the machine does meets all alike
        start = time.process_time()
        points = network(images[:n])
        points.sum().backward()
        times["network"].append(time.process_time() - start)
        for rows in sizes:
            loss = CrossBatchMemory(options, max(rows, n))
            if rows:
                loss.points[:] = F.normalize(torch.randn(rows, 768))
                loss.labels[:] = torch.randint(int(labels.max()) + 1, (rows,))
                loss.seen += rows
            batch = points.detach().requires_grad_()
            start = time.process_time()
            loss(batch, labels[:n]).backward()
            times[rows].append(time.process_time() - start)
    print(f"network, {n} images: {1000 * statistics.median(times['network']):.0f} ms")
    for rows in sizes:
        matrix, kept = n * (n + rows) * 4 / 2**20, rows * 768 * 4 / 2**20
        print(
            f"{rows:6} rows: {1000 * statistics.median(times[rows]):4.0f} ms, "
            f"{kept:5.1f} MiB kept, {matrix:.2f} MiB a matrix of distances"
        )


def drift(names: list[str], seed: int = 0, every: int = 16) -> None:
    """Print how far embeddings of fixed images move in so many steps, and what is common to all."""
    images, labels, queries, kinds = data(0)
    fixed, kinds = queries[:300], kinds[:300]
    other = kinds[:, None] != kinds
    for name in names:
        snapshots: list[Tensor] = []

        def watch(network: nn.Module, kept: list[Tensor] = snapshots) -> dict:
            def look(history: History) -> None:
                if len(history) % every == 0:  # a copy, so that running means stay as they are
                    with torch.no_grad():
                        kept.append(copy.deepcopy(network).train()(fixed))

            return {"callback": look}

        train(name, seed, images, labels, watch=watch)
        print(f"{name}: squared, of the mean squared distance of two classes")
        for place in range(1, len(snapshots)):
            step = snapshots[place] - snapshots[place - 1]
            apart = pairwise_distances(snapshots[place], squared=True)[other].mean()
            moved, common = step.square().sum(dim=1).mean(), step.mean(dim=0).square().sum()
            print(
                f"  steps {every * place:3} to {every * (place + 1):3}: "
                f"moved {moved / apart:5.2f}, all together {common / apart:5.2f}; "
                f"classes apart {apart:.2f}",
                flush=True,
            )


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser()
    for flag in ("--final", "--cost", "--drift"):
        parser.add_argument(flag, action="store_true")
    parser.add_argument("--ways", nargs="*", choices=WAYS)
    parser.add_argument("--seeds", type=int, nargs="*")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(machine())
    if arguments.cost:
        cost()
    elif arguments.drift:
        drift(arguments.ways or ["memory of 2048", "balanced, memory of 2048"])
    else:
        names = arguments.ways or list(FINAL if arguments.final else WAYS)
        seeds = arguments.seeds or list(range(10, 15) if arguments.final else range(3))
        compare(names, final=arguments.final, seeds=seeds)


if __name__ == "__main__":
    main()
