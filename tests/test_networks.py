import pytest
import torch
from torch import nn

from tripletlib import EmbeddingNet, HofferAilonNet, ResidualNet, TripletNet


def test_embeddings_lie_on_the_unit_sphere():
    points = EmbeddingNet(dimensions=16)(torch.randn(7, 1, 28, 28))
    assert points.shape == (7, 16)
    torch.testing.assert_close(points.norm(dim=1), torch.ones(7))


def test_without_normalisation_they_do_not():
    net = EmbeddingNet(normalize=False)
    points = net(torch.randn(7, 1, 28, 28))
    assert points.norm(dim=1).std() > 0
    net.normalize = True
    same = net(torch.randn(7, 1, 28, 28))
    torch.testing.assert_close(same.norm(dim=1), torch.ones(7))


def test_a_blank_image_has_a_finite_embedding_and_gradient():
    net = EmbeddingNet()
    net(torch.zeros(4, 1, 28, 28)).square().sum().backward()
    assert all(torch.isfinite(weight.grad).all() for weight in net.parameters())


def test_colour_and_other_sizes_are_taken():
    assert EmbeddingNet(in_channels=3)(torch.randn(2, 3, 32, 40)).shape == (2, 64)
    assert EmbeddingNet()(torch.randn(2, 1, 64, 64)).shape == (2, 64)


def test_the_seed_fixes_the_initial_weights():
    torch.manual_seed(3)
    first = EmbeddingNet()
    torch.manual_seed(3)
    second = EmbeddingNet()
    third = EmbeddingNet()
    images = torch.randn(2, 1, 28, 28)
    assert torch.equal(first(images), second(images))
    assert not torch.equal(first(images), third(images))


@pytest.mark.parametrize("shape", [(1, 28, 28), (2, 3, 28, 28), (2, 1, 7, 28), (2, 784)])
def test_images_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"images must have shape \(n, 1, height, width\).*got"):
        EmbeddingNet()(torch.zeros(shape))


def test_the_residual_network_adds_what_a_convolution_makes_of_its_input():
    net = ResidualNet().eval()
    images = torch.randn(5, 3, 32, 32)
    points = net(images)
    assert points.shape == (5, 768)
    torch.testing.assert_close(points.norm(dim=1), torch.ones(5))
    blocks = [layer for layer in net.layers if hasattr(layer, "change")]
    assert len(blocks) >= 2
    for block in blocks:
        convolution, norm, _ = block.change
        x = torch.randn(2, convolution.in_channels, 8, 8)
        by_hand = x + norm(convolution(x)).relu()
        torch.testing.assert_close(block(x), by_hand)
        nn.init.zeros_(norm.weight)
    # Without their changes nothing is left of the blocks.
    plain = nn.Sequential(*(layer for layer in net.layers if not hasattr(layer, "change")))
    torch.testing.assert_close(net(images), nn.functional.normalize(plain(images)))


def test_the_residual_network_takes_grey_and_small_images_and_refuses_others():
    assert ResidualNet(1, normalize=False)(torch.randn(2, 1, 16, 20)).shape == (2, 768)
    with pytest.raises(ValueError, match=r"\(n, 3, height, width\) .* 16 pixels, got \(2, 1, 32"):
        ResidualNet()(torch.zeros(2, 1, 32, 32))
    with pytest.raises(ValueError, match=r"at least 16 pixels, got \(2, 3, 12, 32\)"):
        ResidualNet()(torch.zeros(2, 3, 12, 32))
    with pytest.raises(ValueError, match="in_channels must be a whole number"):
        ResidualNet(0)


@pytest.mark.parametrize("options", [{"dimensions": 0}, {"in_channels": 1.5}])
def test_bad_sizes_are_refused(options):
    (name,) = options
    with pytest.raises(ValueError, match=f"{name} must be a whole number"):
        EmbeddingNet(**options)


def test_the_papers_network_has_its_size_and_pads_by_repeating_the_border():
    net = HofferAilonNet().eval()
    assert sum(weight.numel() for weight in net.parameters()) == 501_888
    images = torch.randn(2, 1, 28, 28)
    padded = nn.ReplicationPad2d(2)(images)
    assert net(images).shape == (2, 128)
    torch.testing.assert_close(net(images), net.layers(padded))
    assert net(torch.randn(2, 1, 25, 32)).shape == (2, 128)
    assert HofferAilonNet(in_channels=3)(torch.randn(2, 3, 32, 32)).shape == (2, 128)


@pytest.mark.parametrize("shape", [(1, 28, 28), (2, 3, 28, 28), (2, 1, 23, 28), (2, 1, 28, 33)])
def test_images_that_the_papers_network_cannot_take_are_refused(shape):
    with pytest.raises(ValueError, match=r"\(n, 1, height, width\) with sides of 24 to 32.*got"):
        HofferAilonNet()(torch.zeros(shape))


def test_triplet_net_shares_one_set_of_weights():
    embedding_net = EmbeddingNet().eval()
    net = TripletNet(embedding_net)
    anchor, positive, negative = torch.randn(3, 5, 1, 28, 28)
    outputs = net(anchor, positive, negative)
    for images, points in zip((anchor, positive, negative), outputs, strict=True):
        assert torch.equal(points, embedding_net(images))
    assert len(list(net.parameters())) == len(list(embedding_net.parameters()))


def test_gradient_of_the_shared_weights_is_the_sum_over_the_three_uses():
    net = TripletNet(nn.Linear(4, 3, bias=False).double())
    parts = torch.randn(3, 2, 4, dtype=torch.float64)
    sum(points.square().sum() for points in net(*parts)).backward()
    weight = net.embedding_net.weight
    expected = sum(2 * (part @ weight.T).T @ part for part in parts)
    torch.testing.assert_close(weight.grad, expected)


def test_triplet_net_refuses_what_does_not_fit():
    net = TripletNet(nn.Linear(4, 3))
    with pytest.raises(ValueError, match=r"one shape, got \(2, 4\), \(2, 4\), \(3, 4\)"):
        net(torch.zeros(2, 4), torch.zeros(2, 4), torch.zeros(3, 4))
    with pytest.raises(TypeError, match="embedding_net must be an nn.Module, got function"):
        TripletNet(lambda images: images)
