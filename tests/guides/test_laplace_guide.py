"""VLAE: exact on linear decoders, exact Jacobians on any, and safe steps."""

import pytest
import torch
from torch import nn

from guides import GaussianGuide, LaplaceGuide
from pyro_gpvae import ImageModel, log_evidence
from pyro_gpvae.model.curvature import STEP_SIZES, line_search, linearize

SHAPE, P = (1, 8, 8), 3


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


def exact_posterior(model, x):
    """Mean and covariance of p(z|x) for a linear decoder, and log p(x)."""
    linear, sigma = model.decoder[0], model.log_sigma.exp()
    weight, bias = linear.weight, linear.bias
    precision = weight.T @ weight / sigma**2 + torch.eye(P).double()
    covariance = precision.inverse()
    mean = (x.flatten(1) - bias) @ weight / sigma**2 @ covariance
    marginal = weight @ weight.T + sigma**2 * torch.eye(64).double()
    log_evidence = torch.distributions.MultivariateNormal(bias, marginal).log_prob(x.flatten(1))
    return mean, covariance, log_evidence


def one_step(model, x, z, sizes=STEP_SIZES):
    """z + α Λ⁻¹ ∇ log p(x, z)."""
    gradient, precision = linearize(model, x, z)
    return line_search(model, x, z, torch.linalg.solve(precision, gradient), sizes)


def close(actual, expected, tolerance):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


class TestLinearGaussian:
    def test_one_step_is_exact(self):
        model, x = model_of(), images()
        q = LaplaceGuide(model, 1).double().posterior(x)
        mean, covariance, _ = exact_posterior(model, x)
        close(q.mean, mean, 1e-8)
        close(q.covariance_matrix, covariance.expand(4, P, P), 1e-8)

    def test_published_steps_are_damped(self):
        model, x = model_of(), images()
        guide = LaplaceGuide(model, 2, step="damped").double()
        start, target = guide.encode(x)[1], exact_posterior(model, x)[0]
        # 1/2, then 1/4 of the rest of the way
        close(guide.posterior(x).mean, target + 0.5 * 0.75 * (start - target), 1e-8)

    def test_no_step_keeps_the_encoders_mean(self):
        model, x = model_of(), images()
        guide = LaplaceGuide(model, 0).double()
        q = guide.posterior(x)
        assert torch.equal(q.mean, guide.encode(x)[1])
        close(q.covariance_matrix[0], exact_posterior(model, x)[1], 1e-8)

    def test_evidence_is_exact(self):
        model, x = model_of(), images()
        result = log_evidence(model, LaplaceGuide(model, 1).double(), x, 7, seed=0)
        close(result.log_evidence, exact_posterior(model, x)[2], 1e-8)
        close(result.elbo, result.log_evidence, 1e-8)


class TestSteps:
    def test_the_line_search_never_lowers_the_log_joint(self):
        model, x = model_of(nn.Tanh(), sigma=0.02), images(64)
        model.decoder[0].weight.data *= 3
        z = torch.randn(64, P, dtype=torch.float64)
        full_steps_that_fail = 0
        with torch.no_grad():
            for _ in range(3):
                before = model.log_joint(x, z)
                full_step = one_step(model, x, z, (1.0,))
                full_steps_that_fail += int((model.log_joint(x, full_step) < before).sum())
                z = one_step(model, x, z)
                assert (model.log_joint(x, z) >= before - 1e-9).all()
        assert full_steps_that_fail > 0

    @pytest.mark.parametrize("options", [{}, {"step": "damped"}], ids=str)
    def test_an_image_does_not_depend_on_its_batch(self, options):
        model, x = model_of(nn.ELU()), images(5)
        guide = LaplaceGuide(model, 2, **options).double()
        together = guide.posterior(x)
        for i in (0, 3):
            alone = guide.posterior(x[i : i + 1])
            close(alone.mean[0], together.mean[i], 1e-9)
            close(alone.scale_tril[0], together.scale_tril[i], 1e-9)

    def test_evaluation_in_chunks_equals_training(self, monkeypatch):
        monkeypatch.setattr("pyro_gpvae.model.curvature._MAX_TANGENTS", {"cpu": 2 * P})
        model, x = model_of(nn.ELU()), images(5)
        guide = LaplaceGuide(model, 2).double()
        with torch.no_grad():
            evaluated = guide.posterior(x)
        assert not evaluated.scale_tril.requires_grad
        close(evaluated.mean, guide.posterior(x).mean.detach(), 1e-9)
        close(evaluated.scale_tril, guide.posterior(x).scale_tril.detach(), 1e-9)


