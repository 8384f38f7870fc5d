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
# # 4 · Training: two epochs to 99.5 %
#
# Data, a loss over all triplets, a network: everything is in place. This chapter trains on all of MNIST, on the CPU, in
# about one and a half minutes; reads the curves; says how to choose the settings; and breaks the training on purpose, to find out what repairs it.
#
# - **You will learn** what a training step does, why the loss hardly falls while the network gets better, how to choose
#   margin, learning rate and batches, how to recognise and prevent a collapse, how to resume, and how to report an accuracy.
# - **You need** chapters [2](02_triplets.ipynb) and [3](03_network.ipynb); no GPU.
# - **Running time** about 4 minutes on two cores, of which training takes one or one and a half.
# - Previous: [3 · Network](03_network.ipynb) · Next: [5 · Visualization](05_visualization.ipynb)

# %%
import time
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory

import matplotlib.pyplot as plt
import seaborn as sns
import torch
import torch.nn.functional as F
from scipy.stats import binomtest
from torch import nn

from tripletlib import (
    BalancedBatchSampler,
    EmbeddingNet,
    KNNClassifier,
    TripletLoss,
    batch_all_triplet_loss,
    describe_triplets,
    embed,
    fit,
    jitter,
    knn_accuracy,
    load_mnist,
    load_or_fit,
    pairwise_distances,
)
from tripletlib.plotting import DIFFERENT, PALETTE, SAME, plot_history, show_images, use_theme

use_theme()
images, labels = load_mnist("train")
test_images, test_labels = load_mnist("test")

# %% [markdown]
# ## One step by hand
#
# What is a training step? Embed a batch, compute the loss, let autograd compute its gradient (how the loss rises with each
# weight), move all weights a little against it. PyTorch spells it in four statements. Take one batch of 512 digits and repeat the step ten
# times.

# %%
torch.manual_seed(0)
stepping = EmbeddingNet()
optimizer = torch.optim.AdamW(stepping.parameters(), lr=1e-3)
batch, batch_labels = images[:512], labels[:512]

active_counts = []
for _ in range(10):
    loss, active = batch_all_triplet_loss(
        stepping(batch), batch_labels, reduction="mean", return_active=True
    )
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    active_counts.append(int(active))

# %% alt="Active triplets of one batch, in millions, over ten steps: 6.0 at the first, 1.0 at the second, and less than 0.1 from the seventh on." tags=["nbval-ignore-output"]
valid = describe_triplets(embed(stepping, batch), batch_labels).triplets
print(f"{valid:,} triplets; active at the first step {active_counts[0]:,}", end=", ")
print(f"at the tenth {active_counts[-1]:,}")
ax = sns.lineplot(x=range(1, 11), y=[count / 1e6 for count in active_counts], marker="o")
ax.set(
    title="Ten steps on one batch solve nearly all of its triplets", xlabel="step", ylim=(0, None)
)
ax.set_ylabel("active triplets (millions)")
plt.show()
assert active_counts[-1] < 0.05 * active_counts[0]

# %% [markdown]
# Each step looks at all 12 million triplets of the batch. Half of them violate the margin at first (they are **active**); after
# nine steps less than one in a hundred does. That is no success yet: the network may have learnt these 512 images by heart.
# Training takes a new batch each time, and the test comes at the end.

# %% [markdown]
# ## What the library adds to the loop
#
# `fit` is this loop over shuffled batches, with four additions.
#
# **One cycle.** The learning rate rises to its peak during the first fifth of the steps and then falls to almost nothing. At
# the start a large step would follow the gradients of random weights; at the end small steps let the weights settle, because
# the gradients of single batches scatter.
#
# **Muon** (an optimiser). It writes the averaged gradient of a kernel as a matrix and replaces all its singular values, the
# sizes of the step along its directions, by about one. So the directions in which the gradient is weak are followed as far as
# those that dominate it.

# %%
kernels = [layer.weight for layer in stepping.modules() if isinstance(layer, nn.Conv2d)]
gradient = kernels[1].grad.flatten(1)
U, sizes, Vh = torch.linalg.svd(gradient, full_matrices=False)
evened = torch.linalg.svdvals(U @ Vh)
print(f"second convolution's kernel as a matrix: {tuple(gradient.shape)}")
print(f"largest singular value over the median: {sizes[0] / sizes.median():.0f}", end=", ")
print(f"in the step {evened[0] / evened.median():.0f}")
by_muon = sum(kernel.numel() for kernel in kernels[1:])
of_all = sum(weight.numel() for weight in stepping.parameters())
print(f"trained by Muon: {by_muon:,} of {of_all:,} weights")
assert sizes[0] > 5 * sizes.median()
assert evened.max() - evened.min() < 1e-4

