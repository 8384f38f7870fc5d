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
# # 2 · Triplets: what to ask of a distance
#
# *Same nearer than different*: this chapter turns four words into a number that a computer can make small. At its end, a
# batch's twelve million triplets are compared, exactly, in about a hundredth of a second, and not one of them is ever listed.
#
# - **You will learn** what anchor, positive, negative and margin are, how many triplets a batch holds, which of them are hard
#   (wrong), semi-hard (right, but too narrowly) or easy (solved), four ways to choose among them, how to read the loss, and how
#   sorting replaces the loop over triplets.
# - **You need** the digits of chapter [1](01_data.ipynb) and to know what a gradient is; no network and no GPU.
# - **Running time** about 25 seconds on two cores.
# - Previous: [1 · Data](01_data.ipynb) · Next: [3 · Network](03_network.ipynb)

# %%
import itertools
import time
from collections import Counter
from functools import partial

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
import torch
import torch.nn.functional as F
from matplotlib.offsetbox import AnnotationBbox, OffsetImage

from tripletlib import (
    TripletLoss,
    batch_all_triplet_loss,
    describe_triplets,
    load_mnist,
    mine_triplets,
    pairwise_distances,
)
from tripletlib.plotting import DIFFERENT, PALETTE, SAME, show_images, use_theme

use_theme()
images, labels = load_mnist("train")

# %% [markdown]
# ## What we want, in one sentence
#
# In chapter 1 a shift by two pixels undid pixel distance. What should a better distance do? *An image is nearer to an image of
# its own class than to an image of another.* The sentence speaks of three images: the **anchor**, from which we measure; a
# **positive**, another image of the anchor's class; and a **negative**, an image of another class. Together they are a
# **triplet**.
#
# Twelve digits will do for most of this chapter: five nines, four fours and three ones, the first of each in the training set.

# %%
rows = [torch.nonzero(labels == digit)[:count, 0] for digit, count in ((9, 5), (4, 4), (1, 3))]
digits, classes = images[torch.cat(rows)], labels[torch.cat(rows)]
print(digits.shape, classes.tolist())

# %% [markdown]
# Here is one triplet of them, with pixel distances (Euclidean, not squared). It breaks the sentence: to pixels, this nine is
# more like a four than like another nine.

# %% alt="Three handwritten digits: a nine as anchor, another nine as its positive at pixel distance 25.7, and a four as its negative, nearer at 22.1."
in_pixels = pairwise_distances(digits.flatten(1))
titles = ["anchor", f"positive: {in_pixels[2, 0]:.1f}", f"negative: {in_pixels[2, 6]:.1f}"]
show_images(digits[[2, 0, 6]], titles, columns=3, colors=["black", SAME, DIFFERENT], size=1.9)
plt.show()
assert classes[2] == classes[0] != classes[6]
assert in_pixels[2, 0] > in_pixels[2, 6]

# %% [markdown]
# A triplet never says what an image *is*, nor how far is far. It only compares. That is why people can supply triplets where
# they cannot supply names ("these two photographs show one person, that one shows another"), and why what is learned from
# triplets can be used on classes that were never seen (chapter [8](08_image_retrieval.ipynb) tries it).
#
# "Nearer" could be met by a hair. So we ask for more: the negative is to be farther than the positive by a **margin**.

# %% alt="Drawing: an anchor in the middle of two circles. The positive on the inner circle is pulled in; the negative inside it is pushed out, past the outer circle, which is larger by the margin."
figure, ax = plt.subplots(figsize=(6.4, 4.1))
for radius, line in ((1.5, "-"), (2.1, "--")):
    ax.add_patch(plt.Circle((0, 0), radius, fill=False, color="grey", linestyle=line, lw=1.5))
arrow = {"arrowstyle": "-|>", "lw": 3, "mutation_scale": 22}
ax.annotate("", (-0.65, 0.37), (-1.2, 0.69), arrowprops=arrow | {"color": SAME})
ax.annotate("", (2.3, 0.84), (1.0, 0.36), arrowprops=arrow | {"color": DIFFERENT})
ax.annotate("", (1.45, -1.45), (1.07, -1.07), arrowprops={"arrowstyle": "<->", "color": "black"})
ax.plot(0, 0, "s", color="black", markersize=15)
ax.plot(-1.3, 0.75, "o", color=SAME, markersize=15)
ax.plot(0.9, 0.33, "X", color=DIFFERENT, markersize=16)
words = {"font": {"size": 12}, "ha": "center"}
ax.text(0, -0.36, "anchor", **words)
ax.text(-2.0, 1.0, "positive:\npull", color=SAME, ha="right", fontsize=12)
ax.text(2.4, 0.8, "negative:\npush", color=DIFFERENT, ha="left", fontsize=12)
ax.text(1.5, -1.5, "margin", ha="left", va="top", fontsize=12)
ax.set(xlim=(-3.1, 3.4), ylim=(-2.2, 2.2), aspect="equal")
ax.set_title("Pull the positive in, push the negative out, until the margin is kept")
ax.axis("off")
plt.show()

# %% [markdown]
# ## From a sentence to a loss
#
# To learn, we need a number that says how badly the sentence is broken. Write d(a, p) and d(a, n) for the distances from the
# anchor to the positive and to the negative, m for the margin, and count what is missing:
#
# $$\text{loss} = \max\bigl(0,\; d(a, p) - d(a, n) + m\bigr)$$

# %% [markdown]
# A function max(0, x), flat up to a bend and rising from there, is called a **hinge**, and this is the **triplet loss**; before
# networks, **LMNN** (large margin nearest neighbour, 2009) learned a linear map with such hinges. From here on d is the
# *squared* Euclidean distance, as in the FaceNet paper (2015); it needs no root, and the end of the chapter shows what a root
# can do. The margin is FaceNet's 0.2 where nothing else is said.

# %%
MARGIN = 0.2


def hinge(to_positive, to_negative):
    return (to_positive - to_negative + MARGIN).clamp(min=0)


# %% [markdown]
# Fix the positive at d(a, p) = 0.5 and let the negative move outwards, from left to right. It crosses three regions, and this
# book uses their names all the time.

# %% alt="The loss against the squared distance of the negative: it falls in a straight line through the regions hard and semi-hard, reaches zero where the margin is kept, and stays zero in the region easy."
KINDS = {"hard": (PALETTE[5], "xx"), "semi-hard": (PALETTE[8], ".."), "easy": (PALETTE[2], "")}
ends = {"hard": (0, 0.5), "semi-hard": (0.5, 0.7), "easy": (0.7, 1.2)}
figure, ax = plt.subplots(figsize=(7, 3.6))
for kind, (color, hatch) in KINDS.items():
    ax.axvspan(*ends[kind], facecolor=(*color, 0.3), hatch=hatch, edgecolor=(*color, 0.7), lw=0)
    ax.annotate(kind, (sum(ends[kind]) / 2, 0.76), ha="center", weight="bold")
outwards = torch.linspace(0, 1.2, 241)
ax.plot(outwards, hinge(torch.tensor(0.5), outwards), color="black", lw=2.5)
ax.set(title="The loss is how far the negative falls short", ylabel="loss")
ax.set(xlabel="squared distance from anchor to negative, d(a, n)", xlim=(0, 1.2))
ax.set_ylim(-0.02, 0.85)
ax.set_xticks([0, 0.5, 0.7], ["0", "d(a, p)", "d(a, p) + m"])
ax.grid(False)
plt.show()

# %% [markdown]
# A **hard** negative is nearer than the positive. A **semi-hard** one is in the right order, but inside the margin. An
# **easy** one is beyond the margin, and costs nothing.
#
# Look at the slope, too. It is −1 where there is a loss and 0 where there is none. An easy triplet teaches nothing at all, and
# the hardest one has no steeper slope than one that is nearly right.

# %%
for where, slope in ((0.3, -1.0), (0.6, -1.0), (0.8, 0.0)):
    at = torch.tensor(where, requires_grad=True)
    hinge(torch.tensor(0.5), at).backward()
    print(f"d(a, n) = {where}: slope {at.grad + 0.0:.0f}")
    assert at.grad == slope

# %% [markdown]
# ## Twelve digits in the plane
#
# So that everything can be drawn, each digit gets a point in the plane: the plane in which the twelve images spread most, that
# of their first two principal components (**PCA**, principal component analysis; chapter [5](05_visualization.ipynb) says
# more). Divided by 20, so that distances come out around one. Points that stand for images are called **embeddings**. These are
# poor ones, and that makes them interesting.

# %%
centred = digits.flatten(1) - digits.flatten(1).mean(dim=0)
directions = torch.linalg.svd(centred, full_matrices=False).Vh[:2]
points = centred @ directions.T / 20
distances = pairwise_distances(points, squared=True)
print(points.shape, distances.shape)


