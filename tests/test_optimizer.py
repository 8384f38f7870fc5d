import numpy as np
import pytest
import torch
from torch import nn

from tripletlib._optimizer import Muon, optimizers, orthogonalised


@pytest.mark.parametrize("shape", [(16, 16), (16, 70), (70, 16), (1, 9), (9, 1)])
def test_singular_values_come_near_one_and_vectors_stay(shape):
    matrix = torch.randn(shape)
    result = orthogonalised(matrix)
    values = torch.linalg.svdvals(result)
    assert values.max() < 1.3
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    along = (u.T @ result @ vt.T).diagonal()
    torch.testing.assert_close((u * along) @ vt, result, atol=1e-3, rtol=0)
    assert along[s > 0.05 * s.max()].min() > 0.6


def test_zeros_stay_zeros():
    assert torch.equal(orthogonalised(torch.zeros(3, 5)), torch.zeros(3, 5))


def newton_schulz(matrix):
    """The iteration by another way: its polynomial, taken of each singular value by itself."""
    u, values, vt = np.linalg.svd(matrix, full_matrices=False)
    values = values / np.linalg.norm(values)
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return (u * values) @ vt


@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (1, 9)])
def test_muon_is_nesterov_momentum_made_orthogonal(shape):
    start, gradients = torch.randn(shape).double(), torch.randn(4, *shape).double()
    weight = nn.Parameter(start.clone())
    muon = Muon([weight], lr=0.1, momentum=0.8)
    expected = start.numpy().copy()
    for now in range(len(gradients)):
        weight.grad = gradients[now].clone()
        muon.step()
        past = gradients[: now + 1].numpy()
        mean = sum(0.2 * 0.8 ** (now - then) * past[then] for then in range(now + 1))
        expected -= 0.1 * newton_schulz(0.2 * past[now] + 0.8 * mean)
        torch.testing.assert_close(weight.detach(), torch.from_numpy(expected))


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has had Muon since 2.9")
def test_muon_does_what_torch_does_with_matrices():
    start, gradients = torch.randn(6, 10), torch.randn(4, 6, 10)
    ours, theirs = (nn.Parameter(start.clone()) for _ in range(2))
    mine = Muon([ours], lr=0.1, momentum=0.9)
    reference = torch.optim.Muon([theirs], lr=0.1, momentum=0.9, weight_decay=0.0)
    for gradient in gradients:
        for weight, optimizer in ((ours, mine), (theirs, reference)):
            weight.grad = gradient.clone()
            optimizer.step()
    # torch's orthogonalises in bfloat16, of three digits.
    torch.testing.assert_close(ours, theirs, atol=0.02, rtol=0)
    assert (ours - start).abs().max() > 0.1


def test_a_kernel_is_a_matrix_of_one_row_a_filter_in_either_memory_format():
    start, gradient = torch.randn(2, 6, 4, 3, 3)
    matrix = nn.Parameter(start.flatten(1).clone())
    matrix.grad = gradient.flatten(1)
    Muon([matrix], lr=0.1).step()
    for layout in (torch.contiguous_format, torch.channels_last):
        kernel = nn.Parameter(start.clone(memory_format=layout))
        kernel.grad = gradient.clone(memory_format=layout)
        Muon([kernel], lr=0.1).step()
        torch.testing.assert_close(kernel.flatten(1), matrix)


def test_muon_takes_the_kernels_but_the_first_and_adamw_all_else():
    network = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(16, 2)
    )
    loss = nn.Linear(2, 2)
    adamw, muon = optimizers(network, loss, 0.01)
    assert isinstance(muon, Muon)
    (kernel,) = muon.param_groups[0]["params"]
    assert kernel is network[2].weight
    others = {id(weight) for weight in adamw.param_groups[0]["params"]}
    everything = {id(weight) for weight in [*network.parameters(), *loss.parameters()]}
    assert others == everything - {id(kernel)}


def test_a_network_without_kernels_has_adamw_alone():
    (adamw,) = optimizers(nn.Linear(3, 2), len, 0.01)
    assert isinstance(adamw, torch.optim.AdamW)
