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
# The network of chapter 4 sends each digit to 64 numbers, and 64 numbers are hard to look at. This chapter looks at them all
# the same: as distances, as maps, as neighbours, as errors, as walks; and shows how such pictures mislead.
#
# - **You will learn** to draw an embedding in two dimensions in three ways and what each of them keeps, to find the images that
#   cause trouble, to ask which pixels matter, and when not to trust a map.
# - **You need** chapters [3](03_network.ipynb) and [4](04_training.ipynb); no GPU.
# - **Running time** about 2 minutes on two cores, and one more if chapter 4 has not left its network in the cache.
# - Previous: [4 · Training](04_training.ipynb) · Next: [6 · Three ways](06_three_ways.ipynb)

# %%
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
import torch
import torch.nn.functional as F
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from sklearn.metrics import confusion_matrix, roc_auc_score

from tripletlib import (
    EmbeddingNet,
    KNNClassifier,
    TripletLoss,
    embed,
    fit,
    knn_accuracy,
    load_fashion_mnist,
    load_mnist,
    load_or_fit,
    mine_triplets,
    pairwise_distances,
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
images, labels = load_mnist("train")
test_images, test_labels = load_mnist("test")

# %% [markdown]
# ## The network of chapter 4
#
# The call is the one of chapter 4. If that chapter has run on this machine, the network comes from the cache at once;
# otherwise it is trained now, in about a minute.

# %% tags=["nbval-ignore-output"]
network, history = load_or_fit(EmbeddingNet, images, labels, seed=0)

# %%
gallery, queries = embed(network, images), embed(network, test_images)
print(tuple(gallery.shape), tuple(queries.shape))
assert knn_accuracy(queries, test_labels, gallery, labels) > 0.99

# %% [markdown]
# The *gallery* are the embeddings of all 60 000 training images, the *queries* those of the 10 000 test images, which the network
# has never seen. Nothing is chosen or tuned in this chapter, so we may look at the test images as long as we like. Whoever goes on
# to improve the network should look at other ones.

# %% [markdown]
# ## All pairs, before and after
#
# Chapter 1 measured all pairs among 2 000 images and found two heaps on top of each other. Here is that histogram again, then
# the same for a network with random weights, then for the trained one.

# %%
torch.manual_seed(0)
untrained = EmbeddingNet()
spaces = {
    "pixels": images[:2000].flatten(1),
    "untrained network": embed(untrained, images[:2000]),
    "trained network": gallery[:2000],
}
figure, axes = plt.subplots(1, 3, figsize=(12, 3.4))
for ax, (name, points) in zip(axes, spaces.items(), strict=True):
    plot_distances(points, labels[:2000], ax=ax).set(title=name.capitalize(), yticks=[])

# %% [markdown]
# Training pulled the heaps apart: pairs of one digit near zero, pairs of two digits around one. The untrained network has squeezed
# everything into a small corner of its sphere, and orders pairs no better than pixels do.
#
# In chapter 1 a pair of one digit was the closer of two pairs three times out of four. The exact figure, over all such pairs of
# pairs, is the area under a ROC curve.


# %%
def wrong_order(points, labels):
    first, second = torch.triu_indices(len(points), len(points), offset=1)
    same = labels[first] == labels[second]
    return 1 - roc_auc_score(same, -pairwise_distances(points)[first, second])


wrong = {name: wrong_order(points, labels[:2000]) for name, points in spaces.items()}
assert wrong["pixels"] > 0.2
assert wrong["untrained network"] > 0.2
assert wrong["trained network"] < 0.01 * wrong["pixels"]

# %% [markdown]
# Pairs in the wrong order have become rarer by a factor of more than a hundred. These images were trained on; for unseen ones the
# same holds, with a little less to spare.

# %%
assert wrong_order(queries[:2000], test_labels[:2000]) < 0.02 * wrong["pixels"]

# %% [markdown]
# ## A shadow: PCA
#
# Histograms tell how far, not where. To see where, points in 64 dimensions must be laid flat. The plainest way is a shadow: turn the
# cloud until it is as wide as can be, then drop all but two coordinates. These directions are the *principal components*, and the
# singular value decomposition finds them. On twelve embeddings by hand, and then by scikit-learn:

# %%
twelve = queries[:12]
centred = twelve - twelve.mean(dim=0)
directions = torch.linalg.svd(centred, full_matrices=False).Vh[:2]
by_hand = centred @ directions.T
by_library = torch.from_numpy(PCA(2).fit_transform(twelve.numpy()))
torch.testing.assert_close(by_hand.abs(), by_library.abs(), atol=1e-4, rtol=0)

# %% [markdown]
# They agree up to sign, since a direction and its opposite are equally wide. Now the shadow of 1 000 test digits (left), and how much of
# the variance each direction holds (right).

# %%
seen, seen_labels = queries[:2000], test_labels[:2000]
pca = PCA().fit(queries.numpy())
shares = pca.explained_variance_ratio_
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), width_ratios=[1.1, 1])
scatter_classes(pca.transform(seen[:1000].numpy())[:, :2], seen_labels[:1000], ax=left)
left.set(title="Two of 64 directions: some overlap")
left.set(xlabel="first component", ylabel="second component")
right.bar(range(1, 15), shares[:14], color=[SAME] * 9 + [DIFFERENT] * 5)
right.set(title="Nine hold nearly everything", xlabel="component", ylabel="share of variance")
plt.show()