# %% alt="Twelve digits in the plane of their first two principal components. A nine, a one and two fours lie apart from their own class and next to another."
def place_digits(ax, points, zoom=1.0):
    for image, label, point in zip(digits, classes.tolist(), points.tolist(), strict=True):
        frame = {"edgecolor": PALETTE[label], "linewidth": 2.5, "boxstyle": "round,pad=0.05"}
        picture = OffsetImage(image[0, 2:26, 2:26], cmap="gray_r", zoom=1.2 * zoom)
        ax.add_artist(AnnotationBbox(picture, point, bboxprops=frame, pad=0.1))
    ax.plot(*points.T, linestyle="none")
    ax.margins(0.08)
    ax.set_aspect("equal")


figure, ax = plt.subplots(figsize=(8, 5.6))
place_digits(ax, points)
ax.set(title="Each class has a member whose nearest neighbour is of another")
ax.set(xlabel="first component", ylabel="second component")
plt.show()
nearest = distances.clone().fill_diagonal_(torch.inf).argmin(dim=1)
strays = classes[classes[nearest] != classes].tolist()
print("nearest neighbour of another class:", strays)
assert set(strays) == {9, 4, 1}

# %% [markdown]
# ## How many triplets?
#
# Count them with three loops. The anchor may be any digit, the positive another digit of the same class, the negative any
# digit of another class: then the triplet is **valid**. On the way, count how many break the sentence, in pixels and in the
# plane.

# %%
count, broken = 0, Counter()
for i, j, k in itertools.product(range(12), repeat=3):
    if i != j and classes[i] == classes[j] and classes[i] != classes[k]:
        count += 1
        broken["in pixels"] += int(in_pixels[i, k] < in_pixels[i, j])
        broken["in the plane"] += int(distances[i, k] < distances[i, j])
print(count, "triplets of twelve digits, broken:", dict(broken))

# %% [markdown]
# About a quarter, either way. Now count without loops. In the picture each row is an anchor; its cells p are its positives, its
# cells n its negatives. Each p makes a triplet with each n *of the same row*. The framed row, a nine, has 4 positives and 7
# negatives: 28 triplets.

# %% alt="A table of twelve by twelve digits. In each row, cells of the anchor's own class are marked p and cells of other classes n; the framed row of a nine has four p and seven n."
same = classes[:, None] == classes
roles = same.long() + torch.eye(12, dtype=torch.long)
letters = [["np "[role] for role in row] for row in roles.tolist()]
names = classes.tolist()
figure, ax = plt.subplots(figsize=(5, 4.5))
look = {"cbar": False, "linewidths": 2, "xticklabels": names, "yticklabels": names}
colors = sns.color_palette([DIFFERENT, SAME, "white"])
sns.heatmap(roles, ax=ax, cmap=colors, annot=pd.DataFrame(letters).to_numpy(), fmt="", **look)
ax.add_patch(plt.Rectangle((0, 2), 12, 1, fill=False, edgecolor="black", lw=3))
ax.set(title="A triplet is a p and an n of one row", ylabel="anchor")
ax.set(xlabel="positive (p, blue) or negative (n, orange)")
plt.yticks(rotation=0)
plt.show()

# %% [markdown]
# A class with k of the n images has k such rows, each with k − 1 positives and n − k negatives. Add up over the classes:
#
# $$\text{number of triplets} = \sum_{\text{classes}} k\,(k - 1)\,(n - k)$$
#
# The loops, the formula and the library agree.


# %%
def count_triplets(sizes):
    n = sum(sizes)
    return sum(k * (k - 1) * (n - k) for k in sizes)


counted = [count_triplets([5, 4, 3]), describe_triplets(points, classes).triplets]
counted.append(len(mine_triplets(points, classes)[0]))
print("loops", count, "· formula", counted[0], "· library", counted[1:])
assert counted == [count] * 3

# %% [markdown]
# Three factors, so with a fixed number of classes the number grows with the *cube* of the batch. Chapter [4](04_training.ipynb) trains with
# batches of 512 images of ten classes. And all of MNIST as one batch? At a microsecond each, looking once at every triplet would take
# more than seven months.

# %%
batch_of_512 = count_triplets([52] * 2 + [51] * 8)
all_of_mnist = count_triplets(labels.bincount().tolist())
days = all_of_mnist / 1e6 / 3600 / 24
print(f"{batch_of_512:,} in a balanced batch of 512")
print(f"{all_of_mnist:,} in MNIST: {days:.0f} days at a microsecond each")
assert round(batch_of_512 / 1e6, 1) == 11.8
assert days > 7 * 31

# %% [markdown]
# ## Easy, semi-hard, hard
#
# In the plane the three regions become a disc, a ring and the rest. The disc reaches as far as the positive. Its radius is
# √d(a, p), because d is squared; the ring ends at √(d(a, p) + m). Below, one nine is the anchor, and in each half another nine
# is its positive. Crosses are negatives.


# %%
def draw_regions(ax, anchor, positive):
    centre, edge = points[anchor], distances[anchor, positive]
    ax.set_facecolor((*KINDS["easy"][0], 0.25))
    for kind, squared_radius in (("semi-hard", edge + MARGIN), ("hard", edge)):
        color, hatch = KINDS[kind]
        for face, pattern in (("white", ""), ((*color, 0.35), hatch)):
            look = {"facecolor": face, "hatch": pattern, "edgecolor": (*color, 0.7), "lw": 0}
            ax.add_patch(plt.Circle(centre, squared_radius.sqrt(), **look))
    ax.plot(*points[~same[anchor]].T, "X", color="black", markersize=10, markeredgecolor="white")
    for name, index, marker, color, offset in (
        ("anchor", anchor, "s", "black", -20),
        ("positive", positive, "o", SAME, 11),
    ):
        ax.plot(*points[index], marker, color=color, markersize=11, markeredgecolor="white")
        box = {"facecolor": "white", "alpha": 0.8, "lw": 0, "pad": 1}
        place = {"xytext": (0, offset), "textcoords": "offset points", "ha": "center"}
        ax.annotate(name, points[index], bbox=box, **place)
    ax.set(xlim=(centre[0] - 0.65, centre[0] + 0.65), ylim=(centre[1] - 0.65, centre[1] + 0.65))
    ax.grid(False)
    ax.set_aspect("equal")


# %% alt="Two maps around one anchor: a hatched disc of hard places, a dotted ring of semi-hard ones and the rest easy. With a near positive the nearer negative lies in the ring, with a far positive it lies in the disc."
figure, axes = plt.subplots(1, 2, figsize=(7.8, 4.3))
for ax, positive, title in zip(
    axes, (1, 4), ("Near positive: none is hard", "Far positive: one is hard"), strict=True
):
    draw_regions(ax, 2, positive)
    ax.set(title=title, xlabel="first component")
axes[0].set_ylabel("second component")
handles = [
    plt.Rectangle((0, 0), 1, 1, facecolor=(*color, 0.35), edgecolor=color, hatch=hatch)
    for color, hatch in KINDS.values()
]
figure.legend(handles, list(KINDS), loc="outside lower center", ncols=3)
plt.show()
hard_ones = [int((distances[2, ~same[2]] < distances[2, positive]).sum()) for positive in (1, 4)]
print("hard negatives:", hard_ones)
assert hard_ones == [0, 1]

# %% [markdown]
# The nearer cross is semi-hard on the left and hard on the right. So these are words for *triplets*, not for images: it takes
# all three to tell. A small surprise of the squared distance: the ring has the same area, π m, however far the positive is. It
# only gets thinner.
#
# Now sort all 290 triplets by hand into the three kinds, and compare with what the library lists for each.

# %%
a, p, n = mine_triplets(points, classes)
is_hard = distances[a, n] < distances[a, p]
is_active = distances[a, n] < distances[a, p] + MARGIN
by_hand = {"hard": is_hard, "semihard": is_active & ~is_hard, "easy": ~is_active}
for kind, members in by_hand.items():
    mined = torch.stack(mine_triplets(points, classes, kind, margin=MARGIN), dim=1)
    print(f"{kind:<9}{int(members.sum()):>4} by hand{len(mined):>5} from the library")
    assert sorted(mined.tolist()) == sorted(torch.stack([a, p, n], dim=1)[members].tolist())

# %% [markdown]
# Hard and semi-hard triplets together are the **active** ones: they have a positive loss. Here 76 + 38 = 114 of 290 are
# active.
#
# 0.2 of what? A margin means something only beside the distances it is added to. Make all embeddings twice as long, and
# squared distances grow fourfold: the same 0.2 asks for a quarter of what it did. Hard ones stay hard; many that were
# semi-hard become easy.

# %%
doubled = describe_triplets(2 * points, classes, MARGIN)
quarter = describe_triplets(points, classes, MARGIN / 4)
for name, state in (("embeddings × 2", doubled), ("margin / 4", quarter)):
    print(f"{name:<15} hard {state.hard * 290:.0f}, semi-hard {state.semihard * 290:.0f}")
