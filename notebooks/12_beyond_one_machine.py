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
# # 12 · Beyond one machine: when a batch, a process or a memory is too small
#
# So far everything fitted: a batch held enough triplets, one process trained, one array held all embeddings. Here each of the three gets too
# small in turn, and each time the same few lines go on, with torch's own distributed engine and FAISS's own large indices.
#
# - **You will learn** to take positives and negatives from outside the batch, from a memory of past ones, say; to train one network in
#   several processes with the loss of the whole batch; to search ten million vectors in two gigabytes, from the disk and in
#   parts; and when none of this pays.
# - **You need** chapters [2](02_triplets.ipynb), [4](04_training.ipynb), [8](08_image_retrieval.ipynb) and, for one example, [11](11_recommendation.ipynb); no GPU.
# - **Running time** about 4 minutes on two cores.
# - Previous: [11 · Recommendation](11_recommendation.ipynb)

# %%
import copy
import itertools
import json
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import psutil
import torch
import torch.nn.functional as F
from matplotlib.ticker import PercentFormatter
from sklearn.decomposition import PCA
from torch import nn

from tripletlib import (
    BalancedBatchSampler,
    EmbeddingNet,
    ResidualNet,
    SearchIndex,
    TripletLoss,
    batch_all_triplet_loss,
    describe_triplets,
    embed,
    fit,
    jitter,
    jitter_colours,
    load_emoji,
    load_libraries,
    load_mnist,
    pairwise_distances,
)
from tripletlib.plotting import DIFFERENT, PALETTE, SAME, use_theme

use_theme()

# %% [markdown]
# ## Positives from elsewhere
#
# A batch gives each anchor the positives and negatives that happen to be in it. Nothing in the loss asks for that: the anchors may stand
# in one set of embeddings and what they are compared with in another, a **reference set** (the memory of a queue, other processes' rows).
# The distances are then a matrix of n × r instead of n × n; counting active triplets by sorting, as in chapter [2](02_triplets.ipynb), stays the same.
# So a batch can be taken in two halves, each against all of it. Do they add up?

# %% tags=["nbval-ignore-output"]
images, labels = load_mnist("train")
points, classes = F.normalize(images[:512].flatten(1)), labels[:512]
points.requires_grad_()


def gradient_of(*losses):
    """The gradient of a sum of losses by the points."""
    return torch.autograd.grad(sum(losses), points, retain_graph=True)[0]


whole = batch_all_triplet_loss(points, classes, reduction="sum")
halves = [
    batch_all_triplet_loss(
        points[rows], classes[rows], reduction="sum", reference=points, reference_labels=classes
    )
    for rows in (slice(0, 256), slice(256, 512))
]
away = (gradient_of(*halves) - gradient_of(whole)).norm() / gradient_of(whole).norm()
print(f"the sum over all triplets: {whole:.1f}; by halves: {halves[0]:.1f} + {halves[1]:.1f}")
print(f"gradients differ by {away:.0e} of their length")
assert torch.allclose(sum(halves), whole, rtol=1e-5)
assert away < 1e-5

# %% [markdown]
# They do, in value and in gradient, because every triplet has exactly one anchor. One thing has to be known: which row of the reference *is*
# the anchor, since nobody is their own positive. Here the halves are slices of the same memory, which the loss sees by itself. Of a copy it
# cannot know; "When it goes wrong" shows what then happens, and the argument `anchor_rows` that prevents it.
#
# And what does a reference cost? The matrix of distances has n × r entries, so twice the rows should take twice the time. A *batch* of r rows has r × r.


# %% alt="Seconds of the loss against rows, both axes logarithmic. The line of 512 anchors against so many rows rises less steeply than that of a batch of so many rows; they start close together at 512 rows, and at 4 096 the batch takes several times as long." tags=["nbval-ignore-output"]
def seconds_of(embeddings, kinds, **reference):
    """Time of one loss and its gradient, the best of five."""
    embeddings, times = embeddings.clone().requires_grad_(), []
    for _ in range(5):
        start = time.perf_counter()
        batch_all_triplet_loss(embeddings, kinds, **reference).backward()
        times.append(time.perf_counter() - start)
    return min(times)


sizes = [512, 1024, 2048, 4096]
many, of_many = F.normalize(torch.randn(4096, 64)), torch.arange(4096) % 10
took = pd.DataFrame(
    index=sizes, columns=["512 anchors against r rows", "a batch of r rows"], dtype=float
)
for r in sizes:
    given = {"reference": many[:r], "reference_labels": of_many[:r]}
    took.loc[r] = seconds_of(many[:512], of_many[:512], **given), seconds_of(many[:r], of_many[:r])
figure, ax = plt.subplots(figsize=(8, 3.2))
for name, color in zip(took, (SAME, DIFFERENT), strict=True):
    ax.loglog(sizes, took[name], "o-", color=color)
    ax.annotate(
        name, (sizes[-1], took[name].iloc[-1]), (8, -4), textcoords="offset points", color=color
    )
ax.set(
    title="With more rows a reference costs less than a batch",
    xlabel="r rows",
    ylabel="seconds",
    xlim=(450, 15_000),
)
ax.set_xticks(sizes, sizes)
ax.minorticks_off()
growth = took.iloc[-1] / took.iloc[0]
print(f"with eight times the rows {growth.iloc[0]:.0f} and {growth.iloc[1]:.0f} times the time")
assert growth.iloc[1] > 1.5 * growth.iloc[0]

# %% [markdown]
# ## Alike without labels
#
# And sometimes there is no label. Two projects of chapter [11](11_recommendation.ipynb) are alike if they share many libraries: a *graded similarity*,
# cut at some level. That is no division into classes, because A may be like B and B like C, but A not like C.
# Instead of labels the losses take a boolean matrix `same`: row a says which rows are the anchor's positives; all others are its negatives.

# %%
uses = torch.from_numpy(load_libraries().uses[:400].toarray())
common = uses @ uses.T
sizes = uses.sum(dim=1)
jaccard = common / (sizes[:, None] + sizes - common)  # shared libraries, of all that either uses
same = jaccard >= 0.3
same.fill_diagonal_(True)
two_steps = (same.float() @ same.float() > 0) & ~same
alike, by_a_third = int(same.sum() - 400) // 2, int(two_steps.sum()) // 2
print(f"{alike} pairs are alike; {by_a_third} others are both like a third")
assert by_a_third > alike

# %% [markdown]
# Each of these others is a pair that no labels could say: with labels, two that are of a third one's class are of one class. (The level, 0.3, is our choice.) Is the loss with `same` what we mean? Put the projects anywhere, and go through all triplets by hand.

# %%
torch.manual_seed(0)
places = torch.randn(400, 8, dtype=torch.float64)
loss, active = batch_all_triplet_loss(places, same=same, return_active=True)
gaps = []
for a in range(400):
    squared = (places[a] - places).square().sum(dim=1)
    positive = same[a] & (torch.arange(400) != a)
    gaps.append((squared[positive][:, None] - squared[~same[a]] + 0.2).flatten())
by_hand = torch.cat(gaps).relu()
number = (by_hand > 0).sum()
print(f"by the loss: {active:,} active triplets, their mean {loss:.4f}")
print(f"by hand:     {number:,} active triplets, their mean {by_hand.sum() / number:.4f}")
assert active == number
assert torch.isclose(loss, by_hand.sum() / number)

# %% [markdown]
# Several labels an item (a picture of a dog *and* a beach) are
# the same case: alike are those that share one. `mine_triplets`, `describe_triplets` and all minings of `TripletLoss` take `reference` and `same` as well.

# %% [markdown]
# ## A memory of past batches
#
# A triplet needs a positive. When a GPU holds only 64 images at a time, and they are drawn at random from 827 emoji with five to eight drawings each (chapter
# [8](08_image_retrieval.ipynb), at half size to save time), how many anchors find one? And how many would, if the 2 048 images before were still there?

# %%
emoji, new = load_emoji("train"), load_emoji("test")
kinds = emoji.labels.unique(return_inverse=True)[1]
small, small_new = (F.avg_pool2d(part.images, 2) for part in (emoji, new))


def with_positive(others, batch=64, trials=100):
    """Share of the anchors of a random batch that have a positive in it or among so many others."""
    shares = []
    for _ in range(trials):
        drawn = kinds[torch.randperm(len(kinds))[: batch + others]]
        shares.append(((drawn[:batch, None] == drawn).sum(dim=1) > 1).float().mean())
    return float(torch.stack(shares).mean())


torch.manual_seed(0)
alone, remembered = with_positive(0), with_positive(2048)
print(f"anchors with a positive: {alone:.0%} in a batch of 64, {remembered:.0%} with 2 048 more")
assert alone < 0.1 < 0.8 < remembered

