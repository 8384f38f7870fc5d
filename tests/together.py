"""What several processes do together in test_processes.py: torchrun starts this file in each."""

import contextlib
import io
import os
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from problems import IMAGES, LABELS, SmallNet, fitted
from pytorch_metric_learning.losses import ProxyAnchorLoss
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from tripletlib import BalancedBatchSampler, TripletLoss, embed

SETTINGS = {"batch_size": 30, "epochs": 2}  # the last batch of an epoch has ten images
EXACT = {"optimizer": torch.optim.Adam}  # Muon rounds to bfloat16


def plain(width=5, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 3)).double()


class ByChance(nn.Module):
    """A network with a part that only some shares of a batch come to, and one that none does."""

    def __init__(self):
        super().__init__()
        self.common, self.rare, self.never = plain(), plain(), plain()

    def forward(self, images):
        far = images.flatten(1)[:, 0] > 2.2
        out = self.common(images)
        return out.index_add(0, far.nonzero()[:, 0], self.rare(images[far])) if far.any() else out


class Regularised(TripletLoss):
    """A loss with a weight of its own, and a term that depends on the network directly."""

    def __init__(self, network):
        super().__init__()
        self.network, self.scale = network, nn.Parameter(torch.ones(3, dtype=torch.float64))

    def forward(self, embeddings, labels):
        return (
            super().forward(embeddings * self.scale, labels) + 0.01 * self.network[1].weight.norm()
        )


class Listed(Dataset):
    """Images with random numbers added, or not."""

    def __init__(self, noise=0.0):
        self.noise, self.targets = noise, LABELS

    def __len__(self):
        return len(LABELS)

    def __getitem__(self, place):
        return IMAGES[place].double() + self.noise * torch.randn(1, 2, 3), LABELS[place]


def noisy(images):
    return images + 0.1 * torch.randn_like(images)


def exact_runs(rank=0):
    """Return the weights and losses of runs that are the same in any number of processes.

    What differs between them is to be as in the first.
    """
    images, runs = IMAGES.double(), {}

    def keep(name, network, **options):
        network, history = fitted(network, **{"images": images} | SETTINGS | EXACT | options)
        runs[name] = [history["loss"], *(w.detach() for w in network.parameters())]

    keep("tensors", plain(), augment=noisy)
    keep("data set", plain(), images=Listed(), labels=None, workers=0)
    keep("workers", plain(), images=Listed(), labels=None, workers=1)
    keep("by chance", ByChance(), optimizer=torch.optim.AdamW)
    keep("sampler", plain(), batch_sampler=BalancedBatchSampler(LABELS, 3, 3))
    drawn = torch.randperm(100, generator=torch.Generator().manual_seed(rank)).view(10, 10)
    keep("batches", plain(), batch_sampler=drawn)
    keep("weights", plain(seed=rank))
    keep("semihard", plain(), loss=TripletLoss(mining="semihard"))
    network = plain()
    loss = Regularised(network)
    keep("regularised", network, loss=loss)
    runs["regularised"].append(loss.scale.detach())
    torch.manual_seed(1)
    proxies = ProxyAnchorLoss(4, 3).double()
    keep("proxies", plain(), loss=proxies)
    runs["proxies"].append(proxies.proxies.detach())
    seen = iter([1.0, 3.0, 2.0, 2.0])
    keep("best", plain(), epochs=4, validate=lambda _: next(seen))
    keep("stopped", plain(), epochs=4, callback=lambda history: len(history) == 6)
    return runs


def uneven_runs(rank):
    """Return the weights of runs in which something is other in each process."""
    runs = {}
    torch.manual_seed(rank)  # other weights to begin with, other dropout
    network, history = fitted(SmallNet(), seed=None, epochs=2, validate=lambda _: float(rank))
    assert history["validation"][-1] == 0
    runs["batch statistics"] = list(network.state_dict().values())
    network, history = fitted(callback=lambda h: rank == 0 and len(h) == 3)
    assert len(history) == 3
    runs["stopped"] = list(network.state_dict().values())
    torch.manual_seed(0)
    lazy = nn.Sequential(nn.Flatten(), nn.LazyLinear(3))
    torch.manual_seed(rank)
    runs["lazy"] = list(fitted(lazy)[0].state_dict().values())
    seen = []
    fitted(callback=lambda h: seen.append(torch.rand(()).item()) or len(h) == 2)
    runs["random numbers"] = [torch.tensor(seen)]
    return runs


def refused(call):
    """Return the words of the error that a call ends with."""
    try:
        call()
    except (TypeError, ValueError) as error:
        return str(error)
    return "nothing is wrong"


def errors(rank, number):
    """Return what is said of what several processes cannot do."""
    few = 2 * number - 1
    several = {
        "images": lambda: fitted(images=IMAGES[:few], labels=torch.arange(few) % 2),
        "batch_size": lambda: fitted(batch_size=few),
        "batch_sampler": lambda: fitted(batch_sampler=[list(range(few + 1)), list(range(few))]),
    }
    return {name: refused(call) for name, call in several.items()}


def embeddings(folder, rank):
    """Return embeddings that were written to files, in each process its share."""
    network = plain().float()
    found = {}
    for name, images in {"tensor": IMAGES, "set": TensorDataset(IMAGES), "one": IMAGES[:1]}.items():
        got = embed(network, images, 7, workers=0, out=folder / f"{name}.npy")
        assert torch.equal(got, torch.from_numpy(np.load(folder / f"{name}.npy")))
        assert torch.allclose(got, embed(network, images, workers=0), atol=1e-6)
        found[name] = got.clone()
    return found


def all_of_it(folder, rank, number):
    result = {
        "exact": exact_runs(rank),
        "uneven": uneven_runs(rank),
        "errors": errors(rank, number),
        "embeddings": embeddings(folder, rank),
    }
    torch.save(result, folder / f"{number}.{rank}.pt")


def kept(folder, rank, number, *, die_at=None):
    """Train with a checkpoint, and in one process end without a word."""
    torch.manual_seed(3)

    def callback(history):
        if rank == 1 and len(history) == die_at:
            os._exit(3)

    with contextlib.redirect_stdout(io.StringIO()) as said:
        network, history = fitted(
            SmallNet().double(), Listed(0.1), None, workers=0, epochs=4, seed=None,
            checkpoint=folder / "run.pt", callback=callback, progress=True,
        )  # fmt: skip
    assert ("28/28" in said.getvalue()) == (rank == 0)
    torch.save([history["loss"], *network.state_dict().values()], folder / f"kept.{rank}.pt")


def own_part(folder, rank, number):
    """Train as in a loop without `fit`, where each process has its part of the data."""
    fitted(images=IMAGES[rank::number], labels=LABELS[rank::number])


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("error", UserWarning)  # torch 2.4 warns of itself
    place = {"rank": int(os.environ["RANK"]), "number": int(os.environ["WORLD_SIZE"])}
    what = {"all": all_of_it, "kept": kept, "own part": own_part}[sys.argv[1]]
    more = {"die_at": int(sys.argv[3])} if len(sys.argv) > 3 else {}
    what(Path(sys.argv[2]), **place, **more)
