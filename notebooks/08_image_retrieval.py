# ---
# jupyter:
#   jupytext:
#     cell_metadata_filter: tags,jupyter,alt,-all
#     formats: ipynb,py:percent
#     notebook_metadata_filter: -jupytext.text_representation.jupytext_version
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 8 · Image retrieval: the same emoji by another hand
#
# Ten digits can be classified without any metric learning. Its point is classes that were *not there* in training, and for that it needs many classes to
# learn from. Here eight designers have drawn one list of emoji. A network learns from 827 of them what stays the same when another hand draws a
# thing, and is asked about 350 that it has never seen. Then an index searches a million.
#
# - **You will learn** to measure retrieval on unseen classes, against rivals that cost less; what makes drawings differ and how to say so by
#   augmentation; how many classes it takes; and to search exactly and approximately with FAISS, add to an index, shrink it and keep it.
# - **You need** chapters [4](04_training.ipynb) and [5](05_visualization.ipynb), and `pip install faiss-cpu`; no GPU.
# - **Running time** about 5 minutes on two cores.
# - Previous: [7 · The paper](07_the_paper.ipynb) · Next: [9 · Verification](09_verification.ipynb)

# %%
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
import torch.nn.functional as F
from matplotlib.ticker import PercentFormatter
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from torch import nn

from tripletlib import (
    BalancedBatchSampler,
    ContrastiveLoss,
    EmbeddingNet,
    ResidualNet,
    Score,
    SearchIndex,
    TripletLoss,
    embed,
    jitter,
    jitter_colours,
    load_emoji,
    load_fashion_mnist,
    load_or_fit,
    mean_average_precision_at_r,
    pairwise_distances,
    r_precision,
    recall_at_k,
)
from tripletlib.data import EMOJI_DESIGNERS
from tripletlib.plotting import (
    DIFFERENT,
    PALETTE,
    SAME,
    show_images,
    show_neighbours,
    use_theme,
)

use_theme()
plt.rcParams["figure.dpi"] = 80  # there are many pictures, and the page should stay small

# %% [markdown]
# ## Eight designers, one list
#
# The Unicode consortium says which emoji there are, not what they look like. Each studio draws its own. Here are eight sets, five to eight drawings of each of 1 177
# emoji, in 32 × 32 pixels on white. One emoji is one *class*.

# %%
train, test = load_emoji("train"), load_emoji("test")
for split, part in {"train": train, "test": test}.items():
    print(f"{split:5} {len(part.images):5,} drawings of {len(part.labels.unique())} emoji")


# %%
def drawings(split, *names):
    """All drawings of the emoji of these names."""
    return torch.cat([torch.nonzero(split.labels == split.names.index(name)) for name in names])[
        :, 0
    ]


EXAMPLES = ("alarm clock", "ice cream", "bear", "old key", "snowboarder")
heads = [name.replace("-emoji-", "\n") for name in EMOJI_DESIGNERS] + [""] * 32
figure = show_images(train.images[drawings(train, *EXAMPLES)], heads, columns=8, size=1.05)
for ax, name in zip(figure.axes[::8], EXAMPLES, strict=True):
    ax.set_ylabel(name)

# %% [markdown]
# A studio that draws a set of its own asks for each drawing: *which pictures in the other seven sets are this one?* A classifier has an answer only for
# the emoji it was trained on, and the consortium adds some every year. A *search* needs no list: show a drawing, the **query**, and get from a collection, the
# **gallery**, whatever lies nearest. All it takes is a distance that puts like beside like, also for classes that nobody trained it on.
#
# ## No class on both sides
#
# So the 350 test emoji must be truly new. It is not enough that their *names* are: the clock at one is nearly the clock at two, the man who juggles nearly the woman
# who does. `load_emoji` puts such near twins into one **family** and never divides a family. Of the families in alphabetical order, the fourth, fifth and
# sixth of every ten are for testing.

# %%
sizes = pd.Series(train.families).value_counts()
print(f"{len(sizes)} families of 1 to {sizes.max()} emoji; the largest:")
print(sizes.head(6).to_string())
families = [{part.families[label] for label in part.labels} for part in (train, test)]
assert families[0].isdisjoint(families[1])

# %% [markdown]
# ## Search by hand
#
# Take four drawings of each of three emoji, and let each search among the eleven others. Distances between raw pixels will do for now.

# %%
few = drawings(test, "mushroom", "anchor", "snail").view(3, -1)[:, [0, 2, 4, 6]].flatten()
points, kinds = test.images[few].flatten(1), test.labels[few]
distances = torch.cdist(points, points).fill_diagonal_(torch.inf)
order = distances.argsort(dim=1)[:, :-1]
hits = kinds[order] == kinds[:, None]
figure = show_neighbours(
    test.images[few[::4]], kinds[::4], test.images[few[order[::4]]], kinds[order[::4]],
    names=test.names,
)  # fmt: skip

# %% [markdown]
# Each row is a query in a black frame, then the others, nearest first: hits framed in blue, misses in orange. Three numbers sum up such rows.
# **Recall@k**: is there a hit among the first k? **R-precision**: of as many places as there are hits to find (here R = 3), how
# many are hits? **MAP@R** also asks how early they come: at each hit within the first R places, take the share of hits so far; add up and divide by R.

# %%
R = 3
share_so_far = hits.cumsum(dim=1) / torch.arange(1, 12)
by_hand = {
    "Recall@1": hits[:, :1].any(dim=1).float().mean(),
    "R-precision": hits[:, :R].float().mean(),
    "MAP@R": (share_so_far * hits)[:, :R].sum(dim=1).mean() / R,
}
by_library = [
    recall_at_k(points, kinds, k=1),
    r_precision(points, kinds),
    mean_average_precision_at_r(points, kinds),
]
for (name, value), again in zip(by_hand.items(), by_library, strict=True):
    print(f"{name:12} {value:.3f} by hand, {again:.3f} by the library")
    assert abs(value - again) < 1e-6

# %% [markdown]
# Recall@k is kind: one hit is enough. R-precision and MAP@R want all of them, before anything else. A studio that looks for *the* counterpart in another set reads
# Recall@1; one that wants all seven reads MAP@R.
#
# ## What costs nothing
#
# A number alone says little: what would cost less? **Pixels**, counted from white so that empty paper is zero. **PCA** (*principal component analysis*): the 64 directions in which the *training* drawings vary
# most. And the network that we are about to train, **untrained**, with random weights. All are scaled to length one, because then a pale drawing and a bold one of the same shape lie
# close; without that, pixels and PCA do worse.


# %% tags=["nbval-ignore-output"]
def from_white(images):
    """Pixels counted from white, in one row an image."""
    return (images.amax() - images).flatten(1)


