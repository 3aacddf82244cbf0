import copy
import math
from contextlib import nullcontext

import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.distributions import kl_divergence
from toy import (
    SHAPE,
    exact_evidence,
    expected_log_likelihood,
    images,
    linear_encoder,
    linear_model,
)

from guides.iterative import IterativeGuide
from guides.semi_amortized import SemiAmortizedGuide
from pyro_gpvae import ImageModel, decompose, fit, log_evidence, make_guide

every_family = pytest.mark.parametrize("family", [SemiAmortizedGuide, IterativeGuide])
# every way to take a step that is meant to raise the ELBO
SA_OPTIONS = [
    {},
    {"natural": False, "step_size": 0.05},
    {"line_search": False, "step_size": 0.1},
    {"natural": False, "line_search": False, "step_size": 0.005, "num_samples": 3},
]


def build(family, model, *args, seed=2, **options):
    """A guide in float64, whose learned updates do something from the start."""
    torch.manual_seed(seed)
    guide = family(model, *args, linear_encoder(), **options).double()
    if getattr(guide, "update", None) is not None:
        with torch.no_grad():
            for parameter in guide.update[-1].parameters():
                parameter += 0.1 * torch.randn_like(parameter)
    return guide


def curved_model(seed=3):
    """A decoder that is far from linear, so that curvature varies along a step."""
    torch.manual_seed(seed)
    decoder = nn.Sequential(
        nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, math.prod(SHAPE)), nn.Unflatten(1, SHAPE)
    )
    with torch.no_grad():
        decoder[0].weight *= 3
        decoder[2].weight *= 3
    return ImageModel(SHAPE, 2, decoder, sigma=0.1).double()


def exact_elbo(model, x, loc, log_scale):
    """The ELBO (B,) of N(loc, s²) under a linear-Gaussian model, without sampling."""
    q = dist.Normal(loc, log_scale.exp()).to_event(1)
    fit = expected_log_likelihood(model, x, loc, (2 * log_scale).exp())
    return (fit - kl_divergence(q, model.prior())).detach()


def posterior(guide, x, seed=0):
    torch.manual_seed(seed)
    return guide.posterior(x)


@pytest.mark.parametrize("options", SA_OPTIONS)
def test_every_step_raises_the_elbo_of_every_image(options):
    model, x = linear_model(), images(20)
    guide = build(SemiAmortizedGuide, model, 4, **(options | {"num_samples": 2000}))
    with torch.no_grad():
        guide.head.weight *= 10  # start away from the optimum
        torch.manual_seed(0)
        path, _ = guide.path(x)
    elbos = torch.stack([exact_elbo(model, x, *at) for at in path])
    assert (elbos.diff(dim=0) > 0).all()
    assert (elbos[-1] - elbos[0]).mean() > 0.5


def test_plain_step_is_the_gradient_by_hand():
    model, x = linear_model(), images(5)
    options = {"natural": False, "line_search": False, "step_size": 1e-3}
    guide = build(SemiAmortizedGuide, model, 1, max_norm=1e9, **options)
    torch.manual_seed(0)
    (_, (loc, log_scale)), (elbo,) = guide.path(x)
    torch.manual_seed(0)
    noise = torch.randn(1, 5, 2, dtype=torch.float64)
    m, log_s = (value.detach().requires_grad_() for value in guide.encode(x)[1:])
    total = 0
    for e in (noise[0], -noise[0]):
        total += dist.Normal(model.decoder(m + log_s.exp() * e), model.log_sigma.exp()).log_prob(x)
    kl = 0.5 * (m**2 + (2 * log_s).exp() - 1 - 2 * log_s).sum(-1)
    by_hand = total.sum((1, 2, 3)) / 2 - kl
    by_hand.sum().backward()
    torch.testing.assert_close(elbo, by_hand, rtol=0, atol=1e-10)
    torch.testing.assert_close(loc, m + 1e-3 * m.grad, rtol=0, atol=1e-10)
    torch.testing.assert_close(log_scale, log_s + 1e-4 * log_s.grad, rtol=0, atol=1e-10)


