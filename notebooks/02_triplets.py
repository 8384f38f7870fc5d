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
# batch's twelve million triplets are compared, exactly, in a few thousandths of a second, and not one of them is ever listed.
#
# - **You will learn** what anchor, positive, negative and margin are, how many triplets a batch holds, which of them are easy,
#   semi-hard or hard, four ways to choose among them, how to read the loss, and how sorting replaces the loop over triplets.
# - **You need** the digits of chapter [1](01_data.ipynb) and to know what a gradient is; no network and no GPU.
# - **Running time** about 20 seconds on two cores.
# - Previous: [1 · Data](01_data.ipynb) · Next: [3 · Network](03_network.ipynb)

# %%
import itertools
import time

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
# Pixel distance failed in chapter 1. What should a better distance do? *An image is nearer to an image of its own class than
# to an image of another.* The sentence speaks of three images: the **anchor**, from which we measure; a **positive**, another
# image of the anchor's class; and a **negative**, an image of another class. Together they are a **triplet**.
#
# Twelve digits will do for most of this chapter: five nines, four fours and three ones, the first of each in the training set.

# %%
rows = [torch.nonzero(labels == digit)[:count, 0] for digit, count in ((9, 5), (4, 4), (1, 3))]
digits, classes = images[torch.cat(rows)], labels[torch.cat(rows)]
print(digits.shape, classes.tolist())

# %% [markdown]
# Here is one triplet of them, with pixel distances. They break the sentence: to pixels, this nine is more like a four than
# like another nine.

# %%
between = pairwise_distances(digits.flatten(1))[2]
titles = ["anchor", f"positive: {between[0]:.1f}", f"negative: {between[6]:.1f}"]
show_images(digits[[2, 0, 6]], titles, columns=3, colors=["black", SAME, DIFFERENT], size=1.9)
plt.show()
assert classes[2] == classes[0] != classes[6]
assert between[0] > between[6]

# %% [markdown]
# A triplet never says what an image *is*, nor how far is far. It only compares. That is why people can supply triplets where
# they cannot supply names ("these two photographs show one person, that one shows another"), and why what is learned from
# triplets can carry over to classes that were never seen.
#
# ## From a sentence to a loss
#
# To learn, we need a number that says how badly the sentence is broken. Write d(a, p) and d(a, n) for the distances from the
# anchor to the positive and to the negative. "Nearer" could be met by a hair, so ask for a **margin** m on top, and count what
# is missing:
#
# $$\text{loss} = \max\bigl(0,\; d(a, p) - d(a, n) + m\bigr)$$
#
# From here on d is the *squared* Euclidean distance, as in the FaceNet paper (2015). It needs no root, and we shall see at the
# end what a root can do. The margin is 0.2 throughout.

# %%
MARGIN = 0.2


def hinge(to_positive, to_negative):
    return (to_positive - to_negative + MARGIN).clamp(min=0)


# %% [markdown]
# Fix the positive at d(a, p) = 0.5 and let the negative move outwards, from left to right. It crosses three regions, and this
# book uses their names all the time.

# %%
HARD, SEMIHARD, EASY = PALETTE[3], PALETTE[8], PALETTE[2]
regions = (("hard", 0, 0.5, HARD), ("semi-hard", 0.5, 0.7, SEMIHARD), ("easy", 0.7, 1.2, EASY))

to_negative = torch.linspace(0, 1.2, 241)
ax = plt.gca()
for name, start, end, color in regions:
    ax.axvspan(start, end, color=color, alpha=0.25, lw=0)
    ax.annotate(name, ((start + end) / 2, 0.76), ha="center", weight="bold")
ax.plot(to_negative, hinge(torch.tensor(0.5), to_negative), color="black", lw=2.5)
ax.set(title="The loss is how far the negative falls short", ylabel="loss")
ax.set(
    xlabel="squared distance from anchor to negative, d(a, n)", xlim=(0, 1.2), ylim=(-0.02, 0.85)
)
ax.set_xticks([0, 0.5, 0.7], ["0", "d(a, p)", "d(a, p) + m"])
plt.show()

# %% [markdown]
# A **hard** negative is nearer than the positive. A **semi-hard** one is in the right order, but inside the margin. An
# **easy** one is beyond the margin, and costs nothing.
#
# Look at the slope, too. It is −1 where there is a loss and 0 where there is none. An easy triplet teaches nothing at all, and
# the hardest one pushes its distances no more than one that is nearly right.

# %%
for far, slope in ((0.3, -1.0), (0.6, -1.0), (0.8, 0.0)):
    to_negative = torch.tensor(far, requires_grad=True)
    hinge(torch.tensor(0.5), to_negative).backward()
    assert to_negative.grad == slope