# %% [markdown]
# Seven of a hundred anchors, against more than nine of ten. The images of past batches are gone, but their *embeddings* are small: 768 numbers each. So keep them. **Cross-batch
# memory** (Wang et al. 2020) is a queue: each batch is compared with itself and with the embeddings of the last r images, then takes the place of the oldest. No gradient
# flows into the memory, because the networks that made those embeddings are gone; it flows into the anchors alone.


# %%
class CrossBatchMemory(nn.Module):
    def __init__(self, loss, rows, dimensions=768):
        super().__init__()
        self.loss = loss
        self.register_buffer("points", torch.zeros(rows, dimensions))
        self.register_buffer("labels", torch.zeros(rows, dtype=torch.int64))
        self.register_buffer("seen", torch.tensor(0))

    def forward(self, points, labels):
        own, filled = torch.arange(len(points)), min(int(self.seen), len(self.points))
        own = own.to(points.device)
        others = torch.cat([points, self.points[:filled]])
        theirs = torch.cat([labels, self.labels[:filled]])
        value = self.loss(
            points, labels, reference=others, reference_labels=theirs, anchor_rows=own
        )
        rows = (self.seen + own) % len(self.points)
        self.points[rows], self.labels[rows] = points.detach(), labels
        self.seen += len(points)
        return value


# %% [markdown]
# The reference is the batch, then the memory. `anchor_rows` says which of its rows is the anchor itself: `torch.cat` copies, and a copy is not recognised. Queue, labels and count are *buffers*
# (tensors that belong to a module and are not trained), so that they go to the network's device and into checkpoints. Is the loss the one that we mean? Go through all
# triplets of a second batch by hand, with squared distances, as `TripletLoss` takes them.

# %%
torch.manual_seed(0)
first, second = F.normalize(torch.randn(2, 12, 4), dim=2)
y1, y2 = torch.randint(3, (2, 12))
tiny = CrossBatchMemory(TripletLoss(margin=0.2), rows=100, dimensions=4)
by_module = [tiny(first, y1), tiny(second, y2)]
others, theirs = torch.cat([second, first]), torch.cat([y2, y1])
losses = []
for a, row in enumerate((second[:, None] - others).square().sum(dim=2)):
    positive = (theirs == y2[a]) & (torch.arange(24) != a)
    losses += (row[positive][:, None] - row[theirs != y2[a]] + 0.2).flatten().tolist()
by_hand = np.mean([value for value in losses if value > 0])
print(f"by hand {by_hand:.4f}, by the module {by_module[1]:.4f}")
assert abs(by_hand - by_module[1]) < 1e-5
of_first = TripletLoss(margin=0.2)(first, y1)
print(f"of the first batch, before which nothing is remembered: {of_first:.4f}, {by_module[0]:.4f}")
assert torch.isclose(by_module[0], of_first, rtol=1e-5)

# %% [markdown]
# Does it help? Three networks start alike and take two epochs, some 180 steps, each. The first two meet the same batches of 64, drawn at random; one has a memory, and nothing else differs. The third has
# *balanced batches* of 16 × 4, which also bring positives in, and keeps nothing. While the one with memory trains, 300 drawings of new emoji are embedded every 16 steps, to see how far they move.


# %% tags=["nbval-ignore-output"]
def redraw(images):
    return jitter_colours(jitter(images))


def found_first(embeddings):
    """Which new drawings have a counterpart for their nearest other."""
    nearest = pairwise_distances(F.normalize(embeddings)).fill_diagonal_(torch.inf).argmin(dim=1)
    return new.labels[nearest] == new.labels


def train_with(loss, looks=None, **batches):
    """Train, look at 300 drawings every 16 steps, and tell which new drawings find a counterpart."""
    torch.manual_seed(0)
    network = ResidualNet()

    def look(history):
        if looks is not None and len(history) % 16 == 0:
            with torch.no_grad():  # a copy, so that the running means stay as they are
                looks.append(copy.deepcopy(network).train()(small_new[:300]))

    options = {"epochs": 2, "augment": redraw, "seed": 0, "progress": False, "callback": look}
    history = fit(network, small, kinds, loss=loss, **options, **batches)
    return found_first(embed(network, small_new)), history


# %% tags=["nbval-ignore-output"]
plain, looks = TripletLoss(margin=0.2), []
remembering = CrossBatchMemory(TripletLoss(margin=0.2), rows=2048)
balanced = BalancedBatchSampler(kinds, classes_per_batch=16, images_per_class=4)
right = {"at random": train_with(plain, batch_size=64)[0]}
right["with memory"], history = train_with(remembering, looks, batch_size=64)
right["balanced"] = train_with(plain, batch_sampler=balanced)[0]
right["pixels"] = found_first(1 - small_new.flatten(1))
first_right = {name: float(found.float().mean()) for name, found in right.items()}
print("Recall@1:", ", ".join(f"{name} {share:.1%}" for name, share in first_right.items()))
a, b = right["with memory"], right["at random"]
print(f"of {len(a):,}, right only with memory {(a & ~b).sum()}, only without {(b & ~a).sum()}")
assert first_right["with memory"] > first_right["at random"] + 0.05
assert (a & ~b).sum() > 1.5 * (b & ~a).sum()

# %% [markdown]
# Paired on the same 2 450 drawings, the memory wins 413 first answers and loses 124: Recall@1 rises from 28.7 to 40.5 %. The simplest rival does as well: balanced batches reach 40.4 %, at less cost a step. And pixels find 39.2 % without training: two epochs are little (chapter 8 takes twelve), but enough to compare ways of making batches.
# Why may embeddings be stale at all? Because the network changes slowly, says the paper (*slow drift*). Look at it.


# %% alt="Two lines against the step. How far embeddings move in 16 steps falls from 0.9 of the distance between classes at step 32 to below 0.05 from step 144 on. The learning rate, dashed, rises until step 37, then falls to zero." tags=["nbval-ignore-output"]
def ways(looks):
    """Between looks: squared way of an image, and of all together, in distances of two classes."""
    differ = new.labels[:300, None] != new.labels[:300]
    apart = pairwise_distances(looks[-1], squared=True)[differ].mean()
    steps = [after - before for before, after in itertools.pairwise(looks)]
    each = [float(step.square().sum(dim=1).mean() / apart) for step in steps]
    return np.array(each), np.array([float(s.mean(dim=0).square().sum() / apart) for s in steps])


each, together = ways(looks)
figure, ax = plt.subplots(figsize=(8, 3.4))
ax.plot(16 * np.arange(2, len(looks) + 1), each, "o-", color=SAME)
rate = history["learning_rate"] / history["learning_rate"].max()
ax.plot(rate, "--", color=PALETTE[7])
ax.annotate(
    "moved in 16 steps",
    (80, each[3]),
    (-8, -16),
    textcoords="offset points",
    ha="right",
    color=SAME,
)
ax.annotate(
    "learning rate (of its peak)",
    (95, rate[95]),
    (8, 4),
    textcoords="offset points",
    color=PALETTE[7],
)
ax.set(
    title="Drift is slow only when the learning rate is",
    xlabel="step",
    ylabel="squared, of classes' distance",
    ylim=(0, 1.1),
)
plt.show()

# %% tags=["nbval-ignore-output"]
print(f"16 steps move {each[0]:.2f} of the distance of two classes early, {each[-1]:.3f} late")
assert each[0] > 20 * each[-1]
assert each[0] > 0.3

# %% [markdown]
# So drift is *not* slow here, at first. A memory of 2 048 holds 32 batches, and in half of that time an image moves, squared, 0.86 times as far as two classes lie apart at the end. In the last steps it is a thousandth, because the learning rate falls. Early
# memories are therefore nearly wrong; but a memory that starts after 1 000 images does no better (40.2 % against 40.5, on classes held back, three seeds of `tests/benchmarks/cross_batch_memory.py`).

# %% [markdown]
# One seed decides little, and a step with a memory costs more than one without. So that program, with `--final`, gives every way the same seconds (three epochs with a memory, four without, six of batches of 256) and asks for the same new drawings, with five seeds:
#
# | way, equal seconds | Recall@1 (mean ± standard deviation) | minus random batches with memory (95 % interval) |
# |---|---|---|
# | random batches of 64 | 29.4 ± 1.6 % | −11.7 (−14.3 to −9.1) |
# | random batches of 256 | 37.7 ± 1.4 % | −3.4 (−5.3 to −1.5) |
# | random batches of 64, memory of 2 048 | 41.1 ± 0.8 % | |
# | balanced batches of 16 × 4 | 43.1 ± 1.5 % | 2.0 (0.7 to 3.3) |
# | balanced batches, memory of 2 048 | 25.9 ± 2.7 % | −15.3 (−18.1 to −12.5) |
#
# A memory beats the larger batch that the same seconds buy, and balanced batches beat the memory. It is for where balanced batches cannot be drawn: classes that are not known in advance, or that come as a stream.
#
# Its price grows with its rows: the loss of 64 images takes 3 ms alone, 22 with 1 024 rows, 127 with 4 096 and 677 with 16 384, beside 42 ms of the network (`--cost`, one thread); a row is kept in 3 KiB, where an image in the batch keeps 278 KiB for the way back.