class TestTraining:
    @pytest.mark.parametrize("options", [{}, {"step": "damped"}], ids=str)
    def test_gradients_equal_finite_differences(self, options):
        model, x = model_of(nn.Tanh()), images(2)
        guide = LaplaceGuide(model, 2, **options).double()

        def value():
            q = guide.posterior(x)
            return q.mean.square().sum() + q.scale_tril.square().sum()

        for parameter in (model.decoder[0].weight, model.log_sigma, guide.head.bias):
            (gradient,) = torch.autograd.grad(value(), parameter)
            flat, step = parameter.data.view(-1), 1e-5
            flat[0] += step
            above = value().item()
            flat[0] -= 2 * step
            below = value().item()
            flat[0] += step
            assert gradient.flatten()[0].item() == pytest.approx((above - below) / (2 * step), 1e-5)

    def test_training_reaches_encoder_and_decoder(self):
        torch.manual_seed(0)
        model = ImageModel((1, 12, 12), 2, sigma=0.5)
        guide = LaplaceGuide(model, 1)
        x = torch.rand(8, 1, 12, 12)
        guide.elbo().differentiable_loss(model, guide, x).backward()
        for module in (model, guide):
            for name, parameter in module.named_parameters():
                assert parameter.grad is not None, name
                assert parameter.grad.isfinite().all(), name
        for weight in (model.decoder[0].weight, guide.encoder[0].weight, guide.head.weight):
            assert weight.grad.abs().max() > 0


class TestModule:
    def test_warm_start_refines_a_trained_vae(self):
        model, x = model_of(nn.ELU()), images(16)
        vae = GaussianGuide(model).double()
        guide = LaplaceGuide(model, 2, warm_start=vae)
        assert torch.equal(guide.encode(x)[1], vae.encode(x)[1])
        result = log_evidence(model, guide, x, 20, seed=0).elbo
        assert (result > log_evidence(model, vae, x, 20, seed=0).elbo).all()

    def test_the_decoder_stays_the_models(self):
        model = model_of()
        names = {name for name, _ in GaussianGuide(model).named_parameters()}
        assert {name for name, _ in LaplaceGuide(model, 2).named_parameters()} == names


class TestBadInput:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"num_steps": -1}, "num_steps must be at least 0, got -1"),
            ({"step": "newton"}, "step must be one of .*, got 'newton'"),
        ],
    )
    def test_options(self, options, message):
        with pytest.raises(ValueError, match=message):
            LaplaceGuide(model_of(), **options)

    def test_model_without_a_decoder(self):
        model = type("Flat", (), {"image_shape": SHAPE, "latent_dim": P})()
        with pytest.raises(ValueError, match=r"model\.decoder, which the model Flat does not"):
            LaplaceGuide(model)

    @pytest.mark.parametrize("num_steps", [0, 1])
    def test_a_precision_that_is_not_finite_names_the_image(self, num_steps, monkeypatch):
        monkeypatch.setattr("pyro_gpvae.model.curvature._MAX_TANGENTS", {"cpu": 2 * P})
        model, x = model_of(nn.ELU()), images(5)
        guide = LaplaceGuide(model, num_steps).double()
        mean = guide.encode(x)[1].detach().clone()
        mean[3] = torch.nan  # which the encoder itself would have refused
        monkeypatch.setattr(guide, "encode", lambda x: (None, mean, None))
        with (
            torch.no_grad(),
            pytest.raises(torch.linalg.LinAlgError, match="precision of image 3 is not finite"),
        ):
            guide.posterior(x)
