"""Train an embedding network, and embed images with it."""

from __future__ import annotations

import copy
import inspect
import itertools
import math
import os
import random
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from numbers import Real
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import BatchSampler, Dataset, RandomSampler, Subset
from tqdm import tqdm

from tripletlib._cache import user_path
from tripletlib._optimizer import optimizers
from tripletlib._pairs import Pairs
from tripletlib._precision import no_autocast
from tripletlib._processes import Processes, write_rows
from tripletlib._reading import (
    Reader,
    as_labels,
    check_dataset,
    file_stamps,
    labels_of,
    number_of_workers,
)
from tripletlib._validation import (
    check_count,
    check_images,
    check_labels,
    check_number,
    check_points,
    warn,
)
from tripletlib.augmentation import jitter
from tripletlib.checkpoints import Checkpoint, Origin
from tripletlib.losses import TripletLoss, batch_all_triplet_loss
from tripletlib.triplets import describe_triplets, squared_distances_and_spread


class History:
    """What happened at each step of a training run, a row a step.

    ``history["loss"]`` is one column as a NumPy array, ``len(history)`` the number of steps and
    ``history.frame()`` the whole as a pandas data frame. The columns:

    - ``epoch`` and ``step``, both counted from 0, the step through all epochs;
    - ``loss``, of the batch, before the step's update;
    - ``active``, the fraction of the batch's valid triplets that violate the margin: the loss's
      ``margin`` if that is a number of at least 0, else 0.2;
    - ``positive_distance`` and ``negative_distance``, the mean over the batch's pairs of one and of
      different classes, squared unless the loss has ``squared=False``;
    - ``spread``, how far the batch's embeddings lie apart (see `describe_triplets`);
    - ``learning_rate``, and ``seconds`` since training began, resting times left out;
    - ``validation``, if `fit` was given `validate`: what that returned after the epoch, in the row
      of its last step, and NaN in the others.
    """

    def __init__(self, rows: Iterable[dict[str, float]] = ()) -> None:
        self.rows = list(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, column: str) -> np.ndarray:
        if self.rows and column not in self.rows[0]:
            raise KeyError(f"no column {column!r}; there are {', '.join(self.rows[0])}")
        return np.array([row[column] for row in self.rows])

    def __repr__(self) -> str:
        if not self.rows:
            return "History of 0 steps"
        last = self.rows[-1]
        return (
            f"History of {len(self)} steps: loss {last['loss']:.4f}, "
            f"active {last['active']:.2%} at the last one"
        )

    def frame(self) -> pd.DataFrame:
        """Return the history as a data frame with one row a step."""
        return pd.DataFrame(self.rows)