assert (doubled.hard, doubled.semihard) == (quarter.hard, quarter.semihard)

# %% [markdown]
# So the choice of a margin is a choice of scale. Chapter 3 settles the scale by putting all points on a sphere of radius one,
# where squared distances run from 0 to 4.
#
# ## The loss on twelve digits
#
# Add up the losses of all triplets, one by one, in plain Python. To look at every triplet of a batch is called **batch-all**.

# %%
total, active_count = 0.0, 0
for i, j, k in zip(a.tolist(), p.tolist(), n.tolist(), strict=True):
    triplet_loss = max(0.0, float(distances[i, j]) - float(distances[i, k]) + MARGIN)
    total += triplet_loss
    active_count += triplet_loss > 0
print(f"sum {total:.1f} over {active_count} active of {len(a)} triplets")
assert active_count == int(is_active.sum()) == 76 + 38

# %% [markdown]
# A sum depends on the size of the batch, so one takes a mean. Over what? Over all valid triplets, or over the active ones
# only, as Hermans and others (2017) propose. The library offers all three **reductions**, each by hand on the left and from the
# library on the right:

# %%
means = {"sum": total, "mean": total / len(a), "active": total / active_count}
for reduction, mean_by_hand in means.items():
    by_library = batch_all_triplet_loss(points, classes, MARGIN, reduction=reduction)
    print(f"{reduction:<7}{mean_by_hand:>7.3g}{float(by_library):>7.3g}")
    assert abs(float(by_library) - mean_by_hand) < 1e-5 * mean_by_hand

# %% [markdown]
# ## What the loss asks of the points
#
# Where should the three points of an active triplet go? The gradient tells, and it is short. A step *against* it pulls the
# positive towards the anchor, pushes the negative away from the anchor, and moves the anchor along the direction from the
# negative to the positive. Each part of the gradient is twice as long as the line it follows, because the derivative of x² is
# 2x.

# %%
tip_a, tip_p, tip_n = (points[i].clone().requires_grad_() for i in (2, 4, 9))
hinge((tip_a - tip_p).square().sum(), (tip_a - tip_n).square().sum()).backward()
torch.testing.assert_close(-tip_p.grad, 2 * (tip_a - tip_p).detach())
torch.testing.assert_close(-tip_n.grad, 2 * (tip_n - tip_a).detach())
torch.testing.assert_close(-tip_a.grad, 2 * (tip_p - tip_n).detach())
after = {"positive": tip_p, "negative": tip_n, "anchor": tip_a}
print({name: [round(-x, 2) for x in point.grad.tolist()] for name, point in after.items()})

# %% [markdown]
# The push on the negative is 2 (n − a). So the worst mistake, a negative that lies *on top of* its anchor, gets almost no
# push. The loss is largest there, yet the gradient with respect to the point vanishes. With a distance that is not squared the
# push has length one wherever the triplet is active, but exactly on the anchor, where it has no direction.

# %% alt="The length of the push on a negative against its distance from the anchor. With squared distance it rises from zero in proportion to the distance and drops to zero beyond the margin; with plain distance it is one up to the margin."
reach = torch.linspace(0.001, 1.1, 1100)
ways_to_measure = {"squared": (torch.square, 0.5), "not squared": (torch.clone, 0.5**0.5)}
ax = plt.gca()
for (name, (measure, to_positive)), line in zip(ways_to_measure.items(), ("-", "--"), strict=True):
    moved = reach.clone().requires_grad_()
    hinge(torch.tensor(to_positive), measure(moved)).sum().backward()
    ax.plot(reach, -moved.grad, line, color="black", lw=2.5)
    print(f"{name}: push {-moved.grad[49]:.1f} at distance 0.05, {-moved.grad[799]:.1f} at 0.8")
ax.annotate("squared distance: 2 ‖n − a‖", (0.6, 1.25), ha="right")
ax.annotate("distance not squared: 1", (0.04, 1.05))
ax.axvline(0.5**0.5, color=SAME, lw=2)
ax.annotate(" positive", (0.5**0.5, 0.1), color=SAME)
ax.set(title="A negative on top of its anchor is hardly pushed", ylim=(-0.05, 1.8), xlim=(0, 1.1))
ax.set(
    xlabel="distance from anchor to negative, ‖n − a‖ (not squared)", ylabel="length of the push"
)
plt.show()

# %% [markdown]
# Now let all 290 triplets pull at once, and follow them: a step against the gradient, again and again. There is no network
# yet; every point moves freely.


# %%
def loss_over(reduction):
    return partial(batch_all_triplet_loss, margin=MARGIN, reduction=reduction)


def descend(points, classes, loss, steps, rate):
    states = [points]
    for _ in range(steps):
        now = states[-1].clone().requires_grad_()
        loss(now, classes).backward()
        states.append(now.detach() - rate * now.grad)
    return torch.stack(states)


# %%
paths = descend(points, classes, loss_over("mean"), steps=100, rate=0.2)
actives = [describe_triplets(state, classes, MARGIN).active * 290 for state in paths]
end = pairwise_distances(paths[-1], squared=True)
gaps = end.masked_fill(same, torch.inf).amin(dim=1) - end.masked_fill(~same, 0).amax(dim=1)
print([f"step {step}: {actives[step]:.0f} active" for step in (0, 10, 30, 50, 100)])
print(f"from farthest positive to nearest negative: at least {gaps.min():.2f}")
print(
    "within a class, mean squared distance:",
    f"{distances[same].mean():.2f} → {end[same].mean():.2f}",
)
assert actives[0] == 114
assert actives[50] == 0
assert gaps.min() >= MARGIN
assert torch.equal(paths[50], paths[100])

# %% alt="Left: arrows on twelve digits show the first step, the stray one and nine and the fours move most. Right: after the descent the classes stand apart; grey lines show the paths."
figure, axes = plt.subplots(1, 2, figsize=(11, 4.6), sharex=True, sharey=True)
first_step = paths[1] - paths[0]
axes[0].quiver(*paths[0].T, *first_step.T, scale=1 / 7, scale_units="xy", angles="xy")
place_digits(axes[0], paths[0], zoom=0.7)
axes[0].set(title="Where the loss wants each digit to go", ylabel="second component")
axes[1].plot(*paths.permute(2, 0, 1), color="grey", lw=1.5)
place_digits(axes[1], paths[-1], zoom=0.7)
axes[1].set(title="After 50 steps no triplet is active")
for ax in axes:
    ax.set_xlabel("first component")
plt.show()

# %% [markdown]
# Arrows show the first step, seven times enlarged. Grey lines show the whole way. From every anchor, the nearest negative is
# now farther than the farthest positive, by the margin of 0.2. Then everything stopped, within 50 steps: the loss asks for the
# margin and no more. It neither shrinks classes to points nor drives them apart for ever.
#
# ## A mean over what?
#
# Do the same with 512 digits, the first of the training set, in 32 principal components and starting on a sphere of radius
# one. Watch two numbers on the way: the mean loss over active triplets, and the fraction of triplets that is active.

# %%
many, many_classes = images[:512].flatten(1), labels[:512]
many = many - many.mean(dim=0)
many = F.normalize(many @ torch.linalg.svd(many, full_matrices=False).Vh[:32].T)

every_fifth = range(0, 61, 5)
states = descend(many, many_classes, loss_over("mean"), steps=60, rate=20)[::5]
seen = pd.DataFrame([describe_triplets(state, many_classes, MARGIN) for state in states])
for reduction in ("active", "mean"):
    loss = loss_over(reduction)
    seen[f"{reduction} loss"] = [float(loss(state, many_classes)) for state in states]

# %% alt="Left, on a logarithmic scale: over 60 steps the mean loss over active triplets falls to a quarter, the active fraction to a fiftieth. Right: hard and semi-hard triplets shrink from a quarter of all to almost none."
figure, axes = plt.subplots(1, 2, figsize=(10.8, 4))
for column, marker, color in (("active loss", "s", PALETTE[4]), ("active", "o", "black")):
    axes[0].plot(every_fifth, seen[column] / seen[column][0], marker + "-", color=color)
axes[0].annotate("mean loss over active", (28, 0.42), color=PALETTE[4])
axes[0].annotate("active fraction", (4, 0.05))
axes[0].set(
    title="The active fraction falls far more than the mean over active",
    yscale="log",
    xlabel="step",
)
ticks = {1: "1", 0.5: "1/2", 0.25: "1/4", 0.1: "1/10", 0.05: "1/20", 0.02: "1/50"}
axes[0].set_yticks(list(ticks), list(ticks.values()))
axes[0].minorticks_off()
axes[0].set_ylabel("relative to the start")
shares = (seen["hard"], seen["semihard"], 1 - seen["active"])
colors, hatches = zip(*KINDS.values(), strict=True)
for area, hatch in zip(
    axes[1].stackplot(every_fifth, shares, colors=colors, alpha=0.6), hatches, strict=True
):
    area.set_hatch(hatch)
