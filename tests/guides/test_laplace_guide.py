"""VLAE: exact on linear decoders, exact Jacobians on any, and safe steps."""

import math
from functools import partial

import pytest
import torch
from pyro.infer import TraceMeanField_ELBO
from torch import nn
from toy import SHAPE, exact_evidence, exact_posterior, images, linear_encoder, linear_model

from guides import GaussianGuide, LaplaceGuide
from pyro_gpvae import ImageModel, fit, log_evidence
from pyro_gpvae.model.curvature import STEP_SIZES, line_search, linearize

P = 3
MAX_TANGENTS = "pyro_gpvae.model.curvature._MAX_TANGENTS"
both_steps = pytest.mark.parametrize("options", [{}, {"step": "damped"}], ids=str)


def curved_model(activation, sigma=0.3):
    torch.manual_seed(0)
    layers = nn.Linear(P, 16), activation, nn.Linear(16, math.prod(SHAPE))
    decoder = nn.Sequential(*layers, nn.Unflatten(1, SHAPE))
    return ImageModel(SHAPE, P, decoder, sigma=sigma).double()


def build(model, num_steps, **options):
    torch.manual_seed(2)
    return LaplaceGuide(model, num_steps, linear_encoder(), **options).double()


def close(actual, expected, tolerance=1e-8):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def test_it_is_exact_for_a_linear_decoder():
    model, x = linear_model(P), images(4)
    exact, log_p = exact_posterior(model, x), exact_evidence(model, x)
    covariance = exact.covariance_matrix.expand(4, P, P)
    guide = build(model, 1)
    close(guide.posterior(x).mean, exact.mean)
    close(guide.posterior(x).covariance_matrix, covariance)
    result = log_evidence(model, guide, x, 7, seed=0)
    close(result.log_evidence, log_p)
    close(result.elbo, log_p)
    none = build(model, 0)  # no step keeps the encoder's mean
    assert torch.equal(none.posterior(x).mean, none.encode(x)[1])
    close(none.posterior(x).covariance_matrix, covariance)
    damped = build(model, 2, step="damped")
    start = damped.encode(x)[1]
    # 1/2, then 1/4 of the rest of the way
    close(damped.posterior(x).mean, exact.mean + 0.5 * 0.75 * (start - exact.mean))


def test_the_encoder_learns_although_a_whole_step_ends_at_the_same_point():
    model, x = linear_model(P), images(8)
    exact = exact_posterior(model, x).mean
    guide = build(model, 1)
    (gradient,) = torch.autograd.grad(guide.posterior(x).mean.sum(), guide.head.weight)
    assert float(gradient.abs().max()) < 1e-8
    before = (guide.encode(x)[1] - exact).norm()
    model.requires_grad_(False)
    fit(model, guide, x, epochs=300, learning_rate=1e-2, progress=False)
    assert bool((guide.encode(x)[1] - exact).norm() < 0.2 * before)
    assert isinstance(build(model, 0).elbo(), TraceMeanField_ELBO)
    assert isinstance(build(model, 1, step="damped").elbo(), TraceMeanField_ELBO)


@torch.no_grad()
def test_the_line_search_never_lowers_the_log_joint():
    model, x = curved_model(nn.Tanh(), sigma=0.02), images(64)
    model.decoder[0].weight.data *= 3
    z = torch.randn(64, P, dtype=torch.float64)
    full_steps_that_fail = 0
    for _ in range(3):
        before = model.log_joint(x, z)
        gradient, precision = linearize(model, x, z)
        step = torch.linalg.solve(precision, gradient)
        full_step = line_search(partial(model.log_joint, x), z, step, (1.0,))
        full_steps_that_fail += int((model.log_joint(x, full_step) < before).sum())
        z = line_search(partial(model.log_joint, x), z, step, STEP_SIZES)
        assert (model.log_joint(x, z) >= before - 1e-9).all()
    assert full_steps_that_fail > 0


def test_evaluation_in_chunks_equals_training(monkeypatch):
    monkeypatch.setattr(MAX_TANGENTS, {"cpu": 2 * P})
    model, x = curved_model(nn.ELU()), images(5)
    guide = build(model, 2)
    with torch.no_grad():
        evaluated = guide.posterior(x)
    assert not evaluated.scale_tril.requires_grad
    close(evaluated.mean, guide.posterior(x).mean.detach(), 1e-9)
    close(evaluated.scale_tril, guide.posterior(x).scale_tril.detach(), 1e-9)


@both_steps
def test_gradients_equal_finite_differences(options):
    model, x = curved_model(nn.Tanh()), images(2)
    guide = build(model, 2, **options)

    def value():
        q = guide.posterior(x)
        return q.mean.square().sum() + q.scale_tril.square().sum()

    for parameter in (model.decoder[0].weight, model.log_sigma, guide.head.bias):
        (gradient,) = torch.autograd.grad(value(), parameter)
        flat, values = parameter.data.view(-1), []
        for step in (1e-5, -2e-5):
            flat[0] += step
            values.append(value().item())
        flat[0] += 1e-5
        assert gradient.flatten()[0].item() == pytest.approx((values[0] - values[1]) / 2e-5, 1e-5)


def test_warm_start_refines_a_trained_vae():
    model, x = curved_model(nn.ELU()), images(16)
    vae = GaussianGuide(model, linear_encoder()).double()
    guide = LaplaceGuide(model, 2, warm_start=vae)
    result = log_evidence(model, guide, x, 20, seed=0).elbo
    assert (result > log_evidence(model, vae, x, 20, seed=0).elbo).all()


def test_model_without_a_decoder():
    model = type("Flat", (), {"image_shape": SHAPE, "latent_dim": P})()
    with pytest.raises(ValueError, match=r"model\.decoder, which the model Flat does not"):
        LaplaceGuide(model)


@torch.no_grad()
@pytest.mark.parametrize("num_steps", [0, 1])
def test_a_precision_that_is_not_finite_names_the_image(num_steps, monkeypatch):
    monkeypatch.setattr(MAX_TANGENTS, {"cpu": 2 * P})
    model, x = curved_model(nn.ELU()), images(5)
    guide = build(model, num_steps)
    mean = guide.encode(x)[1].clone()
    mean[3] = torch.nan  # which the encoder itself would have refused
    monkeypatch.setattr(guide, "encode", lambda x: (None, mean, None))
    with pytest.raises(torch.linalg.LinAlgError, match="precision of image 3 is not finite"):
        guide.posterior(x)


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(8), nn.RReLU()], ids=lambda m: type(m).__name__)
def test_a_decoder_without_a_jacobian_of_each_image_is_refused_by_its_layer(layer):
    for decoder in (nn.Sequential(nn.Linear(2, 8), layer), nn.Sequential(nn.Sequential(layer))):
        model = ImageModel((1, 2, 4), 2, decoder.append(nn.Unflatten(1, (1, 2, 4))))
        guide = LaplaceGuide(model, 1, nn.Sequential(nn.Flatten(), nn.Linear(8, 3)))
        with pytest.raises(ValueError, match=rf"layer {type(layer).__name__}.*use GroupNorm or "):
            guide.posterior(torch.rand(3, 1, 2, 4))
