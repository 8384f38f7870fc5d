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
# Pixels make a poor ruler, and no better ruler for pixels is in sight. So this chapter builds a function that moves images to
# points on a sphere, takes it apart layer by layer, and finds that it is of use before it has learned anything.
#
# - **You will learn** what convolution and pooling do to a shifted image, where a network keeps its weights and where it spends its
#   work, why embeddings lie on a sphere, what batch normalisation does when nobody trains, and what shared weights share.
# - **You need** chapter [1](01_data.ipynb) and the triplets of chapter [2](02_triplets.ipynb); no GPU.
# - **Running time** about 25 seconds on two cores.
# - Previous: [2 · Triplets](02_triplets.ipynb) · Next: [4 · Training](04_training.ipynb)

# %%
from copy import deepcopy

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tripletlib import EmbeddingNet, TripletNet, embed, knn_accuracy, load_mnist, pairwise_distances
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
gallery, gallery_labels = images[:2000], labels[:2000]
queries, query_labels = test_images[:500], test_labels[:500]

# %% [markdown]
# 2 000 training images to search in and 500 test images to search with are enough for this chapter. Nothing is learned and nothing
# chosen by looking at test images: we only measure.
#
# ## A function instead of a ruler
#
# We want near to mean same. Pixels compare ink in place, and no other ruler held to the same pixels cures that. So keep the ruler,
# plain Euclidean distance, and change the points: find a function, the *embedding*, after which the ruler is right.
#
# Which functions should be allowed? The most general layer connects every input with every output. For an image that is a lot.
# To turn 28 × 28 pixels into 32 maps of 24 × 24 numbers, it takes more weights than 60 000 images could pin down.

# %%
fully_connected = (28 * 28) * (32 * 24 * 24)
convolution = nn.Conv2d(1, 32, 5, bias=False).weight.numel()
print(f"weights: {fully_connected:,} fully connected, {convolution} as a convolution")
assert convolution == 32 * 5 * 5

# %% [markdown]
# The second number is the same layer under two restrictions that suit images. An output looks only at a small window, since
# what makes a stroke is close together. And all windows use the same weights, since a stroke is a stroke anywhere.
#
# ## What a convolution does
#
# Lay a small *kernel* of weights on the image, multiply what lies on top of each other, add up, move on by a pixel. This kernel
# subtracts what is on its left from what is on its right. The patch crosses the stroke of a one; blank paper is 0, ink is 1.


# %%
def ink(batch):
    return (batch - images.min()) / (images.max() - images.min())


one = ink(test_images[test_labels == 1][0, 0])
patch = one[10:15, 11:19]
kernel = torch.tensor([[-1.0, 0, 1], [-1, 0, 1], [-1, 0, 1]])

by_hand = torch.empty(3, 6)
for row in range(3):
    for column in range(6):
        by_hand[row, column] = (patch[row : row + 3, column : column + 3] * kernel).sum()

torch.testing.assert_close(F.conv2d(patch[None, None], kernel[None, None])[0, 0], by_hand)

# %%
figure, axes = plt.subplots(1, 3, figsize=(10, 3.2), width_ratios=[8, 3, 6])
titles = ("patch, 5 × 8", "kernel, 3 × 3", "result, 3 × 6")
for ax, values, title in zip(axes, (patch, kernel, by_hand), titles, strict=True):
    sns.heatmap(
        values, ax=ax, annot=True, fmt=".1f", cmap="vlag", center=0, cbar=False, square=True
    )
    ax.set(title=title, xticks=[], yticks=[])

# %% [markdown]
# The result is high where it gets darker from left to right, low where it gets lighter, and zero where nothing changes: an
# edge detector made of nine numbers. Four such kernels, one for each side of a stroke, give four *feature maps*. The
# rectifier, `relu`, cuts off what is negative: there is an edge or there is none.

# %%
kernels = torch.stack([kernel, -kernel, kernel.T, -kernel.T])[:, None]


def edges(batch):
    return F.relu(F.conv2d(ink(batch), kernels))


three = queries[query_labels == 3][:1]
maps = edges(three).transpose(0, 1)
shown = torch.cat([ink(three), F.pad(maps / maps.max(), (1, 1, 1, 1))])
titles = ["the image", "left rims", "right rims", "upper rims", "lower rims"]
figure = show_images(shown, titles, columns=5, size=1.6)

# %% [markdown]
# ## Shift in, shift out
#
# Because every window uses the same weights, a shifted image gives the shifted feature maps, number for number. This is
# *equivariance*. What a kernel has learned about strokes on the left holds on the right, without an example from there.


# %%
def shifted(batch, pixels):
    return torch.roll(batch, pixels, dims=3)