# %% [markdown]
# 0.2 of what? A margin means something only beside the distances it is added to. Make all embeddings twice as long, and
# squared distances grow fourfold: the same 0.2 asks for a quarter of what it did. Chapter 3 settles this by putting all points
# on a sphere of radius one, where squared distances run from 0 to 4.
#
# ## Twelve digits in the plane
#
# So that everything can be drawn, each digit gets a point in the plane: the plane in which the twelve images spread most
# (their first two principal components), divided by 20, so that distances come out around one. As embeddings these points are
# poor. That makes them interesting.

# %%
centred = digits.flatten(1) - digits.flatten(1).mean(dim=0)
directions = torch.linalg.svd(centred, full_matrices=False).Vh[:2]
points = centred @ directions.T / 20
distances = pairwise_distances(points, squared=True)
print(points.shape, distances.shape)


# %%
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
ax.set(title="Twelve digits: each class has members among the others")
ax.set(xlabel="first component", ylabel="second component")
plt.show()

# %% [markdown]
# ## How many triplets?
#
# Count them with three loops. The anchor may be any digit, the positive another digit of the same class, the negative any
# digit of another class.

# %%
count = 0
for a, p, n in itertools.product(range(12), repeat=3):
    if a != p and classes[a] == classes[p] and classes[a] != classes[n]:
        count += 1
print(count, "triplets of twelve digits")

# %% [markdown]
# Now without loops. In the picture each row is an anchor; its blue cells are its positives, its orange cells its negatives.
# Each blue cell makes a triplet with each orange cell *of the same row*. The framed row, a nine, has 4 blue and 7 orange
# cells: 28 triplets.

# %%
same = classes[:, None] == classes
cells = same.long() + torch.eye(12, dtype=torch.long)
names = classes.tolist()
figure, ax = plt.subplots(figsize=(5, 4.6))
colors = sns.color_palette([DIFFERENT, SAME, "white"])
sns.heatmap(
    cells, ax=ax, cmap=colors, cbar=False, linewidths=2, xticklabels=names, yticklabels=names
)
ax.add_patch(plt.Rectangle((0, 2), 12, 1, fill=False, edgecolor="black", lw=3))
ax.set(title="A triplet is a blue and an orange cell of one row", ylabel="anchor")
ax.set(xlabel="positive (blue) or negative (orange)")
plt.yticks(rotation=0)
plt.show()

# %% [markdown]
# A class with k of the n images has k such rows, each with k − 1 blue and n − k orange cells. Add up over the classes:
#
# $$\text{number of triplets} = \sum_{\text{classes}} k\,(k - 1)\,(n - k)$$
#
# The loops, the formula and the library agree.


# %%
def count_triplets(sizes):
    n = sum(sizes)
    return sum(k * (k - 1) * (n - k) for k in sizes)


assert count_triplets([5, 4, 3]) == count == 290
assert describe_triplets(points, classes).triplets == count
assert len(mine_triplets(points, classes)[0]) == count

# %% [markdown]
# Three factors, so the number grows with the *cube* of the batch. This book trains with batches of 512 images of ten classes.
# And all of MNIST as one batch? At a microsecond each, looking once at every triplet would take more than seven months.

# %%
batch_of_512 = count_triplets([52] * 2 + [51] * 8)
all_of_mnist = count_triplets(labels.bincount().tolist())
print(f"{batch_of_512:,} in a balanced batch of 512, {all_of_mnist:,} in MNIST")
assert round(batch_of_512 / 1e6, 1) == 11.8
assert all_of_mnist / 1e6 / 3600 / 24 > 7 * 31

# %% [markdown]
# ## Easy, semi-hard, hard
#
# In the plane the three regions become a disc, a ring and the rest. The disc reaches as far as the positive. Its radius is
# √d(a, p), because d is squared; the ring ends at √(d(a, p) + m). Below, one nine is the anchor, and in each half another nine
# is its positive. Crosses are negatives.


# %%
def draw_regions(ax, anchor, positive):
    centre, edge = points[anchor], distances[anchor, positive]
    ax.set_facecolor((*EASY, 0.25))
    for squared_radius, color in ((edge + MARGIN, (*SEMIHARD, 0.6)), (edge, (*HARD, 0.5))):
        for layer in ("white", color):
            ax.add_patch(plt.Circle(centre, squared_radius.sqrt(), facecolor=layer, lw=0))
    ax.plot(*points[~same[anchor]].T, "X", color="black", markersize=9)
    for index, name, offset in ((anchor, "anchor", -19), (positive, "positive", 10)):
        ax.plot(*points[index], "o", color=SAME, markersize=11, markeredgecolor="white")
        ax.annotate(name, points[index], (0, offset), textcoords="offset points", ha="center")
    ax.set(xlim=(centre[0] - 0.65, centre[0] + 0.65), ylim=(centre[1] - 0.65, centre[1] + 0.65))
    ax.grid(False)
    ax.set_aspect("equal")


# %%
figure, axes = plt.subplots(1, 2, figsize=(9.5, 5))
for ax, positive, title in zip(axes, (1, 4), ("near", "far"), strict=True):
    draw_regions(ax, 2, positive)
    ax.set(title=f"A {title} positive", xlabel="first component")