# %% [markdown]
# Why nine? Ten classes are ten places, and ten places span nine directions, as three span a plane. The network was given 64 and uses
# as many as it needs. The shadow keeps two of the nine, so digits that overlap here may well be far apart. Shadows hide;
# they do not invent: what is apart in a shadow *is* apart.

# %%
assert shares[:9].sum() > 0.95
assert shares[:2].sum() < 0.6

# %% [markdown]
# ## Keeping the neighbours: t-SNE
#
# t-SNE gives up on distances and keeps *neighbours*: it moves points about on the plane until each has, as far as possible,
# the same neighbours as in the full space. Near stays near; how far is far is not kept. Left, 1 000 test images by their pixels; right, the
# same images by their embeddings.

# %%
flat = {
    "Neighbours by pixels": test_images[:1000].flatten(1),
    "Neighbours by embedding": seen[:1000],
}
for name, points in flat.items():
    flat[name] = TSNE(2, random_state=0).fit_transform(points.numpy())

# %%
figure, axes = plt.subplots(1, 2, figsize=(9, 4.1))
for ax, (name, points) in zip(axes, flat.items(), strict=True):
    scatter_classes(points, seen_labels[:1000], ax=ax).set(title=name, xticks=[], yticks=[])

# %% [markdown]
# By pixels, fours, sevens and nines share a continent, and threes, fives and eights another. By embedding each digit is an island. A few
# points are on the wrong one: we shall meet them below. No axis has ticks, because coordinates mean nothing here.

# %%
nearest_agrees = [
    recall_at_k(torch.from_numpy(points), seen_labels[:1000], k=1) for points in flat.values()
]
assert nearest_agrees[1] > 0.97
assert nearest_agrees[1] > nearest_agrees[0] + 0.02

# %% [markdown]
# ## Straight to the plane
#
# Both maps flatten 64 numbers afterwards. The third way is to ask the network for two numbers in the first place. They should be free on
# the plane, not on a circle, so `normalize=False`; and a margin of one between distances, not squared. One epoch over 20 000 images is enough
# for a picture.

# %%
flat_network, _ = load_or_fit(
    partial(EmbeddingNet, 2, normalize=False),
    images[:20_000],
    labels[:20_000],
    loss=TripletLoss(margin=1.0, squared=False),
    epochs=1,
    batch_size=256,
    progress=False,
)
flat_gallery, flat_queries = embed(flat_network, images[:20_000]), embed(flat_network, test_images)

# %% [markdown]
# As the plane is all there is, we can colour it: each spot gets the colour of the digit that most of its ten nearest training images
# are.

