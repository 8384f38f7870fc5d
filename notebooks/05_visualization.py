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
# # 5 · Visualization: what the network has learnt
#
# The network of chapter 4 sends each digit to 64 numbers, and nobody can see 64 dimensions. This chapter shows them in other
# ways: as distances, maps, neighbours, errors and interpolations. Where a picture is to show what was *learnt*, it stands
# beside that of a rival that has learnt nothing: pixels, or an untrained network.
#
# - **You will learn** to draw an embedding in two dimensions in three ways and what each of them keeps, to find the images that
#   cause trouble, to ask which pixels matter, and when not to trust a map.
# - **You need** chapters [3](03_network.ipynb) and [4](04_training.ipynb); no GPU.
# - **Running time** under two minutes on two cores, and one and a half more if chapter 4 has not left its network in the cache.
# - Previous: [4 · Training](04_training.ipynb) · Next: [6 · Three ways](06_three_ways.ipynb)

# %%
from copy import deepcopy
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
import torch
import torch.nn.functional as F
from matplotlib.offsetbox import AnnotationBbox, OffsetImage
from scipy.stats import binomtest
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from sklearn.metrics import confusion_matrix, roc_auc_score
from torch import nn

from tripletlib import (
    EmbeddingNet,
    KNNClassifier,
    TripletLoss,
    embed,
    explore,
    fit,
    load_fashion_mnist,
    load_mnist,
    load_or_fit,
    mine_triplets,
    pairwise_distances,
    r_precision,
    recall_at_k,
)
from tripletlib.plotting import (
    DIFFERENT,
    PALETTE,
    SAME,
    plot_distances,
    scatter_classes,
    show_images,
    show_neighbours,
    use_theme,
)

use_theme()
plt.rcParams["figure.dpi"] = 64  # nineteen figures: smaller files
images, labels = load_mnist("train")
test_images, test_labels = load_mnist("test")

# %% [markdown]
# ## The network of chapter 4, and one that has learnt nothing
#
# The call is the one of chapter 4. If that chapter has run on this machine, the network comes from the cache at once; otherwise
# it is trained now, in about one and a half minutes. The *gallery* is the embeddings of all 60 000 training images, the *queries* those of
# the 10 000 test images, which the network has never seen.

# %% tags=["nbval-ignore-output"]
network, history = load_or_fit(EmbeddingNet, images, labels, seed=0)

# %% tags=["nbval-ignore-output"]
gallery, queries = embed(network, images), embed(network, test_images)
answers = KNNClassifier(gallery, labels).predict(queries)
seen, seen_labels = queries[:2000], test_labels[:2000]
print(tuple(gallery.shape), tuple(queries.shape))
print(f"kNN is right for {int((answers == test_labels).sum())} of 10 000 test images")
assert (answers == test_labels).float().mean() > 0.99

# %% [markdown]
# A picture of the trained network says little without that of an *untrained* one. Fresh from its constructor, that is no fair
# rival: its batch normalisation layers ([chapter 3](03_network.ipynb)) hold running means of 0 and variances of 1, which fit no
# data. So let a copy look at 1 000 images in training mode, without gradients. No weight moves; only the averages fill
# (**recalibrating** the batch statistics).


# %%
def refreshed(net, some_images):
    """Copy a network and take its batch statistics anew, with the weights as they are."""
    copy = deepcopy(net).train()
    for layer in copy.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.reset_running_stats()
            layer.momentum = None  # a plain mean over all batches that follow
    with torch.no_grad():
        for batch in some_images.split(500):
            copy(batch)
    return copy.eval()


def spread_of(points):
    return float((points - points.mean(dim=0)).norm(dim=1).mean())


# %% tags=["nbval-ignore-output"]
torch.manual_seed(0)
as_built = EmbeddingNet()
untrained = refreshed(as_built, images[:1000])
blank_gallery = embed(untrained, images[:5000])
spreads = [spread_of(embed(net, test_images[:500])) for net in (as_built, untrained)]
print(f"mean distance from the mean: as built {spreads[0]:.2f}, refreshed {spreads[1]:.2f}")
assert spreads[1] > 1.5 * spreads[0]
for weight, copied in zip(as_built.parameters(), untrained.parameters(), strict=True):
    assert torch.equal(weight, copied)

# %% [markdown]
# The embeddings now lie more than twice as far from their mean, 0.79 instead of 0.34, though nothing was learnt. Whoever
# compares a trained network with one *as built* takes this for learning. From here on, *untrained* means refreshed. In *order* it
# is the weaker rival, as chapter 3 found: on 2 000 test images the network as built has 23 % of the comparisons below in the wrong
# order and an R-precision of 41 %, the refreshed one 31 and 30 %. Training, too, starts from the refreshed one; neither comes near
# the trained.
#
# Nothing is chosen or tuned in this chapter, so we may look at the test images as long as we like. Whoever goes on to improve
# the network should look at other ones.

# %% [markdown]
# ## All pairs, before and after
#
# Chapter [1](01_data.ipynb) measured all pairs among 2 000 images, and the heaps of same and different pairs overlapped widely.
# Here is that histogram for test images: by pixels, by the untrained network, and by the trained one.

# %% alt="Three histograms of distances over all pairs of 2 000 test images. By pixels and by the untrained network, pairs of one digit and of two digits overlap; by the trained network there are two heaps, at 0.2 and at 1.2, that hardly touch."
spaces = {
    "Pixels: overlap": test_images[:2000].flatten(1),
    "Untrained network: overlap": embed(untrained, test_images[:2000]),
    "Trained network: hardly any overlap": seen,
}
figure, axes = plt.subplots(1, 3, figsize=(12, 3.4))
for ax, (title, points) in zip(axes, spaces.items(), strict=True):
    plot_distances(points, seen_labels, ax=ax).set(title=title, yticks=[])
    ax.get_legend().remove()
    sides = ("left", "left") if title.startswith("Trained") else ("right", "left")
    ax.margins(x=0.2)
    for heap, word, side in zip(ax.containers, ("same digit", "two digits"), sides, strict=True):
        top = max(heap.patches, key=lambda bar: bar.get_height())
        shift = (22 if side == "left" else -22, 0)
        where = (top.get_x(), 0.85 * top.get_height())
        ax.annotate(word, where, shift, textcoords="offset points", ha=side)
plt.show()

# %% [markdown]
# Chapter 1 drew a pair of one digit and a pair of two digits, and asked how often the first is the closer. Over all such draws
# that is the **AUC** (area under the ROC curve, chapter [9](09_verification.ipynb)). One minus the AUC is the share in the
# wrong order.


# %% tags=["nbval-ignore-output"]
def wrong_order(points, point_labels):
    one, other = torch.triu_indices(len(points), len(points), offset=1)
    alike = point_labels[one] == point_labels[other]
    return 1 - roc_auc_score(alike, -pairwise_distances(points)[one, other])


wrong = [wrong_order(points, seen_labels) for points in spaces.values()]
for title, share in zip(spaces, wrong, strict=True):
    print(f"{title.split(':')[0]:<18}{share:8.3%} in the wrong order")
assert min(wrong[:2]) > 0.2
assert wrong[2] < 0.01 * min(wrong[:2])

# %% [markdown]
# By pixels 28 % of the comparisons come out wrong, by the untrained network 31 %, by the trained one 0.01 %. So it is training
# that parts the heaps: neither the architecture nor the batch statistics do.

# %% [markdown]
# ## A shadow: PCA
#
# Histograms tell how far, not where. To see where, points in 64 dimensions must be laid flat. The plainest way is a shadow (an
# orthogonal **projection**): turn the cloud until it is as wide as can be, then drop all but two coordinates. These directions
# are the **principal components**, and the singular value decomposition finds them: principal component analysis, PCA. On
# twelve embeddings by hand, and then by scikit-learn:

# %%
twelve = queries[:12]
centred = twelve - twelve.mean(dim=0)
directions = torch.linalg.svd(centred, full_matrices=False).Vh[:2]
by_hand = centred @ directions.T
by_library = torch.from_numpy(PCA(2).fit_transform(twelve.numpy()))
torch.testing.assert_close(by_hand.abs(), by_library.abs(), atol=1e-4, rtol=0)
print("12 × 64 numbers become", " × ".join(map(str, by_hand.shape)), "by hand and by the library")

# %% [markdown]
# They agree up to sign, since a direction and its opposite are equally wide. Now the projection of 1 000 test digits. The
# components come from the *training* images, as all that is fitted should. On the right, how much of the variance the first so
# many directions hold. Two helpers first: labels that hide each other are moved apart, and images can be drawn as points.


# %%
def part_labels(ax, gap=0.08):
    """Push labels that hide each other apart; a thin line leads back to the class."""
    ax.autoscale_view()
    homes = np.array([text.xy for text in ax.texts])
    starts = ax.transLimits.transform(homes)
    places = starts + 1e-4 * np.arange(len(starts))[:, None] * [1, -1]
    for _ in range(300):
        apart = places[:, None] - places
        far = np.linalg.norm(apart, axis=2, keepdims=True) + np.eye(len(places))[..., None]
        places = places + 0.2 * (apart / far * (gap - far).clip(0)).sum(axis=1)
    ends = ax.transLimits.inverted().transform(places)
    for text, home, end, moved in zip(ax.texts, homes, ends, abs(places - starts), strict=True):
        text.set(position=end, fontsize=11)
        if moved.max() > gap / 4:
            ax.plot(
                *np.stack([home, end]).T, color="black", linewidth=0.7, scalex=False, scaley=False
            )


