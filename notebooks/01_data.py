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
# # 1 · Data: when are two images alike?
#
# A computer that compares images pixel by pixel thinks that a digit moved by two pixels is a different digit. This
# chapter shows how wrong that is, and prepares the data with which the rest of the book learns something better.
#
# - **You will learn** what a distance between images is, why raw pixels make a poor one, how to standardise images without
#   peeking at the test set, and how to draw batches in which every image has company.
# - **You need** Python and a little PyTorch; no network and no GPU.
# - **Running time** about 45 seconds on two cores.
# - Next: [2 · Triplets](02_triplets.ipynb)

# %%
import matplotlib.pyplot as plt
import seaborn as sns
import torch

from tripletlib import (
    BalancedBatchSampler,
    KNNClassifier,
    knn_accuracy,
    load_mnist,
    pairwise_distances,
)
from tripletlib.plotting import (
    DIFFERENT,
    PALETTE,
    SAME,
    plot_distances,
    show_images,
    show_neighbours,
    use_theme,
)

use_theme()

# %% [markdown]
# ## The digits
#
# MNIST holds 70 000 photographs of handwritten digits, grey, 28 pixels on a side, each with a label that says which digit
# was meant. 60 000 are for training and 10 000 for testing. They come with this book: nothing is downloaded.

# %%
images, labels = load_mnist("train")
test_images, test_labels = load_mnist("test")
print(images.shape, images.dtype, labels.shape, labels.dtype)
print(test_images.shape, test_labels.shape)

# %% [markdown]
# Four numbers describe a batch of images in PyTorch: how many, how many channels (one, as they are grey), height and
# width. Here are eight of each digit, a row a digit. Look at the sevens with and without a bar, and at the slanted ones:
# people agree that each row shows one thing, yet hardly two images in it match.

# %%
rows = torch.cat([torch.nonzero(labels == digit)[:8, 0] for digit in range(10)])
show_images(images[rows].unflatten(0, (10, 8)).transpose(0, 1).flatten(0, 1), columns=10)
plt.show()

# %% [markdown]
# ## Similar, as pixels see it
#
# The simplest way to compare two images: subtract them pixel by pixel, square, add up, take the root. That is the
# Euclidean distance between two points in a space of 784 dimensions, one for each pixel. Computed by hand for two images,
# it is what the library computes for all pairs at once.

# %%
pixels = images.flatten(start_dim=1)
by_hand = ((pixels[0] - pixels[1]) ** 2).sum().sqrt()
by_library = pairwise_distances(pixels[:2])[0, 1]
print(pixels.shape)
torch.testing.assert_close(by_library, by_hand)

# %% [markdown]
# Is that what we mean by alike? Take an image and push it to the right, one pixel, two, three, four. Nobody would say that
# it shows another digit now. `torch.roll` moves it; nothing falls off, as the margins are empty.


# %%
def shifted(batch, pixels):
    return torch.roll(batch, pixels, dims=3)


one = test_images[test_labels == 1][:1]
moved = torch.cat([shifted(one, pixels) for pixels in range(5)])
from_start = pairwise_distances(moved.flatten(1))[0]
assert (from_start.diff() > 0).all()

# %% [markdown]
# Then look for the training images that are *not* a one and lie nearest to it. The pixels say that these other digits are
# more like the one than the one itself, moved by two pixels.

# %%
others, other_labels = pixels[labels != 1], labels[labels != 1]
distance, nearest = pairwise_distances(one.flatten(1), others)[0].topk(5, largest=False)
figure_images = torch.cat([moved, others[nearest].view(-1, 1, 28, 28)])
titles = [f"moved {k}: {d:.0f}" for k, d in enumerate(from_start)]
titles += [f"a {k}: {d:.0f}" for k, d in zip(other_labels[nearest], distance, strict=True)]
show_images(figure_images, titles, columns=5, colors=[SAME] * 5 + [DIFFERENT] * 5, size=1.5)
assert from_start[2] > distance[0]

