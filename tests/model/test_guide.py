"""Finding guides by name, and what all of them have in common."""

import copy
import re

import pyro
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam

from guides import GaussianGuide, GPGuide
from pyro_gpvae import ImageModel, PerImage, available_guides, fit, log_evidence, make_guide, pair
from pyro_gpvae.model.guide import load_guide

SHAPE = (1, 8, 8)


def model(latent_dim=2):
    torch.manual_seed(0)
    return ImageModel(SHAPE, latent_dim, sigma=0.3)


def test_every_registered_guide_loads():
    names = available_guides()
    assert list(names) == sorted(names)
    assert {"vae", "gp", "sa", "iaf", "hf", "me", "rme", "vlae", "instance"} <= set(names)
    for name in names:
        assert callable(load_guide(name))


def test_options_by_position_and_by_name():
    assert type(make_guide("vae", model())) is GaussianGuide
    guide = make_guide("gp:covariance=full,num_nodes=8,initial_scale=0.01", model())
    assert (guide.covariance, guide.num_nodes) == ("full", 8)
    torch.testing.assert_close(guide.W.scale, torch.full_like(guide.W.scale, 0.01))
    assert make_guide("sa:3,step_size=0.5", model()).num_steps == 3
    assert make_guide("guides:GPGuide:covariance=full", model()).covariance == "full"
    assert type(make_guide("guides:GPGuide", model())) is GPGuide
    assert make_guide("gp", model(), covariance="full").covariance == "full"
    assert make_guide("gp:covariance=diagonal", model(), covariance="full").covariance == "diagonal"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("gpp", "unknown guide 'gpp': did you mean 'gp'?"),
        ("no_such_module:Guide", "cannot load the guide 'no_such_module:Guide'"),
        ("guides:__name__", "expected a class or a function"),
        ("gp:covariance=wrong", "covariance must be one of"),
        ("gp:colour=red", "does not take these options"),
        ("sa:step_size=0.5,3", "the value '3' follows a key=value option"),
        ("sa:1.5", "num_steps must be int, got 1.5"),
        ("vlae:abc", "num_steps must be int, got 'abc'"),
        ("vae:foo", "encoder must be nn.Module | None, got 'foo'"),
        ("gp:initial_scale=nan", "initial_scale must be float, got 'nan'"),
        ("vlea:2", "Did you mean 'vlae'?"),
    ],
)
def test_bad_names_and_options(spec, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make_guide(spec, model())


@pytest.mark.parametrize("spec", ["sa:2", "vlae:1", "iterative:2"])
def test_a_copy_refines_with_the_same_decoder_unless_that_is_copied_too(spec):
    m = model()
    guide = make_guide(spec, m)
    assert copy.deepcopy(guide)._model[0] is m
    other_model, other = copy.deepcopy((m, guide))
    assert other._model[0] is other_model


SPECS = [
    "vae", "gp", "gp:covariance=full", "gp:estimator=marginal", "full", "lowrank:1", "iaf:2",
    "hf:2", "me:2", "rme:2", "sa:2", "iterative:2", "vlae:1",
]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("spec", [*SPECS, "instance:full"])
def test_on_cuda(spec):
    x = torch.randint(0, 256, (20, *SHAPE), dtype=torch.uint8)
    m = model().cuda()
    guide = make_guide(spec, m).cuda()
    if not spec.startswith("instance"):
        fit(m, guide, x, epochs=2, batch_size=8, progress=False)
    on_cuda = log_evidence(m, guide, x, 500, seed=0)
    assert on_cuda.log_evidence.device.type == "cuda"
    m, guide = m.cpu(), guide.cpu()
    on_cpu = log_evidence(m, guide, x, 500, seed=0)
    error = (on_cuda.standard_error.cpu() ** 2 + on_cpu.standard_error**2).sqrt() + 1e-3
    difference = (on_cuda.log_evidence.cpu() - on_cpu.log_evidence) / error
    assert float(difference.abs().mean()) < 3


def test_plain_svi_leaves_pyros_store_empty():
    m = model()
    guide = make_guide("gp", m)
    programs = PerImage(pair(m, guide), 20), PerImage(guide, 20)
    SVI(*programs, Adam({"lr": 1e-2}), Trace_ELBO()).step(torch.rand(5, *SHAPE))
    assert not pyro.get_param_store().keys()