torch.testing.assert_close(edges(shifted(queries, 2))[..., 2:], edges(queries)[..., :-2])

# %% [markdown]
# That alone does not make distances forgiving: the maps move along with the image, so they differ from the original's just as
# the pixels did. Something must throw away the exact place. *Max pooling* does. It cuts each map into squares and keeps the
# largest number of each; an edge that moves within its square leaves no trace.

# %%
moved = torch.cat([three, shifted(three, 2)])
views = [moved, F.pad(edges(moved)[:, :1], (1, 1, 1, 1)), F.max_pool2d(edges(moved)[:, :1], 4)]
figure, axes = plt.subplots(2, 3, figsize=(7, 4.8))
for column, (view, title) in enumerate(
    zip(views, ("pixels", "left rims", "pooled 4 × 4"), strict=True)
):
    for row in range(2):
        axes[row, column].imshow(view[row, 0], cmap="gray_r", vmin=view.min(), vmax=view.max())
        axes[row, column].set(xticks=[], yticks=[])
    axes[0, column].set_title(title)
axes[0, 0].set_ylabel("original")
axes[1, 0].set_ylabel("moved by 2")
plt.show()

# %% [markdown]
# The lower row is the upper one, moved by two pixels. Left and middle, ink and edges have gone to new places; on the right, many
# squares keep their shade. Does that help? Ask the neighbours, as in chapter 1: those among pixels, among edges, and among edges
# pooled in squares of 2, 4 and 8.

# %%
views = {
    "pixels": lambda batch: batch,
    "edges": edges,
    "edges, pooled by 2": lambda batch: F.max_pool2d(edges(batch), 2),
    "edges, pooled by 4": lambda batch: F.max_pool2d(edges(batch), 4),
    "edges, pooled by 8": lambda batch: F.max_pool2d(edges(batch), 8),
}
shifts = range(5)
forgiving = pd.DataFrame(index=shifts)
for name, view in views.items():
    seen = view(gallery).flatten(1)
    forgiving[name] = [
        float(
            knn_accuracy(view(shifted(queries, k)).flatten(1), query_labels, seen, gallery_labels)
        )
        for k in shifts
    ]

# %% tags=["nbval-ignore-output"]
ax = sns.lineplot(forgiving, markers=True, dashes=True, markersize=9)
ax.set(title="Edges and pooling together forgive shifts", xlabel="shift of the query (pixels)")
ax.set(ylabel="kNN accuracy", ylim=(0, 1.02), xticks=shifts)
plt.show()

# %% [markdown]
# Edges by themselves gain nothing. Pooled by four they beat pixels at every shift, with 144 numbers instead of 784. Pooled by
# eight, too little is left. Nothing was learned here: nine weights, chosen by hand, did this.

# %%
assert (forgiving["edges, pooled by 4"] > forgiving["pixels"]).all()
assert forgiving["edges, pooled by 4"][2] > forgiving["pixels"][2] + 0.1
assert (forgiving["edges, pooled by 8"] < forgiving["edges, pooled by 4"]).all()

# %% [markdown]
# ## A first embedding network
#
# A network repeats this, with kernels to be learned, and ends in a *linear layer* that mixes the features into as many numbers as the
# embedding has. Here is the smallest that deserves the name. Its weights are random; `normalize` scales each point to length one,
# of which more below.

# %%
torch.manual_seed(0)
small = nn.Sequential(
    nn.Conv2d(1, 8, 5, bias=False),
    nn.MaxPool2d(4),
    nn.ReLU(),
    nn.Flatten(),
    nn.Linear(8 * 6 * 6, 16, bias=False),
)
points = F.normalize(small(queries))
print(tuple(queries.shape), "->", tuple(points.shape))

# %% [markdown]
# The book's network, `EmbeddingNet`, has the same parts and more of them: five convolutions, so that later kernels can
# combine strokes into corners and loops; and *batch normalisation* after each, which keeps numbers in a range where learning
# goes fast.

# %%
torch.manual_seed(0)
network = EmbeddingNet().eval()
print(" → ".join(type(layer).__name__ for layer in network.layers))

# %% [markdown]
# `eval()` says that we are not training; a later section shows what it changes. No convolution adds a constant (`bias=False`), as
# batch normalisation would subtract it again. The first four layers, done by hand with the network's own weights, give what
# the network gives.

# %%
stem, _, normalisation, _ = network.layers[:4]
maps = F.max_pool2d(F.conv2d(queries[:8], stem.weight), 2)
maps = (maps - normalisation.running_mean.view(1, -1, 1, 1)) / (
    normalisation.running_var.view(1, -1, 1, 1) + normalisation.eps
).sqrt()
torch.testing.assert_close(F.relu(maps), network.layers[:4](queries[:8]), atol=1e-5, rtol=1e-4)

