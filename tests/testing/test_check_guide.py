"""The kit passes sound guides, and names what is wrong with broken ones."""

import pyro
import pyro.distributions as dist
import pytest
import torch
import toy
from broken_guides import BUGS, SOUND, WORDS, Flow, Global, Mixture, Small, Traced
from pyro.infer.autoguide import AutoNormal
from torch import nn

from pyro_gpvae import ImageModel, make_guide
from pyro_gpvae.testing import GuideError, check_guide, linear_gaussian

SHAPE = (1, 4, 4)


def check(kind, bug=None, latent_dim=2, made=True):
    torch.manual_seed(0)
    model = linear_gaussian(SHAPE, latent_dim)
    guide = kind(model, bug)
    make = (lambda model: kind(model, bug)) if made else None
    return check_guide(guide, model, model.images(4), make=make)


@pytest.mark.parametrize("kind", SOUND)
def test_sound_guides_conform(kind):
    report = check(kind)
    unchecked = {promise.name for promise in report.promises if promise.kept is None}
    # a mixture is not reparametrised
    allowed = {Mixture: {"pathwise"}, Global: {"trace"}, Traced: {"trace"}}
    assert unchecked == allowed.get(kind, set())


@pytest.mark.parametrize(("kind", "bug", "promise"), BUGS)
def test_planted_bugs_are_caught_by_name(kind, bug, promise):
    with pytest.raises(GuideError, match=WORDS.get(bug)) as caught:
        check(kind, bug)
    error = caught.value
    assert error.promise.name == promise, str(error)


class Laplace(ImageModel):
    """An ImageModel with another likelihood, whose own sigma is not used."""

    def likelihood(self, z):
        scale = torch.ones_like(z[..., 0])[..., None, None, None]
        return dist.Laplace(super().likelihood(z).mean, scale).to_event(3)


class Failing(nn.Module):
    def forward(self, z):
        raise RuntimeError("no weights yet")


@pytest.mark.parametrize(
    ("kind", "decoder", "words"),
    [
        (Laplace, None, "no gradient.* model.log_sigma"),
        (ImageModel, Failing(), "RuntimeError: no weights yet"),
        (ImageModel, nn.Linear(3, 16), "mat1 and mat2"),
    ],
)
def test_what_is_wrong_with_the_model_is_not_said_of_the_guide(kind, decoder, words):
    decoder = decoder or nn.Sequential(nn.Linear(2, 16), nn.Unflatten(1, SHAPE))
    model = kind(SHAPE, 2, decoder)
    with pytest.raises(GuideError, match=f"^the model breaks the promise(.|\n)*{words}"):
        check_guide(Small(model), model, torch.rand(4, *SHAPE))
    if kind is Laplace:
        model.log_sigma.requires_grad_(False)
        assert not check_guide(Small(model), model, torch.rand(4, *SHAPE)).broken


def test_a_guide_need_not_be_a_module():
    model = linear_gaussian(SHAPE, 2)
    torch.manual_seed(0)
    inner = Small(model)
    report = check_guide(lambda x: inner(x), model, model.images(4))
    assert report["copy"].figure == "float32"
    assert report["save"].kept is None


def test_frozen_parameters_need_no_gradient():
    model = linear_gaussian(SHAPE, 2)
    torch.manual_seed(0)
    guide = Flow(model, "no context")
    guide.context.requires_grad_(False)
    assert check_guide(guide, model, model.images(4))["gradient"].kept