# %% [markdown]
# Muon trains the kernels of the four convolutions after the first. The first, which sees pixels and not features, the
# batch normalisations and the last linear layer are left to AdamW.
#
# **A bar** shows the loss *and* the active fraction. And each image is **jittered**: turned, moved and stretched a little at
# random. The field calls it *data augmentation*. A nudged digit is still that digit, and chapter 1 showed what a nudge does to
# pixels.

# %% alt="A handwritten five and nine jittered copies of it, each turned, moved and stretched a little differently. All are plainly the same five."
torch.manual_seed(0)
five = images[:1]
show_images(torch.cat([five, jitter(five.expand(9, -1, -1, -1))]), ["original"] + ["jittered"] * 9)
plt.show()

# %% [markdown]
# ## Two epochs
#
# An **epoch** is one pass over the training images; jittered or not, each is looked at once. Two epochs in batches of 512 are
# 236 steps. `load_or_fit` trains as `fit` does and keeps the result in a cache on this machine, known by data, settings and
# code, so that chapter 5 need not train again. `retrain=True` trains here even if the cache has it.

# %% tags=["nbval-ignore-output"]
network, history = load_or_fit(EmbeddingNet, images, labels, seed=0, retrain=True)

# %%
rate = history["learning_rate"]
print(len(history), "steps; columns:", ", ".join(history.frame().columns))
print(f"rate of AdamW: {rate[0]:.5f} at first, {rate.max():.5f} at step {rate.argmax()}", end=", ")
print(f"{rate[-1]:.0e} at the end")
assert len(history) == 236
assert rate.argmax() in (46, 47)

# %% [markdown]
# ## Reading the curves
#
# Look at the left panel first, and be disappointed: the loss falls a little and then hovers. Did learning stop after thirty
# steps? The other two say no.

# %% alt="Three curves over 236 steps. The mean loss over active triplets falls from 0.28 to 0.2 and hovers. The active fraction falls from 0.6 to 0.003 on a logarithmic axis. The mean squared distance of one class falls from 1.2 to 0.1, that of different classes ends at 1.4." tags=["nbval-ignore-output"]
figure = plot_history(history)
titles = ("The loss hovers …", "… while triplets are solved", "Same digits move together")
for ax, title in zip(figure.axes, titles, strict=True):
    ax.set_title(title)
figure.axes[2].get_legend().remove()
figure.axes[2].set_ylabel("mean squared distance of pairs")
figure.axes[2].annotate("different classes", (130, 1.15), color=DIFFERENT)
figure.axes[2].annotate("same class", (130, 0.2), color=SAME)
plt.show()

# %% [markdown]
# The loss is a mean over the *active* triplets only (chapter 2). Solved triplets leave the mean; the stubborn ones stay in it.
# What tells progress is the **fraction** that is active. Always read both. The right panel shows what happened in space, in
# *squared* distances.

# %% tags=["nbval-ignore-output"]
first, last = history.frame().iloc[0], history.frame().iloc[-20:].mean()
for column in ("loss", "active", "positive_distance", "negative_distance"):
    print(
        f"{column:<18} first step {first[column]:.3f}, mean of the last twenty {last[column]:.4f}"
    )
print(f"the active fraction fell {first['active'] / last['active']:.0f}-fold")
assert first["active"] > 50 * last["active"]
assert last["loss"] > 0.3 * first["loss"]
assert last["negative_distance"] - last["positive_distance"] > 5 * 0.2

# %% [markdown]
# The loss ends at 0.19, more than two thirds of where it began; the active fraction falls from 60 % to 0.3 %. Two images of one
# digit are now 0.09 apart on average, two of different digits 1.4, both squared: a gap of six times the margin of 0.2. (On a
# sphere of radius one, 2 is a right angle.) The loss asks for the margin in *every* triplet, and the worst of them are far from
# the average.

# %% [markdown]
# ## How good is it?
#
# Embed everything, then classify each test image by its ten nearest training images, as in chapter 1. Beside it the rival that
# costs nothing: pixels.

# %% tags=["nbval-ignore-output"]
gallery, queries = embed(network, images), embed(network, test_images)
accuracy = knn_accuracy(queries, test_labels, gallery, labels, k=10)
by_pixels = knn_accuracy(test_images.flatten(1), test_labels, images.flatten(1), labels, k=10)
print("pixels: ", by_pixels)
print("network:", accuracy)
assert accuracy > 0.994 > 0.975 > by_pixels

# %% [markdown]
# So 46 errors in 10 000 instead of pixels' 335 (an untrained network is no better than pixels, as the end of this chapter
# shows). Hoffer and Ailon report 99.54 % for their triplet network, but with a *linear classifier* on its embeddings: the
# measures differ, and chapter [7](07_the_paper.ipynb) compares like with like.
#
# An accuracy is an estimate, and two sorts of chance are in it. The *interval* says how far the accuracy on all such digits may
# be from that on these 10 000. The other chance is the *seed*: over seeds 0 to 4, `python tests/benchmarks/accuracy.py`
# measured a mean of 99.57 % with a standard deviation of 0.05 points. Two networks tested on the same images are compared by
# the images that only one of them gets right, not by whether their intervals overlap.