# %% [markdown]
# The numbers are distances from the first image. One example proves little, so count over the first 1 000 test images: how
# often is an image, moved by two pixels, farther from itself than from the nearest image of *another* digit?

# %%
queries, query_labels = test_images[:1000], test_labels[:1000]
to_itself = (shifted(queries, 2) - queries).flatten(1).norm(dim=1)
to_all = pairwise_distances(queries.flatten(1), pixels)
to_other_digit = to_all.masked_fill(query_labels[:, None] == labels, torch.inf).amin(dim=1)
fooled = int((to_itself > to_other_digit).sum())
print(f"{fooled} of 1000 images")
assert fooled > 700

# %% [markdown]
# ## Neighbours in pixel space
#
# A distance is good if near means same. So let the neighbours tell: give each test image the label that most of its ten
# nearest training images carry. That is *k-nearest-neighbours* (kNN) classification, with k = 10, and its accuracy will
# measure every distance in this book.

# %%
pixel_accuracy = knn_accuracy(test_images.flatten(1), test_labels, pixels, labels, k=10)
print(pixel_accuracy)
assert 0.96 < pixel_accuracy < 0.975

# %% [markdown]
# Better than it deserves! With 60 000 examples there is mostly *some* image that happens to lie right on top of the query.
# The interval says how far chance may have moved the figure: with 95 % confidence, the accuracy on all digits
# written like these lies inside.
#
# Here are queries that go wrong (left), with their eight nearest training images. What pixels take for alike is the same
# ink in the same place.

# %%
classifier = KNNClassifier(pixels, labels, k=10)
wrong = torch.nonzero(classifier.predict(queries.flatten(1)) != query_labels)[:5, 0]
found = to_all[wrong].topk(8, largest=False).indices
show_neighbours(queries[wrong], query_labels[wrong], images[found], labels[found])
plt.show()

# %% [markdown]
# Orange frames are misses, blue ones hits. Now push the queries to the right and ask again. A person would not notice;
# the accuracy falls off a cliff, because no training image happens to be shifted the same way.

# %%
shifts = range(6)
accuracies = [
    float((classifier.predict(shifted(queries, k).flatten(1)) == query_labels).float().mean())
    for k in shifts
]
assert accuracies[0] > 0.95
assert accuracies[4] < 0.5

# %% tags=["nbval-ignore-output"]
ax = sns.lineplot(x=list(shifts), y=accuracies, marker="o", markersize=9, color=PALETTE[3])
ax.axhline(0.1, color="grey", linestyle=":")
ax.annotate("guessing", (0, 0.1), xytext=(0, 0.12), color="grey")
ax.set(title="Two pixels to the right undo pixel distance", xlabel="shift of the query (pixels)")
ax.set(ylabel="kNN accuracy, 1 000 queries", ylim=(0, 1.02))
plt.show()

# %% [markdown]
# ## What a good distance would look like
#
# Take 2 000 images and measure all pairs. If the distance were good, pairs of one digit would sit left and pairs of two digits
# right, with a gap between. In pixel space the two heaps lie almost on top of each other.

# %%
plot_distances(pixels[:2000], labels[:2000]).set(
    title="Pixel distance hardly tells same from different"
)
plt.show()

# %% [markdown]
# One number for it: draw a pair of the same digit and a pair of different digits; how often is the first one the closer?
# A perfect distance says always, a useless one half of the time.

# %%
distances = pairwise_distances(pixels[:2000])
same = labels[:2000, None] == labels[:2000]
upper = torch.ones_like(same).triu(diagonal=1)
draw = torch.Generator().manual_seed(0)
close = distances[same & upper][
    torch.randint(int((same & upper).sum()), (100_000,), generator=draw)
]
far = distances[~same & upper][
    torch.randint(int((~same & upper).sum()), (100_000,), generator=draw)
]
order = float((close < far).float().mean())
assert 0.7 < order < 0.85