def draw_thumbnails(ax, points, pictures, picture_labels, gap=0.035):
    """Draw the images that find room at their places, each in its digit's colour."""
    ax.autoscale_view()
    places, taken = ax.transLimits.transform(points), np.empty((0, 2))
    ink = ((pictures - pictures.min()) / (pictures.max() - pictures.min()))[:, 0].numpy()
    for at, place, shape, label in zip(points, places, ink, picture_labels.tolist(), strict=True):
        if (abs(taken - place).max(axis=1) > gap).all():
            taken = np.vstack([taken, place])
            colour = np.broadcast_to(PALETTE[label], (28, 28, 3))
            picture = OffsetImage(np.dstack([colour, shape]), zoom=0.45)
            ax.add_artist(AnnotationBbox(picture, at, frameon=False, pad=0))


# %% alt="Left: 1 000 test digits on the first two principal components; each digit has a place, several overlap in the middle. Right: share of the variance held by the first so many components; the trained network reaches 99 percent at nine and stays flat; pixels and, lowest, the untrained network rise slowly." tags=["nbval-ignore-output"]
pca = PCA().fit(gallery.numpy())
flat_cloud = pca.transform(seen.numpy())[:, :2]
rivals = {
    "trained": (gallery[:2000], SAME, "o-"),
    "untrained": (blank_gallery[:2000], PALETTE[7], "s--"),
    "pixels": (images[:2000].flatten(1), PALETTE[1], "^:"),
}
held = {
    name: PCA(20).fit(x.numpy()).explained_variance_ratio_ for name, (x, _, _) in rivals.items()
}
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), width_ratios=[1.15, 1])
scatter_classes(flat_cloud[:1000], seen_labels[:1000], ax=left)
part_labels(left)
left.set(title="Two directions: some digits overlap")
left.set(xlabel="first component", ylabel="second component")
for name, (_, color, style) in rivals.items():
    shares = held[name].cumsum()
    right.plot(range(1, 21), shares, style, color=color, markersize=4)
    offset = (12, -16) if name != "pixels" else (-12, 14)
    right.annotate(name, (13, shares[12]), offset, textcoords="offset points", color=color)
    print(f"{name}: 2 components hold {shares[1]:.0%} of the variance, 9 hold {shares[8]:.0%}")
right.set(title="Nine directions hold the trained cloud", xlabel="components kept")
right.set(ylabel="share of the variance", ylim=(0, 1.04), xticks=[1, 5, 9, 15, 20])
plt.show()
assert held["trained"][:9].sum() > 0.95 > held["untrained"][:9].sum() + 0.05
assert held["trained"][:2].sum() < 0.6

# %% [markdown]
# Why nine? The loss pulls each class towards one point, and ten points span nine directions, as three span a plane. It is
# training that does it: nine directions hold 99 % of the variance here, but 48 % by pixels and 34 % by the untrained network.
#
# This map keeps two directions of nine, and 39 % of the variance. So digits that overlap here may well be far apart. The
# reverse can't happen: dropping coordinates shortens distances and lengthens none, so what is far apart in a projection *is*
# far apart.

# %%
before, after = (
    pairwise_distances(seen[:500]),
    pairwise_distances(torch.from_numpy(flat_cloud[:500])),
)
print(f"pairs that the projection lengthens: {int((after > before + 1e-4).sum())}")
assert (after <= before + 1e-4).all()

# %% [markdown]
# ## Keeping the neighbours: t-SNE
#
# **t-SNE** (t-distributed stochastic neighbour embedding) gives up on distances and keeps *neighbours*: it moves points about
# on the plane until each has, as far as possible, the same neighbours as in the full space. Left, 700 test images by their
# pixels; right, the same images by their embeddings. Where there is room, the image itself is drawn.

# %% alt="Two t-SNE maps of 700 test digits drawn as small coloured digit images. By pixels, fours and nines are mixed, and the places of other digits touch; by embedding there are ten separate islands, one a digit, with hardly a digit on a wrong island." tags=["nbval-ignore-output"]
flat = {
    "By pixels: fours and nines are mixed": test_images[:700].flatten(1).numpy(),
    "By embedding: an island for each digit": seen[:700].numpy(),
}
figure, axes = plt.subplots(1, 2, figsize=(12, 6))
agree = []
for ax, (title, points) in zip(axes, flat.items(), strict=True):
    flat_map = TSNE(2, random_state=0).fit_transform(points)
    scatter_classes(flat_map, seen_labels[:700], ax=ax).set(title=title, xticks=[], yticks=[])
    draw_thumbnails(ax, flat_map, test_images[:700], seen_labels[:700], gap=0.028)
    part_labels(ax)
    for label in ax.texts:
        label.set_zorder(9)  # before the images
    agree.append(recall_at_k(torch.from_numpy(flat_map), seen_labels[:700], k=1))
    print(f"{title.split(':')[0]}: {float(agree[-1]):.1%} lie beside one of their own digit")
plt.show()
assert agree[1] > 0.97
assert agree[1] > agree[0] + 0.02

# %% [markdown]
# By embedding, 99 % of the points have one of their own digit beside them, by pixels 84 %. Three warnings belong to every such
# map:
#
# - **Sizes and gaps prove nothing.** Each point gets the room that it needs, and far is only *not near*: hence no ticks.
# - **Perplexity**, roughly how many neighbours count, is the drawer's choice (30 by default), and another one gives another
#   picture.
# - **Another seed, another picture.** scikit-learn starts from PCA, which hides this. From a random start, each seed puts the
#   islands elsewhere.
#
# **UMAP**, t-SNE's faster relative, needs the same warnings. Here are four more maps, of the first 300 of these embeddings.

# %% alt="Four t-SNE maps of the same 300 embeddings: perplexity 5, perplexity 50, and two random starts. Each shows ten islands, but their sizes and their places relative to each other differ from map to map." tags=["nbval-ignore-output"]
settings = {
    "perplexity 5": {"perplexity": 5},
    "perplexity 50": {"perplexity": 50},
    "random start, seed 1": {"init": "random", "random_state": 1},
    "random start, seed 2": {"init": "random", "random_state": 2},
}
figure, axes = plt.subplots(1, 4, figsize=(12, 3.3))
next_to = []
for ax, (title, setting) in zip(axes, settings.items(), strict=True):
    tsne_map = TSNE(2, **({"random_state": 0} | setting)).fit_transform(seen[:300].numpy())
    scatter_classes(tsne_map, seen_labels[:300], ax=ax, size=7)
    for digit, text in enumerate(ax.texts):  # above its island, to leave that in sight
        highest = tsne_map[seen_labels[:300] == digit, 1].max()
        text.set(y=highest, va="bottom", fontsize=10, fontweight="normal")
    ax.margins(y=0.12)
    ax.set(title=title, xticks=[], yticks=[])
    islands = [np.median(tsne_map[seen_labels[:300] == digit], axis=0) for digit in range(10)]
    gaps = pairwise_distances(torch.tensor(np.array(islands))).fill_diagonal_(torch.inf)
    next_to.append(gaps.argmin(dim=1))
figure.suptitle("One space, four maps: the islands change size and place", weight="bold")
plt.show()
kept = int((next_to[2] == next_to[3]).sum())
print(f"between the two seeds, {kept} of 10 islands keep their nearest island")
assert kept < 10

# %% [markdown]
# Between the two random starts six of the ten islands change their nearest island. So what is a story about one map, the next
# map may deny.

# %% [markdown]
# ## A map to move about in
#
# A picture shows *where* the islands are, not which image a dot is, nor what it is near to in the full space. The same map can be
# asked: point at a dot to see its image and its eight nearest *by embedding*, in all 64 dimensions, with lines to them. Drag and
# zoom (near enough, dots become images), click to keep a point, pick digits from the list below the map.
#
# **What to look for:** short lines inside an island are neighbours that the map has kept, a long one is a pair that it has torn
# apart, and a dashed frame is a neighbour of another digit. If you see a still picture only, run the cell.

# %% alt="The t-SNE map of 700 test digits by embedding as a map to move about in: ten islands, one a digit, each in its colour with its number; beside it the image that is pointed at and its eight nearest by embedding, below it a list of the digits." tags=["nbval-ignore-output"]
explore(flat_map, test_images[:700], test_labels[:700], embeddings=seen[:700])

# %% [markdown]
# Single lines prove nothing, so count them all: how many of the eight nearest by embedding are among the 8 or the 30 nearest on
# the map? The rival is the projection on two components. And do long lines, of over five times the median, tell something about an image?


