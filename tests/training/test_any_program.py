"""Any Pyro program is trained on the right objective, or refused by name."""

import math
from contextlib import nullcontext
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import RenyiELBO, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from toy import Dying, Kill, exact_evidence, exact_posterior, images, linear_model

from pyro_gpvae import Checkpoints, elbo_terms, fit, initial_sigma, make_guide
from pyro_gpvae.training.step import TrainingStep

N = 21
LABELS = torch.arange(N) % 3


class Exact(nn.Module):
    """A linear-Gaussian model of images, whose guide has the exact posterior, and β on the KL."""

    def __init__(self, beta=1.0, plate="data", sized=True):
        super().__init__()
        self.linear, self.beta = linear_model(), beta
        self.plate = lambda x: pyro.plate(plate, len(x) if sized else None)

    def model(self, x):
        with self.plate(x):
            with poutine.scale(scale=self.beta):
                z = pyro.sample("z", self.linear.prior().expand([len(x)]))
            pyro.sample("x", self.linear.likelihood(z), obs=x)

    def guide(self, x):
        with self.plate(x), poutine.scale(scale=self.beta):
            pyro.sample("z", exact_posterior(self.linear, x))


class Conditional(nn.Module):
    """Images and labels: z given both, x given both, with running statistics and dropout."""

    def __init__(self, dropout=0.5):
        super().__init__()
        self.norm = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(6), nn.Dropout(dropout))
        self.encoder, self.decoder = nn.Linear(9, 4), nn.Linear(5, 6)

    def model(self, x, label):
        assert not label.is_floating_point()
        with pyro.plate("batch", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            loc = self.decoder(torch.cat([z, one_hot(label, x)], -1))
            pyro.sample("x", dist.Normal(loc, 0.5).to_event(1), obs=x.flatten(1))

    def guide(self, x, label):
        hidden = self.encoder(torch.cat([self.norm(x), one_hot(label, x)], -1))
        loc, log_scale = hidden.chunk(2, -1)
        with pyro.plate("batch", len(x)):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


def one_hot(label, like):
    return torch.stack([label == k for k in range(3)], -1).to(like)


class Call(nn.Module):
    """A method of a module, as a module."""

    def __init__(self, owner, method):
        super().__init__()
        self.owner, self.method = owner, method

    def forward(self, *batch):
        return getattr(self.owner, self.method)(*batch)


def with_pyro_module(vae, method):
    def program(*batch):
        pyro.module("vae", vae)
        return getattr(vae, method)(*batch)

    return program


IDIOMS = {
    "modules": Call,
    "bound methods": getattr,
    "partials": lambda vae, method: partial(getattr(type(vae), method), vae),
    "closures": lambda vae, method: lambda *batch: getattr(vae, method)(*batch),
    "pyro.module": with_pyro_module,
}


def train(idiom="modules", data=None, dropout=0.5, checkpoints=None, context=None, **options):
    """The history and the weights of a conditional model that was trained."""
    pyro.clear_param_store()
    torch.manual_seed(0)
    vae = Conditional(dropout).double()
    programs = [IDIOMS[idiom](vae, method) for method in ("model", "guide")]
    data = (images(N), LABELS) if data is None else data
    options = {"epochs": 2, "batch_size": 8, "learning_rate": 0.01, "seed": 3} | options
    with context or nullcontext():
        history = fit(*programs, data, checkpoints=checkpoints, progress=False, **options)
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in history.rows]
    assert not any(module.training for module in vae.modules())
    return rows, vae.state_dict()