# %% [markdown]
# Pooling comes *before* normalisation and rectifier, where many networks have it after. As long as the scales are positive, both
# leave the largest number the largest, so the order makes no difference to the result. It does to the work: a
# quarter of the numbers is left to treat.

# %%
pool, rectify = nn.MaxPool2d(2), nn.ReLU()
maps = stem(queries[:8])
torch.testing.assert_close(pool(rectify(normalisation(maps))), rectify(normalisation(pool(maps))))
print(f"{maps[0].numel():,} numbers an image before pooling, {pool(maps)[0].numel():,} after")

# %% [markdown]
# ## Shapes, layer by layer
#
# A *forward hook* is a function that PyTorch calls whenever a layer has computed something. Ours writes down the shape of what came
# out, how many weights the layer has, and its multiply-adds: multiplications, each followed by an addition. An output number of a
# convolution costs one for each weight of its window; one of a linear layer, one for each input.

# %%
table = []


def write_down(layer, inputs, output):
    weights = sum(parameter.numel() for parameter in layer.parameters())
    window = layer.weight[0].numel() if isinstance(layer, nn.Conv2d | nn.Linear) else 0
    table.append(
        (type(layer).__name__, tuple(output.shape[1:]), weights, window * output[0].numel())
    )


hooks = [layer.register_forward_hook(write_down) for layer in network.layers]
network(queries[:1])
for hook in hooks:
    hook.remove()

# %%
print(f"{'layer':<18} {'output':<13} {'weights':>8} {'multiply-adds':>14}")
for name, shape, weights, work in table:
    print(f"{name:<18} {' × '.join(map(str, shape)):<13} {weights:>8,} {work:>14,}")
print(f"{'total':<32} {sum(row[2] for row in table):>8,} {sum(row[3] for row in table):>14,}")

# %% [markdown]
# Read the second column downwards. The maps get smaller, 24, 12, 6, 4, 2, and there are more of them, 32, 64, 96, 192: the
# network trades *where* for *what*. The stem has no padding, so its 5 × 5 kernel fits into the image at 24 × 24 places;
# convolutions with padding keep the size.
#
# The last pooling takes whatever there is to 2 × 2. With digits nothing is left to do; a larger image comes out in the same shape.

# %%
print(tuple(network(torch.zeros(1, 1, 40, 32)).shape))
assert network(torch.zeros(1, 1, 40, 32)).shape == network(queries[:1]).shape

# %% [markdown]
# Now the sums, by formula. A convolution from *c* to *d* channels with a *k* × *k* kernel has *c d k²* weights, and uses each of
# them once for every place in the output map. Batch normalisation has a scale and an offset for each channel. PyTorch counts the
# same weights, and floating-point operations, of which a multiply-add is two.

# %%
convolutions = [(1, 32, 5, 24), (32, 64, 3, 12), (64, 96, 3, 12), (96, 192, 3, 4), (192, 192, 3, 2)]
by_formula = sum(c * d * k * k + 2 * d for c, d, k, _ in convolutions) + 192 * 2 * 2 * 64
assert by_formula == sum(parameter.numel() for parameter in network.parameters())

with FlopCounterMode(display=False) as counter:
    network(queries[:1])
multiply_adds = sum(c * d * k * k * side**2 for c, d, k, side in convolutions) + 192 * 2 * 2 * 64
assert counter.get_total_flops() == 2 * multiply_adds
assert multiply_adds == sum(work for *_, work in table)
print(f"{by_formula:,} weights, {multiply_adds:,} multiply-adds an image")

# %% [markdown]
# Where do the weights live, and where is the work done?

# %%
parts = [row for row in table if row[3] > 0]
names = ["conv 1 (stem)", "conv 2", "conv 3", "conv 4", "conv 5", "linear"]
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4), sharey=True)
left.bar_label(left.barh(names, [row[2] / 1e3 for row in parts], color=PALETTE[0]), fmt=" %.1f")
left.set(title="Weights live late", xlabel="thousand weights", xlim=(0, 385))
right.bar_label(right.barh(names, [row[3] / 1e6 for row in parts], color=PALETTE[1]), fmt=" %.2f")
right.set(
    title="Work is done while maps are large",
    xlabel="million multiply-adds an image",
    xlim=(0, 9.2),
)
left.invert_yaxis()
for ax in (left, right):
    ax.grid(visible=False, axis="y")

# %% [markdown]
# The last two convolutions hold four fifths of the weights, as they join many channels with many. The first three do seven tenths of
# the work: the third uses each of its weights at 144 places, the fifth at four. To make a network smaller, look left; to make
# it faster, look right.

