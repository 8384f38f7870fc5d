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
# # 7 · The paper: Hoffer and Ailon reproduced
#
# The paper that named the triplet network says that it learns a better representation than its rival, the **Siamese network**,
# and reports 99.54 % on MNIST. This chapter builds its network, loss and triplets, repeats the comparison on a small budget,
# and says how far each claim was reproduced.
#
# - **You will learn** to read a recipe closely enough to repeat it, what the paper's loss does to easy, semi-hard and hard
#   triplets, how to tell two causes apart with a 2 × 2 experiment, and how to report a budget.
# - **You need** chapters [2](02_triplets.ipynb) and [4](04_training.ipynb); no GPU.
# - **Running time** about 3 minutes on two cores; a longer run is a command, and its result is here.
# - Previous: [6 · Three ways](06_three_ways.ipynb) · Next: [8 · Image retrieval](08_image_retrieval.ipynb)

# %%
import itertools
import math

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from scipy.stats import binomtest
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from tripletlib import (
    DistanceRatioLoss,
    HofferAilonNet,
    KNNClassifier,
    TripletNet,
    batch_all_triplet_loss,
    draw_triplets,
    embed,
    load_mnist,
    mine_triplets,
    pairwise_distances,
)
from tripletlib.plotting import DIFFERENT, PALETTE, SAME, show_images, use_theme

use_theme()
all_images, all_labels = load_mnist("train")
held_back, held_labels = all_images[:1000], all_labels[:1000]
images, labels = all_images[5000:], all_labels[5000:]

# %% [markdown]
# Whatever is chosen here is chosen on training images held back: 5 000 are not trained on, and 1 000 of these draw the curves.
# The test images come in once, at the end.
#
# ## Which triplets?
#
# The 55 000 images make 1.5 · 10¹³ triplets, and nobody looks at all. The authors' code draws (`GenerateList` in `Data.lua`): a
# class for the anchor, each as likely as any other; two different images of it; then another class and one image of that. It
# draws 640 000, calls that an epoch, and draws anew for the next. `draw_triplets` does this.

# %%
sizes = labels.bincount()
possible = int((sizes * (sizes - 1) * (len(labels) - sizes)).sum())
first, second, third = draw_triplets(labels, 640_000, torch.Generator().manual_seed(0))
assert (labels[first] == labels[second]).all()
assert (first != second).all()
assert (labels[first] != labels[third]).all()
rarest = labels[first].bincount().min() / len(first)
print(f"{possible:.1e} triplets exist; an epoch draws {len(first):,}")
print(f"the rarest class is anchor in {rarest:.1%} of them")
assert rarest > 0.098

# %% alt="Ten columns of three digit images each. In each column the two upper images, anchor and positive, show one digit and the lowest, the negative, shows another, mostly one that looks quite different."
shown = torch.cat([column[:10] for column in (first, second, third)])
titles = ["anchor"] * 10 + ["positive"] * 10 + ["negative"] * 10
show_images(images[shown], titles, colors=["black"] * 10 + [SAME] * 10 + [DIFFERENT] * 10)
plt.show()

# %% [markdown]
# Read the columns: the two upper images are of one digit, the lowest is of another. A 0 beside another 0 and a 1, as in
# the second column, can teach little once zeros look alike to the network; a 4 beside a strange 4 and a 9 that looks like it (not
# among these ten) would teach more. Drawn at random, how often does the second kind come? Keep the question: it is measured below.
#
# ## Their network
#
# Four **convolutions** with ReLU; after each of the first three, **max pooling** by 2 and **dropout** of a quarter. No batch
# normalisation, no scaling to length one. Can it take MNIST's 28 × 28 pixels? A convolution of size k without padding makes a
# side n into n − k + 1, and pooling halves that.


# %%
def sides(side):
    path = [side]
    for kernel in (5, 3, 3):
        path += [path[-1] - kernel + 1, (path[-1] - kernel + 1) // 2]
    return path


for side in (28, 32):
    print(side, "pixels:", " → ".join(map(str, sides(side))), "→ 2 × 2 convolution")
assert (sides(28)[-1], sides(32)[-1]) == (1, 2)

# %% [markdown]
# From 28 pixels, one is left when the last convolution needs two: `Models/Model.lua` as published, which also wants three
# colour channels, cannot take MNIST. What was changed for MNIST is not in the repository. `HofferAilonNet` takes one channel,
# and **pads** 28 × 28 to 32 × 32 by repeating the border.

# %%
network = HofferAilonNet()
for layer in network.layers:
    if isinstance(layer, torch.nn.Conv2d):
        size = " × ".join(map(str, layer.kernel_size))
        print(f"{size} convolution: {layer.in_channels:3d} → {layer.out_channels} channels")
parameters = sum(weights.numel() for weights in network.parameters())
print(
    f"{parameters:,} parameters; an embedding has {embed(network, held_back[:5]).shape[1]} numbers"
)
assert parameters == 501_888

# %% [markdown]
# A "triplet network" is three copies of this, for anchor, positive and negative, with **one** set of weights (**weight
# sharing**; chapter [3](03_network.ipynb) draws the three towers). In PyTorch that is one network called three times;
# `TripletNet` does no more. The parameters are the same objects, not equal ones. So one call on all images of a batch gives the
# same points (with dropout off, as here; with it, each call draws anew), and one call is what the training below makes.

# %%
triplet_net = TripletNet(network.eval())
some = [column[:4] for column in (first, second, third)]
towers = triplet_net(*(images[column] for column in some))
at_once = network(images[torch.cat(some)]).chunk(3)
for tower, part in zip(towers, at_once, strict=True):
    torch.testing.assert_close(tower, part, atol=1e-4, rtol=1e-4)
shared = {id(w) for w in triplet_net.parameters()} == {id(w) for w in network.parameters()}
print("three towers equal one call:", [tuple(tower.shape) for tower in towers])
print("the same parameters:", shared)
assert shared

# %% [markdown]
# ## Their loss, by hand
#
# Take one triplet in the plane: anchor (0, 0), positive (3, 4), negative (0, 4). The distances, not squared, are d⁺ = 5 and d⁻
# = 4: the negative is nearer, so the triplet is wrong. A **softmax** makes two shares of them, s⁺ = exp(d⁺) / (exp(d⁺) +
# exp(d⁻)) and s⁻ = 1 − s⁺. Only the difference u = d⁺ − d⁻ counts: s⁺ is the **sigmoid** σ(u).

# %%
one = torch.tensor([[0.0, 0.0]]), torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 4.0]])
near, far = 5.0, 4.0
share = math.exp(near) / (math.exp(near) + math.exp(far))
print(f"s⁺ = {share:.4f}, loss (s⁺)² = {share**2:.4f}")
assert math.isclose(share, 1 / (1 + math.exp(-(near - far))))
torch.testing.assert_close(DistanceRatioLoss()(*one), torch.tensor(share**2))

