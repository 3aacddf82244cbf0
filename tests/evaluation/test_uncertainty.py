"""Inference uncertainty: the scores are what their formulas say, and are judged honestly."""

import math

import numpy as np
import pyro.distributions as dist
import pytest
import torch
import toy
from scipy import stats
from torch import nn

from guides import GaussianGuide, GPGuide
from pyro_gpvae import ImageModel
from pyro_gpvae.evaluation.posterior_grid import posterior_grid, posterior_record
from pyro_gpvae.evaluation.uncertainty import (
    bhattacharyya_uncertainty,
    rank_correlation,
    uncertainty_scores,
    weight_information,
)
from pyro_gpvae.plots.posterior import posterior_panels


def gp(model, **options):
    torch.manual_seed(0)
    guide = GPGuide(model, toy.linear_encoder(), **({"initial_scale": 0.3} | options)).double()
    with torch.no_grad():
        for rows in (guide.W, guide.U):
            rows.loc.normal_(std=0.3)
    return guide


@torch.no_grad()
def test_the_bhattacharyya_score_is_the_mean_distance_of_two_draws():
    model, x = toy.linear_model(3), toy.images(4)
    guide = gp(model)
    a, v, b, r = guide.moments(x)
    f, log_h = (mean + variance.sqrt() * torch.randn(2, 200_000, 4, 3).double()
                for mean, variance in ((a, v), (b, r)))  # fmt: skip
    variances = (2 * log_h).exp()
    total = variances.sum(0)
    distance = (f[0] - f[1]).square() / total / 4 + 0.5 * (total / 2).log() - log_h.sum(0) / 2
    distance = distance.sum(-1)
    error = distance.std(0) / math.sqrt(len(distance))
    score = bhattacharyya_uncertainty(guide, x)
    assert float(((distance.mean(0) - score) / error).abs().max()) < 4.5
    # and for a small spread, a quarter of Σ v/h² + 2r
    small = gp(model, initial_scale=1e-3)
    _, v, b, r = small.moments(x)
    expected = (v / (2 * b).exp() + 2 * r).sum(-1) / 4
    torch.testing.assert_close(bhattacharyya_uncertainty(small, x), expected, rtol=1e-4, atol=0)


@torch.no_grad()
def test_the_price_of_spread_is_the_expected_kl_beyond_the_marginals():
    model, x = toy.linear_model(), toy.images(3)
    guide = gp(model)
    q, prior = guide.posterior(x), dist.Normal(0, 1).expand([2]).to_event(1)
    z = q.sample((200_000,))
    log_ratio = q.log_prob(z) - prior.log_prob(z)
    error = log_ratio.std(0) / math.sqrt(len(z))
    price = weight_information(guide, x)
    assert float(price.min()) > 0.1
    expected = guide.expected_kl(x) - log_ratio.mean(0)
    assert float(((price - expected) / error).abs().max()) < 4.5


def test_the_scores_need_a_random_encoder():
    model, x = toy.linear_model(), toy.images(3)
    vae = GaussianGuide(model, toy.linear_encoder()).double()
    for score in (bhattacharyya_uncertainty, weight_information):
        with pytest.raises(ValueError, match="GaussianGuide has no moments"):
            score(vae, x)
    with pytest.raises(ValueError, match="GaussianGuide has no uncertainty"):
        uncertainty_scores(model, vae, x)


@torch.no_grad()
def test_scores_of_images_beside_what_any_encoder_has():
    model, x = toy.linear_model(), toy.images(5)
    guide = gp(model)
    table = uncertainty_scores(model, guide, x)
    np.testing.assert_allclose(table["uncertainty"], guide.uncertainty(x))
    np.testing.assert_allclose(table["bhattacharyya"], bhattacharyya_uncertainty(guide, x))
    a, _, b, _ = guide.moments(x)
    np.testing.assert_allclose(table["log_width"], b.sum(-1))
    expected = -dist.Normal(model.decoder(a), 0.3).to_event(3).log_prob(x)
    np.testing.assert_allclose(table["reconstruction"], expected)