# %% [markdown]
# ## How to choose the settings
#
# Margin 0.2, rate 0.004, batches of 512: where from? From trying, on images that are *not* the test set. Train on some of the
# training images, measure on others (**validation**, chapter 1), and change two settings at a time over a coarse **grid**,
# because the best value of one may depend on the other. Here is the kNN error on 5 000 images held back, after one epoch on
# 10 000 others, with each of two seeds. `python tests/benchmarks/settings.py` printed it (about ten minutes on one core, too
# long for this page). Pixels have 6.8 % there, untrained networks 7.3 and 8.1 %.
#
# | margin (squared distance) | rate 0.001 | rate 0.004 | rate 0.016 |
# | --- | --- | --- | --- |
# | 0.05 | 3.4, 3.7 % | 2.4, 2.4 % | 2.1, 2.3 % |
# | 0.2 | 3.1, 3.7 % | 1.5, 1.5 % | 1.6, 1.5 % |
# | 0.8 | 4.2, 5.2 % | 1.6, 1.5 % | 1.5, 1.7 % |
#
# **Rate first.** It decides most: in 20 steps 0.001 gets only part of the way. From 0.004 to 0.016 it hardly matters. **Then
# the margin**, in a geometric series, since it is a matter of scale: 0.2 and 0.8 cannot be told apart, 0.05 is worse at these
# two rates. Take the middle of a flat region, not the smallest number of a table, because a seed alone moves it. If the best
# value lies at an edge of the grid, extend the grid. (Here the flat region reaches two edges, and 0.2 and 0.004 are its gentle
# corner: to settle it, go on to larger margins and rates.) And repeat the last choice at full length: what is best for 20 steps need
# not be best for 236.

# %% [markdown]
# Now the batch, with margin 0.2 and rate 0.004, its images drawn from P classes:
#
# | images in a batch | steps | P = 2 | P = 5 | P = 10 |
# | --- | --- | --- | --- | --- |
# | 64 | 156 to 166 | 3.4, 1.7 % | 1.3, 1.1 % | 1.2, 1.1 % |
# | 512 | 19 | 6.5, 8.3 % | 2.1, 2.0 % | 1.8, 1.2 % |
#
# **Many classes.** With two classes a batch has most triplets (chapter 2, exercise 2), yet each step learns about one pair of
# digits, and 19 such steps leave the network where it was untrained. With thousands of classes a batch cannot hold all; then K
# is kept small, at least 2 and often 4, so that P can be large.
#
# **The batch** trades triplets in a step for steps in an epoch. Here, with few images, steps win. Whether they still do in two
# epochs of 60 000 this table cannot tell. Batches of 512 make 236 steps of that, enough for 99.5 %.
# %% [markdown]
# ## One image at a time
#
# In use, images come one by one. Does a network that was trained on batches of 512, with batch statistics inside, give the
# same answer then? In evaluation mode it must, since each row is computed for itself. Test all 10 000 images at batch size 1.

# %% tags=["nbval-ignore-output"]
start = time.perf_counter()
one_by_one = embed(network, test_images, batch_size=1)
print(f"{(time.perf_counter() - start) / len(test_images) * 1e3:.2f} ms an image")

# %%
classifier = KNNClassifier(gallery, labels, k=10)
alone = torch.cat([classifier.predict(row[None]) for row in one_by_one[:1000]])
together = classifier.predict(queries[:1000])
print("same label alone and in a batch:", int((alone == together).sum()), "of", len(alone))
torch.testing.assert_close(one_by_one, queries, atol=1e-5, rtol=0)
assert torch.equal(alone, together)

# %% [markdown]
# And an image that is in no data set? Draw one: two strokes with a soft pen, scaled as MNIST's pixels are (mean 0.1307,
# standard deviation 0.3081 of ink from 0 to 1). Embed it, ask the classifier.


# %% alt="A seven drawn from two straight strokes, and the five training images nearest to it: five handwritten sevens."
def stroke(start, end):
    rows, columns = torch.meshgrid(torch.arange(28.0), torch.arange(28.0), indexing="ij")
    t = torch.linspace(0, 1, 50)[:, None]
    line = (1 - t) * torch.tensor(start) + t * torch.tensor(end)
    squared = (rows[..., None] - line[:, 0]) ** 2 + (columns[..., None] - line[:, 1]) ** 2
    return (-squared.amin(dim=2) / 2.2).exp()