# %% [markdown]
# The target is (s⁺, s⁻) = (0, 1), and the error is squared: (s⁺)² + (1 − s⁻)². Because the shares add to one, the two terms are
# equal, and the sum is **twice** (s⁺)². Does the learning rate then mean something else? Not in the authors' code:
# `DistanceRatioCriterion.lua` hands the shares to Torch's `MSECriterion`, which takes the *mean* of the two, and that is (s⁺)²
# again.

# %%
both = torch.tensor([near, far]).softmax(dim=0)
wanted = torch.tensor([0.0, 1.0])
as_sum, as_mean = (F.mse_loss(both, wanted, reduction=how) for how in ("sum", "mean"))
print(f"sum of the two {as_sum:.4f}, mean {as_mean:.4f}")
torch.testing.assert_close(as_sum, torch.tensor(2 * share**2))
torch.testing.assert_close(as_mean, DistanceRatioLoss()(*one))

# %% [markdown]
# ## What a triplet may say
#
# How strongly a triplet moves the points is the **gradient** of its loss with respect to u. By the chain rule d(s²)/du = 2s ·
# ds/du, and the sigmoid has ds/du = s(1 − s). Together: **2s²(1 − s)**. The step that lowers the loss pulls the positive along
# the line to the anchor with just this force, and pushes the negative away with the same. Autograd agrees.

# %%
weight = 2 * share**2 * (1 - share)
moving = [point.clone().requires_grad_() for point in one]
DistanceRatioLoss()(*moving).backward()
print(f"2s²(1 − s) = {weight:.4f}; gradient at the positive", moving[1].grad.numpy().round(4))
torch.testing.assert_close(moving[1].grad, weight * torch.tensor([[0.6, 0.8]]))
torch.testing.assert_close(moving[2].grad, -weight * torch.tensor([[0.0, 1.0]]))


# %%
def ratio_weight(u):
    s = torch.sigmoid(u)
    return 2 * s.square() * (1 - s)


def hinge_weight(u):
    return (u + 1 > 0).to(u.dtype)


at = torch.linspace(-8, 8, 1601, requires_grad=True)
torch.sigmoid(at).square().sum().backward()
torch.testing.assert_close(ratio_weight(at.detach()), at.grad)
peak = at.detach()[at.grad.argmax()]
print(
    f"steepest at u = {peak:.2f}: {at.grad.max():.4f} (ln 2 = {math.log(2):.2f}, 8/27 = {8 / 27:.4f})"
)
for u in (-8.0, 0.0, 8.0):
    print(f"u = {u:2.0f}: gradient {ratio_weight(torch.tensor(u)):.5f}")
assert abs(peak - math.log(2)) < 0.02
assert ratio_weight(torch.tensor(8.0)) < 0.01 * 8 / 27

# %% alt="Two curves over u from right by far to wrong by far. Left: the paper's loss levels off at 1 while the hinge keeps rising. Right: the gradient of the paper's loss is a hill around u = 0.7 that falls to zero on both sides; the hinge's is 0 below -1 and 1 above."
grid = at.detach()
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8))
left.plot(grid, torch.sigmoid(grid).square(), color=PALETTE[2])
left.plot(grid, (grid + 1).clamp(min=0), color=PALETTE[7], linestyle="--")
left.set(title="The paper's loss is bounded", ylabel="loss of a triplet", ylim=(0, 3))
left.text(4, 1.08, "paper: (s⁺)²", color=PALETTE[2])
left.text(-5.4, 2.1, "hinge, margin 1", color="dimgrey")
right.plot(grid, ratio_weight(grid), color=PALETTE[2])
right.plot(grid, hinge_weight(grid), color=PALETTE[7], linestyle="--")
right.set(title="The hardest triplets get almost no gradient", ylabel="gradient with respect to u")
right.text(-0.7, 0.9, "hinge", color="dimgrey")
right.text(2.6, 0.2, "paper", color=PALETTE[2])
right.text(-7.8, 0.06, "right by far")
right.text(4.4, 0.06, "wrong by far")
for ax in (left, right):
    ax.set_xlabel("u = d⁺ − d⁻")
plt.show()

# %% [markdown]
# A triplet that is right by far has a small s, and its gradient dies like 2e²ᵘ. That is wanted. On the other side a triplet is
# wrong by far, s is nearly one, and 1 − s makes the gradient die too. It is largest where s = 2/3, that is u = ln 2: slightly
# wrong triplets. A **hinge** on the same distances, max(0, u + 1), gives every active triplet the same weight. (Chapter 2's
# hinge is on *squared* distances with margin 0.2; these are not squared, and the margin is 1.)
#
# Is that a fault? It is a choice. A triplet may be wrong by far because of a wrong label, and this loss leaves it nearly alone,
# while a hinge pulls at it with full force. (Not every triplet of a mislabelled image is wrong by far: where the negative is of a
# third class, u is near zero, and the pull is strong.) But a network that has something badly wrong is told almost nothing about
# it either.

# %% [markdown]
# ## One recipe, three versions
#
# The paper's text, the authors' code (github.com/eladhoffer/TripletNet) and this book do not say the same. For this edition the
# code's files were read, and of the paper only the abstract and the beginning of section 1 could be: entries with † are
# second-hand, from notes on its section 4, and a dash means that nothing was found.
#
# | | Paper's text | Authors' code | Here |
# | :-- | :-- | :-- | :-- |
# | Network | — | `Models/Model.lua`: filters of 5, 3, 3, 2; 64, 128, 256, 128 channels; three channels in | the same, one channel in |
# | Image size on MNIST | — | 28 × 28 (`Data.lua`), which that network cannot take | padded to 32 × 32 |
# | Dropout | 0.5 † | 0.25 | 0.25 |
# | Loss | (s⁺)² + (1 − s⁻)² † | the mean of both (`DistanceRatioCriterion.lua`) | (s⁺)², which is equal |
# | Distance | Euclidean † | Euclidean, not squared (`TripletNet.lua`) | the same |
# | Optimiser | SGD † | SGD, momentum 0.9, weight decay 10⁻⁴ (`Main.lua`) | the same |
# | Weight decay | — | beside the momentum (`sgd.lua` at 0369e3b) | inside the momentum, as PyTorch does |
# | Dampening of new gradients | — | 0.9, the library's default (torch/optim, `sgd.lua`) | none |
# | Learning rate | 0.5 † | 0.1 | 0.03; longer run 0.1 |
# | Decay of the rate | yes † | 0.1 / (1 + 10⁻⁶ · batches); the README says none | none |
# | Batch | — | 128 triplets | 32 triplets; longer run 128 |
# | Triplets an epoch | 640 000 † | 640 000, drawn anew each time | 3 072 in all; longer run 640 000 |
# | Epochs | 10 to 30 † | no end until stopped | less than one; longer run one |
# | Augmentation | none † | off, a switch | none |
# | Inputs | — | one mean and one standard deviation for all pixels (`Data.lua`) | the same |
# | Accuracy measured by | linear classifier on the embedding † | not in the repository: it prints the triplet error | linear classifier, and kNN |
# | Accuracy on MNIST | 99.54 ± 0.08 % † | not in the repository | below |