# %% tags=["nbval-ignore-output"]
def nearest_of(points, k):
    return pairwise_distances(points).fill_diagonal_(torch.inf).topk(k, largest=False).indices


true_near, digits, share_kept = nearest_of(seen[:700], 8), seen_labels[:700], {}
for name, places in {"t-SNE": flat_map, "projection": flat_cloud[:700]}.items():
    for k in (8, 30):
        drawn_near = nearest_of(torch.from_numpy(places), k)
        found = (true_near[:, :, None] == drawn_near[:, None]).any(dim=2)
        share_kept[name, k] = float(found.float().mean())
        print(
            f"{name}: {share_kept[name, k]:.0%} of the lines end among the {k} nearest on the map"
        )
lengths = pairwise_distances(torch.from_numpy(flat_map)).gather(1, true_near)
torn = (lengths > 5 * lengths.median()).any(dim=1)
doubtful = (digits[true_near] != digits[:, None]).any(dim=1)
print(f"a long line: {int((torn & doubtful).sum())} of the {int(doubtful.sum())} images", end=" ")
print("that have another digit among their eight nearest,", end=" ")
print(f"{int((torn & ~doubtful).sum())} of the {int((~doubtful).sum())} others")
assert share_kept["t-SNE", 30] > 0.85
assert share_kept["t-SNE", 8] > 1.3 * share_kept["projection", 8]
assert torn[doubtful].float().mean() > 5 * torn[~doubtful].float().mean()

# %% [markdown]
# t-SNE keeps the neighbourhood rather than the neighbours: 95 % of the lines end among the 30 nearest on the map (the perplexity is 30), but 60 % among the
# 8 nearest, so the nearest dot is often not the nearest image. The projection keeps 83 and 34 %. A long line is a warning: 9 of the 12 images with another digit
# among their neighbours have one, and 24 of the 688 others. Look for them where islands fray, and see whether you could tell
# the digit yourself.

# %% [markdown]
# ## When it goes wrong: reading too much into t-SNE
#
# Islands invite stories: this one is large, so the digit is varied; those two are close, so they are alike. Test it where the
# truth is known. Three clusters in ten dimensions: one ten times as wide as the two others, which are close to each other and
# far from it.

# %% alt="Left, the truth: one wide cluster far from two tiny ones that are close to each other. Right, t-SNE maps at perplexity 5 and 30: three clusters of similar size, about equally far from each other." tags=["nbval-ignore-output"]
draw = torch.Generator().manual_seed(0)
widths = torch.tensor([2.0, 0.2, 0.2])
centres = torch.zeros(3, 10)
centres[:, 0] = torch.tensor([0.0, 25.0, 30.0])
which = torch.arange(3).repeat_interleave(80)
true_points = centres[which] + widths[which, None] * torch.randn(240, 10, generator=draw)
maps = {"the truth (two of ten axes)": true_points[:, :2]}
for perplexity in (5, 30):
    tsne_map = TSNE(2, perplexity=perplexity, random_state=0).fit_transform(true_points.numpy())
    maps[f"t-SNE, perplexity {perplexity}"] = torch.from_numpy(tsne_map)
figure, axes = plt.subplots(1, 3, figsize=(10, 3.2))
for ax, (title, points) in zip(axes, maps.items(), strict=True):
    for cluster, marker in enumerate("o^s"):
        ax.scatter(*points[which == cluster].T, s=9, color=PALETTE[cluster], marker=marker)
    ax.set(title=title, xticks=[], yticks=[], aspect="equal", adjustable="datalim")
figure.suptitle("t-SNE draws a wide cluster and two narrow ones alike", weight="bold")
plt.show()


# %% tags=["nbval-ignore-output"]
def width(points, cluster):
    return float(points[which == cluster].std(dim=0).norm())


def gap_ratio(points):
    first, second, third = (points[which == cluster].mean(dim=0) for cluster in range(3))
    return float((first - second).norm() / (second - third).norm())


ratios = {title: width(points, 0) / width(points, 1) for title, points in maps.items()}
for title, points in maps.items():
    print(f"{title:<28} widths {ratios[title]:4.1f} : 1, gaps {gap_ratio(points):.1f} : 1")
true_ratio, *drawn_ratios = ratios.values()
assert true_ratio > 7
assert max(drawn_ratios) < 3

# %% [markdown]
# In the two axes drawn the wide cluster is nine times as wide as a narrow one, and on both maps just as wide; the gap that is five times as long as
# the other comes out no longer. t-SNE gives each point as much room as it needs to tell its neighbours apart.
#
# It gets worse. Here are 300 points that are pure noise: one cloud, no clusters at all. A low perplexity draws clumps
# regardless.

# %% alt="Two t-SNE maps of the same 300 points of pure noise. At perplexity 3 the points form dozens of small clumps, at perplexity 30 they fill one even disc." tags=["nbval-ignore-output"]
noise = torch.randn(300, 50, generator=draw).numpy()
figure, axes = plt.subplots(1, 2, figsize=(8, 3.6))
for ax, perplexity in zip(axes, (3, 30), strict=True):
    noise_map = TSNE(2, perplexity=perplexity, random_state=0).fit_transform(noise)
    ax.scatter(*noise_map.T, s=6, color="grey")
    shape = "clumps" if perplexity == 3 else "one cloud"
    ax.set(title=f"Noise, perplexity {perplexity}: {shape}", xticks=[], yticks=[])
plt.show()

# %% [markdown]
# The fix: use the map to find questions, and answer them in the full space. How wide is a class, how far are two apart? Measure
# it there, as *Ten prototypes* below does. A projection by PCA keeps such measures, as far as it shows them.

# %%
projection = torch.from_numpy(PCA(2).fit_transform(true_points.numpy()))
print(f"PCA: widths {width(projection, 0) / width(projection, 1):.0f} : 1, ", end="")
print(f"gaps {gap_ratio(projection):.1f} : 1 (truth 10 : 1 and 5 : 1)")
assert width(projection, 0) / width(projection, 1) > 7
assert abs(gap_ratio(projection) - 5) < 0.5

# %% [markdown]
# ## Straight to the plane
#
# Both maps flatten 64 numbers afterwards. The third way is to ask the network for two numbers in the first place. They should
# be free on the plane, not on a circle, so `normalize=False`; and the margin is one between distances, not squared. What do two
# numbers cost? Beside it, a network with 64 numbers on the same budget: the same 12 000 images, one epoch, the same loss and
# seed.

# %%
budget = images[:12_000], labels[:12_000]
small_test, small_labels = test_images[:5000], test_labels[:5000]
options = {"epochs": 1, "batch_size": 256, "progress": False}


def train_and_embed(dimensions, **more):
    net, _ = load_or_fit(
        partial(EmbeddingNet, dimensions, **more.pop("shape", {})), *budget, **more
    )
    return embed(net, budget[0]), embed(net, small_test)


distance_loss = TripletLoss(margin=1.0, squared=False)
unbound = {"shape": {"normalize": False}, "loss": distance_loss} | options
plane_gallery, plane_queries = train_and_embed(2, **unbound)
wide_gallery, wide_queries = train_and_embed(64, **unbound)
print("2 numbers:", tuple(plane_queries.shape), " 64 numbers:", tuple(wide_queries.shape))

# %% [markdown]
# As the plane is all there is, we can colour it: each spot gets the colour of the digit that most of its ten nearest training
# images are.

# %% alt="A plane divided into ten coloured regions, one a digit, with 700 test digits drawn as small coloured images. Most lie inside the region of their own digit; where regions meet in the middle, digits mix." tags=["nbval-ignore-output"]
low, high = plane_queries.quantile(0.002, dim=0) - 0.3, plane_queries.quantile(0.998, dim=0) + 0.3
xs, ys = (torch.linspace(*ends, 150) for ends in zip(low.tolist(), high.tolist(), strict=True))
spots = torch.cartesian_prod(xs, ys)
land = KNNClassifier(plane_gallery[:5000], labels[:5000]).predict(spots).view(150, 150).T
figure, ax = plt.subplots(figsize=(7, 5.6))
colors = plt.matplotlib.colors.ListedColormap(PALETTE)
ax.pcolormesh(xs, ys, land, cmap=colors, vmin=-0.5, vmax=9.5, alpha=0.25, rasterized=True)
ax.set(xlim=xs[[0, -1]].tolist(), ylim=ys[[0, -1]].tolist(), autoscale_on=False)
scatter_classes(plane_queries[:700], small_labels[:700], ax=ax, size=0)
inside = ((plane_queries[:700] > low) & (plane_queries[:700] < high)).all(dim=1)
draw_thumbnails(
    ax, plane_queries[:700][inside], small_test[:700][inside], small_labels[:700][inside]
)
ax.grid(visible=False)
ax.set(title="Two numbers: a region for each digit", xlabel="first number", ylabel="second number")
plt.show()

# %% [markdown]
# Nothing is flattened, so nothing is hidden: distances, by the numbers on the two axes, are the network's own. Whether the narrow room costs
# accuracy, the other network tells: once with all of its 64 numbers, once with its first two principal components (from its
# training images).