torch.manual_seed(0)
untrained = ResidualNet()
pca = PCA(64, random_state=0).fit(train.images.flatten(1).numpy())
components = torch.from_numpy(pca.transform(test.images.flatten(1).numpy()))
spaces = {
    "pixels": F.normalize(from_white(test.images)),
    "PCA": F.normalize(components),
    "untrained": embed(untrained, test.images),
}
without = {"pixels": from_white(test.images), "PCA": components}
for name, points in without.items():
    both = [float(mean_average_precision_at_r(x, test.labels)) for x in (points, spaces[name])]
    print(f"{name:6} MAP@R {both[0]:.1%} as it is, {both[1]:.1%} at length one")
    assert both[0] < both[1]

# %% [markdown]
# An emoji has at most eight drawings, so the seven nearest others tell all three numbers, and one search serves every question that follows.


# %% tags=["nbval-ignore-output"]
def nearest_others(points):
    """The seven nearest others of each, nearest first."""
    distances = pairwise_distances(points, points).fill_diagonal_(torch.inf)
    return distances.topk(7, largest=False).indices


def hits_of(points, labels=test.labels):
    """Which of the seven nearest others of each are of its class."""
    return labels[nearest_others(points)] == labels[:, None]


def measure(hits, labels=test.labels):
    """Recall@1, R-precision and average precision at R of each query."""
    rank, R = torch.arange(1, 8), labels.bincount()[labels, None] - 1
    found = hits * (rank <= R)
    precision = found * found.cumsum(dim=1) / rank
    return pd.DataFrame(
        {
            "Recall@1": hits[:, 0].double(),
            "R-precision": (found.sum(dim=1) / R[:, 0]),
            "MAP@R": (precision.sum(dim=1) / R[:, 0]),
        }
    )


scores = {name: measure(hits_of(points)) for name, points in spaces.items()}
(100 * pd.DataFrame({name: table.mean() for name, table in scores.items()}).T).round(1)

# %% tags=["nbval-ignore-output"]
again = mean_average_precision_at_r(spaces["PCA"], test.labels)
print(f"MAP@R of PCA by the library: {again:.4f}")
assert abs(again - scores["PCA"]["MAP@R"].mean()) < 1e-4

# %% [markdown]
# Of 2 449 others some six are right, so that chance would hit once in four hundred. Pixels find a counterpart first in more than a third of the cases, because the same thing is often drawn in the
# same place. PCA is the best of the three, and the one to beat. The untrained network is no worse than pixels: convolutions with random weights keep shapes and colours.
#
# ## Which differences do not matter?
#
# A network learns from pairs which differences to ignore. Eight drawings show some: other reds, thinner lines, a head turned a little. It can be shown more of them: change each training image at random, in every way
# in which a designer might. `jitter` turns, moves and stretches, as in chapter 1. `jitter_colours` exchanges red, green and blue in half of the images, takes the colour from some, and makes
# each bolder or fainter; white stays white.


# %%
def redraw(images):
    return jitter_colours(jitter(images))


torch.manual_seed(1)
some = drawings(train, "bear", "ice cream", "old key")[[7, 15, 22]]
changed = torch.cat([redraw(train.images[[int(i)] * 8]) for i in some])
changed[::8] = train.images[some]
figure = show_images(changed, (["as drawn"] + ["changed"] * 7 + [""] * 16), columns=8)

# %% [markdown]
# In the first column are drawings of the training set, beside them seven changed versions of each. They are still the bear, the sundae and the key. What must *not* be changed is what tells
# classes apart: mirrored, a left arrow is a right one. (This *augmentation* was chosen on emoji held back from the training set, like network, loss, margin and batches below. The epochs are what five minutes allow.)
#
# ## Training on many classes
#
# With 827 classes a batch drawn at random would hold few pairs of one class. `BalancedBatchSampler` draws P classes and K drawings of each (*P × K batches*), here 32 × 6: every pair of anchor and positive has 186
# negatives. Most of them are easy, a snail beside a clock, and would teach nothing. So the loss takes **semi-hard** triplets (chapter 2): for each pair the *nearest* negative that is farther than the positive. The
# hardest negatives of all, nearer than the positive, let training collapse here, as in chapter 4.
#
# The network is a new one. `EmbeddingNet` ends in a linear layer that keeps what tells the *training* classes apart, and new classes may need what it drops. `ResidualNet` ends in its convolutions, 768 numbers of
# them, and some of its convolutions *add* to their input instead of replacing it (a *residual* connection), so that what came before is not lost.

# %%
seen = train.labels.unique(return_inverse=True)[1]  # 0 to 826
network, _ = load_or_fit(
    ResidualNet,
    train.images,
    seen,
    loss=TripletLoss(margin=0.2, mining="semihard"),
    epochs=12,
    batch_sampler=BalancedBatchSampler(seen, classes_per_batch=32, images_per_class=6),
    augment=redraw,
    seed=0,
    progress=False,
)
spaces["triplets"] = embed(network, test.images)
scores["triplets"] = measure(hits_of(spaces["triplets"]))
table = pd.DataFrame({name: 100 * of.mean() for name, of in scores.items()}).T

# %% tags=["nbval-ignore-output"]
table.round(1)

# %% [markdown]
# PCA is the best of what costs nothing. The network, which has never seen one of these emoji, finds a counterpart first for 66 % of the drawings instead of 40 %, and its MAP@R, 40 %, is 2.4 times PCA's. That is what two
# minutes of training on *other* classes bring.

# %%
ratio = table["MAP@R"]["triplets"] / table["MAP@R"].drop("triplets").max()
assert ratio > 2.1
assert table["Recall@1"]["triplets"] > table["Recall@1"]["PCA"] + 20

# %% [markdown]
# How sure is that? The drawings of an emoji are found or missed together: they are no 2 450 independent trials. So take the mean over each *class*, subtract for two methods on the same class
# (*paired*), and draw the 350 classes anew, with replacement, a thousand times (a *bootstrap* over classes).


# %%
def per_class(of, column="MAP@R"):
    return of[column].groupby(test.labels.numpy()).mean().to_numpy()


def plot_gains(scores, title, reference="triplets"):
    _, ax = plt.subplots(figsize=(8, 3.2))
    others = [name for name in scores if name != reference]
    for place, name in enumerate(others):
        gain = Score.of_values(per_class(scores[reference]) - per_class(scores[name]))
        color = SAME if gain.low > 0 else DIFFERENT if gain.high < 0 else "grey"
        ax.plot([gain.low, gain.high], [place, place], color=color, linewidth=3)
        ax.plot(gain, place, "o", color=color)
        ax.annotate(
            f"{100 * gain:+.1f}", (gain, place), (0, 6), textcoords="offset points", ha="center"
        )
    ax.axvline(0, color="black", linewidth=1)
    ax.set_yticks(range(len(others)), [f"triplets − {name}" for name in others])
    ax.set(
        title=title,
        xlabel="difference, 95 % over classes",
    )
    ax.xaxis.set_major_formatter(lambda x, _: f"{100 * x:.0f}")
    ax.margins(y=0.15)
    plt.show()


