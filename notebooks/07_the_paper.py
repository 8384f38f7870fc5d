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

# %%

# %% [markdown]
# # 7 · The paper: Hoffer and Ailon reproduced
#
# The paper that named the triplet network reports 99.54 % on MNIST. This chapter builds its network, its loss and its way to draw triplets,
# trains them for as long as a reader waits, and says plainly how far that goes.
#
# - **You will learn** to read a recipe closely enough to repeat it, what the paper's loss does to easy, semi-hard and hard
#   triplets, what it costs to look at one triplet at a time, and how to report a budget.
# - **You need** chapters [2](02_triplets.ipynb) and [4](04_training.ipynb); no GPU.
# - **Running time** about 4 minutes on two slow cores; a longer run is a command, and its result is here.
# - Previous: [6 · Three ways](06_three_ways.ipynb) · Next: [8 · Image retrieval](08_image_retrieval.ipynb)

# %%
import math

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from tripletlib import (
    DistanceRatioLoss,
    HofferAilonNet,
    Score,
    TripletLoss,
    TripletNet,
    describe_triplets,
    draw_triplets,
    embed,
    knn_accuracy,
    load_mnist,
    mine_triplets,
)
from tripletlib.plotting import DIFFERENT, PALETTE, SAME, show_images, use_theme

use_theme()
all_images, all_labels = load_mnist("train")
held_back, held_labels = all_images[:1000], all_labels[:1000]
images, labels = all_images[5000:], all_labels[5000:]

# %% [markdown]
# Whatever is chosen here is chosen on 5 000 training images held back, of which 1 000 draw the curves. The test images come in once, at the end.
#
# ## Which triplets?
#
# The data holds about 2 · 10¹³ triplets, and nobody looks at all. The paper's code draws: a class for the anchor, each as likely as any other;
# two different images of it; then another class and one image of that. It draws 640 000, calls that an epoch, and draws anew
# for the next. `draw_triplets` does this.

# %%
a, p, n = draw_triplets(labels, 640_000, torch.Generator().manual_seed(0))
print("triplets of an epoch:", len(a))
assert (labels[a] == labels[p]).all()
assert (a != p).all()
assert (labels[a] != labels[n]).all()
assert labels[a].bincount().min() > 0.98 * 64_000

# %%
shown = torch.cat([column[:10] for column in (a, p, n)])
titles = ["anchor"] * 10 + ["positive"] * 10 + ["negative"] * 10
show_images(images[shown], titles, colors=["black"] * 10 + [SAME] * 10 + [DIFFERENT] * 10)
plt.show()

# %% [markdown]
# Read the columns: the two upper images are of one digit, the lowest is of another. Most columns are dull. A 1 beside another 1 and a 0 teaches
# little after the first minute; a 4 beside a strange 4 and a 9 that looks like it would teach much. Drawn at random, how often
# does the second kind come? Keep the question; the answer decides this chapter.

# %% [markdown]
# ## Their network
#
# Four convolutions with ReLU; after each of the first three, pooling by 2 and dropout of a quarter. No batch normalisation, no scaling to
# length one. It was made for images of 32 × 32, such as CIFAR-10's; our 28 × 28 are padded to that, so that the last convolution ends at 1 × 1.

# %%
network = HofferAilonNet()
parameters = sum(weights.numel() for weights in network.parameters())
print("parameters:", parameters)
assert parameters == 501_888

# %%
x = F.pad(held_back[:1], (2, 2, 2, 2), mode="replicate")
for layer in network.layers:
    x = layer(x)
    if isinstance(layer, torch.nn.Conv2d):
        print(f"after {layer.kernel_size[0]} × {layer.kernel_size[1]} convolution:", tuple(x.shape))
assert embed(network, held_back[:5]).shape == (5, 128)

# %% [markdown]
# "Triplet network" means three copies of this with **one** set of weights, for anchor, positive and negative. In PyTorch that
# is one network called three times; `TripletNet` does no more. The parameters are the same objects, not equal ones.

# %%
triplet_net = TripletNet(network.eval())
anchor, positive, negative = triplet_net(*(images[column[:4]] for column in (a, p, n)))
print(tuple(anchor.shape), tuple(positive.shape), tuple(negative.shape))
assert {id(w) for w in triplet_net.parameters()} == {id(w) for w in network.parameters()}
torch.testing.assert_close(anchor, embed(network, images[a[:4]]), atol=1e-4, rtol=1e-4)

