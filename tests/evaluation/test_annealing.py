import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from guides import GaussianGuide, GPGuide, IAFGuide
from pyro_gpvae import ImageModel, log_evidence, pair
from pyro_gpvae.core._errors import NonFiniteError
from pyro_gpvae.core._seeds import image_seed
from pyro_gpvae.evaluation._hmc import AnnealingPath, Start
from pyro_gpvae.evaluation.annealing import annealed_evidence, bidirectional
from pyro_gpvae.model.density import JointDensity
from pyro_gpvae.testing import linear_gaussian

SHAPE = (1, 4, 4)
pytestmark = pytest.mark.filterwarnings("ignore:fewer than 3 of")


def model_and_images(p=10, count=20, **options):
    model = linear_gaussian(SHAPE, p, **options).double()
    model.requires_grad_(False)
    return model, model.images(count)


class Off:
    """A guide that is off the posterior by a fraction of its standard deviation, and too wide."""

    def __init__(self, model):
        self.model = model

    def posterior(self, x):
        q = self.model.posterior(x)
        return dist.Normal(q.mean + 0.3 * q.stddev, 1.2 * q.stddev).to_event(1)


@pytest.mark.slow
@pytest.mark.parametrize(("start", "steps"), [("guide", 100), ("prior", 400)])
def test_the_linear_gaussian_evidence_within_a_twentieth_of_a_nat(start, steps):
    model, x = model_and_images()
    guide = Off(model) if start == "guide" else None
    result = annealed_evidence(
        model, x, guide, num_chains=64, num_steps=steps, seed=0, chunk_size=2000
    )
    exact = model.log_evidence(x)
    error = result.log_evidence - exact
    assert abs(float(error.mean())) < 0.05
    # a right error estimate: 20 standard normal numbers, up to 3.5 once in 100 seeds
    assert float((error / result.standard_error).abs().max()) < 3.5
    assert float(result.standard_error.max()) < 0.25
    assert bool((result.acceptance_rate - 0.65).abs().max() < 0.15)
    assert bool((result.effective_sample_size > 16).all())


@pytest.mark.slow
@pytest.mark.parametrize("start", ["guide", "prior"])
def test_the_sandwich_holds_the_exact_evidence(start):
    model, _ = model_and_images()
    guide = Off(model) if start == "guide" else None
    options = {"num_images": 20, "num_chains": 32, "seed": 1, "chunk_size": 1000}
    tight = bidirectional(model, guide, num_steps=100 if guide else 400, **options)
    exact = model.log_evidence(tight.x)
    assert abs(float((tight.lower - exact).mean())) < 0.05
    assert abs(float((tight.upper - exact).mean())) < 0.05
    assert abs(tight.gap) < 0.1
    # few steps: both bounds are loose, on their own sides
    loose = bidirectional(model, guide, num_steps=2 if guide else 6, **options)
    torch.testing.assert_close(loose.x, tight.x)
    assert float((loose.lower - exact).mean()) < -0.02
    assert float((loose.upper - exact).mean()) > 0.02
    assert loose.gap > 0.1


def test_simulated_images_are_drawn_from_the_model():
    model, _ = model_and_images(p=2, sigma=0.3)
    both = bidirectional(model, num_images=400, num_chains=1, num_steps=1, seed=0)
    residual = (both.x - model.likelihood(both.z).mean) / model.log_sigma.exp()
    for sample in (both.z, residual.flatten(1)):  # 800 and 6,400 standard normal numbers
        assert abs(float(sample.mean())) < 4 / sample.numel() ** 0.5
        assert abs(float(sample.var()) - 1) < 4 * (2 / sample.numel()) ** 0.5
    assert bool((both.x < 0).any() or (both.x > 1).any())  # and not clipped


def test_one_step_is_importance_sampling():
    model, x = model_and_images(count=1)
    guide = Off(model)
    result = annealed_evidence(model, x, guide, num_chains=20_000, num_steps=1, seed=0)
    expected = log_evidence(model, guide, x, 20_000, seed=1)
    error = torch.hypot(result.standard_error, expected.standard_error)
    assert bool((result.log_evidence - expected.log_evidence).abs() < 4 * error)