plot_gains(scores, "What triplets gain in MAP@R on the same 350 emoji")

# %% [markdown]
# ## One studio asks the others
#
# So far every drawing searched among all others. The studio's question is narrower: my drawing, *their* set. Take the drawings of one designer as queries, those of another as the gallery, and count how often
# the first answer is right, if they have that emoji at all.


# %%
def recall_between(points, asks, answers):
    mine, theirs = test.designers == asks, test.designers == answers
    mine &= torch.isin(test.labels, test.labels[theirs])
    return recall_at_k(points[mine], test.labels[mine], points[theirs], test.labels[theirs])


def recall_from(points, asks):
    mine = test.designers == asks
    return recall_at_k(points[mine], test.labels[mine], points[~mine], test.labels[~mine])


eight = range(len(EMOJI_DESIGNERS))
between = np.array(
    [[np.nan if a == b else recall_between(spaces["triplets"], a, b) for b in eight] for a in eight]
)
to_all = {name: [recall_from(spaces[name], asks) for asks in eight] for name in ("PCA", "triplets")}

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 4), width_ratios=[1.35, 1])
names = [name.removesuffix("-emoji-flat") for name in EMOJI_DESIGNERS]
sns.heatmap(
    between, annot=True, fmt=".0%", cmap="Blues", cbar=False, ax=left,
    xticklabels=names, yticklabels=names,
)  # fmt: skip
left.set(title="First answer right: who asks, who answers", xlabel="gallery", ylabel="queries")
left.tick_params(axis="x", rotation=40)
for name, color, side in (("PCA", PALETTE[7], "right"), ("triplets", SAME, "left")):
    right.plot(to_all[name], eight, "o", color=color)
    right.annotate(
        name, (to_all[name][0], 0), (0, 8), textcoords="offset points", ha=side, color=color
    )
right.set(title="One asks the seven others", xlabel="Recall@1", ylim=(7.5, -0.8))
right.set_yticks(eight, names)
right.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
plt.show()

# %% [markdown]
# A row asks, a column answers. Sets drawn in one spirit understand each other: "noto" and "fluent" find each other's emoji in more than 70 % of the cases, "noto" and its older design "noto-v1" in 66 %. "openmoji", black outlines with little
# colour, is the hardest to ask and to answer. On the right all seven sets are searched at once, and every designer gains, "openmoji" most: from 22 to 61 %.

# %% tags=["nbval-ignore-output"]
gains = np.array(to_all["triplets"]) - np.array(to_all["PCA"])
print(f"PCA {np.mean(to_all['PCA']):.1%}, triplets {np.mean(to_all['triplets']):.1%} on average")
assert gains.min() > 0.1

# %% [markdown]
# ## Found, and not found
#
# Numbers hide what they count. First drawings that PCA answers wrongly and triplets answer with nothing but hits, one of each group of emoji. The first row of each pair is PCA's answer, the second that of the triplets.


# %% tags=["nbval-ignore-output"]
nearest = {name: nearest_others(spaces[name]) for name in ("PCA", "triplets")}


def show_answers(queries, methods):
    """A row a query and method: the query, then its seven nearest."""
    rows = [(int(query), name) for query in queries for name in methods]
    shown = [[query, *nearest[name][query].tolist()] for query, name in rows]
    frames = [
        "black" if place == 0 else SAME if test.labels[drawn] == test.labels[row[0]] else DIFFERENT
        for row in shown
        for place, drawn in enumerate(row)
    ]
    figure = show_images(
        test.images[torch.tensor(shown).flatten()], columns=8, colors=frames, size=0.75
    )
    figure.set_figwidth(8)
    for ax, (query, name) in zip(figure.axes[::8], rows, strict=True):
        words = f"{test.names[test.labels[query]]}\n{name}"
        ax.set_ylabel(words, rotation=0, ha="right", va="center", fontsize=10)


at_r = {name: torch.tensor(scores[name]["MAP@R"].to_list()) for name in nearest}
better = torch.nonzero((at_r["triplets"] == 1) & (at_r["PCA"] == 0))[:, 0]
groups = [test.groups[test.labels[query]] for query in better]
firsts = better[[groups.index(group) for group in sorted(set(groups))]][:5]
print(
    f"{len(better)} of {len(test.labels):,} drawings: PCA finds none, triplets find all, and first"
)
show_answers(firsts, ("PCA", "triplets"))

# %% [markdown]
# PCA compares ink and colour place by place. To the line and the fish it answers with a magnifying glass and scooters, thin things in the same places; to the pale shirt with pale whirls and a diamond; to a couple in yellow with whatever is yellow; to
# blue exclamation marks with *letters* of the same blue. The network returns fishing poles with other fish, shirts of every green and blue, two heads under a heart, exclamation marks in red. Where its hits end, it returns what has the same
# build: a pin after the heart with a dot below.
#
# Now the other side: one drawing of each group for which triplets find *nothing*.

# %% tags=["nbval-ignore-output"]
worst = torch.nonzero(at_r["triplets"] == 0)[:, 0]
print(
    f"{len(worst)} of {len(test.labels):,} drawings: triplets find none; PCA {int((at_r['PCA'] == 0).sum()):,}"
)
groups = [test.groups[test.labels[query]] for query in worst]
show_answers(worst[[groups.index(group) for group in sorted(set(groups))]], ("triplets",))

# %% [markdown]
# Some of these could not be known: the red diamond of the card suit differs from the orange diamonds by its colour, which the training was told to ignore. Some are drawn unlike the others of their class: an orange rose among red ones is taken for round reddish faces, a yellow taco for yellow hands.
# "openmoji"'s skier, yellow with black outlines, finds *other things with black outlines* first: the hand of the designer outweighs the thing. And the number sign finds mostly the other keys of *its own* keyboard, grey on grey. What the network was never shown to ignore, it does not ignore.

# %% tags=["nbval-ignore-output"]
by_group = pd.DataFrame(
    {
        name: scores[name]["MAP@R"].groupby([test.groups[i] for i in test.labels]).mean()
        for name in ("PCA", "triplets")
    }
).sort_values("triplets")
figure, ax = plt.subplots(figsize=(8, 3.6))
ax.hlines(by_group.index, by_group["PCA"], by_group["triplets"], color="lightgrey", zorder=0)
for name, color in (("PCA", PALETTE[7]), ("triplets", SAME)):
    ax.plot(by_group[name], by_group.index, "o", color=color)
    top = by_group[name].iloc[-1], len(by_group) - 1
    ax.annotate(name, top, (0, 8), textcoords="offset points", ha="center", color=color)