# %% [markdown]
# ## Their loss, by hand
#
# Take one triplet in the plane: anchor (0, 0), positive (3, 4), negative (0, 4). The distances, not squared, are d⁺ = 5 and d⁻ = 4: the negative
# is nearer, so the triplet is wrong. A softmax makes two shares of them, s⁺ = exp(d⁺) / (exp(d⁺) + exp(d⁻)) and s⁻ = 1 − s⁺. Only
# the difference u = d⁺ − d⁻ counts: s⁺ is the sigmoid of u.

# %%
one = torch.tensor([[0.0, 0.0]]), torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 4.0]])
near, far = 5.0, 4.0
share = math.exp(near) / (math.exp(near) + math.exp(far))
print(f"s⁺ = {share:.4f}, loss (s⁺)² = {share**2:.4f}")
assert math.isclose(share, 1 / (1 + math.exp(-(near - far))))
torch.testing.assert_close(DistanceRatioLoss()(*one), torch.tensor(share**2))

# %% [markdown]
# The paper wants (s⁺, s⁻) to be (0, 1) and writes the squared error: (s⁺)² + (1 − s⁻)². Because the shares add to one, the two terms are
# equal, and the sum is **twice** (s⁺)². Does the learning rate then mean something else? No: the authors' code takes the *mean* of the two,
# as Torch's squared error does, and that is (s⁺)² again.

# %%
both = torch.tensor([near, far]).softmax(dim=0)
wanted = torch.tensor([0.0, 1.0])
torch.testing.assert_close(F.mse_loss(both, wanted, reduction="sum"), torch.tensor(2 * share**2))
torch.testing.assert_close(F.mse_loss(both, wanted), DistanceRatioLoss()(*one))

# %% [markdown]
# ## What a triplet may say
#
# A network learns from a triplet as much as its gradient is long. By the chain rule d(s²)/du = 2s · ds/du, and the sigmoid has ds/du = s(1 − s).
# Together: **2s²(1 − s)**. The positive is then pulled along the line to the anchor with just this force. Autograd agrees.

# %%
weight = 2 * share**2 * (1 - share)
moving = [point.clone().requires_grad_() for point in one]
DistanceRatioLoss()(*moving).backward()
print(f"2s²(1 − s) = {weight:.4f}")
torch.testing.assert_close(moving[1].grad, weight * torch.tensor([[0.6, 0.8]]))
torch.testing.assert_close(moving[2].grad, -weight * torch.tensor([[0.0, 1.0]]))


# %%
def ratio_weight(u):
    s = torch.sigmoid(u)
    return 2 * s.square() * (1 - s)


def hinge_weight(u, margin=1.0):
    return (u + margin > 0).to(u.dtype)


u = torch.linspace(-8, 8, 1601, requires_grad=True)
torch.sigmoid(u).square().sum().backward()
torch.testing.assert_close(ratio_weight(u.detach()), u.grad)

# %%
u = u.detach()
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8))
left.plot(u, torch.sigmoid(u).square(), color=PALETTE[2], label="paper: (s⁺)²")
left.plot(u, (u + 1).clamp(min=0), color=PALETTE[7], linestyle="--", label="hinge, margin 1")
left.set(title="The loss is bounded", ylabel="loss of a triplet", ylim=(0, 3))
right.plot(u, ratio_weight(u), color=PALETTE[2])
right.plot(u, hinge_weight(u), color=PALETTE[7], linestyle="--")
right.set(title="The hardest triplets are hardly heard", ylabel="gradient by u")
right.annotate("right by far", (-7.8, 0.1))
right.annotate("wrong by far", (4.2, 0.1))
for ax in (left, right):
    ax.set_xlabel("u = d⁺ − d⁻")
left.legend(loc="upper left")
plt.show()

# %% [markdown]
# From the left: a triplet that is right by far has a small s, and its gradient dies like e²ᵘ. That is wanted. On the right a triplet is wrong by far, s
# is nearly one, and 1 − s kills the gradient too. The most is said where s = 2/3, that is u = ln 2: slightly wrong triplets.
# The hinge of chapter 2 gives every active triplet the same weight.