# %% [markdown]
# Three times out of four. **Metric learning** is the plan to do better: learn a function, the *embedding*, that moves each
# image to a point so that plain Euclidean distance between the points does what we mean. Chapter 5 draws this very
# histogram again, after training.

# %% [markdown]
# ## Standardising
#
# Networks learn fastest when inputs are centred at zero and of size one. So we subtract the mean of all pixels and divide by
# their standard deviation. `load_mnist` has done so already.

# %%
assert abs(float(images.mean())) < 1e-4
assert abs(float(images.std()) - 1) < 1e-4
print(f"background {float(images.min()):.3f}, darkest ink {float(images.max()):.3f}")

# %% [markdown]
# The two statistics come from the *training* images alone, also when the test images are scaled. Otherwise the test set would
# have a say in how it is seen. So the test pixels come out near 0 and 1, and not exactly there.

# %%
print(
    f"test mean {float(test_images.mean()):.2f}, standard deviation {float(test_images.std()):.2f}"
)
assert abs(float(test_images.mean())) > 1e-3

# %% [markdown]
# ## Keeping the test set apart
#
# The test set answers one question: how well does this do on images that had no part in making it? Each choice made by looking
# at it spoils the answer a little. So choices, such as k, are made on *validation* images, cut from the training set.

# %%
shuffled = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
validation, training = shuffled[:2000], shuffled[5000:]
choices = {}
for k in (1, 3, 10, 30, 100):
    choices[k] = knn_accuracy(
        pixels[validation], labels[validation], pixels[training], labels[training], k=k
    )
assert max(choices, key=choices.get) < 30

# %% tags=["nbval-ignore-output"]
ks = list(choices)
ax = plt.gca()
below = [float(choices[k]) - choices[k].low for k in ks]
above = [choices[k].high - float(choices[k]) for k in ks]
ax.errorbar(
    ks, [float(choices[k]) for k in ks], [below, above], marker="o", capsize=4, color=PALETTE[0]
)
ax.set(
    xscale="log", xlabel="k", ylabel="kNN accuracy", title="Choosing k on 2 000 validation images"
)
ax.set_xticks(ks, ks)
ax.minorticks_off()
plt.show()

# %% [markdown]
# Small k wins, but look at the intervals: up to ten, the differences are within chance. We keep ten throughout, as an average
# over ten neighbours is steadier than the word of one.

# %% [markdown]
# ## Balanced batches
#
# Training takes a few hundred images at a time. To learn what is alike, a batch must hold images that *are* alike: each image
# needs another of its class, its *positive*. In a small random batch many have none.


# %%
def without_positive(batch_labels):
    return int((batch_labels.bincount()[batch_labels] == 1).sum())


random_batches = shuffled[:1600].view(100, 16)
lonely = sum(without_positive(labels[batch]) for batch in random_batches)
print(f"{lonely} of 1600 images in random batches of 16 have no positive")
assert lonely > 200

# %% [markdown]
# `BalancedBatchSampler` draws P classes and K images of each. Every image then has K − 1 positives, by construction. An epoch is
# as many batches as the images fill; no image comes a second time before all others of its class have come once.

# %%
sampler = BalancedBatchSampler(
    labels, classes_per_batch=8, images_per_class=2, generator=torch.Generator().manual_seed(0)
)
balanced_batches = list(sampler)
print(len(sampler), "batches an epoch")
assert sum(without_positive(labels[batch]) for batch in balanced_batches) == 0

# %%
figure, axes = plt.subplots(1, 2, figsize=(9, 3), sharey=True)
for ax, batches, title in zip(
    axes, (random_batches, balanced_batches), ("random", "balanced"), strict=True
):
    counts = torch.stack([labels[batch].bincount(minlength=10) for batch in batches[:40]])
    sns.heatmap(
        counts.T, ax=ax, cmap="cividis", vmin=0, vmax=5, cbar=title == "balanced", xticklabels=False
    )
    ax.set(title=f"{title} batches of 16", xlabel="40 batches", ylabel="digit")