# %%
low, high = flat_queries.quantile(0.001, dim=0) - 0.5, flat_queries.quantile(0.999, dim=0) + 0.5
xs, ys = (torch.linspace(*ends, 150) for ends in zip(low.tolist(), high.tolist(), strict=True))
spots = torch.cartesian_prod(xs, ys)
land = KNNClassifier(flat_gallery[:5000], labels[:5000]).predict(spots).view(150, 150).T
figure, ax = plt.subplots(figsize=(6.4, 5))
colors = plt.matplotlib.colors.ListedColormap(PALETTE)
ax.pcolormesh(xs, ys, land, cmap=colors, vmin=-0.5, vmax=9.5, alpha=0.25, rasterized=True)
scatter_classes(flat_queries[:700], seen_labels[:700], ax=ax, size=6)
ax.set(xlim=xs[[0, -1]].tolist(), ylim=ys[[0, -1]].tolist(), aspect="equal")
ax.set(title="A network that draws its own map", xlabel="first number", ylabel="second number")
plt.show()

# %% [markdown]
# No flattening, so nothing is hidden: distances on this map are the network's own. But it is another network, with less room, and it pays for
# that: digits in the middle have neighbours on all sides. How
# well can a map alone tell digits apart?

# %%
shadow_gallery, shadow_queries = (
    torch.from_numpy(pca.transform(points.numpy())[:, :2]) for points in (gallery, queries)
)
by_shadow = knn_accuracy(shadow_queries, test_labels, shadow_gallery, labels)
by_flat = knn_accuracy(flat_queries, test_labels, flat_gallery, labels[:20_000])
by_all = knn_accuracy(queries, test_labels, gallery, labels)
assert max(by_shadow, by_flat) < by_all - 0.005

# %% tags=["nbval-ignore-output"]
print("shadow", by_shadow, "\nplane ", by_flat, "\nall 64", by_all)

# %% [markdown]
# ## How it unfolds
#
# What happens on the way? Train a fresh network for one epoch on 16 000 images and take a snapshot of 500 test embeddings
# at chosen steps. `fit` calls the *callback* after each step.

# %%
torch.manual_seed(1)
fresh = EmbeddingNet()
snapshots = {0: embed(fresh, test_images[:500])}


def take_snapshot(so_far):
    if len(so_far) in (3, 6, 10, 14, 20, 35, 63):
        snapshots[len(so_far)] = embed(fresh, test_images[:500])


small = images[:16_000], labels[:16_000]
fit(fresh, *small, epochs=1, batch_size=256, seed=1, callback=take_snapshot, progress=False)
print("snapshots after", ", ".join(map(str, snapshots)), "steps")

# %% [markdown]
# All snapshots get the *same* shadow, that of the last. If each had its own, the view would turn and zoom between panels, and we could
# not tell a movement of the points from a movement of the camera.

# %%
camera = PCA(2).fit(snapshots[63].numpy())
figure, axes = plt.subplots(2, 4, figsize=(9, 4.5), sharex=True, sharey=True)
for ax, (step, points) in zip(axes.flat, snapshots.items(), strict=True):
    scatter_classes(camera.transform(points.numpy()), test_labels[:500], ax=ax, size=3)
    ax.set(title=f"step {step}", aspect="equal")

# %% [markdown]
# It starts as a clot: all images point nearly the same way. First the clot only stirs; within a dozen steps it bursts, and digits
# drift to places of their own; afterwards they tighten. Most of the learning is done after a few thousand images, as the curve in
# chapter 4 said.

# %%
spread = {k: float((v - v.mean(dim=0)).norm(dim=1).mean()) for k, v in snapshots.items()}
mixed = {k: wrong_order(v, test_labels[:500]) for k, v in snapshots.items()}
assert spread[20] > 1.5 * spread[0]
assert mixed[63] < 0.1 * mixed[0]

# %% [markdown]
# ## Who is near?
#
# Maps of thousands of points show crowds. To see what *near* means, look at single images. First, queries on which pixels failed, as in
# chapter 1, each with its eight nearest training images. By hand, the nearest are the smallest of all distances; the classifier must agree.