# %%
peak = u[ratio_weight(u).argmax()]
print(f"largest gradient {ratio_weight(u).max():.4f} = 8/27")
assert abs(peak - math.log(2)) < 0.01
assert ratio_weight(torch.tensor(8.0)) < 0.01 * ratio_weight(peak)
torch.testing.assert_close(ratio_weight(torch.tensor(math.log(2))), torch.tensor(8 / 27))

# %% [markdown]
# Is that a fault? It is a choice. A mislabelled image makes triplets that are wrong by far, and a bounded loss leaves them alone; a hinge chases them.
# But a network that has something terribly wrong is also told nothing about it. The loss says: *mend what is nearly right.*

# %% [markdown]
# ## The recipe
#
# SGD with learning rate 0.1, momentum 0.9, weight decay 10⁻⁴, batches of 128 triplets. What is measured on the way is what the authors print after each epoch:
# the **triplet error**, the fraction of triplets not seen in training whose negative is as near as the positive or nearer.

# %%
curve_triplets = draw_triplets(held_labels, 20_000, torch.Generator().manual_seed(1))


def gaps(embedded, drawn=curve_triplets):
    anchor, positive, negative = (embedded[column] for column in drawn)
    return (anchor - positive).norm(dim=1) - (anchor - negative).norm(dim=1)


def measure(network, seen):
    u = gaps(embed(network, held_back))
    return {
        "images": 3 * seen,
        "loss": u.sigmoid().square().mean(),
        "error": (u >= 0).float().mean(),
    }


# %% [markdown]
# The loop is chapter 4's five lines. What differs between the runs of this chapter goes in as arguments: the loss of a batch, the triplets, the step. Each run starts from
# the same weights.


# %%
def train(batch_loss, drawn, **settings):
    torch.manual_seed(0)
    network = HofferAilonNet()
    recipe = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4, **settings}
    optimizer = torch.optim.SGD(network.parameters(), **recipe)
    curve = [measure(network, 0)]
    for step, batch in enumerate(zip(*(column.split(128) for column in drawn), strict=True), 1):
        loss = batch_loss(network, *batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 16 == 0:
            curve.append(measure(network, 128 * step))
    return network, pd.DataFrame(curve).astype(float)


# %%
ratio_loss = DistanceRatioLoss()


def paper_loss(network, a, p, n):
    return ratio_loss(*TripletNet(network)(images[a], images[p], images[n]))


budget = draw_triplets(labels, 128 * 128, torch.Generator().manual_seed(2))
paper_network, paper_curve = train(paper_loss, budget)

# %% tags=["nbval-ignore-output"]
print(paper_curve.round(4).to_string(index=False))


# %%
def plot_curves(curves, quantity, ax, **settings):
    for (name, curve), color in zip(curves.items(), PALETTE[2:], strict=False):
        ax.plot(curve["images"] / 1000, curve[quantity], marker="o", color=color, label=name)
    ax.set(xlabel="images seen (thousands)", **settings)


figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6))
plot_curves({"paper": paper_curve}, "loss", left, title="The loss begins near ¼", ylim=(0, 0.27))
left.axhline(0.25, color="grey", linestyle=":")
left.set_ylabel("mean (s⁺)² on held-back triplets")
plot_curves(
    {"paper": paper_curve},
    "error",
    right,
    title="The triplet error: slow, then quick",
    ylim=(0, None),
)
right.yaxis.set_major_formatter("{x:.0%}")
right.set_ylabel("triplet error, held back")
plt.show()

# %% [markdown]
# A fresh network puts everything close together: u ≈ 0, s ≈ ½, so the loss begins near σ(0)² = ¼. While all points nearly coincide, no direction is
# much better than another, and the first sixteen steps hardly lower the triplet error. Then it goes quickly. Images seen are three for each triplet: this
# budget is about a fortieth of *one* epoch of the paper.

# %%
images_seen = 3 * len(budget[0])
print(f"{images_seen} images seen, {images_seen / (3 * 640_000):.1%} of an epoch of the paper")
assert abs(paper_curve["loss"].iloc[0] - 0.25) < 0.05
assert paper_curve["error"].iloc[-1] < 0.11
assert paper_curve["error"].iloc[-1] < paper_curve["error"].iloc[0] / 2