def fit(
    network: nn.Module,
    images: Tensor | Dataset,
    labels: Tensor | Sequence[str] | None = None,
    *,
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    epochs: int = 2,
    batch_size: int = 512,
    learning_rate: float = 4e-3,
    seed: int | None = None,
    augment: Callable[[Tensor], Tensor] | Literal[False] | None = None,
    batch_sampler: Iterable[Sequence[int]] | None = None,
    bf16: bool | None = None,
    optimizer: torch.optim.Optimizer
    | Callable[[list[Tensor]], torch.optim.Optimizer]
    | None = None,
    schedule: Callable[[torch.optim.Optimizer, int], LRScheduler] | None = None,
    validate: Callable[[nn.Module], float] | None = None,
    patience: int | None = None,
    checkpoint: str | os.PathLike | None = None,
    callback: Callable[[History], bool | None] | None = None,
    workers: int | None = None,
    progress: bool = True,
) -> History:
    """Train a network so that its embeddings satisfy a loss.

    Convolution kernels but the first are trained by Muon, all other weights by AdamW, both with a
    one-cycle schedule. Started by ``torchrun`` in several processes, it trains one network in all
    of them; see Notes.

    Parameters
    ----------
    network : nn.Module
        Maps a batch of images to embeddings of shape (n, d). It is trained in place, on the device
        where its parameters are. What is frozen stays so, running means too: any part none of whose
        parameters requires a gradient, and of a network in training mode the parts in evaluation
        mode.
    images : Tensor, floating point, shape (n, ...), or Dataset
        All training images. Each is looked at once an epoch. A map-style data set, torchvision's
        ``ImageFolder``, say, is read batch by batch, so that memory does not grow with it; its
        items are (image, label), images of one batch are of one shape, and what its transforms
        draw at random comes from the global generators of torch, NumPy or Python.
    labels : Tensor of integers, shape (n,)
        Their classes. Of a data set also a sequence of words, and by default its ``targets`` (by
        its ``target_transform``, if any), through ``Subset`` and ``ConcatDataset`` too; where it
        has none, all its items are read once for them.
    loss : callable, optional
        Takes (embeddings, labels) and returns a scalar; any loss of this package, of
        pytorch-metric-learning or of torch. One that is a module is brought to the network's
        device, and parameters of its own are trained too. By default ``TripletLoss()``.
    epochs : int, default 2
        Passes over the images.
    batch_size : int, default 512
        Images a step. What is left at the end of an epoch makes a smaller batch, unless it is a
        single image, which can form no triplet.
    learning_rate : float, default 4e-3
        Peak of the one-cycle schedule for AdamW. That of Muon is 12.5 times as high.
    seed : int, optional
        Fixes order, augmentation and dropout: the same network, data and seed give the same
        weights on the same machine. The global random states (of torch, NumPy and Python) are left
        as they were. By default drawn from torch's global generator.
    augment : callable or False, optional
        Changes a batch of images before the network sees it. By default `jitter` if the images
        are a tensor of shape (n, channels, height, width), and nothing otherwise: a data set has
        transforms for that. False for nothing.
    batch_sampler : iterable of sequences of indices, optional
        Replaces the shuffled batches, for instance a `BalancedBatchSampler`; it has a length, and
        `batch_size` is then of no effect. A batch is a list, tuple, range, array or tensor. With
        a data set, the batches of an epoch are drawn at its start.
    bf16 : bool, optional
        Run the network in bfloat16 (autocast). By default only where that is faster without doubt:
        on a CPU with AMX. The loss is always computed in float32.
    optimizer : Optimizer or callable, optional
        Takes the place of Muon and AdamW, and of their schedule; `learning_rate` is then of no
        effect. A callable, ``partial(torch.optim.SGD, lr=0.01)``, say, gets all parameters that
        require a gradient; an instance has some of them, in groups with rates of their own.
    schedule : callable, optional
        Takes (optimizer, number of steps) and returns one of torch's schedules, which moves on
        after each step. Only with `optimizer`, whose rates stay as they are by default.
    validate : callable, optional
        Takes the network, in evaluation mode and without gradients, and returns a number, say the
        Recall@1 on images held back; more is better. Called after each epoch. At the end the
        network has the weights of the best epoch.
    patience : int, optional
        End when so many epochs in turn brought no better number from `validate`.
    checkpoint : path, optional
        Written whole after each epoch. If it exists, training goes on from there, to the same
        weights as without a break, and with its seed if none is given; a finished one is just
        loaded. In an existing folder, the file is named after all that the run comes from. What
        counts as the same run is said at `load_or_fit`; what changes as it is used (a loss with a
        memory, a data set that fills a cache) has to be made anew to go on in the same process.
    callback : callable, optional
        Called with the history so far after every step. If it returns True, training ends there;
        a checkpoint then holds the whole epochs before.
    workers : int, optional
        Processes that read a data set; the result is the same for any number. By default one a
        core, up to 4, where the system starts processes by forking (Linux), and none elsewhere;
        several that torchrun has started share out the cores.
    progress : bool, default True
        Show a bar with the loss and the active fraction.

    Returns
    -------
    History
        A row a step.

    Raises
    ------
    TypeError, ValueError
        If an argument is of the wrong type, shape or range, embeddings are not finite or not one
        a label, the loss is no scalar, a batch is no list of places in `images`, or the checkpoint
        is damaged or was made with other code, data, network or settings.
    FloatingPointError
        If the loss is not finite.
    RuntimeError
        If an item of a data set cannot be read; the message names it.
    OSError
        If the checkpoint cannot be written there; found out before training begins.

    Notes
    -----
    The schedule is that of L. N. Smith and N. Topin, "Super-convergence", arXiv 1708.07120, 2018,
    rising for a fifth of the steps. Muon is that of K. Jordan et al., 2024.

    In several processes (of ``torchrun``, or of a ``torch.distributed`` group that the reader has
    made) all make the same call, with the same images, labels and settings. Each embeds its share
    of the batch; the embeddings are gathered, so that the loss is that of the whole batch, and each
    step is the one that a single process would take. Not so where rows of a batch depend on each
    other in the network: batch normalisation sees the share only (on GPUs, convert the network by
    ``torch.nn.SyncBatchNorm.convert_sync_batchnorm``), and its running statistics are those of the
    first process. Random numbers in the network, and those of a data set, are drawn anew for each
    process. `callback` and `validate` are called in all; what they return in the first counts, as
    do the initial weights there and its batches, which are drawn at the start of an epoch. It alone
    shows a bar and writes the checkpoint. Where one process ends by an error, ``torchrun`` ends
    all.
    """
    loss = TripletLoss() if loss is None else loss
    workers = number_of_workers(workers)
    labels = _labels(images, labels, workers, progress=progress)
    _check_arguments(
        *(network, loss, images, labels, epochs, batch_size, learning_rate),
        *(batch_sampler, augment, callback, bf16),
    )
    _check_choices(optimizer, schedule, validate, patience)
    check_count(0 if seed is None else seed, "seed", low=0)
    # Plain numbers, as PyTorch and files want them, of NumPy's.
    epochs, batch_size, learning_rate = int(epochs), int(batch_size), float(learning_rate)
    if Pairs(labels).count_valid() == 0:
        warn("labels hold no triplet, which takes two images of one class and one of another")
    in_memory = isinstance(images, Tensor)
    if augment is None and in_memory and images.dim() == 4:
        augment = jitter
    device = next(network.parameters()).device
    processes = Processes(device)
    _check_processes(processes, labels, batch_size if batch_sampler is None else None)
    bf16 = processes.agree(_has_fast_bf16(device)) if bf16 is None else bf16
    if batch_sampler is None:
        places, rest = RandomSampler(range(len(images))), len(images) % batch_size
        too_few = 0 < rest < 2 * processes.number
        batch_sampler = BatchSampler(places, batch_size, drop_last=too_few)
    drawn = processes.agree(int(torch.randint(2**31, ()) if seed is None else seed))
    with (
        own_randomness(device),
        no_autocast(device),
        torch.inference_mode(False),
        torch.enable_grad(),
    ):
        materialise(network, images)
        _start_training(network)
        if isinstance(loss, nn.Module):
            _freeze(loss)
        steps = epochs * len(batch_sampler)
        ours = _Steering.of(network, loss, steps, learning_rate, optimizer, schedule)
        run = _Run(network, loss, ours, steps, augment, bf16, drawn, processes)
        processes.take_from_first(run.modules())
        if checkpoint is not None:
            numbers = (epochs, batch_size, learning_rate, bf16, patience)
            numbers += (processes.number,) if processes.number > 1 else ()
            settings = {"settings": numbers, "augment": augment, "batch_sampler": batch_sampler}
            settings |= {"schedule": schedule, "validate": validate}
            settings |= {"optimizer": _told(optimizer, run)}
            data = (images, labels, [] if in_memory else file_stamps(images))
            run.attach(checkpoint, data, settings, seed_given=seed is not None)
        with nullcontext() if in_memory else Reader(images, workers) as reader:

            def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
                return _batches(images, labels, batch_sampler, reader, (run.seed, epoch), processes)

            _train(run, batches, epochs, device, validate, patience, callback, progress)
        run.take_best()
    network.eval()
    return run.history