# %%
pixels = images.flatten(1)
by_pixels = KNNClassifier(pixels, labels).predict(test_images.flatten(1))
failed = torch.nonzero(by_pixels != test_labels)[:5, 0]
found = pairwise_distances(queries[failed], gallery).topk(8, largest=False).indices
nearest = KNNClassifier(gallery, labels, k=1).predict(queries[failed])
assert (labels[found[:, 0]] == nearest).all()
figure = show_neighbours(test_images[failed], test_labels[failed], images[found], labels[found])
# %% [markdown]
# Blue frames are hits. The neighbours are no longer those with ink in the same places: they are shifted, slanted, thicker,
# thinner, and the same digit.
#
# How far does that go? Each digit has about 6 000 training images. So walk away from a query: its nearest image, the tenth, the
# hundredth, and so on to the last. The numbers above the first row are ranks.

# %%
ranks = [1, 10, 100, 1000, 3000, 5000, 7000, 20_000, 60_000]
some = torch.tensor([int(torch.nonzero(test_labels == digit)[3]) for digit in (2, 4, 5, 7, 8)])
order = pairwise_distances(queries[some], gallery).argsort(dim=1)
far = order[:, [rank - 1 for rank in ranks]]
figure = show_neighbours(test_images[some], test_labels[some], images[far], labels[far])
for ax, rank in zip(figure.axes[1:10], ranks, strict=True):
    ax.set_title(f"{rank:,}".replace(",", " "), fontsize=9)

# %% [markdown]
# Up to rank 5 000 it is the same digit, if an ever odder one. By rank 7 000 the digit has run out, and the next nearest begins. That is what
# R-precision measures: among as many neighbours as a class has members, how many belong to it?

# %%
members = labels.bincount()[test_labels[some]]
hits = [
    float((labels[row[:size]] == digit).float().mean())
    for row, size, digit in zip(order, members, test_labels[some], strict=True)
]
assert np.median(hits) > 0.95

# %% [markdown]
# ## Ten prototypes
#
# If each digit is one tight island, then ten points should be enough to say where they are. A class's *prototype* is the mean of its
# embeddings, brought back to the sphere. Forget the 60 000 training images and give each test image the label of the nearest of ten
# prototypes.

# %%
prototypes = torch.stack([gallery[labels == digit].mean(dim=0) for digit in range(10)])
assert prototypes.norm(dim=1).min() > 0.9
prototypes = F.normalize(prototypes)
by_prototype = pairwise_distances(queries, prototypes).argmin(dim=1)
assert float((by_prototype == test_labels).float().mean()) > 0.99

# %% [markdown]
# Ten points do as well as 60 000. A prototype is no image, but some are near it. From the top: the mean of each digit's *pixels*; the
# training image nearest to the prototype; the three that lie farthest from it.

# %%
to_prototype = pairwise_distances(gallery, prototypes)
rows = [torch.stack([images[labels == digit].mean(dim=0) for digit in range(10)])]
own = to_prototype.gather(1, labels[:, None])[:, 0]
order = [torch.nonzero(labels == digit)[:, 0] for digit in range(10)]
order = [members[own[members].argsort()] for members in order]
rows += [images[[int(members[k]) for members in order]] for k in (0, -1, -2, -3)]
colors = ["grey"] * 10 + [SAME] * 10 + [DIFFERENT] * 30
figure = show_images(torch.cat(rows), columns=10, colors=colors)
# %% [markdown]
# The mean of the pixels is a ghost: averaging images blurs them. The most typical image is a real one. The farthest are
# hard to read, or look mislabelled: such a list is a quick way to find mistakes in a data set.
#
# And how do the prototypes lie to one another? A small number between two digits says that the network finds them alike.

# %%
between = pairwise_distances(prototypes)
hide = torch.eye(10, dtype=torch.bool).numpy()
figure, ax = plt.subplots(figsize=(6.4, 5))
sns.heatmap(between, mask=hide, annot=True, fmt=".2f", cmap="cividis", ax=ax, annot_kws={"size": 8})
ax.grid(visible=False)
ax.set(title="Distances between the ten prototypes", xlabel="digit", ylabel="digit")
plt.show()

# %% [markdown]
# All pairs are far apart by the standard of the loss: its margin is 0.2 in squared distance, and even the closest pair has several times
# that. The members of a class keep close to their prototype.