# %% [markdown]
# ## Where the triplets lie
#
# Now the question kept from above. Draw 20 000 random triplets of held-back images and look at u, before and after training.

# %%
torch.manual_seed(0)
before, after = (gaps(embed(net, held_back)) for net in (HofferAilonNet(), paper_network))
silent = (ratio_weight(after) < 0.01 * 8 / 27).float().mean()
assert (ratio_weight(before) > 0.5 * 8 / 27).float().mean() > 0.99
assert silent > 0.3

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6))
left.hist(before, bins=60, color=PALETTE[7], density=True)
left.set(title="Before: all at u ≈ 0", ylabel="density of random triplets")
right.hist(after, bins=60, color=PALETTE[7], density=True)
twin = right.twinx()
grid = torch.linspace(float(after.min()), float(after.max()), 400)
twin.plot(grid, ratio_weight(grid), color=PALETTE[2])
twin.set(ylim=(0, 0.5), ylabel="gradient of the loss by u")
twin.grid(visible=False)
right.set(title="After: most have left the gradient")
for ax in (left, right):
    ax.axvline(0, color="grey", linestyle=":")
    ax.set_xlabel("u = d⁺ − d⁻")
plt.show()

# %% [markdown]
# Training shifts the grey hill out of the green one. Triplets that are still in the green region teach; the others were embedded, three images each, for almost nothing. That
# is how random triplets waste work, and the better the network is, the more of it.

# %% tags=["nbval-ignore-output"]
print(f"{silent:.0%} of random triplets have less than a hundredth of the largest gradient")

# %% [markdown]
# And the hardest? Here are the ten of the 20 000 that are most wrong, with u and the gradient they get. They would have much to say, if
# the loss listened; a look also shows why it may be wise not to.

# %%
worst = after.topk(300).indices
_, first = np.unique(curve_triplets[2][worst], return_index=True)
worst = worst[np.sort(first)[:10]]
shown = torch.cat([column[worst] for column in curve_triplets])
titles = [f"u = {after[i]:.1f}" for i in worst] + [
    f"pull {ratio_weight(after[i]):.3f}" for i in worst
]
show_images(
    held_back[shown], titles + [""] * 10, colors=["black"] * 10 + [SAME] * 10 + [DIFFERENT] * 10
)
plt.show()

# %% [markdown]
# (Rows are anchor, positive, negative; each negative is shown once.)
#
# Sort the triplets by chapter 2's words, with a margin of 1: *hard* where the negative is nearer, *semi-hard* where it is farther by less than the margin,
# *easy* the rest. Who speaks? The bars count triplets, then the gradient that each loss gives them.

# %%
kinds = {"hard": after >= 0, "semi-hard": (after < 0) & (after > -1), "easy": after <= -1}
weights = {
    "triplets": torch.ones_like(after),
    "gradient,\npaper's loss": ratio_weight(after),
    "gradient,\nhinge": hinge_weight(after),
}
shares = pd.DataFrame(
    {
        kind: {name: float(w[which].sum() / w.sum()) for name, w in weights.items()}
        for kind, which in kinds.items()
    }
)

# %%
figure, ax = plt.subplots(figsize=(9, 2.6))
shares.iloc[::-1].plot.barh(stacked=True, ax=ax, color=[DIFFERENT, PALETTE[8], SAME], width=0.7)
ax.set(title="A few triplets hold most of the gradient", xlabel="share", xlim=(0, 1))
ax.xaxis.set_major_formatter("{x:.0%}")
ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()
assert shares.loc["triplets", "easy"] > 0.7
assert shares.iloc[1]["easy"] < 0.6 * shares.loc["triplets", "easy"]

# %% [markdown]
# ## What mining changes
#
# **Semi-hard** mining asks, for each pair, for the nearest negative that is still farther than the positive: it *looks for* triplets at the edge of the
# hill instead of waiting for them. **Batch-all** looks at every triplet of the batch and averages over the active ones. Both need no
# more images. How much is there in the 384 images of one batch?

# %%
batch = torch.cat([column[:128] for column in budget])
state = describe_triplets(embed(paper_network, images[batch]), labels[batch], 1.0, squared=False)
active = round(state.active * state.triplets)
assert state.triplets > 30_000 * 128
assert active > 100 * 128

