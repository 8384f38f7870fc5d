"""Choose, and then measure, how to recommend libraries to projects.

    python tests/benchmarks/libraries.py                     choose, on training projects held back
    python tests/benchmarks/libraries.py --final             measure, on the test projects
    python tests/benchmarks/libraries.py --ways triplets ... some of the ways only

A fifth of the projects, drawn once, are the test projects. To choose, a fifth of the others are
held back, and seed 0 decides what is hidden and how training begins; to measure, seeds 1 to 3. Of
each project asked about a third of its libraries (at least one) are hidden, to be found among all
but the visible ones.

Prints a line a run, and for each way the means and standard deviations over seeds of Recall@10,
NDCG@10, how many different libraries are recommended (ten a project) and the share of the
recommendations that goes to the 14 most popular; then how much more it finds than EASE does, paired
by project (mean over seeds), with a bootstrap interval over projects.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from machine import THREADS, machine
from recommenders import (
    ease,
    item_knn,
    metric_learning,
    popularity,
    truncated_svd,
    weighted_als,
)
from scipy.sparse import csr_array
from torch import Tensor, nn

from tripletlib import Score, list_recall_at_k, load_libraries, ndcg_at_k

LENGTH = 10  # of a list
METRICS = ("Recall@10", "NDCG@10", "libraries", "to the 14 most popular", "seconds")
RECIPE: dict = {
    "dimensions": 512,
    "from_neighbours": True,
    "dropout": 0.3,
    "hidden": (0.2, 0.6),
    "batch": 128,
    "rate": 0.002,
    "decay": 0.2,
    "epochs": 12,
}


class Baskets(nn.Module):
    """A basket is the mean of its libraries' vectors, brought to length one.

    So is a library: a basket of one. The longer a library's vector, the more it counts in a mean.
    A bias for each library says how likely it is whatever the basket.
    """

    def __init__(self, items: int, dimensions: int) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(items, dimensions, mode="mean")
        self.sharpness = nn.Parameter(torch.tensor(10.0).log())
        self.bias = nn.Parameter(torch.zeros(items))

    @torch.no_grad()
    def start_at_cosines(self, uses: csr_array) -> None:
        """Give each library the sum of random vectors, one for each project that uses it.

        The cosine of two such sums is near that of the two columns of `uses` (*random projection*),
        so that the untrained network recommends about as item-kNN does.
        """
        random = torch.randn(uses.shape[0], self.bag.embedding_dim)
        self.bag.weight.copy_(F.normalize(torch.from_numpy(uses.T @ random.numpy())))

    def forward(self, baskets: csr_array) -> Tensor:
        """Embed the rows of a sparse array."""
        columns, starts = (torch.from_numpy(of) for of in (baskets.indices, baskets.indptr[:-1]))
        return F.normalize(self.bag(columns, starts))

    def scores(self, points: Tensor) -> Tensor:
        """Score each library by its nearness to each point, and its bias."""
        return points @ F.normalize(self.bag.weight).T * self.sharpness.exp() + self.bias


def hide(
    uses: csr_array, shares: float | np.ndarray, generator: np.random.Generator
) -> tuple[csr_array, csr_array]:
    """Divide each row at random into what stays visible and a share, at least one, to be found."""
    counts = np.diff(uses.indptr)
    rows = np.repeat(np.arange(len(counts)), counts)
    columns = uses.indices[np.lexsort((generator.random(uses.nnz), rows))]
    place = np.arange(uses.nnz) - uses.indptr[rows]
    hidden = place < np.maximum(1, (counts * shares).astype(int))[rows]
    visible, found = (
        csr_array((np.ones(of.sum(), np.float32), (rows[of], columns[of])), shape=uses.shape)
        for of in (~hidden, hidden)
    )
    return visible, found


def smooth_triplet_loss(
    scores: Tensor, hidden: tuple[Tensor, Tensor], used: tuple[Tensor, Tensor]
) -> Tensor:
    """Mean over (basket, hidden library) of log(1 + sum over libraries not used of exp(s_n - s_p)).

    With one negative that is the soft margin; at length one s = 1 - d² / 2, times a factor.
    """
    positive = scores[hidden]
    is_used = torch.zeros_like(scores, dtype=torch.bool).index_put(used, torch.tensor(True))
    negatives = scores.masked_fill(is_used, -torch.inf).logsumexp(dim=1)
    return F.softplus(negatives[hidden[0]] - positive).mean()


def entries(array: csr_array) -> tuple[Tensor, Tensor]:
    """Give rows and columns of what is not zero."""
    return tuple(torch.from_numpy(of.astype(np.int64)) for of in array.nonzero())


def train(uses: csr_array, seed: int, chosen: dict) -> Baskets:
    """Learn the libraries' vectors from baskets of which some libraries are hidden."""
    torch.manual_seed(seed)
    generator = np.random.default_rng(seed)
    network = Baskets(uses.shape[1], chosen["dimensions"])
    if chosen["from_neighbours"]:
        network.start_at_cosines(uses)
    settings = {"lr": chosen["rate"], "betas": (0.9, 0.99), "weight_decay": chosen["decay"]}
    optimizer = torch.optim.AdamW(network.parameters(), **settings)
    batches = -(-uses.shape[0] // chosen["batch"])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, chosen["epochs"] * batches)
    for _ in range(chosen["epochs"]):
        shuffled = uses[generator.permutation(uses.shape[0])]
        shares = generator.uniform(*chosen["hidden"], shuffled.shape[0])
        visible, hidden = hide(shuffled, shares, generator)
        for start in range(0, shuffled.shape[0], chosen["batch"]):
            rows = slice(start, start + chosen["batch"])
            points = F.dropout(network(visible[rows]), chosen["dropout"])
            scores = network.scores(points)
            loss = smooth_triplet_loss(scores, entries(hidden[rows]), entries(shuffled[rows]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return network


def triplets(uses: csr_array, visible: csr_array, seed: int = 0, **changes: object) -> np.ndarray:
    """Score a library by its nearness to the basket, and its bias."""
    network = train(uses, seed, RECIPE | changes)
    with torch.no_grad():
        return network.scores(network(visible)).numpy()


# The settings chosen on projects held back, none of the others surely better, and those others.
WAYS: dict[str, tuple[Callable, dict, list[dict]]] = {
    "most popular": (popularity, {}, []),
    "truncated SVD": (truncated_svd, {}, [{"rank": rank} for rank in (32, 128, 256)]),
    "item-kNN": (item_knn, {}, [{"shrink": shrink} for shrink in (0.0, 5.0, 10.0, 20.0)]),
    "EASE": (ease, {}, [{"penalty": penalty} for penalty in (5.0, 10.0, 20.0, 50.0, 100.0)]),
    "weighted ALS": (
        weighted_als,
        {},
        [{"weight": 3.0}, {"weight": 20.0}, {"penalty": 3.0}, {"penalty": 30.0}, {"rank": 64}],
    ),
    "metric learning": (
        metric_learning,
        {},
        [
            {"margin": 1.0},
            {"margin": 1.9},
            {"epochs": 10},
            {"dimensions": 256},
            {"decorrelate": 10.0},
        ],
    ),
    "triplets": (
        triplets,
        {},
        [
            {"epochs": 0},
            {"dimensions": 128},
            {"dimensions": 256},
            {"from_neighbours": False, "rate": 0.01},
            {"dropout": 0.0},
            {"dropout": 0.5},
            {"decay": 0.0},
            {"decay": 0.4},
            {"rate": 0.003},
            {"hidden": (0.0, 0.3)},
            {"epochs": 20},
        ],
    ),
}
SEEDED = (metric_learning, triplets)


def division(final: bool) -> tuple[csr_array, csr_array]:
    """Give the projects to learn from and those to ask about."""
    uses = load_libraries().uses
    order = np.random.default_rng(0).permutation(uses.shape[0])
    known, asked = np.split(order, [int(0.8 * len(order))])
    if not final:
        known, asked = np.split(known, [int(0.8 * len(known))])
    return uses[known], uses[asked]


def measure(
    scores: np.ndarray, visible: csr_array, hidden: csr_array, popular: np.ndarray
) -> tuple[list[float], np.ndarray]:
    """Measure the lists; give also each project's recall."""
    scores = torch.from_numpy(np.array(scores, dtype=np.float32))
    scores[entries(visible)] = -torch.inf
    wanted = torch.from_numpy(hidden.toarray() > 0)
    recall, values = list_recall_at_k(scores, wanted, k=LENGTH, return_values=True)
    ndcg = ndcg_at_k(scores, wanted, k=LENGTH)
    lists = scores.topk(LENGTH).indices.numpy()
    return [recall, ndcg, len(np.unique(lists)), np.isin(lists, popular).mean()], values


def line(name: str, rows: list[list[float]]) -> str:
    """Format the means over seeds, and the spread where there are several."""
    parts = [f"{name:44}"]
    for metric, column in zip(METRICS, zip(*rows, strict=True), strict=True):
        share = metric not in ("libraries", "seconds")
        factor, digits = (100, 2) if share else (1, 0)
        unit = " %" if share else ""
        column = [factor * value for value in column]
        spread = f" ± {statistics.stdev(column):.{digits}f}" if len(column) > 1 else ""
        parts.append(f"{metric} {statistics.mean(column):.{digits}f}{spread}{unit}")
    return "  ".join(parts)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--final", action="store_true")
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=list(WAYS))
    parser.add_argument("--seeds", type=int, nargs="*")
    parser.add_argument("--threads", type=int, default=THREADS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    seeds = arguments.seeds or (range(1, 4) if arguments.final else range(1))
    print(machine())
    uses, asked = division(arguments.final)
    popular = np.argsort(-uses.sum(axis=0))[:14]
    rows: dict[str, list[list[float]]] = {}
    recalls: dict[str, list[np.ndarray]] = {}
    for seed, name in itertools.product(seeds, arguments.ways):
        visible, hidden = hide(asked, 1 / 3, np.random.default_rng(seed))
        way, chosen, others = WAYS[name]
        for changes in [{}] if arguments.final else [{}, *others]:
            title = " ".join([name, *(f"{key}={value}" for key, value in changes.items())])
            start = time.perf_counter()
            settings = {"seed": seed} if way in SEEDED else {}
            scores = way(uses, visible, **settings, **chosen | changes)
            seconds = time.perf_counter() - start
            values, recall = measure(scores, visible, hidden, popular)
            rows.setdefault(title, []).append([*values, seconds])
            recalls.setdefault(title, []).append(recall)
            print(line(f"{title}, seed {seed}", rows[title][-1:]), flush=True)
    print("\nmeans over seeds")
    for title, of in rows.items():
        print(line(title, of))
        if title != "EASE" and "EASE" in recalls:
            more = np.mean(recalls[title], axis=0) - np.mean(recalls["EASE"], axis=0)
            print(f"    Recall@10 less EASE's, paired by project: {Score.of_values(more)}")


if __name__ == "__main__":
    main()