axes[0].set_ylabel("second component")
handles = [plt.Rectangle((0, 0), 1, 1, color=color, alpha=0.5) for *_, color in regions]
figure.legend(handles, [name for name, *_ in regions], loc="outside lower center", ncols=3)
plt.show()

nearest = distances[2].masked_fill(same[2], torch.inf).min()
assert distances[2, 1] < nearest < distances[2, 1] + MARGIN
assert nearest < distances[2, 4]

# %% [markdown]
# The nearer cross is semi-hard on the left and hard on the right. So these are words for *triplets*, not for images: it takes
# all three to tell. A small surprise of the squared distance: the ring has the same area, π m, however far the positive is. It
# only gets thinner.
#
# Now sort all 290 triplets by hand into the three kinds, and compare with what the library lists for each.

# %%
triplets = torch.stack(mine_triplets(points, classes), dim=1)
a, p, n = triplets.T
is_hard = distances[a, n] < distances[a, p]
is_active = distances[a, n] < distances[a, p] + MARGIN
kinds = {"hard": is_hard, "semihard": is_active & ~is_hard, "easy": ~is_active}
for kind, chosen in kinds.items():
    by_hand = triplets[chosen].tolist()
    mined = torch.stack(mine_triplets(points, classes, kind, margin=MARGIN), dim=1).tolist()
    print(f"{kind:<9}{len(by_hand):>4}")
    assert sorted(by_hand) == sorted(mined)
assert sum(int(chosen.sum()) for chosen in kinds.values()) == 290

# %% [markdown]
# Hard and semi-hard triplets together are the **active** ones: they have a positive loss. Here 76 + 38 = 114 of 290 are
# active.
#
# ## The loss on twelve digits
#
# Add up the losses of all triplets, one by one, in plain Python. To look at every triplet of a batch is called **batch-all**.

# %%
total, active = 0.0, 0
for i, j, k in triplets.tolist():
    loss = max(0.0, float(distances[i, j]) - float(distances[i, k]) + MARGIN)
    total += loss
    active += loss > 0
print(f"sum {total:.1f} over {active} active of {len(triplets)} triplets")
assert active == int(is_active.sum()) == 76 + 38

# %% [markdown]
# A sum depends on the size of the batch, so one takes a mean. Over what? Over all valid triplets, or over the active ones
# only, as Hermans and others (2017) propose. The library offers all three, each by hand on the left and from the library on
# the right:

# %%
means = {"sum": total, "mean": total / len(triplets), "active": total / active}
for reduction, by_hand in means.items():
    by_library = batch_all_triplet_loss(points, classes, MARGIN, reduction=reduction)
    print(f"{reduction:<7}{by_hand:>7.3g}{float(by_library):>7.3g}")
    assert abs(float(by_library) - by_hand) < 1e-5 * by_hand

# %% [markdown]
# ## What the loss asks of the points
#
# Where should the three points of an active triplet go? The gradient tells, and it is short. A step *against* it pulls the
# positive towards the anchor, pushes the negative away from the anchor, and moves the anchor the way from the negative to the
# positive. All three steps are as long as what they point along, times two: that is the square at work.

# %%
anchor, positive, negative = (points[i].clone().requires_grad_() for i in (2, 4, 9))
hinge((anchor - positive).square().sum(), (anchor - negative).square().sum()).backward()
torch.testing.assert_close(-positive.grad, 2 * (anchor - positive).detach())
torch.testing.assert_close(-negative.grad, 2 * (negative - anchor).detach())
torch.testing.assert_close(-anchor.grad, 2 * (positive - negative).detach())

# %% [markdown]
# Now let all 290 triplets pull at once, and follow them: a step against the gradient, again and again. There is no network
# yet; every point moves freely.


# %%
def descend(points, classes, steps, rate):
    states = [points]
    for _ in range(steps):
        now = states[-1].clone().requires_grad_()
        batch_all_triplet_loss(now, classes, MARGIN, reduction="mean").backward()
        states.append(now.detach() - rate * now.grad)
    return torch.stack(states)


paths = descend(points, classes, steps=100, rate=0.2)
assert describe_triplets(paths[0], classes, MARGIN).active == 114 / 290
assert describe_triplets(paths[-1], classes, MARGIN).active == 0

# %%
figure, axes = plt.subplots(1, 2, figsize=(12, 5), sharex=True, sharey=True)
first_step = paths[1] - paths[0]
axes[0].quiver(*paths[0].T, *first_step.T, scale=1 / 7, scale_units="xy", angles="xy")
place_digits(axes[0], paths[0], zoom=0.7)
axes[0].set(title="Where the loss wants each digit to go", ylabel="second component")
axes[1].plot(*paths.permute(2, 0, 1), color="grey", lw=1.5)
place_digits(axes[1], paths[-1], zoom=0.7)
axes[1].set(title="After 100 steps no triplet is active")
for ax in axes:
    ax.set_xlabel("first component")