# %%
weights, work = ([row[column] for row in parts] for column in (2, 3))
assert weights[3] + weights[4] > 0.79 * by_formula
assert sum(work[:3]) > 0.7 * multiply_adds

# %% [markdown]
# One thing the table does not show: how the weights lie in memory. Here channels come last, all channels of a place side by
# side, as CPUs get through these layers faster that way. Shapes and results stay what they are.

# %%
assert network.layers[4].weight.is_contiguous(memory_format=torch.channels_last)

# %% [markdown]
# ## The unit sphere
#
# The last step divides each embedding by its length. Why? An embedding has a direction and a length, and in an untrained
# network the length tells something that we do not care about: contrast. Multiply an image by two, and each layer passes the two
# on. The embedding points the same way and is twice as long.

# %%
free = EmbeddingNet(normalize=False).eval()
torch.testing.assert_close(free(2 * queries[:8]), 2 * free(queries[:8]))
torch.testing.assert_close(network(2 * queries[:8]), network(queries[:8]))

# %% [markdown]
# In two dimensions one can see it. Ten digits, each in five contrasts, go through a network whose embeddings have two numbers:
# on the left as they come out, on the right divided by their lengths.

# %%
torch.manual_seed(0)
plane = EmbeddingNet(dimensions=2, normalize=False)
ten = torch.cat([queries[query_labels == digit][:1] for digit in range(10)])
flat = torch.stack([embed(plane, contrast * ten) for contrast in (0.4, 0.7, 1.0, 1.3, 1.6)])

figure, axes = plt.subplots(1, 2, figsize=(10, 4.4))
for ax, where in zip(axes, (flat, F.normalize(flat, dim=2)), strict=True):
    for digit in range(10):
        ax.plot(*where[:, digit].T, "o-", color=PALETTE[digit], alpha=0.8)
        aside = 12 * F.normalize(where[-1, digit], dim=0)
        place = {"xytext": aside, "textcoords": "offset points", "ha": "center", "va": "center"}
        ax.annotate(str(digit), where[-1, digit], weight="bold", **place)
    ax.plot(0, 0, "+k", markersize=12)
    ax.set_aspect("equal")
    ax.margins(0.12)
axes[1].add_patch(plt.Circle((0, 0), 1, fill=False, color="grey", linestyle=":"))
axes[0].set(title="Contrast is length …", xlabel="first number", ylabel="second number")
axes[1].set(title="… and gone on the circle", xlabel="first number")
plt.show()

# %% [markdown]
# On the left each digit draws a ray from the cross, the origin, outwards; on the right its five contrasts fall together.
#
# There is a second reason. A triplet loss wants negatives farther away than positives by a margin. Without a sphere, a
# network can please it by mere growth: ten times longer embeddings have ten times wider gaps. On the sphere no distance exceeds two,
# and only directions can change.

# %%
long, short = embed(free, queries[:100]), embed(network, queries[:100])
torch.testing.assert_close(pairwise_distances(10 * long), 10 * pairwise_distances(long))
torch.testing.assert_close(short.norm(dim=1), torch.ones(100))

# %% [markdown]
# The sphere also ties distance to angle. For points of length one, the squared distance is 2 − 2 cos of the angle between
# them. So the nearest by distance is the nearest by cosine, which other books use instead.

# %%
cosines = short @ short.T
torch.testing.assert_close(
    pairwise_distances(short, squared=True), 2 - 2 * cosines, atol=1e-5, rtol=0
)

# %%
angles = torch.linspace(0, torch.pi, 181)
circle = torch.stack([angles.cos(), angles.sin()], dim=1)
squared = pairwise_distances(circle[:1], circle, squared=True)[0]
ax = sns.lineplot(x=angles.rad2deg(), y=squared, color=PALETTE[4], label="squared distance")
sns.lineplot(x=angles.rad2deg(), y=squared.sqrt(), color=PALETTE[2], label="distance", ax=ax)
ax.set(
    title="On the sphere a distance is an angle", xlabel="angle between two embeddings (degrees)"
)
ax.set(ylabel="distance", xticks=range(0, 181, 30))
assert abs(float(squared[60]) - 1) < 1e-5
assert abs(float(squared[180]) - 4) < 1e-5

# %% [markdown]
# At 60 degrees both are one, at a right angle the squared distance is two, and opposite points are four apart, squared. Keep
# the right angle in mind. In 64 dimensions nearly all pairs of random directions are close to it: there is a lot of room on this
# sphere.

# %%
directions = F.normalize(
    torch.randn(2, 1000, 64, generator=torch.Generator().manual_seed(0)), dim=2
)
between = (directions[0] * directions[1]).sum(dim=1).acos().rad2deg()
assert ((between - 90).abs() < 20).float().mean() > 0.95

