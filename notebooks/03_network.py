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
# # 3 · Network: a function from images to points
#
# Pixel distance compares ink in place, so a small shift spoils it. This chapter builds a function that moves images to points on a
# sphere, takes it apart layer by layer, and measures what it is worth before it has learned anything.
#
# - **You will learn** what convolution, padding, ReLU and pooling do, how a network is put together and where its weights and its
#   work are, what batch normalisation does in its two modes, why embeddings lie on a sphere, and what towers with shared weights
#   share.
# - **You need** chapter [1](01_data.ipynb) and the triplets of chapter [2](02_triplets.ipynb); no GPU.
# - **Running time** under a minute on two cores.
# - Previous: [2 · Triplets](02_triplets.ipynb) · Next: [4 · Training](04_training.ipynb)

# %%
from copy import deepcopy

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
import torch
import torch.nn.functional as F
from scipy.stats import binomtest
from torch import nn

from tripletlib import (
    EmbeddingNet,
    KNNClassifier,
    TripletNet,
    describe_triplets,
    embed,
    load_mnist,
    pairwise_distances,
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
plt.rcParams["figure.dpi"] = 85  # there are many pictures, and the page should stay small
images, labels = load_mnist("train")
gallery, gallery_labels = images[:2000], labels[:2000]
queries, query_labels = images[2000:3000], labels[2000:3000]

# %% [markdown]
# 2 000 images to search in, the **gallery**, and 1 000 others to search with, the **queries**, are enough here. All are training
# images: some comparisons below guide a choice, and choices are not made on the test set.
#
# ## A function instead of a ruler
#
# Keep the ruler, plain Euclidean distance, and change the points: find a function from images to **embeddings** after which near
# means same.
# Which functions should be allowed? The most general layer connects every input with every output. For an image that takes many
# weights. Compare two ways to turn 28 × 28 pixels into 32 maps of 24 × 24 numbers.

# %%
fully_connected = (28 * 28) * (32 * 24 * 24)
convolution = nn.Conv2d(1, 32, 5, bias=False).weight.numel()
print(f"weights: {fully_connected:,} fully connected, {convolution} as a convolution")
print(f"fully connected: {fully_connected / len(images):.0f} for each of {len(images):,} images")
assert convolution == 32 * 5 * 5

# %% [markdown]
# The first layer has 241 weights for each training image. The second is the same layer under two restrictions that suit images.
# An output looks only at a small window, since what makes a stroke is close together. And all windows use the same weights, since
# a stroke is a stroke anywhere. A layer with both restrictions is a **convolution**.

# %% [markdown]
# ## What a convolution does
#
# Lay a small **kernel** of weights on the image, multiply what lies on top of each other, add up, move on by a pixel. This kernel
# subtracts what is on its left from what is on its right. The patch crosses the stroke of a one; blank paper is 0, full ink is 1.


# %%
def ink(batch):
    return (batch - images.min()) / (images.max() - images.min())


one = ink(queries[query_labels == 1][0, 0])
patch = one[10:15, 11:19]
kernel = torch.tensor([[-1.0, 0, 1], [-1, 0, 1], [-1, 0, 1]])

by_hand = torch.empty(3, 6)
for row in range(3):
    for column in range(6):
        by_hand[row, column] = (patch[row : row + 3, column : column + 3] * kernel).sum()

torch.testing.assert_close(F.conv2d(patch[None, None], kernel[None, None])[0, 0], by_hand)
print("by hand and by the library:", tuple(patch.shape), "->", tuple(by_hand.shape))


# %%
def draw_numbers(ax, values, title, digits=1):
    style = {"cmap": "vlag", "center": 0, "cbar": False, "square": True, "linewidths": 1}
    sns.heatmap(values, ax=ax, annot=True, fmt=f".{digits}f", **style)
    ax.set_title(title, fontsize=11)
    ax.set(xticks=[], yticks=[])


# %% alt="A patch across the stroke of a one, a kernel of three columns -1, 0 and 1, and the result: large positive numbers where the ink begins, large negative ones where it ends, zero in the middle of the stroke, where both sides are equally dark."
figure, axes = plt.subplots(1, 3, figsize=(10, 3), width_ratios=[8, 3, 6])
draw_numbers(axes[0], patch, "patch of a one")
draw_numbers(axes[1], kernel, "kernel")
draw_numbers(axes[2], by_hand, "edges: + ink begins, − it ends")
plt.show()

# %% [markdown]
# The result is positive where it gets darker from left to right, negative where it gets lighter, and zero where both sides are
# equally dark: an edge detector made of nine numbers.
#
# It is also smaller than the patch, because the kernel must fit inside. Where that is not wanted, a frame of zeros is laid around
# the input first. This is **padding**: one pixel on each side keeps the size for a 3 × 3 kernel.

# %%
framed = F.pad(patch, (1, 1, 1, 1))
without = F.conv2d(framed[None, None], kernel[None, None])
by_option = F.conv2d(patch[None, None], kernel[None, None], padding=1)
torch.testing.assert_close(without, by_option)
print(tuple(patch.shape), "-> padded", tuple(framed.shape), "->", tuple(by_option[0, 0].shape))

# %% [markdown]
# What comes out of a kernel is a **feature map**, or *channel*. The next layer then has several maps as its input. Its kernel is a
# stack, with one slice for each input map; every slice is laid on its own map, and all products are added up into *one* number. So a
# kernel on two maps still gives one map. More output maps take more kernels.

# %%
two_maps = torch.tensor([[[1.0, 0, 2], [0, 1, 0], [3, 0, 1]], [[0, 1, 0], [2, 0, 1], [0, 1, 0]]])
slices = torch.tensor([[[1.0, 0], [0, 1]], [[0, 2], [1, 0]]])

parts = torch.zeros(2, 2, 2)
for channel in range(2):
    for row in range(2):
        for column in range(2):
            window = two_maps[channel, row : row + 2, column : column + 2]
            parts[channel, row, column] = (window * slices[channel]).sum()

torch.testing.assert_close(F.conv2d(two_maps[None], slices[None])[0, 0], parts.sum(dim=0))
print("weights of a layer from 2 maps to 5:", tuple(nn.Conv2d(2, 5, 2, bias=False).weight.shape))

# %% alt="Two input maps of 3 by 3 numbers, each beside its own 2 by 2 slice of the kernel and the products summed for that map; at the right the two partial results are added to one map."
figure, axes = plt.subplot_mosaic("abc.;abcs;defs;def.", figsize=(9, 3.9))
for names, channel in (("abc", 0), ("def", 1)):
    for name, values, title in zip(
        names,
        (two_maps[channel], slices[channel], parts[channel]),
        ("input map", "× its slice", "= its part"),
        strict=True,
    ):
        draw_numbers(axes[name], values, f"{title} {channel + 1}", digits=0)
draw_numbers(axes["s"], parts.sum(dim=0), "parts added: one map", digits=0)
plt.show()

# %% [markdown]
# Now take four kernels, one for each side of a stroke: the kernel above, its negative, and both turned by a quarter. Without
# more, the second map would be the first with its sign changed, and so say nothing new. The **rectified linear unit** (ReLU)
# sets negative numbers to zero: each map keeps one kind of edge.

# %% alt="A handwritten three and four feature maps of it, dark where the left, right, upper or lower rim of the stroke is."
kernels = torch.stack([kernel, -kernel, kernel.T, -kernel.T])[:, None]


def edges(batch):
    return F.relu(F.conv2d(ink(batch), kernels))


three = queries[query_labels == 3][1:2]
rims = edges(three).transpose(0, 1)
shown = torch.cat([ink(three), F.pad(rims / rims.max(), (1, 1, 1, 1))])
figure = show_images(
    shown, ["the image", "left rims", "right rims", "upper rims", "lower rims"], columns=5, size=1.6
)
plt.show()

# %% [markdown]
# There is a second reason for a ReLU between layers. A convolution is linear, and two linear steps are one: a 3 × 3 kernel after
# another is the same as a single 5 × 5 kernel. Depth would gain nothing. With a ReLU between them, no single kernel does what the
# two do: any kernel makes of −*x* minus what it makes of *x*, so that both results add up to zero; with the ReLU they differ from
# zero by up to 4.1.

# %%
first, second = kernels[:1], kernels[2:3]
merged = F.conv2d(F.pad(first, (2, 2, 2, 2)), second.flip(2, 3))
in_one_step = F.conv2d(ink(three), merged)


def two_steps(maps, between):
    return F.conv2d(between(F.conv2d(maps, first)), second)


for name, between in (("two steps", nn.Identity()), ("two steps, ReLU between", F.relu)):
    result = two_steps(ink(three), between)
    off = (result - in_one_step).abs().max()
    both = (result + two_steps(-ink(three), between)).abs().max()
    print(f"{name}: off by {off:.1f} from the 5 × 5 kernel, x and −x add up to {both:.1f}")
    assert (off < 1e-5 and both < 1e-5) == (between is not F.relu)

# %% [markdown]
# ## Shift in, shift out
#
# Because every window uses the same weights, a shifted image gives the shifted feature maps, number for number up to the border. This is
# **equivariance**. What a kernel has learned about strokes on the left holds on the right, without an example from there. We shift
# to the right and fill up with blank paper on the left; what leaves on the right is lost.


# %%
def shifted(batch, pixels):
    return F.pad(batch, (pixels, 0, 0, 0), value=float(images.min()))[..., : batch.shape[3]]


torch.testing.assert_close(edges(shifted(queries, 2))[..., 2:], edges(queries)[..., :-2])
for pixels in (1, 2, 3, 4):
    cut = (ink(queries)[..., -pixels:] > 0).flatten(1).any(dim=1)
    print(f"shifted by {pixels}: {int(cut.sum())} of {len(queries)} images lose some ink")

# %% [markdown]
# That alone does not make distances forgiving: the maps move along with the image, so they differ from the original's just as
# the pixels did. Something must throw away the exact place. **Max pooling** does. It cuts each map into squares and keeps the
# largest number of each. If the largest number moves within its square, and no larger one moves in, the square stays as it is.

# %% alt="A three and the same three moved by two pixels, as pixels, as left rims and as left rims pooled in squares of four: pixels and rims have moved by two places, the coarse pooled pattern is similar in both rows."
moved = torch.cat([three, shifted(three, 2)])
stages = [moved, F.pad(edges(moved)[:, :1], (1, 1, 1, 1)), F.max_pool2d(edges(moved)[:, :1], 4)]
figure, axes = plt.subplots(2, 3, figsize=(7, 4.8))
for column, (stage, title) in enumerate(
    zip(stages, ("pixels", "left rims", "pooled 4 × 4"), strict=True)
):
    for row in range(2):
        axes[row, column].imshow(stage[row, 0], cmap="gray_r", vmin=stage.min(), vmax=stage.max())
        axes[row, column].set(xticks=[], yticks=[])
    axes[0, column].set_title(title)
axes[0, 0].set_ylabel("original")
axes[1, 0].set_ylabel("moved by 2")
plt.show()
here, there = stages[2][:, 0]
inked = (here > 0) | (there > 0)
kept = torch.isclose(here, there, atol=1e-4) & inked
print(
    f"{int(kept.sum())} of {int(inked.sum())} pooled squares that are not blank keep their number"
)
assert 0 < kept.sum() < inked.sum()

# %% [markdown]
# The lower row is the upper one, moved by two pixels. Ink and edges have gone to new places; of the 17 pooled squares that are
# not blank, 5 keep their number. Does that help? Ask the neighbours, as in chapter 1: each query gets the label that most of its ten nearest
# gallery images carry (*kNN*, k = 10). Four views take part, so as to see which of the two steps does it.

# %%
views = {
    "pixels": ink,
    "pixels, pooled": lambda batch: F.max_pool2d(ink(batch), 4),
    "edges": edges,
    "edges, pooled": lambda batch: F.max_pool2d(edges(batch), 4),
}


# %% tags=["nbval-ignore-output"]
def classified(asked, known):
    return KNNClassifier(known, gallery_labels, k=10).predict(asked) == query_labels


shifts = (0, 1, 2, 3, 4)
right = {
    (name, shift): classified(view(shifted(queries, shift)).flatten(1), view(gallery).flatten(1))
    for name, view in views.items()
    for shift in shifts
}
accuracy = pd.Series({key: float(hits.float().mean()) for key, hits in right.items()})
print(accuracy.unstack().loc[list(views)].map("{:.1%}".format).to_string())

# %% alt="Accuracy against the shift of the query for four views. All fall. Pixels and edges alone fall together from 90 to about 20 percent, pooled pixels start lower and fall more slowly, pooled edges are highest throughout." tags=["nbval-ignore-output"]
looks = {"pixels": ("o-", 0, 0.025), "pixels, pooled": ("s--", 1, 0)}
looks |= {"edges": ("v:", 4, -0.025), "edges, pooled": ("D-", 2, 0)}
ax = plt.gca()
for name, (style, color, lift) in looks.items():
    ax.plot(shifts, accuracy[name], style, color=PALETTE[color])
    ax.annotate(name, (4.1, accuracy[name][4] + lift), color=PALETTE[color], va="center")
ax.set(title="Edges and pooling together forgive shifts", xlabel="shift of the query (pixels)")
ax.set(ylabel="kNN accuracy", ylim=(0, 1.02), xlim=(-0.1, 5.2), xticks=shifts)
plt.show()

# %% [markdown]
# Edges alone are behind pixels at every shift (in place by two images only), pooled pixels up to a shift of one. Both together
# lead at every shift. Is that more than chance? All views answer the same queries, so count those that only one of two views gets right. If neither were better, these
# would split like tosses of a coin; the **sign test** (McNemar's test) gives the probability *p* of a split at least so uneven.


# %% tags=["nbval-ignore-output"]
def paired(one, other):
    wins, losses = int((one & ~other).sum()), int((other & ~one).sum())
    return wins, losses, binomtest(wins, wins + losses).pvalue


for rival in ("pixels", "pixels, pooled", "edges"):
    for shift in (0, 2):
        wins, losses, p = paired(right["edges, pooled", shift], right[rival, shift])
        print(f"edges, pooled : {rival:<15} shift {shift}   {wins:>3} : {losses:<3} p = {p:.1g}")
        assert wins > 1.5 * losses
        assert p < 0.05

# %% [markdown]
# Pooled edges win every comparison, narrowly against pixels in place (38 : 18), clearly when the query has moved (236 : 50), and
# with 144 numbers instead of 784. Nothing was learned here: nine weights, chosen by hand, did this.
#
# ## A first embedding network
#
# A network repeats these steps, with kernels to be learned, and ends in a *linear layer* that mixes the features into as many
# numbers as the embedding has. The book's network, `EmbeddingNet`, has five convolutions, so that later kernels can combine strokes
# into corners and loops, and **batch normalisation** after each, the subject of the next section.
#
# To see inside, use a *forward hook*: a function that PyTorch calls whenever a layer has computed something. Ours writes down the
# shape of what came out, how many weights the layer has and how many **multiply-adds** (a multiplication, then an addition) it
# took.


# %%
def look_inside(network, batch):
    rows = []

    def write_down(layer, inputs, output):
        weights = sum(parameter.numel() for parameter in layer.parameters())
        each = layer.weight[0].numel() if isinstance(layer, nn.Conv2d | nn.Linear) else 0
        rows.append((layer, tuple(output.shape[1:]), weights, each * output[0].numel()))

    hooks = [layer.register_forward_hook(write_down) for layer in network.layers]
    network(batch)
    for hook in hooks:
        hook.remove()
    return rows


torch.manual_seed(0)
network = EmbeddingNet().eval()
inside = look_inside(network, queries[:1])
print(len(inside), "layers;", sum(row[2] for row in inside), "weights in all")

# %% alt="A map of EmbeddingNet in columns of boxes, one box a layer with the shape of its output: after the image five stages of convolution, batch normalisation and ReLU, the first and third with pooling, lead from 1 x 28 x 28 to 192 maps, then a last pooling to 2 x 2, flattening, a linear layer and normalisation to 64 numbers."
columns = [[("image", tuple(queries.shape[1:]), "white")]]
tints = {"Conv2d": PALETTE[0], "Linear": PALETTE[0], "BatchNorm2d": PALETTE[2], "ReLU": PALETTE[8]}
for layer, shape, *_ in inside:
    kind = type(layer).__name__
    if kind in ("Conv2d", "AdaptiveMaxPool2d"):
        columns.append([])
    if kind == "Conv2d":
        kind += " {} × {}".format(*layer.kernel_size) + ", padded" * (layer.padding != (0, 0))
    columns[-1].append((kind, shape, tints.get(kind.split()[0], PALETTE[1])))
columns[-1].append(("normalize", tuple(network(queries[:1]).shape[1:]), "white"))

figure, ax = plt.subplots(figsize=(12.5, 3.6))
arrow = {"arrowstyle": "-|>", "color": "black", "shrinkA": 0, "shrinkB": 0}
for x, column in enumerate(columns):
    for y, (name, shape, tint) in enumerate(column):
        box = {"boxstyle": "square,pad=0.45", "edgecolor": "black"}
        box["facecolor"] = tint if tint == "white" else (*tint, 0.3)
        text = f"{name}\n{' × '.join(map(str, shape))}"
        words = ax.text(x, -y, text, ha="center", va="center", fontsize=8, bbox=box)
        if y:  # from the box above
            ax.annotate("", (x, -y + 0.2), (x, -y + 0.78), arrowprops=arrow)
        elif x:  # from the foot of the column before
            beside = arrow | {"patchB": words.get_bbox_patch()}
            ax.annotate("", (x, 0), (x - 0.53, 0), arrowprops=beside, zorder=1)
    if x < len(columns) - 1:
        ax.plot([x + 0.24, x + 0.47, x + 0.47], [-y, -y, 0], color="black", lw=1, zorder=0)
ax.set(xlim=(-0.4, len(columns) - 0.5), ylim=(-3.4, 0.4))
ax.set_title("EmbeddingNet: maps get smaller, and there are more of them")
ax.axis("off")
plt.show()

# %% [markdown]
# Read each column downwards, then go on to the next. The sides of the maps shrink from 28 to 2, their number grows from 1 to 192: the
# network gives up the exact place for more kinds of feature. The first convolution has no padding, so its 5 × 5 kernel fits at
# 24 × 24 places; two have padding and keep the size. The last pooling divides whatever it gets into 2 × 2 fields; therefore other
# image sizes, from 24 pixels a side on, give 64 numbers, too.

# %%
wide = torch.zeros(1, 1, 40, 32)
print(tuple(wide.shape), "->", tuple(network(wide).shape))
assert network(wide).shape == network(queries[:1]).shape

# %% [markdown]
# A convolution from *c* to *d* maps with *k* × *k* kernels has *c d k²* weights, and uses each once at every place of its output.
# The third one: 64 · 96 · 9 = 55 296 weights at 12 × 12 places (it pools afterwards), almost eight million multiply-adds. The linear
# layer uses each weight once. Pooling, normalisation and ReLU are left out: they take a few operations a number, and all five
# normalisations together have 1 152 weights.

# %% alt="Two bar charts over the six layers with weights. Weights: conv 4 and conv 5 have 27 and 53 percent. Multiply-adds: conv 3 alone has 53 percent, conv 1 only 3 percent and the linear layer next to none."
costly = [row for row in inside if row[3] > 0]
costs = pd.DataFrame(
    {"weights": [row[2] for row in costly], "multiply-adds": [row[3] for row in costly]},
    index=["conv 1", "conv 2", "conv 3", "conv 4", "conv 5", "linear"],
)
shares = costs / costs.sum()
figure, axes = plt.subplots(1, 2, figsize=(10, 3.2), sharey=True)
titles = ("Most weights are in the last two convolutions", "Half of the work is in the third")
for ax, column, title, color in zip(axes, costs, titles, PALETTE, strict=False):
    bars = ax.barh(costs.index, shares[column], color=color)
    words = [f" {n:,} ({s:.0%})" for n, s in zip(costs[column], shares[column], strict=True)]
    ax.bar_label(bars, words, fontsize=9)
    ax.set(title=title, xlabel=f"share of these {costs[column].sum():,} {column}", xlim=(0, 0.8))
    ax.grid(visible=False, axis="y")
axes[0].invert_yaxis()
plt.show()
left_out = sum(row[2] for row in inside) - costs["weights"].sum()
print(f"not among these weights: {left_out:,} of batch normalisation")
assert costs.loc["conv 3", "multiply-adds"] == 64 * 96 * 9 * 12 * 12
assert shares["weights"].iloc[3:5].sum() > 0.79
assert shares["multiply-adds"].iloc[2] > 0.5

# %% [markdown]
# The last two convolutions hold four fifths of the weights, since they join many maps with many, but they use each weight at only
# 16 and 4 places. The third does half of the work, as its maps are many *and* still large; the first, with a single input map, does
# 3 %. So a network with fewer maps late is smaller, and one that pools before its third convolution has less to do.

# %% [markdown]
# ## Batch normalisation, in and out of training
#
# Networks learn faster when the numbers inside them stay in a similar range (Ioffe and Szegedy, 2015). While training, a batch
# normalisation layer takes mean and variance of each map over the batch, subtracts the one and divides by the root of the other.
# Then it multiplies by a learned **scale** and adds a learned **offset**; they begin at one and zero. It also keeps **running
# averages** of mean and variance, nine tenths old and a tenth new. The running mean begins at zero, the running variance at one.

# %%
layer = nn.BatchNorm2d(1)
beginning = (layer.weight, layer.bias, layer.running_mean, layer.running_var)
print("scale, offset, running mean, running variance:", *(value.item() for value in beginning))

batch = 100 + 50 * images[:32]
mean, variance = batch.mean(), batch.var(correction=0)
with torch.no_grad():
    layer.weight.fill_(2)
    layer.bias.fill_(3)
standardised = (batch - mean) / (variance + layer.eps).sqrt()
torch.testing.assert_close(layer(batch), 2 * standardised + 3)
torch.testing.assert_close(layer.running_mean, 0.9 * torch.zeros(1) + 0.1 * mean)
torch.testing.assert_close(layer.running_var, 0.9 * torch.ones(1) + 0.1 * batch.var())
print(f"after one batch: running mean {float(layer.running_mean):.1f} of {float(mean):.1f}")

# %% [markdown]
# In evaluation mode (`eval()`) the layer uses the running averages and leaves them as they are. They take a while to reach the data,
# whose mean we have set to 100 and whose variance to 2 500: after *n* batches, 0.9ⁿ of the beginning is still in them, 4 % after 30.

# %% alt="Running mean over fifty batches: the line climbs from 10 after the first batch to 96 after thirty and 100 at the end, where the dots, the means of single batches, have been all the time."
followed = [(float(mean), float(layer.running_mean), float(layer.running_var))]
for later in (100 + 50 * images[32:1600]).split(32):
    layer(later)
    followed.append((float(later.mean()), float(layer.running_mean), float(layer.running_var)))
followed = torch.tensor(followed)

ax = plt.gca()
ax.plot(range(1, 51), followed[:, 0], "o", color=PALETTE[1], alpha=0.6)
ax.plot(range(1, 51), followed[:, 1], color=PALETTE[0], linewidth=2.5)
ax.annotate("each batch (training mode)", (3, 106))
ax.annotate("running mean (evaluation mode)", (12.5, 65), color=PALETTE[0])
ax.set(title="The running mean needs some 30 batches", xlabel="batches of 32 seen", ylabel="mean")
ax.set_ylim(0, 120)
plt.show()
for n in (10, 30, 50):
    print(f"after {n} batches: running mean {followed[n - 1, 1]:.0f}", end=", ")
    print(f"running variance {followed[n - 1, 2]:.0f}")
assert abs(followed[-1, 1] - 100) < 3

# %% [markdown]
# With that, the first four layers of `EmbeddingNet` can be done by hand. The convolutions have no constant to add (`bias=False`):
# in training mode normalisation would subtract it again with the mean, and the offset does its work.

# %%
stem, pool, normalisation, rectify = network.layers[:4]
by_hand = F.max_pool2d(F.conv2d(queries[:8], stem.weight), 2)
running_mean, running_var, scale, offset = (
    value.view(1, -1, 1, 1)
    for value in (
        normalisation.running_mean,
        normalisation.running_var,
        normalisation.weight,
        normalisation.bias,
    )
)
by_hand = scale * (by_hand - running_mean) / (running_var + normalisation.eps).sqrt() + offset
by_network = network.layers[:4](queries[:8])
torch.testing.assert_close(F.relu(by_hand), by_network, atol=1e-5, rtol=1e-4)
print("by hand and by the network:", tuple(queries[:8].shape), "->", tuple(by_network.shape))

# %% [markdown]
# The two modes differ in two ways that matter. First the *order of layers*: here pooling comes before normalisation and ReLU, where
# many networks have it after. In training mode that changes the result, because the statistics are then those of the pooled numbers.
# Second the *company*: in training mode the other images of a batch have a say in each embedding. Test both, in both modes.

# %%
image, zeros, ones = queries[:1], queries[query_labels == 0][:31], queries[query_labels == 1][:31]
effect = {}
for training in (True, False):
    trial = deepcopy(network).train(training)
    norm = trial.layers[2]
    with torch.no_grad():
        pooled_first = rectify(norm(pool(stem(queries[:8]))))
        pooled_last = pool(rectify(norm(stem(queries[:8]))))
        with_zeros, with_ones = (trial(torch.cat([image, group]))[0] for group in (zeros, ones))
    effect[training] = ((pooled_first - pooled_last).abs().max(), (with_zeros - with_ones).norm())
    print(f"training mode: {training}")
    print(f"  pooling later changes numbers by up to {effect[training][0]:.1f}")
    print(f"  zeros or ones as company: embeddings {effect[training][1]:.2f} apart")
assert min(effect[True]) > 0.3
assert max(effect[False]) < 1e-4

# %% [markdown]
# In training mode pooling later changes numbers by up to 1.1, and an image moves by 0.68 when its company changes from zeros to
# ones. (Where in the batch it stands does not matter.) In evaluation mode neither changes anything: each number is multiplied by a
# fixed number and a fixed number is added. As long as the scales are positive, the largest of four stays the largest. Pooling first
# then leaves a quarter of the numbers to treat.
#
# A query arrives alone, and so is embedded in evaluation mode. `embed` switches to it and back again.

# %%
network.train()
one_by_one, together = (embed(network, queries[:20], batch_size=size) for size in (1, 20))
torch.testing.assert_close(one_by_one, together, atol=1e-5, rtol=1e-4)
print("embedded alone or in a batch: the same; still in training mode:", network.training)
assert network.training
network = network.eval()

# %% [markdown]
# A fresh network in evaluation mode has statistics that fit no data: zero and one. To know what is due to that, keep a second version
# beside it: the same random weights, but run over the gallery in training mode, so that its running averages fit. No weight moves.


# %%
def with_fitted_statistics(net):
    net = deepcopy(net).train()
    with torch.no_grad():
        for part in gallery.split(50):
            net(part)
    return net.eval()


fitted = with_fitted_statistics(network)
unmoved = torch.equal(fitted.layers[0].weight, network.layers[0].weight)
for name, net in (("fresh", network), ("fitted", fitted)):
    print(f"{name:<7} mean running variance, first layer: {net.layers[2].running_var.mean():.2f}")
assert unmoved

# %% [markdown]
# ## Why a sphere, and what it costs
#
# The last step divides each embedding by its length, so that all of them lie on the *unit sphere*. The first reason is the margin.
# Without a sphere an embedding may have any length. Multiply all by *s*: no neighbour changes, but squared distances grow by *s*²,
# and the margin of chapter 2 stays 0.2. Take a network without the last step and see which triplets are active.

# %% alt="Fraction of active triplets against the factor by which all embeddings are multiplied, on a log axis. It falls from 1 at factors up to 3 to about 0.2 from 100 on, which is the dashed line of the hard triplets."
random_networks = []
for seed in range(3):
    torch.manual_seed(seed)
    random_networks.append(EmbeddingNet(normalize=False))
free = random_networks[0]
free_known = embed(free, gallery)
factors = (1, 2, 3, 5, 10, 20, 30, 50, 100, 300)
active = [
    describe_triplets(s * free_known[:500], gallery_labels[:500], 0.2).active for s in factors
]
hard = describe_triplets(free_known[:500], gallery_labels[:500], 0.2).hard
ax = plt.gca()
ax.plot(factors, active, "o-", color=PALETTE[0])
ax.axhline(hard, color=DIFFERENT, linestyle="--")
ax.annotate("hard: wrong order, active at any length", (1, hard - 0.07), color=DIFFERENT)
ax.set(title="Longer embeddings meet the margin without learning", xscale="log", ylim=(0, 1.05))
ax.set(xlabel="all embeddings multiplied by", ylabel="fraction of active triplets")
ax.set_xticks(factors, factors)
ax.minorticks_off()
plt.show()
print(f"active at × 3: {active[2]:.0%}, at × 30: {active[6]:.0%}; hard at any length: {hard:.0%}")
assert active[6] < 0.35 < 0.99 < active[2]
assert hard < active[-1] < hard + 0.01

# %% [markdown]
# As short as they come out, all triplets are active; thirty times longer, only 23 % are, although nothing has been learned. On the
# sphere no distance exceeds two, and only directions can change: the margin has one meaning.
#
# The second reason: the sphere ties distance to angle. For points of length one, the squared distance is 2 − 2 cos of the angle
# between them. So the nearest by Euclidean distance is the nearest by **cosine similarity**, which other books and search engines
# use.

# %% alt="Two curves against the angle between two embeddings. The squared distance rises from 0 to 1 at 60 degrees, 2 at 90 and 4 at 180; the distance rises from 0 to 1 at 60 degrees and 2 at 180."
short = F.normalize(free_known[:100])
torch.testing.assert_close(
    pairwise_distances(short, squared=True), 2 - 2 * short @ short.T, atol=1e-5, rtol=0
)
angles = torch.linspace(0, torch.pi, 181)
squared = 2 - 2 * angles.cos()
ax = plt.gca()
ax.plot(angles.rad2deg(), squared, color=PALETTE[4])
ax.plot(angles.rad2deg(), squared.sqrt(), "--", color=PALETTE[2])
ax.annotate("squared distance", (122, 3.3), color=PALETTE[4], ha="right")
ax.annotate("distance", (140, 1.6), color=PALETTE[2])
ax.set(title="On the sphere a distance is an angle", ylabel="distance", xticks=range(0, 181, 30))
ax.set(xlabel="angle between two embeddings (degrees)")
plt.show()
print("squared distance at 60, 90, 180 degrees:", *(f"{squared[d]:.0f}" for d in (60, 90, 180)))
assert abs(squared[60] - 1) < 1e-5
assert abs(squared[90] - 2) < 1e-5

# %% [markdown]
# Keep the right angle in mind, where the squared distance is two. In 64 dimensions nearly all pairs of random directions are close to
# it, so there is a lot of room on this sphere.

# %%
draw = torch.Generator().manual_seed(0)
random_directions = F.normalize(torch.randn(2, 1000, 64, generator=draw), dim=2)
between = (random_directions[0] * random_directions[1]).sum(dim=1).acos().rad2deg()
near_right = float(((between - 90).abs() < 20).float().mean())
print(f"{near_right:.0%} of random pairs are within 20 degrees of a right angle")
assert near_right > 0.95

# %% [markdown]
# What is lost is the length, and with it whatever it tells. In a fresh network it tells contrast, and how much ink there is: scales, offsets and
# statistics still do nothing, so every layer passes a factor on, and twice the contrast gives an embedding twice as long in the same direction.
# Once the statistics fit the data, each layer subtracts something, and contrast changes directions, too. Below, ten digits in five
# contrasts each, by networks whose embeddings have two numbers.

# %% alt="Ten digits in five contrasts as points in the plane. Left, a fresh network: the five points of each digit lie on a straight ray from the origin. Right, the same weights with fitted statistics: the five points of a digit lie on bent paths."
torch.manual_seed(0)
plane = EmbeddingNet(dimensions=2, normalize=False)
# The seed is that of `fitted`, so the convolutions are the same: take its statistics.
fitted_plane = deepcopy(plane)
fitted_plane.layers[:-1].load_state_dict(fitted.layers[:-1].state_dict())
ten = torch.cat([queries[query_labels == digit][:1] for digit in range(10)])
figure, axes = plt.subplots(1, 2, figsize=(10.5, 4.4))
for ax, flat_network in zip(axes, (plane, fitted_plane), strict=True):
    flat = torch.stack([embed(flat_network, c * ten) for c in (0.4, 0.7, 1.0, 1.3, 1.6)])
    for digit in range(10):
        ax.plot(*flat[:, digit].T, "o-", color=PALETTE[digit], alpha=0.8)
        aside = 12 * F.normalize(flat[-1, digit] - flat[-2, digit], dim=0)
        place = {"xytext": aside, "textcoords": "offset points", "ha": "center", "va": "center"}
        ax.annotate(str(digit), flat[-1, digit], weight="bold", **place)
    ax.plot(0, 0, "+k", markersize=14, markeredgewidth=2)
    ax.margins(0.12)
    ax.set(xlabel="first number", ylabel="second number")
axes[0].set_title("Fresh: contrast is length, lost on a sphere")
axes[1].set_title("Statistics fitted: contrast turns directions")
plt.show()

# %% tags=["nbval-ignore-output"]
free_queries, fitted_queries = embed(free, queries), embed(fitted, queries)
fitted_known = embed(fitted, gallery)
for name, net, points in (("fresh", free, free_queries), ("fitted", fitted, fitted_queries)):
    cosine = F.cosine_similarity(points, embed(net, 2 * queries)).mean()
    print(f"{name:<7} mean cosine between an image and its double contrast: {cosine:.2f}")

fitted_networks = [with_fitted_statistics(net) for net in random_networks]
splits = {}
for state, networks in (("fresh", random_networks), ("fitted", fitted_networks)):
    for shift in (0, 2):
        splits[state, shift] = []
        for net in networks:
            asked, known = embed(net, shifted(queries, shift)), embed(net, gallery)
            on_the_sphere = classified(F.normalize(asked), F.normalize(known))
            splits[state, shift].append(paired(classified(asked, known), on_the_sphere))
        words = "  ".join(f"{won} : {lost} (p = {p:.1g})" for won, lost, p in splits[state, shift])
        print(f"{state}, moved by {shift}, with length : on the sphere   {words}")
assert all(wins > 1.2 * losses for wins, losses, _ in splits["fresh", 2])
assert all(wins < losses for shift in (0, 2) for wins, losses, _ in splits["fitted", shift])

# %% [markdown]
# With fitted statistics the cosine between an image and its double contrast is 0.56: the sphere alone does not remove contrast.
#
# In a fresh network the loss of length costs accuracy when queries have moved. Three networks of different random weights, moved
# by two, are right with the length 91, 87 and 64 times where they are wrong without, and 48, 52 and 44 times the other way round
# (for two of them p < 0.01). In place (29 : 21, 23 : 35, 16 : 23) the counts do not tell length and sphere apart. Once the
# statistics fit, as in training, it is the other way round: the sphere wins, in place and moved, with every network. Then the
# margin keeps its meaning at no price. A loss that wants the length gets a network without the last step: `EmbeddingNet(normalize=False)`,
# as in chapter [5](05_visualization.ipynb), or the one of chapter [7](07_the_paper.ipynb).

# %% [markdown]
# ## Shared weights
#
# A triplet has three images, and one function must embed all three, or their distances mean nothing. With networks that have
# weights of their own, an image is not even close to itself.

# %%
anchor, positive = images[labels == 5][:2, None]
negative = images[labels == 3][:1]
torch.manual_seed(0)
strangers = [EmbeddingNet() for _ in range(2)]
to_itself = (embed(strangers[0], anchor) - embed(strangers[1], anchor)).norm()
crowd = embed(strangers[0], images[:200])
to_others = pairwise_distances(crowd).sum() / (200 * 199)
print(f"distance of an image, by two networks, to itself: {to_itself:.2f}")
print(f"mean distance of two images, by one network: {to_others:.2f}")
assert to_itself > 2 * to_others

# %% [markdown]
# So one network is applied three times. Drawn, these are three towers with one set of weights: a **triplet network**. With two
# towers, for pairs of images, it is called a **Siamese network**; the weights are shared in the same way. The loss sees the three
# points that come out and pulls the positive towards the anchor and pushes the negative away.

# %% alt="Three images, a five as the anchor, another five as positive and a three as negative, each enter a tower. A frame around the towers says that they are one network with one set of weights. Three points come out; the anchor is joined to the positive by pull and to the negative by push."
figure, ax = plt.subplots(figsize=(10, 4.4))
arrow = {"arrowstyle": "-|>", "color": "black", "lw": 1.5}
names = ("positive", "anchor", "negative")
for y, name, picture in zip((2, 1, 0), names, (positive, anchor, negative), strict=True):
    ax.imshow(picture[0, 0], cmap="gray_r", extent=(0, 0.8, y - 0.4, y + 0.4))
    ax.text(-0.1, y, name, ha="right", va="center")
    ax.add_patch(
        plt.Polygon(
            [(1.7, y - 0.36), (1.7, y + 0.36), (2.9, y + 0.18), (2.9, y - 0.18)],
            facecolor=(*PALETTE[2], 0.3),
            edgecolor="black",
        )
    )
    ax.text(2.3, y, "network", ha="center", va="center", fontsize=11)
    ax.annotate("", (1.65, y), (0.85, y), arrowprops=arrow)
    ax.annotate("", (3.95, y), (2.95, y), arrowprops=arrow)
    ax.plot(4.1, y, "o", color="black", markersize=12)
frame = {"fill": False, "edgecolor": "black", "linestyle": "--", "lw": 1.5}
ax.add_patch(plt.Rectangle((1.5, -0.5), 1.6, 3.0, **frame))
total = sum(parameter.numel() for parameter in network.parameters())
ax.text(2.3, 2.58, f"one set of {total:,} weights", ha="center", fontsize=11, weight="bold")
for y, word, color, style in (
    (2, "d(a, p): pull", SAME, "-"),
    (0, "d(a, n): push", DIFFERENT, "--"),
):
    ax.plot([4.1, 4.1], [1, y], color=color, lw=4, linestyle=style, zorder=0)
    ax.text(4.3, (1 + y) / 2, word, color=color, va="center", weight="bold")
ax.text(4.3, 1, "embedding of the anchor", va="center", fontsize=11)
ax.set(xlim=(-0.8, 6.2), ylim=(-0.6, 2.9))
ax.set_title("Three towers, one network")
ax.axis("off")
plt.show()

# %% [markdown]
# `TripletNet` is this drawing in code: it holds one embedding network and calls it three times. In evaluation mode, three calls and
# one call on all images give the same points. In training mode they do not, since each call takes statistics of its own.

# %%
triplet = TripletNet(network)
assert sum(parameter.numel() for parameter in triplet.parameters()) == total
three_parts = [
    images[labels == digit][place : place + 16] for digit, place in ((5, 0), (5, 16), (3, 0))
]
for training in (False, True):
    trial = TripletNet(deepcopy(network)).train(training)
    with torch.no_grad():
        one_call = trial.embedding_net(torch.cat(three_parts))
        apart_by = (torch.cat(trial(*three_parts)) - one_call).norm(dim=1).mean()
    mode = "training" if training else "evaluation"
    print(f"{mode:<10} mode, three calls or one: embeddings differ by {apart_by:.2f}")
    assert (apart_by > 0.1) == training

# %% [markdown]
# Chapter 4 uses the single call: it embeds a batch once and picks the triplets among the points, so that an image that is in a
# thousand triplets is embedded once.
#
# What does a shared weight learn from a triplet? It acts in three places, so its gradient is a sum of three. To see the summands,
# let three copies of the network, equal but separate, embed one image each.


# %%
def loss_of(a, p, n, margin=0.2):
    return F.relu((a - p).square().sum(dim=1) - (a - n).square().sum(dim=1) + margin).mean()


copies = [deepcopy(network) for _ in range(3)]
by_copies = [copy(image) for copy, image in zip(copies, (anchor, positive, negative), strict=True)]
loss_of(*by_copies).backward()
network.zero_grad()
loss = loss_of(*triplet(anchor, positive, negative))
loss.backward()

shared_gradient = stem.weight.grad
summands = [copy.layers[0].weight.grad for copy in copies]
torch.testing.assert_close(shared_gradient, sum(summands), atol=1e-4, rtol=1e-3)
largest_gap = (shared_gradient - sum(summands)).abs().max() / shared_gradient.abs().max()
print(f"loss {loss.item():.2f}; shared gradient and sum of three differ by {largest_gap:.0%}")

# %% alt="Four grids of 5 by 5 numbers, the gradient of one kernel: from the anchor, from the positive, from the negative, and of the shared kernel, whose every number is the sum of the other three." tags=["nbval-ignore-output"]
strongest = int(shared_gradient.flatten(1).norm(dim=1).argmax())
pieces = [gradient[strongest, 0] for gradient in (*summands, shared_gradient)]
largest = max(float(piece.abs().max()) for piece in pieces)
figure, axes = plt.subplots(1, 4, figsize=(11, 3.1))
titles = ("from the anchor", "+ from the positive", "+ from the negative", "= of the shared kernel")
style = {"cmap": "PuOr", "vmin": -100, "vmax": 100, "cbar": False, "square": True}
for ax, piece, title in zip(axes, pieces, titles, strict=True):
    percent = 100 * piece / largest
    sns.heatmap(percent, ax=ax, annot=True, fmt=".0f", annot_kws={"size": 8}, **style)
    ax.set(title=title, xticks=[], yticks=[])
plt.show()

# %% [markdown]
# This is one of the first convolution's 32 kernels, the one with the largest gradient, in percent of its largest number. Where the
# number is positive (purple) the loss rises with the weight, where it is negative (orange) it falls. Each image asks for something
# else, and `backward` adds the three up by itself, because the weight is the same tensor each time.

# %% [markdown]
# ## What an untrained network is worth
#
# Random weights, no training: what are the embeddings worth? Compare the 768 features that enter the last layer and the 64 numbers
# that leave it with three rivals: the 784 pixels, their 64 principal components (*PCA*), and the 144 numbers of pooled edges, made by
# hand. The three random networks take part, so as not to praise one lucky draw.


# %%
def network_views(net, batch):
    features = embed(net.layers[:-1], batch)
    return {"768 features": features, "64 numbers": F.normalize(net.layers[-1](features).detach())}


known_views = [network_views(net, gallery) for net in random_networks]
for shift in (0, 2, 4):
    batch = shifted(queries, shift)
    for seed, net in enumerate(random_networks):
        for name, asked in network_views(net, batch).items():
            right[f"{name}, seed {seed}", shift] = classified(asked, known_views[seed][name])

# %% tags=["nbval-ignore-output"]
average = gallery.flatten(1).mean(dim=0)
components = torch.linalg.svd(gallery.flatten(1) - average, full_matrices=False).Vh[:64].T
for shift in (0, 2, 4):
    asked, known = (batch.flatten(1) - average for batch in (shifted(queries, shift), gallery))
    right["64 components", shift] = classified(asked @ components, known @ components)
accuracies = pd.Series({key: float(hits.float().mean()) for key, hits in right.items()}).unstack()
listed = [name for name in accuracies.index if name[0] in "76"] + ["pixels", "edges, pooled"]
print(accuracies.loc[listed, [0, 2, 4]].map("{:.1%}".format).to_string())

# %% alt="Accuracy against the shift of the query. At four pixels pooled edges have 45 percent, the 768 features of three random networks 35 to 44, their 64 numbers 28, pixels 21. In place all but the 64 numbers are above 90 percent." tags=["nbval-ignore-output"]
ax = plt.gca()
lines = [("pooled edges (144)", ["edges, pooled"], "D-", 2, 0.03)]
lines += [
    (name, [f"{name}, seed {s}" for s in range(3)], style, color, lift)
    for name, style, color, lift in (
        ("768 features", "^-", 1, -0.02),
        ("64 numbers", "s--", 4, 0.01),
    )
]
lines += [("pixels (784)", ["pixels"], "o-", 0, -0.01)]
for name, members, style, color, lift in lines:
    drawn = accuracies.loc[members, [0, 2, 4]]
    ax.plot([0, 2, 4], drawn.mean(), style, color=PALETTE[color])
    ax.fill_between([0, 2, 4], drawn.min(), drawn.max(), color=PALETTE[color], alpha=0.2)
    ax.annotate(name, (4.1, drawn[4].mean() + lift), color=PALETTE[color], va="center")
ax.set(title="Random features forgive shifts, but no better than edges by hand")
ax.set(xlabel="shift of the query (pixels)", ylabel="kNN accuracy", ylim=(0, 1.02))
ax.set(xlim=(-0.1, 6), xticks=[0, 2, 4])
plt.show()

# %% tags=["nbval-ignore-output"]
pairs = [("768 features", "pixels"), ("768 features", "edges, pooled")]
pairs += [("64 numbers", "64 components")]
split = {}
for name, rival in pairs:
    for shift in (0, 2):
        split[name, rival, shift] = [
            paired(right[f"{name}, seed {s}", shift], right[rival, shift]) for s in range(3)
        ]
        words = "   ".join(
            f"{won:>3} :{lost:>4} (p = {p:.0e})" for won, lost, p in split[name, rival, shift]
        )
        print(f"{name:<13}: {rival:<14} shift {shift}   {words}")
assert all(wins > 1.5 * losses for wins, losses, _ in split["768 features", "pixels", 2])
assert all(wins < losses for wins, losses, _ in split["64 numbers", "64 components", 0])
assert all(
    p > 0.01 or wins < losses
    for shift in (0, 2)
    for wins, losses, p in split["768 features", "edges, pooled", shift]
)

# %% [markdown]
# The bands reach from the worst to the best of the three networks. When a query moves, random features are far ahead of pixels; in
# place the lead is small and not certain (36 : 20, 36 : 32 and 44 : 18). They are *not* ahead of nine weights chosen by hand. And
# the 64 random numbers lose to 64 principal components in place, all three times; moved by two, two networks of three win.
#
# One more rival: the same three networks with fitted statistics.


# %% tags=["nbval-ignore-output"]
def with_directions(views):
    return views | {"directions": F.normalize(views["768 features"])}


fitted_splits = {"768 features": [], "64 numbers": [], "directions": []}
for seed, nets in enumerate(zip(random_networks, fitted_networks, strict=True)):
    outcomes = []
    for net in nets:
        known, asked = (with_directions(network_views(net, part)) for part in (gallery, queries))
        outcomes.append({name: classified(asked[name], known[name]) for name in known})
    fresh_hits, fitted_hits = outcomes
    right[f"fitted, seed {seed}", 0] = fitted_hits["64 numbers"]
    for name, hits in fitted_hits.items():
        fitted_splits[name].append(paired(hits, fresh_hits[name]))
        print(f"seed {seed}, {name:<12} {hits.float().mean():.1%}", end=",  ")
        print("fitted : fresh  {:>2} : {:>3}  p = {:.1g}".format(*fitted_splits[name][-1]))
for name in ("768 features", "64 numbers"):
    assert all(losses > 2 * wins for wins, losses, _ in fitted_splits[name])
assert all(p > 0.05 for _, _, p in fitted_splits["directions"])

# %% [markdown]
# Fitted to the data, the 64 numbers fall to between 74 and 79 %, far behind pixels, and the 768 features to between 81 and 87 %.
# Part of that is length: compared by their *direction*, fresh and fitted alike, the features
# lose so little that paired counts are not sure of it. The 64 numbers are compared by direction already; what they lose more,
# their random mix loses. "Random weights are good" holds only before the statistics fit; training, which runs in training mode,
# starts from the worse ones.

# %% [markdown]
# ## Where it comes from: the architecture
#
# Weights are random; the layers are not. Small windows, the same weights everywhere, pooling: they all say that
# neighbouring pixels belong together. If this is the reason, then tearing neighbours apart must hurt.
# So shuffle the pixels, those of all images in the same way.

# %% alt="Ten digits, and below them the same ten with their pixels shuffled: noise to the eye, though the same shuffle was used for all."
shuffle = torch.randperm(784, generator=torch.Generator().manual_seed(0))


def scrambled(batch):
    return batch.flatten(1)[:, shuffle].view_as(batch)


figure = show_images(torch.cat([ten, scrambled(ten)]), columns=10)
plt.show()

# %% [markdown]
# Nothing is lost. Pixel distances, which do not ask where a pixel is, remain the same, and a network of fully connected
# layers should not mind either. Only the convolutional one should.

# %%
torch.testing.assert_close(
    pairwise_distances(scrambled(queries[:100]).flatten(1)),
    pairwise_distances(queries[:100].flatten(1)),
)


def fully_connected_net(seed):
    torch.manual_seed(seed)
    hidden = (nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU())
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(512, 64))