# %% tags=["nbval-ignore-output"]
wide_pca = PCA(2).fit(wide_gallery.numpy())
flattened = [torch.from_numpy(wide_pca.transform(x.numpy())) for x in (wide_gallery, wide_queries)]
contestants = {
    "64 numbers": (wide_gallery, wide_queries),
    "2 numbers": (plane_gallery, plane_queries),
    "64, projected to 2": flattened,
}
right_on = {
    name: KNNClassifier(known, budget[1]).predict(asked) == small_labels
    for name, (known, asked) in contestants.items()
}
for name, hit in right_on.items():
    print(f"{name:<20}{hit.float().mean():7.2%} right")
wide_right, plane_right, flattened_right = right_on.values()
only_wide, only_plane = (
    int((wide_right & ~plane_right).sum()),
    int((plane_right & ~wide_right).sum()),
)
p_value = binomtest(only_wide, only_wide + only_plane).pvalue
print(
    f"right where the other is wrong: 64 numbers {only_wide}, 2 numbers {only_plane} (p = {p_value:.0e})"
)
assert only_wide > 2 * only_plane
assert plane_right.float().mean() > flattened_right.float().mean() + 0.02

# %% [markdown]
# On equal budgets two numbers cost accuracy: of the images on which the two networks disagree, 64 numbers are right about
# eight times as often (a *sign test* on the same images). Two principal components of the 64 numbers lose far more. So for a map
# on which distances hold, ask the network for two numbers. (t-SNE keeps neighbours, but has no place for a new image.)

# %% [markdown]
# ## How it unfolds
#
# What happens on the way? Train a fresh network for one epoch on 16 000 images and take a snapshot of 500 test embeddings at
# chosen steps. `fit` calls the *callback* after each step. Before each snapshot a copy gets fresh batch statistics, so that
# what moves between the pictures is due to the weights.

# %%
torch.manual_seed(1)
fresh = EmbeddingNet()
moments, last = (0, 3, 6, 10, 14, 20, 35, 63), 63
snapshots, not_refreshed = {}, {}


def take_snapshot(so_far):
    step = len(so_far)
    if step in moments:
        snapshots[step] = embed(refreshed(fresh, images[:1000]), test_images[:500])
        not_refreshed[step] = embed(fresh, test_images[:500])


few = images[:16_000], labels[:16_000]
take_snapshot([])
fit(fresh, *few, epochs=1, batch_size=256, seed=1, callback=take_snapshot, progress=False)
print("snapshots after", ", ".join(map(str, snapshots)), "steps")

# %% [markdown]
# All snapshots get the *same* projection, fitted to training images at the last step. If each had its own, the view would turn
# and zoom between panels, and we could not tell a movement of the points from a movement of the camera.

# %% alt="Eight snapshots of 500 test digits in one fixed projection. Untrained, all digits form one mixed cloud with 30 percent of pairs in the wrong order; they sort themselves within ten steps, and at step 63 fewer than one in a thousand is wrong." tags=["nbval-ignore-output"]
camera = PCA(2).fit(embed(refreshed(fresh, images[:1000]), images[:1000]).numpy())
mixed = {step: wrong_order(points, test_labels[:500]) for step, points in snapshots.items()}
figure, axes = plt.subplots(2, 4, figsize=(11, 5.4), sharex=True, sharey=True)
for ax, (step, points) in zip(axes.flat, snapshots.items(), strict=True):
    scatter_classes(camera.transform(points.numpy()), test_labels[:500], ax=ax, size=4)
    ax.set(title=f"step {step}: {100 * mixed[step]:.2g} % wrong", aspect="equal")
for ax in axes.flat:
    part_labels(ax, gap=0.11)
figure.suptitle("The digits part within ten steps", weight="bold")
plt.show()
for step, points in snapshots.items():
    spreads = spread_of(points), spread_of(not_refreshed[step])
    print(f"step {step:2}: {mixed[step]:6.2%} in the wrong order, ", end="")
    print(f"spread {spreads[0]:.2f} (not refreshed: {spreads[1]:.2f})")
assert mixed[20] < 0.3 * mixed[0]
assert mixed[last] < 0.1 * mixed[0]
assert max(map(spread_of, snapshots.values())) < 1.2 * spread_of(snapshots[0])
assert spread_of(not_refreshed[20]) > 1.5 * spread_of(not_refreshed[0])

# %% [markdown]
# What changes is the order. After ten steps, or 2 560 images, the share of pairs in the wrong order has gone from 30 % to 1 %;
# after 63 it is 0.05 %.
#
# The cloud seems to grow, but that is the projection: it looks along directions in which the *trained* cloud is wide. In all 64
# dimensions the spread starts at 0.81, shrinks to 0.67 and comes back to 0.76. Without fresh statistics it would go from 0.34
# to 0.76, and that growth is running averages that fill.

# %% [markdown]
# ## Who is near?
#
# Maps of thousands of points show crowds. To see what *near* means, look at single images. Here are three queries that pixels
# get wrong, each with its eight nearest training images, by pixels and by embedding. By hand, the nearest are the smallest of
# all distances; the classifier must agree. (It asks ten neighbours: among them the first and the third query are ties, which go
# to the smaller digit.)

# %% alt="Three test digits, each with its eight nearest training images, by pixels in one row and by embedding in the next. By pixels about half of the neighbours are of another digit, framed orange; by embedding all are of the same digit, framed blue." tags=["nbval-ignore-output"]
pixels, test_pixels = images.flatten(1), test_images.flatten(1)
by_pixels = KNNClassifier(pixels, labels).predict(test_pixels)
failed = torch.nonzero(by_pixels != test_labels)[:3, 0]
by_ink = pairwise_distances(test_pixels[failed], pixels).topk(8, largest=False).indices
by_sense = pairwise_distances(queries[failed], gallery).topk(8, largest=False).indices
nearest = KNNClassifier(gallery, labels, k=1).predict(queries[failed])
found, twice = torch.stack([by_ink, by_sense], dim=1).flatten(0, 1), failed.repeat_interleave(2)
figure = show_neighbours(test_images[twice], test_labels[twice], images[found], labels[found])
for row, ax in enumerate(figure.axes[::9]):
    ax.set_ylabel(("by pixels", "embedding")[row % 2], fontsize=9)
figure.suptitle("Pixels find the same ink, the network finds the same digit", weight="bold")
plt.show()
print("right by pixels:", (labels[by_ink] == test_labels[failed, None]).sum(dim=1).tolist(), "of 8")
print("right by embedding:", (labels[by_sense] == test_labels[failed, None]).sum(dim=1).tolist())
assert (labels[by_sense[:, 0]] == nearest).all()

# %% [markdown]
# Blue frames are hits. The network's neighbours no longer have their ink in the same places: they are shifted, slanted,
# thicker, thinner, and the same digit. But these queries were *chosen* because pixels fail on them. A fair comparison counts
# both ways, over all test images.

# %% tags=["nbval-ignore-output"]
network_only = int(((answers == test_labels) & (by_pixels != test_labels)).sum())
pixels_only = int(((answers != test_labels) & (by_pixels == test_labels)).sum())
print(f"only the network is right: {network_only}, only pixels are right: {pixels_only}")
assert network_only > 5 * pixels_only

# %% [markdown]
# How far does *near* reach? Each digit has about 6 000 training images. So go away from a query: to its nearest image, the
# tenth, the hundredth, and so on to the last. The first line above each column is the rank.

# %% alt="Five queries and the training images at rank 1, 10, 100, 1000, 3000, 5000, 7000, 20000 and 60000. Up to rank 3000 all show the query's digit and are framed blue, and at rank 5000 too; from rank 7000 on they show other digits and are framed orange." tags=["nbval-ignore-output"]
ranks = [1, 10, 100, 1000, 3000, 5000, 7000, 20_000, 60_000]
draw_queries = torch.randperm(10_000, generator=torch.Generator().manual_seed(0))[:100]
some = torch.tensor([int(torch.nonzero(test_labels == digit)[3]) for digit in (2, 4, 5, 7, 8)])
asked = torch.cat([some, draw_queries])
by_rank = pairwise_distances(queries[asked], gallery).argsort(dim=1)
distant = by_rank[:5, [rank - 1 for rank in ranks]]
figure = show_neighbours(test_images[some], test_labels[some], images[distant], labels[distant])
words = ["query", "rank 1", *(f"{rank:,}".replace(",", " ") for rank in ranks[1:])]
for ax, word in zip(figure.axes[:10], words, strict=True):
    ax.set_title(f"{word}\n{ax.get_title()}", fontsize=9)
figure.suptitle("The query's own digit comes first, nearly to its last image", weight="bold")
plt.show()
is_own = labels[by_rank[5:]] == test_labels[draw_queries, None]
for rank in ranks:
    print(
        f"rank {rank:>6}: the query's digit for {int(is_own[:, rank - 1].sum())} of 100 random queries"
    )
apart = (queries[test_labels == 2] - gallery[labels == 2].mean(dim=0)).norm(dim=1)
inner = float((apart < apart[3]).float().mean())
print(f"the two of the first row lies farther from the twos' mean than {inner:.0%} of all twos")
assert is_own[:, 4999].float().mean() > 0.9
assert is_own[:, 6999].float().mean() < 0.1