def _train(
    run: _Run,
    batches: Callable[[int], Iterator[tuple[Tensor, Tensor]]],
    epochs: int,
    device: torch.device,
    validate: Callable[[nn.Module], float] | None,
    patience: int | None,
    callback: Callable[[History], bool | None] | None,
    progress: bool,
) -> None:
    """Take the steps of a run from where it is, epoch by epoch, until its end."""
    start = time.perf_counter() - (run.history.rows[-1]["seconds"] if run.history else 0.0)
    with _progress_bar(run, progress and run.processes.rank == 0) as bar:
        while run.epoch < epochs and not run.patience_is_out(patience):
            # A stream of its own for each epoch, so that resuming needs no random state.
            seed_all(run.seed, run.epoch)
            for images, labels in batches(run.epoch):
                row = run.step(images.to(device), labels.to(device))
                row |= {"epoch": run.epoch, "seconds": time.perf_counter() - start}
                row |= {"validation": math.nan} if validate else {}
                shown = {"loss": f"{row['loss']:.3f}", "active": f"{row['active']:.1%}"}
                bar.set_postfix(shown | run.best_shown(), refresh=False)
                bar.update()
                if callback is not None and run.processes.agree(_says_stop(callback(run.history))):
                    return run.processes.take_from_first(run.modules())
            run.processes.take_from_first(run.modules())
            if validate is not None:
                run.validate(validate)
            run.epoch += 1
            run.save(finished=run.epoch == epochs or run.patience_is_out(patience))


