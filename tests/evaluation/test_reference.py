import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from guides import GaussianGuide
from pyro_gpvae import ImageModel
from pyro_gpvae.evaluation._common import Settings
from pyro_gpvae.evaluation.annealing import bidirectional
from pyro_gpvae.evaluation.optimum import optimise_gaussian
from pyro_gpvae.evaluation.reference import _Part, reference_evidence
from pyro_gpvae.evaluation.reference import choose as choose_of
from pyro_gpvae.model._precomputed import PrecomputedPosterior
from pyro_gpvae.testing import linear_gaussian

SHAPE = (1, 4, 4)


pytestmark = pytest.mark.usefixtures("double_precision")


@pytest.fixture(scope="module")
def toy():
    model = linear_gaussian(SHAPE, 10).double()
    model.requires_grad_(False)
    torch.manual_seed(0)
    return model, GaussianGuide(model, nn.Flatten()).double(), model.images(6)


@pytest.fixture(scope="module")
def reference(toy):
    return reference_evidence(*toy_order(toy), num_samples=1000)


def toy_order(toy):
    model, guide, x = toy
    return model, x, guide


def test_the_reference_is_the_exact_evidence(toy, reference):
    model, _, x = toy
    exact = model.log_evidence(x)
    # the best Gaussian is the posterior of this model: two estimators have no error at all
    assert "IWAE(1000)" not in reference.estimator
    torch.testing.assert_close(reference.log_evidence, exact, rtol=0, atol=1e-6)
    assert list(reference.estimates) == ["IWAE(1000)", "IWAE(1000), instance:full", "AIS(50)"]
    own, _, annealed = (value for value, _, _ in reference.estimates.values())
    assert float((own - exact).mean()) < -0.1  # untrained
    torch.testing.assert_close(annealed, exact, rtol=0, atol=1e-6)
    assert "6 images, 0 by IWAE(1000), " in repr(reference)


def test_an_image_has_the_same_numbers_in_any_batch_and_chunk(toy, reference):
    model, guide, x = toy
    part = reference_evidence(model, x[4:], guide, num_samples=1000, first_image=4)
    for name, columns in part.estimates.items():
        # k̂ of weights that agree to the last digits is noise
        count = 3 if name == "IWAE(1000)" else 2
        for column, whole in list(zip(columns, reference.estimates[name], strict=True))[:count]:
            torch.testing.assert_close(column, whole[4:], rtol=0, atol=1e-7, msg=name)


