"""PyroModules use their own parameters, and Pyro's store is left as it was."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import pytest
import torch
from families import make
from pyro.nn import PyroModule, PyroParam
from toy import images, linear_model

from pyro_gpvae import elbo_terms, fit, log_evidence
from pyro_gpvae.core._programs import modules_of, own_parameters


class Wide(PyroModule):
    """A guide with a parameter in Pyro's store, and another that a statement makes."""

    def __init__(self, width):
        super().__init__()
        self.width = PyroParam(torch.full((2,), width).double(), dist.constraints.positive)

    def forward(self, x):
        loc = pyro.param("loc", torch.zeros(2).double())
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, self.width).to_event(1))


def store():
    return {name: value.tolist() for name, value in pyro.get_param_store().items()}


@pytest.mark.parametrize(
    "evaluate",
    [
        lambda model, guide, x: log_evidence(model, guide, x, 5, seed=0).log_evidence.tolist(),
        lambda model, guide, x: elbo_terms(model, guide, x, 10)["kl_z"],
    ],
    ids=["log_evidence", "elbo_terms"],
)
def test_an_evaluator_uses_the_guides_own_parameters_and_leaves_the_store_alone(evaluate):
    model, x, narrow, wide = linear_model(), images(3), Wide(0.1), Wide(2.0)
    found = []
    for guide in (narrow, wide):
        torch.manual_seed(0)
        found.append(evaluate(model, guide, x))
    assert found[0] != found[1]
    assert not store()
    wide(x)  # fills the store, as plain Pyro does
    pyro.param("loc").data.fill_(3.0)
    before = store()
    assert set(before) == {"width", "loc"}
    torch.manual_seed(0)
    assert evaluate(model, narrow, x) != found[0]  # reads loc from the store
    assert store() == before


@pytest.mark.parametrize("fails", [False, True])
def test_parameters_of_statements_inside_the_block_are_kept(fails):
    first, second = Wide(0.1), Wide(2.0)
    first(images(1))
    pyro.clear_param_store()
    second(images(1))
    try:
        with own_parameters(first):
            assert first.width[0].item() == pytest.approx(0.1)
            pyro.param("new", torch.ones(1))
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert set(store()) == {"width", "loc", "new"}


def test_threads_take_turns():
    def train(pair, seed):
        options = {"epochs": 2, "batch_size": 5, "seed": seed, "progress": False}
        rows = fit(*pair, images(20), **options).rows
        scores = log_evidence(*pair, images(6), 20, seed=seed).log_evidence
        return [row["log_likelihood"] for row in rows], scores.tolist()

    pairs = [make("vae") for _ in range(16)]
    expected = [train(pair, seed) for seed, pair in enumerate(pairs[:8])]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(train, pairs[8:], range(8))) == expected


encoder, decoder = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)


def test_the_modules_of_a_function_are_those_it_refers_to():
    first, nets = torch.nn.Linear(2, 2), [encoder]

    def guide(x):
        return [encoder(first(row)) for row in x.decoder] + nets + later

    found = {"encoder": encoder, "first": first}
    assert modules_of(guide) == found
    assert modules_of(partial(partial(guide), 1)) == found
    assert modules_of(pyro.poutine.scale(guide, 2.0)) == found
    assert modules_of(partial(guide, x=decoder)) == {**found, "": decoder}
    assert modules_of(decoder.forward) == modules_of(decoder) == {"": decoder}
    for other in (torch.zeros(2), print, "text", None, SimpleNamespace(net=first)):
        assert modules_of(other) == {}
    later = []
