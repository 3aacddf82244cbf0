import pytest
import torch
from torch import nn

from pyro_gpvae import build_decoder, build_encoder
from pyro_gpvae.networks import feature_dim


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_parameter_counts_of_table_1():
    head = nn.Linear(256, 2 * 10)
    assert count(build_encoder((1, 28, 28))) + count(head) == 202_644
    assert count(build_decoder((1, 28, 28), 10)) == 200_577


@pytest.mark.parametrize(
    ("image_shape", "encoder", "decoder", "hidden"),
    [
        ((1, 28, 28), [1, 32, 32, 64], [64, 32, 32, 1], 256),
        ((3, 32, 32), [3, 32, 32, 64], [64, 32, 32, 3], 512),
        ((3, 64, 64), [3, 32, 32, 64, 64], [64, 64, 32, 32, 3], 512),
    ],
    ids=["table 1", "table 2", "table 3"],
)
def test_layers_of_the_tables(image_shape, encoder, decoder, hidden):
    layers = list(build_encoder(image_shape))
    convolutions = [layer for layer in layers if isinstance(layer, nn.Conv2d)]
    assert [c.in_channels for c in convolutions] + [64] == encoder
    assert all(c.kernel_size == (4, 4) and c.stride == (2, 2) for c in convolutions)
    assert all(a.negative_slope == 0.01 for a in layers if isinstance(a, nn.LeakyReLU))
    assert [layer.out_features for layer in layers if isinstance(layer, nn.Linear)] == [hidden]

    layers = list(build_decoder(image_shape, 10))
    convolutions = [layer for layer in layers if isinstance(layer, nn.ConvTranspose2d)]
    assert [c.in_channels for c in convolutions] + [image_shape[0]] == decoder
    linear = [layer for layer in layers if isinstance(layer, nn.Linear)]
    side = image_shape[1] // 2 ** len(convolutions)
    assert [layer.out_features for layer in linear] == [hidden, side * side * 64]
    assert layers[-1] is convolutions[-1], "the output is linear"


@pytest.mark.parametrize(
    "image_shape", [(1, 28, 28), (3, 32, 32), (3, 64, 64), (2, 9, 15), (1, 65, 130), (1, 8, 8)]
)
@pytest.mark.parametrize("kind", ["conv", "fc"])
def test_any_image_shape(image_shape, kind):
    x = build_decoder(image_shape, 3, kind)(torch.zeros(2, 3))
    assert x.shape == (2, *image_shape)
    encoder = build_encoder(image_shape)
    assert encoder(x).shape == (2, feature_dim(encoder, image_shape))


@pytest.mark.parametrize("image_shape", [(1, 28, 28), (3, 32, 32), (3, 64, 64)])
@pytest.mark.parametrize("latent_dim", [10, 50])
def test_fc_decoder_has_the_closest_number_of_parameters(image_shape, latent_dim):
    target = count(build_decoder(image_shape, latent_dim))
    decoder = build_decoder(image_shape, latent_dim, "fc")
    width, pixels = decoder[0].out_features, image_shape[0] * image_shape[1] * image_shape[2]
    assert decoder[2].out_features == width

    def size(w):
        return (latent_dim + 1) * w + (w + 1) * w + (w + 1) * pixels

    assert count(decoder) == size(width)
    assert min(range(1, 2000), key=lambda w: abs(size(w) - target)) == width


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((1, 28, 28), 0), "latent_dim must be at least 1, got 0"),
        (((1, 7, 28), 2), r"H, W >= 8, got \(1, 7, 28\)"),
        (((0, 28, 28), 2), "C >= 1"),
        (((1, 28, 28), 2, "convolutional"), "expected 'conv' or 'fc'"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        build_decoder(*arguments)


def test_an_encoder_must_return_a_matrix():
    with pytest.raises(ValueError, match=r"features \(B, d\), got \(1, 4, 13, 13\)"):
        feature_dim(nn.Conv2d(1, 4, 4, 2), (1, 28, 28))