def test_natural_step_of_rate_one_is_newtons_for_an_uncorrelated_posterior():
    model, x = linear_model(sigma=0.5), images(5)
    with torch.no_grad():  # orthogonal columns: one dimension does not see the other
        model.decoder[0].weight.copy_(torch.eye(6, 2))
    guide = build(SemiAmortizedGuide, model, 1, max_norm=1e9, num_samples=2, line_search=False)
    with torch.no_grad():  # the posterior's own scale: precision 1 + 1/σ²
        guide.head.weight[2:] = 0
        precision = 1 + (-2 * model.log_sigma).exp()
        guide.head.bias[2:] = -0.5 * precision.log()
    residual = (x.flatten(1) - model.decoder[0].bias)[:, :2]
    target = residual * (1 - 1 / precision)  # 1/σ² / (1 + 1/σ²)
    q = posterior(guide, x)
    torch.testing.assert_close(q.mean, target, rtol=0, atol=1e-10)


@pytest.mark.parametrize("natural", [True, False])
def test_norm_of_each_images_step_is_clipped(natural):
    model, x = linear_model(sigma=0.01), images(5)
    options = {"line_search": False, "natural": natural}
    guide = build(SemiAmortizedGuide, model, 1, max_norm=0.3, **options)
    (loc, log_scale), (new_loc, new_log_scale) = guide.path(x)[0]
    # ρ = 0.1 of the clipped gradient of log s
    d_loc, d_log_scale = new_loc - loc, (new_log_scale - log_scale) / 0.1
    if natural:  # the length in the Fisher metric: diag(1/s²) for the mean, 2 for log s
        d_loc, d_log_scale = d_loc / log_scale.exp(), d_log_scale * math.sqrt(2)
    norm = torch.cat([d_loc, d_log_scale], -1).norm(dim=-1)
    torch.testing.assert_close(norm, torch.full_like(norm, 0.3), rtol=1e-9, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("natural", [True, False])
@pytest.mark.parametrize("step_size", [1.0, 1e3, 1e30])
def test_line_search_never_lowers_the_elbo_on_the_noise_of_the_step(step_size, natural):
    model, x = curved_model(), images(50)
    options = {"step_size": step_size, "natural": natural, "num_samples": 1}
    guide = build(SemiAmortizedGuide, model, 1, **options)
    _, loc, log_scale = guide.encode(x)
    for seed in range(10):
        torch.manual_seed(seed)
        noise = guide.draw_noise(loc)
        torch.manual_seed(seed)
        new_loc, new_log_scale, before = guide.step(x, loc, log_scale)
        after = guide.image_elbo(x, new_loc, new_log_scale, noise)
        moved = (new_loc != loc).any(-1)
        assert (after[moved] > before[moved]).all()
        assert torch.equal(after[~moved], before[~moved])
        assert moved.sum() > 40 or step_size > 1
        loc, log_scale = new_loc, new_log_scale


def test_legacy_sign_lowers_the_elbo():
    model, x = linear_model(), images(20)
    legacy = build(SemiAmortizedGuide, model, 4, step_size=0.5, legacy_sign=True)
    with torch.no_grad():
        torch.manual_seed(0)
        path, _ = legacy.path(x)
    elbos = torch.stack([exact_elbo(model, x, *at) for at in path])
    assert (elbos.mean(1).diff() < 0).all()


@pytest.mark.parametrize("legacy", [False, True])
def test_only_the_legacy_sign_divides_by_the_size_of_the_batch(legacy, monkeypatch):
    guide = build(SemiAmortizedGuide, linear_model(), 2, step_size=0.1, legacy_sign=legacy)
    monkeypatch.setattr(guide, "draw_noise", lambda loc: torch.ones_like(loc)[None])
    x = images(6)
    together, alone = guide.posterior(x).mean[:1], guide.posterior(x[:1]).mean
    assert torch.allclose(together, alone, rtol=0, atol=1e-10) is not legacy


def test_noise_is_antithetic_and_new_in_each_step(monkeypatch):
    guide = build(SemiAmortizedGuide, linear_model(), 2, num_samples=5)
    draws = []
    draw = guide.draw_noise
    monkeypatch.setattr(guide, "draw_noise", lambda loc: draws.append(draw(loc)) or draws[-1])
    guide.posterior(images(4))
    first, second = draws
    assert first.shape == (5, 4, 2)
    assert torch.equal(first[3:], -first[:2])
    assert not torch.equal(first, second)
    assert not torch.equal(first[:, 0], first[:, 1])


@pytest.mark.parametrize("options", [*SA_OPTIONS, {"max_norm": 0.5}])
def test_outer_gradient_of_sa_equals_finite_differences(options):
    model, x = curved_model(), images(6)
    guide = build(SemiAmortizedGuide, model, 3, **options)

    def objective():
        q = posterior(guide, x)
        z = q.rsample((3,))
        return (model.log_joint(x, z) - q.log_prob(z)).mean()

    objective().backward()
    generator = torch.Generator().manual_seed(5)
    for parameter in (*model.parameters(), *guide.parameters()):
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        analytic, values = float((parameter.grad * direction).sum()), []
        with torch.no_grad():
            for step in (1e-6, -2e-6):
                parameter += step * direction
                values.append(float(objective()))
            parameter += 1e-6 * direction
        assert analytic != 0
        assert analytic == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-4, abs=1e-4)