axes[1].set(title="Soon nearly all triplets are easy", xlabel="step", xlim=(0, 60), ylim=(0, 1))
axes[1].set_ylabel("share of all triplets")
for name, at, text_at in (("hard", 0.08, 0.16), ("semi-hard", 0.19, 0.28), ("easy", 0.5, 0.6)):
    line = {"arrowstyle": "-", "color": "black"}
    axes[1].annotate(name, (2, at), (10, text_at), arrowprops=line)
plt.show()

# %% [markdown]
# The mean over active triplets sinks to a quarter, the active fraction to a fiftieth. A triplet that is solved leaves the
# mean; the stubborn ones stay in it. Whoever watches the mean alone thinks that learning has slowed down, when it has solved
# nearly everything. So read the two together. Their product is the mean over all valid triplets:

# %%
first, last = seen.iloc[0], seen.iloc[-1]
for name, at in (("start", first), ("end", last)):
    product = at["active loss"] * at["active"]
    print(f"{name:<6}{at['active loss']:.3f} × {at['active']:.4f} = {product:.5f}", end=", ")
    print(f"mean over all {at['mean loss']:.5f}")
    assert abs(product / at["mean loss"] - 1) < 1e-4
falls = [last[column] / first[column] for column in ("active loss", "active")]
print(f"mean over active × {falls[0]:.2f}, active fraction × {falls[1]:.3f}")
assert 0.2 < falls[0] < 0.27
assert falls[1] < 1 / 45

# %% [markdown]
# Why train with the mean over active triplets at all? For its gradient: it is that of the mean over all, divided by the active
# fraction. The mean over all fades as triplets are solved, and learning fades with it. Start both descents with a step of the
# same length, and look.

# %%
start = first["active"]
descents = {
    "mean over all": descend(many, many_classes, loss_over("mean"), steps=60, rate=3),
    "mean over active": descend(many, many_classes, loss_over("active"), steps=60, rate=3 * start),
}
lengths, fractions = {}, {}
for name, way in descents.items():
    step_lengths = way.diff(dim=0).flatten(1).norm(dim=1)
    lengths[name] = step_lengths / step_lengths[0]
    fractions[name] = [describe_triplets(state, many_classes, MARGIN).active for state in way[::5]]
    print(f"{name:<17} active {fractions[name][-1]:.1%}, last step × {lengths[name][-1]:.2f}")
assert lengths["mean over all"][-1] < 0.5 < 1 < lengths["mean over active"][-1]
assert fractions["mean over active"][-1] < fractions["mean over all"][-1] / 4

# %% alt="Two descents with an equally long first step. With the mean over all, steps shrink to a third and 9 percent of triplets stay active; with the mean over active ones, steps keep their length, grow by a quarter at the end, and 1.4 percent stay active."
figure, axes = plt.subplots(1, 2, figsize=(10.5, 3.7))
looks = {"mean over all": ("o--", PALETTE[7]), "mean over active": ("s-", PALETTE[4])}
for name, (style, color) in looks.items():
    axes[0].plot(range(60), lengths[name], style, color=color, markevery=5)
    axes[1].plot(every_fifth, fractions[name], style, color=color)
for ax, heights in ((axes[0], (0.63, 1.1)), (axes[1], (0.17, 0.06))):
    for name, x, height in zip(looks, (33, 18), heights, strict=True):
        ax.annotate(name, (x, height))
axes[0].set(title="The mean over active ones keeps pulling …", ylim=(0, 1.5), xlabel="step")
axes[0].set_ylabel("length of the step, first = 1")
axes[1].set(title="… and solves more triplets", yscale="log", xlabel="step")
axes[1].set_ylabel("active fraction")
axes[1].set_yticks([0.3, 0.1, 0.03, 0.01], ["30 %", "10 %", "3 %", "1 %"])
axes[1].minorticks_off()
plt.show()

# %% [markdown]
# So the mean over active triplets works like a learning rate that grows while triplets get solved. A larger rate helps the mean
# over all, too: the first descent, at a rate of 20, left 0.5 % active. What keeps pulling can also overshoot: exercise 4.

# %% [markdown]
# ## Which triplets to look at
#
# Twelve million triplets, soon nearly all of them easy. So people choose, which is called **mining**. Four ways are common:
#
# - **random**: a positive and a negative drawn for each anchor, as in Hoffer and Ailon's triplet network (2014);
# - **batch-all**: every triplet;
# - **batch-hard** (Hermans and others, 2017): for each anchor its *farthest* positive and its *nearest* negative;
# - **semi-hard** (after FaceNet): for each anchor and positive, the nearest negative that is *farther* than the positive; if
#   none is, the farthest negative.


# %%
def kind_of(i, j, k):
    if distances[i, k] < distances[i, j]:
        return "hard"
    return "semi-hard" if distances[i, k] < distances[i, j] + MARGIN else "easy"


def semihard_negative(i, j):
    others = torch.nonzero(~same[i])[:, 0]
    farther = others[distances[i, others] > distances[i, j]]
    if len(farther):
        return int(farther[distances[i, farther].argmin()])
    return int(others[distances[i, others].argmax()])


# %% [markdown]
# Mind the name: the rule of semi-hard mining never asks about the margin. See what it picks for one anchor, the first
# nine, in pairs of positive and negative.

# %%
own, other = torch.nonzero(same[0])[1:, 0].tolist(), torch.nonzero(~same[0])[:, 0].tolist()
for j in own:
    k = semihard_negative(0, j)
    near, far = float(distances[0, j]), float(distances[0, k])
    print(f"positive {j} at {near:.2f}, negative {k} at {far:.2f}: {kind_of(0, j, k)}")

draw = torch.Generator().manual_seed(1)
_, random_p, random_n = (
    column[0] for column in mine_triplets(points, classes, "random", generator=draw)
)
hardest_pair = (
    [max(own, key=lambda j: distances[0, j])],
    [min(other, key=lambda k: distances[0, k])],
)
chosen = {
    "random: 1 triplet": ([int(random_p)], [int(random_n)]),
    f"batch-all: {len(own) * len(other)} triplets": (own, other),
    "batch-hard: 1 triplet": hardest_pair,
    f"semi-hard mining: {len(own)} triplets": (own, [semihard_negative(0, j) for j in own]),
}

# %% [markdown]
# One of the four picks is *easy*: the nearest negative that is farther lies beyond the margin, and teaches nothing. In the
# same way a pick is hard where no negative is farther. The four ways, drawn for this anchor:

# %% alt="Four maps of the twelve digits with lines from one nine: random takes one positive and one negative, batch-all all four and seven, batch-hard the farthest positive and the nearest negative, semi-hard four positives and three negatives."
figure, axes = plt.subplots(2, 2, figsize=(9.2, 7.2), sharex=True, sharey=True)
for ax, (title, sides) in zip(axes.flat, chosen.items(), strict=True):
    looks = ((SAME, "-", "o"), (DIFFERENT, "--", "D"))
    for side, (color, line, ring) in zip(sides, looks, strict=True):
        for index in side:
            ax.plot(*points[[0, index]].T, line, color=color, lw=3, alpha=0.8)
            ax.plot(*points[index], ring, color=color, fillstyle="none", markersize=28, mew=2.2)
    ax.plot(*points[0], "s", color="black", markersize=21)
    place_digits(ax, points, zoom=0.45)
    ax.margins(0.14)
    ax.set_title(title)
figure.supxlabel("first component")
figure.supylabel("second component")
plt.show()

# %% [markdown]
# Solid blue lines and circles lead from the anchor, framed in black, to positives; dashed orange lines and diamonds to
# negatives. In the last picture two positives share a negative, number 6.
#
# The loss of each way is the mean hinge over what it takes. Here are batch-hard and semi-hard mining by hand, for all twelve
# anchors.

# %%
pairs = {"hard": [], "semihard": []}
for i in range(12):
    own = [j for j in range(12) if same[i, j] and j != i]
    other = [k for k in range(12) if not same[i, k]]
    farthest = max(own, key=lambda j: distances[i, j])
    pairs["hard"].append((i, farthest, min(other, key=lambda k: distances[i, k])))
    pairs["semihard"] += [(i, j, semihard_negative(i, j)) for j in own]

for mining, picked in pairs.items():
    losses = torch.stack([hinge(distances[i, j], distances[i, k]) for i, j, k in picked])
    by_library = TripletLoss(MARGIN, mining=mining)(points, classes)
    print(f"{mining:<9}{len(picked):>3} picks: {dict(Counter(kind_of(*one) for one in picked))}")
    print(f"{'':<12} mean loss {losses.mean():.3f} by hand, {by_library:.3f} from the library")
    torch.testing.assert_close(by_library, losses.mean())
