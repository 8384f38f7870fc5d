"""A small network, data and a run that several test files train."""

import functools
import threading

import torch
from pytorch_metric_learning import losses as pml_losses
from torch import nn

from tripletlib import BalancedBatchSampler, TripletLoss, batch_all_triplet_loss, fit


class SmallNet(nn.Sequential):
    """A network that has what makes training hard to repeat: batch statistics and dropout."""

    def __init__(self, inputs=6):
        super().__init__(
            nn.Flatten(),
            nn.Linear(inputs, 8),
            nn.BatchNorm1d(8),
            nn.ReLU(),
            nn.Dropout(0.2),
            nn.Linear(8, 3),
        )


def problem(count=100, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (count,), generator=generator)
    centres = 2 * torch.randn(4, 1, 2, 3, generator=generator)
    return centres[labels] + torch.randn(count, 1, 2, 3, generator=generator), labels


IMAGES, LABELS = problem()


def fitted(network=None, images=IMAGES, labels=LABELS, **options):
    if network is None:
        torch.manual_seed(5)
        network = SmallNet()
    options = {"batch_size": 16, "seed": 1, "progress": False, "augment": False} | options
    history = fit(network, images, labels, **options)
    return network, history


def same_weights(first, second):
    pairs = zip(first.state_dict().items(), second.state_dict().items(), strict=True)
    return all(name == other and torch.equal(a, b) for (name, a), (other, b) in pairs)


class Stop(Exception):
    pass


def stop_at(step):
    def callback(history):
        if len(history) == step:
            raise Stop

    return callback


class Unlike:
    """An augmentation whose text does not tell its strength."""

    def __init__(self, strength):
        self.strength = strength

    def __repr__(self):
        return "Unlike()"

    def __call__(self, images):
        return images * self.strength

    def change(self, images):
        return images * self.strength


class Scaled(SmallNet):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor  # not in the text

    def forward(self, images):
        return super().forward(images) * self.factor


def closure(margin):
    return lambda embeddings, labels: TripletLoss(margin)(embeddings, labels)


class Shift(nn.Module):
    """An augmentation that is a module, with a number in a buffer that training moves."""

    def __init__(self, value):
        super().__init__()
        self.register_buffer("mean", torch.tensor(float(value)))

    def forward(self, images):
        self.mean += 0.01 * images.mean()
        return images - self.mean


class Taught(TripletLoss):
    """A loss with a teacher that a list hides from torch, and that follows what it sees."""

    def __init__(self, value):
        super().__init__()
        self.teacher = [nn.Linear(3, 1).requires_grad_(False)]
        nn.init.constant_(self.teacher[0].weight, value)
        nn.init.constant_(self.teacher[0].bias, value)

    def forward(self, embeddings, labels):
        self.teacher[0].weight.lerp_(embeddings.detach().mean(dim=0, keepdim=True), 0.1)
        return super().forward(embeddings + self.teacher[0](embeddings), labels)


DIFFERENT = {
    "function": lambda v: {"augment": torch.sin if v < 0.3 else torch.cos},
    "python function": lambda v: {"augment": nn.functional.silu if v < 0.3 else nn.functional.elu},
    "module": lambda v: {"augment": Shift(v)},
    "teacher": lambda v: {"loss": Taught(v)},
    "closure": lambda v: {"loss": closure(v)},
    "partial": lambda v: {"loss": functools.partial(batch_all_triplet_loss, margin=v)},
    "library": lambda v: {"loss": pml_losses.TripletMarginLoss(margin=v)},
    "method": lambda v: {"augment": Unlike(v).change},
    "callable": lambda v: {"augment": Unlike(v)},
    "sampler": lambda v: {"batch_sampler": BalancedBatchSampler(LABELS, 4, int(10 * v))},
    "generator": lambda v: {
        "batch_sampler": BalancedBatchSampler(
            LABELS, 4, 3, generator=torch.Generator().manual_seed(int(10 * v))
        )
    },
    "network": lambda v: {"network": Scaled(v)},
    "dropout": lambda v: {"network": nn.Sequential(SmallNet(), nn.Dropout(v))},
    "frozen": lambda v: {
        "network": nn.Sequential(SmallNet(), nn.Linear(3, 3).requires_grad_(v < 0.3))
    },
}


class Locked(TripletLoss):
    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()
