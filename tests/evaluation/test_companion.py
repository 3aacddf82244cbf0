"""Scores with better proposals, against a model whose log p(x) is known."""

import math

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from toy import exact_posterior, images, linear_model

from guides import GaussianGuide, IAFGuide, SemiAmortizedGuide
from pyro_gpvae import cli, load_data
from pyro_gpvae.core._files import check_manifest, read_json
from pyro_gpvae.core._plates import DATA_PLATE
from pyro_gpvae.data.images import split_validation
from pyro_gpvae.evaluation.companion import (
    WIDTHS,
    Scaled,
    companion_scores,
    width_images,
)
from pyro_gpvae.evaluation.generation import posterior_mean
from pyro_gpvae.evaluation.importance import log_evidence, log_weights
from pyro_gpvae.model._precomputed import PrecomputedPosterior
from pyro_gpvae.model.stratified import gaussian_mixture
from pyro_gpvae.runs.config import RunConfig
from pyro_gpvae.runs.evaluate import evaluate_run
from pyro_gpvae.runs.folder import RUN_FILES, load_run
from pyro_gpvae.runs.train import train_run
from pyro_gpvae.testing import linear_gaussian

MODEL = linear_model()
X, VALIDATION = images(6), images(5, seed=2)


def exact_evidence(x):
    layer, sigma = MODEL.decoder[0], MODEL.log_sigma.exp()
    covariance = layer.weight @ layer.weight.mT + sigma**2 * torch.eye(len(layer.bias)).double()
    return dist.MultivariateNormal(layer.bias, covariance).log_prob(x.flatten(1)).detach()


class Narrow:
    """The exact posterior, with a third of its standard deviations."""

    share = 1 / 3

    def posterior(self, x):
        q = exact_posterior(MODEL, x)
        return dist.MultivariateNormal(q.loc, scale_tril=self.share * q.scale_tril)

    def __call__(self, x):
        with pyro.plate(DATA_PLATE, len(x), dim=-1):
            pyro.sample("z", self.posterior(x))


class Mute(Narrow):
    """The same, with a posterior that has no mean: a class of the user's own may lack it."""

    def posterior(self, x):
        class Meanless(dist.MultivariateNormal):
            @property
            def mean(self):
                raise AttributeError("mean")

        q = super().posterior(x)
        return Meanless(q.loc, scale_tril=q.scale_tril)


class NarrowProgram:
    """The same without a posterior."""

    def __call__(self, x):
        Narrow()(x)


def mixture():
    torch.manual_seed(0)
    return gaussian_mixture(
        torch.randn(3, 2).double(),
        torch.randn(3, 2, 1).double(),
        0.5 * torch.ones(3, 2, 1).double(),
    )


@pytest.mark.parametrize("factor", [0.5, 1.0, 2.5])
def test_scaled_is_normalised(factor):
    q = mixture()
    z = torch.linspace(-30, 30, 20_001, dtype=torch.float64)
    density = Scaled(q, q.mean, factor).log_prob(z[:, None, None].expand(-1, 3, 1)).exp()
    torch.testing.assert_close(torch.trapezoid(density, z, dim=0), torch.ones(3).double())
    mean = torch.trapezoid(density * z[:, None], z, dim=0)
    torch.testing.assert_close(mean, q.mean[:, 0], msg="the mean stays")
    variance = torch.trapezoid(density * z[:, None].square(), z, dim=0) - mean.square()
    torch.testing.assert_close(variance, factor**2 * q.variance[:, 0])


def test_scaled_draws_are_scored_as_any_other_value():
    torch.manual_seed(1)
    iaf = IAFGuide(linear_model(), num_steps=2, encoder=torch.nn.Flatten()).double()
    for q in (mixture(), exact_posterior(MODEL, X), iaf.posterior(X)):
        mean, _ = posterior_mean(PrecomputedPosterior(q), X[: q.batch_shape[0]])
        wide = Scaled(q, mean, 1.7).expand((4, *q.batch_shape))
        assert wide.batch_shape == (4, *q.batch_shape)
        with torch.no_grad():
            z = wide.sample()
            remembered = wide.log_prob(z)
            torch.testing.assert_close(wide.log_prob(z.clone()), remembered, rtol=0, atol=1e-9)
        assert z.shape == (4, *q.batch_shape, *q.event_shape)


def test_scaled_samples_have_its_moments():
    """20,000 draws: |error| < 5 standard errors for mean and sd; fails once in 100,000."""
    torch.manual_seed(0)
    q = mixture()
    z = Scaled(q, q.mean, 2.0).sample((20_000,))[..., 0]
    sd = 2 * q.stddev[:, 0]
    assert ((z.mean(0) - q.mean[:, 0]).abs() < 5 * sd / math.sqrt(20_000)).all()
    assert ((z.std(0) / sd - 1).abs() < 5 / math.sqrt(20_000)).all()