ax.set(title="Every group gains; animals end lowest", xlabel="MAP@R")
ax.set_ylim(-0.5, len(by_group) - 0.3)
ax.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
plt.show()
print(
    f"gains of {by_group.diff(axis=1)['triplets'].min():.0%} to {by_group.diff(axis=1)['triplets'].max():.0%}"
)
assert by_group.diff(axis=1)["triplets"].min() > 0.08

# %% [markdown]
# ## How many classes does it take?
#
# Let networks learn from ever more classes, with all their drawings. Every network looks at the same number of images: with few classes it looks at each of them more often, changed each time. To afford so many trainings, images are halved
# to 16 × 16 pixels, which makes training twice as quick and everything harder, and each looks at 12 000 images only, a sixth of what the network above has seen.


# %%
small_train, small_test = (F.avg_pool2d(part.images, 2) for part in (train, test))


def train_small(classes, loss=None, looks=12_000):
    """Test embeddings of a network that looked so often at drawings, and how many drawings."""
    chosen = torch.randperm(827, generator=torch.Generator().manual_seed(0))[:classes]
    places = torch.nonzero(torch.isin(seen, chosen))[:, 0]
    P = min(32, classes)
    batches = BalancedBatchSampler(seen[places], P, 192 // P)
    net, _ = load_or_fit(
        ResidualNet,
        small_train[places],
        seen[places],
        loss=loss or TripletLoss(margin=0.2, mining="semihard"),
        epochs=round(looks / 192 / len(batches)),
        batch_sampler=batches,
        augment=redraw,
        progress=False,
    )
    return embed(net, small_test), len(places)


by_number = {classes: train_small(classes) for classes in (5, 20, 80, 320, 827)}
torch.manual_seed(0)
fresh = embed(ResidualNet(), small_test)
values = [mean_average_precision_at_r(points, test.labels) for points, _ in by_number.values()]
nothing = mean_average_precision_at_r(fresh, test.labels)

# %% tags=["nbval-ignore-output"]
for (classes, (_, drawn)), value in zip(by_number.items(), values, strict=True):
    print(f"{classes:3} classes, {drawn:5,} drawings: MAP@R {value:.1%}")
print(f"untrained, at this size: {nothing:.1%}")

# %%
figure, ax = plt.subplots(figsize=(8, 3.6))
ax.plot(list(by_number), values, "o-", color=SAME)
ax.axhline(nothing, color="grey", linestyle=":")
ax.annotate(
    "untrained", (827, nothing), (0, -14), textcoords="offset points", color="grey", ha="right"
)
ax.set(title="Few classes teach less than none", xscale="log", xlabel="training classes")
ax.set(ylabel="MAP@R on 350 new emoji")
ax.set_xticks(list(by_number), list(by_number))
ax.minorticks_off()
ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
plt.show()

# %% [markdown]
# Five classes are worse than none: the network learns what tells *those* five apart, forgets the rest, and falls from the untrained 16.6 to 12.6 %. Twenty bring it back to where it began. From eighty classes on it has learnt
# something that holds for others, too, and more classes bring more, if ever less each. All this at the same number of looks.

# %%
assert values[0] < min(values[1], nothing) - 0.01  # five classes: worse than none
assert abs(values[1] - nothing) < 0.02  # twenty: where it began
assert nothing < max(values[-2:])

# %% [markdown]
# ## Is it the loss?
#
# Two more rivals, at half size again, with the same network, classes and 12 000 looks. The **contrastive loss** of chapter 6, with a margin of its own. And a network that learns to **classify** the 827, by the cross-entropy of a
# linear layer on the embedding. `fit` trains a loss's own weights too, so the layer can live in the loss. Afterwards either its 827 outputs are the embedding or, *the layer before the last*, what it was put
# on.


# %%
class Classify(nn.Module):
    def __init__(self, classes, dimensions):
        super().__init__()
        self.head = nn.Linear(dimensions, classes)

    def forward(self, embeddings, labels):
        return F.cross_entropy(16 * self.head(embeddings), labels)


torch.manual_seed(0)
classify = Classify(827, 768)
small = {
    "triplets": by_number[827][0],
    "contrastive": train_small(827, ContrastiveLoss(margin=0.5))[0],
    "classifier, layer before": train_small(827, classify)[0],
}
with torch.no_grad():
    small["classifier, outputs"] = F.normalize(classify.head(small["classifier, layer before"]))
small["pixels"] = F.normalize(from_white(small_test))
small["untrained"] = fresh
scores_small = {name: measure(hits_of(points)) for name, points in small.items()}

# %% [markdown]
# (Embeddings have length one; the factor 16 lets the softmax become sure of itself all the same.)

# %% tags=["nbval-ignore-output"]
(100 * pd.DataFrame({name: of.mean() for name, of in scores_small.items()}).T).round(1)

# %%
assert (
    abs(per_class(scores_small["triplets"]).mean() - per_class(scores_small["contrastive"]).mean())
    < 0.02
)
plot_gains(scores_small, "Half size: what triplets gain in MAP@R on the same 350 emoji")

# %% [markdown]
# Triplets and contrastive loss cannot be told apart here: the interval of their difference holds zero. The classifier is far behind, even behind the network that was not trained: 12 000 looks, fourteen at each class, are too few to learn 827 outputs, while triplets learn
# from every pair. That says nothing about longer training; `tests/benchmarks/emoji.py` compares the losses at full size and length, over seeds and divisions.

# %% [markdown]
# ## When it goes wrong: five classes
#
# Do many images make up for few classes? Fashion-MNIST has 10 000 photographs of products, a thousand of each of ten kinds. Five kinds are nearly as many images to learn from as here. Train on five, search among the
# five others, as above; four such divisions, fixed beforehand: the first five kinds, the other way round, a random half, the other way round.

# %%
products, kinds = load_fashion_mnist("test")
every = torch.arange(10)
shuffled = torch.randperm(10, generator=torch.Generator().manual_seed(0))
halves = [every[:5], every[5:], shuffled[:5], shuffled[5:]]


def search_products(known):
    """MAP@R of four ways to search among the kinds that are not known."""
    mask = torch.isin(kinds, known)
    asked, labels = products[~mask], kinds[~mask]
    net, _ = load_or_fit(
        EmbeddingNet, products[mask], kinds[mask], epochs=1, batch_size=128, progress=False
    )
    pca = PCA(64, random_state=0).fit(products[mask].flatten(1).numpy())
    torch.manual_seed(0)
    ways = {
        "pixels": asked.flatten(1),
        "PCA": torch.from_numpy(pca.transform(asked.flatten(1).numpy())),
        "untrained": embed(EmbeddingNet(), asked),
        "triplets": embed(net, asked),
    }
    return {name: mean_average_precision_at_r(points, labels) for name, points in ways.items()}


failure = pd.DataFrame(
    [search_products(known) for known in halves],
    index=["0 to 4", "5 to 9", "a random half", "the other half"],
)

# %% tags=["nbval-ignore-output"]
failure.loc["mean"] = failure.mean()
(100 * failure).round(1)

# %% [markdown]
# On average the trained network does no better than pixels, PCA or random weights. Which five it learnt decides. Where they have relatives among the searched kinds, as in the random half, training helps; where clothes were learnt and shoes are
# asked for, or the other way round, it harms. A thousand images of each kind do not help, because the loss asks only for what tells five kinds apart. If you have five kinds and want a search among others, do not train: take pixels, PCA or a network trained on many
# classes elsewhere.

# %%
assert abs(failure.loc["mean", "triplets"] - failure.loc["mean", "pixels"]) < 0.05
assert failure.loc["0 to 4", "triplets"] < failure.loc["0 to 4", "untrained"]
assert failure.loc["a random half", "triplets"] > failure.loc["a random half", "untrained"]

# %% [markdown]
# ## An index
#
# So far each search compared the query with everything, by hand. `SearchIndex` does the same with *FAISS*, a library made for it, and is a thin cover around one of its
# indices: tensors in and out, checked arguments, Euclidean distances (FAISS itself returns their squares). First the exact kind. It must agree with what we did by hand.

# %% tags=["nbval-ignore-output"]
points = spaces["triplets"]
index = SearchIndex(points)
distances, found = index.search(points[firsts], k=8)
assert torch.equal(found[:, 0], firsts)
same = (found[:, 1:] == nearest["triplets"][firsts]).float().mean()
print(f"{index}: each finds itself first; {same:.0%} of the rest as by hand")
right = pairwise_distances(points[firsts], points).topk(8, largest=False).values
torch.testing.assert_close(distances, right, atol=2e-3, rtol=0)

# %% [markdown]
# (Where two are equally far, to the last bit, the order may differ; distances may not.)
#
# Next year's emoji come in. They need no training and no new index: `add` appends them, and their rows count on. Then the index goes into a file: `save` writes it behind its SHA-256, first
# under a temporary name, so that a write that is killed leaves the old file; `load` checks that it is whole.

# %%
old, new = (test.labels < 900), (test.labels >= 900)
rows = torch.cat([torch.nonzero(old)[:, 0], torch.nonzero(new)[:, 0]])
growing = SearchIndex(points[old])
print(f"before: {growing}")
growing.add(points[new])
with TemporaryDirectory() as folder:
    file = Path(folder) / "emoji.index"
    growing.save(file)
    loaded = SearchIndex.load(file)
    print(f"after:  {loaded}, {file.stat().st_size / len(loaded):,.0f} bytes each")
    sound = bytearray(file.read_bytes())
    sound[len(sound) // 2] ^= 1  # as a bad disk may
    file.write_bytes(sound)
    try:
        SearchIndex.load(file)
    except ValueError as error:
        print("one bit turned over:", str(error).replace(str(file), file.name))
assert torch.equal(rows[loaded.search(points[firsts], 8)[1]], found)

# %% [markdown]
# ## Looking into few cells: IVF
#
# How can a search be faster than looking at everything? Sort the points beforehand. *IVF* (inverted file) runs k-means and puts each point into the *cell* of
# its nearest centre. A query then looks only into the few cells whose centres are nearest to it. By hand, on a plane:

# %%
everything = torch.cat([embed(network, train.images), points])
plane = torch.from_numpy(PCA(2, random_state=0).fit_transform(everything.numpy()))
kmeans = KMeans(16, n_init=1, random_state=0).fit(plane)
centres, cell = torch.from_numpy(kmeans.cluster_centers_), torch.from_numpy(kmeans.labels_).long()


def search_cells(query, count, k=10):
    looked_into = (centres - query).norm(dim=1).topk(count, largest=False).indices
    inside = torch.nonzero(torch.isin(cell, looked_into))[:, 0]
    return inside[(plane[inside] - query).norm(dim=1).topk(k, largest=False).indices]


# %% [markdown]
# Ask for the ten nearest of 300 drawings. Of the ten true ones, how many are found with one cell, two, four, all sixteen?

# %% tags=["nbval-ignore-output"]
truth = pairwise_distances(plane[:300], plane).topk(10, largest=False).indices
found_share = {}
for count in (1, 2, 4, 16):
    found = torch.stack([search_cells(query, count) for query in plane[:300]])
    hits = (found[:, :, None] == truth[:, None]).any(dim=2)
    found_share[count] = float(hits.float().mean())
    print(f"{count:2} cells: {found_share[count]:.1%}")
assert found_share[1] < found_share[2] <= found_share[4] <= found_share[16]
assert found_share[16] > 0.999

# %%
most = torch.stack([cell[row].bincount(minlength=16).max() for row in truth])
query, ten = plane[most.argmin()], truth[most.argmin()]
inside = torch.isin(ten, search_cells(query, 1, k=30))
low, high = plane.amin(dim=0), plane.amax(dim=0)
x, y = (torch.linspace(float(low[i]), float(high[i]), 400) for i in (0, 1))
grid = torch.cartesian_prod(x, y).to(plane.dtype)
cells = torch.cdist(grid, centres.to(plane.dtype)).argmin(dim=1).view(400, 400).T
looked_into = (centres - query).norm(dim=1).argmin()

# %%
figure, ax = plt.subplots(figsize=(8, 4.4))
ax.contourf(x, y, cells == looked_into, levels=[0.5, 1.5], colors=[SAME], alpha=0.18)
ax.contour(x, y, cells, levels=np.arange(16) + 0.5, colors="grey", linewidths=0.8)
ax.scatter(*plane.T, s=4, color="grey", alpha=0.5, linewidths=0)
ax.scatter(*centres.T, s=70, marker="P", color="white", edgecolor="black", label="centres")
ax.scatter(*plane[ten[inside]].T, s=50, color=SAME, label="found in the nearest cell")
ax.scatter(*plane[ten[~inside]].T, s=50, color=DIFFERENT, marker="X", label="missed")
ax.scatter(*query, marker="*", s=180, color="black", label="query")
reach = (high - low) / 9
ax.set(
    xlim=(query[0] - reach[0], query[0] + reach[0]), ylim=(query[1] - reach[1], query[1] + reach[1])
)
ax.set(title="IVF: neighbours across the border of the cell are missed", xticks=[], yticks=[])
figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=4)
plt.show()

# %% [markdown]
# The blue cell is the one looked into. The share of the true neighbours that is found is the recall of the *index*: which part of the truly nearest it finds. It is not Recall@k of the embeddings, which asks whether the nearest are of the
# right class. An index can be perfect on useless embeddings.
#
# ## Walking a graph: HNSW
#
# The other idea is a graph (*hierarchical navigable small world*). Each point is linked to some of its neighbours. Every eighth point is also on a coarser layer, with longer links, and every eighth of those on a coarser one
# still. A search starts on the coarsest layer, walks to whichever neighbour is nearer to the query until none is, and goes on from there on the next finer one.

# %% tags=["nbval-ignore-output"]
draw = torch.Generator().manual_seed(2)
some = plane[torch.randperm(len(plane), generator=draw)[:256]]
layers = [torch.arange(len(some))[::step] for step in (64, 8, 1)]  # which points are on it


def links(layer, count=6):
    among = pairwise_distances(some[layer], some[layer]).topk(
        min(count, len(layer) - 1) + 1, largest=False
    )
    return {int(layer[i]): layer[row].tolist() for i, row in enumerate(among.indices)}


graphs = [links(layer) for layer in layers]


def walk(start, graph, query):
    path = [start]
    while True:
        step = min(graph[path[-1]], key=lambda point: float((some[point] - query).norm()))
        if step == path[-1]:
            return path
        path.append(step)


def descend(query):
    """The paths on all layers, from the farthest of the coarsest."""
    at, paths = int(layers[0][(some[layers[0]] - query).norm(dim=1).argmax()]), []
    for graph in graphs:
        paths.append(walk(at, graph, query))
        at = paths[-1][-1]
    return paths


others = plane[~torch.isin(plane[:, 0], some[:, 0])][:200]
walks = [descend(query) for query in others]
ends = torch.tensor([paths[-1][-1] for paths in walks])
right = ends == torch.cdist(others, some).argmin(dim=1)
looked_at = [sum(len(g[p]) for g, path in zip(graphs, w, strict=True) for p in path) for w in walks]
print(f"the walk ends at the nearest of {len(some)} points for {int(right.sum())} of 200 queries")
print(f"and looks at {np.mean(looked_at):.0f} of them on average")
longest = max(torch.nonzero(right)[:, 0].tolist(), key=lambda i: sum(map(len, walks[i])))
query, paths = others[longest], walks[longest]

# %%
figure, axes = plt.subplots(1, 3, figsize=(11, 3.6), sharex=True, sharey=True)
for ax, layer, path, name in zip(
    axes, layers, paths, ("coarsest", "middle", "all points"), strict=True
):
    for point, linked in links(layer).items():
        for other in linked:
            ax.plot(*some[[point, other]].T, color="lightgrey", linewidth=0.7, zorder=0)
    ax.scatter(*some[layer].T, s=10, color="grey")
    ax.plot(*some[path].T, "o-", color=SAME, markersize=6, linewidth=2.5)
    ax.scatter(*query, marker="*", s=180, color="black")
    ax.set(title=f"{name}: {len(layer)} points, {len(path) - 1} steps", xticks=[], yticks=[])
figure.suptitle(
    "HNSW: a few long steps, then short ones, towards the query (star)", fontweight="bold"
)
plt.show()

# %% [markdown]
# Here a walk from the far side ends at the star's nearest point; such a greedy walk may also stop a little before, where no neighbour is nearer. FAISS chooses links with more care, keeps a list of candidates instead of one, and backtracks; the longer the list, the more it finds.

# %% [markdown]
# ## Recall against time
#
# Eight thousand points are no challenge, and a million of 768 numbers would be three gigabytes. So keep 64 numbers of each, by PCA fit on the training drawings (exercise 1 asks
# what that costs). 500 test drawings are kept out to ask with; all others are the catalogue. To grow it, add **perturbed copies**: real points, each moved in a random direction about as far as its nearest neighbour is. That keeps the
# crowding of real embeddings, but it is not a real catalogue of that size.

# %%
shrink = PCA(64, random_state=0).fit(everything[: len(train.images)].numpy())
short = torch.from_numpy(shrink.transform(everything.numpy())).float()
queries, real = short[-500:], short[:-500]
step = float(pairwise_distances(queries, real).amin(dim=1).median())


def enlarge(points, count):
    points, draw = points[:count], torch.Generator().manual_seed(0)
    copied = points[torch.randint(len(points), (count - len(points),), generator=draw)]
    return torch.cat(
        [points, copied + step * F.normalize(torch.randn(copied.shape, generator=draw))]
    )


large = enlarge(real, 100_000)
print(f"{len(real):,} real points grown to {len(large):,}")

# %% [markdown]
# An exact search says what is right. Then try each approximate kind with more and more *effort*: the candidates that HNSW keeps in mind, or the cells that IVF
# looks into, of about 316.


# %%
def time_search(index, queries, **options):
    start = time.perf_counter()
    _, found = index.search(queries, 10, **options)
    return found, (time.perf_counter() - start) / len(queries) * 1e3


def recall(found, right):
    return float((found[:, :, None] == right[:, None]).any(dim=2).float().mean())


indices, build_seconds = {}, {}
for kind in ("exact", "hnsw", "ivf"):
    start = time.perf_counter()
    indices[kind] = SearchIndex(large, kind)
    build_seconds[kind] = time.perf_counter() - start
right, exact_time = time_search(indices["exact"], queries)

# %%
curves = {}
for kind, efforts in (("hnsw", (10, 16, 32, 64, 128, 256)), ("ivf", (1, 2, 4, 8, 16, 32, 316))):
    runs = [time_search(indices[kind], queries, effort=effort) for effort in efforts]
    curves[kind] = [
        (effort, ms, recall(found, right))
        for effort, (found, ms) in zip(efforts, runs, strict=True)
    ]

# %% tags=["nbval-ignore-output"]
for kind, curve in curves.items():
    print(kind, *(f"{effort}: {share:.1%}" for effort, _, share in curve), sep="  ")

# %%
shares = {kind: [share for _, _, share in curve] for kind, curve in curves.items()}
assert shares["ivf"][-1] > 0.999
assert shares["ivf"] == sorted(shares["ivf"])
assert shares["hnsw"][-1] > max(0.9, shares["hnsw"][0])

# %%
figure, ax = plt.subplots(figsize=(8, 4))
for (kind, curve), color in zip(curves.items(), (PALETTE[2], SAME), strict=True):
    efforts, times, recalls = zip(*curve, strict=True)
    ax.plot(times, recalls, "o-", color=color)
    for effort, ms, found_share in curve:
        offset = (4, -12) if kind == "hnsw" else (-8, 7)
        ax.annotate(effort, (ms, found_share), offset, textcoords="offset points", color=color)
    ax.annotate(
        {"hnsw": "HNSW", "ivf": "IVF"}[kind], (times[0], recalls[0]), (0, -26), color=color,
        textcoords="offset points", ha="center", fontweight="bold",
    )  # fmt: skip
ax.plot(exact_time, 1, "*", markersize=14, color="black")
ax.annotate("exact", (exact_time, 1), (0, 9), textcoords="offset points", ha="center")
ax.set(title="A little recall buys a lot of time", xscale="log", ylim=(None, 1.08))
ax.set(xlabel="milliseconds a query (500 queries at once)", ylabel="recall of the ten nearest")
ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
ax.margins(y=0.2)
plt.show()

# %% [markdown]
# To the left is fast, at the top is complete. The small numbers are the effort. IVF with one cell misses much of what lies across the border, as on the plane above;
# with 16 of 316 cells it misses little, at a small part of the time of the exact search (the star). With all cells it *is* an exact search, with a detour. HNSW starts higher: even a
# short list of candidates leads near the query.
#
# Times depend on the machine, on how many queries come at once and on what else it does. How many vectors a query was *compared* with does not, and FAISS
# counts it.

# %%
import faiss  # not at the top: on a Mac, SearchIndex must be the first to load it


def comparisons(index, queries, **options):
    counter = {"hnsw": faiss.cvar.hnsw_stats, "ivf": faiss.cvar.indexIVF_stats}.get(index.kind)
    if counter is None:
        return len(index)
    counter.reset()
    index.search(queries, 10, **options)
    return counter.ndis / len(queries)


# %% [markdown]
# ## Growing to a million
#
# The same with ten thousand, a hundred thousand and a million points. HNSW stops at a hundred thousand here: a
# million would take it minutes to build. The million is 256 MB; without that much to spare, leave the last size out.


# %%
def grow(kind, gallery):
    if len(gallery) == len(large):  # built above
        return indices[kind], build_seconds[kind]
    start = time.perf_counter()
    return SearchIndex(gallery, kind), time.perf_counter() - start


rows, ask = [], queries[:200]
for count in (10_000, 100_000, 1_000_000):
    gallery = enlarge(real, count)
    for kind in ("exact", "ivf") if count > 100_000 else ("exact", "hnsw", "ivf"):
        grown, seconds = grow(kind, gallery)
        found, ms = time_search(grown, ask)
        right = found if kind == "exact" else right
        rows.append((kind, count, seconds, ms, comparisons(grown, ask), recall(found, right)))
    del gallery
growth = pd.DataFrame(
    rows, columns=["kind", "points", "build s", "ms a query", "compared", "recall"]
)

# %% tags=["nbval-ignore-output"]
growth.round(3)

# %%
figure, axes = plt.subplots(1, 2, figsize=(10, 3.6))
palette = {"exact": "black", "hnsw": PALETTE[2], "ivf": SAME}
for ax, column in zip(axes, ("compared", "ms a query"), strict=True):
    for kind, color in palette.items():
        line = growth[growth["kind"] == kind]
        ax.plot(line["points"], line[column], "o-", color=color)
        ax.annotate(
            {"hnsw": "HNSW", "ivf": "IVF"}.get(kind, kind), (line["points"].iloc[-1], line[column].iloc[-1]),
            (6, -3), textcoords="offset points", color=color,
        )  # fmt: skip
    ax.set(xscale="log", yscale="log", xlabel="points in the index", xlim=(None, 4e6))
axes[0].set(title="Vectors compared a query")
axes[1].set(title="Milliseconds a query (200 at once)")
plt.show()

# %% [markdown]
# Exact search compares with everything: ten times the points, ten times the work. IVF has about sqrt(n) cells and looks into 16 of them, so its work grows like sqrt(n). HNSW's
# grows most slowly, about twofold for ten times the points. What they pay is the time to build, and some recall. For ten thousand points none of this matters: an exact search takes a fraction of a
# millisecond, has nothing to tune and misses nothing.

# %% tags=["nbval-ignore-output"]
compared = growth.pivot(index="points", columns="kind", values="compared")
tenfold = (compared.loc[100_000] / compared.loc[10_000]).round(1)
print(
    "ten times the points:",
    ", ".join(f"{kind} {times} times the work" for kind, times in tenfold.items()),
)
assert tenfold["exact"] == 10
assert tenfold["hnsw"] < tenfold["ivf"] < 5
assert growth[growth["kind"] != "exact"]["recall"].min() > 0.5

# %% [markdown]
# ## Smaller vectors: product quantisation
#
# IVF and HNSW save time, not memory: each point still takes 64 × 4 = 256 bytes, and HNSW's links come on top. *Product quantisation* (PQ) saves memory. Cut each vector into M
# pieces, run k-means with 256 centres on each piece, and keep of each piece only the number of its centre: one byte. A distance is then a sum of M numbers from a table. Rougher is *scalar* quantisation
# (SQ8), one byte a number. FAISS has both, by the names of its `index_factory`.


# %%
def shrunk(name):
    packed = faiss.index_factory(64, name)
    packed.train(large[:20_000].numpy())
    packed.add(large.numpy())
    found = torch.from_numpy(packed.search(queries.numpy(), 10)[1])
    return packed.code_size, recall(found, indices["exact"].search(queries, 10)[1])


packings = pd.DataFrame(
    {name: shrunk(name) for name in ("PQ4", "PQ8", "PQ16", "PQ32", "SQ8")},
    index=["bytes", "recall"],
).T

# %% tags=["nbval-ignore-output"]
packings.round(3)

# %%
figure, ax = plt.subplots(figsize=(8, 3.4))
ax.plot(packings["bytes"][:4], packings["recall"][:4], "o-", color=SAME)
ax.plot(packings["bytes"]["SQ8"], packings["recall"]["SQ8"], "s", color=PALETTE[1])
ax.plot(256, 1, "*", markersize=14, color="black")
for name, (size, share) in packings.iterrows():
    ax.annotate(name, (size, share), (0, 8), textcoords="offset points", ha="center")
ax.annotate("as they are", (256, 1), (0, 9), textcoords="offset points", ha="center")
ax.set(title="Fewer bytes find fewer of the ten nearest", xscale="log", ylim=(0, 1.15))
ax.set_xticks([4, 8, 16, 32, 64, 256], [4, 8, 16, 32, 64, 256])
ax.minorticks_off()
ax.set(xlabel="bytes a point", ylabel="recall of the ten nearest")
ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
plt.show()

# %% [markdown]
# With 16 bytes, a sixteenth of the memory, two of three of the ten nearest are found; with 32 bytes nine of ten; one byte a number (SQ8) loses next to nothing. What PQ finds is nearly right, so ask it for a hundred candidates
# and rank those by the vectors themselves (exercise 4).

# %%
assert packings["recall"]["PQ4"] < packings["recall"]["PQ16"] < packings["recall"]["SQ8"]

# %% [markdown]
# ## Exercises
#
# **1.** Do 768 numbers have to be? Keep the first 4, 8, 16, 32, 64 or 128 principal components of the embeddings, fit on the *training* drawings as above. Where does MAP@R begin to fall, and how much
# smaller would an index be?


# %% jupyter={"source_hidden": true} tags=["nbval-ignore-output"]
def shortened(count):
    fitted = PCA(count, random_state=0).fit(everything[: len(train.images)].numpy())
    return torch.from_numpy(fitted.transform(points.numpy())).float()


by_size = {
    n: float(measure(hits_of(shortened(n)))["MAP@R"].mean()) for n in (4, 8, 16, 32, 64, 128)
}
print(
    {n: f"{value:.1%}" for n, value in by_size.items()}, f"all 768: {at_r['triplets'].mean():.1%}"
)
# A twelfth of the numbers keeps nearly all: most of the 768 say again what others say.
assert by_size[64] > 0.9 * at_r["triplets"].mean() > 1.5 * by_size[4]

# %% [markdown]
# **2.** "noto-v1" is an older design of "noto", and "emojione-v1" of "emojione", by one studio. How much do such pairs flatter Recall@1? Take the sister designs out of the gallery of each drawing.

# %% jupyter={"source_hidden": true} tags=["nbval-ignore-output"]
studio = torch.tensor([0, 0, 1, 2, 3, 3, 4, 5])[test.designers]
distances = pairwise_distances(points, points).fill_diagonal_(torch.inf)
sisters = (studio[:, None] == studio) & (test.designers[:, None] != test.designers)
distances[sisters] = torch.inf
strict = test.labels[distances.argmin(dim=1)] == test.labels
free = scores["triplets"]["Recall@1"].mean()
print(f"Recall@1 {free:.1%} among all, {strict.float().mean():.1%} without sister designs")
# Some first answers are sister designs, but nearly as many drawings are found by another hand.
assert 0.8 * free < strict.float().mean() < free

# %% [markdown]
# **3.** Has the network learnt its training drawings by heart? Measure it on them, as somebody would by mistake who trains on all 1 177 emoji "to use all the data". Would the result give the mistake away?

# %% jupyter={"source_hidden": true} tags=["nbval-ignore-output"]
leaked = measure(hits_of(embed(network, train.images), train.labels), train.labels)["MAP@R"].mean()
print(f"MAP@R {leaked:.1%} on 827 training emoji, {at_r['triplets'].mean():.1%} on 350 new ones")
# It is not by heart: among more than twice as many emoji the result is only a little better, so
# that nothing in it gives a leak away. Only a look at how it was made does.
assert at_r["triplets"].mean() < leaked < at_r["triplets"].mean() + 0.2

# %% [markdown]
# **4.** Vectors shortened to bytes find candidates, the vectors themselves put them in order. Let "PQ16" fetch 100 candidates of each query, and rank them by their true distances. What is the recall of the ten nearest now?

# %% jupyter={"source_hidden": true} tags=["nbval-ignore-output"]
packed = faiss.index_factory(64, "PQ16")
packed.train(large[:20_000].numpy())
packed.add(large.numpy())
candidates = torch.from_numpy(packed.search(queries.numpy(), 100)[1])
true = (large[candidates] - queries[:, None]).norm(dim=2)
again = candidates.gather(1, true.topk(10, largest=False).indices)
right = indices["exact"].search(queries, 10)[1]
print(
    f"{packings['recall']['PQ16']:.1%} before, {recall(again, right):.1%} after ranking 100 candidates anew"
)
# The ten nearest are nearly always among the hundred; only their order was wrong.
assert recall(again, right) > packings["recall"]["PQ16"] + 0.1

# %% [markdown]
# ## Check yourself
#
# 1. Why must the man who juggles not be a training class when the woman who juggles is a test class?
#
#    <details><summary>Answer</summary>They are near twins: whoever has learnt the one knows the other, and the measurement would not be about new classes.</details>
# 2. Recall@1 is high and MAP@R low. What does a search return?
#
#    <details><summary>Answer</summary>A hit first, and then much that is wrong: the nearest is found, the others of its class lie far.</details>
# 3. Why is a mirrored drawing no good augmentation here?
#
#    <details><summary>Answer</summary>Mirrored, a left arrow is a right one: the change must not turn one class into another.</details>
# 4. The recall of an index is 100 %. Are its answers right?
#
#    <details><summary>Answer</summary>They are the truly nearest. Whether those are of the right class depends on the embeddings.</details>
# 5. A thousand photographs each of five kinds, or seven drawings each of 700: which teaches more about a new kind?
#
#    <details><summary>Answer</summary>The 700: what tells five kinds apart need not tell a sixth, and networks of five classes, of drawings as of photographs, did no better than an untrained one.</details>
#
# ## Summary
#
# - Retrieval is measured on classes that training has not seen, near twins kept together, against rivals that cost less.
# - Many classes with few images each teach what distinguishes classes in general; five classes, however many images, do not.
# - Augmentation says which differences do not matter; the loss, all triplets of 64 × 6 batches, does the rest.
# - An index trades a little recall for a lot of time (IVF, HNSW) or memory (PQ); measure both on your own vectors. Exact is enough for thousands.
#
# **Next** [9 · Verification](09_verification.ipynb) asks of two drawings whether they are the same, and how sure one may be.
#
# ## References
#
# - H. Oh Song, Y. Xiang, S. Jegelka, S. Savarese, "Deep metric learning via lifted structured feature embedding", CVPR 2016 (unseen classes, Recall@k).
# - K. Musgrave, S. Belongie, S.-N. Lim, "A metric learning reality check", ECCV 2020 (MAP@R, and fair comparison).
# - A. Zhai, H.-Y. Wu, "Classification is a strong baseline for deep metric learning", BMVC 2019.
# - K. He, X. Zhang, S. Ren, J. Sun, "Deep residual learning for image recognition", CVPR 2016.
# - A. Hermans, L. Beyer, B. Leibe, "In defense of the triplet loss for person re-identification", 2017 (batches of P × K).
# - T. Chen, S. Kornblith, M. Norouzi, G. Hinton, "A simple framework for contrastive learning of visual representations", ICML 2020 (augmentation; the layer before).
# - P. Khosla et al., "Supervised contrastive learning", NeurIPS 2020.
# - H. Xiao, K. Rasul, R. Vollgraf, "Fashion-MNIST", arXiv 1708.07747, 2017.
# - M. Douze et al., "The Faiss library", arXiv 2401.08281, 2024.
# - H. Jégou, M. Douze, C. Schmid, "Product quantization for nearest neighbor search", 2011 (IVF, PQ).
# - Y. Malkov, D. Yashunin, "Efficient and robust approximate nearest neighbor search using hierarchical navigable small world graphs", 2016.
# - The drawings: EmojiTwo contributors after Emoji One 2 (CC BY 4.0), Emoji One (CC BY-SA 4.0), Microsoft (MIT), Mozilla (Apache 2.0), Google (Apache 2.0), OpenMoji (CC BY-SA 4.0), Twitter and contributors (CC BY 4.0).
