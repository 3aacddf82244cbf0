"""The gradients that training follows, against finite differences of the loss it reports.

The noise is fixed by a seed. Discrete choices (line searches, clipped norms, ReLUs inside Pyro's
and our networks) are constant near almost every point; the seeds are of points where they are.
"""

from __future__ import annotations

import itertools
import math

import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import nn
from toy import SHAPE, images, linear_encoder

from guides.refinement import RefinementELBO
from pyro_gpvae import ImageModel, PerImage, available_guides, make_guide, pair
from pyro_gpvae.core._seeds import seeded
from pyro_gpvae.model._precomputed import PrecomputedPosterior
from pyro_gpvae.model.elbo import Block

P, NUM_IMAGES = 2, 50

GUIDES = [
    *("vae", "gp", "gp:estimator=weights", "gp:estimator=marginal"),
    *("gp:covariance=full,features=own", "full", "lowrank:1", "iaf:2", "hf:2", "me:2", "me:1"),
    *("rme:3", "rme:2,repulsion=0.5,max_divergence=0.01", "sa:2"),
    *(
        "sa:2,natural=False,line_search=False,step_size=0.01",
        "sa:1,legacy_sign=True,step_size=0.01",
    ),
    *("iterative:2", "iterative:2,num_samples=3", "vlae:0", "vlae:2", "vlae:2,step=damped"),
    *("newton:1", "newton:2"),
    *("instance", "instance:full"),
]


def model_and_guide(spec, likelihood="gaussian"):
    """Model and guide in float64 with small smooth networks, away from their initial values."""
    torch.manual_seed(0)
    decoder = nn.Sequential(
        nn.Linear(P, 4), nn.Tanh(), nn.Linear(4, math.prod(SHAPE)), nn.Unflatten(1, SHAPE)
    )
    model = ImageModel(SHAPE, P, decoder, sigma=0.4, likelihood=likelihood).double()
    options = {} if spec.startswith("instance") else {"encoder": linear_encoder()}
    if spec.startswith("iaf"):
        options["hidden_dim"] = 4
    if spec.startswith(("iterative", "newton")):
        options["hidden"] = 4
    guide = make_guide(spec, model, **options).double()
    with torch.no_grad():
        for parameter in itertools.chain(model.parameters(), guide.parameters()):
            parameter += 0.2 * torch.randn_like(parameter)
    return model, guide


def frozen_inner_gradients(guide):
    """Makes the guide's inner gradients the constants that they are to its training gradient."""
    true_gradient, recorded = guide.gradient, []
    calls = itertools.count()

    def gradient(x, loc, log_scale, noise, second_order=True):
        call = next(calls) % guide.num_steps
        elbo, *gradients = true_gradient(x, loc, log_scale, noise, second_order)
        if len(recorded) <= call:
            recorded.append([g.detach() for g in gradients])
        return elbo, *recorded[call]

    guide.gradient = gradient


def slope(loss, parameters, direction, h=1e-4):
    """The derivative of a loss along a direction, to fourth order in h."""

    @torch.no_grad()
    def move(share):
        for parameter, d in zip(parameters, direction, strict=True):
            parameter += share * d

    values = []
    for share in (-2 * h, h, 2 * h, h):  # at -2h, -h, h, 2h
        move(share)
        values.append(loss().item())
    move(-2 * h)
    low2, low, high, high2 = values
    return (8 * (high - low) - (high2 - low2)) / (12 * h)


def directions(parameters, count, seed):
    """Random directions through all parameters, and single coordinates of random parameters."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        normal = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
        norm = math.sqrt(sum(float(d.square().sum()) for d in normal))
        yield [d / norm for d in normal]
    for _ in range(count):
        one = [torch.zeros_like(p) for p in parameters]
        place = int(torch.randint(len(parameters), (), generator=generator))
        flat = one[place].view(-1)
        flat[int(torch.randint(len(flat), (), generator=generator))] = 1
        yield one


def check(objective, model, guide, parameters, x, seed=0):
    programs = PerImage(pair(model, guide), NUM_IMAGES), PerImage(guide, NUM_IMAGES)

    def loss():
        with seeded(seed, x.device):
            return objective.differentiable_loss(*programs, x)

    gradients = torch.autograd.grad(loss(), parameters, allow_unused=True, materialize_grads=True)
    size = math.sqrt(sum(float(g.square().sum()) for g in gradients))
    assert size > 1e-3
    for direction in directions(parameters, 6, seed):
        expected = slope(loss, parameters, direction)
        found = sum(float((g * d).sum()) for g, d in zip(gradients, direction, strict=True))
        # a coordinate on which the loss hardly depends is compared with the others
        assert abs(found - expected) < 1e-5 * max(abs(expected), 1e-2 * size)


def blocks_of(spec, model, guide, x):
    everything = [*model.parameters(), *guide.parameters()]
    if spec.startswith("instance"):
        # trains the model alone, for the optimal q of the present one
        return [Block(Trace_ELBO(), everything, guide=PrecomputedPosterior(guide.posterior(x)))]
    if hasattr(guide, "blocks"):
        return guide.blocks(model)
    # RefinementELBO has another gradient on purpose: see tests/guides/test_newton_guide.py
    refines = isinstance(guide.elbo(), RefinementELBO)
    return [Block(TraceMeanField_ELBO() if refines else guide.elbo(), everything)]


@pytest.mark.slow
@pytest.mark.parametrize("spec", GUIDES)
def test_gradients_are_the_slopes_of_the_loss(spec):
    model, guide = model_and_guide(spec)
    x = images(3)
    if spec.startswith("iterative"):
        frozen_inner_gradients(guide)
    blocks = blocks_of(spec, model, guide, x)
    assert blocks
    for block in blocks:
        program = guide if block.guide is None else block.guide
        check(block.elbo, model, program, list(block.parameters), x)


@pytest.mark.parametrize("spec", ["vae", "me:2", "sa:1", "vlae:1"])
def test_binary_pixels(spec):
    model, guide = model_and_guide(spec, "bernoulli")
    x = images(3).round()
    for block in blocks_of(spec, model, guide, x):
        check(block.elbo, model, guide, list(block.parameters), x)


def test_every_registered_guide_is_here():
    assert set(available_guides()) == {spec.partition(":")[0] for spec in GUIDES}


def test_a_wrong_gradient_is_found():
    class Biased(type(model_and_guide("vae")[1])):
        def posterior(self, x):
            q = super().posterior(x)
            scale = q.stddev
            # the value is right, a share of 1e-4 of one gradient is missing
            scale = scale + 1e-4 * (scale.detach() - scale)
            return dist.Normal(q.mean, scale).to_event(1)

    model, guide = model_and_guide("vae")
    guide.__class__ = Biased
    everything = [*model.parameters(), *guide.parameters()]
    with pytest.raises(AssertionError, match="abs"):
        check(guide.elbo(), model, guide, everything, images(3))