@pytest.mark.parametrize("factor", [0.0, -1.0, math.inf, math.nan])
def test_scaled_needs_a_factor(factor):
    with pytest.raises(ValueError, match="must be positive and finite"):
        Scaled(mixture(), mixture().mean, factor)


@pytest.mark.parametrize("factor", [1.0, 1.5])
def test_a_wider_proposal_is_unbiased(factor):
    """The mean weight is p(x): within five standard errors."""
    q = exact_posterior(MODEL, X)
    torch.manual_seed(0)
    log_w = log_weights(MODEL, PrecomputedPosterior(Scaled(q, q.mean, factor)), X, 20_000)
    ratio = (log_w - exact_evidence(X)).exp()
    error = 5 * ratio.std(0) / math.sqrt(len(ratio)) + 1e-9
    assert ((ratio.mean(0) - 1).abs() < error).all()


def test_proposals_of_a_known_model():
    record, table = companion_scores(
        MODEL, Narrow(), X, VALIDATION, num_samples=50, widths=(1.0, 3.0), seed=3
    )
    exact = exact_evidence(X).numpy()
    assert record["width"]["factor"] == 3.0, "what undoes the third"
    assert record["width"]["validation_images"] == 5
    assert record["optimum"]["not_converged"] == 0
    # the best full Gaussian is the posterior: every weight is p(x)
    np.testing.assert_allclose(table["optimum_log_evidence"], exact, atol=1e-2)
    np.testing.assert_allclose(table["optimum_elbo"], exact, atol=3e-2)
    np.testing.assert_allclose(table["width_log_evidence"], exact, atol=1e-9)
    np.testing.assert_allclose(table["annealed_log_evidence"], exact, atol=0.1)
    # KL(q ‖ p(z|x)) of a p = 2 Gaussian with a third of the standard deviations
    kl = 0.5 * 2 * (1 / 9 - 1 + math.log(9))
    assert record["own"]["elbo"] == pytest.approx(exact.mean() - kl, abs=0.1)
    assert record["own"]["elbo"] < record["own"]["log_evidence"]
    for name in ("own", "width", "optimum", "annealed"):
        assert record[name]["log_evidence"] == pytest.approx(table[f"{name}_log_evidence"].mean())
        assert record["seconds"][name] > 0
    assert (record["num_images"], record["num_samples"], len(table)) == (6, 50, 6)


def test_the_best_width_undoes_what_is_wrong():
    """Neither a third of the standard deviations nor three times as many."""
    record, _ = companion_scores(
        MODEL, Narrow(), X, images(300, seed=4), num_samples=5, widths=(1.0, 3.0, 9.0), num_chains=0
    )
    assert record["width"]["factor"] == 3.0


def test_the_width_is_chosen_on_validation_images_alone():
    record, _ = companion_scores(
        MODEL, Narrow(), X, VALIDATION, num_samples=20, widths=(1.0, 2.0), num_chains=0, seed=3
    )
    other, _ = companion_scores(
        MODEL, Narrow(), X[:2], VALIDATION, num_samples=20, widths=(1.0, 2.0), num_chains=0, seed=3
    )
    curve = record["width"]["validation_log_evidence"]
    assert curve == other["width"]["validation_log_evidence"], "whatever the test images"
    own = log_evidence(MODEL, Narrow(), VALIDATION, 20, seed=3).mean
    assert curve[0] == pytest.approx(own)
    assert record["width"]["factor"] == 2.0
    assert curve[1] > curve[0]
    assert record["annealed"] == {"missing": "not asked for"}


def test_without_a_posterior_there_is_no_width():
    record, table = companion_scores(
        MODEL, NarrowProgram(), X, VALIDATION, num_samples=20, num_chains=0
    )
    assert record["width"] == {"missing": "NarrowProgram has no posterior(x)"}
    assert "width_log_evidence" not in table
    np.testing.assert_allclose(table["optimum_log_evidence"], exact_evidence(X), atol=1e-2)