plt.show()

# %% [markdown]
# Arrows show the first step, seven times enlarged; digits in many active triplets have long ones. Grey lines show all hundred
# steps. The classes have come apart, with a gap between them. Then everything stopped: the loss asks for the margin and no
# more. It neither shrinks classes to points nor drives them apart for ever.
#
# ## A mean over what?
#
# Do the same with 512 digits, the first of the training set, in 32 principal components and starting on a sphere of radius
# one. Watch two numbers on the way: the mean loss over active triplets, and the fraction of triplets that is active.

# %%
many, many_classes = images[:512].flatten(1), labels[:512]
many = many - many.mean(dim=0)
many = F.normalize(many @ torch.linalg.svd(many, full_matrices=False).Vh[:32].T)

states = descend(many, many_classes, steps=60, rate=20)[::5]
seen = pd.DataFrame([describe_triplets(state, many_classes, MARGIN) for state in states])
for reduction in ("active", "mean"):
    seen[f"{reduction} loss"] = [
        float(batch_all_triplet_loss(state, many_classes, MARGIN, reduction=reduction))
        for state in states
    ]

# %%
steps = range(0, 61, 5)
figure, axes = plt.subplots(1, 2, figsize=(11.5, 4))
axes[0].plot(steps, seen["active loss"] / seen["active loss"][0], "o-", label="mean over active")
axes[0].plot(steps, seen["active"] / seen["active"][0], "s-", label="active fraction")
axes[0].set(title="The active fraction falls far more than the loss", yscale="log", xlabel="step")
axes[0].set_ylabel("relative to the start")
axes[0].legend()
shares = (seen["hard"], seen["semihard"], 1 - seen["active"])
axes[1].stackplot(steps, shares, colors=(HARD, SEMIHARD, EASY), alpha=0.6)
axes[1].set(title="Soon nearly all triplets are easy", xlabel="step", xlim=(0, 60), ylim=(0, 1))
axes[1].set_ylabel("share of all triplets")
for name, x, y in (("hard", 10, 0.16), ("semi-hard", 10, 0.28), ("easy", 10, 0.6)):
    target = {"hard": (2, 0.08), "semi-hard": (2, 0.19), "easy": (2, 0.5)}[name]
    axes[1].annotate(name, target, (x, y), arrowprops={"arrowstyle": "-", "color": "black"})
plt.show()

# %% [markdown]
# The mean over active triplets sinks to a quarter, the active fraction to a fiftieth. A triplet that is solved leaves the
# mean; the stubborn ones stay in it. Whoever watches the mean alone thinks that learning has slowed down, when it has solved
# nearly everything.
#
# So read the two together. Their product is the mean over all valid triplets:

# %%
product = seen["active loss"] * seen["active"]
assert ((product / seen["mean loss"] - 1).abs() < 1e-4).all()
first, last = seen.iloc[0], seen.iloc[-1]
assert 0.2 < last["active loss"] / first["active loss"] < 0.27
assert last["active"] / first["active"] < 1 / 45

# %% [markdown]
# Why train with the mean over active triplets at all? For its gradient. The mean over all fades as triplets are solved, and
# learning fades with it. The mean over the active ones keeps pulling at what is left.
#
# ## Which triplets to look at
#
# Twelve million triplets, soon nearly all of them silent. So people choose. Four ways are common:
#
# - **random**: a positive and a negative drawn for each anchor, as in Hoffer and Ailon's triplet network (2014);
# - **batch-all**: every triplet;
# - **batch-hard** (Hermans and others, 2017): for each anchor its *farthest* positive and its *nearest* negative;
# - **semi-hard** (after FaceNet): for each anchor and positive, the nearest negative that is *farther* than the positive.
#
# To see them, list what each way takes for one anchor, the first nine.


# %%
def how_far(index):
    return float(distances[anchor, index])


anchor, draw = 0, torch.Generator().manual_seed(1)
positives = [i for i in range(12) if same[anchor, i] and i != anchor]
negatives = [i for i in range(12) if not same[anchor, i]]
next_farther = [
    min((k for k in negatives if how_far(k) > how_far(j)), key=how_far) for j in positives
]
drawn = [
    mined[anchor : anchor + 1] for mined in mine_triplets(points, classes, "random", generator=draw)
]
chosen = {
    "random: 1 triplet": drawn[1:],
    "batch-all: 28 triplets": (positives, negatives),
    "batch-hard: 1 triplet": ([max(positives, key=how_far)], [min(negatives, key=how_far)]),
    "semi-hard: 4 triplets": (positives, next_farther),
}

# %%
figure, axes = plt.subplots(2, 2, figsize=(11, 8.4), sharex=True, sharey=True)
for ax, (title, ends) in zip(axes.flat, chosen.items(), strict=True):
    for indices, color in zip(ends, (SAME, DIFFERENT), strict=True):
        for index in indices:
            ax.plot(*points[[anchor, int(index)]].T, color=color, lw=3, alpha=0.8)
    ax.plot(*points[anchor], "s", color="black", markersize=21)
    place_digits(ax, points, zoom=0.5)
    ax.set_title(title)