# %% [markdown]
# ## Batch normalisation, in and out of training
#
# While training, a batch normalisation layer takes the mean and the variance of each channel over the batch, subtracts the one and
# divides by the root of the other. So the images of a batch have a say in each other's embeddings. On the side the layer keeps
# running averages: nine tenths of the old plus a tenth of the new.

# %%
layer = nn.BatchNorm2d(1)
batch = 100 + 50 * images[:32]
mean, variance = batch.mean(), batch.var(correction=0)
torch.testing.assert_close(layer(batch), (batch - mean) / (variance + layer.eps).sqrt())
torch.testing.assert_close(layer.running_mean, 0.9 * torch.zeros(1) + 0.1 * mean)

# %% [markdown]
# In evaluation mode it uses the running averages and leaves them as they are. They start from zero, and take a while to
# catch up with the data, whose mean we set to 100 here.

# %%
batch_means, running_means = [float(mean)], [float(layer.running_mean)]
for batch in (100 + 50 * images[32:1600]).split(32):
    layer(batch)
    batch_means.append(float(batch.mean()))
    running_means.append(float(layer.running_mean))
assert abs(running_means[-1] - 100) < 3

# %%
ax = plt.gca()
seen = range(1, len(batch_means) + 1)
ax.plot(
    seen, batch_means, "o", color=PALETTE[1], alpha=0.6, label="mean of the batch (training mode)"
)
ax.plot(
    seen, running_means, color=PALETTE[0], linewidth=2.5, label="running mean (evaluation mode)"
)
ax.axhline(100, color="grey", linestyle=":", label="mean of the training set")
ax.set(title="The running mean catches up in some thirty batches", xlabel="batches of 32 seen")
ax.set(ylabel="mean", ylim=(0, None))
ax.legend(loc="lower right")
plt.show()

# %% [markdown]
# This matters here because a query arrives alone. In evaluation mode its embedding depends on the image and on nothing else, so
# embedding one at a time and embedding a batch agree. `embed` switches to that mode, and back again.

# %%
network.train()
one_by_one, together = (embed(network, queries[:20], batch_size=size) for size in (1, 20))
torch.testing.assert_close(one_by_one, together, atol=1e-5, rtol=1e-4)
assert network.training
network = network.eval()

# %% [markdown]
# ## Shared weights
#
# A triplet has three images, and one function must embed all three, or their distances mean nothing. With three networks that
# have weights of their own, an image is not even close to itself.

# %%
torch.manual_seed(0)
first, second, third = (EmbeddingNet().eval() for _ in range(3))
anchor, positive = images[labels == 5][:2, None]
negative = images[labels == 3][:1]
with torch.no_grad():
    assert (first(anchor) - second(anchor)).norm() > 0.5
    assert torch.equal(first(anchor), first(anchor))

# %% [markdown]
# `TripletNet` is hence not three networks but one, called three times. Drawings of it show three towers; the code holds a single
# set of weights, that of the embedding network it was given.

# %%
triplet = TripletNet(network)
separate = nn.ModuleList([first, second, third])
for name, module in (("shared", triplet), ("three networks", separate)):
    print(f"{name:<15} {sum(weight.numel() for weight in module.parameters()):>9,} weights")
torch.testing.assert_close(
    torch.cat(triplet(anchor, positive, negative)),
    network(torch.cat([anchor, positive, negative])),
    atol=1e-5,
    rtol=1e-4,
)

# %% [markdown]
# The assertion says that three calls, and one call on all images, give the same points. (In training mode each call would
# normalise with statistics of its own.) Chapter 4 makes use of that: it embeds a batch once and picks the triplets among the points,
# so that an image in a thousand triplets is embedded once.
#
# What does a shared weight learn from a triplet? It acts in three places, so its gradient is a sum of three. To see the
# summands, let three copies of the network, equal but separate, embed one image each.


# %%
def triplet_loss(a, p, n, margin=0.2):
    return F.relu((a - p).square().sum(dim=1) - (a - n).square().sum(dim=1) + margin).mean()


copies = [deepcopy(network) for _ in range(3)]
apart = (copy(image) for copy, image in zip(copies, (anchor, positive, negative), strict=True))
triplet_loss(*apart).backward()
triplet_loss(*triplet(anchor, positive, negative)).backward()

shared = stem.weight.grad
summands = [copy.layers[0].weight.grad for copy in copies]
torch.testing.assert_close(shared, sum(summands), atol=1e-4, rtol=1e-3)