# %% tags=["nbval-ignore-output"]
print(f"of 128 random triplets; in the same batch: {state.triplets:,} valid, {active:,} active")

# %% [markdown]
# So train once more: same start, same images in the same batches, same optimiser. Only this changes: instead of the 128 triplets as drawn, **all** triplets among
# the 384 images count, with chapter 2's hinge on the same distances, margin 1. And the learning rate is 0.03,
# the best of 0.1, 0.03 and 0.01 on held-back images. At 0.1 training fell apart: the mean over *active* triplets does not fade as they get fewer.


# %%
hinge_of_all = TripletLoss(margin=1.0, mining="all", squared=False)


def all_loss(network, a, p, n):
    batch = torch.cat([a, p, n])
    return hinge_of_all(network(images[batch]), labels[batch])


all_network, all_curve = train(all_loss, budget, lr=0.03)

# %%
figure, ax = plt.subplots()
curves = {
    "the 128 drawn triplets (paper's loss)": paper_curve,
    "all triplets of the batch (hinge)": all_curve,
}
plot_curves(
    curves, "error", ax, yscale="log", title="The same images teach more when all triplets count"
)
ax.set_yticks([0.3, 0.1, 0.03, 0.01], ["30 %", "10 %", "3 %", "1 %"])
ax.set_ylabel("triplet error, held back")
ax.minorticks_off()
ax.legend()
plt.show()
assert all_curve["error"].iloc[-1] < 0.6 * paper_curve["error"].iloc[-1]

# %% [markdown]
# The images, the forward and the backward pass are the same; what is new is a matrix of 384 × 384 distances. Mining and the shape of the loss changed together, and the rate with them,
# so the curve does not say which did how much. The lower rate even costs it the first few steps.

# %% [markdown]
# ## What the embeddings are worth
#
# The paper reports classification: freeze the network, embed, and train a **linear classifier** on the embeddings. Beside it kNN as in chapter 4 (k = 10). Classifier and gallery
# get 10 000 training images. This is the one place where the test images come in.

# %%
test_images, test_labels = load_mnist("test")
test_triplets = draw_triplets(test_labels, 64_000, torch.Generator().manual_seed(3))


def judge(network):
    gallery, queries = embed(network, images[:10_000]), embed(network, test_images)
    linear = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    linear.fit(gallery.numpy(), labels[:10_000].numpy())
    right = int((linear.predict(queries.numpy()) == test_labels.numpy()).sum())
    wrong = int((gaps(queries, test_triplets) >= 0).sum())
    return {
        "triplet error": Score.of_successes(wrong, 64_000),
        "linear classifier": Score.of_successes(right, 10_000),
        "kNN": knn_accuracy(queries, test_labels, gallery, labels[:10_000], k=10),
    }


# %%
results = {name: judge(net) for name, net in (("paper", paper_network), ("all", all_network))}
assert results["paper"]["linear classifier"] > 0.88
assert results["all"]["linear classifier"] > 0.92
assert results["all"]["kNN"] > results["paper"]["kNN"]

# %% tags=["nbval-ignore-output"]
pd.DataFrame(results).T.map(lambda score: f"{score:.2%}")

# %% [markdown]
# Be sober: after 49 152 images the paper's recipe is about where kNN on raw pixels was in chapter 1, 97 % (there with all 60 000 images as gallery). It is a start, not
# a failure; the longer run below shows where the same recipe goes. With all triplets counted, the same images lead well past it.

# %% [markdown]
# ## Beside the paper
#
# Their table, as the paper reports it, and ours. A number without its budget says little, so it has a column.
#
# | Data set | Who | Images seen in training | Accuracy |
# | :-- | :-- | :-- | :-- |
# | MNIST | paper | 1 920 000 an epoch | 99.54 ± 0.08 % |
# | MNIST | this chapter, the paper's recipe | 49 152 | above |
# | MNIST | this chapter, batch-all | 49 152 | above |
# | MNIST | the longer run, the paper's recipe | 384 000 | 98.94 % (linear) |
# | MNIST | chapter 4, two epochs of `fit` | 120 000 | 99.57 % (mean of five seeds) |
# | CIFAR-10 | paper | | 87.1 % |
# | SVHN | paper | | 95.37 % |
# | STL-10 | paper | | 70.67 % |
#
# The last three need other data, which is not shipped, and are not repeated here. The paper's number is a linear classifier on the embeddings.

