"""The optimisers of `fit`: Muon for convolution kernels, AdamW for everything else."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

# Peak learning rates of Muon and AdamW were chosen together, on validation images.
_MUON_OVER_ADAMW = 12.5


def optimizers(
    network: nn.Module, loss: object, learning_rate: float
) -> list[torch.optim.Optimizer]:
    """Give the optimisers that together train a network, and the loss if it has parameters.

    The first convolution sees pixels, not features, and is left to AdamW. So are the parameters of
    which a layer makes its kernel (weight norm, spectral norm, pruning).
    """
    parts = [network, *([loss] if isinstance(loss, nn.Module) else [])]
    trained = {id(weight): weight for part in parts for weight in part.parameters()}
    layers = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d)]
    first, *kernels = [layer._parameters.get("weight") for layer in layers] or [None]
    orthogonal = {
        id(kernel): kernel
        for kernel in kernels
        if kernel is not None and kernel is not first and kernel.requires_grad
    }
    rest = [weight for place, weight in trained.items() if place not in orthogonal]
    half = [weight for weight in rest if weight.dtype == torch.float16]
    groups = [{"params": [weight for weight in rest if weight.dtype != torch.float16]}]
    groups += [{"params": half, "eps": 1e-4}] if half else []  # the usual 1e-8 is 0 in float16
    adamw = torch.optim.AdamW(groups, learning_rate, betas=(0.9, 0.99), weight_decay=0.02)
    if not orthogonal:
        return [adamw]
    return [adamw, Muon(orthogonal.values(), _MUON_OVER_ADAMW * learning_rate)]


class Muon(torch.optim.Optimizer):
    """Nesterov momentum whose update of each weight, seen as a matrix, is made orthogonal.

    ``torch.optim.Muon`` takes matrices only, not kernels, and computes in bfloat16, which makes
    it fifty times slower on a CPU without such arithmetic.

    Parameters
    ----------
    params : iterable of Tensor
        Weights of at least two dimensions; the first makes the rows of the matrix.
    lr : float
        Learning rate: all singular values of an update are near it.
    momentum : float, default 0.9
        Share of the past in the running mean of gradients.

    References
    ----------
    K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024,
    https://kellerjordan.github.io/posts/muon/.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        """Follow the gradients once."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["mean"] = torch.zeros_like(weight)
                mean = state["mean"].lerp_(weight.grad, 1 - group["momentum"])
                update = weight.grad.lerp(mean, group["momentum"])
                matrix = orthogonalised(update.flatten(1))
                weight.sub_(matrix.view(update.shape), alpha=group["lr"])


def orthogonalised(matrix: Tensor, steps: int = 5) -> Tensor:
    """Bring all singular values of a matrix near 1 by a Newton-Schulz iteration of degree five.

    It is quick, not exact: they end between about 0.7 and 1.2, which serves as well.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.mH if tall else matrix
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(steps):
        square = x @ x.mH
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.mH if tall else x
