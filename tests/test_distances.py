from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch
from devices import DEVICES, FAKE, FakeDevice, NoDouble
from hypothesis import given, settings
from hypothesis import strategies as st

from tripletlib.distances import norm_of_rows, pairwise_distances, roots_of_squares


def reference(x, y=None, squared=False):
    """Differences of coordinates, scaled so that their squares neither overflow nor vanish."""
    x = x.double()
    y = x if y is None else y.double()
    difference = x[:, None] - y[None]
    scale = difference.abs().amax().clamp(min=1e-300)
    scale = 2.0 ** scale.log2().floor()
    square = (difference / scale).square().sum(dim=2)
    return square * scale * scale if squared else square.sqrt() * scale


@st.composite
def clouds(draw):
    n, d = draw(st.integers(1, 12)), draw(st.integers(1, 5))
    seed = draw(st.integers(0, 2**31))
    scale = 10.0 ** draw(st.sampled_from([-15, -6, 0, 5, 15]))
    offset = draw(st.sampled_from([0.0, 0.0, 1e3]))
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) * scale + offset * scale
    copies = draw(st.lists(st.integers(0, n - 1), max_size=4))
    return torch.cat([x, x[copies]])


@settings(deadline=None, max_examples=60)
@given(clouds(), st.booleans(), st.sampled_from([torch.float32, torch.float64]))
def test_equals_differences_of_coordinates(x, squared, dtype):
    x = x.to(dtype)
    got = pairwise_distances(x, squared=squared)
    assert got.dtype == dtype
    assert (got.diagonal() == 0).all()
    assert (got >= 0).all()
    torch.testing.assert_close(got, reference(x, None, squared).to(dtype), rtol=1e-6, atol=0)


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_two_sets(squared, dtype):
    x, y = torch.randn(7, 3, dtype=dtype), torch.randn(1000, 3, dtype=dtype)
    got = pairwise_distances(x, y, squared=squared)
    torch.testing.assert_close(got, reference(x, y, squared).to(dtype), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_distances_on_a_grid_are_exact_so_that_ties_hold(dtype):
    x = torch.cartesian_prod(*[torch.arange(-2, 3)] * 3).to(dtype) * 2.0**-20
    assert torch.equal(pairwise_distances(x, squared=True), reference(x, squared=True).to(dtype))


def test_rows_in_many_blocks_equal_one():
    x = torch.randn(700, 4)
    assert torch.equal(pairwise_distances(x)[650:], pairwise_distances(x[650:], x))


@pytest.mark.parametrize("squared", [False, True])
def test_close_points_far_from_the_origin_and_from_each_other(squared):
    x = torch.tensor([[1e4, 0.0], [1e4 + 1e-3, 0.0], [-1e4, 1e-4], [-1e4, 2e-4]])
    expected = reference(x, None, squared).float()
    torch.testing.assert_close(pairwise_distances(x, squared=squared), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("duplicates", [False, True])
def test_gradient_equals_autograd_of_the_differences(squared, own, duplicates):
    torch.manual_seed(0)
    x = torch.randn(9, 4)
    if duplicates:
        x[3] = x[5]
    y = None if own else torch.randn(6, 4)
    weights = torch.randn(9, 9 if own else 6, dtype=torch.float64)
    grads = []
    for dtype in (torch.float32, torch.float64):
        a = x.to(dtype).requires_grad_()
        b = None if own else y.to(dtype).requires_grad_()
        if dtype == torch.float32:
            distances = pairwise_distances(a, b, squared=squared)
        else:
            difference = a[:, None] - (a if own else b)[None]
            square = difference.square().sum(dim=2)
            distances = square if squared else torch.where(square > 0, square, 1.0).sqrt()
        total = (distances * weights * (distances != (0 if squared else 1))).sum()
        grads.append(torch.autograd.grad(total, [a] if own else [a, b]))
    for got, expected in zip(*grads, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("squared", [False, True])
def test_gradcheck(squared):
    x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    y = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    off = ~torch.eye(6, dtype=torch.bool)
    assert torch.autograd.gradcheck(lambda a: pairwise_distances(a, squared=squared)[off], x)
    assert torch.autograd.gradcheck(lambda a, b: pairwise_distances(a, b, squared=squared), (x, y))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("scale", [0.0, 1e-38, 1e-20, 1.0, 1e18, 3e38])
def test_value_and_gradient_are_finite(dtype, squared, scale):
    x = (torch.tensor([[1.0, 1.0], [1.0, 1.0], [-1.0, 0.5], [0.5, 1e-7]]) * scale).to(dtype)
    x.requires_grad_()
    distances = pairwise_distances(x, squared=squared)
    assert torch.isfinite(distances).all()
    (grad,) = torch.autograd.grad(distances, x, torch.ones_like(distances))
    assert torch.isfinite(grad).all()


def test_too_large_becomes_the_largest():
    x = torch.tensor([[3e38], [-3e38]])
    assert pairwise_distances(x)[0, 1] == torch.finfo(torch.float32).max
    assert pairwise_distances(x / 1e10, squared=True)[0, 1] == torch.finfo(torch.float32).max
    torch.testing.assert_close(pairwise_distances(x / 10)[0, 1], torch.tensor(6e37))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_computed_in_float32(dtype):
    x = torch.randn(5, 3).to(dtype).requires_grad_()
    distances = pairwise_distances(x)
    assert torch.equal(distances, pairwise_distances(x.float()))
    assert torch.autograd.grad(distances.sum(), x)[0].dtype == dtype


def test_order_does_not_matter():
    x, order = torch.randn(30, 5), torch.randperm(30)
    got = pairwise_distances(x[order])
    torch.testing.assert_close(got, pairwise_distances(x)[order][:, order], rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_empty(dtype):
    assert pairwise_distances(torch.zeros(0, 3, dtype=dtype)).shape == (0, 0)
    both = torch.zeros(0, 3, dtype=dtype), torch.zeros(2, 3, dtype=dtype)
    assert pairwise_distances(*both).shape == (0, 2)
    assert pairwise_distances(both[1], both[0]).shape == (2, 0)


def test_second_derivative_is_refused_in_float32():
    x = torch.randn(4, 2, requires_grad=True)
    with pytest.raises(RuntimeError, match="differentiable only once"):
        torch.autograd.grad(pairwise_distances(x).sum(), x, create_graph=True)


@pytest.mark.parametrize(
    ("x", "y", "error", "message"),
    [
        ([[1.0]], None, TypeError, "x must be a torch.Tensor, got list"),
        (torch.ones(3), None, ValueError, "x must have shape"),
        (torch.ones(2, 2).long(), None, TypeError, "x must be floating point"),
        (torch.tensor([[1.0], [torch.nan]]), None, ValueError, "x must be finite.*row 1"),
        (torch.ones(2, 2), torch.ones(2, 2) / 0, ValueError, "y must be finite"),
        (torch.ones(2, 2), torch.ones(2, 3), ValueError, "y must match x"),
        (torch.ones(2, 2), torch.ones(2, 2).double(), ValueError, "y must match x"),
    ],
)
def test_errors(x, y, error, message):
    with pytest.raises(error, match=message):
        pairwise_distances(x, y)


@pytest.mark.parametrize("copies", [1, 3, 40])
def test_points_that_coincide_do_not_disturb_the_others(copies):
    x = torch.randn(50, 8)
    x[10 : 10 + copies] = x[3]
    reference = torch.cdist(x.double(), x.double(), compute_mode="donot_use_mm_for_euclid_dist")
    for squared in (True, False):
        expected = reference.square() if squared else reference
        got = pairwise_distances(x, squared=squared)
        torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=0)
        x.requires_grad_()
        (gradient,) = torch.autograd.grad(pairwise_distances(x, squared=squared).sum(), x)
        assert torch.isfinite(gradient).all()
        x = x.detach()


FAR = [
    [[1e18], [0.0], [7.0], [7.0], [7.5], [1e-6]],
    [[1e18, 3.0], [0.0, 0.0], [7.0, 24.0], [-1e12, 1.0], [1e-3, 0.0], [1e-3, 1e-9]],
    [[3e38], [-3e38], [7.0], [8.0], [8.0], [1e-30]],
    [[1e30, 1e-30], [1e30, 0.0], [0.0, 1e-30], [0.0, 0.0], [1e-20, 1e-20], [0.0, 1e-12]],
]


def precise(x, y, squared):
    """Distances in 80 bits, clamped to the type of `x`."""
    a, b = x.numpy().astype(np.longdouble), y.numpy().astype(np.longdouble)
    square = ((a[:, None] - b[None]) ** 2).sum(axis=2)
    largest = torch.finfo(x.dtype).max
    return torch.tensor(np.minimum(square if squared else np.sqrt(square), largest).astype(float))


@pytest.mark.parametrize("points", FAR)
@pytest.mark.parametrize("squared", [True, False])
@pytest.mark.parametrize("kind", ["float32", "float64", "float32 alone"])
def test_a_far_point_does_not_spoil_close_ones(points, squared, kind):
    dtype = torch.float64 if kind == "float64" else torch.float32
    x = torch.tensor(points, dtype=dtype)
    y = x.flip(0)[:4].clone()
    with NoDouble() if kind == "float32 alone" else contextlib.nullcontext():
        own, other = (
            pairwise_distances(x, squared=squared),
            pairwise_distances(x, y, squared=squared),
        )
        grads = []
        for i, j in ((2, 3), (4, 5), (3, 4)):  # the gradient of one distance by itself
            a = x.clone().requires_grad_()
            grads += torch.autograd.grad(pairwise_distances(a, squared=squared)[i, j], a)
    tolerance = {"rtol": 1e-14 if kind == "float64" else 1e-6, "atol": torch.finfo(dtype).tiny}
    torch.testing.assert_close(own.double(), precise(x, x, squared), **tolerance)
    torch.testing.assert_close(other.double(), precise(x, y, squared), **tolerance)
    for (i, j), grad in zip(((2, 3), (4, 5), (3, 4)), grads, strict=True):
        expected = torch.zeros_like(x, dtype=torch.float64)
        difference, length = x[i].double() - x[j].double(), precise(x, x, False)[i, j]
        expected[i] = 2 * difference if squared else difference / (length if length else torch.inf)
        expected[j] = -expected[i]
        torch.testing.assert_close(grad.double(), expected, **tolerance)


@pytest.mark.parametrize("squared", [True, False])
@pytest.mark.parametrize("scale", [1e-300, 1e-170, 1e-155, 1e155, 1e170, 1e300])
def test_float64_beyond_the_range_of_squares(squared, scale):
    x = torch.randn(6, 3, dtype=torch.float64) * scale
    x[1] = x[0]
    x[2] = x[0] * (1 + 1e-10)
    got, tiny = pairwise_distances(x, squared=squared), torch.finfo(torch.float64).tiny
    torch.testing.assert_close(got, precise(x, x, squared), rtol=1e-14, atol=tiny)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("squared", [True, False])
@pytest.mark.parametrize("own", [True, False])
def test_without_float64_as_good_as_with_it(dtype, squared, own):
    x, y = torch.randn(20, 64) + 10, torch.randn(9, 64) + 10
    x[3], x[4] = x[5], x[6] + 1e-4
    weights = torch.randn(20, 20 if own else 9)
    results = []
    for mode, kind in ((NoDouble(), dtype), (contextlib.nullcontext(), torch.float64)):
        leaves = [t.to(dtype).to(kind).requires_grad_() for t in ([x] if own else [x, y])]
        with mode:
            distances = pairwise_distances(*leaves, squared=squared)
            results.append((distances, torch.autograd.grad((distances * weights).sum(), leaves)))
    (got, grads), (expected, expected_grads) = results
    torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=0)
    for grad, reference in zip(grads, expected_grads, strict=True):
        rounding = max(torch.finfo(dtype).eps, 1e-5)
        torch.testing.assert_close(grad.double(), reference, rtol=rounding, atol=1e-4)


@pytest.mark.parametrize("squared", [True, False])
@pytest.mark.parametrize("close", [True, False])
def test_autocast_changes_nothing(squared, close):
    x, y = torch.randn(30, 8), torch.randn(20, 8)
    if close:
        x[0] = y[0] + 1e-6
    for mode in (contextlib.nullcontext, NoDouble):
        with mode():
            results = []
            for autocast in (False, True):
                a, b = x.clone().requires_grad_(), y.clone().requires_grad_()
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    distances = pairwise_distances(a, b, squared=squared)
                    results.append([distances, *torch.autograd.grad(distances.sum(), (a, b))])
            assert all(map(torch.equal, *results))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("squared", [True, False])
@pytest.mark.parametrize("twice", [True, False])
def test_gradient_of_half_types_stays_within_their_range(dtype, squared, twice):
    largest = torch.finfo(dtype).max
    x = torch.tensor([[largest], [-largest], [largest / 2], [1.0]], dtype=dtype).requires_grad_()
    distances = pairwise_distances(x, x if twice else None, squared=squared)
    (grad,) = torch.autograd.grad(distances, x, torch.full_like(distances, 1e6))
    assert torch.isfinite(grad).all()
    assert grad[0, 0] == (largest if squared or dtype == torch.float16 else grad[0, 0])
    assert (grad.flatten().sign() == torch.tensor([1, -1, 1, -1])).tolist()[:2] == [True, True]


@pytest.mark.parametrize("squared", [True, False])
def test_on_a_device_of_its_own_without_float64(squared):
    x, y = torch.randn(30, 5), torch.randn(7, 5)
    with FakeDevice():
        got = pairwise_distances(x.to(FAKE), y.to(FAKE), squared=squared)
        assert got.device == FAKE
        got = got.cpu()
    torch.testing.assert_close(got, pairwise_distances(x, y, squared=squared), rtol=1e-6, atol=0)


@pytest.mark.parametrize("device", DEVICES)
def test_every_device_equals_the_cpu(device):
    x = torch.randn(30, 5)
    got = pairwise_distances(x.to(device))
    assert got.device.type == device
    torch.testing.assert_close(got.cpu(), pairwise_distances(x), rtol=1e-6, atol=0)


def test_the_norm_of_rows_fills_the_range_of_its_type():
    x = torch.tensor([[1.5e308], [1.7e308], [3e-320]], dtype=torch.float64)
    y = torch.tensor([[0.0], [-1.7e308], [0.0]], dtype=torch.float64)
    (norms,) = norm_of_rows((x, y))
    assert norms.tolist() == [1.5e308, torch.finfo(torch.float64).max, 3e-320]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_roots_of_squares_of_a_batch_are_right_at_every_size(dtype):
    least, most = {torch.float32: (-140, 120), torch.float64: (-1060, 1010)}[dtype]
    sizes = torch.linspace(least, most, 40, dtype=torch.float64).round().exp2().view(5, 8, 1)
    y = (sizes * torch.tensor([1.0, -0.75, 0.0])).to(dtype)
    x = torch.stack([y[:, 0] * 0, y[:, 3]], dim=1)
    exact = x.numpy().astype(np.longdouble)[:, :, None] - y.numpy()[:, None]
    exact = np.sqrt(np.square(exact).sum(axis=3)).astype(x.numpy().dtype)
    for got in (roots_of_squares(x, y), torch.stack(list(map(roots_of_squares, x, y)))):
        np.testing.assert_allclose(got, exact, rtol=4 * torch.finfo(dtype).eps, atol=0)