def assert_same(found, expected, tolerance=0.0):
    for row, wanted in zip(found[0], expected[0], strict=True):
        assert row == (pytest.approx(wanted) if tolerance else wanted)
    torch.testing.assert_close(found[1], expected[1], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("idiom", IDIOMS)
def test_every_idiom_is_trained_alike_with_its_buffers_and_modes(idiom, tmp_path):
    validation = (images(5, seed=2), LABELS[:5])
    expected = train(validation=validation)
    assert expected[0][1]["loss"] < expected[0][0]["loss"]
    assert_same(train(idiom, validation=validation), expected)
    with pytest.raises(Kill):
        train(idiom, checkpoints=Dying(tmp_path), validation=validation)
    found = train(idiom, checkpoints=Checkpoints(tmp_path, resume=True), validation=validation)
    assert_same(found, expected)


def test_compiled_steps_of_tuples_of_tensors(interpreted):
    for idiom in ("modules", "bound methods"):
        found = train(idiom, backend="compiled", dropout=0.0)
        assert_same(found, train(idiom, backend="eager", dropout=0.0), 1e-10)


def test_labels_from_a_loader_and_the_kind_of_data_is_part_of_a_checkpoint(tmp_path):
    data = TensorDataset(images(N), LABELS)
    expected = train(data=DataLoader(data, 8, shuffle=True))
    with pytest.raises(Kill):
        train(data=DataLoader(data, 8, shuffle=True), checkpoints=Dying(tmp_path))
    resume = {"checkpoints": Checkpoints(tmp_path, resume=True)}
    for other, name in (
        (DataLoader(data, 8), "shuffle=False, drop_last=False"),
        (DataLoader(data, 8, shuffle=True, drop_last=True), "shuffle=True, drop_last=True"),
        ((images(N), LABELS), "tensors"),
    ):
        with pytest.raises(ValueError, match=f"its source is a DataLoader .*, not .*{name}"):
            train(data=other, **resume)
    assert_same(train(data=DataLoader(data, 8, shuffle=True), **resume), expected)


# --- what the history and the terms of the bound say


@pytest.mark.parametrize("plate", ["data", "batch"])
@pytest.mark.parametrize("sized", [True, False])
@pytest.mark.parametrize("beta", [1.0, 0.1, 4.0])
def test_with_the_exact_posterior_every_bound_is_the_evidence(plate, sized, beta):
    vae, x = Exact(beta, plate, sized).double(), images(N)
    evidence = float(exact_evidence(vae.linear, x).mean())
    terms = elbo_terms(vae.model, vae.guide, x, N)
    assert terms["log_likelihood"] - terms["kl_z"] == pytest.approx(evidence, rel=1e-10)
    options = {"learning_rate": 1e-30, "validation": x, "epochs": 1, "progress": False}
    (row,) = fit(vae.model, vae.guide, x, elbo=Trace_ELBO(), **options).rows
    assert row["validation_elbo"] == pytest.approx(evidence, rel=1e-10)
    if beta == 1:  # the loss has the weight β
        assert row["loss"] == pytest.approx(-evidence, rel=1e-10)


@pytest.mark.parametrize("vectorised", [True, False])
@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_renyis_bound_of_each_image(alpha, vectorised):
    objective = RenyiELBO(alpha, 3, vectorize_particles=vectorised, max_plate_nesting=1)
    vae, x = Exact().double(), images(5)
    step = TrainingStep(vae.model, vae.guide, x, N, elbo=objective)
    loss, _ = step.evaluate(0, (x,))
    # all weights of an exact posterior are equal
    assert float(loss) == pytest.approx(-float(exact_evidence(vae.linear, x).mean()), rel=1e-10)
    model = linear_model()
    guide = make_guide("vae", model, encoder=nn.Flatten()).double()
    step = TrainingStep(model, guide, x[:1], N, elbo=objective)
    torch.manual_seed(0)
    loss, gradients = step.evaluate(0, (x[:1],))  # Pyro's own adds up the images
    gradients = [gradient.clone() for gradient in gradients]
    step.optimizers[0].zero_grad()
    torch.manual_seed(0)
    assert objective.loss_and_grads(model, guide, x[:1]) == pytest.approx(float(loss), rel=1e-10)
    expected = [p.grad for p in step.parameters.values() if p.grad is not None]
    torch.testing.assert_close(gradients, expected)
    with pytest.raises(ValueError, match="the site 'W' is global: use"):
        fit(model, make_guide("gp", model, estimator="weights", encoder=nn.Flatten()).double(), x,
            epochs=1, elbo=objective, progress=False)  # fmt: skip


def test_counts_stay_integers_and_an_exact_guide_gives_their_exact_evidence():
    counts = torch.tensor([0, 3, 150, 7])

    def model(counts):
        with pyro.plate("rows", len(counts)):
            rate = pyro.sample("rate", dist.Gamma(2.0, 0.5))
            pyro.sample("count", dist.Poisson(rate), obs=counts)

    def guide(counts):
        scale = pyro.param("scale", torch.ones(()))
        with pyro.plate("rows", len(counts)):
            pyro.sample("rate", dist.Gamma(2.0 + counts, 1.5 * scale))

    evidence = dist.GammaPoisson(2.0, 0.5).log_prob(counts).mean()
    terms = elbo_terms(model, guide, counts, 4)
    assert terms["log_likelihood"] - terms["kl_z"] == pytest.approx(float(evidence), rel=1e-5)
    (row,) = fit(model, guide, counts, epochs=1, progress=False).rows
    assert row["loss"] == pytest.approx(-float(evidence), rel=1e-5)
    assert pyro.param("scale") != 1 or row["loss"] > 0


# --- contexts around fit


@pytest.mark.parametrize(
    "context",
    [
        lambda: torch.autocast("cpu", torch.bfloat16),
        torch.no_grad,
        lambda: torch.device("meta"),  # as a default device
    ],
    ids=["autocast", "no_grad", "default device"],
)
def test_a_context_around_fit_does_not_change_it(context, tmp_path):
    data = DataLoader(TensorDataset(images(N), LABELS), 8, shuffle=True)
    options = {"validation": (images(5, seed=2), LABELS[:5])}
    assert_same(train(context=context(), **options), train(**options))
    found = train(context=context(), data=data, checkpoints=tmp_path, **options)
    assert_same(found, train(data=data, **options))


def test_inference_mode_is_refused():
    with pytest.raises(RuntimeError, match=r"outside of torch.inference_mode\(\)"):
        train(context=torch.inference_mode())


# --- what is refused


def nothing_observed(x):
    with pyro.plate("data", len(x)):
        pyro.deterministic("y", pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1)))


