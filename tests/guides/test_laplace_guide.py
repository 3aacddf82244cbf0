"""VLAE: exact on linear decoders, exact Jacobians on any, and safe steps."""

import pyro
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam
from torch import nn
from torch.distributions import constraints

from guides.gaussian import GaussianGuide
from guides.laplace import LaplaceGuide, gauss_newton_step
from pyro_gpvae.evaluation.importance import log_evidence
from pyro_gpvae.model.curvature import decoder_jacobian, inverse_cholesky, linearize
from pyro_gpvae.model.guide import make_guide
from pyro_gpvae.model.image_model import ImageModel
from pyro_gpvae.training.loop import fit

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


def close(actual, expected, tolerance):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


class TestLinearGaussian:
    @pytest.mark.parametrize("solver", ["direct", "cg"])
    def test_one_step_is_exact(self, solver):
        model, x = model_of(), images()
        q = LaplaceGuide(model, 1, solver=solver).double().posterior(x)
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


class TestLinearisation:
    def test_jacobian_of_the_convolutional_decoder_of_table_1(self):
        torch.manual_seed(0)
        decoder = ImageModel((1, 28, 28), 10).double().decoder
        z = torch.randn(3, 10).double().requires_grad_()
        output, jacobian = decoder_jacobian(decoder, z)
        assert jacobian.shape == (3, 784, 10)
        expected = decoder(z).flatten(1)
        close(output, expected, 1e-12)
        for pixel in range(3, 784, 25):  # a backward pass gives a row for every image
            (row,) = torch.autograd.grad(expected[:, pixel].sum(), z, retain_graph=True)
            assert row.abs().max() > 1e-4
            close(jacobian[:, pixel], row, 1e-10)

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
            nn.Sequential(
                nn.Linear(P, 8), nn.utils.parametrizations.spectral_norm(nn.Linear(8, 9))
            ),
            nn.Sequential(nn.Linear(P, 8), RELU, nn.Linear(8, 8), RELU, nn.Linear(8, 64)),
            nn.Linear(P, 64),
            nn.Sequential(),
        ],
        ids=["relu", "norm", "convolutions", "parametrised", "shared", "one layer", "no layer"],
    )
    def test_jacobian_of_any_decoder(self, decoder):
        torch.manual_seed(0)
        decoder.double().eval()
        z = torch.randn(2, P).double()
        output, jacobian = decoder_jacobian(decoder, z)
        close(output, decoder(z).flatten(1), 1e-12)
        for i in range(2):
            expected = torch.autograd.functional.jacobian(
                lambda z: decoder(z[None]).flatten(), z[i]
            )
            close(jacobian[i], expected, 1e-12)

    @pytest.mark.parametrize("guide", ["vlae:4", "instance:full"])
    def test_a_layer_in_two_places_counts_twice(self, guide):
        torch.manual_seed(2)
        elbos, middle = [], nn.Linear(16, 16)
        for second in (RELU, nn.ReLU()):
            model = model_of(RELU, middle, second)
            q = make_guide(guide, model).double()
            elbos.append(log_evidence(model, q, images(), 5, seed=0).elbo)
        assert torch.equal(*elbos)

    def test_hooks_and_subclasses_are_not_taken_for_what_they_extend(self):
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

    def test_jacobian_of_a_users_pyro_decoder(self):
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
            for solver in ("direct", "cg"):
                guide = LaplaceGuide(model, 1, solver=solver)
                guide.elbo().differentiable_loss(model, guide, images().float()).backward()
            assert model.decoder.layer.weight.grad.isfinite().all()

    @pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli"])
    def test_gradient_and_curvature_of_the_log_joint(self, likelihood):
        # of a linear decoder, the Gauss-Newton matrix is the Hessian itself
        model, x = model_of(likelihood=likelihood), images(1).round()
        z = torch.randn(P, dtype=torch.float64)

        def log_joint(z):
            return model.log_joint(x, z[None])[0]

        gradient, precision = linearize(model, x, z[None])
        close(gradient[0], torch.autograd.functional.jacobian(log_joint, z), 1e-10)
        close(precision[0], -torch.autograd.functional.hessian(log_joint, z), 1e-10)

    @pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli"])
    def test_conjugate_gradients_equal_the_direct_solve(self, likelihood):
        model, x = model_of(nn.Tanh(), likelihood=likelihood), images()
        z = torch.randn(4, P, dtype=torch.float64)
        steps = [gauss_newton_step(model, x, z, (1.0,), solver) for solver in ("direct", "cg")]
        close(*steps, 1e-7)
        weight = model.decoder[0].weight
        close(*(torch.autograd.grad(s.square().sum(), weight)[0] for s in steps), 1e-6)

    def test_a_dead_direction_keeps_the_prior_in_float32(self):
        # JᵀJ/σ² is 1e7 in the other directions, where float32 cannot see the I of the prior
        model = model_of(sigma=1e-3).float()
        with torch.no_grad():
            model.decoder[0].weight[:, 2] = model.decoder[0].weight[:, 0]
        _, precision = linearize(model, images().float(), torch.zeros(4, P))
        dead = torch.tensor([1.0, 0.0, -1.0]) / 2**0.5
        factor = inverse_cholesky(precision)[0].float()
        close((factor.mT @ dead).square().sum(-1), torch.ones(4), 1e-2)