figure.supxlabel("first component")
figure.supylabel("second component")
plt.show()

# %% [markdown]
# Blue lines lead from the anchor, framed in black, to positives, orange ones to negatives. In the last picture two positives
# share a negative.
#
# The loss of each way is the mean hinge over what it takes. Here are batch-hard and semi-hard by hand, for all twelve anchors.
# If no negative is farther than the positive, the farthest one stands in.

# %%
hardest, semihard = [], []
for i in range(12):
    negatives = distances[i][~same[i]]
    positives = distances[i][same[i] & (torch.arange(12) != i)]
    hardest.append(hinge(positives.max(), negatives.min()))
    for to_positive in positives:
        farther = negatives[negatives > to_positive]
        nearest = farther.min() if len(farther) else negatives.max()
        semihard.append(hinge(to_positive, nearest))

for mining, losses in (("hard", hardest), ("semihard", semihard)):
    by_library = TripletLoss(MARGIN, mining=mining)(points, classes)
    print(f"{mining:<9}{len(losses):>3} triplets, mean loss {by_library:.3f}")
    torch.testing.assert_close(by_library, torch.stack(losses).mean())

# %% [markdown]
# Mind the word: in `mine_triplets`, `"hard"` means *every* hard triplet; in `TripletLoss`, `mining="hard"` means the *hardest*
# of each anchor.
#
# How many of the triplets that were chosen are active, and so teach anything? Follow the 512 digits once more on their way.


# %%
def active_share(state):
    d, alike = pairwise_distances(state, squared=True), many_classes[:, None] == many_classes
    a, p, n = mine_triplets(state, many_classes, "random", generator=draw)
    farthest, nearest = d.masked_fill(~alike, 0).amax(1), d.masked_fill(alike, torch.inf).amin(1)
    shares = [hinge(d[a, p], d[a, n]) > 0, hinge(farthest, nearest) > 0]
    return torch.stack(shares).float().mean(dim=1)


random_share, hard_share = torch.stack([active_share(state) for state in states]).T
assert random_share[-1] < 0.03
assert hard_share[-1] > 0.9

# %%
ax = plt.gca()
ax.plot(steps, hard_share, "s-", color=HARD, label="batch-hard (512 triplets)")
ax.plot(steps, random_share, "o-", color=PALETTE[0], label="random (512 triplets)")
ax.plot(steps, seen["active"], ":", color="black", label="batch-all (12 million)")
ax.set(
    title="Random draws run dry, the hardest do not", xlabel="step", ylabel="share that is active"
)
ax.set_ylim(-0.03, 1.03)
ax.legend(loc="center right")
plt.show()

# %% [markdown]
# Random triplets are like the batch, and in the end nearly all silent. The hardest stay active. But hardest also means most
# extreme: a smudge, a wrong label, and it alone speaks for its anchor. Chapter 4 shows a network that collapses over this.
# Semi-hard is a compromise.
#
# Batch-all lets everyone speak: the extreme ones are outnumbered, and no active triplet is missed. What speaks against it is
# the cost. We now take that away.
#
# ## All triplets, on a row of numbers
#
# Take one anchor. All that matters is a row of distances, here of two positives and five negatives, with margin 2 so that we
# can do the sums in our heads. Each positive sets a **threshold**, its distance plus the margin. A negative nearer than the
# threshold costs the difference.

# %%
positives = torch.tensor([3.0, 6.0])
negatives = torch.tensor([7.0, 1.0, 10.0, 4.0, 9.0])
thresholds = positives + 2
losses = (thresholds[:, None] - negatives).clamp(min=0)
print(losses)
print("sums", losses.sum(dim=1))

# %% [markdown]
# That is the brute force, a row for each positive, a column for each negative. Now **sort the negatives**. Those nearer than a
# threshold t are then simply the first c. Their losses t − d(a, n) add up to c times t, minus the sum of the first c
# distances:
#
# $$\sum_{\text{first } c} \bigl(t - d(a, n)\bigr) = c\,t - S_c$$
#
# And S, the sum of the first 0, 1, 2, … distances, comes for all c at once, from one cumulative sum.

# %%
ordered = negatives.sort().values
S = F.pad(ordered.cumsum(dim=0), (1, 0))
c = torch.searchsorted(ordered, thresholds)
print("sorted", ordered.tolist())
print("S     ", S.tolist())
print("c     ", c.tolist())
print("sums  ", (c * thresholds - S[c]).tolist())
assert torch.equal(c * thresholds - S[c], losses.sum(dim=1))