# %% [markdown]
# A memory must also survive a break. Stop a small run when its second epoch begins, and start it again from its checkpoint with an *empty* memory: are the weights those of a run without a break?

# %%
few = torch.nonzero(kinds < 40)[:, 0]


def small_run(folder, stop_in=None):
    torch.manual_seed(0)
    network, loss = ResidualNet(), CrossBatchMemory(TripletLoss(margin=0.2), rows=256)
    fit(
        network, small[few], kinds[few], loss=loss, epochs=2, batch_size=64, seed=0, progress=False,
        checkpoint=folder, callback=lambda history: bool(history["epoch"][-1] == stop_in),
    )  # fmt: skip
    return torch.cat([*map(torch.flatten, network.parameters()), loss.points.flatten()])


with TemporaryDirectory() as one, TemporaryDirectory() as two:
    straight, broken_off = small_run(one), small_run(two, stop_in=1)
    resumed = small_run(two)
same_end = [torch.equal(straight, other) for other in (broken_off, resumed)]
print(f"the weights of the run without a break: broken off {same_end[0]}, resumed {same_end[1]}")
assert same_end == [False, True]

# %% [markdown]
# They are, because the memory is made of the loss's *buffers*, and `fit` puts the loss into the checkpoint beside the network.

# %% [markdown]
# ## One network, several processes
#
# When one machine is too slow, several **processes** share the work: each with the same network, each with a share of every batch. This is *data-parallel* training, and torch has
# an engine for it, started by `torchrun`. For most losses it is simple: each process computes the loss of its share, and the gradients are averaged. For triplets that would be
# another loss. How many triplets of a batch of 512 stay within the halves?

# %%
in_halves = [labels[:256], labels[256:512]]
triplets = [
    describe_triplets(torch.rand(len(part), 2), part).triplets
    for part in (labels[:512], *in_halves)
]
print(f"{triplets[0]:,} triplets in a batch of 512 digits, {sum(triplets[1:]):,} within its halves")
assert 0.2 < sum(triplets[1:]) / triplets[0] < 0.3

# %% [markdown]
# A quarter: all three members have to be in the same half. So `fit` does otherwise. Each process embeds its share; then all **gather** the embeddings (512 rows of
# 64 numbers, 131 kB, little beside the images and the work); each computes the loss of the *whole* batch, keeps the gradient of its own rows, sends it back through the
# network, and only then are the weights' gradients put together. It is the same call of `fit`; that there are several processes it learns from `torchrun`. Here is a
# program for a small network without batch normalisation, in double precision, so that we can look for a difference:

# %%
folder = TemporaryDirectory()
here = Path(folder.name)
(here / "small.py").write_text("""
import os, sys, torch
from torch import nn
from tripletlib import fit, load_mnist

images, labels = (part[:3000] for part in load_mnist("train"))
torch.manual_seed(0)
layers = nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 32)
network = nn.Sequential(*layers).double()

def watch(history):  # the second process dies at a step, if one is named
    if os.environ["RANK"] == "1" and str(len(history)) in sys.argv[2:]:
        os._exit(1)

fit(network, images.double(), labels, epochs=3, batch_size=500, seed=0, augment=False,
    optimizer=torch.optim.Adam, checkpoint=sys.argv[1], callback=watch, progress=False)
""")


def torchrun(processes, program, *arguments):
    """Start a program in so many processes; return what it said."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", processes, here / program, *arguments]
    ended = subprocess.run(list(map(str, command)), cwd=here, capture_output=True, encoding="utf-8")
    if ended.returncode != 0:
        raise RuntimeError(ended.stderr)
    return ended.stdout


def weights(file):
    """The network's weights in a checkpoint, in one row."""
    state = torch.load(here / file, weights_only=True)["parts"][0]
    return torch.cat([weight.flatten() for weight in state.values()])


for processes in (1, 2, 3):
    torchrun(processes, "small.py", f"by_{processes}.pt")
difference = max((weights(f"by_{n}.pt") - weights("by_1.pt")).abs().max() for n in (2, 3))
print(f"weights after 18 steps differ by less than 1e-9: {bool(difference < 1e-9)}")
assert difference < 1e-9

# %% [markdown]
# On a command line the same is `torchrun --nproc-per-node 2 small.py by_2.pt`; on several machines, each starts it with `--nnodes` and the address of the first. Two and three
# processes take the steps of one, but for the order in which sums are rounded. Not so with *batch normalisation*: its means are over what a process sees, its share, so the steps are slightly others
# (on GPUs, `torch.nn.SyncBatchNorm.convert_sync_batchnorm(network)` takes them over the whole batch; on the CPU torch has no such thing). On GPUs, put
# the network on `cuda:LOCAL_RANK`: the processes then speak by NCCL instead of Gloo.
#
# Only the first process (*rank* 0) shows a bar and writes the checkpoint. What if another one dies in between?

# %%
try:
    torchrun(2, "small.py", "broken.pt", 9)  # dies in the second of three epochs
    died = False
except RuntimeError:
    died = True
epochs_kept = torch.load(here / "broken.pt", weights_only=True)["epoch"]
torchrun(2, "small.py", "broken.pt")  # the same command again
is_same = torch.equal(weights("broken.pt"), weights("by_2.pt"))
print(f"one died, and all ended with an error: {died}; epochs in the checkpoint: {epochs_kept}")
print(f"started again, it came to the weights of the run without a break: {is_same}")
assert died
assert epochs_kept == 1
assert is_same

# %% [markdown]
# All end, because a process that waited for a dead one would wait for ever; and nothing is lost but the epoch that was begun.
#
# **What is gained?** Here is the book's own network on a batch of 512, on this one machine: one process with one or two threads, and two and four
# processes of one thread each.

# %% tags=["nbval-ignore-output"]
(here / "timed.py").write_text("""
import json, os, psutil, sys, numpy as np, torch
from tripletlib import EmbeddingNet, fit, load_mnist

def most():  # bytes that this process has held at most
    if os.name == "nt":
        return psutil.Process().memory_info().peak_wset
    import resource
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

torch.set_num_threads(int(sys.argv[1]))
images, labels = (part[:3072] for part in load_mnist("train"))
history = fit(EmbeddingNet(), images, labels, epochs=1, seed=0, progress=False)
if os.environ["RANK"] == "0":
    print(json.dumps([float(np.median(np.diff(history["seconds"]))), most() / 1e9]))
""")
starts = {
    "1 process": (1, 1),
    "1 process,\n2 threads": (1, 2),
    "2 processes": (2, 1),
    "4 processes": (4, 1),
}
rows = {
    name: json.loads(torchrun(processes, "timed.py", threads))
    for name, (processes, threads) in starts.items()
}
times = pd.DataFrame(rows, index=["seconds a step", "GB a process"]).T
times["processes"] = [processes for processes, _ in starts.values()]
times["GB in all, at most"] = times["GB a process"] * times["processes"]
print(times.rename(index=lambda name: name.replace("\n", " ")).round(2).to_string())


# %% alt="Two rows of bars. Seconds a step: 0.7 for one process, about 0.4 for one with two threads, for two processes and for four. Gigabytes in all: 1.3, 1.3, 2.4 and 4.6." tags=["nbval-ignore-output"]
fig, axes = plt.subplots(1, 2, figsize=(9, 2.6), sharey=True)
for ax, column, title in zip(
    axes,
    ("seconds a step", "GB in all, at most"),
    ("seconds a step: two threads do as well", "GB in all: each process has its own"),
    strict=True,
):
    bars = ax.barh(times.index[::-1], times[column][::-1], color=PALETTE[0])
    ax.bar_label(bars, fmt="%.2f", padding=4)
    ax.set(title=title, xticks=[], xlim=(0, 1.2 * times[column].max()))

two = times.loc[["1 process,\n2 threads", "2 processes"]]
ratio = two.iloc[1] / two.iloc[0]
print(
    f"two processes beside two threads: {ratio['seconds a step']:.2f} times as long a step,",
    end=" ",
)
print(f"{ratio['GB in all, at most']:.1f} times the memory")
assert 0.5 < ratio["seconds a step"] < 1.8
assert ratio["GB in all, at most"] > 1.5

