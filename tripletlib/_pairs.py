"""Which rows of a batch, or of a reference set, are an anchor's positives and its negatives."""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from tripletlib._validation import check_labels, check_number, check_points


class Table(NamedTuple):
    """For every anchor the columns that are no negatives, and which of them are positives.

    `columns` of shape (n, w) begins with the positives and is filled up with what is no negative
    either; `positive` of shape (n, p), p ≤ w, tells which of the first p are positives.
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
            return len(self._labels) - self._classes[1].index_select(0, self._classes[0])
        return (~self.alike).sum(dim=1)

    @cached_property
    def positives(self) -> Tensor:
        """How many positives each anchor has."""
        if self._labels is not None:
            return len(self._labels) - self.negatives - 1
        return self.positive.sum(dim=1)

    @cached_property
    def _classes(self) -> tuple[Tensor, Tensor]:
        """Of labels: which class each sample is of, and how large each class is."""
        return self._labels.unique(return_inverse=True, return_counts=True)[1:]

    def count_valid(self) -> int:
        """Count the triplets."""
        return int((self.positives * self.negatives).sum())

    @cached_property
    def table(self) -> Table:
        """The same as lists of columns, of which there are far fewer than of candidates."""
        return self._table_of_matrix() if self._labels is None else self._table_of_labels()

    def _table_of_labels(self) -> Table:
        which, sizes = self._classes
        device, n = self._labels.device, len(self._labels)
        place = torch.arange(int(sizes.max()) if n else 0, device=device)
        first = (sizes.cumsum(dim=0) - sizes).index_select(0, which)
        order = which.argsort()
        # The place of each sample in its class; from the next one on, round, it comes last itself.
        own = torch.empty_like(order).scatter_(0, order, torch.arange(n, device=device)) - first
        size = sizes.index_select(0, which)[:, None]
        columns = order[first[:, None] + (own[:, None] + 1 + place.clamp(max=size - 1)) % size]
        return Table(columns, (place < size - 1)[:, : max(len(place) - 1, 0)])

    def _table_of_matrix(self) -> Table:
        columns = self.positive.nonzero(as_tuple=True)[1]
        number = self.positives
        width = int(number.max()) if len(number) else 0
        place = torch.arange(width, device=number.device)
        real = place < number[:, None]
        # A row is filled up with the anchor itself or its first positive: neither is a negative.
        # (Where it has neither, with any: without a positive there is no triplet.)
        first = self.positive.byte().argmax(dim=1) if self._same.shape[1] else number
        spare = torch.where(self._itself < 0, first, self._itself)[:, None]
        table = spare.repeat(1, width + 1)
        table[:, :width][real] = columns
        return Table(table[:, : width + bool(self._same.shape[1])], real)


def pairs_of(
    embeddings: Tensor,
    labels: Tensor | None,
    margin: float,
    *,
    reference: Tensor | None = None,
    reference_labels: Tensor | None = None,
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
        check_reference(embeddings, reference)
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


def check_reference(embeddings: Tensor, reference: Tensor) -> None:
    """Refuse a reference that cannot be compared with the embeddings."""
    check_points(reference, "reference")
    wanted = (embeddings.shape[1], embeddings.dtype, embeddings.device)
    got = (reference.shape[1], reference.dtype, reference.device)
    if got != wanted:
        raise ValueError(
            "reference must match embeddings in columns, dtype and device: "
            f"({', '.join(map(str, wanted))}), got ({', '.join(map(str, got))})"
        )


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