# %% [markdown]
# ## The longer run
#
# `python tests/benchmarks/paper.py --triplets 128000 --checkpoint run.pt` goes on for longer with the same recipe on all 60 000 images. It writes its
# state every two minutes, goes on from there when it was stopped, and ends with this report. One run, seed 0, one thread of a slow server: **128 000 triplets** (384 000 images
# seen, a fifth of one epoch of the paper), 22 minutes of training. On the test set: **triplet error 0.40 %**, **linear classifier 98.94 %** (95 % interval 98.72 to 99.13), **kNN
# 98.86 %** (98.63 to 99.06).

# %% [markdown]
# This is below the paper's 99.54 ± 0.08 %, with a small part of its work. Whether the rest closes the gap was not measured; `--triplets 640000` is one epoch.

# %% [markdown]
# ## When it goes wrong: the same numbers, another library
#
# "Momentum 0.9, learning rate 0.1" looks complete. It is not. The velocity of PyTorch's SGD is v ← 0.9 v + g. The Torch library of 2014, which the authors
# used, multiplied the new gradient by 1 − momentum: v ← 0.9 v + **0.1** g. PyTorch calls that `dampening=0.9`. With it every step is a tenth as long. Train so for a
# while.

# %%
short = [column[: 32 * 128] for column in budget]
_, damped_curve = train(paper_loss, short, dampening=0.9)
undamped_curve = paper_curve.head(len(damped_curve))
torch.testing.assert_close(damped_curve["error"][0], undamped_curve["error"][0])

# %%
figure, ax = plt.subplots(figsize=(7, 3.6))
curves = {"as PyTorch steps": undamped_curve, "as Torch stepped (damped)": damped_curve}
plot_curves(
    curves, "error", ax, title="One recipe, two libraries, a tenth of the step", ylim=(0, None)
)
ax.yaxis.set_major_formatter("{x:.0%}")
ax.set_ylabel("triplet error, held back")
ax.legend()
plt.show()
assert undamped_curve["error"].iloc[-1] < 0.8 * damped_curve["error"].iloc[-1]

# %% [markdown]
# The authors' reading is patient: it suits millions of triplets. This chapter has 16 384, so it keeps PyTorch's reading, which was better on held-back images. That is our main
# departure from their code besides the budget; their learning rate also decays very slowly, ours not at all. When a reproduction fails, compare what the words *do*, not the words.

# %% [markdown]
# ## When it goes wrong: the loss on a sphere
#
# Chapters 3 and 4 scale embeddings to length one. Do that here, and the loss cannot get small: on the unit sphere no two points are farther apart than 2, so u ≥ −2 and
# no triplet gets below σ(−2)² = 0.014. Ten classes are spread best as a simplex, at √(20/9) ≈ 1.49 from each other. Forget networks and move points freely.