ink = torch.maximum(stroke((7.0, 8.0), (7.0, 19.0)), stroke((7.0, 19.0), (21.0, 12.0)))
drawn = ((ink - 0.1307) / 0.3081)[None, None]
point = embed(network, drawn)
nearest = pairwise_distances(point, gallery)[0].topk(5, largest=False).indices
show_images(torch.cat([drawn, images[nearest]]), ["drawn"] + ["training"] * 5, size=1.2)
plt.show()
print("it is a", classifier.predict(point).item())
assert classifier.predict(point).item() == 7

# %% [markdown]
# ## Stop and go on
#
# A laptop lid closes in the middle of a training. With `checkpoint=`, `fit` writes all that changes (weights, optimisers,
# schedule, history) to a file after each epoch. Called again with the same file, it goes on from there. Provoke it: stop in
# the second epoch, start again with a new network, and compare with a run that was never stopped.


# %%
def small_run(**options):
    torch.manual_seed(0)
    net = EmbeddingNet()
    fit(net, images[:1024], labels[:1024], batch_size=256, seed=0, progress=False, **options)
    return net


def close_the_lid(so_far):
    if len(so_far) == 6:
        raise KeyboardInterrupt


with TemporaryDirectory() as folder:
    file = Path(folder) / "run.pt"
    try:
        small_run(checkpoint=file, callback=close_the_lid)
    except KeyboardInterrupt:
        print("stopped at step 6 of 8")
    steps_left = []
    resumed = small_run(checkpoint=file, callback=lambda so_far: steps_left.append(len(so_far)))
print("went on with steps", steps_left)
whole = small_run().state_dict()
for name, weights in resumed.state_dict().items():
    torch.testing.assert_close(weights, whole[name])
print("same weights as without a break:", len(whole), "tensors")

# %% [markdown]
# The resumed run went back to the end of the first epoch, repeated steps 5 and 6, and ended at the same weights, because order
# and jitter of an epoch depend only on the seed and the number of the epoch.

# %% [markdown]
# ## When it goes wrong: collapse
#
# "Learn from the hardest": for each anchor take only its farthest positive and nearest negative (**batch-hard**, chapter 2). It
# sounds efficient. Train so for one epoch of 10 000 images, and beside it the same with all triplets.

# %%
subset, subset_labels = images[:10_000], labels[:10_000]
held_back, held_back_labels = images[10_000:15_000], labels[10_000:15_000]


def train(loss, **options):
    torch.manual_seed(0)
    net = EmbeddingNet()
    options = {"epochs": 1, "seed": 0, "progress": False} | options
    return net, fit(net, subset, subset_labels, loss=loss, **options)


runs = {"hardest": train(TripletLoss(mining="hard")), "all": train(TripletLoss(mining="all"))}

# %% alt="Loss, active fraction and spread over 20 steps. Both losses come to 0.2. With the hardest triplets the active fraction rises to one and the spread falls to 0.05; with all triplets the fraction falls to 0.04 and the spread stays near 0.7." tags=["nbval-ignore-output"]
figure, axes = plt.subplots(1, 3, figsize=(12, 3.6))
looks = {"hardest": ("--", DIFFERENT), "all": ("-", SAME)}
for column, ax in zip(("loss", "active", "spread"), axes, strict=True):
    for name, (line, color) in looks.items():
        ax.plot(runs[name][1][column], line, color=color, lw=2)
    ax.set(xlabel="step", ylim=(0, None))
axes[0].set(title="Both losses near the margin, 0.2", ylabel="mean loss (squared distances)")
axes[1].set(title="All triplets active, or hardly one", ylabel="fraction of valid triplets")
axes[2].set(title="One spot, or a space in use", ylabel="spread of the embeddings")
for ax, hard_at, all_at in zip(
    axes, ((3, 0.7), (8, 0.93), (9, 0.12)), ((0, 0.1), (8, 0.12), (9, 0.6)), strict=True
):
    ax.annotate("hardest triplets", hard_at, color=DIFFERENT)
    ax.annotate("all triplets", all_at, color=SAME)
    ax.xaxis.get_major_locator().set_params(integer=True)
plt.show()
for name, (_, told) in runs.items():
    end = told.frame().iloc[-10:].mean()
    print(
        f"{name:<8} loss {end['loss']:.3f}, active {end['active']:.3f}, spread {end['spread']:.3f}"
    )
collapsed, learnt = (runs[name][1].frame().iloc[-10:].mean() for name in looks)
assert abs(collapsed["loss"] - 0.2) < 0.02
assert collapsed["active"] > 0.95 > 0.1 > learnt["active"]
assert collapsed["spread"] < 0.1 < 0.5 < learnt["spread"]