# %% [markdown]
# On one machine, hardly anything: one process with two threads uses the same two cores, and all images, torch itself and the gradients lie in memory once. Four processes on the two cores of this machine only wait for
# each other. So *what fits on one machine is better off in one process*. Further machines (or GPUs, of which `fit` uses one a process) bring cores of their own.
# What they cost is the exchange: of the embeddings, and of a gradient as large as the network. And one part is not shared out at all: the loss, which each computes for the whole batch.

# %% tags=["nbval-ignore-output"]
network, batch = EmbeddingNet(), images[:512]
seconds = {"loss": [], "network": []}
for _ in range(5):
    start = time.perf_counter()
    embeddings = network(batch)
    middle = time.perf_counter()
    value = TripletLoss()(embeddings, labels[:512])
    end = time.perf_counter()
    value.backward()
    seconds["loss"].append(end - middle)
    seconds["network"].append(time.perf_counter() - end + middle - start)
loss_time, network_time = (min(seconds[part]) for part in ("loss", "network"))
sent = 4 * (sum(weight.numel() for weight in network.parameters()) + 512 * 64)
exchange = 2 * sent / 125e6  # there and back at a gigabit a second, which is 125 MB
print(f"network {network_time:.3f} s, loss {loss_time:.3f} s, of which none is shared out")
print(f"to exchange: {sent / 1e6:.1f} MB, {exchange:.3f} s")
for machines in (2, 4, 8, 16):
    gain = (network_time + loss_time) / (network_time / machines + loss_time + exchange)
    print(f"{machines:2} machines: {gain:4.1f} times as fast, by this reckoning")
assert loss_time < 0.3 * network_time

# %% [markdown]
# That is reckoned, not measured; there is one machine here. At a gigabit a second sixteen machines are some five times as fast as one, because then most of a step goes to the exchange. Faster lines (between the GPUs of one machine, say) move that limit. Measure before you rent.
#
# The embeddings of what is too much for one memory are written to a file, too: `embed(network, data, out="points.npy")` writes batch by batch,
# in several processes each its share, and gives back the file *mapped into memory*: what is looked at is read, nothing else.

# %%
written = embed(network, images[:5000], out=here / "points.npy")
as_array = np.load(here / "points.npy", mmap_mode="r")
print(f"points.npy: {as_array.shape}, {(here / 'points.npy').stat().st_size:,} bytes")
assert np.array_equal(as_array, written)
assert torch.allclose(written, embed(network, images[:5000]), atol=1e-6)

# %% [markdown]
# ## Ten million vectors in two gigabytes
#
# Ten million embeddings of 32 numbers are 1.28 GB, a billion 128 GB, and most have more numbers. So a large
# index keeps *codes* instead of vectors, is built from a file chunk by chunk, may stay on the disk, and may be divided among machines. `SearchIndex` does none of this: it is for what fits into memory. The FAISS below it does each in a few lines. All that
# is to take less than two gigabytes more than the process holds now, which we watch. (The vectors alone would fit, in 1.28 GB; the codes take 160 MB, and the rest is a chunk at a time being made.)


# %%
def memory():
    """MB that this process holds."""
    return psutil.Process().memory_info().rss / 1e6


