import copy

import pytest
import torch
from torch import nn
from torch.func import jacrev, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_gpvae import ImageModel, build_decoder, build_encoder
from pyro_gpvae.model._convolutions import ConvTranspose2d
from pyro_gpvae.model.networks import autocast_networks, call_network, feature_dim


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
    width, pixels = decoder[0].out_features, torch.Size(image_shape).numel()
    sizes = {w: (latent_dim + 1 + w + 1 + pixels) * w + pixels for w in range(1, 2000)}
    assert count(decoder) == sizes[width]
    assert min(sizes, key=lambda w: abs(sizes[w] - target)) == width


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
    with pytest.raises(ValueError, match=r"features \(B, d\), got \(1, 4, 13, 13\)"):
        feature_dim(nn.Conv2d(1, 4, 4, 2), (1, 28, 28))


PAPER = {"kernel_size": 4, "stride": 2, "padding": 1}
#: Input channels, rows and columns; output channels; other arguments.
TRANSPOSED = {
    "table 1, first": ((64, 3, 3), 32, PAPER | {"output_padding": 1}),
    "table 1, last": ((32, 14, 14), 1, PAPER),
    "table 3, last": ((32, 32, 32), 3, PAPER),
    "9x15, 1 channel": ((32, 4, 7), 1, PAPER | {"output_padding": (1, 1)}),
    "9x14, 1 channel": ((32, 4, 7), 1, PAPER | {"output_padding": (1, 0)}),
    "8x15, 3 channels": ((32, 4, 7), 3, PAPER | {"output_padding": (0, 1)}),
    "no bias, 1 channel": ((5, 4, 3), 1, PAPER | {"bias": False}),
    "no bias, 3 channels": ((5, 4, 3), 3, PAPER | {"bias": False}),
    "dilated": ((5, 4, 6), 1, {"kernel_size": (3, 2), "stride": (3, 2), "dilation": 2}),
    "groups": ((6, 4, 6), 2, PAPER | {"groups": 2}),
}


@pytest.fixture(params=TRANSPOSED)
def transposed(request):
    """Our layer, torch's with the same weights, and inputs, in float64."""
    (channels, *size), fan_out, arguments = TRANSPOSED[request.param]
    torch.manual_seed(0)
    mine = ConvTranspose2d(channels, fan_out, **arguments).double()
    theirs = nn.ConvTranspose2d(channels, fan_out, **arguments).double()
    theirs.load_state_dict(mine.state_dict())
    return mine, theirs, torch.randn(3, channels, *size, dtype=torch.float64)


def agree(mine, theirs):
    """Equal to 1e-12 of the largest entry, or of 1."""
    pairs = [(mine, theirs)] if torch.is_tensor(mine) else zip(mine, theirs, strict=True)
    for one, other in pairs:
        scale = max([1.0, *other.detach().abs().flatten().tolist()])
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12 * scale)


class TestConvTranspose2d:
    def test_values(self, transposed):
        mine, theirs, x = transposed
        agree(mine(x), theirs(x))
        agree(mine(x[:0]), theirs(x[:0]))  # no images
        agree(mine(x[0]), theirs(x[0]))
        with torch.no_grad():
            agree(mine(x), theirs(x))

    def test_gradients(self, transposed):
        mine, theirs, x = transposed
        first, second = [], []
        for layer in (mine, theirs):
            z = x.clone().requires_grad_()
            inputs = (z, *layer.parameters())
            first.append(torch.autograd.grad(layer(z).sin().sum(), inputs, create_graph=True))
            size = sum(g.square().sum() for g in first[-1])
            second.append(torch.autograd.grad(size, inputs))
        agree(*first)
        agree(*second)

    def test_torch_func(self, transposed):
        mine, theirs, x = transposed
        direction = torch.linspace(-1, 1, x.numel(), dtype=x.dtype).reshape(x.shape)
        for grad in (True, False):  # the memory format depends on it
            with torch.set_grad_enabled(grad):
                agree(jvp(mine, (x,), (direction,)), jvp(theirs, (x,), (direction,)))
                batches = torch.stack([x, direction])
                agree(vmap(mine)(batches), torch.stack([theirs(b) for b in batches]))

                # directions are batched, the point is not
                def along(layer):
                    return vmap(lambda t: jvp(layer, (x,), (t,))[1])(batches)  # noqa: B023

                agree(along(mine), along(theirs))

    def test_traced(self, transposed):
        mine, theirs, x = transposed
        traced = make_fx(lambda z: jacrev(lambda z: mine(z).sin().sum())(z))(x)
        agree(traced(x + 1), jacrev(lambda z: theirs(z).sin().sum())(x + 1))


def test_autocast_lowers_the_networks_and_nothing_else():
    torch.manual_seed(0)
    model = ImageModel((1, 8, 8), 2, sigma=0.5)
    z, x = torch.randn(5, 2), torch.rand(5, 1, 8, 8)
    exact = model.log_joint(x, z)
    with autocast_networks(torch.bfloat16):
        lowered = model.log_joint(x, z)
        again = copy.deepcopy(model)(x)
        with pytest.raises(RuntimeError):
            call_network(model.decoder, torch.zeros(5, 3))
    assert lowered.dtype == again.dtype == torch.float32
    assert not torch.equal(lowered, exact)
    torch.testing.assert_close(lowered, exact, rtol=0.05, atol=1.0)
    assert torch.equal(model.log_joint(x, z), exact)  # the block has ended
    z64 = z.double()
    with autocast_networks(torch.bfloat16):
        assert model.double().likelihood(z64).mean.dtype == torch.float64


def test_an_update_in_the_block_is_seen_by_the_next_call():
    layer = nn.Linear(3, 2)
    with autocast_networks(torch.bfloat16):
        before = call_network(layer, torch.ones(1, 3))
        with torch.no_grad():
            layer.bias += 1
        after = call_network(layer, torch.ones(1, 3))
    assert bool((after > before).all())
