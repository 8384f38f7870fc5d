"""Choose, and then measure, how chapters 8 and 9 learn from emoji.

    python tests/benchmarks/emoji.py                     choose, on training classes held back
    python tests/benchmarks/emoji.py --final             measure, on the test classes too
    python tests/benchmarks/emoji.py --ways recipe ...   some of the ways only

To choose, the families of the training classes are divided into three, in alphabetical order; each
third is held back once, and seeds 0 to 2 train on the other two. To measure, seeds 3 to 5 train in
three divisions of *all* families: the shipped one, and two others that the rule of `load_emoji`
gives with other places of every ten. (Test classes of those two were training classes when the ways
were chosen; the shipped division is printed by itself.)

Prints a line a run, and for each way the means of MAP@R, Recall@1, the equal error rate and the TAR
at a FAR of 1 %, all drawings against all others, and of the seconds; then its difference from the
recipe (of one look) in MAP@R, paired by division and seed, with the 95 % interval of Student's t.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from accuracy import summary
from machine import THREADS, machine
from sklearn.decomposition import PCA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.pipeline import make_pipeline
from torch import Tensor, nn

from tripletlib import (
    BalancedBatchSampler,
    ContrastiveLoss,
    EmbeddingNet,
    ResidualNet,
    TripletLoss,
    embed,
    fit,
    jitter,
    jitter_colours,
    load_emoji,
    mean_average_precision_at_r,
    pair_distances,
    recall_at_k,
    verification_report,
)

REFERENCE = "recipe, one look"
METRICS = ("MAP@R", "Recall@1", "EER", "TAR at FAR 1 %")


def redraw(images: Tensor) -> Tensor:
    """Change a batch as another designer might."""
    return jitter_colours(jitter(images))


def look_often(network: nn.Module, images: Tensor, looks: int = 8) -> Tensor:
    """Embed each image as the mean over itself and some changed versions, at length one."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        total = embed(network, images)
        for _ in range(looks):
            total += embed(network, redraw(images))
    return F.normalize(total)


class Classify(nn.Module):
    """Cross-entropy of a linear layer upon the embeddings, times 16."""

    def __init__(self, classes: int, dimensions: int = 768) -> None:
        super().__init__()
        self.head = nn.Linear(dimensions, classes)

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Return the mean over the batch."""
        return F.cross_entropy(16 * self.head(embeddings), labels)


class SupCon(nn.Module):
    """Supervised contrastive loss (Khosla et al. 2020), with the temperature of their choice."""

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Return the mean over anchors and their positives."""
        itself = torch.eye(len(labels), dtype=torch.bool)
        logits = (embeddings @ embeddings.T / 0.1).masked_fill(itself, -1e9)
        positive = (labels[:, None] == labels) & ~itself
        of_pairs = logits.log_softmax(dim=1) * positive
        return -(of_pairs.sum(dim=1) / positive.sum(dim=1).clamp(min=1)).mean()


def embedding_net() -> nn.Module:
    """Make the network of the other chapters."""
    return EmbeddingNet(128, in_channels=3)


RECIPE: dict = {
    "make": ResidualNet,
    "loss": lambda classes: TripletLoss(0.1, "semihard"),
    "epochs": 12,
    "batch": (32, 6),
    "augment": redraw,
}
WAYS: dict[str, dict] = {
    "recipe": {},
    "margin 0.05": {"loss": lambda classes: TripletLoss(0.05, "semihard")},
    "margin 0.2": {"loss": lambda classes: TripletLoss(0.2, "semihard")},
    "all triplets": {"loss": lambda classes: TripletLoss(0.2)},
    "hard triplets": {"loss": lambda classes: TripletLoss(0.2, "hard")},
    "contrastive 0.5": {"loss": lambda classes: ContrastiveLoss(0.5)},
    "SupCon": {"loss": lambda classes: SupCon()},
    "classifier": {"loss": Classify, "batch": (64, 6)},
    "batches of 64 x 6": {"batch": (64, 6)},
    "no colours": {"augment": jitter},
    "EmbeddingNet(128)": {"make": embedding_net},
    "6 epochs": {"epochs": 6},
}


