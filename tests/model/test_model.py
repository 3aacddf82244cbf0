import math

import pyro.poutine as poutine
import pytest
import torch
from pyro.infer.inspect import generate_graph_specification, get_model_relations
from torch import nn

from guides import GaussianGuide, GPGuide
from pyro_gpvae import ImageModel, initial_sigma, pair


@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli"])
def test_trace_and_log_joint_agree(likelihood):
    model = ImageModel((1, 28, 28), 3, likelihood=likelihood, sigma=0.2).double()
    x = torch.rand(4, 1, 28, 28).double().round()
    trace = poutine.trace(model).get_trace(x)
    trace.compute_log_prob()
    z = trace.nodes["z"]["value"]
    assert z.shape == (4, 3)
    expected = trace.nodes["z"]["log_prob"] + trace.nodes["x"]["log_prob"]
    torch.testing.assert_close(model.log_joint(x, z), expected, rtol=0, atol=1e-10)


def test_gaussian_likelihood_is_the_density_of_pixels_in_the_unit_interval():
    decoder = nn.Sequential(nn.Linear(2, 4), nn.Unflatten(1, (1, 2, 2)))
    model = ImageModel((1, 2, 2), 2, decoder, sigma=0.1)
    x, z = torch.rand(3, 1, 2, 2), torch.randn(3, 2)
    square = (x - decoder(z)).square().flatten(1).sum(1)
    expected = -0.5 * square / 0.1**2 - 4 * (math.log(0.1) + 0.5 * math.log(2 * math.pi))
    torch.testing.assert_close(model.likelihood(z).log_prob(x), expected)
    many = model.likelihood(torch.stack([z, z + 1])[:, None])
    assert (many.batch_shape, many.event_shape) == ((2, 1, 3), (1, 2, 2))
    torch.testing.assert_close(many.mean[1, 0], decoder(z + 1))


def test_pyro_renders_the_model():
    model = ImageModel((1, 8, 8), 2)
    relations = get_model_relations(model, (torch.rand(3, 1, 8, 8),))
    assert relations["plate_sample"] == {"data": ["z", "x"]}
    assert set(relations["param_constraint"].values()) == {"Real()"}
    assert generate_graph_specification(relations, render_params=True)["node_data"]["z"]


def test_priors_of_global_weights_appear_exactly_when_the_guide_has_them():
    model = ImageModel((1, 28, 28), 2)
    x = torch.rand(3, 1, 28, 28)

    def sites(program):
        return set(poutine.trace(program).get_trace(x).stochastic_nodes)

    for guide, expected in (
        (GPGuide(model), {"W", "U"}),
        (GPGuide(model, covariance="full"), {"W", "U"}),
        (GaussianGuide(model), set()),
    ):
        assert sites(pair(model, guide)) - {"z", "data"} == expected
        assert sites(guide) - {"z", "data", "f", "log_h"} == expected
    twice = pair(pair(model, GPGuide(model)), GPGuide(model))
    assert pair(twice, GaussianGuide(model)) is model
    priors = poutine.trace(twice).get_trace(x)
    for name in "WU":
        prior = priors.nodes[name]["fn"]
        assert prior.event_shape == (2, 257)
        assert bool((prior.mean == 0).all())
        assert bool((prior.variance == 1).all())


def test_initial_sigma_is_the_deviation_from_the_mean_image():
    images = torch.randint(0, 256, (5000, 1, 3, 4), dtype=torch.uint8)
    expected = (images.double() / 255).var(0, correction=0).mean().sqrt()
    assert initial_sigma(images) == pytest.approx(float(expected), rel=1e-12)
    assert initial_sigma(images / 255) == pytest.approx(float(expected), rel=1e-6)
    assert initial_sigma(images.double() / 255) == pytest.approx(float(expected), rel=1e-12)
    assert initial_sigma(images[:1].repeat(3, 1, 1, 1)) == pytest.approx(0.5 / 255)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"latent_dim": 0}, "latent_dim must be at least 1, got 0"),
        ({"sigma": 0.0}, "sigma must be positive and finite, got 0.0"),
        ({"sigma": math.nan}, "got nan"),
        ({"likelihood": "poisson"}, "'gaussian' or 'bernoulli', got 'poisson'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        ImageModel((1, 28, 28), **({"latent_dim": 2} | options))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.rand(2, 1, 9, 9), r"expects images \(B, 1, 8, 8\), got \(2, 1, 9, 9\)"),
        (torch.rand(8, 8), "expects images"),
        ([[0.5]], "got list"),
        (torch.rand(0, 1, 8, 8), "at least one image"),
        (torch.full((2, 1, 8, 8), torch.nan), "must be finite"),
        (255 * torch.ones(2, 1, 8, 8), "divide values 0 to 255 by 255"),
        (torch.full((2, 1, 8, 8), 200), r"got torch.int64.*with .to\(torch.uint8\)"),
        (torch.ones(2, 1, 8, 8) > 0, r"got torch.bool.*with .float\(\)"),
        (-101 * torch.ones(2, 1, 8, 8), "divide values 0 to 255 by 255"),
    ],
)
def test_what_is_no_batch_of_images_is_refused(x, message):
    with pytest.raises(ValueError, match=message):
        ImageModel((1, 8, 8), 2).check_images(x)


def test_images_and_binary_images_are_accepted():
    grey = torch.randint(0, 256, (5, 1, 8, 8), dtype=torch.uint8)
    binary = 255 * (grey > 127).to(torch.uint8)
    gaussian = ImageModel((1, 8, 8), 2)
    bernoulli = ImageModel((1, 8, 8), 2, likelihood="bernoulli")
    for x in (grey, grey / 255, binary, 3 * torch.randn(2, 1, 8, 8)):
        gaussian.check_images(x)
    bernoulli.check_images(binary)
    bernoulli.check_images(binary / 255)
    for check in (bernoulli.check_images, bernoulli):
        with pytest.raises(ValueError, match=r"must be 0 or 1.*binarized"):
            check(grey / 255)
    with pytest.raises(ValueError, match="expects images"):
        gaussian(torch.rand(2, 1, 9, 9))