# %%
closest = between[~torch.eye(10, dtype=torch.bool)].min()
assert closest**2 > 3 * 0.2
assert own.median() < closest / 3

# %% [markdown]
# ## The hardest triplets
#
# A triplet is *hard* if its negative is nearer than its positive. Among 2 000 test images there are more than 700 million triplets. How many
# are hard, and which is the worst? By hand the worst of an anchor is its farthest positive with its nearest negative;
# `mine_triplets` lists all the hard ones.

# %%
distances = pairwise_distances(seen, squared=True)
same = seen_labels[:, None] == seen_labels
farthest, positive = distances.masked_fill(~same, -1).max(dim=1)
closest, negative = distances.masked_fill(same, torch.inf).min(dim=1)
violation = farthest - closest

a, p, n = mine_triplets(seen, seen_labels, "hard")
torch.testing.assert_close((distances[a, p] - distances[a, n]).max(), violation.max())
triplets = int(same.sum(dim=1).sub(1).mul((~same).sum(dim=1)).sum())
print(f"{triplets:,} triplets; fewer than one in 200 is hard:", len(a) < triplets / 200)

# %% [markdown]
# These are not spread evenly. Count for each image in how many hard triplets it is the anchor, sort, and add up.

# %%
counts = a.bincount(minlength=2000).sort(descending=True).values
owned = counts.cumsum(0) / counts.sum()
ax = sns.lineplot(x=range(1, 2001), y=owned, color=DIFFERENT)
ax.axvline(20, color="grey", linestyle=":")
ax.annotate("20 images", (21, 0.05), color="grey")
ax.set(
    xscale="log", ylim=(0, 1.02), xlabel="anchors, the worst first", title="Few make the trouble"
)
ax.set_ylabel("share of all hard triplets")
assert owned[19] > 0.5

# %% [markdown]
# Twenty images in 2 000, one in a hundred, are the anchors of most hard triplets. Who are they? Six of the worst (top), each above the positive it
# is farthest from and the negative it is nearest to, with the squared distances.

# %%
worst = violation.argsort(descending=True)[:6]
trio = torch.cat([worst, positive[worst], negative[worst]])
titles = [f"a {digit}" for digit in seen_labels[worst]]
titles += [
    f"a {seen_labels[i]}: {d:.2f}" for i, d in zip(positive[worst], farthest[worst], strict=True)
]
titles += [
    f"a {seen_labels[i]}: {d:.2f}" for i, d in zip(negative[worst], closest[worst], strict=True)
]
frames = ["black"] * 6 + [SAME] * 6 + [DIFFERENT] * 6
figure = show_images(test_images[trio], titles, columns=6, colors=frames, size=1.2)
# %% [markdown]
# The anchors are odd, the negatives are often neat. A loss that listens to the hardest triplets only, as in the collapse of chapter 4, listens
# to images like these all day.

# %% [markdown]
# ## The errors that remain
#
# Of 10 000 test images, these are all that kNN gets wrong, each with what was meant and what the network said. They are sorted by how sure it
# is: in the first it hardly prefers its answer to the truth; in the last it does so by far.

# %%
answers = KNNClassifier(gallery, labels).predict(queries)
errors = torch.nonzero(answers != test_labels)[:, 0]
far = pairwise_distances(queries[errors], prototypes, squared=True)
truth, answer = (far.gather(1, digits[errors, None])[:, 0] for digits in (test_labels, answers))
errors = errors[(truth - answer).argsort()]
titles = [f"{test_labels[i]}, not {answers[i]}" for i in errors]
figure = show_images(test_images[errors], titles, columns=12, size=0.8)
assert 20 < len(errors) < 100

# %% [markdown]
# Cover the titles and try it yourself. Some you will get right; on others you and the label will differ, too. When the remaining errors look like
# this, there is little left to win on this test set.

# %% [markdown]
# ## Who is taken for whom
#
# Count the errors by true digit and answer, for pixels on the left and for embeddings on the right: a *confusion matrix*. The right answers on the
# diagonal are left out. They are hundreds of times more, and would make everything else invisible.