class TestSteps:
    def test_the_line_search_never_lowers_the_log_joint(self):
        model, x = model_of(nn.Tanh(), sigma=0.02), images(64)
        model.decoder[0].weight.data *= 3
        z = torch.randn(64, P, dtype=torch.float64)
        full_steps_that_fail = 0
        with torch.no_grad():
            for _ in range(3):
                before = model.log_joint(x, z)
                full_step = gauss_newton_step(model, x, z, (1.0,))
                full_steps_that_fail += int((model.log_joint(x, full_step) < before).sum())
                z = gauss_newton_step(model, x, z)
                assert (model.log_joint(x, z) >= before - 1e-9).all()
        assert full_steps_that_fail > 0

    @pytest.mark.parametrize("options", [{}, {"step": "damped"}, {"solver": "cg"}], ids=str)
    def test_an_image_does_not_depend_on_its_batch(self, options):
        model, x = model_of(nn.ELU()), images(5)
        guide = LaplaceGuide(model, 2, **options).double()
        together = guide.posterior(x)
        for i in (0, 3):
            alone = guide.posterior(x[i : i + 1])
            close(alone.mean[0], together.mean[i], 1e-9)
            close(alone.scale_tril[0], together.scale_tril[i], 1e-9)

    def test_evaluation_in_chunks_equals_training(self, monkeypatch):
        monkeypatch.setattr("guides.laplace._MAX_TANGENTS", {"cpu": 2 * P})
        model, x = model_of(nn.ELU()), images(5)
        for solver in ("direct", "cg"):
            guide = LaplaceGuide(model, 2, solver=solver).double()
            with torch.no_grad():
                evaluated = guide.posterior(x)
            assert not evaluated.scale_tril.requires_grad
            close(evaluated.mean, guide.posterior(x).mean.detach(), 1e-9)
            close(evaluated.scale_tril, guide.posterior(x).scale_tril.detach(), 1e-9)


class TestTraining:
    @pytest.mark.parametrize("options", [{}, {"step": "damped"}, {"solver": "cg"}], ids=str)
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

    def test_one_epoch(self):
        torch.manual_seed(0)
        model = ImageModel((1, 12, 12), 2, sigma=0.3)
        guide = LaplaceGuide(model, 1)
        data = torch.randint(256, (32, 1, 12, 12), dtype=torch.uint8)
        before = {name: p.clone() for name, p in guide.named_parameters()}
        history = fit(model, guide, data, epochs=1, batch_size=16, device="cpu", progress=False)
        assert torch.tensor(history.rows[-1]["loss"]).isfinite()
        assert not torch.equal(before["encoder.0.weight"], guide.encoder[0].weight)

    def test_plain_svi(self):
        torch.manual_seed(0)
        model = model_of(nn.Tanh()).float()
        guide, x = LaplaceGuide(model, 1), images().float()
        before = model.decoder[0].weight.clone()
        svi = SVI(model, guide, Adam({"lr": 1e-2}), Trace_ELBO(2, vectorize_particles=True))
        losses = [svi.step(x) for _ in range(30)]
        assert losses[-1] < losses[0]
        assert not torch.equal(before, model.decoder[0].weight)


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

    def test_save_and_load(self):
        model, x = model_of(nn.ELU()), images()
        guide, other = (LaplaceGuide(model, 1).double() for _ in range(2))
        assert not torch.equal(guide.posterior(x).mean, other.posterior(x).mean)
        other.load_state_dict(guide.state_dict())
        assert torch.equal(guide.posterior(x).mean, other.posterior(x).mean)
        assert torch.equal(guide.posterior(x).scale_tril, other.posterior(x).scale_tril)


class TestBadInput:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"num_steps": -1}, "num_steps must be at least 0, got -1"),
            ({"step": "newton"}, "step must be one of .*, got 'newton'"),
            ({"solver": "lu"}, "solver must be one of .*, got 'lu'"),
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
        monkeypatch.setattr("guides.laplace._MAX_TANGENTS", {"cpu": 2 * P})
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

    def test_a_singular_precision_names_the_image(self):
        precision = torch.eye(2).double().repeat(3, 1, 1)
        precision[1, 1, 1] = -1
        with pytest.raises(torch.linalg.LinAlgError, match="precision of image 1 is singular"):
            inverse_cholesky(precision)
        with pytest.raises(torch.linalg.LinAlgError, match="image 7 is singular"):
            inverse_cholesky(precision, torch.tensor([2, 7, 9]))

    def test_jitter_helps_where_it_is_needed_and_nowhere_else(self):
        good = torch.tensor([[2.0, 1.0], [1.0, 3.0]]).double()
        bad = torch.ones(2, 2).double() - 1e-9 * torch.eye(2).double()
        factor, _ = inverse_cholesky(torch.stack([good, bad]))
        close(factor[0] @ factor[0].T, good.inverse(), 1e-14)
        assert factor[1].isfinite().all()