def plain(model):
    """The same model as a user's function, of which only the sites are known."""

    def program(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", model.prior())
            pyro.sample("x", model.likelihood(z), obs=x)

    return program


def test_a_plain_pyro_model_has_the_same_reference(toy, reference):
    model, guide, x = toy
    found = reference_evidence(plain(model), x, guide, num_samples=1000)
    assert set(found.estimates) - set(reference.estimates) == {
        "IWAE(1000), instance:full and prior"
    }
    torch.testing.assert_close(found.log_evidence, model.log_evidence(x), rtol=0, atol=1e-6)
    torch.testing.assert_close(found.estimates["IWAE(1000)"], reference.estimates["IWAE(1000)"])


class Narrow:
    """The exact posterior, but for its standard deviation."""

    def __init__(self, model, factor):
        self.model, self.factor = model, factor

    def posterior(self, x):
        q = self.model.posterior(x)
        scale = self.factor * q.scale_tril.expand(len(x), -1, -1)
        return type(q)(q.loc, scale_tril=scale)


def test_a_few_chains_are_never_trusted(toy):
    """The exact start makes all chains equal, and only their number tells."""
    model, _, x = toy
    for chains, steps, trusted in ((7, 5, False), (8, 5, True)):
        found = _Part(model, (x,), None, 100, Settings(), 0)
        found.trust[found.full] = torch.zeros(6, dtype=torch.bool)
        found.anneal(chains, steps)
        assert bool(found.trust[f"AIS({steps})"].all()) == trusted
        found.anneal(chains, 1)  # without a move it is importance sampling, whose k̂ is not known
        assert not bool(found.trust["AIS(1)"].any())


@pytest.mark.filterwarnings("ignore::pyro_gpvae.evaluation.importance.ParetoWarning")
class TestWidths:
    """IWAE(K) with q widened about its mean by a factor that is chosen on other draws."""

    def test_the_best_width_undoes_what_is_wrong(self, toy):
        model, _, x = toy
        found = reference_evidence(
            plain(model), x, Narrow(model, 1 / 3), num_samples=500, num_chains=0,
            widths=(1.0, 3.0, 9.0),
        )  # fmt: skip
        best = found.width == 3.0  # the score of another width may be too high by chance
        assert int(best.sum()) >= 4
        value, _, _ = found.estimates["IWAE(500), width c"]
        exact = model.log_evidence(x)
        torch.testing.assert_close(value[best], exact[best], rtol=0, atol=1e-8)
        assert float((found.estimates["IWAE(500)"][0] - value).mean()) < -0.5

    def test_the_estimate_uses_new_draws(self, toy):
        """The highest of several noisy scores is too high; the estimate is a lower bound."""
        model, guide, x = toy
        many = x[:1].expand(200, *SHAPE)
        found = reference_evidence(
            plain(model), many, guide, num_samples=2, num_chains=0, widths=(0.999, 1.0, 1.001)
        )
        wide, own = (found.estimates[name][0] for name in ("IWAE(2), width c", "IWAE(2)"))
        difference = (wide - own).mean() / (wide.var() / 200 + own.var() / 200).sqrt()
        assert abs(float(difference)) < 4

    @pytest.mark.filterwarnings("ignore:Found vars in guide")
    def test_a_guide_whose_density_is_not_known_has_no_width(self, toy):
        model, guide, x = toy

        def replayed(x):
            pyro.sample("W", dist.Normal(0.0, 1.0))
            guide(x)

        found = reference_evidence(
            plain(model), x[:1], replayed, num_samples=30, num_chains=0, widths=(2.0,)
        )
        assert not [name for name in found.estimates if "width" in name]


class Square(nn.Module):
    def forward(self, z):
        return z.square().expand(*z.shape[:-1], 4).unflatten(-1, (1, 2, 2))


class Modes:
    """A Gaussian in one of the two modes of a decoder of z², or in each."""

    def __init__(self, both):
        self.both = both

    def posterior(self, x):
        mean = x.flatten(1).mean(1).clamp(min=0.25).sqrt()
        centres = torch.stack([mean, -mean if self.both else mean], -1).unsqueeze(-1)
        parts = dist.Normal(centres, 0.1).to_event(1)
        return dist.MixtureSameFamily(dist.Categorical(torch.ones(len(x), 2)), parts)


def test_the_documented_limit_of_one_mode():
    model = ImageModel((1, 2, 2), 1, Square(), sigma=0.1)
    model.requires_grad_(False)
    x = torch.full((2, 1, 2, 2), 0.81)
    z = torch.linspace(-8, 8, 40_001)
    exact = torch.trapezoid(
        model.log_joint(x, z.reshape(-1, 1, 1).expand(-1, 2, 1)).exp(), z, dim=0
    ).log()
    one = reference_evidence(model, x, Modes(both=False), num_samples=2000)
    assert bool(one.trusted.all()), "nothing can tell"
    torch.testing.assert_close(one.log_evidence, exact - math.log(2), rtol=0, atol=0.03)
    both = reference_evidence(model, x, Modes(both=True), num_samples=5000)
    assert both.estimator == ("IWAE(5000)",) * 2
    torch.testing.assert_close(both.log_evidence, exact, rtol=0, atol=0.1)
    # and images simulated from the other mode show it
    sandwich = bidirectional(model, Modes(both=False), num_images=20, num_steps=50, seed=0)
    other = sandwich.z[:, 0] < -0.7
    assert 2 < int(other.sum()) < 18
    assert float((sandwich.upper - sandwich.lower)[other].min()) > 10


def estimates(**rows):
    """(log p(x), error, k̂) of one image for each estimator."""
    return {name: tuple(torch.tensor([v]).double() for v in row) for name, row in rows.items()}


def choose(found):
    """The choice where annealing is trusted."""
    trust = {n: (k <= 0.7) | torch.tensor(n == "AIS") for n, (_, _, k) in found.items()}
    return choose_of(found, trust, torch.full((1,), math.nan))


nan = math.nan


@pytest.mark.parametrize(
    ("rows", "chosen"),
    [
        # the smaller error, not the higher value
        ({"IWAE": (1.1, 0.2, 0.4), "AIS": (1.0, 0.1, nan)}, "AIS"),
        ({"IWAE": (1.0, 0.01, 0.7), "AIS": (1.1, 0.1, nan)}, "IWAE"),
        # heavy tails, or too few samples to know: not trusted, however small the error
        ({"IWAE": (1.0, 0.01, 0.71), "AIS": (1.1, 0.1, nan)}, "AIS"),
        ({"IWAE": (1.0, 0.01, nan), "AIS": (1.1, 0.1, nan)}, "AIS"),
        # refuted by a trusted one that is far higher
        ({"IWAE": (1.0, 0.01, 0.3), "AIS": (1.4, 0.1, nan)}, "AIS"),
        ({"IWAE": (1.0, 0.01, 0.3), "AIS": (1.2, 0.1, nan)}, "IWAE"),
        # by an untrusted one only if that can hardly be chance
        ({"IWAE": (3.0, 0.1, 0.9), "AIS": (1.0, 0.1, nan)}, "AIS"),
        ({"IWAE": (6.0, 0.1, 0.9), "AIS": (1.0, 0.1, nan)}, "IWAE"),
        # nothing trusted: the highest
        ({"IWAE": (1.0, 0.1, 0.9), "IWAE2": (1.5, 0.3, 0.8)}, "IWAE2"),
    ],
)
def test_the_choice(rows, chosen):
    result = choose(estimates(**rows))
    assert bool(result.trusted) == (chosen != "IWAE2" and rows[chosen][2] != 0.9)
    assert result.estimator == (chosen,)
    assert float(result.log_evidence) == pytest.approx(rows[chosen][0])
    assert float(result.standard_error) == pytest.approx(rows[chosen][1])


def test_the_choice_errs_downwards():
    """Three estimators of equal quality: their maximum would be 0.85 errors too high."""
    torch.manual_seed(0)
    count, error = 2000, 0.1
    rows = {}
    for name in ("IWAE", "IWAE2", "AIS"):
        # log-normal weights: 100 of them, standard deviation 1 in logarithm
        weights = torch.randn(100, count).double() - 0.5
        value = weights.logsumexp(0) - math.log(100)
        deviation = weights.exp().std(0) / weights.exp().mean(0) / 10
        rows[name] = value, deviation, torch.full((count,), 0.5).double()
    maximum = torch.stack([value for value, _, _ in rows.values()]).max(0).values
    assert float(maximum.mean()) > 0.05
    chosen = choose(rows).log_evidence
    assert -error < float(chosen.mean()) < 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 1}, "num_samples must be at least 2, got 1"),
        ({"num_chains": 1}, r"num_chains must be 0 \(no annealing\) or at least 2, got 1"),
        ({"widths": (1.0, 0.0)}, r"widths must be positive and finite, got \[1.0, 0.0\]"),
        ({"data": torch.rand(0, *SHAPE)}, "at least one member"),
    ],
)
def test_bad_input(toy, options, message):
    model, guide, x = toy
    with pytest.raises(ValueError, match=message):
        reference_evidence(**({"model": model, "data": x, "guide": guide} | options))


