import math
from types import SimpleNamespace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_gpvae.testing import linear_gaussian
from pyro_gpvae.testing.calibration import _p_values, simulation_based_calibration

MODEL = linear_gaussian((1, 4, 4), latent_dim=3).double()


def changed(scale=1.0, shift=0.0):
    """The exact posterior, but for its width and its place in posterior standard deviations."""

    def posterior(x):
        q = MODEL.posterior(x)
        scale_tril = torch.as_tensor(scale).double() * q.scale_tril
        return dist.MultivariateNormal(q.mean + shift * q.stddev, scale_tril=scale_tril)

    return SimpleNamespace(posterior=posterior)


def as_program(guide):
    def program(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", guide.posterior(x))

    return program


@pytest.mark.parametrize("form", [lambda guide: guide, as_program], ids=["posterior", "program"])
def test_the_exact_posterior_passes(form):
    found = simulation_based_calibration(MODEL, form(MODEL))
    assert found.ranks.shape == (500, 3)
    assert found.p_value.shape == (3,)
    assert found.passed()
    assert "500 simulations, 99 draws: calibrated" in repr(found)


@pytest.mark.parametrize(
    ("options", "column", "low", "high"),
    [
        ({"scale": 0.5}, "spread", 1.2, 2.0),
        ({"scale": 2.0}, "spread", 0.3, 0.8),
        ({"shift": 0.5}, "centre", 0.2, 0.4),
        ({"shift": -0.5}, "centre", 0.6, 0.8),
    ],
)
@pytest.mark.parametrize("form", [lambda guide: guide, as_program], ids=["posterior", "program"])
def test_wrong_posteriors_fail_and_the_table_tells_how(form, options, column, low, high):
    found = simulation_based_calibration(MODEL, form(changed(**options)))
    assert not found.passed()
    assert "not calibrated" in repr(found)
    assert not simulation_based_calibration(MODEL, form(changed([1.0, 1.0, 0.5]))).passed()
    table = found.table()
    assert table[column].between(low, high).all()
    if column == "spread":
        assert table["centre"].between(0.4, 0.6).all()


@pytest.mark.parametrize(("simulations", "draws"), [(500, 99), (20, 9), (50, 199), (1, 1)])
def test_p_values_are_right_for_uniform_ranks(simulations, draws):
    # 2000 sets of ranks of their own: a share of 0.05 has standard error 0.005
    rng = np.random.default_rng(1)
    p_values = _p_values(rng.integers(0, draws + 1, (simulations, 2000)), draws)
    for level in (0.01, 0.05, 0.5):
        error = math.sqrt(level * (1 - level) / 2000)
        assert (p_values <= level).mean() < level + 4 * error
        if simulations == 500:
            assert (p_values <= level).mean() > level - 4 * error - 0.002


def test_a_model_of_ones_own():
    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            loc = z[..., None, None].expand(*z.shape[:-1], 1, 1, 2)
            pyro.sample("pixels", dist.Normal(loc, 1.0).to_event(3), obs=x)

    def guide(x, scale=(1 / 3) ** 0.5):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x.sum((-1, -2)) / 3, scale).to_event(1))

    assert simulation_based_calibration(model, guide, image_shape=(1, 1, 2)).passed()
    narrow = simulation_based_calibration(model, lambda x: guide(x, 0.3), image_shape=(1, 1, 2))
    assert not narrow.passed()


def test_bad_input():
    def unobserved(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))

    with pytest.raises(ValueError, match="one observed site"):
        simulation_based_calibration(unobserved, MODEL, image_shape=(1, 1, 2))
    with pytest.raises(ValueError, match=r"pass image_shape=\(C, H, W\)"):
        simulation_based_calibration(unobserved, MODEL)
    with pytest.raises(ValueError, match="num_draws must be at least 1, got 0"):
        simulation_based_calibration(MODEL, MODEL, num_draws=0)