# %%
figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True)
wrong_counts = {}
for ax, name, said in zip(axes, ("pixels", "embeddings"), (by_pixels, answers), strict=True):
    counts = confusion_matrix(test_labels, said)
    np.fill_diagonal(counts, 0)
    wrong_counts[name] = counts.sum()
    text = np.where(counts, counts, "")
    sns.heatmap(
        counts, annot=text, fmt="", cmap="Blues", vmax=25, cbar=False, ax=ax, linewidths=0.5
    )
    ax.set(title=f"Errors by {name}", xlabel="answer", ylabel="truth")
assert 4 * wrong_counts["embeddings"] < wrong_counts["pixels"]

# %% [markdown]
# Pixels have favourite mistakes: fours become nines, twos and eights become whatever lies in the same place, and much turns into a one,
# because thin strokes are near to everything. With the network the columns are gone. A few errors are left here and there, where people
# hesitate too.

# %% [markdown]
# ## What the network looks at
#
# Which pixels matter? Change some and see how far the embedding moves away from its prototype. One way is to rub out a small square, in each
# place in turn. The other is to ink one in. Each pixel's score is the mean over all squares that cover it.


# %%
def square_masks(size=5):
    start, place = torch.arange(29 - size)[:, None], torch.arange(28)
    inside = (place >= start) & (place < start + size)
    return (inside[:, None, :, None] & inside[None, :, None, :]).flatten(0, 1)


def importance(image, prototype, value):
    masks = square_masks()
    changed = torch.where(masks[:, None], value, image)
    before, *after = ((embed(network, torch.cat([image, changed])) - prototype) ** 2).sum(dim=1)
    gain = torch.stack(after) - before
    return gain, (gain[:, None, None] * masks).sum(dim=0) / masks.sum(dim=0)


# %%
digits = (0, 3, 4, 7, 9)
typical = torch.tensor([int(torch.nonzero(test_labels == digit)[4]) for digit in digits])
figure, axes = plt.subplots(2, len(digits), figsize=(7, 3))
for row, value, word in zip(axes, (images.min(), images.max()), ("rub out", "ink in"), strict=True):
    row[0].set_ylabel(word)
    for ax, digit, index in zip(row, digits, typical, strict=True):
        image = test_images[index : index + 1]
        _, score = importance(image, prototypes[digit], value)
        ax.imshow(score, cmap="magma_r", vmin=0, vmax=1)
        ax.contour(image[0, 0], [0.5], colors="black", linewidths=1)
        ax.set(xticks=[], yticks=[])

# %% [markdown]
# Dark is where a change moves the image away. In the upper row that is the ink which carries the meaning: the left side of the zero, the foot
# of the seven. The lower row shows what the *empty* places mean: ink in the opening of the four, for one, makes something else of it. Rubbing out can never find
# these, because where there is no ink nothing changes:

# %%
image = test_images[typical[2]][None]
rubbed, _ = importance(image, prototypes[4], images.min())
inked, _ = importance(image, prototypes[4], images.max())
no_ink = ~((image[0, 0] > images.min()) & square_masks()).flatten(1).any(dim=1)
assert rubbed[no_ink].abs().max() < 1e-4
assert inked[no_ink].max() > 0.05

# %% [markdown]
# Read such maps with care. A square of ink is nothing that anyone writes, and a network may answer oddly to odd images. Another size of square
# gives another map. And it tells *that* a place matters, for this image and this network; not how the network thinks.

# %% [markdown]
# ## A walk between two digits
#
# What lies between a four and a nine? On the sphere the shortest way from one point to another is an arc of a *great circle*. The straight line
# would cut through the ball, where no embedding ever is. A quarter circle in four steps, by hand:


# %%
def great_circle(start, end, steps):
    angle = torch.acos(start @ end)
    t = torch.linspace(0, 1, steps)[:, None]
    return (((1 - t) * angle).sin() * start + (t * angle).sin() * end) / angle.sin()


east, north = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
degrees = torch.tensor([0.0, 30.0, 60.0, 90.0]).deg2rad()
by_hand = torch.stack([degrees.cos(), degrees.sin()], dim=1)
torch.testing.assert_close(great_circle(east, north, 4), by_hand)
assert ((east + north) / 2).norm() < 0.8