# %% tags=["nbval-ignore-output"]
kernel_shown = shared.flatten(1).norm(dim=1).argmax()
pieces = [gradient[kernel_shown, 0] for gradient in (*summands, shared)]
largest = max(float(piece.abs().max()) for piece in pieces)
figure, axes = plt.subplots(1, 4, figsize=(10, 2.9))
titles = ("from the anchor", "+ from the positive", "+ from the negative", "= of the shared kernel")
for ax, piece, title in zip(axes, pieces, titles, strict=True):
    ax.imshow(piece, cmap="PuOr", vmin=-largest, vmax=largest)
    ax.set(title=title, xticks=[], yticks=[])

# %% [markdown]
# This is one of the stem's 32 kernels. Where it is purple the loss rises with the weight, where it is orange it falls. Each
# image has its own opinion, and `backward` adds them up without our doing anything.
#
# ## An untrained network is not useless
#
# Random weights, no training: what are the embeddings worth? We compare three views of an image: its 784 pixels, the 768
# features that enter the last layer, and the 64 numbers that leave it. Three networks with different random weights take
# part, so as not to praise one lucky draw.


# %%
def views_of(network, batch):
    features = embed(network.layers[:-1], batch)
    points = F.normalize(network.layers[-1](features).detach())
    return {"768 features": features, "64 numbers": points}


networks = []
for seed in range(3):
    torch.manual_seed(seed)
    networks.append(EmbeddingNet())

rows = [("784 pixels", k, forgiving["pixels"][k]) for k in shifts]
for network in networks:
    known = views_of(network, gallery)
    for k in shifts:
        for name, asked in views_of(network, shifted(queries, k)).items():
            score = knn_accuracy(asked, query_labels, known[name], gallery_labels)
            rows.append((name, k, float(score)))
scores = pd.DataFrame(rows, columns=["view", "shift", "accuracy"])

# %% tags=["nbval-ignore-output"]
ax = sns.lineplot(
    scores,
    x="shift",
    y="accuracy",
    hue="view",
    style="view",
    markers=True,
    dashes=False,
    markersize=9,
    errorbar=("pi", 100),
)
ax.set(title="Random features already beat pixels", xlabel="shift of the query (pixels)")
ax.set(ylabel="kNN accuracy", ylim=(0, 1.02), xticks=shifts)
ax.legend(title=None)
plt.show()

# %% [markdown]
# The bands reach from the worst to the best of three networks. Features of a network that knows nothing tell digits apart better
# than pixels do, moved or not. The 64 numbers, a random mix of these features, come close to twelve times as many pixels, and pull
# ahead as the query moves on.

# %%
mean_scores = scores.groupby(["view", "shift"])["accuracy"].mean().unstack("view")
assert (mean_scores["768 features"] > mean_scores["784 pixels"]).all()
assert mean_scores["768 features"][2] > mean_scores["784 pixels"][2] + 0.1
assert abs(mean_scores["64 numbers"][0] - mean_scores["784 pixels"][0]) < 0.06
assert mean_scores["64 numbers"][4] > mean_scores["784 pixels"][4] + 0.02

# %% [markdown]
# ## Why not?
#
# The weights are random; the layers are not. Small windows, the same weights everywhere, pooling: they all say that
# neighbouring pixels belong together, before any training. If this is the reason, then tearing neighbours apart must hurt.
# So shuffle the pixels, those of all images in the same way.


# %%
order = torch.randperm(784, generator=torch.Generator().manual_seed(0))


def scrambled(batch):
    return batch.flatten(1)[:, order].view_as(batch)


figure = show_images(torch.cat([ten, scrambled(ten)]), columns=10)

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


# %%
contenders = [("pixels", nn.Flatten())]
contenders += [("untrained, fully connected", fully_connected_net(seed)) for seed in range(3)]
contenders += [("untrained, convolutional", network) for network in networks]
rows = []
for name, contender in contenders:
    for place, view in (("in place", nn.Identity()), ("shuffled", scrambled)):
        asked, known = (embed(contender, view(batch)) for batch in (queries, gallery))
        if name != "pixels":  # both networks end on the sphere
            asked, known = F.normalize(asked), F.normalize(known)
        score = knn_accuracy(asked, query_labels, known, gallery_labels)
        rows.append((name, place, float(score)))
shuffling = pd.DataFrame(rows, columns=["view", "pixels", "accuracy"])

# %% tags=["nbval-ignore-output"]
ax = sns.barplot(shuffling, x="accuracy", y="view", hue="pixels", errorbar=("pi", 100))
ax.set(title="Only convolutions know which pixels are neighbours", xlabel="kNN accuracy", ylabel="")
ax.set_xlim(0, 1)
ax.legend(title="pixels", loc="upper left", bbox_to_anchor=(1, 1))
plt.show()