def test_moves_keep_their_target():
    """Exact draws of the posterior are still exact draws after moves at β = 1."""
    model, x = model_and_images(p=2, count=1)
    start = Start.of(JointDensity(model, (x,)), Off(model), 0, [0])
    path = AnnealingPath.of(start, 0, [0], 8000)
    q = model.posterior(x)
    state = path.at(q.sample((8000,)))
    for _ in range(10):
        state, accepted = path.move(state, 1.0, torch.full((8000, 1), 1.2).double(), 3)
    assert 0.3 < float(accepted.mean()) < 0.95  # neither all nor none
    white = torch.linalg.solve_triangular(
        q.scale_tril, (state.u - q.mean).unsqueeze(-1), upper=False
    )[..., 0].flatten(0, 1)
    assert float(white.mean(0).abs().max()) < 4 / 8000**0.5
    assert float((white.mT.cov() - torch.eye(2)).abs().max()) < 4 * (2 / 8000) ** 0.5


@pytest.mark.parametrize("guide", ["prior", "gaussian", "iaf"])
def test_an_image_has_the_same_numbers_in_any_batch_and_chunk(guide):
    model, x = model_and_images(p=3, count=5)
    torch.manual_seed(0)
    make = {"gaussian": GaussianGuide, "iaf": IAFGuide}
    program = make[guide](model, encoder=nn.Flatten()).double() if guide in make else None
    options = {"num_chains": 4, "num_steps": 10, "seed": 3}
    whole = annealed_evidence(model, x, program, **options)
    for chunk_size in (1, 12, 1000):
        part = annealed_evidence(model, x, program, chunk_size=chunk_size, **options)
        torch.testing.assert_close(part.log_evidence, whole.log_evidence, rtol=0, atol=1e-8)
    alone = annealed_evidence(model, x[3:], program, first_image=3, **options)
    torch.testing.assert_close(alone.log_evidence, whole.log_evidence[3:], rtol=0, atol=1e-8)
    other = annealed_evidence(model, x[3:], program, **options)
    assert bool((other.log_evidence != whole.log_evidence[3:]).all())
    bounds = bidirectional(model, program, num_images=3, **options)
    chunks = bidirectional(model, program, num_images=2, first_image=1, chunk_size=1, **options)
    for name in ("lower", "upper", "x", "z"):
        expected = getattr(bounds, name)[1:]
        torch.testing.assert_close(getattr(chunks, name), expected, rtol=0, atol=1e-8)


def test_the_seed_decides_and_the_global_state_is_untouched():
    model, x = model_and_images(p=2, count=2)
    options = {"num_chains": 2, "num_steps": 3}
    state = torch.random.get_rng_state()
    first = annealed_evidence(model, x, seed=1, **options).log_evidence
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.rand(3)
    assert torch.equal(annealed_evidence(model, x, seed=1, **options).log_evidence, first)
    assert not torch.equal(annealed_evidence(model, x, seed=2, **options).log_evidence, first)
    assert not torch.equal(
        annealed_evidence(model, x, **options).log_evidence,
        annealed_evidence(model, x, **options).log_evidence,
    )
    assert image_seed(0, 1) != image_seed(1, 0)


def test_global_weights_do_not_enter():
    model, x = model_and_images(p=3, count=2)
    torch.manual_seed(0)
    guide = GPGuide(model, nn.Sequential(nn.Flatten(), nn.Linear(16, 4)), initial_scale=0.3)
    guide.double()
    options = {"num_chains": 8, "num_steps": 30, "seed": 0}
    plain = annealed_evidence(model, x, guide, **options).log_evidence
    paired = annealed_evidence(pair(model, guide), x, guide, **options).log_evidence
    torch.testing.assert_close(paired, plain, rtol=0, atol=1e-8)
    assert float((plain - model.log_evidence(x)).abs().max()) < 1.5
    assert bidirectional(model, guide, num_images=2, **options).x.shape == (2, *SHAPE)