class _Steering(NamedTuple):
    """What moves the weights, and what moves its rates."""

    optimizers: list[torch.optim.Optimizer]
    schedules: list[LRScheduler]

    @classmethod
    def of(
        cls,
        network: nn.Module,
        loss: object,
        steps: int,
        learning_rate: float,
        optimizer: torch.optim.Optimizer | Callable | None,
        schedule: Callable | None,
    ) -> _Steering:
        """Take the reader's own, or make Muon and AdamW with a one-cycle schedule."""
        if isinstance(loss, nn.Module):
            loss.to(next(network.parameters()).device)
        if optimizer is None:
            ours = optimizers(network, loss, learning_rate)
            return cls(ours, [_one_cycle(of, steps) for of in ours])
        parts = [network, *([loss] if isinstance(loss, nn.Module) else [])]
        known = {id(weight): weight for part in parts for weight in part.parameters()}
        if not isinstance(optimizer, torch.optim.Optimizer):
            optimizer = optimizer([weight for weight in known.values() if weight.requires_grad])
            if not isinstance(optimizer, torch.optim.Optimizer):
                raise TypeError(
                    f"optimizer must give a torch.optim.Optimizer, got {type(optimizer).__name__}"
                )
        held = [weight for group in optimizer.param_groups for weight in group["params"]]
        strange = next((weight for weight in held if id(weight) not in known), None)
        if strange is not None:
            raise ValueError(
                "optimizer must hold parameters of network or loss, got another of shape "
                f"{tuple(strange.shape)}"
            )
        _check_steps_alone(optimizer, "optimizer", "torch.optim.LBFGS takes a closure")
        made = [] if schedule is None else [schedule(optimizer, max(1, steps))]
        for of in made:
            if not isinstance(of, LRScheduler):
                raise TypeError(
                    f"schedule must give one of torch's schedules, got {type(of).__name__}"
                )
            _check_steps_alone(of, "schedule", "ReduceLROnPlateau takes a measurement")
        return cls([optimizer], made)


def _check_steps_alone(thing: object, name: str, why: str) -> None:
    """Refuse what cannot take its step without being given something."""
    parameters = inspect.signature(thing.step).parameters.values()
    named = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    if any(of.kind in named and of.default is of.empty for of in parameters):
        raise TypeError(
            f"{name} must take its steps without arguments, which {type(thing).__name__} does not "
            f"({why})"
        )


def _one_cycle(optimizer: torch.optim.Optimizer, steps: int) -> LRScheduler:
    return torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        optimizer.defaults["lr"],
        total_steps=max(1, steps),
        pct_start=0.2 if steps != 5 else 0.3,  # at a rise of one step torch divides by zero
        cycle_momentum=False,
    )


