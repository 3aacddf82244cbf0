"""What holds for every family: the VAE without steps, warm starts, training, check_guide."""

import math

import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam
from torch import nn
from toy import images, linear_encoder, linear_model

import guides
from pyro_gpvae import ImageModel, PerImage, available_guides, fit, log_evidence, make_guide, pair
from pyro_gpvae.model.networks import autocast_networks
from pyro_gpvae.testing import check_guide

# guides without steps, ranks or further components
VAES = [
    "lowrank:0",
    "iaf:0",
    "hf:0",
    "me:1",
    "rme:1",
    "sa:0",
    "iterative:0",
    "newton:0,covariance=diagonal",
    "full with p = 1",
]
SPECS = [
    "vae",
    "gp",
    "gp:estimator=weights",
    "gp:estimator=marginal",
    "gp:covariance=full,estimator=weights,features=own",
    "full",
    "lowrank:1",
    "iaf:2",
    "hf:2",
    "me:3",
    "rme:3",
    "sa:2",
    "iterative:2",
    "vlae:1",
    "vlae:1,step=damped",
    "newton:1",
    "newton:2,covariance=diagonal",
]
every_guide = pytest.mark.parametrize("spec", SPECS)
PIXELS = (images(24) * 255).to(torch.uint8)


VAE3 = guides.GaussianGuide(linear_model(3), linear_encoder())
NUMBERS = {  # values that an error refuses, with the name of the option and the value
    "LowRankGuide": {"rank": (-1, 1.5, 3)},
    "IAFGuide": {"num_steps": (-1, 1.5), "hidden_dim": (1,)},
    "HouseholderGuide": {"num_reflections": (-1,)},
    "GPGuide": {
        "covariance": ("point",),
        "estimator": ("analytic",),
        "features": ("none",),
        "initial_scale": (math.nan,),
        "num_nodes": (0, 1.5),
    },
    "MixtureGuide": {"num_components": (0,)},
    "RecursiveMixtureGuide": {
        "num_components": (-1,),
        "repulsion": (-0.1, math.nan),
        "max_divergence": (0, math.nan),
    },
    "SemiAmortizedGuide": {"num_steps": (-1,), "step_size": (0.0,), "max_norm": (math.nan,)},
    "IterativeGuide": {"num_samples": (0,), "hidden": (0,)},
    "LaplaceGuide": {"num_steps": (-1,), "step": ("newton",)},
    "InstanceGuide": {
        "covariance": ("banded",),
        "tolerance": (0.0, math.nan),
        "max_steps": (-1,),
        "num_starts": (0,),
        "autoguide": ("AutoNorml",),
    },
}
BAD = [
    (name, {option: value}, f"{option}.*{value}")
    for name, options in NUMBERS.items()
    for option, values in options.items()
    for value in values
] + [
    ("GPGuide", {"warm_start": nn.Linear(1, 1)}, "trained guide .*got Linear"),
    ("GPGuide", {"warm_start": VAE3}, "warm start has 3 latent dimensions, the model 2"),
    ("GPGuide", {"warm_start": VAE3, "encoder": VAE3}, "either an encoder or a warm start"),
    ("InstanceGuide", {"covariance": "full", "autoguide": "AutoNormal"}, "with an autoguide"),
]


def build(spec, model, seed=2, **options):
    torch.manual_seed(seed)
    options = options or {"encoder": linear_encoder()}
    return make_guide(spec, model, **options).double()


def test_every_registered_family_is_here():
    assert {spec.partition(":")[0] for spec in SPECS} | {"instance"} == set(available_guides())


@pytest.mark.parametrize("spec", VAES)
def test_without_steps_it_is_the_vae_bit_for_bit(spec):
    name, _, condition = spec.partition(" with ")
    results = []
    for guide_spec in ("vae", name):
        model = linear_model(1 if condition else 2)
        guide = build(guide_spec, model)
        history = fit(model, guide, PIXELS, epochs=2, batch_size=10, progress=False)
        torch.manual_seed(4)
        evidence = log_evidence(model, guide, images(3), 7, seed=1).log_evidence
        state = {**model.state_dict(), **guide.state_dict()}
        results.append(state | {"z": guide(images(3)), "evidence": evidence})
        results[-1]["loss"] = torch.tensor([row["loss"] for row in history.rows])
    vae, zero = results
    assert vae.keys() == zero.keys()
    assert all(torch.equal(vae[key], zero[key]) for key in vae)


@every_guide
def test_it_starts_from_the_encoder_of_the_vae(spec):
    model = linear_model()
    vae = build("vae", model)
    warm = build(spec, model, warm_start=vae)
    for guide in (build(spec, model), warm):  # under the same seed, or copied
        state = guide.state_dict()
        assert all(torch.equal(state[key], value) for key, value in vae.state_dict().items())
    assert warm.encoder[1].weight is not vae.encoder[1].weight
    assert warm.head.weight is not vae.head.weight


@every_guide
def test_fit_trains_every_parameter(spec):
    model = linear_model(sigma=1.0)
    guide = build(spec, model)
    parameters = dict([*model.named_parameters(), *guide.named_parameters()])
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    options = {"epochs": 8, "batch_size": 10, "learning_rate": 1e-2}
    history = fit(model, guide, PIXELS, progress=False, **options)
    assert history.rows[-1]["loss"] < history.rows[0]["loss"]
    for name, value in parameters.items():
        assert value.isfinite().all(), name
        assert not torch.equal(value, before[name]), name


@every_guide
def test_plain_svi(spec):
    model, x = linear_model(sigma=1.0), images(6)
    guide = build(spec, model)
    program = pair(model, guide)
    before = [p.detach().clone() for p in (*model.parameters(), *guide.parameters())]
    elbo = Trace_ELBO(4, vectorize_particles=True, max_plate_nesting=1)
    pairs = PerImage(program, 50), PerImage(guide, 50)
    svi = SVI(*pairs, Adam({"lr": 0.02}), elbo)
    losses = [svi.step(x) for _ in range(30)]
    assert sum(losses[-5:]) < sum(losses[:5])
    after = [*model.parameters(), *guide.parameters()]
    assert not any(torch.equal(p, old) for p, old in zip(after, before, strict=True))


@every_guide
def test_its_networks_run_under_autocast(spec):
    model = linear_model().float()
    guide, x = build(spec, model).float(), images(4).float()
    exact = guide.encode(x)[1]
    with autocast_networks(torch.bfloat16):
        rounded = guide.encode(x)[1]
        loss = Trace_ELBO().differentiable_loss(pair(model, guide), guide, x)
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert not torch.equal(rounded, exact)
    torch.testing.assert_close(rounded, exact, rtol=0.05, atol=0.05)  # and of equal dtype


@pytest.mark.slow
@pytest.mark.parametrize("spec", [*SPECS, "instance"])
def test_it_keeps_the_promises_of_the_contract(spec):
    torch.manual_seed(0)
    model = ImageModel((1, 8, 8), latent_dim=2, sigma=0.3)

    def make(model):
        return make_guide(spec, model)

    assert not check_guide(make(model), model, torch.rand(4, 1, 8, 8), make=make).broken


@pytest.mark.parametrize(("name", "options", "message"), BAD)
def test_bad_options(name, options, message):
    with pytest.raises(ValueError, match=message):
        getattr(guides, name)(linear_model(), **options)