# %% [markdown]
# The left panel is a trap: both losses hover about 0.2, and only one network learns. What tells them apart are the other two
# panels. In a **collapse** the active fraction is *one*, and the spread (how far the embeddings lie from their centre) goes
# towards *zero*: all digits are sent to nearly the same spot, and every triplet costs max(0, 0 − 0 + margin) = margin.
#
# Why? See what batch-hard sees at the start, with random weights: how many anchors have their nearest negative *closer* than
# their farthest positive, and by how much, in batches of ten classes and K images of each.

# %% tags=["nbval-ignore-output"]
torch.manual_seed(0)
blank, gaps = EmbeddingNet(), {}
for K in (51, 16, 4, 2):
    draw = torch.Generator().manual_seed(0)
    places = next(iter(BalancedBatchSampler(labels, 10, K, generator=draw)))
    with torch.no_grad():
        d = pairwise_distances(deepcopy(blank)(images[places]), squared=True)
    alike = labels[places][:, None] == labels[places]
    gaps[K] = d.masked_fill(~alike, 0).amax(dim=1) - d.masked_fill(alike, torch.inf).amin(dim=1)
    print(f"K = {K:<2}: {float((gaps[K] > 0).float().mean()):>4.0%} of the anchors", end=", ")
    print(f"mean gap of squared distances {float(gaps[K].mean()):.2f}")
assert (gaps[51] > 0).float().mean() > 0.98
assert gaps[51].mean() > 1.5 * gaps[4].mean()

# %% [markdown]
# With 51 images of each class it is so for *every* anchor, by 0.87 on average. As long as the mean gap is positive, shrinking
# pays: when all are active the mean loss is gap + margin, and distances ten times smaller make the gap ten times smaller, with
# nothing learnt about digits. Only when the order is right on average, the gap negative and the loss *below* the margin, does
# growing pay. With few images of a class, the hardest of them are milder: 0.44 with four.
#
# On the spot comes another difficulty: the gradient of a square vanishes where the distance does (chapter 2). Put six
# embeddings almost on one spot, and measure the gradient of batch-hard.

# %%
torch.manual_seed(0)
spot = F.normalize(torch.ones(6, 64)) + 1e-4 * torch.randn(6, 64)
pushes = {}
for squared in (True, False):
    near_spot = spot.clone().requires_grad_()
    loss = TripletLoss(mining="hard", squared=squared)(near_spot, torch.arange(6) // 2)
    loss.backward()
    pushes[squared] = float(near_spot.grad.norm(dim=1).mean())
    words = "squared" if squared else "not squared"
    print(f"{words:<12} loss {loss:.3f}, mean gradient of an embedding {pushes[squared]:.4f}")
assert pushes[True] < 0.01 < 0.1 < pushes[False]

# %% [markdown]
# Plain gradient descent would stand still there. Muon and AdamW rescale small gradients, so the network still moves and, as the
# next section shows, can even learn there.
#
# ## What prevents it
#
# Hermans, Beyer and Leibe (2017), who recommend batch-hard, train otherwise. Their distance is *not squared*, because they saw
# more collapses with the square. Their margin is *soft*: log(1 + exp(x)) with x = d(a, p) − d(a, n) instead of max(0, x + m),
# which never stops pulling. Their learning rate is low. And their batches are P × K with K = 4.
#
# Try each on the same 10 000 images for one epoch, first one change at a time (the soft margin on top of the plain distance, as
# there), then all of them but the rate. Batches of 10 × 4 make 250 steps of an epoch, not 20, so batch-all gets the same
# batches as well.

# %%
four_each = {"batch_sampler": BalancedBatchSampler(subset_labels, 10, 4)}
hardest, plain = TripletLoss(mining="hard"), TripletLoss(mining="hard", squared=False)
soft = TripletLoss(0.0, mining="hard", squared=False, soft=True)
runs |= {
    "a tenth of the rate": train(hardest, learning_rate=4e-4),
    "not squared": train(plain),
    "not squared, soft": train(soft),
    "10 × 4": train(hardest, **four_each),
    "10 × 4, not squared, soft": train(soft, **four_each),
    "all, 10 × 4": train(TripletLoss(), **four_each),
}

# %%
contenders = {"pixels": nn.Flatten(), "untrained": blank}
contenders |= {name: net for name, (net, _) in runs.items()}
wrong = {}
for name, view in contenders.items():
    known, asked = embed(view, subset), embed(view, held_back)
    wrong[name] = KNNClassifier(known, subset_labels).predict(asked) != held_back_labels

# %% tags=["nbval-ignore-output"]
errors = {name: float(of.float().mean()) for name, of in wrong.items()}
last_ones = {name: told.frame().iloc[-5:].mean() for name, (_, told) in runs.items()}
ends = {name: float(told["spread"]) for name, told in last_ones.items()}


def right_alone(one, other):
    counts = [int((wrong[b] & ~wrong[a]).sum()) for a, b in ((one, other), (other, one))]
    return f"{counts[0]} : {counts[1]} (p = {binomtest(counts[0], sum(counts)).pvalue:.1g})"


for name in errors:
    print(f"{name:<26} error {errors[name]:>6.2%}", end="")
    print(f", spread {ends[name]:.2f}, loss {last_ones[name]['loss']:.2f}" if name in ends else "")
small = ("10 × 4", "10 × 4, not squared, soft")
print("right alone:")
for one, other in (
    *(("hardest", rival) for rival in ("untrained", "pixels", "all")),
    *(("all, 10 × 4", rival) for rival in (*small, "all")),
):
    print(f"{one + ' : ' + other:<40}{right_alone(one, other)}")
assert abs(errors["hardest"] - errors["untrained"]) < 0.02
assert max(ends[name] for name in ("hardest", "not squared", "not squared, soft")) < 0.2
assert min(ends[name] for name in (*small, "all", "all, 10 × 4")) > 0.5
assert max(errors[name] for name in (*small, "all", "all, 10 × 4")) < 0.02
assert min(errors["not squared"], errors["not squared, soft"]) > 0.025

# %% alt="Left, spread over the epoch: batch-hard in batches of 512 falls towards zero and stays, squared or not; in batches of 10 x 4 it ends high. Right, bars of the kNN error: pixels 6.8, untrained 7.3, batch-hard in batches of 512 from 4.4 to 10.7, in batches of 10 x 4 1.2, batch-all 1.5 and 1.2 percent." tags=["nbval-ignore-output"]
figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.4), width_ratios=(1, 1.15))
courses = {"hardest": ("--", DIFFERENT), "not squared": (":", PALETTE[4])}
courses |= {"10 × 4": ("-", PALETTE[2]), "10 × 4, not squared, soft": ("-.", PALETTE[5])}
for name, (line, color) in courses.items():
    course = runs[name][1]["spread"]
    left.plot([i / (len(course) - 1) for i in range(len(course))], course, line, color=color, lw=2)
    words = {"hardest": "512, squared", "not squared": "512, not squared"}.get(name, name)
    place = {"textcoords": "offset points", "ha": "right"}
    lift = -15 if name in ("hardest", "10 × 4") else 6
    left.annotate(words, (1, course[-1]), (0, lift), color=color, **place)