# %% [markdown]
# At rank 5 000 it is still the query's digit in these five rows, and for each of 100 random queries. By rank 7 000 the digit has
# run out, but for one of 100, and images of other digits follow. That holds even for the two of the first row, which lies at the
# rim of its cluster, farther out than 99 % of the twos. **R-precision** asks just that: among as many neighbours as a
# class has members, how many belong to it? By hand for these 100, and by the library; then among 2 000 test images: 99 %,
# against 40 % by pixels and 30 % by the untrained network.

# %% tags=["nbval-ignore-output"]
members = labels.bincount()[test_labels[draw_queries]]
mean_share = np.mean(
    [float(own[:size].float().mean()) for own, size in zip(is_own, members, strict=True)]
)
by_r_precision = r_precision(queries[draw_queries], test_labels[draw_queries], gallery, labels)
print(f"by hand {mean_share:.4f}, by library {float(by_r_precision):.4f}")
precisions = [float(r_precision(points, seen_labels)) for points in spaces.values()]
for title, precision in zip(spaces, precisions, strict=True):
    print(f"{title.split(':')[0]:<18}{precision:.1%}")
assert abs(mean_share - float(by_r_precision)) < 1e-3
assert precisions[2] > max(precisions[:2]) + 0.3

# %% [markdown]
# ## Ten prototypes
#
# If each digit is one tight island, then ten points should do to say where they are. A class's **prototype** is the mean of its
# embeddings, brought back to the sphere. Forget the 60 000 training images and give each test image the label of the nearest of
# ten prototypes. The rival: the ten mean images, by pixels.

# %% tags=["nbval-ignore-output"]
prototypes = torch.stack([gallery[labels == digit].mean(dim=0) for digit in range(10)])
print("lengths of the means:", [round(x, 2) for x in prototypes.norm(dim=1).tolist()])
prototypes = F.normalize(prototypes)
ghosts = torch.stack([images[labels == digit].mean(dim=0) for digit in range(10)])
by_prototype = pairwise_distances(queries, prototypes).argmin(dim=1)
by_ghost = pairwise_distances(test_pixels, ghosts.flatten(1)).argmin(dim=1)
said = {
    "prototypes": by_prototype,
    "kNN, 60 000": answers,
    "mean images": by_ghost,
    "kNN, pixels": by_pixels,
}
for name, guess in said.items():
    print(f"{name:<12}{int((guess == test_labels).sum()):6} of 10 000 right")
ten_only = int(((by_prototype == test_labels) & (answers != test_labels)).sum())
all_only = int(((by_prototype != test_labels) & (answers == test_labels)).sum())
print(f"only the prototypes are right: {ten_only}, only kNN: {all_only} ", end="")
print(f"(p = {binomtest(ten_only, ten_only + all_only).pvalue:.2f})")
assert abs(ten_only - all_only) < 30
assert (by_ghost == test_labels).float().mean() < 0.85

# %% [markdown]
# By pixels, to keep only the means costs 15 points. By embedding, 15 of 10 000 images change between right and wrong: 11 of
# them only kNN gets right, 4 only the prototypes. That is too few to tell which is better (p = 0.12, a sign test); the ten
# points cost less than 0.2 points.
#
# A prototype is no image, but some images are near it.

# %% alt="Five rows of ten digits. Top: the mean of each digit's pixels, a blurred ghost. Second: the training image nearest to the prototype, a clean digit. Below: the three farthest from it, smeared, cut or looking like another digit." tags=["nbval-ignore-output"]
to_prototype = pairwise_distances(gallery, prototypes)
own = to_prototype.gather(1, labels[:, None])[:, 0]
places = [torch.nonzero(labels == digit)[:, 0] for digit in range(10)]
by_distance = [place[own[place].argsort()] for place in places]
rows = [ghosts] + [images[[int(row[k]) for row in by_distance]] for k in (0, -3, -2, -1)]
frames = ["grey"] * 10 + [SAME] * 10 + [DIFFERENT] * 30
figure = show_images(torch.cat(rows), columns=10, colors=frames)
for ax, word in zip(
    figure.axes[::10], ("mean image", "nearest", "third last", "2nd last", "farthest"), strict=True
):
    ax.set_ylabel(word, fontsize=9)
for digit, ax in enumerate(figure.axes[:10]):
    ax.set_title(f"label {digit}", fontsize=9)
figure.suptitle("The nearest to the prototype is typical, the farthest are doubtful", weight="bold")
plt.show()

# %% [markdown]
# The mean of the pixels is blurred, because the strokes lie in different places. The image nearest to the prototype is a clean
# one. The farthest are hard to read, or look mislabelled: such a list is a quick way to find mistakes in a data set.
#
# And how do the prototypes lie to one another?

# %% alt="Triangle of distances between the ten prototypes, from 0.96 between seven and nine to 1.41 between three and six. Four and seven, two and seven, five and six, three and five, four and nine are close, too." tags=["nbval-ignore-output"]
between = pairwise_distances(prototypes)
figure, ax = plt.subplots(figsize=(6.4, 4.6))
upper = np.triu(np.ones((10, 10), dtype=bool))
sns.heatmap(
    between, mask=upper, annot=True, fmt=".2f", cmap="cividis", ax=ax, annot_kws={"size": 8}
)
ax.tick_params(axis="y", rotation=0)
ax.grid(visible=False)
ax.set(title="Even the closest prototypes are about 1 apart", xlabel="digit", ylabel="digit")
plt.show()
smallest = float(between[~np.eye(10, dtype=bool)].min())
print(f"closest pair: {smallest:.2f}, squared {smallest**2:.2f}; the loss's margin: 0.20, squared")
print(f"half of all images lie within {float(own.median()):.2f} of their prototype")
assert smallest**2 > 3 * 0.2
assert own.median() < smallest / 3

# %% [markdown]
# Even the closest pair, seven and nine, is far apart by the standard of the loss: its squared distance is more than four times
# the margin. The members of a class keep close: half of them lie within 0.13 of their prototype.

# %% [markdown]
# ## The hardest triplets
#
# A triplet is *hard* if its negative is nearer than its positive ([chapter 2](02_triplets.ipynb)). Among 2 000 test images
# there are more than 700 million triplets. By hand: for each anchor, sort the distances to all negatives and look up how many
# lie below that of each positive. `mine_triplets` lists the hard ones; its anchors must occur as often.


# %% tags=["nbval-ignore-output"]
def hard_counts(points, point_labels):
    """Of how many hard triplets is each image the anchor?"""
    counts = []
    for row, alike in zip(
        pairwise_distances(points), point_labels[:, None] == point_labels, strict=True
    ):
        negatives = row[~alike].sort().values
        counts.append(int(torch.searchsorted(negatives, row[alike].contiguous()).sum()))
    return torch.tensor(counts)


hard, hard_by_pixels = hard_counts(seen, seen_labels), hard_counts(test_pixels[:2000], seen_labels)
listed = mine_triplets(seen, seen_labels, "hard")[0].bincount(minlength=2000)
sizes = seen_labels.bincount()[seen_labels]
triplets = int(((sizes - 1) * (2000 - sizes)).sum())
print(f"{triplets:,} triplets; hard: {hard_by_pixels.sum() / triplets:.1%} by pixels, ", end="")
print(f"{hard.sum() / triplets:.2%} by embedding")
assert (hard - listed).abs().sum() <= 1e-4 * listed.sum()
assert hard.sum() < 0.005 * triplets

# %% [markdown]
# These are not spread evenly. Sort the anchors by their number of hard triplets, and add up.

# %% alt="Share of all hard triplets owned by the worst anchors, on a log axis from 1 to 2 000 anchors. By embedding, the worst 20 own 85 percent; by pixels, the worst 20 own 3 percent and the worst 100 about a tenth." tags=["nbval-ignore-output"]
figure, ax = plt.subplots()
shares_of_20 = []
for counts, color, style, name, x, y in (
    (hard, DIFFERENT, "-", "by embedding", 6, 0.6),
    (hard_by_pixels, PALETTE[7], "--", "by pixels", 130, 0.22),
):
    owned = counts.sort(descending=True).values.cumsum(0) / counts.sum()
    shares_of_20.append(float(owned[19]))
    ax.plot(range(1, 2001), owned, style, color=color)
    ax.annotate(name, (x, y), color=color, ha="right")
    print(f"{name}: the worst 20 of 2 000 anchors own {owned[19]:.0%} of the hard triplets")
ax.axvline(20, color="grey", linestyle=":")
ax.annotate("20 images", (22, 0.4), color="grey")
ax.set(
    xscale="log", ylim=(0, 1.02), xlabel="anchors, the worst first", ylabel="share of hard triplets"
)
ax.set(title="By embedding, few images make most of the trouble")
plt.show()
assert shares_of_20[0] > 0.5 > 10 * shares_of_20[1]