def most_memory():
    """MB that it held at most since the cell that defines this; only Linux tells, else nan."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    found = [line.split()[1] for line in lines if line.startswith("VmHWM")]
    return float(found[0]) * 1024 / 1e6 if found else np.nan


if Path("/proc/self/clear_refs").exists():
    Path("/proc/self/clear_refs").write_text("5")  # forget the most so far
before = memory()

# %% [markdown]
# ### Ten million, made from sixty thousand
#
# No data set of ten million pictures comes with this book, so we make vectors from real ones and say how. The real ones are the 60 000 training digits, each as its first 32 principal components. PCA, because it takes a moment and needs no training; what a network would give is
# searched in the same way. A made vector lies at a random place between a real digit and one of its eight nearest of the same class, moved a little at random in all 32 directions. **Queries are real**: 250 test digits.

# %% tags=["nbval-ignore-output"]
test_images, _ = load_mnist("test")
pca = PCA(32, random_state=0).fit(images.flatten(1).numpy())
real = torch.from_numpy(pca.transform(images.flatten(1).numpy())).float()
queries = pca.transform(test_images[::40].flatten(1).numpy()).astype("float32")
near = torch.empty(len(real), 8, dtype=torch.int64)
for digit in range(10):
    rows = torch.nonzero(labels == digit)[:, 0]
    found = SearchIndex(real[rows]).search(real[rows], k=9)[1]
    near[rows] = rows[found[:, 1:]]  # the first is the digit itself
del test_images
print(f"32 components hold {pca.explained_variance_ratio_.sum():.0%} of the pixels' variance")
assert 0.7 < pca.explained_variance_ratio_.sum() < 0.8


# %%
def make(count, seed):
    """Vectors between real neighbours of one class, and that class."""
    draw = torch.Generator().manual_seed(seed)
    one = torch.randint(len(real), (count,), generator=draw)
    other = near[one, torch.randint(8, (count,), generator=draw)]
    made = torch.lerp(real[one], real[other], torch.rand(count, 1, generator=draw))
    return made.add_(torch.randn(made.shape, generator=draw), alpha=0.5), labels[one]


# %% [markdown]
# Are made vectors as hard to search as real ones? Put 60 000 of each into the same small index and ask it the same queries. If the made ones crowded in fewer places, or lay on lines,
# the index would find their neighbours more easily.


# %%
import faiss


def recall(found, right, k=10):
    """The share of the k nearest that are among the first k found."""
    return float((found[:, :k, None] == right[:, None, :k]).any(axis=2).mean())


# %% tags=["nbval-ignore-output"]
def difficulty(points):
    squared, right = faiss.knn(queries, points.numpy(), 10)
    trained = faiss.index_factory(32, "IVF256,PQ8np")
    trained.train(points[:: len(points) // 15_000].numpy())
    trained.add(points.numpy())
    trained.nprobe = 4
    nearest, tenth = np.sqrt(np.median(squared[:, [0, 9]], axis=0))
    return nearest, tenth, recall(trained.search(queries, 10)[1], right)


trial = {"60 000 real": real, "60 000 made": make(60_000, seed=1)[0]}
trial = {name: difficulty(points) for name, points in trial.items()}
for name, (nearest, tenth, share) in trial.items():
    print(
        f"{name}: nearest at {nearest:.2f}, tenth at {tenth:.2f}; of the ten {share:.1%} are found"
    )
assert abs(trial["60 000 made"][2] - trial["60 000 real"][2]) < 0.06

# %% [markdown]
# They are about as hard. With ten million the likeness will end, because made vectors only fill the gaps between the 60 000 real ones: the nearest hardly come nearer, but there are *many* at nearly the same distance. That makes their order harder to get right
# than in a real catalogue. Nothing below says how well digits are recognised; only what an index finds, how fast, in how much memory.
#
# ### Written once, read in chunks
#
# The ten million go to a file, in 16-bit numbers: 640 MB. From here on *these* rounded numbers are the catalogue. No more than a million are in memory at a time.

# %% tags=["nbval-ignore-output"]
COUNT, CHUNK = 10_000_000, 1_000_000
vectors = TemporaryDirectory()  # removed at the end
file = Path(vectors.name) / "vectors.f16"
start = time.perf_counter()
with file.open("wb") as stream:
    for seed in range(COUNT // CHUNK):
        make(CHUNK, seed)[0].half().numpy().tofile(stream)
make_seconds = time.perf_counter() - start
print(f"{file.stat().st_size / 1e6:.0f} MB in {make_seconds:.0f} s")
assert file.stat().st_size == COUNT * 32 * 2


# %%
def chunks():
    """Where each chunk starts, and its vectors."""
    with file.open("rb") as stream:
        for start in range(0, COUNT, CHUNK):
            rows = np.fromfile(stream, np.float16, CHUNK * 32).reshape(CHUNK, 32)
            yield start, torch.from_numpy(rows).float().numpy()


# %% [markdown]
# ### What is right? An exact search in chunks
#
# Recall needs the truth: the ten nearest of each query among all ten million. `faiss.knn` compares with everything it is given, so give it one chunk after the other. The ten nearest of all are among the ten nearest of each chunk, because
# whoever is not among the first ten of its own chunk has ten nearer ones there. So keep ten of each and **merge** them. FAISS returns *squared* distances, which have the same order.


# %%
def merge(answers, k=10):
    """The k nearest of several answers: squared distances, and rows of the catalogue."""
    squared, rows = (np.concatenate(parts, axis=1) for parts in zip(*answers, strict=True))
    order = squared.argsort(axis=1, kind="stable")[:, :k]
    return np.take_along_axis(squared, order, axis=1), np.take_along_axis(rows, order, axis=1)


# %% tags=["nbval-ignore-output"]
answers, exact_seconds = [], 0.0
for offset, chunk in chunks():
    start = time.perf_counter()
    squared, rows = faiss.knn(queries, chunk, 10)
    exact_seconds += time.perf_counter() - start
    answers.append((squared, rows + offset))
true_squared, exact_rows = merge(answers)
exact_ms = exact_seconds / len(queries) * 1e3
nearest, tenth = np.sqrt(np.median(true_squared[:, [0, 9]], axis=0))
print(f"{exact_ms:.0f} ms a query; the nearest at {nearest:.2f}, the tenth at {tenth:.2f}")
assert tenth / nearest < 1.2 < trial["60 000 real"][1] / trial["60 000 real"][0]

# %% [markdown]
# The tenth nearest is only a tenth farther than the nearest; among the 60 000 real ones it was a third. Such crowding is what approximate search finds hard.
#
# ### Codes of eight bytes
#
# `index_factory` builds an index from a word. `IVF2048` are 2 048 **cells** (*inverted lists*), found by k-means; their centres, which say roughly where a vector lies, are the **coarse quantiser**. `PQ8` is **product quantisation**, as in chapter 8, of the
# *difference* from the cell's centre: 8 pieces of four numbers, a byte each. With its row number, eight bytes more, a vector takes 16 bytes instead of 128. (`np` leaves out *polysemous* codes, which take most of the training and are not used here.)

# %% tags=["nbval-ignore-output"]
sample = np.concatenate([chunk[::100] for _, chunk in chunks()])
start = time.perf_counter()
index = faiss.index_factory(32, "IVF2048,PQ8np")
index.train(sample)
train_seconds = time.perf_counter() - start
empty = faiss.clone_index(index)  # trained, holds nothing: for the shards below
add_seconds = 0.0
for _, chunk in chunks():
    start = time.perf_counter()
    index.add(chunk)
    add_seconds += time.perf_counter() - start
print(f"trained on {len(sample):,} in {train_seconds:.1f} s", end=", ")
print(f"added {index.ntotal:,} in {add_seconds:.0f} s")
assert index.ntotal == COUNT

# %% [markdown]
# **Training** places the centres and learns the codes, from a sample: every hundredth vector of every chunk, 49 a cell (FAISS warns below 39). **Adding** finds each vector's cell and writes its code. Ten million times 2 048 distances are most of the work, so there
# are no more cells here; FAISS's guidelines say 65 536 for ten million, with a graph to find the cell (`IVF65536_HNSW32`).

# %% tags=["nbval-ignore-output"]
centres = index.nlist * 32 * 4
codes = index.ntotal * (index.code_size + 8)
print(f"{index.code_size} bytes a code and 8 a row number: {codes / 1e6:.0f} MB")
print(f"centres of {index.nlist:,} cells: {centres / 1e6:.1f} MB")
print(f"as float32 the vectors would be {COUNT * 128 / 1e6:,.0f} MB")
print(f"the process holds {memory():.0f} MB, {memory() - before:.0f} more than at the start")
assert codes * 8 == COUNT * 128

# %% [markdown]
# ### Recall against time, and re-ranking
#
# `nprobe` is how many cells a query looks into. More cells find more, up to what the codes can tell apart: neighbours of like codes cannot be put in order. So let the codes choose 100 **candidates**, read these from the file, and sort them by their
# true distances: **re-ranking**. `np.memmap` makes the file look like an array, of which only the rows asked for are read. In the table, "@1" is the share of queries whose nearest comes first, "@10" the share of the ten nearest among the first ten found.

# %% tags=["nbval-ignore-output"]
on_disk = np.memmap(file, np.float16, "r", shape=(COUNT, 32))


def rerank(rows, k=10):
    """Candidates put in the order of their true squared distances."""
    vectors = on_disk[np.maximum(rows, 0)].astype(np.float32)
    squared = ((vectors - queries[:, None]) ** 2).sum(axis=2)
    squared[rows < 0] = np.inf  # FAISS gives -1 where it met fewer than it was asked for
    order = squared.argsort(axis=1)[:, :k]
    return np.take_along_axis(rows, order, axis=1)


def timed(search):
    """What is found, and milliseconds a query: the best of three."""
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        found = search()
        seconds.append(time.perf_counter() - start)
    return found, min(seconds) / len(queries) * 1e3


# %% tags=["nbval-ignore-output"]
rows = []
for nprobe in (1, 2, 4, 8, 16, 32, 64):
    index.nprobe = nprobe
    by_codes, ms = timed(lambda: index.search(queries, 10)[1])
    better, ms_more = timed(lambda: rerank(index.search(queries, 100)[1]))
    shares = [recall(found, exact_rows, k) for found in (by_codes, better) for k in (1, 10)]
    rows.append((nprobe, *shares, ms, ms_more))
columns = ["nprobe", "codes @1", "codes @10", "re-ranked @1", "re-ranked @10", "ms", "ms re-ranked"]
curve = pd.DataFrame(rows, columns=columns).set_index("nprobe")
curve.round(3)

# %% tags=["nbval-ignore-output"]
at = curve.loc[16]
times_as_long = exact_ms / at["ms re-ranked"]
print(f"nprobe 16, codes alone: {at['codes @10']:.0%} of the ten nearest", end="; ")
print(f"re-ranked: {at['re-ranked @10']:.0%}")
print(f"{at['ms re-ranked']:.2f} ms a query, exact search {times_as_long:.0f} times as long")
assert 0.25 < at["codes @10"] < 0.55
assert at["re-ranked @10"] > 0.85
assert at["re-ranked @1"] > at["re-ranked @10"]
assert at["codes @1"] < at["codes @10"]
assert (curve["re-ranked @10"].diff()[1:] > -0.01).all()
assert times_as_long > 8
assert curve["codes @10"].loc[64] - curve["codes @10"].loc[8] < 0.03

# %% alt="Recall of the ten nearest against milliseconds a query, for 1 to 64 cells. Codes alone rise from 30 % and stay at 40 % from eight cells on. Re-ranked, the curve rises from 57 % to 93 %. The exact search, a star at 100 %, lies far to the right."
figure, ax = plt.subplots(figsize=(8, 4.2))


def note(text, x, y, away, color="black", **style):
    """A word beside a point, so far away from it."""
    ax.annotate(text, (x, y), away, textcoords="offset points", color=color, **style)


lines = {
    "re-ranked": ("ms re-ranked", SAME, "re-ranked by 100\nvectors from the file"),
    "codes": ("ms", DIFFERENT, "8-byte codes alone"),
}
for kind, (column, color, words) in lines.items():
    ax.plot(curve[column], curve[f"{kind} @10"], "o-", color=color)
    for nprobe, point in curve.iterrows():
        note(nprobe, point[column], point[f"{kind} @10"], (0, 7), color, ha="center", fontsize=10)
    note(words, point[column], point[f"{kind} @10"], (12, -4), color, va="center")
ax.plot(exact_ms, 1, "*", markersize=14, color="black")
note("exact", exact_ms, 1, (0, 9), ha="center")
ax.set(xscale="log", xlim=(None, exact_ms * 1.7), ylim=(0, 1.13))
ax.set(xlabel="milliseconds a query (250 at once)", ylabel="recall of the ten nearest")
ax.set_title("Codes find the neighbourhood, re-ranking the neighbours")
ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
plt.show()

# %% [markdown]
# The small numbers are `nprobe`. With codes alone recall stops at 40 % from eight cells on, because the codes cannot put neighbours in order that lie so close (exercise 3). Re-ranked, the same search gives 93 %, for about a tenth of a millisecond more. The file was in the system's
# cache here; from a cold disk a hundred scattered rows a query cost more, so use a fast one (SSD).
#
# ### On the disk
#
# An index that is written can be read whole, or **mapped** (*memory-mapped*): the lists stay in the file, and the system fetches the pages that a search touches. (`SearchIndex.load` always reads all, because it verifies the file.)

# %% tags=["nbval-ignore-output"]
saved = Path(vectors.name) / "catalogue.index"
faiss.write_index(index, str(saved))
index.nprobe = 16
wanted = index.search(queries, 10)
mapped = faiss.read_index(str(saved), faiss.IO_FLAG_MMAP)
mapped.nprobe = 16
again = mapped.search(queries, 10)
size = saved.stat().st_size
is_same = all(np.array_equal(one, other) for one, other in zip(wanted, again, strict=True))
print(f"{size / 1e6:.0f} MB, codes and row numbers {codes / size:.1%}; same answers: {is_same}")
assert is_same
assert codes < size < 1.01 * codes
del mapped

# %% [markdown]
# The same answers, to the last bit. What opening costs is measured in a new process, as a server would start, because this one has free memory left over that would hide it. MB are what it holds more than before opening.

# %% tags=["nbval-ignore-output"]
np.save(Path(vectors.name) / "queries.npy", queries)
PROBE = """
import json, sys, time
import faiss, numpy as np, psutil