left.set(title="Batch-hard ends apart only in batches of 10 × 4", xlabel="part of the epoch")
left.set(ylabel="spread of the embeddings", ylim=(-0.05, 1.15))
names = {"hardest": "batch-hard, squared, 512", "all": "batch-all, squared, 512"}
names |= {"all, 10 × 4": "… 10 × 4"}
order = ["pixels", "untrained", *(name for name in runs if "all" not in name), "all", "all, 10 × 4"]
bars = right.barh(
    range(10),
    [100 * errors[name] for name in order],
    color=["lightgrey"] * 2 + [DIFFERENT] * 6 + [SAME] * 2,
)
right.set_yticks(range(10), [names.get(n, f"… {n}" if n in runs else n) for n in order])
right.bar_label(bars, [f"{errors[name]:.1%}" for name in order], padding=4)
right.invert_yaxis()
right.set(title="Smaller batches mend batch-hard", xlim=(0, 13))
right.set_xlabel("kNN error on 5 000 images held back (%)")
plt.show()

# %% [markdown]
# From random weights and at the full rate, batch-hard in batches of 512 ends on a spot, whatever the distance or the margin, and
# its loss ends above the margin (above log 2 = 0.69 for the soft one). A tenth of the rate only slows the fall: the spread is 0.26
# when the rate has run out, every triplet is active, and the error of 11 % is the worst of all. *Not squared* it learns on the spot
# nevertheless: 4.5 % after these 20 steps and 1.1 % after 100, at a spread of 0.02; the squared one then has 5.2 % (`settings.py`
# prints both). The order becomes right among near neighbours, which is all that kNN asks; between the farthest positive and the
# nearest negative it does not, and the loss stays above the margin.
#
# Why does batch-all not collapse, whose loss of 0.28 began above the margin, too? That is the mean over active triplets. Its
# gradient has the direction of the mean over *all* triplets (chapter [2](02_triplets.ipynb)), which began at 0.60 × 0.28 = 0.17:
# on a spot that would rise to 0.2.
#
# What prevents the collapse are the small batches. There too the squared loss first shrinks the space, to a spread of 0.10, but
# then it climbs out. More steps alone do not help: after 100 steps of 512 images the spread is 0.02 with either distance, and
# the small batches were on their way out by then.