# %% [markdown]
# Why so few? A digit that lies nearer to another digit's cluster than to its own is far from its own 200 or so and nearer to 200 of the other: 200 ×
# 200, or 40 000 hard triplets, from one image. Here are the six worst by that count, each above the positive it is farthest
# from and the negative it is nearest to, with the distances.

# %% alt="Six test digits that anchor the most hard triplets, each above its farthest positive and its nearest negative. The anchors are ambiguous shapes; their nearest negatives, of another digit, look much like them and are three to six times nearer than the positives." tags=["nbval-ignore-output"]
worst = hard.argsort(descending=True)[:20]
to_seen, alike = pairwise_distances(seen), seen_labels[:, None] == seen_labels
farthest, positive = to_seen.masked_fill(~alike, -1).max(dim=1)
closest, negative = to_seen.masked_fill(alike, torch.inf).min(dim=1)
six = worst[:6]
titles = [f"a {seen_labels[i]}, {int(hard[i]) / 1000:.0f} 000" for i in six]
titles += [f"a {seen_labels[positive[i]]}: {farthest[i]:.2f}" for i in six]
titles += [f"a {seen_labels[negative[i]]}: {closest[i]:.2f}" for i in six]
frames = ["black"] * 6 + [SAME] * 6 + [DIFFERENT] * 6
shown = test_images[torch.cat([six, positive[six], negative[six]])]
figure = show_images(shown, titles, columns=6, colors=frames, size=1.2)
for ax, word in zip(figure.axes[::6], ("anchor", "positive", "negative"), strict=True):
    ax.set_ylabel(word, fontsize=10)
figure.suptitle("Ambiguous anchors, nearer to the wrong digit's cluster", weight="bold")
plt.show()
errors_seen = torch.nonzero(answers[:2000] != seen_labels)[:, 0]
among = int(torch.isin(errors_seen, worst).sum())
as_positive, as_negative = (torch.isin(who, worst).float().mean() for who in (positive, negative))
print(f"{among} of kNN's {len(errors_seen)} errors on these images are among the worst 20")
print(f"the worst 20 are the farthest positive of {as_positive:.0%} of all 2 000 images,")
print(f"and the nearest negative of {as_negative:.0%}")
assert (closest[six] < farthest[six]).all()
assert among > len(errors_seen) / 2
assert min(as_positive, as_negative) > 0.3

# %% [markdown]
# The number above an anchor says how many hard triplets it has. These images matter to others, too: one of the worst twenty is
# the farthest positive of 67 % of all images, and the nearest negative of 81 %. With this network and these 2 000 images, a
# loss that looks only at each anchor's farthest positive and nearest negative (*batch-hard*, chapter [2](02_triplets.ipynb))
# would learn mostly from these twenty.

# %% [markdown]
# ## The errors that remain
#
# Of 10 000 test images, these are all that kNN gets wrong, each with its label and the answer. They are sorted by how much
# nearer the answer's prototype is than that of the label: the first ones lie nearer to their label's, then come the undecided, the last are clear.

# %% alt="All test digits that kNN gets wrong, 46, each with its label and the answer, those nearer to their label's prototype first. Many are ambiguous, smeared or cut; some of the last look like the answer rather than the label." tags=["nbval-ignore-output"]
errors = torch.nonzero(answers != test_labels)[:, 0]
to_ten = pairwise_distances(queries[errors], prototypes)
to_label, to_answer = (to_ten.gather(1, of[errors, None])[:, 0] for of in (test_labels, answers))
errors = errors[(to_label - to_answer).argsort()]
titles = [f"{test_labels[i]}, not {answers[i]}" for i in errors]
figure = show_images(test_images[errors], titles, columns=12, size=0.8)
figure.suptitle(f"All {len(errors)} errors in 10 000", weight="bold")
plt.show()
print(f"{int((to_label < to_answer).sum())} of {len(errors)} lie nearer to the label's prototype")
assert 20 < len(errors) < 100

# %% [markdown]
# The first four lie nearer to the prototype of their *label*: there prototypes are right and kNN is wrong. Cover the titles and
# try it yourself. Some you will get right; on others you and the label will differ, too. Northcutt, Athalye and Mueller (2021)
# found 15 images among these 10 000 whose label people think wrong. Where a few dozen errors remain, a test set begins to
# measure its own labels.

# %% [markdown]
# ## Who is taken for whom
#
# Count the errors by true digit and answer, for pixels on the left and for embeddings on the right: a **confusion matrix**. The
# right answers on the diagonal are left out. They are 29 times as many by pixels and 216 times by embedding, and would make everything
# else invisible.

# %% alt="Two confusion matrices of errors on one colour scale up to 27. By pixels many cells are filled: sevens and twos answered as one, fours as nine, twos as seven. By embedding nearly all cells are empty, none above 4." tags=["nbval-ignore-output"]
figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True)
matrices = {}
for name, guess in (("pixels", by_pixels), ("embedding", answers)):
    matrices[name] = confusion_matrix(test_labels, guess)
    np.fill_diagonal(matrices[name], 0)
top = max(matrix.max() for matrix in matrices.values())
for ax, (name, matrix) in zip(axes, matrices.items(), strict=True):
    text = np.where(matrix, matrix, "")
    sns.heatmap(
        matrix,
        annot=text,
        fmt="",
        cmap="Blues",
        vmin=0,
        vmax=top,
        cbar=False,
        ax=ax,
        linewidths=0.5,
    )
    ax.set(title=f"By {name}: {matrix.sum()} errors", xlabel="answer")
    ax.set_ylabel("label" if name == "pixels" else "")
    most = matrix.sum(axis=0).argmax()
    print(f"by {name}: most answered wrongly is {most}, {matrix[:, most].sum()} times; ", end="")
    row, column = divmod(int(matrix.argmax()), 10)
    print(f"the fullest cell is {row} answered as {column}, {matrix.max()} times")
plt.show()
ink = torch.stack([images[labels == digit].mean() for digit in range(10)])
print(f"the digit with the least ink is {int(ink.argmin())}")
assert 4 * matrices["embedding"].sum() < matrices["pixels"].sum()

# %% [markdown]
# Pixels have a favourite: a fifth of their errors says "one", the digit with the least ink. The network makes a seventh as many
# errors, and no cell of its matrix holds more than a handful.

# %% [markdown]
# ## What the network looks at
#
# Which pixels matter? Change some and see how far the embedding moves away from its prototype. Rubbing out a small square, in
# each place in turn, is known as **occlusion** (Zeiler and Fergus 2014). The reverse is to ink one in. Each pixel's score is
# the mean, over all squares that cover it, of the growth of the squared distance.


# %%
def square_masks(size=5):
    start, place = torch.arange(29 - size)[:, None], torch.arange(28)
    covers = (place >= start) & (place < start + size)
    return (covers[:, None, :, None] & covers[None, :, None, :]).flatten(0, 1)


def importance(net, picture, centre, value):
    masks = square_masks()
    changed = torch.where(masks[:, None], value, picture)
    before, *after = ((embed(net, torch.cat([picture, changed])) - centre) ** 2).sum(dim=1)
    growth = torch.stack(after) - before
    return growth, (growth[:, None, None] * masks).sum(dim=0) / masks.sum(dim=0)


print(f"{len(square_masks())} squares of 5 × 5 pixels; the middle of the image is in", end=" ")
print(int(square_masks()[:, 14, 14].sum()), "of them")

# %% alt="Heat maps for a zero, three, four, seven and nine. Rubbed out, the left side of the zero, the foot of the seven and the loop of the nine matter most; inked in, the opening at the top of the four and the empty places beside the feet of seven and nine matter." tags=["nbval-ignore-output"]
examples = {digit: int(torch.nonzero(test_labels == digit)[4]) for digit in (0, 3, 4, 7, 9)}
paper, full_ink = images.min(), images.max()
scores = {}
figure, axes = plt.subplots(2, 5, figsize=(9.5, 3.9))
for row, value, word in zip(axes, (paper, full_ink), ("rubbed out", "inked in"), strict=True):
    row[0].set_ylabel(word)
    for ax, (digit, index) in zip(row, examples.items(), strict=True):
        picture = test_images[index : index + 1]
        growth, scores[digit, word] = importance(network, picture, prototypes[digit], value)
        heat = ax.imshow(scores[digit, word], cmap="magma_r", vmin=0, vmax=0.8)
        ax.contour(picture[0, 0], [0.5], colors="black", linewidths=1)
        ax.set(xticks=[], yticks=[])
figure.colorbar(heat, ax=axes, label="growth of squared distance")
figure.suptitle("Where a change moves the digit away from its prototype", weight="bold")
plt.show()
print(f"largest score {max(float(score.max()) for score in scores.values()):.2f}")

# %% [markdown]
# Dark is where a change moves the image away. Rubbed out, that is some of the ink, not all: the left side of the zero, the foot
# of the seven, the loop of the nine. The lower row shows what *empty* places mean: the opening of the four. Close it, and what
# does the network see?