dense, convolutional = "untrained,\nfully connected", "untrained,\nconvolutional"
rows = [("pixels", place, accuracies.loc["pixels", 0]) for place in ("in place", "shuffled")]
for seed, net in enumerate(random_networks):
    rows.append((convolutional, "in place", accuracies.loc[f"64 numbers, seed {seed}", 0]))
    for name, contender, place, view in (
        (dense, fully_connected_net(seed), "in place", nn.Identity()),
        (dense, fully_connected_net(seed), "shuffled", scrambled),
        (convolutional, net, "shuffled", scrambled),
    ):
        points = [F.normalize(embed(contender, view(batch))) for batch in (queries, gallery)]
        rows.append((name, place, float(classified(*points).float().mean())))
shuffling = pd.DataFrame(rows, columns=["view", "pixels", "accuracy"])

# %% alt="Accuracy bars in place and with shuffled pixels. Pixels 90 and 90 percent, untrained fully connected networks about the same in both, untrained convolutional networks much lower when shuffled, the lowest of all." tags=["nbval-ignore-output"]
ax = sns.barplot(
    shuffling,
    x="accuracy",
    y="view",
    order=["pixels", dense, convolutional],
    hue="pixels",
    errorbar=("pi", 100),
    legend=False,
)
for bars, place, hatch in zip(ax.containers, ("in place", "shuffled"), ("", "//"), strict=True):
    words = [f"{place}: {bar.get_width():.1%}" for bar in bars]
    ax.bar_label(bars, words, label_type="center", color="black", bbox={"fc": "white", "lw": 0})
    for bar in bars:
        bar.set_hatch(hatch)