# %% [markdown]
# And the comparison? In batches of 10 × 4, with the distance not squared and a soft margin, batch-hard has 1.2 % errors, and
# so has batch-all on the same batches; images that only one of the two gets right are 23 for batch-all and 26 for batch-hard,
# which decides nothing (p = 0.8). So, with its inventors' batches, batch-hard works. Here it was not better than batch-all, and
# it needed those batches, where batch-all worked in either. That is one data set, one seed and one short epoch. On people's
# photographs, with many classes and few images of each, Hermans and others found batch-hard the better one.
#
# Mind how a collapse hides: 7.4 % errors look like a network that has learnt something. But the untrained one has 7.3 % and
# pixels 6.8 %, and from neither can it be told apart (190 : 198 and 159 : 193). The tiny differences left on the spot are
# enough for kNN, which does not mind scale. Spread and active fraction tell that a space has collapsed; whether something was
# learnt all the same, as without the square, only the baselines tell.

# %% [markdown]
# ## Exercises
#
# Try each before you unfold its solution (click the bar or the three dots) and its answer.

# %% [markdown]
# **1.** The collapse began at random weights. Take the network of this chapter, trained with all triplets, and go on with
# batch-hard as it was when it collapsed: squared, batches of 512, full learning rate, one epoch of the 10 000. Does it
# collapse? Why, or why not?

# %%
# Your attempt

# %% jupyter={"source_hidden": true} tags=["hide-input"]
# Solution 1
warm = deepcopy(network)
warm_history = fit(
    *(warm, subset, subset_labels),
    loss=TripletLoss(mining="hard"),
    epochs=1,
    seed=0,
    progress=False,
)
assert warm_history["spread"].min() > 0.5
assert warm_history["loss"][0] < 0.2

# %% [markdown]
# <details><summary>Answer 1</summary>
#
# It does not. The spread goes from 0.80 to 0.63 and stays there. The first loss is 0.14, below the margin: on average even the
# nearest negative is farther than the farthest positive, so that shrinking everything to a spot would *raise* the loss to 0.2.
# At random weights the loss was 1.17, and the spot was a way down.
#
# </details>

# %% [markdown]
# **2.** Any loss that takes (embeddings, labels) can be trained. Write one: cross-entropy over minus ten times the squared
# distances to the other images of the batch, where every image of the same class counts as right (*neighbourhood components
# analysis*, NCA, Goldberger et al. 2004). Train it on the 10 000 images. Is it better than all triplets?

# %%
# Your attempt


# %% jupyter={"source_hidden": true} tags=["hide-input"]
# Solution 2
def nca_loss(embeddings, labels):
    itself = torch.eye(len(labels), dtype=torch.bool)
    closeness = -10 * pairwise_distances(embeddings, squared=True)
    closeness = closeness.masked_fill(itself, -torch.inf)
    right = (labels[:, None] == labels) & ~itself
    share = closeness.masked_fill(~right, -torch.inf).logsumexp(1) - closeness.logsumexp(1)
    return -share[right.any(1)].mean()


nca_network, _ = train(nca_loss)
nca_known, nca_asked = embed(nca_network, subset), embed(nca_network, held_back)
wrong["nca"] = KNNClassifier(nca_known, subset_labels).predict(nca_asked) != held_back_labels
nca_alone = int((wrong["nca"] & ~wrong["all"]).sum()), int((wrong["all"] & ~wrong["nca"]).sum())
assert float(wrong["nca"].float().mean()) < 0.02

# %% [markdown]
# <details><summary>Answer 2</summary>
#
# It cannot be told apart from batch-all here: 1.8 % errors against 1.5 %, 43 images wrong with NCA alone and 30 with batch-all
# alone, which a fair coin exceeds in one case of six (p = 0.16). Other seeds and a chosen factor instead of ten may turn it
# either way.
#
# </details>

# %% [markdown]
# **3.** Batches of 64 instead of 512, for the same images: eight times as many steps. How many triplets are looked at in an
# epoch of MNIST with either? And why was batch-all in batches of 10 × 4 no worse than of 512 nevertheless?

# %%
# Your attempt


# %% jupyter={"source_hidden": true} tags=["hide-input"]
# Solution 3
def triplets_an_epoch(batch_size):
    order = torch.randperm(60_000, generator=torch.Generator().manual_seed(0))
    sizes = [labels[part].bincount(minlength=10) for part in order.split(batch_size)]
    return sum(int((count * (count - 1) * (count.sum() - count)).sum()) for count in sizes)


counts = {size: triplets_an_epoch(size) for size in (64, 128, 256, 512)}
assert 64 < counts[512] / counts[64] < 70

# %% [markdown]
# <details><summary>Answer 3</summary>
#
# 21 million in batches of 64 and 1 407 million in batches of 512, 67 times as many: eight times fewer batches, and each with
# about 8³ as many triplets. But smaller batches make more *steps*: above, 250 steps of 40 images did no worse than 20 steps of 512
# (1.2 % against 1.5 %, which only 45 : 30 images decide). More triplets make each step more exact; they do not make more of them.
#
# </details>