assert Counter(kind_of(*one) for one in pairs["semihard"])["semi-hard"] == 26

# %% [markdown]
# So of the 38 picks of semi-hard mining 26 are semi-hard, 11 easy and 1 is hard. There are 38 because the twelve digits have 5
# · 4 + 4 · 3 + 3 · 2 = 38 pairs of anchor and positive; that 38 of all 290 triplets are semi-hard is a coincidence.
#
# Mind another name: in `mine_triplets`, `"hard"` means *every* hard triplet; in `TripletLoss`, `mining="hard"` means
# the *hardest* of each anchor.
#
# Now the same for 512 digits, on whole matrices. `searchsorted` tells how many of the sorted distances are not larger, and so
# where the next farther negative stands.


# %%
def mine(state, state_classes):
    d, alike = pairwise_distances(state, squared=True), state_classes[:, None] == state_classes
    farthest = d.masked_fill(~alike, -1).argmax(dim=1)
    nearest = d.masked_fill(alike, torch.inf).argmin(dim=1)
    ordered, order = d.masked_fill(alike, torch.inf).sort(dim=1)
    last_one = (~alike).sum(dim=1, keepdim=True) - 1
    next_farther = order.gather(1, torch.searchsorted(ordered, d, right=True).minimum(last_one))
    i, j = alike.fill_diagonal_(False).nonzero(as_tuple=True)
    return {
        "random": mine_triplets(state, state_classes, "random", generator=draw),
        "batch-hard": (torch.arange(len(state)), farthest, nearest),
        "semi-hard": (i, j, next_farther[i, j]),
    }


def all_active(state, state_classes):
    hard, semihard = (
        mine_triplets(state, state_classes, kind, margin=MARGIN) for kind in ("hard", "semihard")
    )
    return [torch.cat(both) for both in zip(hard, semihard, strict=True)]


def losses_of(state, picked):
    d = pairwise_distances(state, squared=True)
    i, j, k = picked
    return hinge(d[i, j], d[i, k])


# %%
for mining, way in (("hard", "batch-hard"), ("semihard", "semi-hard")):
    by_hand_512 = losses_of(many, mine(many, many_classes)[way]).mean()
    by_library = TripletLoss(MARGIN, mining=mining)(many, many_classes)
    print(f"{way:<11}{by_hand_512:.3f} by hand, {by_library:.3f} from the library")
    torch.testing.assert_close(by_library, by_hand_512)

# %% [markdown]
# How many of the chosen triplets are active, and so teach anything? Follow the 512 digits once more on their first way, the one
# along the mean over all.

# %% alt="Share of the mined triplets that is active over 60 steps: batch-hard stays near 1, semi-hard falls from 0.85 to 0.42, random falls from 0.28 to almost 0, close to the curve of batch-all."
share = {"batch-all": seen["active"].tolist(), "random": [], "semi-hard": [], "batch-hard": []}
for state in states:
    for way, picked in mine(state, many_classes).items():
        share[way].append(float((losses_of(state, picked) > 0).float().mean()))
looks = {"batch-all": (":", "k"), "random": ("o", "k"), "semi-hard": ("D--", "k")}
looks["batch-hard"] = ("s-", KINDS["hard"][0])
ax = plt.gca()
for way, (style, color) in looks.items():
    ax.plot(every_fifth, share[way], style, color=color)
    print(f"{way:<11} active {share[way][0]:.0%} → {share[way][-1]:.1%}")
ax.annotate("batch-hard (512 triplets)", (36, 0.88))
count = f"{len(mine(many, many_classes)['semi-hard'][0]):,}".replace(",", " ")
ax.annotate(f"semi-hard ({count})", (36, 0.62))
ax.annotate("random (512, dots) and batch-all (12 million, dotted)", (12, 0.12))
ax.set(title="Random draws run dry, the hardest do not, semi-hard lies between", xlabel="step")
ax.set(ylabel="share that is active", ylim=(-0.03, 1.05))
plt.show()
assert share["random"][-1] < 0.03
assert share["batch-hard"][-1] > 0.9
assert all(r < s < h for r, s, h in zip(*list(share.values())[1:], strict=True))

# %% [markdown]
# Random triplets are like the batch, and in the end nearly all easy. The hardest stay active nearly all along. Semi-hard
# mining lies between: its easy picks grow from 15 to 58 %.
#
# Then why not always take the hardest? Compare how strongly the active picks pull, 2 ‖p − a‖, and push, 2 ‖n − a‖, at the
# start, and what the loss would be if all points fell on one spot: the margin, 0.2, whatever the way.

# %%
ways = mine(many, many_classes) | {"batch-all": all_active(many, many_classes)}
apart = pairwise_distances(many)
ratio, mean_loss = {}, {}
for way in ("batch-hard", "batch-all", "semi-hard"):
    i, j, k = ways[way]
    pick_losses = losses_of(many, (i, j, k))
    pull, push = (2 * apart[i, to][pick_losses > 0].mean() for to in (j, k))
    ratio[way], mean_loss[way] = float(push / pull), float(pick_losses.mean())
    print(f"{way:<11} pull {pull:.2f}, push {push:.2f}, mean loss {mean_loss[way]:.2f}")
assert ratio["batch-hard"] < 0.6
assert ratio["batch-all"] > 0.9
assert ratio["semi-hard"] > 0.97
assert mean_loss["semi-hard"] < MARGIN < mean_loss["batch-hard"]

# %% [markdown]
# Batch-hard takes the nearest negatives, which are pushed least, and the farthest positives, which are pulled most: the push is
# little more than half the pull. And its loss of 1.88 would fall to 0.2 if everything shrank to a point. Both invite
# **collapse**. Batch-all's 0.44, a mean over active triplets, would fall as well, but its push nearly balances its pull; a semi-hard triplet
# never costs more than the margin, so nothing is gained by shrinking. Points that move freely come apart even with batch-hard,
# their cloud smaller by a tenth (below as *spread*, the root mean square distance from their mean); chapter [4](04_training.ipynb) shows a *network* that collapses.

# %%
for way, mining in (("batch-hard", "hard"), ("semi-hard", "semihard")):
    freely = descend(many, many_classes, TripletLoss(MARGIN, mining=mining), steps=40, rate=5)
    begin, finish = (describe_triplets(freely[s], many_classes, MARGIN) for s in (0, -1))
    print(f"{way:<11} spread {begin.spread:.2f} → {finish.spread:.2f}", end=", ")
    print(f"active {begin.active:.1%} → {finish.active:.1%}")
    assert (finish.spread < 0.95) == (way == "batch-hard")
    assert finish.active < 0.01

# %% [markdown]
# The hardest are also the most extreme. Give five of the 512 digits a wrong label, and count which share of the active picks
# has one of these five in it: at the start, after the 60 steps above, which went by the right labels, and after 60 steps that
# went by the wrong ones, with the mean over all.

# %%
wrong = torch.randperm(512, generator=torch.Generator().manual_seed(0))[:5]
mislabelled = many_classes.clone()
mislabelled[wrong] = (mislabelled[wrong] + 1) % 10
touched = {}
misled = descend(many, mislabelled, loss_over("mean"), steps=60, rate=20)[-1]
for state in (states[0], states[-1], misled):
    ways = mine(state, mislabelled) | {"batch-all": all_active(state, mislabelled)}
    for way, picked in ways.items():
        kept = torch.stack(list(picked))[:, losses_of(state, picked) > 0]
        touched.setdefault(way, []).append(float(torch.isin(kept, wrong).any(dim=0).float().mean()))
for way in ("batch-hard", "batch-all", "semi-hard"):
    print(
        "{:<11} start {:.0%}, after right steps {:.0%}, after wrong {:.0%}".format(
            way, *touched[way]
        )
    )
assert touched["batch-hard"][0] > 3 * touched["batch-all"][0] > 3 * touched["semi-hard"][0]
assert touched["semi-hard"][1] < 0.35 < 0.5 < min(touched["batch-hard"][1], touched["batch-all"][1])
assert max(touched[way][2] for way in ("batch-hard", "batch-all", "semi-hard")) < 0.15

# %% [markdown]
# One label in a hundred is wrong, and at the start it is in 23 % of what batch-hard looks at, against 6 % with batch-all.
# After steps by the right labels, when the right triplets are solved, they are in most of what is left for both, 59 and 76 %,
# but in 24 % of the active picks of semi-hard mining, which passes over negatives that are too near. Points that may move
# freely obey wrong labels as well as right ones: after steps by those, no way has them in more than a tenth of its picks. So
# wrong labels draw batch-hard's eye *early*, before they are learnt by heart.
#
# What speaks for batch-all: no active triplet is missed, and its push nearly balances its pull. What speaks against it is the
# cost. We now take that away.