def held():
    return psutil.Process().memory_info().rss / 1e6

queries, before, start = np.load(sys.argv[2]), held(), time.perf_counter()
index = faiss.read_index(sys.argv[1], int(sys.argv[3]))
told, index.nprobe = {"seconds": time.perf_counter() - start, "MB": held() - before}, 16
for count in (1, len(queries)):
    index.search(queries[:count], 10)
    told[f"MB, {count} asked"] = held() - before
print(json.dumps(told))
"""
opened = {}
for name, flag in {"read whole": 0, "mapped": faiss.IO_FLAG_MMAP}.items():
    command = [sys.executable, "-c", PROBE, saved, Path(vectors.name) / "queries.npy", str(flag)]
    told = subprocess.run(command, capture_output=True, check=True, text=True).stdout
    opened[name] = json.loads(told)
opened = pd.DataFrame(opened).T
opened.round(3)

# %% tags=["nbval-ignore-output"]
read_whole, by_pages = opened.loc["read whole"], opened.loc["mapped"]
print(
    f"opened in {read_whole['seconds'] * 1e3:.0f} ms whole, {by_pages['seconds'] * 1e3:.0f} ms mapped"
)
assert by_pages["seconds"] < read_whole["seconds"]
assert not by_pages["MB"] > read_whole["MB"] / 3
assert not by_pages["MB, 1 asked"] > read_whole["MB"] / 2

# %% [markdown]
# Reading whole takes 179 MB: the 160 of the lists, and a table of distances computed from the centres. Mapping takes that table only, a few MB more after one query, and after 250 nearly everything; but these are pages of the file, which the system drops when others need the
# memory, and which several processes share. A mapped index cannot grow.
#
# ### Shards: the same on several machines
#
# When one machine's memory or time is not enough, each gets a part of the catalogue, a **shard**. A query goes to all, each answers with its ten nearest, and the answers are merged, as those of the chunks were. All shards start from the *same trained, empty* index, so that a vector
# has the same code wherever it lies. Here four shards are cut from the index by row number modulo 4.

# %% tags=["nbval-ignore-output"]
shards = [faiss.clone_index(empty) for _ in range(4)]
for number, shard in enumerate(shards):
    index.copy_subset_to(shard, faiss.InvertedLists.SUBSET_TYPE_ID_MOD, 4, number)
    shard.nprobe = 16
answers = [shard.search(queries, 10) for shard in shards]  # on four machines at once
squared, rows = merge(answers)
same_rows = float((rows == wanted[1]).mean())
print(f"{[shard.ntotal for shard in shards]} vectors; same rows as the whole: {same_rows:.2%}")
assert sum(shard.ntotal for shard in shards) == COUNT
assert np.allclose(squared, wanted[0], rtol=1e-5)
assert same_rows > 0.99

# %% [markdown]
# The same rows at the same distances (where two vectors have the same code, either may come first). Within one machine `faiss.IndexShards` does the sending and merging. What shards cost: every machine finds the 16 nearest cells anew, the query waits for
# the slowest, and a machine that is down takes its quarter with it (exercise 4).

# %% tags=["nbval-ignore-output"]
print(f"at most {most_memory() - before:,.0f} MB more than at the start of this section")
assert not most_memory() - before > 2000

# %% [markdown]
# ### A billion, on paper
#
# What would a hundred times as much take? Memory is bytes a code, plus eight for the row number, times the count. Of Deep1B, a billion vectors of 96 numbers, FAISS's authors publish finished indices, with the share of queries whose nearest comes first (R@1) and the time on 32 cores:
# [16.6 GB with 8-byte codes (24 %, 0.1 ms), 72.8 GB with 64-byte codes (83 %, 0.6 ms)](https://github.com/facebookresearch/faiss/wiki/Indexing-1G-vectors). Does the rule agree?

# %%
published = {8: 16_562_276_272, 64: 72_830_801_840}  # OPQ8_64 and OPQ64_128,IVF1048576_HNSW32
for bytes_a_code, found in published.items():
    rule = 1_000_000_000 * (bytes_a_code + 8)
    print(
        f"{bytes_a_code:2} bytes a code: {rule / 1e9:.0f} GB by the rule, {found / 1e9:.1f} GB found"
    )
    assert rule < found < 1.05 * rule

# %% tags=["nbval-ignore-output"]
scanned = {  # codes that a query looks at: nprobe * vectors / cells
    "here, 2 048 cells": 16 * COUNT / 2048,
    "a billion, 20 480 cells": 16 * 1e9 / 20_480,
    "a billion, 1 048 576 cells": 64 * 1e9 / 1_048_576,
}
for name, number in scanned.items():
    ms = at["ms"] * number / scanned["here, 2 048 cells"]
    print(f"{name:27} {number:9,.0f} codes a query, about {ms:.1f} ms on this machine")
print(f"adding a billion to 2 048 cells: {add_seconds * 100 / 60:.0f} minutes")
print(f"an exact search among a billion: {exact_ms / 10:.1f} s a query")

# %% [markdown]
# The rule is right to 5 %; what it leaves out are the centres and their graph. The scaled times say why there are a million cells: with only ten times ours a query scans ten times the codes, with 1 048 576, of which it looks into 64, fewer than here (finding those 64 is not counted; there is the graph for that). Their k-means wants 30 million vectors or more, on a GPU.
# On four GPUs a billion vectors in 20-byte codes [answered a query in 0.013 ms with R@1 of 45 %](https://github.com/facebookresearch/faiss/blob/main/benchs/README.md), and a graph of the neighbours of a billion took [under 12 hours](https://arxiv.org/abs/1702.08734).

# %% [markdown]
# A plan, then: 8-byte codes of a billion are 16 GB, one machine of 32 GB or eight shards of 2 GB; 64-byte codes one of 96 GB. The vectors for re-ranking, 64 GB as 32 numbers of 16 bits, lie on an SSD. Train on a GPU, add in parallel, and measure recall against an exact search of all of it in chunks, for a few hundred queries: on a part of the catalogue an index looks better than it is (next table).
#
# ### When a large index pays
#
# Every index has to be built before it answers. Exact search needs no building, misses nothing, and has no knob that could be wrong. After how many queries has the building paid off?


# %% tags=["nbval-ignore-output"]
def pays_off(build, exact, approximate):
    """Queries after which building an index has taken less time in all (times of a query in ms)."""
    return build * 1e3 / (exact - approximate) if exact > approximate else np.inf


def small_catalogue(count):
    points = next(chunks())[1][:count]
    (_, truth), exact = timed(lambda: faiss.knn(queries, points, 10))
    start = time.perf_counter()
    trained = faiss.index_factory(32, f"IVF{round(0.65 * count**0.5)},PQ8np")
    trained.train(points[:: max(1, count // 50_000)])
    trained.add(points)
    build, trained.nprobe = time.perf_counter() - start, 16
    (_, near_ones), ms = timed(lambda: trained.search(queries, 100))
    ranked, more = timed(lambda: rerank(near_ones))
    return exact, build, ms + more, recall(ranked, truth), pays_off(build, exact, ms + more)


table = {count: small_catalogue(count) for count in (10_000, 100_000)}
build_seconds = train_seconds + add_seconds
table[COUNT] = (
    exact_ms,
    build_seconds,
    at["ms re-ranked"],
    at["re-ranked @10"],
    pays_off(build_seconds, exact_ms, at["ms re-ranked"]),
)
names = ["exact ms", "build s", "index ms", "recall", "pays off after"]
table = pd.DataFrame(table, index=names).T
table.round({"exact ms": 2, "build s": 1, "index ms": 2, "recall": 3, "pays off after": 0})

# %% tags=["nbval-ignore-output"]
queries_needed = table["pays off after"]
for count, queries_asked in queries_needed.items():
    print(f"{count:10,} vectors: pays off after {queries_asked:,.0f} queries")
assert 100 < queries_needed[COUNT] < 20_000
assert queries_needed[10_000] > 2 * queries_needed[COUNT]

# %% alt="Seconds in all against queries, both axes logarithmic. Exact search is a straight line; IVF-PQ is flat at its building time and bends up late. The lines cross near six hundred queries."
figure, ax = plt.subplots(figsize=(8, 4))
asked = np.logspace(0, 6, 100)
for name, fixed, ms, color in (
    ("exact", 0, exact_ms, "black"),
    ("IVF-PQ, re-ranked", build_seconds, at["ms re-ranked"], SAME),
):
    in_all = fixed + asked * ms / 1e3
    ax.plot(asked, in_all, color=color)
    note(name, asked[-1], in_all[-1], (6, -4), color)
cross = queries_needed[COUNT]
ax.plot(cross, cross * exact_ms / 1e3, "o", color=DIFFERENT)
note(f"{cross:,.0f} queries", cross, cross * exact_ms / 1e3, (8, -14), DIFFERENT)
ax.set(xscale="log", yscale="log", xlim=(1, 4e7))
ax.set_title("Ten million vectors: after hundreds of queries an index has paid off")
ax.set(xlabel="queries in all", ylabel="seconds, building included")
plt.show()

# %% [markdown]
# With ten million vectors the building has paid off after some six hundred queries here (FAISS's guidelines say 1 000 to 10 000); with a hundred thousand after thousands, and they fit into 13 MB as they are; with ten thousand never, because an exact query takes no longer
# than one to the index. So ask a small catalogue exactly, and a large one too if there are only a few hundred questions.

# %% [markdown]
# ## When not to
#
# Each of these answers a lack. Where nothing lacks, it only costs.
#
# | what is too small | answer | what it costs | not |
# |---|---|---|---|
# | a batch, for positives | balanced batches; where they cannot be drawn, a memory | distances n × r, to rows that are stale | where balanced batches can be drawn |
# | one machine's time | processes on several machines or GPUs | an exchange at each step | on one machine's CPU |
# | memory for vectors | codes, a file, shards | recall, and vectors on the disk to re-rank | for a few hundred queries, or below 100 000 vectors |
# | labels | a boolean matrix `same` | n × r of it | where labels say it |
#
# ## When it goes wrong
#
# **A copy of oneself, and a graph that is gone.** Two slips with a memory. Without `anchor_rows` the anchor's own copy counts as its positive, at distance zero, and nothing complains. With embeddings that were not detached, the second step wants to go back
# through a graph that the first has freed, and torch complains.

# %%
of_both_batches = {"reference": torch.cat([second, first]), "reference_labels": torch.cat([y2, y1])}
told, untold = (
    plain(second, y2, anchor_rows=torch.arange(12), **of_both_batches),
    plain(second, y2, **of_both_batches),
)
print(f"loss {told:.4f} if told which row is the anchor, {untold:.4f} if not")
assert untold < told

network = ResidualNet()
not_detached = network(small[few[:32]])
plain(not_detached, kinds[few[:32]]).backward()
value = plain(
    network(small[few[32:64]]),
    kinds[few[32:64]],
    reference=not_detached,
    reference_labels=kinds[few[:32]],
)
try:
    value.backward()
    message = ""
except RuntimeError as error:
    message = str(error).split("(")[0]
print("without detach():", message)
assert "second time" in message

# %% [markdown]
# The first slip is the worse one, because nothing stops. An anchor without any positive gets triplets all the same, which only push. Try a loss on two batches that you can check by hand, as above.


# %% [markdown]
# **A memory without positives.** Balanced batches help, a memory helps: take both? `BalancedBatchSampler` draws no class again before every other has been drawn, here for the first 51 batches. Until then
# a memory of 32 batches holds *negatives only*, and all positives are in the batch.

# %% alt="Mean squared distance of two classes within a batch against the step. With random batches and memory it stays near 1. With balanced batches and memory it falls to about 0.05 within 30 steps, and stays below 0.3." tags=["nbval-ignore-output"]
both, looks_of_both = CrossBatchMemory(TripletLoss(margin=0.2), rows=2048), []
right["both"], of_both = train_with(both, looks_of_both, batch_sampler=balanced)
figure, ax = plt.subplots(figsize=(8, 3.2))
for name, run, color in (
    ("random batches, memory", history, SAME),
    ("balanced batches, memory", of_both, DIFFERENT),
):
    apart = pd.Series(run["negative_distance"]).rolling(5).mean()
    ax.plot(apart, color=color)
    ax.annotate(name, (100, apart[100]), (0, 8), textcoords="offset points", color=color)
ax.set(
    title="With both, each batch huddles on one spot",
    xlabel="step",
    ylabel="distance² of classes in a batch",
    ylim=(0, 1.25),
)
plt.show()

# %% tags=["nbval-ignore-output"]
shares = {}
for name, seen_so in (("random", looks), ("balanced", looks_of_both)):
    each_moved, moved_together = ways(seen_so)
    shares[name] = moved_together[:4].sum() / each_moved[:4].sum()
    print(f"{name} batches with memory: {shares[name]:.0%} of the early way is common to all")
with_both = float(right["both"].float().mean())
print(f"Recall@1 of balanced batches: {first_right['balanced']:.1%}, with memory {with_both:.1%}")
assert with_both < first_right["balanced"] - 0.05
assert shares["balanced"] > 2 * shares["random"]

# %% [markdown]
# Together they do worse than either. As long as the memory holds negatives only, a batch escapes all of them most easily by moving to a new spot *as one*: most of the early way is common to all images, and the classes within the batch lie on
# one another. The memory then pushes from where the batches have been. So take one or the other, or see to it that the memory holds positives too.


# %% [markdown]
# **Each process brings its own data.** In loops written for torch's `DistributedDataParallel` each process is given its part of the data. `fit` shares out each batch by itself, and would train on one part only. So it compares, and refuses.

# %%
(here / "parts.py").write_text("""
import os, torch
from tripletlib import EmbeddingNet, fit, load_mnist