def _told(optimizer: object, run: _Run) -> object:
    """Give what an optimiser is known by: its class, and of each group settings and parameters."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        return optimizer
    names = {id(w): name for part in run.modules() for name, w in part.named_parameters()}
    groups = [
        group | {"params": [names[id(weight)] for weight in group["params"]]}
        for group in optimizer.param_groups
    ]
    return type(optimizer), groups


class _Run:
    """The parts of a training run that change, so that a checkpoint can hold them all."""

    def __init__(
        self,
        network: nn.Module,
        loss: Callable[[Tensor, Tensor], Tensor],
        steering: _Steering,
        steps: int,
        augment: Callable[[Tensor], Tensor] | Literal[False] | None,
        bf16: bool,
        seed: int,
        processes: Processes,
    ) -> None:
        self.network, self.loss, self.augment, self.bf16 = network, loss, augment, bf16
        self.processes = processes
        self.optimizers, self.schedules = steering
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        self.weights = [weight for group in groups for weight in group["params"]]
        self.steps, self.seed = steps, seed
        self.history = History()
        self.epoch = 0
        self.best: dict[str, object] | None = None  # number, epoch and weights
        self.checkpoint: Checkpoint | None = None

    def step(self, images: Tensor, labels: Tensor) -> dict[str, float]:
        """Follow the gradient of a batch's loss once; return the history's new row.

        The labels are those of the whole batch, the images too or those of this process's share.
        """
        step = len(self.history)
        if step == self.steps:
            raise ValueError(f"batch_sampler gave more batches than its length: {step} in all")
        embeddings, labels = self._embedded(images, labels), labels.long()
        value, active = _value_and_active(self.loss, embeddings, labels)
        _check_loss(value, step)
        if not (embeddings.requires_grad or value.requires_grad or _is_trained(self.loss)):
            raise ValueError(
                "network must give embeddings that depend on its parameters, got detached ones"
            )
        row = {
            "step": step,
            "loss": value.item(),
            "learning_rate": float(self.optimizers[0].param_groups[0]["lr"]),
        }
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        if value.requires_grad:  # a loss may give a bare 0 where a batch holds nothing for it
            value.backward()
        for weight in self.weights:
            if weight.grad is not None and weight.grad.is_sparse:  # our optimisers are for dense
                weight.grad = weight.grad.to_dense()
        self.processes.average_gradients(self.weights)
        for part in [*self.optimizers, *self.schedules]:
            part.step()
        columns = _triplet_columns(embeddings.detach(), labels, self.loss, active)
        self.history.rows.append(row | columns)
        return self.history.rows[-1]

    def _embedded(self, images: Tensor, labels: Tensor) -> Tensor:
        """Embed a batch, of which each process has all images or its share."""
        own, is_alone = self.processes.share(len(labels)), self.processes.number == 1
        is_whole = len(images) == len(labels)
        if is_whole and self.augment:  # with the random numbers of a single process
            images = self.augment(images)
        images = images[own] if is_whole and not is_alone else images
        with nullcontext() if is_alone else own_randomness(images.device):
            if not is_alone:
                seed_all(*self.processes.apart(self.seed, len(self.history)))
            if self.augment and not is_whole:
                images = self.augment(images)
            with _bfloat16(images.device) if self.bf16 else nullcontext():
                embeddings = self.network(images)
        check_points(embeddings)
        check_labels(labels[own], len(embeddings))
        return self.processes.gather(embeddings.float() if self.bf16 else embeddings, len(labels))

    def attach(
        self,
        checkpoint: str | os.PathLike | Checkpoint,
        data: tuple[Tensor | Dataset, Tensor, list],
        settings: dict[str, object],
        *,
        seed_given: bool,
    ) -> None:
        """Keep the run in a checkpoint, and go on from there if it is kept already."""
        fixed = {"data": {"data": data}, "code": {"code": fit, "precision": _precision()}}
        moving = {"network": {"network": self.network}, "settings": settings | {"loss": self.loss}}
        origin = Origin(self.seed, fixed, moving, self.modules(), seed_given=seed_given)
        is_ours = isinstance(checkpoint, Checkpoint)
        self.checkpoint = checkpoint if is_ours else Checkpoint(checkpoint)
        is_first = self.processes.rank == 0
        state = self.processes.agree(self.checkpoint.open(origin) if is_first else None)
        if state is not None:
            if not is_first:
                origin.restore(state)
            for part, of_part in zip(self._parts(), state["parts"], strict=True):
                part.load_state_dict(of_part)
            self.history.rows[:] = state["history"]
            self.epoch, self.seed, self.best = state["epoch"], origin.seed, state["best"]

    def save(self, *, finished: bool) -> None:
        """Write the checkpoint whole, if there is to be one."""
        if self.checkpoint is not None and self.processes.rank == 0:
            parts = [part.state_dict() for part in self._parts()]
            state = {"parts": parts, "epoch": self.epoch, "finished": finished, "best": self.best}
            self.checkpoint.save(state | {"history": [_plain(row) for row in self.history.rows]})
        self.processes.wait()

    def validate(self, measure: Callable[[nn.Module], float]) -> None:
        """Measure the network after an epoch, and keep its weights if they are the best so far."""
        with _evaluating(self.network), torch.no_grad():
            value = self.processes.agree(measure(self.network))
        if isinstance(value, (Tensor, np.generic, np.ndarray)) and len(value.reshape(-1)) == 1:
            value = value.item()
        check_number(value, "what validate returns", low=-math.inf)
        self.history.rows[-1]["validation"] = float(value)
        if self.best is None or value > self.best["value"]:
            weights = [copy.deepcopy(module.state_dict()) for module in self.modules()]
            self.best = {"value": float(value), "epoch": self.epoch, "weights": weights}

    def patience_is_out(self, patience: int | None) -> bool:
        """Whether so many epochs have brought nothing better."""
        if patience is None or self.best is None:
            return False
        return self.epoch - self.best["epoch"] > patience

    def best_shown(self) -> dict[str, str]:
        """Give what a progress bar shows of the best epoch."""
        return {} if self.best is None else {"best validation": f"{self.best['value']:.4g}"}

    def take_best(self) -> None:
        """Go back to the weights of the best epoch, if one was looked for."""
        if self.best is not None:
            for module, weights in zip(self.modules(), self.best["weights"], strict=True):
                module.load_state_dict(weights)

    def modules(self) -> list[nn.Module]:
        """Give what is trained."""
        return [self.network, *([self.loss] if isinstance(self.loss, nn.Module) else [])]

    def _parts(self) -> list:
        return [*self.modules(), *self.optimizers, *self.schedules]


def materialise(network: nn.Module, images: Tensor | Dataset) -> None:
    """Give the parameters of lazy layers, which learn their shapes from data, shape and value."""
    if any(map(is_lazy, [*network.parameters(), *network.buffers()])):
        first = images[:2] if isinstance(images, Tensor) else Subset(images, range(2))
        embed(network, first, workers=0)


def _labels(images: object, labels: object, workers: int, *, progress: bool) -> Tensor | object:
    """Find the labels of a data set; those of a tensor are what was given."""
    if isinstance(images, Tensor):
        return labels
    check_dataset(images)
    if labels is None:
        return labels_of(images, workers, progress=progress)
    return labels if isinstance(labels, Tensor) else as_labels(list(labels))


def _batches(
    images: Tensor | Dataset,
    labels: Tensor,
    batch_sampler: Iterable[Sequence[int]],
    reader: Reader | None,
    seeds: tuple[int, int],
    processes: Processes,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield images and labels of the batches of an epoch.

    Those of a data set are read ahead, in each process its share.
    """
    if reader is None and processes.number == 1:
        for batch in batch_sampler:
            places = _places(batch, len(images))
            yield images[places], labels[places]
        return
    # One more than there should be, for the check that there is none.
    drawn = itertools.islice(batch_sampler, len(batch_sampler) + 1)
    drawn = processes.agree([_places(batch, len(images)) for batch in drawn])
    least = 2 * processes.number if processes.number > 1 else 1
    if small := next((len(batch) for batch in drawn if len(batch) < least), None):
        raise ValueError(
            f"batch_sampler must give batches of at least {least} images, two a process, "
            f"got one of {small}"
        )
    if reader is None:
        read = (images[batch] for batch in drawn)
    else:
        shares = [batch[processes.share(len(batch))] for batch in drawn]
        read = reader.read(shares, processes.apart(*seeds))
    for places, batch in zip(drawn, read, strict=True):
        yield batch, labels[places]