# %% [markdown]
# (Code: `Main.lua` and `TripletNet.lua` at commit aa0add0, `DistanceRatioCriterion.lua` at 87eaa3f, the rest at a4d93b3.)
#
# How much is that decay? `Main.lua` calls its unit samples, but the library counts calls, and a call is a batch. The other rows
# with a difference that can matter are rate, dampening and batch, because together they set how far a step goes; one of the
# failures below is about them.

# %%
batches = 640_000 // 128
after_epoch, after_thirty = (0.1 / (1 + 1e-6 * epochs * batches) for epochs in (1, 30))
print(f"rate after one epoch {after_epoch:.4f}, after thirty {after_thirty:.4f}")
assert 0.08 < after_thirty < after_epoch

# %% [markdown]
# ## Training it
#
# A step costs what its images cost, so each run sees 9 216 images: 96 batches of 32 triplets. The rate is 0.03; the section on
# the Siamese network shows what it was chosen from. A seed gives the first weights *and* the triplets, so that two runs with
# one seed differ only in what is compared. Measured is what the authors print after each epoch: the **triplet error**, the
# fraction of triplets not seen in training whose negative is as near as the positive or nearer. For the pixels, without any
# network, it is 24.5 %.

# %%
held_triplets = draw_triplets(held_labels, 20_000, torch.Generator().manual_seed(1))


def gaps(embedded, drawn=held_triplets):
    anchor, positive, negative = (embedded[column] for column in drawn)
    return (anchor - positive).norm(dim=1) - (anchor - negative).norm(dim=1)


def wrong(u):
    return float((u >= 0).float().mean())


pixel_error = wrong(gaps(held_back.flatten(1)))
print(f"triplet error of the pixels: {pixel_error:.1%}")