@pytest.mark.parametrize("guide", [Narrow(), Mute()])
def test_the_same_seed_gives_the_same_numbers_and_disturbs_nothing(guide):
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    runs = [
        companion_scores(MODEL, guide, X, VALIDATION, num_samples=9, num_chains=2, num_steps=3,
                         chunk_size=size)[1]
        for size in (640, 640)
    ]  # fmt: skip
    pd.testing.assert_frame_equal(*runs)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_refined_proposal_meets_new_noise():
    """Weights of the draws that a posterior was refined on would be too good: by 2.6 nats here."""
    torch.manual_seed(0)
    model = linear_gaussian((1, 8, 8), 4).double()
    guide = SemiAmortizedGuide(model, 4, nn.Flatten(), num_samples=1).double()
    x = model.images(100)
    found, _ = companion_scores(model, guide, x, x, num_samples=10, widths=[1.0], num_chains=0)
    expected = torch.stack([log_evidence(model, guide, x, 10, seed=s).log_evidence for s in (1, 2)])
    # of the difference between two estimates
    error = float((expected[0] - expected[1]).std() / 10)
    for name in ("own", "width"):
        assert found[name]["log_evidence"] == pytest.approx(float(expected.mean()), abs=4 * error)


def test_wrong_arguments_are_named():
    for arguments, options, message in (
        ((X[:0], VALIDATION), {}, "x must hold"),
        ((X, VALIDATION[:0]), {}, "validation must hold"),
        ((X, VALIDATION), {"num_chains": 1}, "num_chains must be 0"),
        ((X, VALIDATION), {"widths": ()}, "widths must hold"),
    ):
        with pytest.raises(ValueError, match=message):
            companion_scores(MODEL, Narrow(), *arguments, **options)


def test_width_images_are_held_out_where_there_are_some():
    train = load_data("mnist5k").train[:50]
    found, source = width_images(train, 10)
    assert torch.equal(found, split_validation(train, 10)[1])
    assert source == "held-out training images"
    assert len(width_images(train, 10, limit=3)[0]) == 3
    found, source = width_images(train, 0, limit=20)
    assert torch.equal(found, train[:20])
    assert "none were held out" in source


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    config = RunConfig(
        guide="vae", epochs=1, train_images=40, validation=8, test_images=4, latent_dim=2,
        num_samples=5, device="cpu",
    )  # fmt: skip
    train_run(config, folder, progress=False)
    return folder


def test_evaluate_adds_the_companion_beside_the_run(run, tmp_path):
    out = tmp_path / "companion"
    result = evaluate_run(run, companion=3, out=out)
    check_manifest(run)
    assert sorted(file.name for file in run.iterdir()) == sorted(RUN_FILES)
    loaded = load_run(run)
    assert result["scores"] == loaded.record["scores"], "the published protocol as it was"
    companion = read_json(out / "record.json")["companion"]
    assert (companion["num_images"], companion["num_samples"]) == (3, 5)
    assert companion["validation"] == "held-out training images"
    assert companion["width"]["validation_images"] == 8
    assert companion["width"]["factors"] == list(WIDTHS)
    record = read_json(out / "record.json")
    assert record["trained_guide"] == record["guide"] == "vae"
    assert record["data"] == loaded.record["data"]
    table = pd.read_csv(out / "scores.csv")
    assert len(table) == 4
    assert table["optimum_log_evidence"].notna().tolist() == [True, True, True, False]
    own = log_evidence(loaded.model, loaded.guide, loaded.data.test[:3], 5, seed=0)
    assert companion["own"]["log_evidence"] == pytest.approx(own.mean, rel=1e-5)


def test_another_guide_is_told_from_the_runs_own(run):
    result = evaluate_run(run, guide="vlae:1", companion=1)
    assert (result["guide"], result["trained_guide"]) == ("vlae:1", "vae")


@pytest.mark.parametrize("count", [0, 5])
def test_the_number_of_images_is_checked(run, count):
    with pytest.raises(ValueError, match=f"companion must be 1 to 4 test images, got {count}"):
        evaluate_run(run, companion=count)


def test_the_command_prints_each_proposal(run, capsys):
    assert cli.main(["evaluate", str(run), "--companion", "2"]) == 0
    text = capsys.readouterr().out
    for line in ("of the first 2 test images", "its own q", "q of best width", "optimal q",
                 "annealed sampling", "8 held-out training images"):  # fmt: skip
        assert line in text
    assert "(equal)" in text


def test_float32_and_a_real_guide():
    torch.manual_seed(0)
    model = linear_model().float()
    guide = GaussianGuide(model, encoder=torch.nn.Flatten())
    record, table = companion_scores(
        model, guide, X.float(), VALIDATION.float(), num_samples=20, widths=(1.0, 2.0)
    )
    assert record["width"]["log_evidence"] > record["own"]["elbo"]
    assert table["optimum_log_evidence"].dtype == np.float32
    np.testing.assert_allclose(table["optimum_log_evidence"], exact_evidence(X), atol=0.05)