def _check_processes(processes: Processes, labels: Tensor, batch_size: int | None) -> None:
    """Refuse batches of under two images a process, and data of which each has a part."""
    if processes.number == 1:
        return
    for name, count in (("images", len(labels)), ("batch_size", batch_size)):
        if count is not None and count < 2 * processes.number:
            raise ValueError(
                f"{name} must be at least {2 * processes.number}, two a process, got {count}"
            )
    own = (len(labels), zlib.crc32(labels.long().cpu().contiguous().numpy()))
    if own != processes.agree(own):
        raise ValueError(
            "images and labels must be the same in all processes, because fit shares out each "
            f"batch by itself; got others in process {processes.rank} than in process 0"
        )


def _start_training(network: nn.Module) -> None:
    """Put a network into training mode, but for what its owner froze."""
    kept = [module for module in network.modules() if network.training and not module.training]
    network.train()
    for module in kept:
        module.training = False
    _freeze(network)


def _freeze(network: nn.Module) -> None:
    """Put the parts that have parameters, and none to be trained, into evaluation mode."""
    for module in network.modules():
        if next(module.parameters(), None) is not None and not _is_trained(module):
            module.eval()


def _is_trained(part: object) -> bool:
    weights = part.parameters() if isinstance(part, nn.Module) else ()
    return any(weight.requires_grad for weight in weights)


def _says_stop(answer: object) -> bool:
    """Whether a callback returned True, of Python or of NumPy; nothing else ends a run."""
    return isinstance(answer, (bool, np.bool_)) and bool(answer)


def _plain(row: dict[str, object]) -> dict[str, object]:
    """Make NumPy's numbers, which a callback may have added, Python's, which a file can keep."""
    plain = {
        k: v.tolist() if isinstance(v, (np.generic, np.ndarray)) else v for k, v in row.items()
    }
    for name, value in plain.items():
        if not isinstance(value, (int, float, complex, str, type(None), list, tuple, dict, Tensor)):
            raise TypeError(
                f"history must hold numbers, words or tensors to be kept in a checkpoint, got "
                f"{type(value).__name__} for {name!r}"
            )
    return plain