# %% [markdown]
# ## Check yourself
#
# Five questions. Decide before you unfold the answer.

# %% [markdown]
# **1.** The mean loss over active triplets stays at 0.2, the margin; the active fraction is 0.5 %. What is going on?
#
# a) a collapse · b) training goes well · c) learning has stopped, the rate is too low
#
# <details><summary>Answer</summary>
#
# **b.** Nearly all triplets are solved, and the mean is over the stubborn rest. *a* also shows a loss at the margin, but then
# every triplet is active and the spread is near zero. *c* looks at the loss alone, and it is no measure of progress.
#
# </details>

# %% [markdown]
# **2.** Two networks have 99.54 % and 99.48 % on the same 10 000 test images, and their intervals overlap. Which is better?
#
# a) they are equal, since the intervals overlap · b) the first, 99.54 is more than 99.48 · c) not known: count the images that
# only one gets right, and train with more seeds
#
# <details><summary>Answer</summary>
#
# **c.** Both saw the same images, so only those on which they differ tell, and another seed may change the order: 0.06 points
# is about one standard deviation over seeds. *a* takes "not shown to differ" for "equal". *b* takes any difference for a real
# one.
#
# </details>

# %% [markdown]
# **3.** You try five margins and keep the one with the best test accuracy. What is wrong with the number you then report?
#
# a) nothing, the test images were not trained on · b) it flatters: the test set took part in the choice · c) it is too low,
# because five margins are too few
#
# <details><summary>Answer</summary>
#
# **b.** The best of five is partly the luckiest of five on these very images. Choose on images held back from the training set
# and ask the test set once. *a* forgets that choosing is training, too. *c* would be a matter of how good the network is, not
# of whether the number is honest.
#
# </details>

# %% [markdown]
# **4.** A training with batch-hard on squared distances, in batches of 512 images of ten classes, has an active fraction of 1
# and a loss of 0.2 after ten steps. What do you try first?
#
# a) a tenth of the learning rate · b) batches with four images of each class, or all triplets · c) a larger margin
#
# <details><summary>Answer</summary>
#
# **b.** Both worked above. *a* only made the fall slower. *c* raises the loss on the spot, but not its gradient, which
# does not depend on the margin as long as every triplet is active.
#
# </details>

# %% [markdown]
# **5.** Which weights of `EmbeddingNet` does Muon train?
#
# a) all · b) all convolutions · c) the convolutions after the first
#
# <details><summary>Answer</summary>
#
# **c.** 571 392 of 622 496 weights, in four kernels. *b*: the first convolution sees pixels and is left to AdamW. *a*: so are
# the scales and offsets of batch normalisation, which are no matrices, and the last linear layer.
#
# </details>

# %% [markdown]
# ## Summary
#
# - A step: embed, loss, gradient, move. `fit` adds one cycle of the rate, Muon and AdamW, jitter, the history and checkpoints.
# - Read the loss beside the active fraction: the mean over unsolved triplets hardly falls.
# - Choose settings on images held back, two at a time: the rate first, then the margin; many classes in a batch.
# - Everything active, no spread, the loss at the margin: collapse. Batches with few images of a class, or all triplets, prevent it.
# - Two epochs on a CPU give more than 99.4 % on the test set, one image at a time as in batches; report interval, seeds and baselines.
#
# **Next:** [5 · Visualization](05_visualization.ipynb) looks at what the network has learnt.
#
# ## References
#
# E. Hoffer, N. Ailon, "Deep metric learning using Triplet network", [arXiv 1412.6622](https://arxiv.org/abs/1412.6622), 2014. ·
# F. Schroff, D. Kalenichenko, J. Philbin, "FaceNet: A unified embedding for face recognition and clustering", [arXiv
# 1503.03832](https://arxiv.org/abs/1503.03832), 2015 (margin 0.2, and the collapse on hardest negatives, section 3.2). · A.
# Hermans, L. Beyer, B. Leibe, "In defense of the triplet loss for person re-identification", [arXiv
# 1703.07737](https://arxiv.org/abs/1703.07737), 2017 (batch-hard and what keeps it from collapsing, sections 2 and 4). · L. N.
# Smith, N. Topin, "Super-convergence", [arXiv 1708.07120](https://arxiv.org/abs/1708.07120), 2018 (one cycle). · K. Jordan et
# al., "Muon: An optimizer for hidden layers in neural networks", [blog](https://kellerjordan.github.io/posts/muon/), 2024. · I.
# Loshchilov, F. Hutter, "Decoupled weight decay regularization", [arXiv 1711.05101](https://arxiv.org/abs/1711.05101), 2019
# (AdamW). · J. Goldberger, S. Roweis, G. Hinton, R. Salakhutdinov, "Neighbourhood components analysis", NIPS 2004.