class TestRankCorrelation:
    def test_it_is_spearman_also_with_ties(self):
        generator = np.random.default_rng(0)
        first = generator.integers(5, size=60).astype(float)
        second = first + generator.normal(size=60).round()
        found = rank_correlation(first, second)
        assert found.rho == pytest.approx(stats.spearmanr(first, second).statistic)
        assert found.low < found.rho < found.high
        assert found.num_images == 60
        assert rank_correlation(first, second) == found, "the same seed, the same interval"

    def test_perfect_ranks_have_a_perfect_interval(self):
        assert rank_correlation(range(9), np.exp(range(9)))[:3] == (1, 1, 1)
        assert rank_correlation(range(9), range(9, 0, -1))[:3] == (-1, -1, -1)

    def test_equal_scores_have_no_correlation(self):
        assert np.isnan(rank_correlation(range(9), [2.0] * 9).rho)

    @pytest.mark.parametrize(
        ("first", "second", "message"),
        [
            (range(7), range(7), r"at least 8 images, got shapes \(7,\) and \(7,\)"),
            (range(9), range(8), "at least 8 images"),
            ([np.nan, *range(8)], range(9), "1 values of the uncertainty are not finite"),
        ],
    )
    def test_what_has_no_ranks(self, first, second, message):
        with pytest.raises(ValueError, match=message):
            rank_correlation(first, second)


class TestPosteriorGrid:
    @pytest.mark.parametrize("sigma", [0.3, 0.01])
    def test_it_is_the_exact_posterior_however_narrow(self, sigma):
        model, x = toy.linear_model(sigma=sigma), toy.images(3)
        x = (model.decoder(torch.randn(3, 2).double()) + 0.01 * x).detach()
        grid = posterior_grid(model, x)
        z = torch.stack([torch.cartesian_prod(*axes) for axes in grid.axes], 1)
        exact = toy.exact_posterior(model, x).log_prob(z).exp().mT.reshape(3, 81, 81)
        atol = 1e-5 * float(exact.max())
        torch.testing.assert_close(grid.density, exact, rtol=1e-3, atol=atol)
        evidence = toy.exact_evidence(model, x)
        torch.testing.assert_close(grid.log_evidence, evidence, rtol=0, atol=1e-4)
        peaks = (grid.density > 0.01 * grid.density.amax((1, 2), keepdim=True)).double()
        assert float(peaks.mean((1, 2)).min()) > 0.05, "the posterior fills its grid"

    def test_it_holds_all_modes(self):
        class Square(nn.Module):
            def forward(self, z):
                return z.square().repeat(1, 3).reshape(-1, *toy.SHAPE)

        model = ImageModel(toy.SHAPE, 2, Square(), sigma=0.2).double()
        grid = posterior_grid(model, torch.full((1, *toy.SHAPE), 1.0).double())
        (first, second), cell = grid.axes[0] > 0, grid.axes[0].diff()[:, 0].prod()
        for rows in (first, ~first):
            for columns in (second, ~second):
                mass = float(grid.density[0][rows][:, columns].sum() * cell)
                assert mass == pytest.approx(0.25, abs=0.01)

    def test_it_needs_two_dimensions(self):
        with pytest.raises(ValueError, match="latent_dim = 2, got 3"):
            posterior_grid(toy.linear_model(3), toy.images(1))
        with pytest.raises(ValueError, match="num_points must be at least 16, got 4"):
            posterior_grid(toy.linear_model(), toy.images(1), num_points=4)


@torch.no_grad()
def test_the_record_of_a_picture_holds_densities_and_draws():
    model, x = toy.linear_model(), toy.images(3)
    guide = gp(model)
    state = torch.random.get_rng_state()
    record = posterior_record(model, guide, x, num_draws=500)
    assert torch.equal(torch.random.get_rng_state(), state)
    for first, second, density in (("z1", "z2", "density"), ("q1", "q2", "q")):
        steps = np.diff(record[first])[:, 0] * np.diff(record[second])[:, 0]
        np.testing.assert_allclose(record[density].sum((1, 2)) * steps, 1, atol=5e-3)
    z = torch.tensor([[record["q1"][1, 20], record["q2"][1, 50]]])
    expected = guide.posterior(x[1:2]).log_prob(z).exp()
    assert record["q"][1, 20, 50] == pytest.approx(float(expected))
    a, v, b, r = guide.moments(x)
    for draws, mean, variance in ((record["f"], a, v), (np.log(record["h"]), b, r)):
        error = (draws.mean(1) - mean.numpy()) / (variance.numpy() / 500) ** 0.5
        assert np.abs(error).max() < 4.5
    exact = toy.exact_evidence(model, x)
    np.testing.assert_allclose(record["log_evidence"], exact, atol=1e-3)
    figure = posterior_panels(x.numpy(), record, ["a", "b", "c"], 2, "caption")
    titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
    assert titles == ["a", "b", "c"]
    with pytest.raises(ValueError, match="a title and a posterior for each of 2 images"):
        posterior_panels(x[:2].numpy(), record, ["a", "b", "c"])