ax.set(title="Only convolutions know which pixels are neighbours", xlabel="kNN accuracy", ylabel="")
ax.set_xlim(0, 1)
plt.show()
spread = shuffling.groupby(["view", "pixels"])["accuracy"].agg(["min", "mean", "max"])
assert spread["max"][convolutional, "shuffled"] < spread["min"][dense, "shuffled"]
assert spread["min"][convolutional, "in place"] > spread["max"][dense, "in place"]
assert abs(spread["mean"][dense, "in place"] - spread["mean"][dense, "shuffled"]) < 0.05

# %% [markdown]
# Bars are means over three networks, the black lines their range. So the knowledge is in the architecture: its assumption broken, the
# convolutional network falls from 88 to 74 %, behind both others.
# (For a fully connected network, shuffling is one more random draw of weights: 83 and 85 %.) The assumption is about images and not
# about digits; chapter [8](08_image_retrieval.ipynb) uses convolutions on quite other pictures.
#
# ## What is missing
#
# Here are queries, the first of five digits, and the eight images that the fresh network of seed 0 finds nearest. Above the
# pictures it is counted for all queries how many of the eight show the same digit.

# %% alt="Five queries, a 1, 3, 4, 5 and 8, each with the eight nearest gallery images of an untrained network, hits framed in blue and misses in orange." tags=["nbval-ignore-output"]
fresh_known = known_views[0]["64 numbers"]
fresh_queries = F.normalize(embed(random_networks[0], queries))
found = pairwise_distances(fresh_queries, fresh_known).topk(8, largest=False).indices
hits = gallery_labels[found] == query_labels[:, None]
by_digit = [float(hits[query_labels == digit].float().mean()) for digit in range(10)]
print("  ".join(f"{digit}: {share:.0%}" for digit, share in enumerate(by_digit)))
fours = gallery_labels[found[query_labels == 4]]
print(f"of what fours find, {(fours == 9).float().mean():.0%} are nines")
chosen = torch.stack([torch.nonzero(query_labels == digit)[0, 0] for digit in (1, 3, 4, 5, 8)])
figure = show_neighbours(
    queries[chosen], query_labels[chosen], gallery[found[chosen]], gallery_labels[found[chosen]]
)
plt.show()
assert max(by_digit[3], by_digit[4], by_digit[8]) < 0.85 < 0.9 < by_digit[1]