def plain_model(x):
    """A user's program: no module, no log_joint, and a prior that is not Gaussian."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Laplace(torch.zeros(1).double(), 1.0).to_event(1))
        loc = z.unsqueeze(-1).unsqueeze(-1).expand(*z.shape[:-1], 1, 2, 2)
        pyro.sample("pixels", dist.Normal(loc, 0.5).to_event(3), obs=x)


def test_a_plain_pyro_model():
    torch.set_default_dtype(torch.float64)
    try:
        x = torch.tensor([0.1, -0.5, 1.5]).reshape(3, 1, 1, 1).expand(3, 1, 2, 2)
        z = torch.linspace(-8, 8, 20_001)
        log_p = 4 * dist.Normal(z, 0.5).log_prob(x[:, 0, 0, :1])
        log_p = log_p + dist.Laplace(0.0, 1.0).log_prob(z)
        exact = torch.trapezoid(log_p.exp(), z).log()
        options = {"chunk_size": 10_000, "seed": 0}
        result = annealed_evidence(plain_model, x, num_chains=2000, num_steps=50, **options)
        torch.testing.assert_close(result.log_evidence, exact, rtol=0, atol=0.05)
        both = bidirectional(plain_model, num_images=5, like=x[:1], num_chains=1000, **options)
        assert abs(both.gap) < 0.1
        with pytest.raises(ValueError, match="pass data of one member as like="):
            bidirectional(plain_model, num_images=1)
    finally:
        torch.set_default_dtype(torch.float32)


def test_bernoulli_pixels():
    torch.manual_seed(0)
    decoder = nn.Sequential(nn.Linear(1, 16), nn.Unflatten(1, SHAPE))
    model = ImageModel(SHAPE, 1, decoder, likelihood="bernoulli").double()
    both = bidirectional(model, num_images=6, num_chains=100, seed=0)
    assert bool(((both.x == 0) | (both.x == 1)).all())
    z = torch.linspace(-8, 8, 4001).double()
    log_joint = model.log_joint(both.x, z.reshape(-1, 1, 1))
    exact = torch.trapezoid(log_joint.exp(), z, dim=0).log().detach()
    torch.testing.assert_close(both.lower, exact, rtol=0, atol=0.05)
    torch.testing.assert_close(both.upper, exact, rtol=0, atol=0.05)


def test_a_narrow_posterior_neither_breaks_nor_warns():
    """Steps of the start's size lead far away, and are rejected until they are short enough."""
    model, x = model_and_images(p=2, count=3, signal=1e6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "fewer than 3 of")
        result = annealed_evidence(model, x, num_chains=8, num_steps=50, seed=0)
    assert bool(result.log_evidence.isfinite().all())
    assert bool((result.log_evidence < model.log_evidence(x) + 3).all())


class Point:
    def posterior(self, x):
        return dist.Delta(torch.zeros(len(x), 2).double()).to_event(1)


class Implicit(Point):
    def posterior(self, x):
        class Sampler(dist.Laplace):
            def log_prob(self, value):
                raise NotImplementedError

        return Sampler(torch.zeros(len(x), 2).double(), 1.0).to_event(1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_chains": 0}, "num_chains must be at least 1, got 0"),
        ({"num_steps": 0}, "num_steps must be at least 1, got 0"),
        ({"num_leapfrog": 0}, "num_leapfrog must be at least 1, got 0"),
        ({"chunk_size": 0}, "chunk_size must be at least 1, got 0"),
        ({"guide": Point()}, r"q\(z\|x\) of image 0, which has no density"),
        ({"guide": Implicit()}, "the guide Implicit has no density"),
        ({"data": torch.rand(2, 1, 3, 3)}, r"expects images \(B, 1, 4, 4\), got \(2, 1, 3, 3\)"),
        ({"data": torch.full((2, *SHAPE), torch.nan)}, "must be finite"),
        ({"data": torch.full((2, *SHAPE), 255.0)}, "divide values 0 to 255 by 255"),
    ],
)
def test_bad_input(options, message):
    model, x = model_and_images(p=2, count=2)
    with pytest.raises(ValueError, match=message):
        annealed_evidence(**({"model": model, "data": x} | options))


class Broken(nn.Module):
    """A decoder that is not a number on one side."""

    def forward(self, z):
        return torch.where(z[..., :1] > 0, torch.nan, z[..., :1]).expand(*z.shape[:-1], 16)


def test_a_decoder_that_is_not_finite_is_named():
    decoder = nn.Sequential(Broken(), nn.Unflatten(-1, SHAPE))
    model = ImageModel(SHAPE, 2, decoder).double()
    x = torch.rand(3, *SHAPE).double()
    message = r"log p\(x, z\) or log q\(z\|x\) .* is not finite for image 7, 8, 9"
    with pytest.raises(NonFiniteError, match=message) as caught:
        annealed_evidence(model, x, num_steps=3, seed=0, first_image=7)
    assert caught.value.images[0] == 7
    with pytest.raises(NonFiniteError, match=r"^image \d cannot be simulated: [^\n]*$"):
        bidirectional(model, num_images=9, seed=0)

    class Left:  # whose draws meet no NaN
        def posterior(self, x):
            loc = torch.tensor([-1.0, 0.0]).double().expand(len(x), 2)
            return dist.Normal(loc, 0.05).to_event(1)

    fine = annealed_evidence(model, x, Left(), num_steps=3, seed=0)
    assert bool(fine.log_evidence.isfinite().all())

    class Lost:
        def posterior(self, x):
            return dist.Normal(torch.full((len(x), 2), torch.nan).double(), 1.0).to_event(1)

    with pytest.raises(NonFiniteError, match=r"posterior.* of the guide Lost, for images 0 to 2"):
        annealed_evidence(model, x, Lost(), seed=0)
