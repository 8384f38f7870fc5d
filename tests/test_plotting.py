import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from devices import DEVICES, FAKE, FakeDevice

from tripletlib.plotting import plot_distances, scatter_classes, show_images, show_neighbours


@pytest.fixture(autouse=True)
def _closed():
    yield
    plt.close("all")


@pytest.mark.parametrize("device", [*DEVICES, FAKE])
def test_figures_show_what_is_on_any_device(device):
    images, points, labels = torch.rand(6, 1, 4, 4), torch.randn(6, 2), torch.arange(6) % 2
    with FakeDevice():
        placed = images.to(device), points.to(device), labels.to(device)
        shown = show_images(placed[0])
        for ax, image in zip(shown.axes, images[:, 0], strict=False):
            np.testing.assert_array_equal(ax.images[0].get_array(), image)
        for of in (placed[2], labels):
            axes = scatter_classes(placed[1], of, ax=plt.figure().gca())
            offsets = np.concatenate([c.get_offsets() for c in axes.collections])
            right = torch.cat([points[labels == 0], points[labels == 1]])
            np.testing.assert_array_equal(offsets, right)
            axes = plot_distances(placed[1], of, ax=plt.figure().gca())
            plain = plot_distances(points, labels, ax=plt.figure().gca())
            heights = [[bar.get_height() for bar in a.patches] for a in (axes, plain)]
            np.testing.assert_allclose(*heights)
            found = placed[0].view(2, 3, 1, 4, 4), of.view(2, 3)
            figure = show_neighbours(placed[0][:2], of[:2], *found)
            assert len(figure.axes) == 8


def test_what_needs_a_gradient_or_is_in_half_precision_is_drawn():
    images = torch.rand(2, 1, 4, 4, requires_grad=True)
    show_images(images)
    show_images(images.bfloat16())
    points = torch.randn(6, 2, requires_grad=True)
    scatter_classes(points, torch.arange(6) % 2)
    plot_distances(points.bfloat16(), torch.arange(6) % 2)