def test_nothing_of_the_caller_changes():
    model = linear_gaussian(SHAPE, 2)
    guide = Global(model)
    before = [p.clone() for module in (guide, model) for p in module.parameters()]
    state = torch.get_rng_state()
    first = check_guide(guide, model, model.images(4))
    assert torch.equal(state, torch.get_rng_state())
    after = [p for module in (guide, model) for p in module.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(p.grad is None and p.dtype == torch.float32 for p in after)
    assert guide.training
    assert check_guide(guide, model, model.images(4)) == first


def test_report_is_a_table_of_figures():
    report = check(Small)
    assert float(report["trace"].figure) < 1e-9
    assert float(report["chunks"].figure) < 1e-12
    lines = str(report).splitlines()
    assert lines[0].split() == ["promise", "figure", "threshold", "verdict"]
    assert [line.split()[0] for line in lines[1:3]] == ["model", "copy"]
    assert all(line.endswith("ok") for line in lines[1:])


def test_linear_gaussian_agrees_with_the_dense_formulas():
    model = linear_gaussian((1, 2, 3), 2).double()
    x = model.images(4)
    exact = toy.exact_posterior(model, x)
    close = {"rtol": 0, "atol": 1e-10}
    assert torch.equal(model.images(4), x)
    assert bool(((x >= 0) & (x <= 1)).all())
    torch.testing.assert_close(model.log_evidence(x), toy.exact_evidence(model, x), **close)
    torch.testing.assert_close(model.posterior(x).mean, exact.mean, **close)
    found, covariance = model.posterior(x), exact.covariance_matrix.expand(4, 2, 2)
    torch.testing.assert_close(found.covariance_matrix, covariance, **close)


def test_real_size_without_make():
    torch.manual_seed(0)
    model = ImageModel((1, 28, 28), latent_dim=10)
    images = torch.randint(256, (4, 1, 28, 28), dtype=torch.uint8)
    report = check_guide(make_guide("guides:GPGuide", model), model, images)
    assert report["evidence"].verdict == "ok"


def rates(counts, exposure):
    """Counts with two latent sites for each row: a positive rate, and the place of two numbers."""
    with pyro.plate("rows", dim=-1):
        rate = pyro.sample("rate", dist.Gamma(torch.full((len(counts),), 2.0), 1.0))
        place = pyro.sample("place", dist.Normal(torch.zeros(len(counts), 2), 1.0).to_event(1))
        mean = (exposure * rate).unsqueeze(-1) * place.exp()
        pyro.sample("counts", dist.Poisson(mean).to_event(1), obs=counts)


class OfRows(nn.Module):
    def __init__(self, bug=None):
        super().__init__()
        self.bug = bug
        self.net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 6))

    def forward(self, counts, exposure):
        features = torch.cat([counts.to(exposure).log1p(), exposure.unsqueeze(-1)], -1)
        out = self.net(features)
        if self.bug == "batch mean":
            out = out - out.mean(0)
        with pyro.plate("rows", dim=-1):
            pyro.sample("rate", dist.LogNormal(out[:, 0], out[:, 1].exp()))
            place = dist.Normal(out[:, 2:4], out[:, 4:].exp()).to_event(1)
            with pyro.poutine.mask(mask=torch.tensor(self.bug != "mask")):
                pyro.sample("place", place)


@pytest.fixture
def counts():
    torch.manual_seed(0)
    return torch.poisson(torch.full((5, 2), 3.0)).long(), torch.rand(5) + 0.5


def test_a_program_of_counts_with_two_sites_in_any_plate(counts):
    report = check_guide(OfRows(), rates, counts)
    assert {p.name for p in report.promises if p.kept is None} == {"trace"}
    assert report["sites"].figure == "rate, place"


@pytest.mark.parametrize(("bug", "promise"), [("batch mean", "batch"), ("mask", "sites")])
def test_what_is_wrong_with_a_guide_of_counts_is_named(counts, bug, promise):
    with pytest.raises(GuideError) as caught:
        check_guide(OfRows(bug), rates, counts)
    assert caught.value.promise.name == promise, str(caught.value)


def test_a_pyro_module_for_a_function_with_constants_of_float32():
    """A conditional flow of Pyro; the model cannot follow it to float64, and is not to blame."""
    weight = torch.tensor([[1.0, 0.5], [-0.3, 0.8], [0.6, -1.2]])

    def model(x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ weight.mT, 0.5).to_event(1), obs=x)

    class Flow(pyro.nn.PyroModule):
        def __init__(self):
            super().__init__()
            self.encoder = nn.Linear(3, 4)
            self.spline = dist.transforms.conditional_spline(2, 4, [8], count_bins=4)

        def forward(self, x):
            base = dist.Normal(x.new_zeros(len(x), 2), 1.0).to_event(1)
            q = dist.ConditionalTransformedDistribution(base, [self.spline])
            with pyro.plate("rows", len(x)):
                pyro.sample("z", q.condition(self.encoder(x)))

    torch.manual_seed(0)
    report = check_guide(Flow(), model, torch.randn(4, 3))
    assert report["copy"].figure == "float32"
    assert report["gradient"].kept
    assert report["evidence"].kept


def test_a_global_site_of_the_model_weighs_1_over_n():
    def model(x):
        shift = pyro.sample("shift", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x)), 1.0))
            pyro.sample("x", dist.Normal(z + shift, 1.0), obs=x)

    class Guide(nn.Module):
        def __init__(self):
            super().__init__()
            self.loc = nn.Parameter(torch.tensor(0.1))
            self.slope = nn.Parameter(torch.tensor(0.5))

        def forward(self, x):
            pyro.sample("shift", dist.Normal(self.loc, 0.1))
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(self.slope * x, 0.7))

    torch.manual_seed(0)
    assert check_guide(Guide(), model, torch.randn(4))["scale"].kept


def test_autoguides_and_members_without_numbers_are_refused():
    model = linear_gaussian(SHAPE, 2)
    with pytest.raises(ValueError, match="AutoNormal is not amortised"):
        check_guide(AutoNormal(model), model, model.images(4))
    with pytest.raises(ValueError, match=r"two different members, got \(4, 0\)"):
        check_guide(Small(model), model, torch.zeros(4, 0))