def embed(
    network: nn.Module,
    images: Tensor | Dataset,
    batch_size: int = 512,
    *,
    workers: int | None = None,
    out: str | os.PathLike | None = None,
) -> Tensor:
    """Return the embeddings of images, in batches, without gradients and without autocast.

    In several processes (see `fit`) each embeds all images, and with `out` its share of them.

    Parameters
    ----------
    network : nn.Module
        Put in evaluation mode for the while, so that a row does not depend on its batch.
    images : Tensor, floating point, shape (n, ...), or Dataset
        What the network takes. A map-style data set of images, or of tuples that begin with one,
        is read batch by batch.
    batch_size : int, default 512
        Images at a time; the rows are the same for any, up to rounding.
    workers : int, optional
        Processes that read a data set, as in `fit`.
    out : path, optional
        Write the embeddings to this file, in NumPy's ``.npy`` format (bfloat16, which that has not,
        as float32) and whole or not at all, batch by batch, so that memory does not grow with their
        number. Several processes must all see the file, and make the same call.

    Returns
    -------
    Tensor, shape (n, d)
        On the CPU, without gradient. With `out` the file mapped into memory, which reads what is
        looked at; changes to it do not go to the file.

    Raises
    ------
    TypeError, ValueError
        If network or what it gives is of another type, images are not floating point, not at least
        one, or not of one shape, or batch_size is below 1.
    RuntimeError
        If an item of a data set cannot be read; the message names it.
    OSError
        If `out` cannot be written.
    """
    if not isinstance(network, nn.Module):
        raise TypeError(f"network must be an nn.Module, got {type(network).__name__}")
    check_images(images) if isinstance(images, Tensor) else check_dataset(images)
    check_count(batch_size, "batch_size")
    workers = number_of_workers(workers)
    device = next(network.parameters(), torch.empty(0)).device
    processes = None if out is None else Processes(device)
    places = range(len(images))[slice(None) if out is None else processes.share(len(images))]
    batches = [places[start:][:batch_size] for start in range(0, len(places), int(batch_size))]
    in_memory = isinstance(images, Tensor)
    with (
        _evaluating(network),
        torch.no_grad(),
        no_autocast(device),
        nullcontext() if in_memory else Reader(images, workers) as reader,
    ):
        if in_memory:
            read = (images[batch.start : batch.stop] for batch in batches)
        else:
            read = reader.read(batches, [0])
        parts = (_rows(network(part.to(device)), len(part)) for part in read)
        if out is None:
            return torch.cat([*parts])
        parts = (part.float() if part.dtype == torch.bfloat16 else part for part in parts)
        return write_rows(user_path(out), parts, len(images), processes)


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    """Put a network in evaluation mode for a while."""
    training = [module for module in network.modules() if module.training]
    if training:
        network.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _rows(output: object, count: int) -> Tensor:
    if not isinstance(output, Tensor):
        raise TypeError(f"network must give a tensor, got {type(output).__name__}")
    if output.dim() == 0 or len(output) != count:
        raise ValueError(
            f"network must give one row an image, got shape {tuple(output.shape)} of {count}"
        )
    return output.cpu()


def _check_arguments(
    network: nn.Module,
    loss: object,
    images: Tensor | Dataset,
    labels: Tensor,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    batch_sampler: object,
    augment: object,
    callback: object,
    bf16: object,
) -> None:
    if not isinstance(network, nn.Module) or next(network.parameters(), None) is None:
        raise TypeError(f"network must be an nn.Module with parameters, got {network!r}")
    if not callable(loss):
        raise TypeError(f"loss must be callable, got {type(loss).__name__}")
    if not callable(augment) and augment not in (None, False):
        raise TypeError(f"augment must be callable, False or None, got {augment!r}")
    if not callable(callback) and callback is not None:
        raise TypeError(f"callback must be callable, got {callback!r}")
    if bf16 not in (None, True, False):
        raise TypeError(f"bf16 must be True, False or None, got {bf16!r}")
    if not _is_trained(network) and not _is_trained(loss):
        raise ValueError("network must have a parameter that requires a gradient, got none")
    if isinstance(images, Tensor):
        check_images(images)
    check_labels(labels, len(images), of="images")
    if len(images) < 2:
        raise ValueError(f"images must be at least 2, got {len(images)}")
    check_count(epochs, "epochs")
    check_count(batch_size, "batch_size", low=2)
    check_number(learning_rate, "learning_rate", strict=True)
    has_both = hasattr(batch_sampler, "__len__") and hasattr(batch_sampler, "__iter__")
    if batch_sampler is not None and not has_both:
        raise TypeError(
            "batch_sampler must have a length and be iterable, got "
            f"{type(batch_sampler).__name__}, which is not"
        )
    if batch_sampler is not None and len(batch_sampler) == 0:
        raise ValueError("batch_sampler must have at least one batch, got none")


def _check_choices(optimizer: object, schedule: object, validate: object, patience: object) -> None:
    is_one = isinstance(optimizer, torch.optim.Optimizer) or callable(optimizer)
    if optimizer is not None and not is_one:
        raise TypeError(f"optimizer must be an Optimizer or callable, got {optimizer!r}")
    for name, thing in (("schedule", schedule), ("validate", validate)):
        if thing is not None and not callable(thing):
            raise TypeError(f"{name} must be callable, got {thing!r}")
    if schedule is not None and optimizer is None:
        raise ValueError("schedule must come with an optimizer, got none")
    if patience is not None:
        check_count(patience, "patience")
        if validate is None:
            raise ValueError("patience must come with validate, got none")