# %% [markdown]
# Walk from one test image to another in eleven equal steps and show, at each step, the *real* training image whose embedding is nearest. The
# frame has the colour of its digit.

# %%
walks = [(4, 9), (3, 5), (1, 7), (6, 0), (2, 2)]
at = [
    [torch.nonzero(test_labels == digit)[place, 0] for place, digit in ((5, s), (6, e))]
    for s, e in walks
]
paths = [great_circle(queries[start], queries[end], 11) for start, end in at]
away, met = zip(*(pairwise_distances(path, gallery).min(dim=1) for path in paths), strict=True)
met = torch.cat(met)
frames = [PALETTE[digit] for digit in labels[met]]
figure = show_images(
    images[met], [str(int(digit)) for digit in labels[met]], columns=11, colors=frames
)
# %% [markdown]
# The images change from one digit to the other with a sudden step rather than a slow one; the last row, from a two to another two, stays within its
# class. In the middle of the other rows stand odd images that are a bit of both, and the same one may come several times. Is there nobody else? Measure how
# far the nearest image is.

# %%
figure, ax = plt.subplots()
colors = [PALETTE[7], PALETTE[1], DIFFERENT, PALETTE[4], SAME]
for (start, end), path, color in zip(walks, away, colors, strict=True):
    ax.plot(range(11), path, "o-", color=color, linewidth=3, label=f"{start} to {end}")
ax.set(title="Between two digits images are rarer", xlabel="step of the walk", ylim=(0, None))
ax.set_ylabel("distance to the nearest image")
ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
plt.show()

# %% [markdown]
# Halfway between two digits the nearest image is farther away than halfway between two twos, where there are other twos. That is what a
# margin is for. (A walk may also begin far from everything, at an odd image.)

# %%
halfway = torch.stack([path[5] for path in away])
assert halfway[:4].mean() > 1.3 * halfway[4]

# %% [markdown]
# ## When it goes wrong: reading too much into t-SNE
#
# Islands on a map invite stories: this one is large, so the digit is varied; those two are close, so they are alike. Test it where the truth is
# known. Three clusters in ten dimensions: one wide, two narrow; the narrow ones are close to each other and far from the wide one.

# %%
draw = torch.Generator().manual_seed(0)
widths = torch.tensor([2.0, 0.2, 0.2])
centres = torch.zeros(3, 10)
centres[:, 0] = torch.tensor([0.0, 25.0, 30.0])
which = torch.arange(3).repeat_interleave(80)
true_points = centres[which] + widths[which, None] * torch.randn(240, 10, generator=draw)
maps = {"the truth (two of ten axes)": true_points[:, :2]}
for perplexity in (5, 15, 30):
    tsne = TSNE(2, perplexity=perplexity, random_state=0)
    maps[f"t-SNE, perplexity {perplexity}"] = torch.from_numpy(tsne.fit_transform(true_points))

# %%
figure, axes = plt.subplots(1, 4, figsize=(9.5, 2.8))
for ax, (name, points) in zip(axes, maps.items(), strict=True):
    ax.scatter(*points.T, s=8, color=[PALETTE[cluster] for cluster in which.tolist()])
    ax.set(title=name, xticks=[], yticks=[], aspect="equal", adjustable="datalim")
    ax.title.set_fontsize(10)

# %% [markdown]
# t-SNE gives each point as much room as it needs to tell its neighbours apart, so a narrow cluster comes out as large as a wide one. And
# *perplexity*, roughly the number of neighbours that count, changes the layout. Neither sizes nor gaps can be read off.


# %%
def width(points, cluster):
    return float(points[which == cluster].std(dim=0).norm())


ratios = {name: width(points, 0) / width(points, 1) for name, points in maps.items()}
assert ratios["the truth (two of ten axes)"] > 7
assert max(list(ratios.values())[1:]) < 3

# %% [markdown]
# It gets worse. Here are 300 points that are pure noise: one cloud, no clusters at all. A low perplexity draws clumps regardless.