# %% [markdown]
# The one finds ones only, the eight all but one of its kind; the three finds five zeros, the four four nines. This eight was lucky:
# over all queries, 98 % of what ones find are ones, but only 64 to 70 % of what eights, threes, fours and fives find is right, and
# nearly a quarter of what fours find are nines.
#
# And this is half of the gallery, in the two directions along which its embeddings vary most, and the squared distances of all its
# pairs as in chapter 1, with the margin drawn at their scale.

# %% alt="Left, a scatter of 1 000 untrained embeddings in two principal components: classes have regions that overlap. Right, squared distances of same and different pairs, two overlapping heaps below 0.5 on a scale to 2; a bar of the margin's length 0.2 is about as wide as a heap's distance from zero." tags=["nbval-ignore-output"]
half, half_labels = fresh_known[:1000], gallery_labels[:1000]
centred = half - half.mean(dim=0)
two_components = torch.linalg.svd(centred, full_matrices=False).Vh[:2].T
figure, (left, right_ax) = plt.subplots(1, 2, figsize=(11, 4.6))
scatter_classes(centred @ two_components, half_labels, ax=left, size=10)
for text in left.texts:
    if text.get_text() == "4":  # it would lie under the 6
        text.set_position((text.xy[0] + 0.02, text.xy[1] - 0.06))