# %% [markdown]
# ## All triplets, on a row of numbers
#
# The first part of the chapter ends here; what follows derives how the library computes the loss, and at a first reading you
# may go on with "[When it goes wrong](#When-it-goes-wrong:-NaN-from-a-root)".
#
# Take one anchor. All that matters is a row of distances, here of two positives and five negatives, with margin 2 so that we
# can do the sums in our heads. Each positive sets a **threshold**, its distance plus the margin. A negative nearer than the
# threshold costs the difference.

# %%
to_positives = torch.tensor([3.0, 6.0])
to_negatives = torch.tensor([7.0, 1.0, 10.0, 4.0, 9.0])
thresholds = to_positives + 2
row_losses = (thresholds[:, None] - to_negatives).clamp(min=0)
print(row_losses)
print("sums", row_losses.sum(dim=1))

# %% [markdown]
# That is the brute force, a row for each positive, a column for each negative. Now **sort the negatives**. Those nearer than a
# threshold t are then simply the first c. Their losses t − d(a, n) add up to c times t, minus the sum of the first c
# distances:
#
# $$\sum_{\text{first } c} \bigl(t - d(a, n)\bigr) = c\,t - S_c$$
#
# And S, the sum of the first 0, 1, 2, … distances, comes for all c at once, from one cumulative sum.

# %%
ordered = to_negatives.sort().values
S = F.pad(ordered.cumsum(dim=0), (1, 0))
c = torch.searchsorted(ordered, thresholds)
print("sorted", ordered.tolist())
print("S     ", S.tolist())
print("c     ", c.tolist())
print("sums  ", (c * thresholds - S[c]).tolist())
assert torch.equal(c * thresholds - S[c], row_losses.sum(dim=1))

# %% alt="Two panels of bars for sorted negatives. Up to the threshold each bar is grey as far as the negative and hatched for the rest: the hatched parts are the losses, 5 for the first threshold and 12 for the second."
figure, axes = plt.subplots(1, 2, figsize=(11.4, 3.8), sharey=True, sharex=True)
for ax, t, first_c in zip(axes, thresholds, c, strict=True):
    places, nearer = range(1, 6), ordered[:first_c]
    ax.barh(places[:first_c], nearer, color="lightgrey", label="$S_c$")
    look = {"facecolor": "white", "edgecolor": PALETTE[4], "hatch": "///"}
    ax.barh(places[:first_c], t - nearer, left=nearer, label="loss, $c\\,t - S_c$", **look)
    ax.plot(ordered, places, "X", color=DIFFERENT, markersize=10, label="negative")
    ax.axvline(t - 2, color=SAME, lw=2.5, label="positive")
    ax.axvline(t, color=SAME, lw=2.5, linestyle="--", label="threshold t")
    sums = f"c t − S = {first_c} · {t:.0f} − {S[first_c]:.0f} = {first_c * t - S[first_c]:.0f}"
    ax.set(title=f"The hatched bars add up to {sums}", axisbelow=True, yticks=places)
    ax.set(xlabel="distance from the anchor", xlim=(0, 10.7), ylim=(5.6, 0.4))
axes[0].set_ylabel("negatives, nearest first")
figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=5)
plt.show()

# %% [markdown]
# The c bars end at the threshold, so grey and hatched parts together are c · t. Grey is the distance to each negative, S in
# all. Hatched is what is left: the loss. No negative had to be visited on its own, and `searchsorted` finds c by **binary
# search**, halving the row in about log₂ n comparisons.

# %% [markdown]
# ## The gradient is a count
#
# Move a positive out by a little ε. Its threshold moves by ε, and so does each of its c losses: its slope is **c**. Move a
# negative out by ε, and every threshold beyond it loses ε: its slope is **minus the number of thresholds beyond it**. Nothing
# but counts, then. Automatic differentiation of the brute force gives the same.

# %%
places = torch.searchsorted(thresholds.sort().values, to_negatives, right=True)
beyond = len(thresholds) - places
print("slopes of positives", c.tolist(), "of negatives", (-beyond).tolist())

leaf_p, leaf_n = to_positives.clone().requires_grad_(), to_negatives.clone().requires_grad_()
(leaf_p[:, None] + 2 - leaf_n).clamp(min=0).sum().backward()
print("by autograd        ", leaf_p.grad.int().tolist(), "            ", leaf_n.grad.int().tolist())
assert torch.equal(leaf_p.grad, c.float())
assert torch.equal(leaf_n.grad, -beyond.float())
assert c.sum() == beyond.sum()

# %% [markdown]
# Both sides count the same thing, so their sums agree, 5 and 5: it is the number of active triplets, for free.
#
# See it on a real anchor, the first of the 512 digits: a row for each of its positives, a column for each negative, so a cell
# for each triplet. Dark cells are active.

# %% alt="Two tables of the triplets of one anchor, active ones dark. Unsorted, the dark cells are scattered in streaks; with positives and negatives sorted by distance they form a staircase whose row lengths and column heights are the slopes."
to_all = pairwise_distances(many[:1], many, squared=True)[0]
of_class = many_classes == many_classes[0]
near, far = to_all[of_class][1:], to_all[~of_class]
sorted_cells = near.sort().values[:, None] + MARGIN > far.sort().values
figure, axes = plt.subplots(1, 2, figsize=(12, 4))
for ax, cells in zip(axes, (near[:, None] + MARGIN > far, sorted_cells), strict=True):
    look = {"cbar": False, "xticklabels": 100, "yticklabels": 10}
    sns.heatmap(cells, ax=ax, cmap=["#eeeeee", "#555555"], **look)
    ax.tick_params(rotation=0)
    ax.set(xlabel="negatives", ylabel="positives")
axes[0].set_title("The active triplets of one anchor, scattered …")
axes[1].set_title("… and sorted, nearest first: a staircase")

length, height = int(sorted_cells[25].sum()), int(sorted_cells[:, 350].sum())
arrow = {"arrowstyle": "<->", "color": "white", "lw": 2}
axes[1].annotate("", (0, 25.5), (length, 25.5), arrowprops=arrow)
axes[1].annotate("", (350, len(near)), (350, len(near) - height), arrowprops=arrow)
axes[1].text(10, 28, f"slope of this positive: {length}", color="white")
axes[1].text(340, 36, f"slope of this negative: −{height}", color="white", ha="right")
plt.show()

# %% [markdown]
# Sorting turns scattered cells into a staircase, and a staircase needs no list of its cells: its steps say it all. The length
# of a row is a positive's slope, the height of a column a negative's.
#
# ## The whole batch
#
# Do that for each anchor. Use float64, because c · t − S subtracts two large numbers to get a small one.


# %%
def all_triplets(distances, classes):
    total, slopes = 0.0, torch.zeros_like(distances)
    for i, row in enumerate(distances):
        negative = classes != classes[i]
        positive = ~negative & (torch.arange(len(row)) != i)
        thresholds, ordered = row[positive] + MARGIN, row[negative].sort().values
        S = F.pad(ordered.cumsum(dim=0), (1, 0))
        c = torch.searchsorted(ordered, thresholds)
        total += (c * thresholds - S[c]).sum()
        slopes[i, positive] = c.to(row.dtype)
        beyond = torch.searchsorted(thresholds.sort().values, row[negative], right=True)
        slopes[i, negative] = (beyond - len(thresholds)).to(row.dtype)
    return total, slopes


# %% [markdown]
# The slopes are the gradient with respect to the *distances*. From there to the points the chain rule does the rest:
# `distances.backward(slopes)`. First compare with the brute force, a list of triplets and automatic differentiation, on 128
# digits.

# %%
few, few_classes = many[:128].double().requires_grad_(), many_classes[:128]
few_squared = pairwise_distances(few, squared=True)
i, j, k = mine_triplets(few, few_classes)
brute = hinge(few_squared[i, j], few_squared[i, k]).sum()
(brute_gradient,) = torch.autograd.grad(brute, few, retain_graph=True)

sum_of_all, slopes = all_triplets(few_squared.detach(), few_classes)
few_squared.backward(slopes)
print(f"{len(i):,} triplets: {brute.item():.2f} listed, {sum_of_all:.2f} sorted")
torch.testing.assert_close(sum_of_all, brute.detach())
torch.testing.assert_close(few.grad, brute_gradient)

# %% [markdown]
# Then with the library, on all 512: the value, the gradient, and the number of active triplets, which is the sum of the slopes
# of positives. (These 512 are not quite balanced and hold 12.06 million triplets, a few more than the 11.8 million above.)

# %%
ours, theirs = (many.double().requires_grad_() for _ in range(2))
many_squared = pairwise_distances(ours, squared=True)
sum_of_all, slopes = all_triplets(many_squared.detach(), many_classes)
many_squared.backward(slopes)

loss, active = batch_all_triplet_loss(
    theirs, many_classes, MARGIN, reduction="sum", return_active=True
)
loss.backward()
valid = count_triplets(many_classes.bincount().tolist())
print(f"{int(active) / valid:.1%} of {valid:,} triplets are active")
torch.testing.assert_close(loss.detach(), sum_of_all)
torch.testing.assert_close(theirs.grad, ours.grad)
assert active == slopes.clamp(min=0).sum()