# %%
def train(loss_of, seed=0, rate=0.03, steps=96, watch=None, **settings):
    torch.manual_seed(seed)
    network, curve = HofferAilonNet(), []
    recipe = {"lr": rate, "momentum": 0.9, "weight_decay": 1e-4, **settings}
    optimizer = torch.optim.SGD(network.parameters(), **recipe)
    drawn = draw_triplets(labels, 32 * steps, torch.Generator().manual_seed(100 + seed))
    for step, batch in enumerate(zip(*(column.split(32) for column in drawn), strict=True)):
        if watch and step % 16 == 0:
            curve.append(watch(network, step))
        batch = torch.cat(batch)
        loss = loss_of(network(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return (network, pd.DataFrame([*curve, watch(network, steps)])) if watch else network


# %% [markdown]
# The loss of a batch gets the 96 points, anchors first, then positives, then negatives. Beside loss and error, the curve holds
# the **effective dimension** of the embedding: with λ the variances along its principal axes, (Σλ)² / Σλ² (*participation
# ratio*). It is 1 if all points lie on a line, and d if they spread equally along d axes. The column "whitened" is the triplet
# error of the same points after **whitening**: of their ten largest principal axes, each is scaled to the same spread.


# %%
def drawn_gaps(points, kinds):
    anchor, positive, negative = points.chunk(3)
    return (anchor - positive).norm(dim=1) - (anchor - negative).norm(dim=1)


def ratio(u):
    return torch.sigmoid(u).square().mean()


def watch(network, step):
    points = embed(network, held_back)
    centred = points - points.mean(dim=0)
    axes, sizes, _ = torch.linalg.svd(centred, full_matrices=False)
    u, spread = gaps(points), sizes.square()
    return {
        "images": 96 * step,
        "loss": float(ratio(u)),
        "error": wrong(u),
        "whitened": wrong(gaps(axes[:, :10])),
        "dimension": float(spread.sum() ** 2 / spread.square().sum()),
    }


torch.testing.assert_close(ratio(drawn_gaps(torch.cat(one), None)), DistanceRatioLoss()(*one))


# %% tags=["nbval-ignore-output"]
def paper_loss(points, kinds):
    return ratio(drawn_gaps(points, kinds))


paper_network, paper_curve = train(paper_loss, watch=watch)
print(paper_curve.round(3).to_string(index=False))
assert abs(paper_curve["loss"].iloc[0] - 0.25) < 0.05
assert paper_curve["error"].iloc[-1] < 0.6 * paper_curve["error"].iloc[0]


# %% alt="Three curves over images seen. The loss falls from just under a quarter. The triplet error first rises from 23 to 25 percent and then falls to 11. The effective dimension drops from 16 to below 3 at once and stays low."
def draw_curves(curves, figsize=(12, 3.4)):
    _, axes = plt.subplots(1, 3, figsize=figsize)
    quantities = {
        "loss": "mean (s⁺)²",
        "error": "triplet error",
        "dimension": "effective dimension",
    }
    for ax, (quantity, name) in zip(axes, quantities.items(), strict=True):
        for (label, curve), (marker, color) in zip(
            curves.items(), (("o", PALETTE[2]), ("s", PALETTE[1])), strict=False
        ):
            ax.plot(curve["images"] / 1000, curve[quantity], marker=marker, color=color)
            if len(curves) > 1 and quantity == "error":
                ax.plot([], [], marker=marker, color=color, label=label)
                ax.legend(fontsize=9)
        ax.set(xlabel="images seen (thousands)", ylabel=name + ", held back", ylim=(0, None))
    axes[1].yaxis.set_major_formatter("{x:.0%}")
    return axes


for ax, title in zip(
    draw_curves({"paper": paper_curve}),
    ("The loss falls from the start", "The error rises first", "Two dimensions hold the spread"),
    strict=True,
):
    ax.set_title(title)
plt.show()

# %% [markdown]
# A fresh network puts everything close together: u ≈ 0, s ≈ ½, so the loss begins near σ(0)² = ¼. Why does the error *rise*,
# from 22.8 to 25.1 %, while the loss falls? For small u the loss is about ¼ + u/4: only the *mean* of u counts, not how many u
# have the right sign. Training lowers the mean by stretching the points along very few axes (effective dimension from 16.4 to
# 2.8, then 1.7), and these then dominate the distances. The column "whitened" shows that it is the lengths of the axes that spoil
# the order: with the ten largest axes scaled to one spread, the error falls at once, from 24.7 to 19.8 %. Once |u| is of
# order 1, the gradient of wrong triplets is larger than that of right ones, and the error falls too.

# %% tags=["nbval-ignore-output"]
start, bottom = paper_curve.iloc[0], paper_curve.iloc[1:5].mean()
print(f"images 0: error {start['error']:.1%}, dimension {start['dimension']:.1f}")
print(f"images 1 536 to 6 144: dimension {bottom['dimension']:.1f} on average")
print(f"{96 * 96:,} images are {96 * 96 / (3 * 640_000):.2%} of an epoch of the paper")
assert bottom["dimension"] < 0.4 * start["dimension"]
assert paper_curve["error"].iloc[1:3].max() > 0.9 * start["error"]
assert paper_curve["whitened"].iloc[2] < start["whitened"]

# %% [markdown]
# ## Where the triplets lie
#
# Now the question kept from above. Draw 20 000 random triplets of held-back images and look at u before and after training, on
# one scale, under the gradient that the loss gives at each u. (The outermost bars hold what lies farther out.)

# %% alt="Three stacked panels over u from -10 to 8. Top: the gradient, a hill around u = 0.7. Middle: before training all triplets lie in two bars at zero, under the hill. Bottom: after training they spread from about -10 to 4, most of them left of the hill."
torch.manual_seed(0)
before, after = (gaps(embed(net, held_back)) for net in (HofferAilonNet(), paper_network))
figure, axes = plt.subplots(3, 1, figsize=(9, 5.4), sharex=True, height_ratios=(1, 1.4, 1.4))
wide = torch.linspace(-10, 8, 361)
axes[0].plot(wide, ratio_weight(wide), color=PALETTE[2])
axes[0].set(title="Training moves most triplets away from the gradient", ylabel="gradient")
for ax, u, when in zip(axes[1:], (before, after), ("before", "after"), strict=True):
    heights = np.histogram(u.clamp(-10, 8), bins=np.arange(-10, 8.5, 0.5))[0] / len(u)
    ax.bar(np.arange(-9.75, 8, 0.5), heights, width=0.5, color=PALETTE[7])
    ax.set_ylabel("of triplets")
    ax.text(-9.8, 0.8 * heights.max(), f"{when} training")
    ax.yaxis.set_major_formatter("{x:.0%}")
for ax in axes:
    ax.axvline(0, color="black", linestyle=":")
axes[2].set_xlabel("u = d⁺ − d⁻ (left of the dots right, from the dots on wrong)")
plt.show()

# %% tags=["nbval-ignore-output"]
silent = float((ratio_weight(after) < 0.01 * 8 / 27).float().mean())
heard = float((ratio_weight(before) > 0.5 * 8 / 27).float().mean())
print(f"before: {heard:.1%} of random triplets have more than half of the largest gradient")
print(f"after: {silent:.0%} have less than a hundredth of it")
assert heard > 0.99
assert silent > 0.2

# %% [markdown]
# Nearly half of the triplets (45 %) now get less than a hundredth of the largest gradient: they were embedded, three images
# each, for almost nothing. Before training none did. That is how random triplets waste work once the network has learned
# something.
#
# And the hardest? Here are ten of the most wrong, with u and the gradient they get: rows are anchor, positive, negative, and
# each negative is shown once.

# %% alt="Ten columns of digit images, anchor above, positive in the middle, negative below: ten of the most wrong triplets, with u from 7.8 to 5.3. The gradients written above the positives are between 0.001 and 0.010, a thirtieth of the largest or less." tags=["nbval-ignore-output"]
worst = after.topk(300).indices
_, firsts = np.unique(held_triplets[2][worst], return_index=True)
worst = worst[np.sort(firsts)[:10]]
shown = torch.cat([column[worst] for column in held_triplets])
titles = [f"u = {after[i]:.1f}" for i in worst] + [
    f"grad {ratio_weight(after[i]):.3f}" for i in worst
]
show_images(
    held_back[shown], titles + [""] * 10, colors=["black"] * 10 + [SAME] * 10 + [DIFFERENT] * 10
)
plt.show()

# %% [markdown]
# Sort the triplets by chapter 2's words, with a margin of 1: *hard* where the negative is as near as the positive or nearer,
# *semi-hard* where it is farther by less than the margin, *easy* the rest. Which sort moves the network? The bars count
# triplets, then the gradient that each loss gives them: hard and semi-hard are 21 % of the triplets, and have 81 % of the
# gradient of the paper's loss and all of the hinge's.

# %% alt="Three stacked bars of easy, semi-hard and hard. Most of the triplets are easy; of the gradient of the paper's loss hard and semi-hard triplets hold most, and of the hinge's they hold all." tags=["nbval-ignore-output"]
sorts = {"hard": after >= 0, "semi-hard": (after < 0) & (after > -1), "easy": after <= -1}
weights = {"triplets": torch.ones_like(after), "gradient, paper": ratio_weight(after)}
weights["gradient, hinge"] = hinge_weight(after)
shares = pd.DataFrame(
    {
        sort: {name: float(w[which].sum() / w.sum()) for name, w in weights.items()}
        for sort, which in sorts.items()
    }
)
print(shares.map("{:.0%}".format).to_string())
bars = shares.iloc[::-1].plot.barh(
    stacked=True, figsize=(9, 2.4), color=[DIFFERENT, PALETTE[8], SAME], width=0.7, legend=False
)
for bar_set, sort, hatch in zip(bars.containers, sorts, ("//", "..", ""), strict=True):
    for bar in bar_set:
        bar.set_hatch(hatch)
    middle = bar_set[1].get_x() + bar_set[1].get_width() / 2
    bars.text(middle, 1, sort, ha="center", va="center", backgroundcolor="white")
bars.set_title("A few triplets hold most of the gradient")
bars.set(xlabel="share", xlim=(0, 1))
bars.xaxis.set_major_formatter("{x:.0%}")
plt.show()
assert shares.loc["triplets", "easy"] > 0.5
assert shares.loc["gradient, paper", "easy"] < 0.7 * shares.loc["triplets", "easy"]

# %% [markdown]
# ## Loss, or number of triplets?
#
# A batch of 96 images holds more than the 32 triplets that were drawn: *every* anchor, positive and negative of it make one.
# That needs no more images, only a matrix of 96 × 96 distances. **Batch-all** counts them all (chapter 2). It usually comes
# with the hinge, so two things change at once. To tell them apart, cross them: two losses × two sets of triplets, everything
# else equal, a **2 × 2 factorial experiment**.
#
# Both losses are means over all triplets of their set. The hinge is divided by four: then both have the gradient ¼ at u = 0, so
# that one learning rate is fair to both.


# %%
def all_gaps(points, kinds):
    distances, found = pairwise_distances(points, squared=False), []
    for kind in kinds.unique():
        inside = kinds == kind
        to_same, to_other = distances[inside][:, inside], distances[inside][:, ~inside]
        u = to_same[:, :, None] - to_other[:, None]
        found.append(u[~torch.eye(len(u), dtype=torch.bool)].flatten())
    return torch.cat(found)


def hinge(u):
    return (u + 1).clamp(min=0).mean() / 4


batch = torch.cat([column[:32] for column in (first, second, third)])
with torch.no_grad():
    points, kinds = network(images[batch]), labels[batch]
library = batch_all_triplet_loss(points, kinds, 1.0, squared=False, reduction="mean")
torch.testing.assert_close(4 * hinge(all_gaps(points, kinds)), library)
print(
    f"triplets drawn: {len(batch) // 3}; all triplets of the batch: {len(all_gaps(points, kinds)):,}"
)


# %%
def crossed(loss, which):
    return lambda points, kinds: loss(which(points, kinds))


LOSSES = {"paper's loss": ratio, "hinge": hinge}
SETS = {"drawn": drawn_gaps, "all": all_gaps}
SEEDS = (0, 1)
trained = {("paper's loss", "drawn", 0): paper_network}  # with seed 0, as above
for key in itertools.product(LOSSES, SETS, SEEDS):
    if key not in trained:
        loss, which, seed = key
        trained[key] = train(crossed(LOSSES[loss], SETS[which]), seed)
errors = pd.Series({key: wrong(gaps(embed(net, held_back))) for key, net in trained.items()})

# %% tags=["nbval-ignore-output"]
table = errors.unstack(1)[["drawn", "all"]]
table["all / drawn"] = table["all"] / table["drawn"]
print(table.to_string(formatters={"drawn": "{:.1%}".format, "all": "{:.1%}".format}))
by_loss = errors.unstack(0)
by_loss["hinge / paper's loss"] = by_loss["hinge"] / by_loss["paper's loss"]
print(by_loss.to_string(formatters=dict.fromkeys(LOSSES, "{:.1%}".format)))
assert (table["all / drawn"] < 0.95).all()

# %% alt="Four lines from left, 32 drawn triplets, to right, all triplets of the batch, on a logarithmic error axis: both losses, two seeds each. All four lines fall, from 10 to 11 percent down to 6 to 7 percent; the two losses lie close to each other."
figure, ax = plt.subplots(figsize=(7, 4))
styles = {"paper's loss": ("-", "o", PALETTE[2]), "hinge": ("--", "s", "dimgrey")}
for loss, (line, marker, color) in styles.items():
    for seed in SEEDS:
        ends = [errors[loss, which, seed] for which in SETS]
        ax.plot([0, 1], ends, linestyle=line, marker=marker, color=color)
        ax.text(1.04, ends[1], f"{loss}, seed {seed}", va="center", color=color)
ax.set(
    title="More triplets lower the error, whichever the loss",
    ylabel="triplet error, held back",
    yscale="log",
    xlim=(-0.2, 1.6),
)
ax.set_xticks([0, 1], ["32 drawn triplets", "all triplets of the batch"])
ax.set_yticks([0.06, 0.08, 0.1, 0.12], ["6 %", "8 %", "10 %", "12 %"])
ax.minorticks_off()
plt.show()

# %% [markdown]
# Read along the lines: with all triplets of the batch the error falls to between 0.61 and 0.68 of what it is with the drawn
# ones, under either loss and with either seed. Read between them: the hinge has 0.94 to 1.05 of the error of the paper's loss
# with the drawn triplets, and 0.91 to 0.94 with all. So most of what batch-all with a hinge gains on the paper's recipe comes
# from the number of triplets, and little from the hinge. (Two seeds, one budget, one rate.)

# %% [markdown]
# ## The Siamese network
#
# The paper's claim is about its rival. A **Siamese network** has two towers, and learns from pairs: the **contrastive loss**
# (chapter [6](06_three_ways.ipynb)) is ½d² for a pair of one class and ½max(0, m − d)² for a pair of two, with margin m. Here
# it gets the very same images: of each triplet, anchor and positive are one pair, anchor and negative the other. The difference
# is what the loss sees. A triplet loss compares two distances; the contrastive loss compares each distance with a fixed scale,
# 0 or m.
#
# A comparison is fair only if both sides were chosen with care. So rate and margin were chosen with seed 2, which is not used
# elsewhere (nine settings against three: the paper's loss has no margin to choose), on held-back images (measured once; 96 batches each, 2 000 training images for the classifiers):
#
# | Seed 2, held-back images | Rate | Triplet error | Linear classifier | kNN |
# | :-- | :-- | :-- | :-- | :-- |
# | triplet, paper's loss | 0.01 | 15.1 % | 91.1 % | 84.4 % |
# | triplet, paper's loss | 0.03 | 7.7 % | 92.8 % | 89.5 % |
# | triplet, paper's loss | 0.1 | 9.5 % | 90.3 % | 87.9 % |
# | Siamese, margin 1 | 0.1 | 7.3 % | 90.1 % | 86.5 % |
# | Siamese, margin 1 | 0.2 | 7.5 % | 89.0 % | 86.3 % |
# | Siamese, margin 2 | 0.03 | 5.8 % | 92.7 % | 89.3 % |
# | Siamese, margin 2 | 0.1 | 11.5 % | 86.9 % | 81.2 % |
# | Siamese, margin 2 | 0.2 | 30.3 % | 64.0 % | 62.2 % |
# | Siamese, margin 4 | 0.01 | 6.2 % | 94.0 % | 89.1 % |
# | Siamese, margin 4 | 0.03 | 4.0 % | 93.6 % | 90.8 % |
# | Siamese, margin 8 | 0.01 | 4.6 % | 94.4 % | 91.4 % |
# | Siamese, margin 8 | 0.03 | collapsed | 9.3 % | 11.6 % |
#
# The settings matter more than the loss: within the Siamese rows the triplet error goes from 4 to 30 %. Each network gets the
# setting with its lowest triplet error: both rate 0.03, the Siamese one margin 4.


# %%
def siamese_loss(points, kinds, margin=4.0):
    anchor, positive, negative = points.chunk(3)
    pulled = (anchor - positive).norm(dim=1).square()
    pushed = (margin - (anchor - negative).norm(dim=1)).clamp(min=0).square()
    return (pulled + pushed).mean() / 4


for seed in SEEDS:
    trained["Siamese", "drawn", seed] = train(siamese_loss, seed)

# %% tags=["nbval-ignore-output"]
for seed in SEEDS:
    from_pairs = wrong(gaps(embed(trained["Siamese", "drawn", seed], held_back)))
    own = errors["paper's loss", "drawn", seed]
    print(f"seed {seed}: triplet error, Siamese {from_pairs:.1%}, triplet network {own:.1%}")
    assert from_pairs < own

# %% [markdown]
# In triplet error the Siamese network is ahead with both seeds: 7.7 % against 10.7 %, and 6.3 % against 10.5 %. The paper
# measures something else, the accuracy of a classifier.

# %% [markdown]
# ## What the embeddings are worth
#
# Accuracy in the paper is that of a **linear classifier** on the frozen embedding (a **linear probe**). Beside it stands kNN
# with k = 10, as in chapter 4. Both get 2 000 training images. This is the one place where test images come in: 2 500, every
# fourth. To compare with: the raw pixels, and a network that was not trained.

# %%
test_images, test_labels = (part[::4] for part in load_mnist("test"))
gallery, gallery_labels = images[:2000], labels[:2000]


def judge(points_of):
    known, asked = points_of(gallery), points_of(test_images)
    linear = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    linear.fit(known.numpy(), gallery_labels.numpy())
    by_linear = torch.as_tensor(linear.predict(asked.numpy())) == test_labels
    by_neighbours = KNNClassifier(known, gallery_labels).predict(asked) == test_labels
    return {"linear": by_linear, "kNN": by_neighbours}


torch.manual_seed(0)
untrained = HofferAilonNet()
right = {
    "pixels": judge(lambda x: x.flatten(1)),
    "untrained network": judge(lambda x: embed(untrained, x)),
}
JUDGED = [(loss, "drawn", seed) for loss in ("paper's loss", "Siamese") for seed in SEEDS]
JUDGED += [("paper's loss", "all", 0), ("hinge", "all", 0)]
for key in JUDGED:
    name = ", ".join(map(str, key))
    right[name] = judge(lambda x, net=trained[key]: embed(net, x))

# %% tags=["nbval-ignore-output"]
accuracy = pd.DataFrame(
    {
        name: {how: float(r.float().mean()) for how, r in both.items()}
        for name, both in right.items()
    }
).T
print(accuracy.map("{:.2%}".format).to_string())
for seed in SEEDS:
    ours, theirs = (accuracy.loc[f"{loss}, drawn, {seed}"] for loss in ("paper's loss", "Siamese"))
    assert theirs["linear"] > ours["linear"] - 0.03
assert accuracy.loc["paper's loss, drawn, 0", "kNN"] < accuracy.loc["pixels", "kNN"]

# %% [markdown]
# Linear classifier and kNN see the same 2 500 images for every network, so the comparison is paired: count the images that only
# one of two networks gets right, and ask with a sign test (**McNemar's test**) whether the toss of a coin would split them so.

# %% tags=["nbval-ignore-output"]
questions = [
    ("paper's loss, all, 0", "paper's loss, drawn, 0"),
    ("hinge, all, 0", "paper's loss, all, 0"),
    ("Siamese, drawn, 0", "paper's loss, drawn, 0"),
    ("Siamese, drawn, 1", "paper's loss, drawn, 1"),
]
for one_name, other_name in questions:
    for how in ("linear", "kNN"):
        x, y = right[one_name][how], right[other_name][how]
        only_x, only_y = int((x & ~y).sum()), int((y & ~x).sum())
        p_value = binomtest(only_x, only_x + only_y).pvalue
        print(f"{how:6s} {one_name} | {other_name}: {only_x} : {only_y}, p = {p_value:.2g}")

# %% [markdown]
# Is the triplet network better than the Siamese one? By the paper's own measure, the linear classifier, the two cannot be told
# apart here: 92.5 % against 91.8 % with seed 0 (only one of them right: 107 : 90, p = 0.25), and 92.6 % against 93.5 % with
# seed 1 (82 : 103, p = 0.14). By kNN the Siamese network is better: 88.2 % against 84.2 %, and 89.7 % against 86.2 % (219 : 119
# and 201 : 114). So the paper's claim is **not reproduced** at this budget. Look back at the table of settings: against margin
# 2 and rate 0.1 the triplet network would have won, 92.8 % against 86.9 %. A rival that was not tuned loses easily.
#
# With seed 0, all triplets instead of the drawn ones help kNN clearly (180 : 64); for the linear classifier no gain can be
# shown (87 : 76, p = 0.43). With all triplets kNN prefers the hinge (40 : 15, p = 0.001). And be sober: after 9 216 images kNN
# on the drawn triplets' embedding is *below* kNN on pixels (88.8 %) with both seeds, and not above the untrained network (87.0 %;
# below it with seed 0).

# %% [markdown]
# ## Beside the paper
#
# A number without its budget says little, so it has a column. († second-hand, as above. This chapter: seeds 0 and 1 where two
# numbers stand, else seed 0; 2 500 test images, 2 000 for the classifier; the others: all test images.)
#
# | MNIST | Images seen in training | Linear classifier | kNN |
# | :-- | :-- | :-- | :-- |
# | paper † | 1 920 000 an epoch, 10 to 30 epochs | 99.54 ± 0.08 % | |
# | the longer run, one epoch: paper's loss, the code's rate and batch, undamped | 1 920 000 | 99.26 % | 99.30 % |
# | a fifth of it | 384 000 | 98.94 % | 98.86 % |
# | this chapter, drawn triplets, paper's loss | 9 216 | 92.5 and 92.6 % | 84.2 and 86.2 % |
# | this chapter, all triplets, paper's loss | 9 216 | 92.9 % | 88.8 % |
# | this chapter, all triplets, hinge | 9 216 | 93.0 % | 89.8 % |
# | this chapter, Siamese network | 9 216 | 91.8 and 93.5 % | 88.2 and 89.7 % |
# | chapter 4, `fit`, two epochs | 120 000 | | 99.57 % (mean of five seeds) |
#
# The paper also reports CIFAR-10, SVHN and STL-10, which are not shipped here and not repeated.

# %% [markdown]
# ## The longer run
#
# `python tests/benchmarks/paper.py --triplets 640000 --checkpoint run.pt` trains for one epoch of the paper with the authors' rate and
# batch (0.1, 128 triplets; no dampening) on all 60 000 images. It writes its state every two minutes, goes on from there when it was
# stopped, and ends with this report. One run, seed 0, on the test set (95 % intervals):
#
# | triplets | images seen | triplet error | linear classifier | kNN |
# | --: | --: | --: | --: | --: |
# | 128 000 | 384 000 | 0.40 % | 98.94 % (98.72 to 99.13) | 98.86 % (98.63 to 99.06) |
# | 640 000, one epoch | 1 920 000 | 0.16 % | 99.26 % (99.07 to 99.42) | 99.30 % (99.12 to 99.45) |
#
# The epoch took 141 minutes on one thread, beside other work; with a core to itself it does 16 000 triplets a minute.

# %% [markdown]
# Five times the triplets leave 74 errors of 106 to the linear classifier. The paper's 99.54 ± 0.08 % would be 46, after 10 to 30
# epochs †; it lies just above our interval. What nine to 29 more epochs bring was not measured.

# %% [markdown]
# ## When it goes wrong: the same numbers, another library
#
# "Momentum 0.9, learning rate 0.1" looks complete. It is not. The velocity of PyTorch's SGD is v ← 0.9 v + g. The Torch
# library, which the authors used, multiplies each new gradient by 1 − momentum unless told otherwise: v ← 0.9 v + **0.1** g
# (torch/optim, `sgd.lua`). PyTorch calls that `dampening=0.9`. How far does one weight move under a constant gradient of 1?

# %%
for dampening in (0.0, 0.9):
    single = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([single], lr=0.1, momentum=0.9, dampening=dampening)
    for _ in range(100):
        single.grad, last = torch.ones(1), single.item()
        optimizer.step()
    print(f"dampening {dampening}: step number 100 is {last - single.item():.3f} long")
    assert math.isclose(last - single.item(), 1.0 - dampening, rel_tol=1e-3)

# %% [markdown]
# Ten times shorter. Train both ways at the rate that the code names, 0.1, all else as above.

# %% tags=["nbval-ignore-output"]
_, undamped_curve = train(paper_loss, rate=0.1, steps=64, watch=watch)
_, damped_curve = train(paper_loss, rate=0.1, steps=64, dampening=0.9, watch=watch)
for name, curve in (("undamped", undamped_curve), ("damped", damped_curve)):
    print(name)
    print(curve.round(3).to_string(index=False))
assert damped_curve["error"].iloc[-1] > 1.3 * undamped_curve["error"].iloc[-1]

# %% alt="Three panels of two curves each, undamped and damped, at rate 0.1. The undamped loss falls faster. The damped error rises from 23 to 28 percent and is back near 21 at the end, the undamped one is lower. The effective dimension of both drops from 16 to about 2."
axes = draw_curves(
    {"v ← 0.9 v + g (PyTorch)": undamped_curve, "v ← 0.9 v + 0.1 g (Torch)": damped_curve}
)
for ax, title in zip(
    axes,
    (
        "The loss falls slowly if damped",
        "Damped, the error hardly falls",
        "Two dimensions hold the spread",
    ),
    strict=True,
):
    ax.set_title(title)
plt.show()

# %% [markdown]
# After 64 batches the undamped error is 10.7 %, the damped one 20.6 %. The damped error *rises* first, to 28.2 %, for the
# reason given above: two dimensions hold its spread, too (effective dimension 2.0), and it stays there longer, because its
# steps are a tenth as long. It is slow, not broken: its loss falls at every measurement.
#
# The authors took such short steps for millions of triplets; 64 batches are too few for them. The longer run above takes 0.1
# undamped with batches of 128 and ends at 99.26 %. When a reproduction fails, compare what the words *do*, not the words.

# %% [markdown]
# ## When it goes wrong: the loss on a sphere
#
# Chapters 3 and 4 scale embeddings to length one. Do that here, and the loss cannot get small: on the unit sphere no two points
# are farther apart than 2, so u ≥ −2 and no triplet gets below σ(−2)² = 0.014. Ten classes are spread best as a **simplex**,
# each at √(20/9) ≈ 1.49 from every other. Forget networks and move points freely.


# %%
def best_loss(place, steps=300):
    points = torch.randn(50, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    digits = torch.arange(50) % 10
    triplets = mine_triplets(points.detach(), digits, "all")
    optimizer, path = torch.optim.Adam([points], lr=0.1), []
    for _ in range(steps):
        placed = place(points)
        loss = DistanceRatioLoss()(*(placed[column] for column in triplets))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        path.append(loss.item())
    return path


# %%
places = {
    "unit sphere": F.normalize,
    "sphere of radius 5": lambda points: 5 * F.normalize(points),
    "free": lambda points: points,
}
floor = torch.sigmoid(torch.tensor(-math.sqrt(20 / 9))).square().item()
paths = {name: best_loss(place) for name, place in places.items()}
print(f"a simplex on the unit sphere: {floor:.4f}")
for name, path in paths.items():
    print(f"{name} ends {'at' if path[-1] > floor / 2 else 'below a hundredth of'} the floor")
assert abs(paths["unit sphere"][-1] - floor) < 0.1 * floor
assert max(paths["free"][-1], paths["sphere of radius 5"][-1]) < floor / 100

# %% alt="Three curves of the loss over 300 steps on a logarithmic axis. On the unit sphere it stops at the dotted floor of 0.034; on a sphere of radius 5 and without a sphere it falls far below."
figure, ax = plt.subplots(figsize=(8, 3.6))
for (name, path), color, line in zip(
    paths.items(), (DIFFERENT, PALETTE[1], SAME), ("-", "--", "-."), strict=True
):
    ax.plot(path, color=color, linestyle=line)
    ax.text(305, path[-1], name, color=color, va="bottom")
ax.axhline(floor, color="grey", linestyle=":")
ax.set(yscale="log", title="On the unit sphere this loss has a floor", xlabel="step", xlim=(0, 400))
ax.set_ylabel("mean (s⁺)²")
plt.show()

# %% [markdown]
# At the floor every triplet is as right as can be, and still each has a gradient: the loss keeps pushing at what is finished.
# The fix is room: do not normalise, as the paper, or put the points on a larger sphere (other losses divide by a
# **temperature**, which does the same).

# %% [markdown]
# ## Exercises
#
# Try each before you look: a solution unfolds with a click on its bar or on the three dots, and its answer in words below it.
#
# **1.** Replace (s⁺)² by −log(1 − s⁺). What gradient does a triplet with u = 8 get then? Check with autograd. Which function of
# u is this?

# %%
# Your attempt

# %% jupyter={"source_hidden": true} tags=["hide-input"]
# Solution 1
u = torch.tensor([-8.0, 0.0, 8.0], requires_grad=True)
log_loss = -torch.log(1 - torch.sigmoid(u))
log_loss.sum().backward()
torch.testing.assert_close(u.grad, torch.sigmoid(u.detach()))
torch.testing.assert_close(log_loss, F.softplus(u), atol=1e-3, rtol=1e-3)
assert u.grad[2] > 100 * ratio_weight(u.detach())[2]

# %% [markdown]
# <details><summary>Answer 1</summary>
#
# The gradient is s itself: 0.9997 at u = 8, where the paper's loss gives 0.0007. The function is softplus(u) = log(1 + eᵘ), a
# hinge with a rounded corner, called the *soft margin* (Hermans, Beyer and Leibe; here `TripletLoss(margin=0, soft=True,
# squared=False)`). It is the **cross-entropy** of the shares, where the paper takes their squared error. The hardest triplets then get the most.
#
# </details>

# %% [markdown]
# **2.** Use *squared* distances in the trained network's triplets. Do more or fewer random triplets have less than a hundredth
# of the largest gradient? And of the wrong ones?

# %%
# Your attempt

# %% jupyter={"source_hidden": true} tags=["hide-input"]
# Solution 2
embedded = embed(paper_network, held_back)
a, p, n = (embedded[column] for column in held_triplets)
squared = (a - p).square().sum(1) - (a - n).square().sum(1)


def quiet(u):
    return float((ratio_weight(u) < 0.01 * 8 / 27).float().mean())


of_all = quiet(squared), quiet(after)
of_wrong = quiet(squared[after > 0]), quiet(after[after > 0])
assert of_all[0] > of_all[1]
assert of_wrong[0] > of_wrong[1] + 0.2

# %% [markdown]
# <details><summary>Answer 2</summary>
#
# More: 90 % of the random triplets, against 45 % with plain distances. Of the wrong ones it is 51 % against 0.1 %. Squaring
# makes large distances larger still, so u leaves the region around ln 2, where the gradient is, on both sides: half of the
# wrong triplets would teach almost nothing.
#
# </details>

# %% [markdown]
# **3.** What does dropout do to distances? Embed the held-back images twice with dropout on. How far apart are two embeddings
# of *one* image, beside those of two images of one digit? And the triplet error?

# %%
# Your attempt

# %% jupyter={"source_hidden": true} tags=["hide-input"]
# Solution 3
torch.manual_seed(0)
paper_network.train()
with torch.no_grad():
    once, again = paper_network(held_back), paper_network(held_back)
paper_network.eval()
noise = float((once - again).norm(dim=1).mean())
embedded = embed(paper_network, held_back)
apart = float((embedded[held_triplets[0]] - embedded[held_triplets[1]]).norm(dim=1).mean())
noisy_error = wrong(gaps(once))
assert noise > 0.5 * apart
assert noisy_error > wrong(after)

# %% [markdown]
# <details><summary>Answer 3</summary>
#
# Two embeddings of one image are 2.9 apart on average; two images of one digit, without dropout, 2.7. The noise of dropout is
# as large as the spread of a class. It makes more triplets wrong: 14.2 % instead of 10.7 %. So evaluate with dropout off
# (`network.eval()`; `embed` does it).
#
# </details>

# %% [markdown]
# **4.** Multiply the embeddings of the untrained network by ten. What becomes of the triplet error, and of the gradients of
# right and of wrong triplets?

# %%
# Your attempt

# %% jupyter={"source_hidden": true} tags=["hide-input"]
# Solution 4
means, spreads = [], []
for factor in (1, 10):
    pulls = ratio_weight(factor * before)
    means.append((float(pulls[before < 0].mean()), float(pulls[before > 0].mean())))
    spreads.append(float(pulls.std()))
assert abs(means[0][0] - means[0][1]) < 0.04 < abs(means[1][0] - means[1][1])
assert spreads[1] > 4 * spreads[0]
assert wrong(10 * before) == wrong(before)

# %% [markdown]
# <details><summary>Answer 4</summary>
#
# The triplet error stays at 22.8 %, because no order changes. The gradients do: of right and wrong triplets they were 0.236 and
# 0.256 on average, nearly equal, and become 0.121 and 0.276. This loss has a fixed scale, so it can tell wrong triplets from
# right ones only when distances differ by about 1.
#
# </details>

# %% [markdown]
# ## Check yourself

# %% [markdown]
# **1.** Two libraries train with "SGD, rate 0.1, momentum 0.9" from the same weights on the same batches, and one learns much
# more slowly. What do you look at first?
#
# a) the seed · b) whether new gradients are damped · c) the number of parameters
#
# <details><summary>Answer</summary>
#
# **b.** With dampening 0.9 steps are soon a tenth as long. *a* is wrong because weights and batches are the same; *c* is wrong
# because the same weights have the same number.
#
# </details>

# %% [markdown]
# **2.** A triplet has d⁺ = 30 and d⁻ = 10. What does the paper's loss do with it?
#
# a) pulls hardest of all, because it is the worst · b) nearly nothing, because s⁺ is nearly 1 · c) nothing, because distances
# above a margin are cut off
#
# <details><summary>Answer</summary>
#
# **b.** The gradient is 2s²(1 − s), and 1 − s is about e⁻²⁰. *a* describes a loss that grows with the error, such as the
# squared hinge; *c* is wrong because this loss has no margin.
#
# </details>

# %% [markdown]
# **3.** The loss falls during the first steps, and the triplet error rises. Is the code wrong?
#
# a) yes, a lower loss means fewer wrong triplets · b) no: while |u| is small the loss sees the mean of u, and the error its
# sign · c) no: the network overfits
#
# <details><summary>Answer</summary>
#
# **b.** The mean of u can fall while more of its values are above zero. *a* would need a loss that counts signs; *c* is wrong
# because overfitting needs images that are seen again and again, and so early hardly one was seen twice.
#
# </details>

# %% [markdown]
# **4.** Method A with loss A and rate A beats method B with loss B and rate B. You want to know whether the loss did it. What
# next?
#
# a) more seeds of A and B · b) a larger test set · c) runs in which one thing at a time, and both, are exchanged
#
# <details><summary>Answer</summary>
#
# **c.** Only crossing tells causes apart. *a* and *b* make the difference surer, not its cause.
#
# </details>

# %% [markdown]
# **5.** On the unit sphere the paper's loss stops at 0.034. What is to be done?
#
# a) train longer · b) a larger learning rate · c) give the points more room, on a larger sphere or on none
#
# <details><summary>Answer</summary>
#
# **c.** Ten classes are as far apart as they can be, so the loss can go no lower. *a* and *b* move points that have nowhere to
# go.
#
# </details>

# %% [markdown]
# ## Summary
#
# - The paper's loss is the square of a sigmoid of u = d⁺ − d⁻. Its gradient 2s²(1 − s) is largest for slightly wrong triplets
#   and dies for the easy and for the hardest.
# - While all distances are small, the loss sees only the mean of u: a few axes are stretched until they decide all distances,
#   and the triplet error may rise as the loss falls.
# - Crossing loss and triplets told two causes apart: all triplets of a batch instead of the drawn ones cut the triplet error by
#   32 to 39 %; exchanging the loss changed it by less than a tenth.
# - The paper's claim was not reproduced at this budget: by a linear classifier a Siamese network, tuned too, cannot be
#   told from the triplet network, and by kNN and triplet error it is ahead.
# - A recipe is what the optimiser does, not what its settings are called; a result is a number with its budget.
#
# **Next:** [8 · Image retrieval](08_image_retrieval.ipynb) searches with embeddings.

# %% [markdown]
# ## References
#
# - E. Hoffer, N. Ailon, ["Deep metric learning using Triplet network"](https://arxiv.org/abs/1412.6622), arXiv 1412.6622 (v1
#   2014, v4 2018); [SIMBAD 2015](https://doi.org/10.1007/978-3-319-24261-3_7). Code:
#   [github.com/eladhoffer/TripletNet](https://github.com/eladhoffer/TripletNet); its optimiser:
#   [github.com/torch/optim](https://github.com/torch/optim).
# - R. Hadsell, S. Chopra, Y. LeCun, ["Dimensionality reduction by learning an invariant
#   mapping"](https://doi.org/10.1109/CVPR.2006.100), CVPR 2006.
# - A. Hermans, L. Beyer, B. Leibe, ["In defense of the triplet loss for person
#   re-identification"](https://arxiv.org/abs/1703.07737), 2017.