def _check_loss(value: object, step: int) -> None:
    if not isinstance(value, Tensor) or value.numel() != 1:
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"loss must return a tensor of one number, got {got}")
    if value.is_complex():
        raise TypeError(f"loss must return a real number, got {value.dtype}")
    if not math.isfinite(value.item()):
        raise FloatingPointError(
            f"loss is {value.item()} at step {step}: try a lower learning_rate"
        )


def _places(batch: Sequence[int], images: int) -> Tensor:
    """Make a batch of `batch_sampler` an index tensor."""
    try:
        as_list = batch.tolist() if isinstance(batch, np.ndarray) else batch
        places = torch.as_tensor(batch if isinstance(batch, Tensor) else list(as_list))
        integers = not (places.is_floating_point() or places.is_complex())
        integers = integers and places.dtype != torch.bool
    except (TypeError, ValueError, RuntimeError):
        integers = False
    if not integers or places.dim() != 1 or not len(places):
        raise TypeError(f"batch_sampler must give sequences of places in images, got {batch!r}")
    places = places.long()
    if len(wrong := places[(places >= images) | (places < -images)]):
        raise ValueError(
            f"batch_sampler must give places in the {images} images, got {int(wrong[0])}"
        )
    return places


@contextmanager
def own_randomness(device: torch.device) -> Iterator[None]:
    """Leave the global random states of torch, NumPy and Python as they were."""
    of_python, of_numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(of_python)
            np.random.set_state(of_numpy)  # noqa: NPY002


def seed_all(*numbers: int) -> None:
    """Seed the global generators of torch, NumPy and Python."""
    number = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    torch.manual_seed(number)
    np.random.seed(number)  # noqa: NPY002
    random.seed(number)


def _precision() -> tuple[str, ...]:
    """Tell what else decides how torch rounds."""
    return (torch.__version__, torch.get_float32_matmul_precision())


def _bfloat16(device: torch.device) -> torch.autocast:
    # A cache of weights would outlive the step: it is emptied outside any autocast only.
    return torch.autocast(device.type, torch.bfloat16, cache_enabled=False)


def _has_fast_bf16(device: torch.device) -> bool:
    # A torch too old to tell is treated as a CPU without.
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return device.type == "cpu" and capabilities.get("amx_bf16", False)


def _progress_bar(run: _Run, progress: bool) -> tqdm:
    # A run that is only read again takes no time that could be told.
    done = "{l_bar}{bar}| {n_fmt}/{total_fmt} trained before"
    return tqdm(
        bar_format=done if len(run.history) == run.steps else None,
        total=run.steps,
        initial=len(run.history),
        disable=not progress,
        file=sys.stdout,
        mininterval=1.0,
        unit="batch",
    )


def _value_and_active(
    loss: Callable[[Tensor, Tensor], Tensor], embeddings: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Give the loss, and the number of active triplets if it is what the loss counts anyway."""
    is_exact = type(loss) is TripletLoss and (loss.mining, loss.soft) == ("all", False)
    if not is_exact or not loss.squared or loss.margin < 0 or _is_changed(loss):
        return loss(embeddings, labels), None
    return batch_all_triplet_loss(embeddings, labels, loss.margin, return_active=True)


def _is_changed(module: nn.Module) -> bool:
    """Whether a call of a module does more than its class says, by hooks or another forward."""
    own = vars(module)
    return "forward" in own or any(own[name] for name in own if name.endswith("hooks"))


def _triplet_columns(
    embeddings: Tensor, labels: Tensor, loss: object, active: Tensor | None
) -> dict[str, float]:
    if active is not None:
        pairs = Pairs(labels)
        near, far, spread = squared_distances_and_spread(embeddings, pairs)
        return {
            "active": int(active) / max(pairs.count_valid(), 1),
            "positive_distance": near,
            "negative_distance": far,
            "spread": spread,
        }
    squared = getattr(loss, "squared", True)
    state = describe_triplets(
        embeddings,
        labels,
        _margin_of(loss),
        squared=squared if isinstance(squared, bool) else True,
    )
    return {
        "active": state.active,
        "positive_distance": state.positive_distance,
        "negative_distance": state.negative_distance,
        "spread": state.spread,
    }


def _margin_of(loss: object) -> float:
    """Return a loss's margin if it is one that triplets can be described with, else 0.2."""
    margin = getattr(loss, "margin", None)
    if isinstance(margin, Tensor) and margin.numel() == 1:
        margin = margin.item()
    usable = isinstance(margin, Real) and not isinstance(margin, bool)
    return float(margin) if usable and 0 <= margin < math.inf else 0.2