left.set(
    title="Digits have places, not borders", xlabel="first component", ylabel="second component"
)
plot_distances(half, half_labels, ax=right_ax, squared=True)
top = right_ax.get_ylim()[1]
right_ax.annotate(
    "", (0, 1.04 * top), (0.2, 1.04 * top), arrowprops={"arrowstyle": "<->", "color": "black"}
)
right_ax.annotate("margin 0.2", (0.22, 1.04 * top), va="center")
right_ax.axvline(2, color="grey", linestyle=":")
right_ax.annotate("right angle", (1.97, top / 2), ha="right", color="grey")
right_ax.set(title="The margin is as long as the distances", xlim=(0, 2.1), ylim=(0, 1.1 * top))
plt.show()

# %% [markdown]
# Digits have their places, ones far from zeros, but neighbours such as fives and threes overlap. And all embeddings point nearly the same way: a typical
# squared distance is about as long as the margin. Neighbour search does not mind, as it only asks who is *nearer*. A triplet loss
# does. How much of this crowding is due to the weights? Compare with fitted statistics, where not one weight differs.

# %% tags=["nbval-ignore-output"]
crowding = {}
for name, points in (("fresh", half), ("statistics fitted", fitted_known[:1000])):
    told = crowding[name] = describe_triplets(points, half_labels, 0.2)
    near, far = told.positive_distance, told.negative_distance
    print(f"{name}: mean squared distance same {near:.2f}, different {far:.2f};", end="  ")
    print(f"active {told.active:.0%}, hard {told.hard:.0%}")