# %%
figure, axes = plt.subplots(1, 2, figsize=(12, 4), sharey=True, sharex=True)
for ax, t, k in zip(axes, thresholds, c, strict=True):
    places, nearer = range(1, 6), ordered[:k]
    ax.barh(places[:k], nearer, color="lightgrey", label="$S_c$")
    ax.barh(places[:k], t - nearer, left=nearer, color=DIFFERENT, alpha=0.7, label="$c\\,t - S_c$")
    ax.plot(ordered, places, "X", color="black", markersize=9, label="negative")
    ax.axvline(t - 2, color=SAME, lw=2.5, label="positive")
    ax.axvline(t, color=SAME, lw=2.5, linestyle="--", label="threshold t")
    ax.set(title=f"c t − S = {k} · {t:.0f} − {S[k]:.0f} = {k * t - S[k]:.0f}", axisbelow=True)
    ax.set(xlabel="distance from the anchor", xlim=(0, 10.7), ylim=(5.6, 0.4), yticks=places)
axes[0].set_ylabel("negatives, nearest first")
figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=5)
plt.show()

# %% [markdown]
# The c bars end at the threshold, so grey and orange together are c · t. Grey is the way to each negative, S in all. Orange is
# what is left: the loss. No negative had to be visited on its own, and `searchsorted` finds c by halving, in about log₂ n
# looks.
#
# ## The gradient is a count
#
# Move a positive out by a little ε. Its threshold moves by ε, and so does each of its c losses: its slope is **c**. Move a
# negative out by ε, and every threshold beyond it loses ε: its slope is **minus the number of thresholds beyond it**. Nothing
# but counts, then. Automatic differentiation of the brute force gives the same.

# %%
beyond = len(thresholds) - torch.searchsorted(thresholds.sort().values, negatives, right=True)
print("positives", c.tolist(), " negatives", (-beyond).tolist())

positives.requires_grad_()
negatives.requires_grad_()
(positives[:, None] + 2 - negatives).clamp(min=0).sum().backward()
assert torch.equal(positives.grad, c.float())
assert torch.equal(negatives.grad, -beyond.float())
assert c.sum() == beyond.sum()

# %% [markdown]
# Both sides count the same thing, so their sums agree: it is the number of active triplets, for free.
#
# See it on a real anchor, the first of the 512 digits: a row for each of its positives, a column for each negative, so a cell
# for each triplet. Orange cells are active.

# %%
d = pairwise_distances(many, squared=True)
alike = many_classes[0] == many_classes
near, far = d[0][alike][1:], d[0][~alike]
figure, axes = plt.subplots(1, 2, figsize=(12, 4))
for ax, order in zip(axes, (torch.clone, torch.msort), strict=True):
    cells = order(near)[:, None] + MARGIN > order(far)
    colors = ["#eeeeee", DIFFERENT]
    sns.heatmap(cells, ax=ax, cmap=colors, cbar=False, xticklabels=100, yticklabels=10)
    ax.tick_params(rotation=0)
    ax.set(xlabel="negatives", ylabel="positives")
axes[0].set_title("Active triplets of one anchor …")
axes[1].set_title("… and sorted, nearest first: a staircase")

length, height = int(cells[25].sum()), int(cells[:, 350].sum())
arrow = {"arrowstyle": "<->", "color": "white", "lw": 2}
axes[1].annotate("", (0, 25.5), (length, 25.5), arrowprops=arrow)
axes[1].annotate("", (350, len(near)), (350, len(near) - height), arrowprops=arrow)
axes[1].text(10, 28, f"slope of this positive: {length}", color="white")
axes[1].text(340, 36, f"slope of this negative: −{height}", color="white", ha="right")
plt.show()

# %% [markdown]
# Sorting turns confetti into a staircase, and a staircase needs no list of its cells: its steps say it all. The length of a
# row is a positive's slope, the height of a column a negative's.
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
# The slopes are the gradient by the *distances*. From there to the points the chain rule does the rest:
# `distances.backward(slopes)`. First compare with the brute force, a list of triplets and automatic differentiation, on 128
# digits.

# %%
few, few_classes = many[:128].double().requires_grad_(), many_classes[:128]
squared = pairwise_distances(few, squared=True)
a, p, n = mine_triplets(few, few_classes)
brute = hinge(squared[a, p], squared[a, n]).sum()
(brute_gradient,) = torch.autograd.grad(brute, few, retain_graph=True)

total, slopes = all_triplets(squared.detach(), few_classes)
squared.backward(slopes)
print(f"{len(a):,} triplets")
torch.testing.assert_close(total, brute.detach())
torch.testing.assert_close(few.grad, brute_gradient)

# %% [markdown]
# Then with the library, on all 512: the value, the gradient, and the number of active triplets, which is the sum of the slopes
# of positives. (These 512 are not quite balanced and hold 12.06 million triplets, a few more than the 11.8 million above.)

# %%
ours, theirs = (many.double().requires_grad_() for _ in range(2))
squared = pairwise_distances(ours, squared=True)
total, slopes = all_triplets(squared.detach(), many_classes)
squared.backward(slopes)