# %% [markdown]
# So the knowledge is in the architecture. With its assumption broken, the convolutional network falls behind both others. The
# assumption is about images and not about digits, which is why the same network can serve for shirts.

# %%
means = shuffling.groupby(["view", "pixels"])["accuracy"].mean()
pixels, dense, convolutional = (means[view] for view in shuffling["view"].unique())
assert convolutional["shuffled"] < pixels["shuffled"] - 0.08
assert convolutional["in place"] > dense["in place"] + 0.02
assert convolutional["shuffled"] < dense["shuffled"]
assert abs(dense["shuffled"] - dense["in place"]) < 0.05

# %% [markdown]
# ## What is missing
#
# Here are queries and the eight images that an untrained network finds nearest. Ones and nines find their like. The three and
# the five find whatever fills the same places, sixes, fours, nines: overall shape counts, and what makes a three does
# not.

# %%
network = networks[0]
asked, known = embed(network, queries), embed(network, gallery)
found = pairwise_distances(asked, known).topk(8, largest=False).indices
rows = torch.cat([torch.nonzero(query_labels == digit)[:1, 0] for digit in (1, 3, 4, 5, 9)])
figure = show_neighbours(
    queries[rows], query_labels[rows], gallery[found[rows]], gallery_labels[found[rows]]
)

# %% [markdown]
# And this is half of the gallery, on the left in the two directions along which its embeddings vary most, their principal
# components. On the right are the squared distances of all pairs, drawn as in chapter 1.

# %%
centred = known - known.mean(dim=0)
directions = torch.linalg.svd(centred, full_matrices=False).Vh[:2]
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6))
scatter_classes((centred @ directions.T)[:1000], gallery_labels[:1000], ax=left, size=10)
left.set(
    title="Digits have places, not borders", xlabel="first component", ylabel="second component"
)
plot_distances(known[:1000], gallery_labels[:1000], ax=right, squared=True)
right.axvline(2, color="grey", linestyle=":")
right.annotate("right angle", (1.97, right.get_ylim()[1] / 2), ha="right", color="grey")
right.set(title="All pairs are close", xlim=(0, 2.1))
plt.show()

# %% [markdown]
# Digits have their places, ones far from zeros, yet no two are kept apart. And on the right, all embeddings point nearly the same
# way. Neighbour search does not mind, as it only asks who is *nearer*. A triplet loss does: a margin of 0.2 is nearly all of the
# squared distance between different digits.

# %%
cosines = known @ known.T
different = gallery_labels[:, None] != gallery_labels
assert 0.15 < (2 - 2 * cosines[different]).mean() < 0.3
print("pairs of different digits at an obtuse angle:", int((cosines[different] < 0).sum()))

# %% [markdown]
# Training has to turn this one crowded direction into ten that are well apart. There is room enough, as the random directions showed.
#
# ## When it goes wrong: evaluating in training mode
#
# Forget `eval()`, and batch normalisation takes its statistics from whoever asks. No error appears. To see what happens, take a
# network whose running averages fit the data, as they do after training, and build the gallery with care. Then let 128 queries come in
# batches of different sizes, with the network left in training mode.

# %%
careless = deepcopy(network).train()
with torch.no_grad():
    for batch in gallery.split(50):
        careless(batch)
known = embed(careless, gallery)
asked = embed(careless, queries[:128])
in_evaluation = float(knn_accuracy(asked, query_labels[:128], known, gallery_labels))

# %%
batch_sizes, in_company = [1, 2, 4, 16, 128], []
for size in batch_sizes:
    with torch.no_grad():
        found = torch.cat([careless(batch) for batch in queries[:128].split(size)])
    in_company.append(float(knn_accuracy(found, query_labels[:128], known, gallery_labels)))

# %% tags=["nbval-ignore-output"]
ax = plt.gca()
ax.plot(batch_sizes, in_company, "o-", color=DIFFERENT, label="training mode")
ax.axhline(in_evaluation, color=SAME, label="evaluation mode, any batch size")
ax.set(title="In training mode the answer depends on the company", xlabel="queries in a batch")
ax.set(ylabel="kNN accuracy, 128 queries", xscale="log", ylim=(0, 1.02))
ax.set_xticks(batch_sizes, batch_sizes)
ax.minorticks_off()
ax.legend(loc="lower right")
plt.show()

# %% [markdown]
# Alone, a query is mostly misjudged; in a large batch all seems well, which is why the slip goes unnoticed until somebody asks a
# single question. (That the blue line is lower than before is the price of averages for which the random weights were not made.)
#
# There is a second damage. Each call in training mode moved the running averages: the network is no longer the one
# it was, though no weight has changed.

