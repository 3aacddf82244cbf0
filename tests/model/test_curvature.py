"""Jacobians of any decoder, and the Gauss-Newton precision of the posterior."""

import math

import pyro
import pytest
import torch
from torch import nn
from torch.distributions import constraints

from guides import LaplaceGuide
from pyro_gpvae import ImageModel, build_decoder
from pyro_gpvae.model.curvature import decoder_jacobian, inverse_cholesky, linearize

SHAPE, P = (1, 8, 8), 3
RELU = nn.ReLU()


def model_of(*hidden, sigma=0.3, likelihood="gaussian", seed=0):
    """A small model in float64; linear in z if no hidden layers are given."""
    torch.manual_seed(seed)
    layers = [nn.Linear(P, 64)]
    if hidden:
        layers = [nn.Linear(P, 16), *hidden, nn.Linear(16, 64)]
    decoder = nn.Sequential(*layers, nn.Unflatten(1, SHAPE))
    return ImageModel(SHAPE, P, decoder, sigma=sigma, likelihood=likelihood).double()


def images(count=4, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, *SHAPE, generator=generator, dtype=torch.float64)


def close(actual, expected, tolerance):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "decoder",
    [
        nn.Sequential(nn.Linear(P, 8, bias=False), nn.ReLU(), nn.Linear(8, 64)),
        nn.Sequential(nn.Linear(P, 8), nn.LayerNorm(8), nn.ELU(), nn.Linear(8, 64)),
        nn.Sequential(
            nn.Sequential(nn.Linear(P, 36), nn.ReLU(inplace=True), nn.Unflatten(1, (4, 3, 3))),
            nn.ConvTranspose2d(4, 2, 4, 2, 1),
            nn.Conv2d(2, 1, 3, padding=1, bias=False),
            nn.Tanh(),
        ),
        nn.Sequential(nn.Linear(P, 8), nn.utils.parametrizations.spectral_norm(nn.Linear(8, 9))),
        nn.Sequential(nn.Linear(P, 8), RELU, nn.Linear(8, 8), RELU, nn.Linear(8, 64)),
        nn.Linear(P, 64),
        nn.Sequential(),
        build_decoder((1, 12, 12), P),
    ],
    ids=["relu", "norm", "convolutions", "parametrised", "shared", "one", "none", "table 1"],
)
def test_jacobian_of_any_decoder(decoder):
    torch.manual_seed(0)
    decoder.double().eval()
    z = torch.randn(2, P).double()
    output, jacobian = decoder_jacobian(decoder, z)
    close(output, decoder(z).flatten(1), 1e-12)
    for i in range(2):
        expected = torch.autograd.functional.jacobian(lambda z: decoder(z[None]).flatten(), z[i])
        close(jacobian[i], expected, 1e-12)


def test_hooks_and_subclasses_are_not_taken_for_what_they_extend():
    class Squared(nn.Linear):
        def forward(self, x):
            return super().forward(x).square()

    torch.manual_seed(0)
    hooked = nn.Linear(4, 5)
    hooked.register_forward_hook(lambda module, inputs, output: output.sin())
    whole = nn.Sequential(Squared(P, 4), hooked).double()
    whole.register_forward_hook(lambda module, inputs, output: output.exp())
    z = torch.randn(1, P).double()
    _, jacobian = decoder_jacobian(whole, z)
    expected = torch.autograd.functional.jacobian(lambda z: whole(z[None])[0], z[0])
    close(jacobian[0], expected, 1e-12)