# %% [markdown]
# The library does the mirror image of this: it sorts the thresholds, of which there are far fewer, and finds each negative's
# place among them, for all anchors at once instead of in a loop. Exercise 5 does the sums.
#
# ## How time and memory grow
#
# The brute force needs a number for each triple of images: n³. The sorted way needs one for each pair, n², and sorts n rows of
# n numbers: n² log n steps. Time both, value and gradient, in processor time on one core. Of
# several repeats the fastest counts, because whatever else runs on the machine can only make it slower.


# %%
def brute_force(points, classes):
    d = pairwise_distances(points, squared=True)
    alike = classes[:, None] == classes
    positive = alike & ~torch.eye(len(points), dtype=torch.bool)
    is_valid = positive[:, :, None] & ~alike[:, None, :]
    losses = hinge(d[:, :, None], d[:, None, :]) * is_valid
    return losses.sum() / (losses > 0).sum()


def seconds(loss, n):
    cloud = torch.randn(n, 64, generator=draw).requires_grad_()
    start = time.process_time()
    loss(cloud, torch.arange(n) % 10).backward()
    return time.process_time() - start


torch.testing.assert_close(
    brute_force(many[:128], few_classes), batch_all_triplet_loss(many[:128], few_classes, MARGIN)
)

# %% tags=["nbval-ignore-output"]
computed_by = {"brute force": brute_force, "sorted": batch_all_triplet_loss}
sizes = {"brute force": [32, 64, 128, 256], "sorted": [32, 64, 128, 256, 512, 1024, 2048]}
threads = torch.get_num_threads()
torch.set_num_threads(1)
timed = {
    name: [min(seconds(loss, n) for _ in range(5 if n > 200 else 20)) for n in sizes[name]]
    for name, loss in computed_by.items()
}
torch.set_num_threads(threads)
for name, times in timed.items():
    print(name, [f"{n}: {1000 * t:.1f} ms" for n, t in zip(sizes[name], times, strict=True)])

# %% [markdown]
# Memory we can work out: four bytes for each entry of *one* float32 tensor of that size. (Automatic differentiation keeps
# several.)

# %%
batch = torch.tensor([32, 64, 128, 256, 512, 1024, 2048, 4096])
gigabytes = {"brute force": 4 * batch.double() ** 3 / 1e9, "sorted": 4 * batch.double() ** 2 / 1e9}
at_4096 = {name: float(values[-1]) for name, values in gigabytes.items()}
print("4 096 images:", {name: f"{value:.2f} GB" for name, value in at_4096.items()})
assert at_4096["brute force"] > 270
assert at_4096["sorted"] < 0.07

at_256, at_1024 = (count_triplets((torch.arange(n) % 10).bincount().tolist()) for n in (256, 1024))
print(f"triplets: {at_256:,} in 256 images, {at_1024:,} in 1 024")
assert at_1024 > 60 * at_256

# %% alt="Two panels with logarithmic axes. Time and memory of the brute force rise steeply with the number of images; those of the sorted way rise less, and at 4 096 images one tensor takes 0.07 instead of 275 gigabytes." tags=["nbval-ignore-output"]
figure, axes = plt.subplots(1, 2, figsize=(11, 4.1), sharex=True)
styles = {"brute force": ("s--", PALETTE[7]), "sorted": ("o-", "black")}
for name, (style, color) in styles.items():
    for ax, values, x in ((axes[0], timed[name], sizes[name]), (axes[1], gigabytes[name], batch)):
        ax.plot(x, values, style, color=color)
        ax.annotate(name, (x[2], values[2]), (6, -14), textcoords="offset points")
axes[1].axhline(16, color="grey", linestyle=":")
axes[1].annotate("a laptop's 16 GB", (32, 22), color="grey")
axes[0].set(title="Sorting makes the loss and its gradient fast …", ylabel="processor time")
axes[1].set(title="… and small: the square instead of the cube", ylabel="memory of one tensor")
for ax in axes:
    ax.set(xscale="log", yscale="log", xlabel="images in the batch, n")
    ax.set_xticks(batch, [str(n) for n in batch.tolist()], rotation=45)
axes[0].set_yticks([1e-3, 1e-2, 1e-1, 1], ["1 ms", "10 ms", "100 ms", "1 s"])
memory_ticks = {1e-5: "10 kB", 1e-4: "100 kB", 1e-3: "1 MB", 0.01: "10 MB", 0.1: "100 MB"}
memory_ticks |= {1: "1 GB", 10: "10 GB", 100: "100 GB"}
axes[1].set_yticks(list(memory_ticks), list(memory_ticks.values()))
for ax in axes:
    ax.minorticks_off()
plt.show()

# %% [markdown]
# With both axes logarithmic, a power of n is a straight line and its steepness is the exponent, as the memory shows. The lines
# part more and more. On the machine that made this page, the sorted way at 1 024 images is done sooner than the brute force at
# 256, with sixty times as many triplets. At 512, the batch of chapter 4, it takes about a hundredth of a second.

# %% [markdown]
# ## When it goes wrong: NaN from a root
#
# Say you want distances that are not squared, and write them as chapter 1 did by hand. The loss is fine. Its gradient is not a
# number (**NaN**), in all 24 places.


# %%
def rooted(points):
    return (points[:, None] - points).square().sum(dim=2).sqrt()


def gradient_of_loss(distances_of):
    moving = points.clone().requires_grad_()
    d = distances_of(moving)
    loss = hinge(d[a, p], d[a, n]).mean()
    (gradient,) = torch.autograd.grad(loss, moving)
    return loss.detach(), gradient


a, p, n = mine_triplets(points, classes)
rooted_loss, rooted_gradient = gradient_of_loss(rooted)
print(f"loss {rooted_loss:.3f}; gradient: {int(rooted_gradient.isnan().sum())}", end=" ")
print(f"of {rooted_gradient.numel()} are NaN")
assert rooted_loss.isfinite()
assert rooted_gradient.isnan().all()

# %% [markdown]
# No two digits coincide, and no triplet uses the distance of a point to itself. But that distance was *computed*, on the
# diagonal, and the root's slope at zero is infinite. Its share in the loss is zero; zero times infinity is NaN. A step with
# such a gradient makes every point NaN, and in a network the weights.
#
# The fix is a distance whose gradient is zero at zero, as the library's. The rest is as it should be: the same as from
# distances that are computed only for the pairs in triplets. The last check has what data sets do contain, the same image
# twice.

# %%
safe_loss, safe_gradient = gradient_of_loss(pairwise_distances)
torch.testing.assert_close(safe_loss, rooted_loss)

moving = points.clone().requires_grad_()
to_p, to_n = (moving[a] - moving[p]).norm(dim=1), (moving[a] - moving[n]).norm(dim=1)
hinge(to_p, to_n).mean().backward()
torch.testing.assert_close(safe_gradient, moving.grad)

twins = points[[0, 0, 5]].requires_grad_()
twin_loss = batch_all_triplet_loss(twins, classes[[0, 0, 5]], margin=5, squared=False)
twin_loss.backward()
print(f"with twins: loss {twin_loss:.3f}, gradient finite: {bool(twins.grad.isfinite().all())}")
assert twin_loss > 0
assert twins.grad.isfinite().all()

# %% [markdown]
# ## When it goes wrong: a zero that means nothing
#
# A loss of zero looks like success. It may also be silence. A batch in which no class has two images has no positives; a batch
# of a single class has no negatives. Neither has a triplet. The step is lost, and nothing tells.

# %%
one_each, all_alike = torch.arange(12), torch.zeros(12, dtype=torch.int64)
for name, batch_classes in (("twelve classes", one_each), ("one class", all_alike)):
    state = describe_triplets(points, batch_classes, MARGIN)
    loss = float(batch_all_triplet_loss(points, batch_classes))
    print(f"{name}: loss {loss}, {state.triplets} triplets")
    assert loss == state.triplets == 0

# %% [markdown]
# So count. `describe_triplets` tells *none active of many*, which is solved, from *none at all*. The fix is a batch in which
# every image has company, as `BalancedBatchSampler` of chapter 1 draws it.

# %% [markdown]
# ## Exercises
#
# Try each before you unfold its solution (click the bar or the three dots) and its answer.

# %% [markdown]
# **1.** Let distances not be squared, and the margin stay 0.2. Which of the three kinds of triplets change in number? Think
# first, then count.

# %%
# Your attempt

# %% jupyter={"source_hidden": true} tags=["hide-input"]
# Solution 1
kinds = ("hard", "semihard", "easy")
squared_counts, plain_counts = (
    [len(mine_triplets(points, classes, kind, margin=MARGIN, squared=how)[0]) for kind in kinds]
    for how in (True, False)
)
assert squared_counts == [76, 38, 176]
assert plain_counts == [76, 43, 171]