# %%
assert in_company[0] < in_evaluation - 0.15
assert in_company[-1] > in_evaluation - 0.05
assert torch.equal(careless.layers[0].weight, network.layers[0].weight)
assert (embed(careless, queries[:128]) - asked).norm(dim=1).min() > 1e-3

# %% [markdown]
# The cure is to call `eval()` before embedding, or to use `embed`, which does it for the while. Then the batch size does not
# matter, and the network stays as it was.

# %%
before = deepcopy(careless.state_dict())
one_by_one, together = (embed(careless, queries[:20], batch_size=size) for size in (1, 20))
torch.testing.assert_close(one_by_one, together, atol=1e-5, rtol=1e-4)
assert all(torch.equal(value, before[name]) for name, value in careless.state_dict().items())

# %% [markdown]
# ## Exercises
#
# Try each before you unfold its solution (click the blue bar or the three dots).
#
# **1.** An image of 56 × 56 pixels instead of 28 × 28: how many more weights and how many more multiply-adds does the
# network need? Guess, then count.

# %% jupyter={"source_hidden": true}
with FlopCounterMode(display=False) as counter:
    network(torch.zeros(1, 1, 56, 56))
ratio = counter.get_total_flops() / 2 / multiply_adds
print(f"the same weights, {ratio:.1f} times the multiply-adds")
# More than four times: convolutions without padding lose a smaller part of a larger map.
assert 6 < ratio < 7

# %% [markdown]
# **2.** How much of the image does one number see, after each convolution and pooling? Work out the side of this window, the
# *receptive field*, by hand; then write a loop. (A layer with a window of *k* adds *k* − 1 steps; a pooling by two doubles the step.)

# %% jupyter={"source_hidden": true}
side, step, sides = 1, 1, []
for window, stride in [(5, 1), (2, 2), (3, 1), (3, 1), (2, 2), (3, 1), (3, 1)]:
    side, step = side + (window - 1) * step, step * stride
    sides.append(side)
print(sides)
assert sides[-1] >= 28  # the last convolution sees all of the image

# %% [markdown]
# **3.** How many dimensions does a random mix of the features need? Put random linear layers with 2, 8, 64 and 512 outputs behind
# the same 768 features, and measure.

# %% jupyter={"source_hidden": true} tags=["nbval-ignore-output"]
asked_features, known_features = (
    views_of(network, batch)["768 features"] for batch in (queries, gallery)
)
by_dimensions = {}
for dimensions in (2, 8, 64, 512):
    mix = torch.randn(768, dimensions, generator=torch.Generator().manual_seed(0))
    by_dimensions[dimensions] = knn_accuracy(
        F.normalize(asked_features @ mix),
        query_labels,
        F.normalize(known_features @ mix),
        gallery_labels,
    )
    print(dimensions, by_dimensions[dimensions])
assert by_dimensions[2] < by_dimensions[8] - 0.1 < by_dimensions[64] - 0.1
assert abs(by_dimensions[512] - by_dimensions[64]) < 0.06

# %% [markdown]
# **4.** On the unit sphere, which margin between squared distances can never be met? And which angle does an anchor's nearest
# negative have to keep, if its positive lies right on top of it and the margin is 0.2?

# %% jupyter={"source_hidden": true}
# No squared distance exceeds 4, and none is below 0: a margin above 4 can never be met.
assert pairwise_distances(circle, squared=True).max() < 4 + 1e-5
# 2 - 2 cos(angle) = 0.2, hence cos(angle) = 0.9.
angle = torch.tensor(0.9).acos().rad2deg()
print(f"{float(angle):.0f} degrees")
assert 25 < angle < 26

# %% [markdown]
# ## Summary
#
# - A convolution slides one small set of weights over the image; pooling forgets the exact place. Together they forgive shifts.
# - Weights live late, where channels are many; work is done early, where maps are large.
# - On the unit sphere contrast is gone, distances are bounded, and squared distance is 2 − 2 cos of the angle.
# - Anchor, positive and negative go through one network; the gradient of a shared weight is the sum over its uses.
# - Untrained embeddings find good neighbours, as the architecture knows about images, but they crowd in one direction.
#
# **Next:** [4 · Training](04_training.ipynb) lets the triplet loss push them apart.
#
# **References.** E. Hoffer, N. Ailon, "Deep metric learning using Triplet network", 2014 (shared weights). · F. Schroff, D. Kalenichenko,
# J. Philbin, "FaceNet: a unified embedding for face recognition and clustering", 2015 (the unit sphere). · S. Ioffe, C. Szegedy, "Batch
# normalization: accelerating deep network training by reducing internal covariate shift", 2015. · D. Ulyanov, A. Vedaldi, V. Lempitsky,
# "Deep image prior", 2018 (what untrained convolutions know).