loss, active = batch_all_triplet_loss(
    theirs, many_classes, MARGIN, reduction="sum", return_active=True
)
loss.backward()
torch.testing.assert_close(loss.detach(), total)
torch.testing.assert_close(theirs.grad, ours.grad)
assert active == slopes.clamp(min=0).sum()
valid = count_triplets(many_classes.bincount().tolist())
print(f"{int(active) / valid:.1%} of {valid:,} triplets are active")

# %% [markdown]
# The library does the mirror image of this: it sorts the thresholds, of which there are far fewer, and finds each negative's
# place among them, for all anchors at once instead of in a loop. Exercise 4 does the sums.
#
# ## How time and memory grow
#
# The brute force needs a number for each triple of images: n³. The sorted way needs one for each pair, n², and sorts n rows of
# n numbers: n² log n steps. Time both, value and gradient.


# %%
def brute_force(points, classes):
    distances = pairwise_distances(points, squared=True)
    same = classes[:, None] == classes
    positive = same & ~torch.eye(len(points), dtype=torch.bool)
    valid = positive[:, :, None] & ~same[:, None, :]
    losses = hinge(distances[:, :, None], distances[:, None, :]) * valid
    return losses.sum() / (losses > 0).sum()


def seconds(loss, n):
    points = torch.randn(n, 64, generator=draw).requires_grad_()
    start = time.perf_counter()
    loss(points, torch.arange(n) % 10).backward()
    return time.perf_counter() - start


torch.testing.assert_close(
    brute_force(many[:128], few_classes), batch_all_triplet_loss(many[:128], few_classes, MARGIN)
)

# %% tags=["nbval-ignore-output"]
ways = {"brute force": brute_force, "sorted": batch_all_triplet_loss}
sizes = {"brute force": [32, 64, 128, 256], "sorted": [32, 64, 128, 256, 512, 1024, 2048]}
timed = {
    name: [min(seconds(ways[name], n) for _ in range(3)) for n in sizes[name]] for name in ways
}
for name, times in timed.items():
    print(name, [f"{n}: {1000 * t:.1f} ms" for n, t in zip(sizes[name], times, strict=True)])

# %% [markdown]
# Memory we can work out: four bytes for each entry of *one* float32 tensor of that size. (Automatic differentiation keeps
# several.)

# %%
batch = torch.tensor([32, 64, 128, 256, 512, 1024, 2048, 4096])
gigabytes = {"brute force": 4 * batch.double() ** 3 / 1e9, "sorted": 4 * batch.double() ** 2 / 1e9}
at_4096 = {name: float(values[-1]) for name, values in gigabytes.items()}
print({name: f"{value:.2f} GB" for name, value in at_4096.items()})
assert at_4096["brute force"] > 270
assert at_4096["sorted"] < 0.07

at_256, at_2048 = (count_triplets((torch.arange(n) % 10).bincount().tolist()) for n in (256, 2048))
assert at_2048 > 500 * at_256

# %%
figure, axes = plt.subplots(1, 2, figsize=(12, 4.2), sharex=True)
for (name, times), color in zip(timed.items(), (DIFFERENT, SAME), strict=True):
    axes[0].plot(sizes[name], times, "o-", color=color, label=name)
    axes[1].plot(batch, gigabytes[name], "o-", color=color, label=name)
axes[1].axhline(16, color="grey", linestyle=":")
axes[1].annotate("a laptop's 16 GB", (32, 22), color="grey")
axes[0].set(title="Time for value and gradient", ylabel="seconds")
axes[1].set(title="Memory: the cube against the square", ylabel="gigabytes, one tensor")
for ax in axes:
    ax.set(xscale="log", yscale="log", xlabel="images in the batch, n")
    ax.set_xticks(batch, [str(n) for n in batch.tolist()], rotation=45)
    ax.minorticks_off()
    ax.legend()
plt.show()

# %% [markdown]
# With both axes logarithmic, a power of n is a straight line and its steepness is the exponent. So the lines part more and
# more. On the machine that made this page, the sorted way at 2 048 images is done sooner than the brute force at 256, with five
# hundred times as many triplets. At 512, the batch of this book, it takes a few thousandths of a second.
#
# ## When it goes wrong: NaN from a root
#
# Say you want distances that are not squared, and write them as chapter 1 did by hand. The loss is fine. Its gradient is not a
# number, in all 24 places.


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
loss, gradient = gradient_of_loss(rooted)
assert loss.isfinite()
print(int(gradient.isnan().sum()), "of", gradient.numel(), "are NaN")

# %% [markdown]
# No two digits coincide, and no triplet uses the distance of a point to itself. But that distance was *computed*, on the
# diagonal, and the root's slope at zero is infinite. Its share in the loss is zero; zero times infinity is NaN. One such step,
# and all weights of a network are NaN too.
#
# The library's distance has gradient zero at zero. The rest is as it should be: the same as from distances that are computed
# only for the pairs in triplets. The last check has what data sets do contain, the same image twice.