# %% [markdown]
# <details><summary>Answer 1</summary>
#
# Hard stays at 76: which of two distances is larger does not depend on squaring. By how much it is larger does depend on it, so
# semi-hard goes from 38 to 43 and easy from 176 to 171. The same 0.2 asks for something else.
#
# </details>

# %% [markdown]
# **2.** A batch of 512 images may have 2, 4, 8, … or 256 classes of equal size. With which are there most triplets? How many
# pairs of classes does such a batch tell apart?

# %%
# Your attempt

# %% jupyter={"source_hidden": true} tags=["hide-input"]
# Solution 2
by_number = {C: count_triplets([512 // C] * C) for C in (2, 4, 8, 16, 32, 64, 128, 256)}
assert max(by_number, key=by_number.get) == 2
assert by_number[2] == 33_423_360
assert by_number[256] == 261_120
class_pairs = {C: C * (C - 1) // 2 for C in by_number}
assert (class_pairs[2], class_pairs[256]) == (1, 32_640)

# %% [markdown]
# <details><summary>Answer 2</summary>
#
# Two classes give most, 33 million, about n³ / 4; 256 classes give 0.26 million. But all those of two classes are about one
# pair of classes, where 256 classes make 32 640 pairs. The number of triplets alone does not say which batch teaches more.
#
# </details>

# %% [markdown]
# **3.** Put all twelve points on one spot. What is the loss, what its gradient, and what does gradient descent do from there?

# %%
# Your attempt

# %% jupyter={"source_hidden": true} tags=["hide-input"]
# Solution 3
spot = torch.zeros(12, 2, requires_grad=True)
spot_loss = batch_all_triplet_loss(spot, classes, MARGIN)
spot_loss.backward()
assert abs(spot_loss.item() - MARGIN) < 1e-6
assert (spot.grad == 0).all()

# %% [markdown]
# <details><summary>Answer 3</summary>
#
# Each triplet costs exactly the margin, 0.2, and every gradient is zero, as 2 (n − a) is zero for each. Descent stays there for
# ever. Chapter 4 meets this spot again, as *collapse*.
#
# </details>

# %% [markdown]
# **4.** Take 60 steps with the mean over active triplets at a rate of 2, and count the active triplets after every step. What
# happens when few are left, and what can be done about it?

# %%
# Your attempt

# %% jupyter={"source_hidden": true} tags=["hide-input"]
# Solution 4
fixed = descend(many, many_classes, loss_over("active"), steps=60, rate=2)
fixed_active = [describe_triplets(state, many_classes, MARGIN).active for state in fixed]
assert min(fixed_active) < 1e-5
assert fixed_active[-1] > 1e-3
fixed_lengths = fixed.diff(dim=0).flatten(1).norm(dim=1)
assert fixed_lengths[-1] > 2000 * fixed_lengths[0]
falling = many
for step in range(60):
    rate = 2 * (1 - step / 60)
    falling = descend(falling, many_classes, loss_over("active"), steps=1, rate=rate)[-1]
assert describe_triplets(falling, many_classes, MARGIN).active < 1e-5

# %% [markdown]
# <details><summary>Answer 4</summary>
#
# After 31 steps only a handful of the twelve million are active. Each of them now has a large share of the mean, at the start
# it had one part in three million, so its points leap past their place, and break triplets that were solved: at the end 0.4 %
# are active, and the last step is more than two thousand times as long as the first. A rate that falls to zero on the way avoids it:
# after 60 steps none is active. Chapter 4 trains with such a rate.
#
# </details>

# %% [markdown]
# **5.** Mirror the sum. Sort the *thresholds*, and for each negative of the row of numbers find those that lie beyond it. What
# do its losses add up to?

# %%
# Your attempt

# %% jupyter={"source_hidden": true} tags=["hide-input"]
# Solution 5
limits = thresholds.sort().values
sums = F.pad(limits.cumsum(dim=0), (1, 0))
below = torch.searchsorted(limits, to_negatives, right=True)
mirrored = (sums[-1] - sums[below]) - (len(limits) - below) * to_negatives
assert torch.equal(mirrored, row_losses.sum(dim=0))
assert mirrored.sum() == row_losses.sum() == 17

# %% [markdown]
# <details><summary>Answer 5</summary>
#
# To the sum of the thresholds beyond it, minus their number times its own distance: 1, 11, 0, 5 and 0 for the negatives at 7,
# 1, 10, 4 and 9. Together 17, the same as 5 + 12 over the positives, because both add up the same table.
#
# </details>

# %% [markdown]
# ## Check yourself
#
# Five questions. Decide before you unfold the answer.

# %% [markdown]
# **1.** The margin is 0.2, d(a, p) = 0.4 and d(a, n) = 0.5. What is this triplet, and what does it cost?
#
# a) easy, 0 · b) semi-hard, 0.1 · c) hard, 0.1
#
# <details><summary>Answer</summary>
#
# **b.** The negative is farther, but by 0.1 only, and 0.4 − 0.5 + 0.2 = 0.1 is missing. *a* forgets the margin: the right order
# alone is not enough. *c* would need a negative that is nearer than the positive, and would cost more than 0.2.
#
# </details>

# %% [markdown]
# **2.** In training, the mean loss over active triplets stays at 0.2 for a hundred steps, while the active fraction falls from
# 20 % to 1 %. What is going on?
#
# a) learning has stopped · b) triplets are being solved; the mean is over those left · c) all points have collapsed onto one
#
# <details><summary>Answer</summary>
#
# **b.** A solved triplet leaves the mean, so the mean says little about how many are solved. *a* looks at the mean alone. *c*
# is a good guess at a loss that equals the margin, but then *every* triplet is active.
#
# </details>

# %% [markdown]
# **3.** d is the squared distance, and a negative lies exactly on its anchor. How does a step against the gradient move it?
#
# a) farthest of all, since this loss is the largest · b) not at all · c) the gradient is NaN
#
# <details><summary>Answer</summary>
#
# **b.** The push is 2 (n − a), which is zero there. *a* mixes up the loss with its slope: a large value can lie where it is
# flat. *c* happens with a root written by hand; a square has a slope everywhere.
#
# </details>

# %% [markdown]
# **4.** What does `TripletLoss(mining="semihard")` pick for an anchor and a positive, if the next farther negative is beyond
# the margin?
#
# a) that negative, at a loss of zero · b) nothing, the pair is left out · c) the nearest negative of all
#
# <details><summary>Answer</summary>
#
# **a.** The rule asks for the nearest negative that is farther than the positive, and not whether it is within the margin; the
# pick is easy, and counts as a zero in the mean. *b* takes the name for the rule. *c* is batch-hard's negative.
#
# </details>

# %% [markdown]
# **5.** A loss over all triplets needs n² memory when distances are sorted. Why does it not need n³, one number for each
# triplet?
#
# a) it draws a sample of them · b) easy triplets are dropped from the list · c) how many are active, and the sum of their
# distances, can be read off each sorted row
#
# <details><summary>Answer</summary>
#
# **c.** The first c negatives of a sorted row are the active ones of a positive, and a cumulative sum holds their distances.
# *a* would only be an estimate, and this is exact. *b* would still list a quarter of twelve million at the start.
#
# </details>

# %% [markdown]
# ## Summary
#
# - A triplet compares: the anchor should be nearer to the positive than to the negative, by a margin.
# - A batch has Σ k (k − 1)(n − k) triplets. Hard and semi-hard ones are active; soon most are easy.
# - Random triplets run dry; the hardest pull more than they push and meet wrong labels first; semi-hard mining lies between.
# - Read the mean over active triplets together with the active fraction. A zero may mean that there was nothing to look at.
# - On sorted distances the loss over all triplets, and its gradient, are counts and sums: n² memory, n² log n time.
#
# **Next:** [3 · Network](03_network.ipynb) builds the function whose points this loss will move.
#
# **References.** K. Weinberger, L. Saul, "Distance metric learning for large margin nearest neighbor classification",
# [JMLR 10](https://jmlr.org/papers/v10/weinberger09a.html), 2009 (LMNN). · E.
# Hoffer, N. Ailon, "Deep metric learning using triplet network", [arXiv 1412.6622](https://arxiv.org/abs/1412.6622), 2014. · F.
# Schroff, D. Kalenichenko, J. Philbin, "FaceNet: A unified embedding for face recognition and clustering", [arXiv
# 1503.03832](https://arxiv.org/abs/1503.03832), 2015 (margin, squared distance, semi-hard). · A. Hermans, L. Beyer, B. Leibe,
# "In defense of the triplet loss for person re-identification", [arXiv 1703.07737](https://arxiv.org/abs/1703.07737), 2017
# (batch-all, batch-hard, mean over active triplets).
