import copy
import gc
import pickle
import weakref

import pyro.distributions as dist
import pytest
import torch
from torch.autograd.functional import jacobian
from toy import images, linear_encoder, linear_model

from guides.householder import HouseholderGuide, _nonzero
from guides.iaf import IAFGuide
from pyro_gpvae import log_weights

FLOWS = {
    "iaf1": (IAFGuide, 1, {}),
    "iaf3": (IAFGuide, 3, {"hidden_dim": 16}),
    "hf1": (HouseholderGuide, 1, {}),
    "hf2": (HouseholderGuide, 2, {}),
}
every_flow = pytest.mark.parametrize("name", FLOWS)


def build(model, name, seed=2):
    cls, count, options = FLOWS[name]
    torch.manual_seed(seed)
    return cls(model, count, linear_encoder(), **options).double()


def by_hand(guide, x, z):
    """z_T from z_0, straight from the formulas."""
    context = guide.encode(x)[0]
    if isinstance(guide, IAFGuide):
        for step in guide.steps:
            mean, logit = step.nn(z, context=context)
            gate = torch.sigmoid(logit + 2)
            z = gate * z + (1 - gate) * mean
        return z
    v = context
    for layer in guide.flow.nn.layers:
        v = layer(v)
        z = z - 2 * v * (v * z).sum(-1, keepdim=True) / v.square().sum(-1, keepdim=True)
    return z


def by_pyro(guide, x):
    """The same distribution by Pyro's own class, with caches that nobody has filled."""
    _, loc, log_scale = guide.encode(x)
    steps = guide.steps if isinstance(guide, IAFGuide) else [guide.flow]
    return dist.ConditionalTransformedDistribution(
        dist.Normal(loc, log_scale.exp()).to_event(1), list(steps)
    ).condition(guide.encode(x)[0])


def close(actual, expected, tolerance=1e-8):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


@every_flow
def test_arbitrary_points_are_scored_as_by_pyro(name):
    model, x = linear_model(3), images(4)
    guide = build(model, name)
    q, expected = guide.posterior(x), by_pyro(guide, x)
    z = 2 * torch.randn(7, 4, 3).double()
    close(q.log_prob(z), expected.log_prob(z))
    close(q.expand((7, 4)).log_prob(z), expected.log_prob(z))
    grid = z[:, :1]  # points that all images share, which Pyro's transforms do not broadcast
    close(q.log_prob(grid), expected.log_prob(grid.expand(7, 4, 3)))
    close(q.log_prob(grid[0, 0]), expected.log_prob(grid[0].expand(4, 3)))


@every_flow
def test_samples_are_those_of_the_formula(name):
    model, x = linear_model(3), images(4)
    guide = build(model, name)
    q = guide.posterior(x)
    torch.manual_seed(0)
    z = q.rsample((5,))
    torch.manual_seed(0)
    assert torch.equal(q.expand((5, 4)).sample(), z)
    torch.manual_seed(0)
    _, loc, log_scale = guide.encode(x)
    z_0 = loc + log_scale.exp() * torch.randn(5, 4, 3, dtype=torch.float64)
    close(z, by_hand(guide, x, z_0))


def test_every_step_reads_the_context_and_the_order_alternates():
    model = linear_model(3)
    guide = build(model, "iaf3")
    z, context = torch.randn(3).double(), torch.randn(3).double()
    for step, lower in zip(guide.steps, (True, False, True), strict=True):
        for output in (0, 1):
            by_context = jacobian(lambda c, s=step, o=output: s.nn(z, context=c)[o], context)
            assert (by_context.norm(dim=1) > 1e-4).all()
            by_z = jacobian(lambda v, s=step, o=output: s.nn(v, context=context)[o], z)
            assert torch.equal(by_z, by_z.tril(-1) if lower else by_z.triu(1))
            assert by_z.norm() > 1e-4


@pytest.mark.parametrize("count", [1, 2, 4])
def test_reflections_are_orthogonal_and_give_the_closed_form(count):
    model, x = linear_model(4), images(3)
    torch.manual_seed(2)
    guide = HouseholderGuide(model, count, linear_encoder()).double()
    features, loc, log_scale = guide.encode(x)
    eye = torch.eye(4).double()
    # the images of the unit vectors are the columns
    h = guide.flow.condition(features)(eye.unsqueeze(1).expand(4, 3, 4)).permute(1, 2, 0)
    close(h.mT @ h, eye.expand(3, 4, 4), 1e-10)
    close(torch.linalg.det(h), torch.full((3,), (-1.0) ** count).double(), 1e-10)
    mean = (h @ loc.unsqueeze(-1)).squeeze(-1)
    expected = dist.MultivariateNormal(mean, h @ (2 * log_scale).exp().diag_embed() @ h.mT)
    z = torch.randn(6, 3, 4).double()
    close(guide.posterior(x).log_prob(z), expected.log_prob(z))