# %% [markdown]
# Each column is a batch, each colour a count. On the right it is two or none everywhere. With batches of 512 and ten equally
# frequent digits, as in chapter 4, a random batch has about fifty images of each and needs no such care. With hundreds of
# classes, balanced batches are what makes training possible at all.

# %% [markdown]
# ## When it goes wrong: the test set leaks
#
# A slip that happens to everybody: the gallery to search in was built from *all* images, the test images among them. Now each
# query finds itself, at distance zero.

# %%
everything, all_labels = (
    torch.cat([pixels, test_images.flatten(1)]),
    torch.cat([labels, test_labels]),
)
leaked = knn_accuracy(queries.flatten(1), query_labels, everything, all_labels, k=1)
print(leaked)
assert leaked == 1.0

# %% [markdown]
# A perfect score is the symptom: nothing on real data is perfect. The cure is to make sure that no test image is in the
# gallery. In MNIST as it comes, none is; a set of the raw bytes proves it.

# %%
train_bytes = {image.numpy().tobytes() for image in images}
duplicates = sum(image.numpy().tobytes() in train_bytes for image in test_images)
print(
    len(images) - len(train_bytes),
    "copies within the training set,",
    duplicates,
    "test images in it",
)
assert duplicates == 0

# %% [markdown]
# ## Exercises
#
# Try each before you unfold its solution (click the blue bar or the three dots).
#
# **1.** Blurring spreads ink to neighbouring pixels. Does it make pixel distance more forgiving of a shift by two pixels? Use
# `torchvision.transforms.functional.gaussian_blur` on queries and gallery.

# %% jupyter={"source_hidden": true}
from torchvision.transforms.functional import gaussian_blur

blurred_gallery = gaussian_blur(images, 9, 2.0).flatten(1)
blurred_queries = gaussian_blur(shifted(queries, 2), 9, 2.0).flatten(1)
blurred = knn_accuracy(blurred_queries, query_labels, blurred_gallery, labels)
assert blurred > accuracies[2] + 0.05

# %% [markdown]
# **2.** Which two different digits lie closest in pixel space, measured between the mean images of the classes?

# %% jupyter={"source_hidden": true}
means = torch.stack([pixels[labels == digit].mean(dim=0) for digit in range(10)])
between = pairwise_distances(means).fill_diagonal_(torch.inf)
first, second = divmod(int(between.argmin()), 10)
print(first, "and", second)
assert {first, second} == {4, 9} or {first, second} == {7, 9}

# %% [markdown]
# **3.** How many images must a random batch of MNIST hold until, on average, fewer than one of them is without a positive? Work it out,
# then count.

# %% jupyter={"source_hidden": true}
shares = labels.bincount() / len(labels)
expected = {
    n: float(sum(n * share * (1 - share) ** (n - 1) for share in shares)) for n in (16, 32, 48, 64)
}
print([n for n, images_alone in expected.items() if images_alone < 1])
counted = [without_positive(labels[batch]) for batch in shuffled[:48_000].view(-1, 48)]
assert abs(sum(counted) / len(counted) - expected[48]) < 0.1

# %% [markdown]
# ## Summary
#
# - Pixel distance compares ink in place: two pixels of shift outweigh the difference between two digits.
# - kNN accuracy measures how far near means same; it comes with an interval.
# - Statistics and choices come from training images; the test set stays apart.
# - Balanced batches give every image a positive.
#
# **Next:** [2 · Triplets](02_triplets.ipynb) says in one formula what we want a better distance to do.
#
# **References.** Y. LeCun, L. Bottou, Y. Bengio, P. Haffner, "Gradient-based learning applied to document recognition", 1998. ·
# A. Hermans, L. Beyer, B. Leibe, "In defense of the triplet loss for person re-identification", 2017 (balanced batches).