images, labels = (part[int(os.environ["RANK"]) : 1000 : 2] for part in load_mnist("train"))
fit(EmbeddingNet(), images, labels, progress=False)
""")
try:
    torchrun(2, "parts.py")
    message = ""
except RuntimeError as error:
    message = next(line for line in str(error).splitlines() if "ValueError: " in line)
print(message.split("ValueError: ")[-1])
assert "must be the same in all processes" in message


# %% [markdown]
# **The sample is not random.** Catalogues lie in some order: by date, by shop, by class. Who trains on the first part, because it comes first, places all cells and codes where only that part lies. A hundred thousand made vectors, sorted by digit, show it.


# %% tags=["nbval-ignore-output"]
catalogue, digits = make(100_000, seed=1000)
catalogue = catalogue[digits.argsort(stable=True)].numpy()
truth = faiss.knn(queries, catalogue, 10)[1]
samples = {
    "every 5th": catalogue[::5],
    "the first 20 000": catalogue[:20_000],
}
for name, taken in samples.items():
    trained = faiss.index_factory(32, "IVF256,PQ8np")
    trained.train(taken)
    trained.add(catalogue)
    trained.nprobe = 16
    faiss.cvar.indexIVF_stats.reset()
    share = recall(trained.search(queries, 10)[1], truth)
    looked_at = faiss.cvar.indexIVF_stats.ndis / len(queries)
    samples[name] = (share, looked_at)
    print(f"{name:16} recall {share:.1%}, {looked_at:7,.0f} codes a query")
assert samples["the first 20 000"][0] < samples["every 5th"][0] - 0.05
assert samples["the first 20 000"][1] > 1.3 * samples["every 5th"][1]

# %% [markdown]
# Trained on the first fifth, all zeros and nine of ten ones, the index finds 44 % of the ten nearest instead of 68, although it looks at nearly three times as many codes: the other digits crowd into a few cells. FAISS cannot see this. Draw the sample from everywhere, and
# train anew when the catalogue has changed.
#
# **`nprobe` left at 1.** That is FAISS's default. The index then answers from a single cell, fast and without complaint, and re-ranking cannot mend it, because what lies in a cell that was not looked into is no candidate. Compare with an exact search of a few hundred queries before anything goes live.

# %% tags=["nbval-ignore-output"]
fresh = faiss.read_index(str(saved), faiss.IO_FLAG_MMAP)
for nprobe in (empty.nprobe, 16):  # the first as a new index has it
    fresh.nprobe = nprobe
    found = recall(rerank(fresh.search(queries, 100)[1]), exact_rows)
    print(f"nprobe {nprobe}: recall {found:.0%} after re-ranking")
assert empty.nprobe == 1
assert curve["re-ranked @10"][1] < 0.7 < curve["re-ranked @10"][16]
del fresh


# %% [markdown]
# ## Exercises
#
# Try each before you unfold its solution (click the blue bar or the three dots) and its answer.
#
# **1.** The loss itself is not shared out: each process computes all of it. Could it be? Let each of three processes take its share of the *anchors*, against all embeddings, and put the three
# together so that loss and gradient are those of the whole batch, with the mean over active triplets. What else would have to be exchanged?

# %%
# Your attempt


# %% jupyter={"source_hidden": true} tags=["hide-input"]
# Solution 1
def share_of(rows):
    """Sum and number of one share's active triplets."""
    return batch_all_triplet_loss(
        points[rows],
        classes[rows],
        reduction="sum",
        return_active=True,
        reference=points,
        reference_labels=classes,
        anchor_rows=rows,
    )


