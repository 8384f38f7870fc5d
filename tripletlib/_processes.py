"""Several processes, started by torchrun, that train or embed together."""

from __future__ import annotations

import atexit
import itertools
import os
import secrets
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

_Thing = TypeVar("_Thing")


class Processes:
    """One process among those that work together; alone, it has nobody to speak to.

    There are several where torchrun started them, or where the reader has initialised
    ``torch.distributed``. All must come to the same calls in the same order.

    Parameters
    ----------
    device : torch.device
        Where this process computes. On CUDA they speak by NCCL, otherwise by Gloo.

    Attributes
    ----------
    rank, number : int
        Which of how many this one is.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.rank, self.number = device, 0, 1
        if not dist.is_available():
            return
        by_torchrun = dist.is_torchelastic_launched() and int(os.environ["WORLD_SIZE"]) > 1
        if by_torchrun and not dist.is_initialized():
            if device.type == "cuda":
                torch.cuda.set_device(device)
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
            atexit.register(lambda: dist.is_initialized() and dist.destroy_process_group())
        if dist.is_initialized():
            self.rank, self.number = dist.get_rank(), dist.get_world_size()

    def share(self, count: int, rank: int | None = None) -> slice:
        """Give the stretch of so many things that is this process's.

        Sizes differ by one at most, and none is larger than the first.
        """
        rank = self.rank if rank is None else rank
        return slice(*(-(-count * end // self.number) for end in (rank, rank + 1)))

    def apart(self, *numbers: int) -> tuple[int, ...]:
        """Add to numbers that seed random ones which of several processes this is."""
        return numbers if self.number == 1 else (*numbers, self.rank + 1)

    def agree(self, thing: _Thing) -> _Thing:
        """Give to all what the first process has."""
        if self.number == 1:
            return thing
        held = [thing if self.rank == 0 else None]
        dist.broadcast_object_list(held, src=0, device=self.device)
        return held[0]

    def wait(self) -> None:
        """Wait until all have come here."""
        if self.number > 1:
            dist.barrier()

    def take_from_first(self, modules: Iterable[nn.Module]) -> None:
        """Make weights and running statistics those of the first process."""
        if self.number == 1:
            return
        for module in modules:
            own = module.state_dict()
            state = {k: v.cpu() if isinstance(v, Tensor) else v for k, v in own.items()}
            module.load_state_dict(self.agree(state))

    def gather(self, rows: Tensor, count: int) -> Tensor:
        """Put together the rows of all shares of so many, with a gradient to one's own."""
        return rows if self.number == 1 else _Gather.apply(rows, self, count)

    def average_gradients(self, weights: list[Tensor]) -> None:
        """Put in the place of each weight's gradient its mean over the processes.

        A weight that has none in any of them is left with none.
        """
        if self.number == 1:
            return
        for kind in {(weight.dtype, weight.device): None for weight in weights}:
            alike = [weight for weight in weights if (weight.dtype, weight.device) == kind]
            zero = torch.zeros((), dtype=kind[0], device=kind[1])
            parts = [zero.expand(w.numel()) if w.grad is None else w.grad.flatten() for w in alike]
            has_any = torch.tensor([w.grad is not None for w in alike]).to(zero)
            together = torch.cat([*parts, has_any])
            dist.all_reduce(together)
            *parts, has_any = together.split([*(len(part) for part in parts), len(alike)])
            for weight, part, some in zip(alike, parts, has_any.tolist(), strict=True):
                weight.grad = part.div(self.number).view_as(weight) if some else None


class _Gather(torch.autograd.Function):
    """The rows of all processes.

    Each of them computes the same number from all rows, so that its gradient has what belongs to
    its own, and nothing is sent back. What depends on the number by its own rows only has a share
    of the gradient, what depends on it directly (weights of a loss) all of it: the former is
    multiplied by the number of processes, so that for both the mean over processes is right.
    """

    @staticmethod
    def forward(ctx, rows: Tensor, processes: Processes, count: int) -> Tensor:
        shares = [processes.share(count, rank) for rank in range(processes.number)]
        ctx.own, ctx.number = shares[processes.rank], processes.number
        sent = rows.new_zeros(shares[0].stop, *rows.shape[1:])  # all must send as much
        sent[: len(rows)] = rows
        got = [torch.empty_like(sent) for _ in shares]
        dist.all_gather(got, sent)
        parts = zip(got, shares, strict=True)
        return torch.cat([part[: share.stop - share.start] for part, share in parts])

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad[ctx.own] * ctx.number, None, None


def write_rows(path: Path, parts: Iterator[Tensor], count: int, processes: Processes) -> Tensor:
    """Write rows that come part by part, in each process its share of so many, to one .npy file.

    Returns
    -------
    Tensor
        The file mapped into memory.
    """
    target = Path(os.path.realpath(path))
    scratch = target.with_name(processes.agree(f".tripletlib.{secrets.token_hex(8)}"))
    try:
        first = next(parts, None)
        is_first = processes.rank == 0  # which always has a part
        kind = ((count, *first.shape[1:]), first.numpy().dtype) if is_first else None
        shape, dtype = processes.agree(kind)
        if is_first:
            target.parent.mkdir(parents=True, exist_ok=True)
            _reserve(scratch, shape, dtype)
        processes.wait()
        _fill(np.load(scratch, mmap_mode="r+"), first, parts, processes.share(count))
        processes.wait()
        if is_first:
            os.replace(scratch, target)
        processes.wait()
    except BaseException:
        if processes.rank == 0:
            scratch.unlink(missing_ok=True)
        raise
    return torch.from_numpy(np.load(target, mmap_mode="c"))


def _reserve(file: Path, shape: tuple[int, ...], dtype: np.dtype) -> None:
    """Make a file for an array, and see to it that there is room for all of it."""
    np.lib.format.open_memmap(file, "w+", dtype, shape)
    if hasattr(os, "posix_fallocate"):  # else a full disk would kill the process in a write
        with open(file, "r+b") as stream:
            os.posix_fallocate(stream.fileno(), 0, file.stat().st_size)


def _fill(rows: np.memmap, first: Tensor | None, parts: Iterator[Tensor], own: slice) -> None:
    place = own.start
    for part in itertools.chain([] if first is None else [first], parts):
        end = place + len(part)
        if end > own.stop or part.shape[1:] != rows.shape[1:]:
            break
        rows[place:end] = part.numpy()
        place = end
    if place != own.stop:
        raise ValueError("network must give one row an image, all of one shape, to be written")
    rows.flush()