@pytest.mark.parametrize("count", [1, 3])
def test_a_zero_vector_still_reflects(count):
    model, x = linear_model(3), images(4)
    torch.manual_seed(2)
    guide = HouseholderGuide(model, count, linear_encoder()).double()
    with torch.no_grad():
        for parameter in guide.flow.parameters():
            parameter.zero_()
    z = guide.posterior(x).rsample()
    torch.manual_seed(3)
    guide.elbo().differentiable_loss(model, guide, x).backward()
    assert z.isfinite().all()
    assert all(p.grad.isfinite().all() for p in guide.parameters())


@every_flow
def test_gradients_are_those_of_the_whole_computation(name):
    model, x = linear_model(), images(4)
    guide = build(model, name)
    q = guide.posterior(x)
    options = {"retain_graph": True, "materialize_grads": True}
    for z in (q.rsample((3,)), q.sample()):  # the latter without a graph, but scored with one
        # the other tensor is scored by the inverse, and differentiated through z
        values = (q.log_prob(tensor).square().sum() for tensor in (z, z * 1))
        found = (torch.autograd.grad(v, [*guide.parameters()], **options) for v in values)
        for a, b in zip(*found, strict=True):
            close(a, b)


@every_flow
def test_samples_are_freed_without_the_garbage_collector(name):
    model, x = linear_model(), images(4)
    guide = build(model, name)
    gc.collect()
    gc.disable()
    try:
        q = guide.posterior(x)
        z = q.rsample((3,))
        q.log_prob(z)
        q.log_prob(z.clone())
        alive = [weakref.ref(z), weakref.ref(q), weakref.ref(q.context)]
        del z, q
        assert [r() for r in alive] == [None] * 3
    finally:
        gc.enable()


@every_flow
def test_only_the_very_tensor_is_remembered(name):
    model, x = linear_model(), images(4)
    guide = build(model, name)
    q, reference = guide.posterior(x), by_pyro(guide, x)
    first = q.rsample()
    second = q.rsample()
    for z in (first, second, first.clone(), second + 1e-3, second.flip(0)):
        close(q.log_prob(z), reference.log_prob(z.clone()))
    with torch.no_grad():
        z = q.sample()
        z += 1  # the same object, no longer what was drawn
        close(q.log_prob(z), reference.log_prob(z.clone()))
    with torch.inference_mode():
        z = q.sample()
        close(q.log_prob(z), reference.log_prob(z.clone()))


@every_flow
def test_after_a_sample_it_is_expanded_masked_copied_and_sampled_zero_times(name):
    model, x = linear_model(), images(4)
    with torch.no_grad():
        q = build(model, name).posterior(x)
        z = q.sample((2,))
        expected = q.log_prob(z)
        for other in (q.expand((2, 4)), pickle.loads(pickle.dumps(q)), copy.deepcopy(q)):
            close(other.log_prob(z), expected)
        mask = torch.tensor([True, False, True, True])
        close(q.mask(mask).log_prob(z), expected * mask)
        empty = q.sample((0,))
        assert (empty.shape, q.log_prob(empty).shape) == ((0, 4, 2), (0, 4))
        assert q.log_prob(empty.clone()).shape == (0, 4)


def test_training_and_evaluation_never_invert():
    model, x = linear_model(3), images(4)
    guide = build(model, "iaf3")
    passes = []
    for step in guide.steps:
        step.nn.register_forward_hook(lambda *_: passes.append(1))
    guide.elbo().differentiable_loss(model, guide, x)
    assert len(passes) == 3
    log_weights(model, guide, x, 8, chunk_size=8, vectorized=True)  # four times two particles
    assert len(passes) == 3 + 4 * 3


@pytest.mark.parametrize("cls", [IAFGuide, HouseholderGuide])
def test_one_dimension(cls):
    guide = cls(linear_model(1), 1, linear_encoder()).double()
    z = torch.linspace(-30, 30, 20_001).double()
    density = guide.posterior(images(4)).log_prob(z[:, None, None]).exp()
    close(torch.trapezoid(density, z, dim=0), torch.ones(4).double(), 1e-6)


def test_more_reflections_than_dimensions_are_reported():
    with pytest.warns(UserWarning, match="num_reflections = 4 is more than latent_dim = 3"):
        HouseholderGuide(linear_model(3), 4, linear_encoder())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-3, 1.0, 1e10, 1e25, 1e35])
def test_the_normal_of_a_mirror_has_a_finite_norm(dtype, size):
    v = torch.tensor([[3.0, -4.0, 0.0]], dtype=dtype) * size
    u = _nonzero(v)
    norm = u.norm(dim=-1, keepdim=True)
    assert bool((norm > 0).all())
    assert bool(norm.isfinite().all())
    if size >= 1e-3:
        torch.testing.assert_close(u / norm, torch.tensor([[0.6, -0.8, 0.0]], dtype=dtype))