# %%
safe_loss, safe_gradient = gradient_of_loss(pairwise_distances)
torch.testing.assert_close(safe_loss, loss)

moving = points.clone().requires_grad_()
hinge(*((moving[a] - moving[other]).norm(dim=1) for other in (p, n))).mean().backward()
torch.testing.assert_close(safe_gradient, moving.grad)

twins = points[[0, 0, 5]].requires_grad_()
twin_loss = batch_all_triplet_loss(twins, classes[[0, 0, 5]], margin=5, squared=False)
twin_loss.backward()
assert twin_loss > 0
assert twins.grad.isfinite().all()

# %% [markdown]
# ## When it goes wrong: a zero that means nothing
#
# A loss of zero looks like success. It may also be silence. A batch in which no class has two images has no positives; a batch
# of a single class has no negatives. Neither has a triplet. The step is lost, and nothing tells.

# %%
one_each, all_alike = torch.arange(12), torch.zeros(12, dtype=torch.int64)
for batch_classes in (one_each, all_alike):
    state = describe_triplets(points, batch_classes, MARGIN)
    print(float(batch_all_triplet_loss(points, batch_classes)), state.triplets, "triplets")
    assert state.triplets == 0

# %% [markdown]
# So count. `describe_triplets` tells *none active of many*, which is solved, from *none at all*. The mend is a batch in which
# every image has company, as `BalancedBatchSampler` of chapter 1 draws it.
#
# ## Exercises
#
# Try each before you unfold its solution (click the blue bar or the three dots).
#
# **1.** Let distances not be squared, and the margin stay 0.2. Which of the three kinds of triplets change in number? Think
# first, then count.

# %% jupyter={"source_hidden": true}
for kind in kinds:
    counts = [
        len(mine_triplets(points, classes, kind, margin=MARGIN, squared=squared)[0])
        for squared in (True, False)
    ]
    print(kind, counts)
    assert (counts[0] == counts[1]) == (kind == "hard")

# %% [markdown]
# Which of two is nearer does not depend on squaring, so hard stays hard. By how much it is nearer does depend on it.
#
# **2.** A batch of 512 images may have 2, 4, 8, … or 256 classes of equal size. With which are there most triplets? Is that
# the best batch?

# %% jupyter={"source_hidden": true}
by_classes = {C: count_triplets([512 // C] * C) for C in (2, 4, 8, 16, 32, 64, 128, 256)}
print(by_classes)
assert max(by_classes, key=by_classes.get) == 2

# %% [markdown]
# Two classes give most, about n³ / 4. But they all ask one question: this class or that? More classes ask more questions.
#
# **3.** Put all twelve points on one spot. What is the loss, what its gradient, and what does gradient descent do from there?

# %% jupyter={"source_hidden": true}
spot = torch.zeros(12, 2, requires_grad=True)
loss = batch_all_triplet_loss(spot, classes, MARGIN)
loss.backward()
assert abs(loss.item() - MARGIN) < 1e-6
assert (spot.grad == 0).all()

# %% [markdown]
# Each triplet costs exactly the margin, and there is no slope to leave by: descent stays there for ever. Chapter 4 meets this
# spot again, as *collapse*.
#
# **4.** Mirror the sum. Sort the *thresholds*, and for each negative of the row of numbers find those that lie beyond it. What
# do its losses add up to?

# %% jupyter={"source_hidden": true}
row = negatives.detach()
ordered = thresholds.sort().values
sums = F.pad(ordered.cumsum(dim=0), (1, 0))
below = torch.searchsorted(ordered, row, right=True)
mirrored = (sums[-1] - sums[below]) - (len(ordered) - below) * row
print(mirrored.tolist())
assert mirrored.sum() == losses.sum() == 17

# %% [markdown]
# The sum over columns is the sum over rows: 17.
#
# ## Summary
#
# - A triplet compares: the anchor should be nearer to the positive than to the negative, by a margin.
# - A batch has Σ k (k − 1)(n − k) triplets. Hard and semi-hard ones are active; soon most are easy.
# - Random triplets run dry, the hardest are extreme; semi-hard lies between, and batch-all misses none.
# - Read the mean over active triplets together with the active fraction. A zero may mean that there was nothing to look at.
# - On sorted distances the loss over all triplets, and its gradient, are counts and sums: n² memory, n² log n time.
#
# **Next:** [3 · Network](03_network.ipynb) builds the function whose points this loss will move.
#
# **References.** E. Hoffer, N. Ailon, "Deep metric learning using triplet network", arXiv 1412.6622, 2014. · F. Schroff, D.
# Kalenichenko, J. Philbin, "FaceNet: A unified embedding for face recognition and clustering", 2015 (margin, squared distance,
# semi-hard). · A. Hermans, L. Beyer, B. Leibe, "In defense of the triplet loss for person re-identification", 2017 (batch-all,
# batch-hard, mean over active triplets).