sums, numbers = zip(*map(share_of, torch.arange(512).tensor_split(3)), strict=True)
shared = sum(sums) / sum(numbers)
mean = batch_all_triplet_loss(points, classes)
assert torch.isclose(shared, mean, rtol=1e-5)
assert torch.allclose(gradient_of(shared), gradient_of(mean), rtol=1e-3, atol=1e-7)

# %% [markdown]
# <details><summary>Answer 1</summary>
#
# Yes: sums and numbers of active triplets add up, because each triplet has one anchor. (A copy of the rows needs `anchor_rows`.) But an anchor's share of the loss has a gradient for *all* embeddings, since they are its positives and negatives. So a gradient
# of n × d would have to be added up over the processes before the way back. It pays when batches are so large that the loss takes a good part of a step; at 512 it takes a fiftieth.
#
# </details>


# %% [markdown]
# **2.** How many rows must a memory have so that nine of ten anchors of a random batch of 64 find a positive? Write a formula for classes of about seven drawings among 5 834, and compare it with `with_positive`. What would ten times as many classes need?

# %%
# Your attempt


# %% jupyter={"source_hidden": true} tags=["hide-input"]
# Solution 2
def rows_needed(share, images, siblings=6, batch=64):
    """Each of the others is none of the siblings with probability 1 - siblings / (images - 1)."""
    others = np.log(1 - share) / np.log(1 - siblings / (images - 1))
    return int(np.ceil(others)) - (batch - 1)


needed = rows_needed(0.9, len(kinds))
torch.manual_seed(0)
assert 2100 < needed < 2300
assert abs(with_positive(needed) - 0.9) < 0.05
assert 9 < rows_needed(0.9, 10 * len(kinds)) / needed < 11

# %% [markdown]
# <details><summary>Answer 2</summary>
#
# About 2 200. Of 5 834 drawings some six are siblings, so that one of the others is none with probability 1 − 6/5 833; nine of ten anchors have at least one sibling when that to the power of the number of others is a tenth. With ten times as many classes ten times as many
# rows: the memory has to grow with the number of classes. A balanced batch does not.
#
# </details>


# %% [markdown]
# **3.** How many candidates does re-ranking need? Fetch 10, 30, 100, 300 and 1 000 from the index of ten million. What is recall after re-ranking, and why can it never be more than the share of the ten nearest that are among the candidates?

# %%
# Your attempt

# %% jupyter={"source_hidden": true} tags=["hide-input"]
# Solution 3
index.nprobe, by_count = 16, {}
for count in (10, 30, 100, 300, 1000):
    candidates = index.search(queries, count)[1]
    among = float((candidates[:, :, None] == exact_rows[:, None]).any(axis=1).mean())
    by_count[count] = recall(rerank(candidates), exact_rows)
    assert abs(by_count[count] - among) < 0.002
assert by_count[10] < 0.5 < by_count[30] < 0.8 < by_count[100] < 0.97 < by_count[300]

# %% [markdown]
# <details><summary>Answer 3</summary>
#
# 40, 69, 93, 99 and nearly 100 %. Re-ranking by true distances puts every one of the ten nearest that is a candidate into the first ten, since at most nine others are nearer. So it finds exactly those among the candidates, and no more. A hundred are enough for most; what is missing with a thousand lies in cells that were not looked into.
#
# </details>


# %% [markdown]
# **4.** One of the four machines does not answer. Merge the other three shards' answers. What is left of what the four found together, on average and for the worst query? What would differ if each machine held the digits of certain classes instead of every fourth vector?

# %%
# Your attempt

# %% jupyter={"source_hidden": true} tags=["hide-input"]
# Solution 4
_, left = merge([shard.search(queries, 10) for shard in shards[:3]])
shares_left = (left[:, :, None] == wanted[1][:, None]).any(axis=1).mean(axis=1)
assert abs(shares_left.mean() - 0.75) < 0.04
assert shares_left.min() <= 0.5

# %% [markdown]
# <details><summary>Answer 4</summary>
#
# About 75 % on average, because every fourth vector is gone, whoever is asked; for the worst query half or less. If machines held classes, most queries would lose nothing and those of the missing classes nearly everything. Spread at random, all lose a little, which is noticed by few and by measuring only; so keep a second copy (*replica*) of each shard.
#
# </details>


# %% tags=["nbval-ignore-output"]
on_disk = None
folder.cleanup()
vectors.cleanup()
print(
    f"removed; at most {most_memory() - before:,.0f} MB more than at the start of the last section"
)
assert not most_memory() - before > 2000


# %% [markdown]
# ## Check yourself

# %% [markdown]
# **1.** Two halves of a batch are compared with all of it, and the two losses (with `reduction="sum"`) added. What comes out?
#
# a) The loss of the whole batch. · b) Half of it. · c) A quarter, since a triplet has to lie within one half.
#
# <details><summary>Answer</summary>
#
# **a.** Every triplet has one anchor, which is in one of the halves; its positive and negative may be anywhere. *c* is what processes get that compute losses of their own shares.
#
# </details>

# %% [markdown]
# **2.** Why does no gradient flow into a cross-batch memory?
#
# a) It would take too long. · b) The networks that made its rows are no more, and the way back is not kept. · c) Negatives need none.
#
# <details><summary>Answer</summary>
#
# **b.** Each row comes from the network of an earlier step. To keep the way back would mean to keep all that each of those steps had computed. *c* is wrong in a batch, where negatives move as well.
#
# </details>

# %% [markdown]
# **3.** Two processes train on two cores, each with one thread, and a step takes as long as in one process with two threads. What is gained?
#
# a) Nothing, and the images lie in memory twice. · b) Twice the batch. · c) A better gradient.
#
# <details><summary>Answer</summary>
#
# **a.** The same cores do the same work for the same batch. Further processes pay when they bring cores or GPUs of their own.
#
# </details>

# %% [markdown]
# **4.** An IVF-PQ index finds 40 % of the ten nearest, with eight cells as with sixty-four. What helps?
#
# a) A hundred and twenty-eight cells. · b) Re-ranking more candidates by their true distances. · c) Training on more vectors.
#
# <details><summary>Answer</summary>
#
# **b.** The neighbours are among the candidates; the codes are too coarse to put them in order. *a* looks in more places for what was found already.
#
# </details>

# %% [markdown]
# **5.** Somebody has 50 000 embeddings and asks a thousand questions a day. Which index?
#
# a) IVF-PQ, because it is fastest. · b) Four shards, to be safe. · c) None: exact search.
#
# <details><summary>Answer</summary>
#
# **c.** A thousand questions take a fraction of a second a day, and that is all an index could save. Exact search misses nothing, needs no training, and 50 000 × 64 numbers are 13 MB.
#
# </details>

# %% [markdown]
# ## Summary
#
# - The exact loss takes positives and negatives from a reference set in n × r memory; halves of a batch against all of it add up to the whole. `same` replaces labels where kinds overlap.
# - A memory of past batches mends a lack of positives; where balanced batches can be drawn they do better, and the two together do worse than either.
# - `torchrun` and the same call of `fit`: embeddings are gathered, the loss is that of the whole batch, and the steps are those of one process, but for batch normalisation.
# - Codes of 8 bytes and a file hold ten million vectors in 160 MB; the codes choose candidates, true distances put them in order.
# - On one machine, or for a few questions, none of this pays: measure first.

# %% [markdown]
# ## References
#
# - X. Wang, H. Zhang, W. Huang, M. R. Scott, "Cross-batch memory for embedding learning", [2020](https://arxiv.org/abs/1912.06798).
# - S. Li et al., "PyTorch distributed: experiences on accelerating data parallel training", [2020](https://arxiv.org/abs/2006.15704).
# - J. Johnson, M. Douze, H. Jégou, "Billion-scale similarity search with GPUs", [2017](https://arxiv.org/abs/1702.08734).
# - M. Douze et al., "The Faiss library", [2024](https://arxiv.org/abs/2401.08281).
# - H. Jégou, M. Douze, C. Schmid, "Product quantization for nearest neighbor search", [2011](https://doi.org/10.1109/TPAMI.2010.57).
# - A. Babenko, V. Lempitsky, "Efficient indexing of billion-scale datasets of deep descriptors", [CVPR 2016](https://doi.org/10.1109/CVPR.2016.226) (Deep1B).