class Waves(nn.Module):
    """Decodes one latent to 16 sines of it, so that log p(x, z) has many local modes."""

    def __init__(self):
        super().__init__()
        self.register_buffer("frequency", torch.linspace(1.0, 9.0, 16))

    def forward(self, z):
        return torch.sin(self.frequency * z).unflatten(-1, (1, 4, 4))


@pytest.mark.filterwarnings("ignore::pyro_gpvae.evaluation.importance.ParetoWarning")
def test_the_highest_mode_is_found_far_from_the_guide():
    """A lower mode near the guide's mean would give a log p(x) that is trusted and far too low."""
    model = ImageModel((1, 4, 4), 1, Waves(), sigma=0.2).double()
    z = torch.tensor([[1.7], [-0.9], [0.4]]).double()
    x = model.decoder(z).detach()
    far = PrecomputedPosterior(dist.Normal(-z, 0.1).to_event(1))
    optimum = optimise_gaussian(model, x, start=far)
    torch.testing.assert_close(optimum.posterior.mean, z, rtol=0, atol=0.01)
    grid = torch.linspace(-6, 6, 20_001).double()
    with torch.no_grad():
        joint = model.log_joint(x, grid[:, None, None].expand(-1, 3, 1))
    exact = joint.logsumexp(0) + (grid[1] - grid[0]).log()
    found = reference_evidence(model, x, num_samples=2000, num_chains=0)
    assert bool(((found.log_evidence - exact).abs() < 4 * found.standard_error + 1e-3).all())