assert crowding["fresh"].negative_distance < 0.35
assert crowding["statistics fitted"].negative_distance > 0.9
assert crowding["statistics fitted"].hard > crowding["fresh"].hard

# %% [markdown]
# Fitting the statistics alone spreads different digits from 0.23 to 1.27 and lowers the active fraction from 94 to 52 %, and yet
# the order is *worse*: more triplets are hard, 28 instead of 23 %. So a wider spread is no progress by itself. What training must
# add is order.

# %% [markdown]
# ## When it goes wrong: evaluating in training mode
#
# Forget `eval()`, and batch normalisation takes its statistics from the queries themselves. No error appears. Take the network with fitted
# statistics, as after training. The gallery is embedded with care; 512 queries come in batches of different sizes, with the network
# left in training mode: once as they come, and once sorted by digit, as when files lie in a folder for each class.

# %% tags=["nbval-ignore-output"]
some, some_labels = queries[:512], query_labels[:512]
careless = deepcopy(fitted).train()
batch_sizes, by_order = (1, 2, 4, 16, 64, 512), {}
for name, sequence in (
    ("as they come", torch.arange(512)),
    ("sorted by digit", some_labels.argsort(stable=True)),
):
    by_order[name] = []
    print(name, end=" ")
    for size in batch_sizes:
        with torch.no_grad():
            points = torch.cat([careless(part) for part in some[sequence].split(size)])
        predicted = KNNClassifier(fitted_known, gallery_labels, k=10).predict(points)
        by_order[name].append(float((predicted == some_labels[sequence]).float().mean()))
        print(f"  {size}: {by_order[name][-1]:.0%}", end="" if size < 512 else "\n")
