"""Which rows of a batch, or of a reference set, are an anchor's positives and its negatives."""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from tripletlib._validation import check_labels, check_match, check_number, check_points


class Table(NamedTuple):
    """For every anchor a list of its positives, filled up with anything.

    `columns` and `positive` are of shape (n, p); the second tells which of the first are positives.
    """

    columns: Tensor
    positive: Tensor


class Pairs:
    """The positives and negatives of each of n anchors among r candidates.

    Parameters
    ----------
    labels : Tensor, shape (n,), optional
        Classes, if anchors and candidates are the same n samples.
    same : Tensor of bool, shape (n, r), optional
        Otherwise: which candidates are alike an anchor.
    itself : Tensor of int64, shape (n,), optional
        Which candidate is the anchor itself, neither positive nor negative; -1 for none.
    """

    def __init__(
        self,
        labels: Tensor | None = None,
        same: Tensor | None = None,
        itself: Tensor | None = None,
    ) -> None:
        self._labels, self._same, self._itself = labels, same, itself

    @cached_property
    def alike(self) -> Tensor:
        """Which candidates are no negatives: positives and the anchor itself."""
        if self._labels is not None:
            return self._labels[:, None] == self._labels[None, :]
        return self._same | self._diagonal

    @cached_property
    def positive(self) -> Tensor:
        """Which candidates are positives."""
        if self._labels is not None:
            return self.alike.clone().fill_diagonal_(False)
        return self._same & ~self._diagonal

    @cached_property
    def _diagonal(self) -> Tensor:
        candidates = torch.arange(self._same.shape[1], device=self._same.device)
        return candidates == self._itself[:, None]

    @cached_property
    def negatives(self) -> Tensor:
        """How many negatives each anchor has."""
        if self._labels is not None:
            return len(self._labels) - self.classes[1].index_select(0, self.classes[0])
        return (~self.alike).sum(dim=1)

    @cached_property
    def positives(self) -> Tensor:
        """How many positives each anchor has."""
        if self._labels is not None:
            return len(self._labels) - self.negatives - 1
        return self.positive.sum(dim=1)

    @cached_property
    def classes(self) -> tuple[Tensor, Tensor]:
        """Of labels: which class each sample is of, and how large each class is."""
        return self._labels.unique(return_inverse=True, return_counts=True)[1:]

    def count_valid(self) -> int:
        """Count the triplets."""
        return int((self.positives * self.negatives).sum())

    def negatives_of(self, distances: Tensor, rows: slice | Tensor, value: float) -> Tensor:
        """Give some rows of a matrix, with a value of one's own in place of all but negatives."""
        if self._labels is not None:
            return distances[rows].scatter(1, self._members[rows], value)
        return distances[rows].masked_fill(self.alike[rows], value)

    @cached_property
    def table(self) -> Table:
        """The positives as a table, which has far fewer columns than there are candidates."""
        if self._labels is not None:
            columns = self._members[:, : max(self._members.shape[1] - 1, 0)]
            place = torch.arange(columns.shape[1], device=columns.device)
            return Table(columns, place < self.positives[:, None])
        number = self.positives
        place = torch.arange(int(number.max()) if len(number) else 0, device=number.device)
        real = place < number[:, None]
        columns = torch.zeros_like(real, dtype=torch.int64)
        columns[real] = self.positive.nonzero(as_tuple=True)[1]
        return Table(columns, real)

    @cached_property
    def _members(self) -> Tensor:
        """Of labels: for every sample the others of its class, filled up with itself, once or more.

        (One matrix of few columns; `alike` and `positive` are as large as the distances.)
        """
        which, sizes = self.classes
        device, n = self._labels.device, len(self._labels)
        place = torch.arange(int(sizes.max()) if n else 0, device=device)
        first = (sizes.cumsum(dim=0) - sizes).index_select(0, which)
        order = which.argsort()
        # The place of each sample in its class; from the next one on, round, it comes last itself.
        own = torch.empty_like(order).scatter_(0, order, torch.arange(n, device=device)) - first
        size = sizes.index_select(0, which)[:, None]
        return order[first[:, None] + (own[:, None] + 1 + place.clamp(max=size - 1)) % size]


def pairs_of(
    embeddings: Tensor,
    labels: Tensor | None,
    margin: float,
    reference: Tensor | None = None,
    reference_labels: Tensor | None = None,
    *,
    same: Tensor | None = None,
    anchor_rows: Tensor | None = None,
) -> Pairs:
    """Check what functions of triplets take, and tell who is whose positive and negative."""
    check_points(embeddings)
    check_number(margin, "margin")
    n, device = len(embeddings), embeddings.device
    if (labels is None) == (same is None):
        raise ValueError(
            f"either labels or same must be given, got {'both' if same is not None else 'neither'}"
        )
    if reference is None:
        for name, thing in (("reference_labels", reference_labels), ("anchor_rows", anchor_rows)):
            if thing is not None:
                raise ValueError(f"{name} must come with a reference, got none")
    else:
        check_match(reference, embeddings, "reference", "embeddings")
    r = n if reference is None else len(reference)
    if labels is not None:
        check_labels(labels, n)
        labels = labels.to(device)
        if reference is None:
            return Pairs(labels)
        check_labels(reference_labels, r, "reference_labels", "reference")
        same = labels[:, None] == reference_labels.to(device)[None, :]
    else:
        if reference_labels is not None:
            raise ValueError("reference_labels must come with labels, got same")
        _check_same(same, (n, r))
    return Pairs(same=same.to(device), itself=_itself(embeddings, reference, anchor_rows))


def _check_same(same: Tensor, shape: tuple[int, int]) -> None:
    if not isinstance(same, Tensor) or same.dtype != torch.bool:
        got = same.dtype if isinstance(same, Tensor) else type(same).__name__
        raise TypeError(f"same must be a torch.Tensor of bool, got {got}")
    if same.shape != shape:
        raise ValueError(
            f"same must have shape {shape}, a row for each anchor and a column for each candidate, "
            f"got {tuple(same.shape)}"
        )


def _itself(embeddings: Tensor, reference: Tensor | None, anchor_rows: Tensor | None) -> Tensor:
    """Which candidate is the anchor itself: as given, or by where in memory both lie."""
    n = len(embeddings)
    if reference is None:
        return torch.arange(n, device=embeddings.device)
    if anchor_rows is None:
        return _same_memory(embeddings, reference)
    check_labels(anchor_rows, n, "anchor_rows")
    rows = anchor_rows.to(embeddings.device).long()
    if n and not (int(rows.min()) >= -1 and int(rows.max()) < len(reference)):
        raise ValueError(
            f"anchor_rows must be from -1 (none) to {len(reference) - 1}, got "
            f"{int(rows.min())} to {int(rows.max())}"
        )
    return rows


def _same_memory(embeddings: Tensor, reference: Tensor) -> Tensor:
    """Rows of the reference that are rows of the embeddings in memory, and -1 where none is."""
    none = torch.full((len(embeddings),), -1, device=embeddings.device)
    step, columns = reference.stride()
    if not embeddings.numel() or not reference.numel() or step == 0:
        return none
    if columns != embeddings.stride(1) or not _share(embeddings, reference):
        return none
    start = embeddings.storage_offset() - reference.storage_offset()
    away = start + embeddings.stride(0) * torch.arange(len(embeddings), device=none.device)
    row = away.div(step, rounding_mode="floor")
    return torch.where((away % step == 0) & (row >= 0) & (row < len(reference)), row, none)


def _share(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors lie in the same memory."""
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
