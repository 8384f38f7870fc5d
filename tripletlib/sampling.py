"""Which images make a batch: balanced batches, and triplets drawn from a whole data set."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import Sampler

from tripletlib._validation import check_count, check_labels


def draw_triplets(
    labels: Tensor, count: int, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw triplets at random from a whole data set, each class as often as any other.

    The anchor's class is uniform over the classes of at least two images; anchor and positive are
    two distinct images of it. The negative's class is uniform over all other classes, and the
    negative uniform over its images. Triplets are drawn independently, so a list may hold one
    twice. (`mine_triplets` with kind "random" chooses within an embedded batch instead: one
    triplet for each anchor of the batch, uniform over its valid ones, so larger classes give more.)

    Parameters
    ----------
    labels : Tensor of integers, shape (n,)
        The class of every image.
    count : int
        How many triplets to draw, at least 1.
    generator : torch.Generator, optional
        Where the randomness comes from; by default torch's global one.

    Returns
    -------
    a, p, n : Tensor, int64, shape (count,)
        Indices of anchors, positives and negatives.

    Raises
    ------
    TypeError, ValueError
        If the labels are not integers of shape (n,), hold fewer than two classes or no class of two
        images, or `count` is not a whole number of at least 1.

    Examples
    --------
    >>> import torch
    >>> labels = torch.tensor([0, 0, 1])
    >>> a, p, n = draw_triplets(labels, 100)
    >>> bool((a != p).all()), n.unique()
    (True, tensor([2]))

    References
    ----------
    E. Hoffer, N. Ailon, "Deep metric learning using Triplet network", arXiv 1412.6622, 2014,
    section 3.
    """
    check_labels(labels)
    check_count(count, "count")
    _, which, sizes = labels.unique(return_inverse=True, return_counts=True)
    several = torch.nonzero(sizes > 1)[:, 0]
    if len(sizes) < 2 or not len(several):
        raise ValueError(
            "labels must hold at least two classes, and a class of at least two images, got "
            f"{len(sizes)} classes, the largest of {int(sizes.max()) if len(sizes) else 0} images"
        )

    def below(limits: Tensor | int) -> Tensor:
        # From so wide a range that the remainders are as good as uniform.
        drawn = torch.randint(2**62, (count,), generator=generator, device=_place(generator))
        return drawn.to(labels.device) % limits

    # Members of a class lie side by side in `order`, from `first` on.
    order, first = which.argsort(), sizes.cumsum(dim=0) - sizes
    like = several[below(len(several))]
    unlike = (like + 1 + below(len(sizes) - 1)) % len(sizes)
    anchor = below(sizes[like])
    positive = (anchor + 1 + below(sizes[like] - 1)) % sizes[like]
    negative = below(sizes[unlike])
    return (
        order[first[like] + anchor],
        order[first[like] + positive],
        order[first[unlike] + negative],
    )


def _place(generator: torch.Generator | None) -> torch.device:
    """Return where a generator draws, whatever the default device is."""
    return torch.device("cpu") if generator is None else generator.device


class BalancedBatchSampler(Sampler[list[int]]):
    """Draw batches of the same number of images from each of a number of classes (P x K).

    An epoch is ``len(labels) // (classes_per_batch * images_per_class)`` batches, and at least
    one. Within an epoch no class is drawn again before every other has been drawn as often, and no
    image before every other image of its class; so classes of unequal size are seen equally
    often, a small one's images more often each. A class of fewer than `images_per_class` images
    repeats them within the batch.

    Parameters
    ----------
    labels : Tensor of integers, shape (n,)
        The class of every image.
    classes_per_batch : int
        P, at most the number of classes and at least 2, or there would be no negative.
    images_per_class : int
        K, at least 2, or there would be no positive.
    generator : torch.Generator, optional
        Where the randomness comes from; by default torch's global one.

    Yields
    ------
    list of int
        P * K indices, those of one class side by side.

    Raises
    ------
    TypeError, ValueError
        If the labels are not integers of shape (n,), or P or K is out of range.

    Examples
    --------
    >>> import torch
    >>> labels = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2])
    >>> batch = next(iter(BalancedBatchSampler(labels, classes_per_batch=2, images_per_class=2)))
    >>> labels[batch].unique(return_counts=True)[1]
    tensor([2, 2])

    References
    ----------
    A. Hermans, L. Beyer, B. Leibe, "In defense of the triplet loss for person
    re-identification", arXiv 1703.07737, 2017, section 2.
    """

    def __init__(
        self,
        labels: Tensor,
        classes_per_batch: int,
        images_per_class: int,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        check_labels(labels)
        check_count(classes_per_batch, "classes_per_batch", low=2)
        check_count(images_per_class, "images_per_class", low=2)
        _, self._classes, self._sizes = labels.cpu().unique(return_inverse=True, return_counts=True)
        if classes_per_batch > len(self._sizes):
            raise ValueError(
                f"classes_per_batch must be at most the number of classes in labels, "
                f"{len(self._sizes)}, got {classes_per_batch}"
            )
        self.classes_per_batch = classes_per_batch
        self.images_per_class = images_per_class
        self.generator = generator
        self._length = max(1, len(labels) // (classes_per_batch * images_per_class))

    def __len__(self) -> int:
        """Return the number of batches in an epoch."""
        return self._length

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the batches of one epoch."""
        # One shuffle of all images, sorted by class, is a shuffled deck for each.
        shuffled = self._order(len(self._classes))
        images = shuffled[self._classes[shuffled].argsort(stable=True)].tolist()
        stops = self._sizes.cumsum(dim=0).tolist()
        stretches = [slice(*ends) for ends in zip([0, *stops], stops, strict=False)]
        decks: dict[int, list[int]] = {}  # of the classes drawn so far
        every_class = range(len(stretches))
        class_deck = self._shuffled(every_class)
        for _ in range(self._length):
            batch: list[int] = []
            for label in self._hand(class_deck, every_class, self.classes_per_batch):
                members = images[stretches[label]]
                deck = decks.setdefault(label, members.copy())
                batch += self._hand(deck, members, self.images_per_class)
            yield batch

    def _shuffled(self, things: Sequence[int]) -> list[int]:
        return [things[i] for i in self._order(len(things)).tolist()]

    def _order(self, count: int) -> Tensor:
        place = _place(self.generator)
        return torch.randperm(count, generator=self.generator, device=place).cpu()

    def _hand(self, deck: list[int], everything: Sequence[int], count: int) -> list[int]:
        """Take so many off the deck; when it is out, start another of everything.

        Of the new deck those come first that the hand holds least often.
        """
        hand = deck[:count]
        del deck[:count]
        while len(hand) < count:
            fresh, held = self._shuffled(everything), Counter(hand)
            taken = sorted(fresh, key=held.__getitem__)[: count - len(hand)]
            gone = set(taken)
            deck[:] = [thing for thing in fresh if thing not in gone]
            hand += taken
        return hand