# %% tags=["nbval-ignore-output"]
four = test_images[examples[4]][None]
inked, _ = importance(network, four, prototypes[4], full_ink)
closed = embed(network, torch.where(square_masks()[inked.argmax()], full_ink, four))
seen_as = int(pairwise_distances(closed, prototypes).argmin())
print(f"with the worst square inked in, the nearest prototype is {seen_as}")
blank_prototypes = F.normalize(
    torch.stack([blank_gallery[labels[:5000] == d].mean(dim=0) for d in range(10)])
)
alike_maps = {}
for (digit, word), score in scores.items():
    value = paper if word == "rubbed out" else full_ink
    picture = test_images[examples[digit]][None]
    _, blank_score = importance(untrained, picture, blank_prototypes[digit], value)
    alike_maps[digit, word] = np.corrcoef(score.flatten(), blank_score.flatten())[0, 1]
print("correlation with the untrained network's maps:")
for word in ("rubbed out", "inked in"):
    print(f"{word:<11}", [f"{alike_maps[digit, word]:.2f}" for digit in examples])
assert seen_as != 4
assert 0.2 < np.mean(list(alike_maps.values())) < 0.8

# %% [markdown]
# It sees a nine. Occlusion alone cannot find that place, because rubbing out what is empty changes nothing.
#
# Read such maps with care. Part of what they show is there before any training: where ink is rubbed out, those of the untrained
# network correlate with these by 0.2 to 0.8, because it, too, can change only where there is ink. Where ink is added, it is
# −0.2 to 0.45: little of the lower row is there without training. A square of ink is nothing that anyone writes, and another
# size of square gives another map. And it tells *that* a place matters, for this image and this network; not what the network
# computes from it.

# %% [markdown]
# ## Between two digits
#
# What lies between a four and a nine? To ask, walk from one embedding to the other (**interpolation**). On the sphere the
# shortest way is an arc of a *great circle*; the straight line would cut through the ball, where no embedding ever is.
# (Interpolation along the arc is called *slerp*.) A quarter circle by four points, by hand:


# %%
def great_circle(start, end, steps=11):
    """Points at equal steps on the arcs from start to end, both of shape (n, d): (n, steps, d)."""
    angle = torch.acos((start * end).sum(dim=1).clamp(-1, 1))[:, None, None]
    t = torch.linspace(0, 1, steps)[None, :, None]
    return (
        ((1 - t) * angle).sin() * start[:, None] + (t * angle).sin() * end[:, None]
    ) / angle.sin()


east, north = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
degrees = torch.tensor([0.0, 30.0, 60.0, 90.0]).deg2rad()
arc = torch.stack([degrees.cos(), degrees.sin()], dim=1)
torch.testing.assert_close(great_circle(east, north, 4)[0], arc)
print(
    f"length halfway: on the arc 1, on the straight line {float(((east + north) / 2).norm()):.2f}"
)

# %% [markdown]
# Go from one test image to another by eleven points at equal steps and show, at each, the *real* training image whose embedding is
# nearest. The frame has the colour of its digit.

# %% alt="Five rows of eleven training digits met on the way from one embedding to another: four to nine, three to five, one to seven, six to zero, two to two. The first four rows change their digit once, at a single step; the last stays a two." tags=["nbval-ignore-output"]
ends = [(4, 9), (3, 5), (1, 7), (6, 0), (2, 2)]
at = torch.tensor(
    [
        [int(torch.nonzero(test_labels == d)[k]) for d, k in zip(pair, (5, 6), strict=True)]
        for pair in ends
    ]
)
path = great_circle(queries[at[:, 0]], queries[at[:, 1]]).flatten(0, 1)
met = pairwise_distances(path, gallery).argmin(dim=1)
frames = [PALETTE[digit] for digit in labels[met].tolist()]
figure = show_images(images[met], [str(d) for d in labels[met].tolist()], columns=11, colors=frames)
for ax, (first, second) in zip(figure.axes[::11], ends, strict=True):
    ax.set_ylabel(f"{first} to {second}", fontsize=9)
figure.suptitle("From one digit to another: a single change", weight="bold")
plt.show()
changes = (labels[met].view(5, 11).diff(dim=1) != 0).sum(dim=1)
print("changes of digit on the way:", changes.tolist())

# %% [markdown]
# Each path between two digits changes once, and no third digit comes between. The same image may come several times, as if
# there were no other near. Is it so? Five paths prove nothing. So take 100 random pairs of two different digits and 100 pairs
# of one digit, and measure at each step how far the nearest of 5 000 training images is; the same with the untrained network.

# %% tags=["nbval-ignore-output"]
chance = torch.Generator().manual_seed(0)
one, other = torch.randint(2000, (2, 4000), generator=chance)
is_pair = {"two digits": seen_labels[one] != seen_labels[other]}
is_pair["one digit"] = ~is_pair["two digits"] & (one != other)
blank_seen = spaces["Untrained network: overlap"]
sides = {"trained": (seen, gallery[:5000]), "untrained": (blank_seen, blank_gallery)}
emptiness, degrees_long, single = {}, {}, {}
for side, (asked_points, known) in sides.items():
    for kind, mask in is_pair.items():
        starts, goals = asked_points[one[mask][:100]], asked_points[other[mask][:100]]
        arcs = great_circle(starts, goals).flatten(0, 1)
        away, nearest = pairwise_distances(arcs, known).min(dim=1)
        emptiness[side, kind] = away.view(100, 11)
        single[side, kind] = int(
            ((labels[nearest].view(100, 11).diff(dim=1) != 0).sum(dim=1) <= 1).sum()
        )
        cosines = (starts * goals).sum(dim=1).clamp(-1, 1)
        degrees_long[side, kind] = float(cosines.acos().rad2deg().mean())
halfway = {}
for key, away in emptiness.items():
    halfway[key] = float(away[:, 5].mean() / away[:, [0, 10]].mean())
    print(f"{key[0]:<10}{key[1]:<11}{degrees_long[key]:4.0f} degrees long; ", end="")
    print(f"halfway {away[:, 5].mean():.2f}, at the ends × {halfway[key]:.1f}; ", end="")
    print(f"at most one change on {single[key]} of 100")
assert halfway["trained", "two digits"] > 2
assert max(ratio for key, ratio in halfway.items() if key != ("trained", "two digits")) < 1.3

# %% alt="Distance to the nearest training image along interpolations, mean and standard deviation over 100 pairs. Trained, two digits: rises from 0.09 at the ends to over 0.3 halfway. Trained, one digit: flat. Untrained network: flat at about 0.7 for both." tags=["nbval-ignore-output"]
figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), sharey=True)
looks = {"two digits": (DIFFERENT, "o-", 6), "one digit": (SAME, "s--", -16)}
for (side, kind), away in emptiness.items():
    ax, (color, style, height) = axes[int(side == "untrained")], looks[kind]
    middle, sd = away.mean(dim=0), away.std(dim=0)
    ax.plot(range(11), middle, style, color=color)
    ax.fill_between(range(11), middle - sd, middle + sd, color=color, alpha=0.2)
    at_five = {"xy": (5, float(middle[5])), "xytext": (0, height), "textcoords": "offset points"}
    ax.annotate(kind, **at_five, color=color, ha="center")
    ax.set(xlabel="step of the interpolation")
axes[0].set(ylabel="distance to the nearest image", ylim=(0, None))
axes[0].set_title("Trained: emptier between digits")
axes[1].set_title("Untrained: no gap between digits")
plt.show()

# %% [markdown]
# The bands show one standard deviation over the pairs. Between two digits the nearest image is, halfway, more than three times
# as far away as at the ends; between two images of one digit it is no farther. Nor do the paths wander: on 92 of 100 the digit
# changes at most once, by the untrained network on 45.
#
# Is the gap there only because the arcs between two digits are long (71 degrees, against 14)? The untrained network says no:
# there they are as long, 69 degrees, and halfway is no emptier than the ends. So the gap is training's
# work: it has drawn images together, at the ends to 0.09 from the nearest where it was 0.7, and left the space between digits
# empty by comparison. In absolute numbers halfway is nearer to an image than before, 0.32 against 0.70.

# %% [markdown]
# ## Exercises
#
# Try each before you unfold its solution: click the bar or the three dots, and for the answer in words the triangle.
#
# **1.** How many principal components of the embeddings are needed to classify as well as with all 64? Try 1, 2, 3, 5, 9 and
# 64, with the first 10 000 training images as gallery. Does the untrained network need as many?

# %%
# Your attempt

# %% jupyter={"source_hidden": true} tags=["hide-input"]
# Solution 1
by_components = {}
for name, known, asked_points in (
    ("trained", gallery[:10_000], seen),
    ("untrained", blank_gallery, blank_seen),
):
    turn = PCA().fit(known.numpy())
    known, asked_points = (
        torch.from_numpy(turn.transform(x.numpy())) for x in (known, asked_points)
    )
    for kept in (1, 2, 3, 5, 9, 64):
        guess = KNNClassifier(known[:, :kept], labels[: len(known)]).predict(asked_points[:, :kept])
        by_components[name, kept] = float((guess == seen_labels).float().mean())