# %%
noise = torch.randn(300, 50, generator=draw).numpy()
figure, axes = plt.subplots(1, 3, figsize=(8.4, 2.9))
for ax, perplexity in zip(axes, (3, 30, 100), strict=True):
    points = TSNE(2, perplexity=perplexity, random_state=0).fit_transform(noise)
    ax.scatter(*points.T, s=6, color="grey")
    ax.set(title=f"Noise, perplexity {perplexity}", xticks=[], yticks=[])

# %% [markdown]
# The mend: use the map to find questions, and answer them in the full space. How wide is a class, how far are two apart? Measure, as in *Ten
# prototypes*. A shadow by PCA keeps such measures, as far as it shows them.

# %%
shadow = torch.from_numpy(PCA(2).fit_transform(true_points.numpy()))
middles = torch.stack([shadow[which == cluster].mean(dim=0) for cluster in range(3)])
torch.testing.assert_close(
    pairwise_distances(middles), pairwise_distances(centres), atol=1.0, rtol=0
)
assert width(shadow, 0) / width(shadow, 1) > 7

# %% [markdown]
# ## Exercises
#
# **1.** How many principal components of the embeddings are needed to classify as well as with all 64? Try 1, 2, 3, 5 and 9, with the first
# 10 000 training images as gallery.

# %% jupyter={"source_hidden": true}
scores = {}
for components in (1, 2, 3, 5, 9, 64):
    known, asked = (
        torch.from_numpy(pca.transform(points.numpy())[:, :components])
        for points in (gallery[:10_000], queries)
    )
    scores[components] = knn_accuracy(asked, test_labels, known, labels[:10_000])
assert scores[2] < scores[64] - 0.01
assert scores[9] > scores[64] - 0.003

# %% [markdown]
# **2.** Train the two-dimensional network on the *circle*, with `normalize=True` and the loss's usual margin. Why is it so much worse than on the plane?

# %% jupyter={"source_hidden": true}
circle_network, _ = load_or_fit(
    partial(EmbeddingNet, 2),
    images[:20_000],
    labels[:20_000],
    epochs=1,
    batch_size=256,
    progress=False,
)
on_circle = knn_accuracy(
    embed(circle_network, test_images),
    test_labels,
    embed(circle_network, images[:20_000]),
    labels[:20_000],
)
# On a circle every digit has two neighbours only, and to change places it must pass through them.
assert on_circle < by_flat - 0.05

# %% [markdown]
# **3.** The network gives an embedding to any image, digit or not. Can you tell shirts from digits by how far they lie from the nearest training
# image? Use `load_fashion_mnist("test")` and compare with the test digits.

# %% jupyter={"source_hidden": true}
clothes, _ = load_fashion_mnist("test")
known = embed(network, clothes[:2000])
lonely = [pairwise_distances(points, gallery).amin(dim=1) for points in (seen, known)]
is_shirt = torch.arange(2).repeat_interleave(2000)
assert roc_auc_score(is_shirt, torch.cat(lonely)) > 0.9

# %% [markdown]
# ## Summary
#
# - A histogram of distances tells whether an embedding works; a map tells where; single images tell why.
# - PCA is a shadow, t-SNE keeps neighbours, a 2-D network draws its own map. Each hides something else.
# - Ten prototypes classify as well as 60 000 neighbours; between two digits images are rarer.
# - Few images make most hard triplets; what is still wrong is hard for people, too.
# - Never read sizes or gaps off t-SNE: measure in the full space.
#
# **Next** [6 · Three ways](06_three_ways.ipynb) compares triplets with pairs and with a linear map, side by side.
#
# ## References
#
# - L. van der Maaten, G. Hinton, "Visualizing data using t-SNE", 2008.
# - M. Wattenberg, F. Viégas, I. Johnson, "How to use t-SNE effectively", 2016.
# - R. Hadsell, S. Chopra, Y. LeCun, "Dimensionality reduction by learning an invariant mapping", 2006 (networks that draw maps).
# - M. D. Zeiler, R. Fergus, "Visualizing and understanding convolutional networks", 2014 (rubbing out).
# - J. Snell, K. Swersky, R. Zemel, "Prototypical networks for few-shot learning", 2017.