def test_learned_updates_learn_to_infer():
    model, x = linear_model(), images(64)
    torch.manual_seed(0)
    guide = IterativeGuide(model, 2, linear_encoder(), hidden=32).double()
    for module in (model, guide.encoder, guide.head):
        module.requires_grad_(False)
    (start, *_, end) = guide.path(x)[0]
    before = exact_elbo(model, x, *start).mean()
    fit(model, guide, (x * 255).to(torch.uint8), epochs=40, learning_rate=1e-2, progress=False)
    with torch.no_grad():
        (start, *_, end) = guide.path(x)[0]
    assert exact_elbo(model, x, *start).mean() == before
    best = exact_evidence(model, x).mean()
    assert best - exact_elbo(model, x, *end).mean() < 0.3 * (best - before)


@every_family
def test_each_image_is_refined_once_however_many_samples(family, monkeypatch):
    model = linear_model()
    guide = build(family, model, 2)
    calls = []
    step = guide.step
    monkeypatch.setattr(guide, "step", lambda x, *at: calls.append(len(x)) or step(x, *at))
    log_evidence(model, guide, images(6), 50, chunk_size=12)
    assert calls == [6, 6]


@pytest.mark.parametrize("spec", ["sa:1", "iterative:1", "vlae:1", "newton:1", "instance"])
def test_inference_mode_changes_no_number(spec):
    model = linear_model()
    guide = make_guide(spec, model, **({} if spec == "instance" else {"encoder": linear_encoder()}))
    found = []
    for context in (nullcontext(), torch.inference_mode()):
        with context:
            x = images(3)
            gap = decompose(model, guide.double(), x, num_samples=5, reference_samples=20, seed=0)
            weights = log_evidence(model, guide, x, 5, seed=0)
            found.append(torch.stack([weights.log_evidence, gap.elbo, gap.log_evidence]))
    torch.testing.assert_close(*found, rtol=0, atol=0)


@every_family
def test_copied_with_its_model_it_refines_by_the_copy(family):
    model, x = linear_model(), images(4)
    guide = build(family, model, 2)
    copied_model, copied = copy.deepcopy((model, guide))
    before = posterior(guide, x).mean
    with torch.no_grad():
        copied_model.decoder[0].bias += 1
    assert torch.equal(posterior(guide, x).mean, before)
    assert not torch.equal(posterior(copied, x).mean, before)


def test_a_guide_without_an_update_cannot_take_steps():
    guide = IterativeGuide(linear_model(), 0, linear_encoder()).double()
    guide.num_steps = 1
    with pytest.raises(ValueError, match="num_steps=0 has no update"):
        guide.posterior(images(2))