in_evaluation = float(right["fitted, seed 0", 0][:512].float().mean())
print(f"evaluation mode, any size: {in_evaluation:.0%}")
assert by_order["as they come"][0] < in_evaluation - 0.15
assert abs(by_order["as they come"][-1] - in_evaluation) < 0.05
assert by_order["sorted by digit"][3] < by_order["as they come"][3] - 0.08

# %% alt="Accuracy against the number of queries in a batch, network in training mode. As they come, it climbs from about half of the queries with single images to the level of evaluation mode at 16; sorted by digit it stays far below until all 512 are one batch." tags=["nbval-ignore-output"]
ax = plt.gca()
for (name, values), style, color in zip(
    by_order.items(), ("o-", "s--"), (DIFFERENT, PALETTE[1]), strict=True
):
    ax.plot(batch_sizes, values, style, color=color)
    where = (4.6, 0.64) if name == "as they come" else (17, values[3] - 0.07)
    ax.annotate(f"training mode, {name}", where, color=color)
ax.axhline(in_evaluation, color=SAME, linestyle=":")
ax.annotate("evaluation mode, any batch", (1, in_evaluation + 0.02), color=SAME)
ax.set(title="In training mode the answer depends on the company", xlabel="queries in a batch")
ax.set(ylabel="kNN accuracy, 512 queries", xscale="log", ylim=(0, 1.02))
ax.set_xticks(batch_sizes, batch_sizes)
ax.minorticks_off()
plt.show()

# %% [markdown]
# Alone, a query is right in 49 % of cases; from 16 on in mixed company, accuracy is within two points of evaluation mode, and so
# the slip goes unnoticed until somebody asks a single question. Sorted by digit, it shows at once: 64 queries of mostly two digits,
# normalised by themselves, lose what makes them this digit, namely how they differ from the others.
#
# There is a second damage. Each call in training mode moves the running averages: the network is no longer the one it was, though
# no weight has changed.

# %% tags=["nbval-ignore-output"]
same_weights = torch.equal(careless.layers[0].weight, fitted.layers[0].weight)
drift = (embed(careless, some) - fitted_queries[:512]).norm(dim=1)
print(f"same weights: {same_weights}; embeddings moved by {drift.mean():.2f} on average")
assert same_weights
assert drift.min() > 1e-3

# %% [markdown]
# The fix is to call `eval()` before embedding, or to use `embed`, which switches to evaluation mode meanwhile. Then the batch size
# does not matter, and the network stays as it was.

# %%
state = deepcopy(careless.state_dict())
one_by_one, together = (embed(careless, queries[:20], batch_size=size) for size in (1, 20))
torch.testing.assert_close(one_by_one, together, atol=1e-5, rtol=1e-4)
untouched = all(torch.equal(value, state[name]) for name, value in careless.state_dict().items())
print("embedded alone or together: the same; network untouched:", untouched)
assert untouched

# %% [markdown]
# ## Exercises
#
# Try each before you look: a solution unfolds with a click on its bar or on the three dots, and its answer in words below it.
#
# **1.** An image of 56 × 56 pixels instead of 28 × 28: how many more weights and how many more multiply-adds does the
# network need? Guess, then count.

# %%
# Your attempt

# %% jupyter={"source_hidden": true} tags=["hide-input"]
# Solution 1
larger = look_inside(network, torch.zeros(1, 1, 56, 56))
assert [row[2] for row in larger] == [row[2] for row in inside]
times = [big[3] / usual[3] for big, usual in zip(larger, inside, strict=True) if usual[3]]
assert [round(ratio, 1) for ratio in times] == [4.7, 4.7, 4.7, 7.6, 20.2, 1.0]
assert 6 < sum(row[3] for row in larger) / sum(row[3] for row in inside) < 7

# %% [markdown]
# <details><summary>Answer 1</summary>
#
# The same weights, because a kernel does not know how large its image is, and the last pooling always leaves 2 × 2. But 6.6 times
# the multiply-adds, more than the fourfold number of pixels: a convolution without padding loses two rows and columns of a small
# map as of a large one, and that is a larger part of the small one. The fifth convolution, 9 × 9 instead of 2 × 2 places, costs 20
# times as much; the linear layer costs the same.
#
# </details>