# %%
def best_loss(place, steps=300):
    points = torch.randn(50, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    digits = torch.arange(50) % 10
    triplets = mine_triplets(points.detach(), digits, "all")
    optimizer, path = torch.optim.Adam([points], lr=0.1), []
    for _ in range(steps):
        loss = ratio_loss(*(place(points)[column] for column in triplets))
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
assert abs(paths["unit sphere"][-1] - floor) < 0.1 * floor
assert max(paths["free"][-1], paths["sphere of radius 5"][-1]) < floor / 100

# %%
figure, ax = plt.subplots(figsize=(7, 3.6))
for (name, path), color in zip(paths.items(), (DIFFERENT, PALETTE[1], SAME), strict=True):
    ax.plot(path, color=color, label=name)
ax.axhline(floor, color="grey", linestyle=":")
ax.set(
    yscale="log",
    title="On the unit sphere this loss has a floor",
    xlabel="step",
    ylabel="mean (s⁺)²",
)
ax.legend()
plt.show()

# %% [markdown]
# At the floor every triplet is as right as can be, and still each has a gradient: the loss keeps pushing at what is finished. The mend is room to move: do not normalise, as the paper,
# or put the points on a larger sphere (other losses call that a *temperature*).
#
# ## Exercises
#
# **1.** Replace (s⁺)² by −log(1 − s⁺). What does a triplet with u = 8 say then? Check the gradient with autograd, and find the name of
# this loss among those of chapter 2.

# %% jupyter={"source_hidden": true}
u = torch.tensor([-8.0, 0.0, 8.0], requires_grad=True)
log_loss = -torch.log(1 - torch.sigmoid(u))
log_loss.sum().backward()
torch.testing.assert_close(u.grad, torch.sigmoid(u.detach()))
torch.testing.assert_close(log_loss, F.softplus(u), atol=1e-3, rtol=1e-3)
print("gradients at u = -8, 0, 8:", [round(g, 3) for g in u.grad.tolist()])
assert u.grad[2] > 100 * ratio_weight(u.detach())[2]

# %% [markdown]
# The gradient is s itself: nearly one for the hardest. It is softplus(u), the *soft margin* (`TripletLoss(margin=0, soft=True)`).
#
# **2.** Use squared distances in the trained network's triplets. Which share of random triplets is then silent, with less than a hundredth of the largest
# gradient by u?

# %% jupyter={"source_hidden": true}
embedded = embed(paper_network, held_back)
anchor, positive, negative = (embedded[column] for column in curve_triplets)
squared = (anchor - positive).square().sum(1) - (anchor - negative).square().sum(1)
silent_squared = (ratio_weight(squared) < 0.01 * 8 / 27).float().mean()
wrong_and_silent = (ratio_weight(squared)[after > 0] < 0.01 * 8 / 27).float().mean()
assert silent_squared > silent
assert wrong_and_silent > (ratio_weight(after)[after > 0] < 0.01 * 8 / 27).float().mean()

# %% [markdown]
# More than before, and many of the wrong ones are among them: squares stretch u, and the hill of the gradient stays as narrow. It would take much
# smaller embeddings.
#
# **3.** What does dropout do to distances? Embed the held-back images twice with dropout on. How far apart are two embeddings of *one* image, beside those of one digit? And the triplet error?

# %% jupyter={"source_hidden": true}
torch.manual_seed(0)
paper_network.train()
with torch.no_grad():
    first, second = paper_network(held_back), paper_network(held_back)
paper_network.eval()
noise = (first - second).norm(dim=1).mean()
a, p, n = (first[column] for column in curve_triplets)
noisy_error = ((a - p).norm(dim=1) >= (a - n).norm(dim=1)).float().mean()
clean_error = (after >= 0).float().mean()
assert noise > 0.2 * (anchor - positive).norm(dim=1).mean()
assert noisy_error > clean_error

# %% [markdown]
# **4.** Before training, how does the loss change if you multiply all embeddings by ten? Explain why the first steps are slow.

# %% jupyter={"source_hidden": true}
spread = before.abs().mean(), (10 * before).abs().mean()
slopes = [ratio_weight(factor * before).std() for factor in (1, 10)]
print("multiplying spreads u by", round(float(spread[1] / spread[0])))
assert slopes[1] > 5 * slopes[0]

# %% [markdown]
# While u ≈ 0 all triplets have the same weight ¼, right or wrong: the loss cannot tell them apart yet.

# %% [markdown]
# ## Summary
#
# - The paper's loss is the square of a sigmoid of u = d⁺ − d⁻. Its gradient 2s²(1 − s) is largest for slightly wrong triplets and dies for
#   the easy and for the hardest.
# - Random triplets soon are nearly all easy; the same images teach more when all their triplets count.
# - A recipe is what the optimiser does, not what its settings are called; a result is a number with its budget.
#
# **Next:** [8 · Image retrieval](08_image_retrieval.ipynb) searches with embeddings.
#
# ## References
#
# - E. Hoffer, N. Ailon, "Deep metric learning using Triplet network", arXiv 1412.6622, 2014; SIMBAD 2015. The authors' code:
#   github.com/eladhoffer/TripletNet.
# - F. Schroff, D. Kalenichenko, J. Philbin, "FaceNet: A unified embedding for face recognition and clustering", CVPR 2015.
# - A. Hermans, L. Beyer, B. Leibe, "In defense of the triplet loss for person re-identification", arXiv 1703.07737, 2017.