def divisions(final: bool) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Give images and labels to train on, and those to test on, three times."""
    train, test = load_emoji("train"), load_emoji("test")
    parts = [train, test] if final else [train]
    images, labels = (torch.cat([part[i] for part in parts]) for i in (0, 1))
    families = [train.families[label] for label in labels]
    order = {family: place for place, family in enumerate(sorted(set(families)))}
    place = torch.tensor([order[family] for family in families])
    for third in range(3):
        if final:
            held_back = torch.isin(place % 10, torch.arange(3) + (3 + 3 * third) % 9)
        else:
            held_back = place % 3 == third
        known = labels[~held_back].unique(return_inverse=True)[1]
        yield images[~held_back], known, images[held_back], labels[held_back]


def measure(points: Tensor, labels: Tensor) -> dict[str, float]:
    """Measure retrieval and verification among these, all against all."""
    report = verification_report(*pair_distances(points, labels))
    values = (
        mean_average_precision_at_r(points, labels),
        recall_at_k(points, labels, k=1),
        report.equal_error_rate,
        report.tar_at_far(0.01),
    )
    return dict(zip(METRICS, map(float, values), strict=True))


def rivals(images: Tensor, labels: Tensor, queries: Tensor) -> dict[str, Tensor]:
    """Embed the queries in the ways that need no training of a network."""

    def fitted(model: object) -> Tensor:
        model.fit(images.flatten(1).numpy(), labels.numpy())
        return F.normalize(torch.from_numpy(model.transform(queries.flatten(1).numpy())).float())

    torch.manual_seed(0)
    lda = LinearDiscriminantAnalysis(solver="eigen", shrinkage=0.1, n_components=64)
    return {
        "pixels": F.normalize((queries.amax() - queries).flatten(1)),
        "PCA": fitted(PCA(64, random_state=0)),
        "PCA, whitened": fitted(PCA(64, whiten=True, random_state=0)),
        "untrained": embed(ResidualNet(), queries),
        "LDA": fitted(make_pipeline(PCA(128, random_state=0), lda)),
    }


def run(way: dict, seed: int, images: Tensor, labels: Tensor) -> tuple[Callable, float]:
    """Train in one way; return what embeds images, by name, and the seconds it took."""
    chosen = RECIPE | way
    torch.manual_seed(seed)
    network, loss = chosen["make"](), chosen["loss"](int(labels.max()) + 1)
    history = fit(
        network,
        images,
        labels,
        loss=loss,
        epochs=chosen["epochs"],
        batch_sampler=BalancedBatchSampler(labels, *chosen["batch"]),
        augment=chosen["augment"],
        seed=seed,
        progress=False,
    )

    def spaces(queries: Tensor) -> dict[str, Tensor]:
        points = embed(network, queries)
        if way == {}:
            return {"": look_often(network, queries), ", one look": points}
        if not isinstance(loss, Classify):
            return {"": points}
        with torch.no_grad():
            return {", layer before": points, ", outputs": F.normalize(loss.head(points))}

    return spaces, history["seconds"][-1]


def line(name: str, values: dict[str, float]) -> str:
    """Format a row."""
    return f"{name:46}" + "".join(f"{metric} {values[metric]:6.1%}  " for metric in METRICS)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--final", action="store_true")
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=list(WAYS))
    parser.add_argument("--seeds", type=int, nargs="*")
    parser.add_argument("--threads", type=int, default=THREADS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    seeds = arguments.seeds or (range(3, 6) if arguments.final else range(3))
    print(machine())
    scores: dict[tuple[str, int, int], dict[str, float]] = {}
    for place, (images, labels, queries, asked) in enumerate(divisions(arguments.final)):
        for name, points in rivals(images, labels, queries).items():
            scores |= {(name, place, seed): measure(points, asked) for seed in seeds[:1]}
        for name, seed in itertools.product(arguments.ways, seeds):
            spaces, seconds = run(WAYS[name], seed, images, labels)
            for which, points in spaces(queries).items():
                scores[name + which, place, seed] = measure(points, asked)
                row = line(
                    f"{name}{which}, division {place}, seed {seed}",
                    scores[name + which, place, seed],
                )
                print(f"{row}{seconds:6.1f} s", flush=True)
    print("\nmeans over divisions and seeds")
    for name in dict.fromkeys(name for name, _, _ in scores):
        rows = {key[1:]: row for key, row in scores.items() if key[0] == name}
        mean = {m: sum(row[m] for row in rows.values()) / len(rows) for m in METRICS}
        print(line(name, mean))
        first = {m: [row[m] for (place, _), row in rows.items() if place == 0] for m in METRICS}
        print(line("    division 0", {m: sum(column) / len(column) for m, column in first.items()}))
        pairs = [(row["MAP@R"], scores.get((REFERENCE, *key))) for key, row in rows.items()]
        if name != REFERENCE and all(of for _, of in pairs):
            less = summary([mine - of["MAP@R"] for mine, of in pairs])
            print(f"    MAP@R less that of {REFERENCE!r}: {less}")


if __name__ == "__main__":
    main()
