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
        scaled = (images - images.min()) / (images.max() - images.min())
        for ax, image in zip(shown.axes, scaled[:, 0], strict=False):
            np.testing.assert_allclose(ax.images[0].get_array(), image, rtol=1e-6)
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


def test_colour_is_drawn_as_colour_each_channel_on_one_scale_for_all_images():
    raw = torch.rand(6, 3, 4, 4)
    raw[0, :, 0, 0], raw[5, :, 3, 3] = 0, 1
    shift, stretch = torch.tensor([3.0, -1, 0]), torch.tensor([2.0, 5, 0.1])
    shown = show_images(raw * stretch[:, None, None] + shift[:, None, None])
    for ax, image in zip(shown.axes, raw, strict=False):
        np.testing.assert_allclose(ax.images[0].get_array(), image.movedim(0, 2), atol=1e-5)
    show_images(torch.full((1, 3, 4, 4), 2.0))  # nothing to scale
    found = raw.view(2, 3, 3, 4, 4)
    assert len(show_neighbours(raw[:2], LABELS[:2], found, LABELS.view(2, 3)).axes) == 8


def test_what_needs_a_gradient_or_is_in_half_precision_is_drawn():
    images = torch.rand(2, 1, 4, 4, requires_grad=True)
    show_images(images)
    show_images(images.bfloat16())
    points = torch.randn(6, 2, requires_grad=True)
    scatter_classes(points, torch.arange(6) % 2)
    scatter_classes(points.bfloat16(), torch.arange(6) % 2)
    plot_distances(points.bfloat16(), torch.arange(6) % 2)


@pytest.mark.parametrize(
    "kind", ["bfloat16", "float16", "float32", "float64", "uint8", "uint16", "int64"]
)
def test_points_of_any_type_are_drawn_where_they_are(kind):
    points, labels = torch.tensor([[3, 1], [0, 2], [200, 7]]), torch.tensor([0, 0, 1])
    given = [points.to(getattr(torch, kind))]
    given += [] if kind == "bfloat16" else [points.numpy().astype(kind)]
    for of in given:
        axes = scatter_classes(of, labels, ax=plt.figure().gca())
        offsets = np.concatenate([c.get_offsets() for c in axes.collections])
        np.testing.assert_array_equal(offsets, points)


IMAGES, POINTS, LABELS = torch.rand(6, 1, 4, 4), torch.randn(6, 2), torch.arange(6) % 2
NEIGHBOURS = (IMAGES[:2], LABELS[:2], IMAGES.view(2, 3, 1, 4, 4), LABELS.view(2, 3))


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: scatter_classes(None, LABELS), "points must be a torch.Tensor, got NoneType"),
        (lambda: scatter_classes(POINTS + 0j, LABELS), "points must be floating point"),
        (lambda: scatter_classes(POINTS, None), "labels must be a torch.Tensor, got NoneType"),
        (lambda: scatter_classes(POINTS, torch.tensor(1)), r"labels must have shape \(6,\)"),
        (lambda: plot_distances(None, LABELS), "embeddings must be a torch.Tensor, got NoneType"),
        (lambda: plot_distances(POINTS, None), "labels must be a torch.Tensor, got NoneType"),
        (lambda: plot_distances(POINTS[:0], LABELS[:0]), "embeddings must .* two rows, got 0"),
        (lambda: plot_distances(POINTS[:1], LABELS[:1]), "embeddings must .* two rows, got 1"),
        (lambda: show_images(None), "images must be a tensor of shape .* got NoneType"),
        (lambda: show_images(IMAGES[:0]), r"images must be .* got \(0, 1, 4, 4\)"),
        (
            lambda: show_images(torch.rand(1, 2, 4, 4)),
            r"\(n, 1 or 3, height, width\), got \(1, 2, 4",
        ),
        (lambda: show_images(IMAGES, columns=0), "columns must be a whole number"),
    ],
)
def test_bad_arguments_are_named(draw, message):
    with pytest.raises((TypeError, ValueError), match=message):
        draw()


def test_columns_may_be_a_numpy_integer():
    assert len(show_images(IMAGES, columns=np.uint8(4)).axes) == 8


def test_neighbours_are_called_by_their_number_or_by_a_name():
    def titles(**options):
        return [ax.get_title() for ax in show_neighbours(*NEIGHBOURS, **options).axes]

    numbers = ["0", *"010", "1", *"101"]
    assert titles() == numbers
    assert titles(names=("even", "odd")) == [("even", "odd")[int(n)] for n in numbers]


def drawn_history(**columns):
    from tripletlib.plotting import plot_history
    from tripletlib.training import History

    names = ("loss", "active", "positive_distance", "negative_distance")
    columns = {name: [0.5, 0.2, 0.1] for name in names} | columns
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return plot_history(History({"epoch": 0, "step": step} | row for step, row in enumerate(rows)))


def test_the_loss_is_drawn_from_zero_unless_it_goes_below():
    usual, below = (
        drawn_history(loss=loss).axes[0].get_ylim() for loss in ([0.5, 0.2, 0.1], [0.5, -0.2, -1.0])
    )
    assert usual[0] == 0
    assert below[0] < -1.0


@pytest.mark.filterwarnings("error", "ignore:.*deprecated")  # by matplotlib itself
@pytest.mark.parametrize(
    ("active", "scale"),
    [([0.0, 0.0, 0.0], "linear"), ([0.5, 0.1, 0.0], "log"), ([0.5, 0.2, 0.1], "log")],
)
def test_where_no_triplet_is_active_there_is_no_log_scale_and_no_warning(active, scale):
    figure = drawn_history(active=active)
    figure.canvas.draw()
    assert figure.axes[1].get_yscale() == scale


@pytest.mark.filterwarnings("error", "ignore:.*deprecated")  # by matplotlib itself
@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize(
    ("points", "labels", "names"),
    [
        (POINTS, torch.zeros(6).long(), ["same class"]),
        (POINTS, torch.arange(6), ["different classes"]),
        (torch.ones(6, 2), LABELS, ["same class", "different classes"]),
        (torch.ones(6, 2), torch.zeros(6).long(), ["same class"]),
    ],
)
def test_kinds_of_pairs_that_are_missing_or_all_at_zero_draw_no_warning(
    points, labels, names, squared
):
    axes = plot_distances(points, labels, ax=plt.figure().gca(), squared=squared)
    axes.figure.canvas.draw()
    assert [text.get_text() for text in axes.get_legend().get_texts()] == names
    heights = np.array([bar.get_height() for bar in axes.patches])
    assert np.isfinite(heights).all()
    widths = [bar.get_width() for bar in axes.patches]
    assert heights @ widths == pytest.approx(len(names))