def test_jacobian_of_a_users_pyro_decoder():
    class Decoder(pyro.nn.PyroModule):
        def __init__(self):
            super().__init__()
            self.layer = pyro.nn.PyroModule[nn.Linear](P, 64)
            self.gain = pyro.nn.PyroParam(torch.tensor(2.0), constraints.positive)

        def forward(self, z):
            return (self.gain * self.layer(z).sin()).unflatten(-1, SHAPE)

    torch.manual_seed(0)
    model = ImageModel(SHAPE, P, Decoder(), sigma=0.3)
    z = torch.randn(P)
    _, jacobian = decoder_jacobian(model.decoder, z[None])
    expected = torch.autograd.functional.jacobian(lambda z: model.decoder(z[None]).flatten(), z)
    close(jacobian[0], expected, 1e-5)
    with pyro.get_param_store().scope():
        guide = LaplaceGuide(model, 1)
        guide.elbo().differentiable_loss(model, guide, images().float()).backward()
        assert model.decoder.layer.weight.grad.isfinite().all()


@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli"])
def test_gradient_and_curvature_of_the_log_joint(likelihood):
    # of a linear decoder, the Gauss-Newton matrix is the Hessian itself
    model, x = model_of(likelihood=likelihood), images(1).round()
    z = torch.randn(P, dtype=torch.float64)

    def log_joint(z):
        return model.log_joint(x, z[None])[0]

    gradient, precision = linearize(model, x, z[None])
    close(gradient[0], torch.autograd.functional.jacobian(log_joint, z), 1e-10)
    close(precision[0], -torch.autograd.functional.hessian(log_joint, z), 1e-10)


def test_a_dead_direction_keeps_the_prior_in_float32():
    # JᵀJ/σ² is 1e7 in the other directions, where float32 cannot see the I of the prior
    model = model_of(sigma=1e-3).float()
    with torch.no_grad():
        model.decoder[0].weight[:, 2] = model.decoder[0].weight[:, 0]
    _, precision = linearize(model, images().float(), torch.zeros(4, P))
    dead = torch.tensor([1.0, 0.0, -1.0]) / 2**0.5
    factor = inverse_cholesky(precision)[0].float()
    close((factor.mT @ dead).square().sum(-1), torch.ones(4), 1e-2)


@pytest.mark.parametrize(("value", "reason"), [(-1, "singular"), (math.nan, "not finite")])
def test_a_precision_without_a_factor_names_the_image(value, reason):
    precision = torch.eye(2).double().repeat(3, 1, 1)
    precision[1, 1, 1] = value
    for images, number in ((None, 1), (torch.tensor([2, 7, 9]), 7)):
        with pytest.raises(torch.linalg.LinAlgError, match=f"image {number} is {reason}"):
            inverse_cholesky(precision, images)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dim", [2, 10, 50])
@pytest.mark.parametrize("condition", [1, 1e5, 1e10])
def test_the_jitter_is_as_large_as_needed_and_told(condition, dim, dtype):
    generator = torch.Generator().manual_seed(dim)
    normal = torch.randn(8, dim, dim, generator=generator, dtype=torch.float64)
    Q = torch.linalg.qr(normal).Q
    values = torch.logspace(0, math.log10(condition), dim, dtype=torch.float64)
    precision = (Q * values) @ Q.mT
    precision = ((precision + precision.mT) / 2).to(dtype)
    factor, jitter = inverse_cholesky(precision)
    if dtype == torch.float64 or condition < 1e10:
        assert (jitter == 0).all()
    else:
        assert bool(((jitter == 0) | ((jitter >= 1e-8) & (jitter <= 1e-4))).all())
    # what is factorised is Λ with that jitter, to the precision of the arithmetic
    scale = precision.diagonal(dim1=-2, dim2=-1).mean(-1)
    eye = torch.eye(dim, dtype=torch.float64)
    jittered = precision.double() + (jitter * scale).double()[:, None, None] * eye
    whitened = factor.double().mT @ jittered @ factor.double()
    error = (whitened - eye).abs().amax((-2, -1))
    # Λ's own rounding, magnified by the condition number that the jitter leaves
    left = torch.linalg.cond(jittered).clamp(max=1e10)
    assert bool((error < 10 * dim * torch.finfo(dtype).eps * left).all())