assert by_components["trained", 2] < by_components["trained", 64] - 0.01
assert by_components["trained", 9] > by_components["trained", 64] - 0.004
assert by_components["untrained", 9] < by_components["untrained", 64] - 0.05

# %% [markdown]
# <details><summary>Answer 1</summary>
#
# Nine, as the main text leads to expect; five lose little. With 1, 2, 3, 5, 9 and 64 components 66, 91, 98.5, 99.3, 99.4 and
# 99.4 % of 2 000 test images are right. The untrained network, with 5 000 images as gallery, gets 57 % from nine and 74 % from all 64: its information is
# spread over all directions, for nobody has gathered it.
#
# </details>

# %% [markdown]
# **2.** Is the circle too small for ten digits? Reckon how far apart ten places on it can be, and compare with the margin. Let
# 200 free points of ten classes move on it by gradient descent. Then train the two-dimensional network on it, with
# `normalize=True`, on the budget of the plane: once with the usual loss, once with the plane's.

# %%
# Your attempt

# %% jupyter={"source_hidden": true} tags=["hide-input"]
# Solution 2
chord = 2 * np.sin(np.pi / 10)
free = torch.randn(200, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
ten_classes, descent = torch.arange(10).repeat(20), torch.optim.Adam([free], lr=0.03)
for _ in range(300):
    descent.zero_grad()
    TripletLoss()(F.normalize(free), ten_classes).backward()
    descent.step()
settled = float(r_precision(F.normalize(free).detach(), ten_classes))
on_circle, on_plane = {}, float(plane_right.float().mean())
for which_loss, more in (("usual", {}), ("the plane's", {"loss": distance_loss})):
    circle_gallery, circle_queries = train_and_embed(2, **more, **options)
    guess = KNNClassifier(circle_gallery, budget[1]).predict(circle_queries)
    on_circle[which_loss] = float((guess == small_labels).float().mean())
assert chord**2 > 0.2
assert settled > 0.95
assert on_circle["usual"] < on_circle["the plane's"] < on_plane - 0.1

# %% [markdown]
# <details><summary>Answer 2</summary>
#
# There is room: neighbours of ten equal places are 36 degrees or a distance of 0.62 apart, 0.38 squared, and the margin is 0.2.
# Free points find it: in 300 steps each class gathers at a place of its own. The network does not: its kNN accuracy is 47 %,
# against 95 % on the plane. Part of that is the loss: with the plane's it gets 77 %, though a margin of 1 can't be kept between
# neighbours on the circle. So room is not what is missing, but a way there: free points move one by one, a network moves alike
# images together. (That classes must pass through each other to change places is a guess that you may test: give the network a
# third number.)
#
# </details>

# %% [markdown]
# **3.** The network gives an embedding to any image, digit or not. Can you tell clothes from digits by how far they lie from
# the nearest training image? Use `load_fashion_mnist("test")`, compare with the test digits by the AUC, and do the same by
# pixels.

# %%
# Your attempt

# %% jupyter={"source_hidden": true} tags=["hide-input"]
# Solution 3
clothes = load_fashion_mnist("test")[0][:500]
strangers = {
    "embedding": (seen[:500], embed(network, clothes), gallery),
    "pixels": (test_pixels[:500], clothes.flatten(1), pixels),
}
is_clothing = torch.arange(2).repeat_interleave(500)
told_apart = {}
for name, (digit_points, clothes_points, known) in strangers.items():
    loneliness = [pairwise_distances(x, known).amin(dim=1) for x in (digit_points, clothes_points)]
    told_apart[name] = roc_auc_score(is_clothing, torch.cat(loneliness))
assert told_apart["embedding"] > 0.9
assert told_apart["pixels"] > 0.9

# %% [markdown]
# <details><summary>Answer 3</summary>
#
# Yes, and by pixels nearly as well: the AUC is 0.995 by embedding and 0.980 by pixels. By embedding digits lie 0.06 from the
# nearest training image, clothes 0.30 (medians). Clothes differ so much from digits that the task is easy; a sister of this
# network, trained with other rounding, has 0.98, too. No loss asked it to keep strangers away: one may land in the midst of a digit.
#
# </details>

# %% [markdown]
# ## Check yourself
#
# Choose before you unfold.

# %% [markdown]
# **1.** On a t-SNE map the ones are a large island and the zeros a small one. What follows for the embeddings?
#
# a) Ones vary more than zeros · b) Nothing about their widths; measure those in the full space · c) The network has learnt ones
# less well
#
# <details><summary>Answer</summary>
#
# **b.** t-SNE gives each point the room that it needs to keep its neighbours, so wide and narrow clusters come out alike. *a*
# reads a size off the map: a cluster ten times as wide was drawn no wider. *c* reads even more into it: no accuracy can be
# seen in an island's size.
#
# </details>

# %% [markdown]
# **2.** Two digits overlap in a projection on two principal components, and two others are far apart in it. What holds in 64
# dimensions?
#
# a) The first two overlap, the others are apart · b) The others are apart; about the first two the map says nothing · c)
# Neither, since a projection is only a picture
#
# <details><summary>Answer</summary>
#
# **b.** A projection shortens distances and lengthens none: far apart in it means far apart. *a* forgets the coordinates that
# were dropped, in which the first two may differ. *c* is true of t-SNE; a projection does keep something.
#
# </details>

# %% [markdown]
# **3.** You embed test images with a new network before training and after twenty batches. The cloud has become twice as wide.
# Have the weights learnt to spread it?
#
# a) Yes, the loss pushes negatives apart · b) Yes, a wider cloud is a better one · c) Not necessarily: refresh the batch
# statistics in both and compare again
#
# <details><summary>Answer</summary>
#
# **c.** In evaluation mode a new network normalises with means of 0 and variances of 1. Training fills these averages, and that
# alone widens the cloud. *a* may be true as well, but the widening is no evidence for it. *b* confuses width with order: an
# untrained cloud with fresh statistics is wide, too.
#
# </details>

# %% [markdown]
# **4.** You show a colleague ten queries that pixels get wrong and the new network gets right. What does it prove?
#
# a) The network is better · b) Little: the queries were chosen by the rival's failures; count also those that only pixels get
# right · c) Nothing can be shown with single images
#
# <details><summary>Answer</summary>
#
# **b.** Among images on which a method fails, almost any other method looks better. Over *all* images, count who is right where
# the other is wrong. *a* takes a chosen sample for a fair one. *c* goes too far: single images show what *near* means, they
# just do not measure.
#
# </details>

# %% [markdown]
# **5.** An image of 2 000 is the anchor of 40 000 hard triplets. What is the likeliest story?
#
# a) It lies nearer to another digit's cluster than to its own · b) It is a very common shape · c) The margin is too small
#
# <details><summary>Answer</summary>
#
# **a.** Then about 200 positives are far and about 200 negatives near, which makes 200 × 200. *b* would put it in the midst of
# its own cluster, with near positives and few hard triplets. *c* can't be: the margin has no part in what is hard, which asks
# only whether the negative is nearer than the positive.
#
# </details>

# %% [markdown]
# ## Summary
#
# - A histogram of distances tells whether an embedding works, a map where it does not; a rival beside it tells what was learnt.
# - A projection (PCA) hides but does not invent; t-SNE keeps neighbours, not sizes or gaps; a network with two numbers draws
#   its own map at a price.
# - A new network's batch statistics fit no data: refresh them before comparing.
# - Ten prototypes say nearly all; between two digits the sphere is emptier than at the digits, and that difference is training's work.
# - Few images make most hard triplets, and most errors are among them.
#
# **Next** [6 · Three ways](06_three_ways.ipynb) compares triplets with pairs and with a linear map, side by side.

# %% [markdown]
# ## References
#
# - L. van der Maaten, G. Hinton, ["Visualizing data using t-SNE"](https://www.jmlr.org/papers/v9/vandermaaten08a.html), JMLR
#   2008.
# - M. Wattenberg, F. Viégas, I. Johnson, ["How to use t-SNE effectively"](https://doi.org/10.23915/distill.00002), Distill
#   2016.
# - L. McInnes, J. Healy, J. Melville, ["UMAP: uniform manifold approximation and
#   projection"](https://arxiv.org/abs/1802.03426), 2018.
# - R. Hadsell, S. Chopra, Y. LeCun, ["Dimensionality reduction by learning an invariant
#   mapping"](https://doi.org/10.1109/CVPR.2006.100), CVPR 2006 (networks that draw maps).
# - M. D. Zeiler, R. Fergus, ["Visualizing and understanding convolutional networks"](https://arxiv.org/abs/1311.2901), ECCV
#   2014 (occlusion).
# - J. Adebayo et al., ["Sanity checks for saliency maps"](https://arxiv.org/abs/1810.03292), NeurIPS 2018 (compare with
#   untrained weights).
# - J. Snell, K. Swersky, R. Zemel, ["Prototypical networks for few-shot learning"](https://arxiv.org/abs/1703.05175), NeurIPS
#   2017.
# - C. Northcutt, A. Athalye, J. Mueller, ["Pervasive label errors in test sets"](https://arxiv.org/abs/2103.14749), NeurIPS
#   2021.