def test_a_model_that_observes_nothing():
    guide = Exact().double()
    for evaluate in (elbo_terms, lambda *args: fit(*args[:3], epochs=1, progress=False)):
        with pytest.raises(ValueError, match=r"the model observes nothing; .* \['z', 'y'\]"):
            evaluate(nothing_observed, guide.guide, images(N), N)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    vae = Exact().to(dtype)
    for evaluate in (elbo_terms, lambda *args: fit(*args[:3], epochs=1, progress=False)):
        with pytest.raises(ValueError, match=rf"model\.linear\.log_sigma is {dtype}, in which log"):
            evaluate(vae.model, vae.guide, images(N), N)
        torch.set_default_dtype(dtype)
        try:
            with pytest.raises(ValueError, match=rf"the default dtype is {dtype}, in which"):
                evaluate(vae.double().model, vae.guide, images(N), N)
        finally:
            torch.set_default_dtype(torch.float32)
        vae.to(dtype)


def test_batch_normalisation_and_a_last_minibatch_of_one_member():
    data = TensorDataset(images(N), LABELS)
    for options in ({"batch_size": 5}, {"data": DataLoader(data, 5)}):
        with pytest.raises(ValueError, match=r"last minibatch of .* one member, .*drop_last=True"):
            train(checkpoints=None, **options)
    train(data=DataLoader(data, 5, drop_last=True))


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ([images(3)], TypeError, r"got list: stack images with torch.stack"),
        (TensorDataset(images(3)), TypeError, "got TensorDataset: fit takes a .*DataLoader of it"),
        (images(3).numpy(), TypeError, "got ndarray"),
        ((), TypeError, "got tuple"),
        (torch.zeros(0, 1, 2, 3), ValueError, "at least one member"),
        ((images(3), LABELS[:2]), ValueError, r"same first dimension, got .*\(2,\)"),
    ],
)
def test_data_that_are_no_batch(data, error, message):
    for options in ({"data": data}, {"validation": data}):
        with pytest.raises(error, match=message):
            train(**options)


def test_a_guide_that_is_not_amortised_needs_all_data_in_one_batch():
    vae = Exact().double()
    for kind in (AutoMultivariateNormal, AutoNormal):
        guide = kind(vae.model)
        terms = elbo_terms(vae.model, guide, images(N), N)
        assert all(map(math.isfinite, terms.values()))
        fit(vae.model, guide, images(N), epochs=1, progress=False)
        pyro.clear_param_store()
    guide = AutoMultivariateNormal(vae.model)
    message = r"draws \['z'\] of all members .*'_AutoMultivariateNormal_latent'.*all data in one"
    with pytest.raises(ValueError, match=message):
        elbo_terms(vae.model, guide, images(N), N + 1)
    with pytest.raises(ValueError, match=message):
        fit(vae.model, AutoMultivariateNormal(vae.model), images(N), epochs=1, batch_size=7)


def test_initial_sigma_takes_floats_as_they_are_and_needs_an_image():
    x = 100 * torch.rand(50, 1, 2, 3)
    assert initial_sigma(x) == pytest.approx(float(x.var(0, correction=0).mean().sqrt()))
    for wrong, error in ((x[:0], ValueError), ([1.0], TypeError)):
        with pytest.raises(error, match="images must"):
            initial_sigma(wrong)


def test_a_second_module_of_the_same_name_is_trained_or_refused():
    def of(vae, method, register=True):
        nets = [vae]  # a list hides the module

        def program(*batch):
            if register:
                pyro.module("vae", nets[0])
            return getattr(nets[0], method)(*batch)

        return program

    first, second = Conditional(), Conditional()
    options = {"epochs": 1, "batch_size": 8, "progress": False}
    fit(of(first, "model"), of(first, "guide"), (images(N), LABELS), **options)
    with pytest.raises(ValueError, match=r"never be trained.*call pyro\.clear_param_store\(\)"):
        fit(of(second, "model"), of(second, "guide"), (images(N), LABELS), **options)
    pyro.clear_param_store()
    before = second.decoder.weight.clone()
    fit(of(second, "model"), of(second, "guide"), (images(N), LABELS), **options)
    assert not torch.equal(second.decoder.weight, before)