# %% [markdown]
# **2.** How much of the image does one number see, after each convolution and pooling? Work out the side of this window, the
# **receptive field**, by hand; then write a loop. (A layer with a window of *k* adds *k* − 1 steps; a pooling by two doubles the
# step.)

# %%
# Your attempt

# %% jupyter={"source_hidden": true} tags=["hide-input"]
# Solution 2
side, step, sides = 1, 1, []
for window_side, stride in [(5, 1), (2, 2), (3, 1), (3, 1), (2, 2), (3, 1), (3, 1)]:
    side, step = side + (window_side - 1) * step, step * stride
    sides.append(side)
assert sides == [5, 6, 10, 14, 16, 24, 32]

# %% [markdown]
# <details><summary>Answer 2</summary>
#
# 5, 6 (pooled), 10, 14, 16 (pooled), 24 and 32 pixels. After each pooling a step of a 3 × 3 kernel is twice as long in the image,
# so the window grows by 4, then by 8. The last convolution could see 32 pixels, more than the image has: its numbers can depend on
# all of the digit, those of the first only on a piece of a stroke.
#
# </details>

# %% [markdown]
# **3.** How many numbers does a random mix of the 768 features need? Put random linear layers with 2, 8, 64 and 512 outputs behind
# the features of `random_networks[0]` (they are in `known_views[0]` and `network_views`), and measure with `classified`.

# %%
# Your attempt

# %% jupyter={"source_hidden": true} tags=["hide-input"]
# Solution 3
asked_features = network_views(random_networks[0], queries)["768 features"]
known_features = known_views[0]["768 features"]
mixed = {}
for dimensions in (2, 8, 64, 512):
    mix = torch.randn(768, dimensions, generator=torch.Generator().manual_seed(0))
    on_the_sphere = (F.normalize(features @ mix) for features in (asked_features, known_features))
    mixed[dimensions] = float(classified(*on_the_sphere).float().mean())
assert mixed[2] < mixed[8] - 0.1 < mixed[64] - 0.1
assert abs(mixed[512] - mixed[64]) < 0.08

# %% [markdown]
# <details><summary>Answer 3</summary>
#
# Two numbers are right for 16 % of the queries, 8 for 52 %, 64 for 89 % and 512 for 92 %, as many as the 768 features themselves. A
# random mix (*random projection*) keeps distances roughly, the better the more numbers it has. From 2 to 64 each step gains much;
# from 64 to 512 it is three points (60 : 29 in paired counts), for an embedding eight times as long. Which 64 numbers are worth
# more than a random mix is for training to find.
#
# </details>

# %% [markdown]
# **4.** On the unit sphere, which margin between squared distances can never be met? And if each of ten classes shrinks to one
# point, what is the largest margin that all triplets can meet at once? (The ten points cannot all be opposite to each other.)

# %%
# Your attempt

# %% jupyter={"source_hidden": true} tags=["hide-input"]
# Solution 4
assert 2 - 2 * torch.cos(torch.tensor(torch.pi)) == 4  # opposite points
corners = F.normalize(torch.eye(10) - 0.1)
among = pairwise_distances(corners, squared=True)[~torch.eye(10, dtype=torch.bool)]
torch.testing.assert_close(among, torch.full((90,), 20 / 9))

# %% [markdown]
# <details><summary>Answer 4</summary>
#
# A margin above 4: squared distances lie between 0 and 4. For ten points, the squared length of their sum, 10 plus all 90 cosines,
# is not negative, so the mean cosine is at least −1/9 and the mean squared distance at most 2 + 2/9. Ten points that are all
# equally far apart reach it (the corners of a *simplex*), so 20/9 ≈ 2.22 is the largest margin. It takes 9 dimensions; 64 have room
# to spare, and the book's margin of 0.2 asks for much less.
#
# </details>

# %% [markdown]
# ## Check yourself
#
# Five questions on the whole chapter. Decide on an answer, and say to yourself why the other two are wrong, before you unfold the
# solution below the question; the numbers in this chapter are enough to decide each of them.

# %% [markdown]
# **1.** A convolution takes 64 maps and gives 96, with 3 × 3 kernels and no constant. How many weights make *one* of the 96 maps?
#
# a) 9 · b) 576 · c) 55 296
#
# <details><summary>Answer</summary>
#
# **b.** The kernel of one output map has a 3 × 3 slice for each of the 64 input maps, 64 · 9 = 576. *a* is wrong because it is a
# single slice, right only for one input map; *c* is wrong because it is the whole layer, 96 such kernels.
#
# </details>

# %% [markdown]
# **2.** An image moves one pixel to the right. What happens to its edge maps after max pooling in squares of four?
#
# a) nothing, pooling undoes shifts · b) squares change whose largest number leaves, or into which a larger one moves · c) they move
# by a quarter of a square
#
# <details><summary>Answer</summary>
#
# **b.** A maximum that stays within its square leaves the square as it is; the others change. *a* is wrong because pooling only
# forgives part of a shift: accuracy falls with each pixel, only more slowly. *c* is wrong because the squares stand still; nothing
# is interpolated.
#
# </details>

# %% [markdown]
# **3.** "I forgot `eval()`, but in batches of 512 the accuracy was the same as with it. So it does not matter." What is wrong?
#
# a) nothing, large batches are safe · b) it held for mixed batches; a single query or a batch of one class is seen differently, and
# the network's statistics have moved · c) the weights have changed
#
# <details><summary>Answer</summary>
#
# **b.** Statistics of a large mixed batch resemble the running averages, those of a single image or of one digit do not; and each
# call moved the averages. *a* is wrong because the sorted batches above lose at 64 still. *c* is wrong because only an optimiser
# changes weights.
#
# </details>

# %% [markdown]
# **4.** Behind a trained batch normalisation in evaluation mode, one map has a *negative* scale. May max pooling still go before or
# after it with the same result?
#
# a) yes, evaluation mode is fixed arithmetic · b) no, for this map the order matters · c) no, but only because of ReLU
#
# <details><summary>Answer</summary>
#
# **b.** A negative scale turns the order of numbers around: the largest before normalisation is the smallest after it. *a* is wrong
# because fixed is not enough, the arithmetic has to keep the order, too. *c* is wrong because ReLU never reverses an order; it and
# max pooling may always change places.
#
# </details>

# %% [markdown]
# **5.** A network without the last `normalize` is trained with a triplet loss. The active fraction falls from 57 to 23 %, and no
# query's neighbours have changed. What happened?
#
# a) it has learned · b) the embeddings have become longer · c) the margin has grown
#
# <details><summary>Answer</summary>
#
# **b.** Longer embeddings meet the fixed margin wherever the order is right already, and the order is what neighbours show: nothing
# was gained. *a* is wrong because better neighbours would be other neighbours. *c* is wrong because a larger margin makes more
# triplets active, not fewer.
#
# </details>

# %% [markdown]
# ## Summary
#
# - A convolution slides one small set of weights over all input maps; ReLU makes depth count; max pooling forgets the exact place.
# - Most weights are in the last two convolutions, half of the work in the third, where maps are many and still large.
# - Batch normalisation depends on the batch while training and on running averages in evaluation; scale and offset are learned.
# - On the unit sphere the margin keeps its meaning and squared distance is 2 − 2 cos; the length, and what it tells, is given up.
# - Towers share one network, and its gradient is the sum over them; untrained, it owes what it can to its architecture.
#
# **Next:** [4 · Training](04_training.ipynb) lets the triplet loss pull and push.
#
# **References.** Y. LeCun, L. Bottou, Y. Bengio, P. Haffner, [Gradient-based learning applied to document
# recognition](https://doi.org/10.1109/5.726791), 1998 (convolutional networks). · J. Bromley, I. Guyon, Y. LeCun, E. Säckinger, R.
# Shah, [Signature verification using a "Siamese" time delay neural
# network](https://papers.nips.cc/paper/1993/hash/288cc0ff022877bd3df94bc9360b9c5d-Abstract.html), 1993. · E. Hoffer, N. Ailon,
# [Deep metric learning using Triplet network](https://arxiv.org/abs/1412.6622), 2014 (shared weights). · F. Schroff, D.
# Kalenichenko, J. Philbin, [FaceNet: a unified embedding for face recognition and clustering](https://arxiv.org/abs/1503.03832),
# 2015 (the unit sphere). · S. Ioffe, C. Szegedy, [Batch normalization: accelerating deep network training by reducing internal
# covariate shift](https://arxiv.org/abs/1502.03167), 2015. · D. Ulyanov, A. Vedaldi, V. Lempitsky, [Deep image
# prior](https://arxiv.org/abs/1711.10925), 2018 (what untrained convolutions know).
