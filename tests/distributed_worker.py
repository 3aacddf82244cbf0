"""What two processes do in test_distributed.py: `python distributed_worker.py RANK SIZE FOLDER`."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import Trace_ELBO
from torch import nn
from toy import images, linear_encoder, linear_model

from guides import GaussianGuide, GPGuide, MixtureGuide, RecursiveMixtureGuide
from pyro_gpvae import fit
from pyro_gpvae.core._signals import Terminated
from pyro_gpvae.training.checkpoint import Checkpoints

GUIDES = {
    "vae": GaussianGuide,
    "gp": GPGuide,
    "gp:weights": lambda *args: GPGuide(*args, estimator="weights", initial_scale=0.1),
    "me": lambda model, encoder: MixtureGuide(model, 3, encoder),
    "rme": lambda model, encoder: RecursiveMixtureGuide(model, 2, encoder),
}
OPTIONS = {"epochs": 2, "batch_size": 8, "seed": 3, "progress": False}


def uint8(count):
    return (images(count) * 255).to(torch.uint8)


def pair(name, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    model = linear_model(seed=seed)
    guide = GUIDES[name](model, linear_encoder()).double()
    return model.to(dtype), guide.to(dtype)


class Centred(nn.Module):
    """Features whose mean over the minibatch is zero."""

    def forward(self, phi):
        return phi - phi.mean(0)


def with_layer(model, layer):
    return GaussianGuide(model, nn.Sequential(*linear_encoder(), layer))


class Reading(GaussianGuide):
    """A guide that reads a tensor in Python, which no pure function can."""

    def forward(self, x):
        if float(x.sum()) > 0:
            return super().forward(x)
        raise AssertionError


def by_params(x):
    loc = pyro.param("loc", torch.zeros(2))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))


class Stopped(Checkpoints):
    """Gets SIGTERM after a step, in one of the processes."""

    def due(self, step):
        if step == 4 and torch.distributed.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return False


def weights(model, guide):
    return {**{f"m.{n}": t for n, t in model.state_dict().items()}, **guide.state_dict()}


def trained(name, dtype=torch.float64, data=None, seed=0, **options):
    programs = pair(name, dtype, seed)
    history = fit(*programs, uint8(22) if data is None else data, **{**OPTIONS, **options})
    return weights(*programs), history.rows


def error_of(function, *args, **options):
    try:
        function(*args, **options)
    except BaseException as error:
        return type(error).__name__, str(error)
    return None


def main(rank, size, folder):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size
    )
    found = {}
    for name in GUIDES:
        found[name, torch.float64] = trained(name)
    for name in ("vae", "gp"):
        found[name, torch.float32] = trained(name, torch.float32)
    found["compiled"] = trained("gp", backend="compiled")
    found["other seeds"] = trained("gp", seed=rank)
    found["particles"] = trained("vae", elbo=Trace_ELBO(num_particles=2, vectorize_particles=True))

    kept = Path(folder) / "checkpoints"
    stopped = Stopped(kept)
    found["stopped"] = error_of(trained, "gp", epochs=3, checkpoints=stopped)
    assert found["stopped"][0] == Terminated.__name__, found["stopped"]
    found["resumed"] = trained("gp", epochs=3, checkpoints=kept, resume=True, seed=7)
    found["not resumed"] = error_of(trained, "gp", epochs=3, checkpoints=kept)

    model = linear_model().float()
    data = uint8(22)
    fits = {
        "batch": (GaussianGuide(model, linear_encoder()), data, {"batch_size": 7}),
        "few": (GaussianGuide(model, linear_encoder()), data[:1], {}),
        "normalised": (with_layer(model, nn.BatchNorm1d(3)), data, {}),
        "centred": (with_layer(model, Centred()), data, {}),
        "python": (Reading(model, linear_encoder()), data, {}),
        "params": (by_params, data, {}),
        "other images": (GaussianGuide(model, linear_encoder()), data[rank:], {}),
        "captured": (GaussianGuide(model, linear_encoder()), data, {"backend": "captured"}),
    }
    for name, (guide, some, options) in fits.items():
        found[name] = error_of(fit, model, guide, some, **{**OPTIONS, **options})
    guide = GaussianGuide(model, linear_encoder())
    options = {**OPTIONS, "seeds": [0]}
    found["seeds"] = error_of(fit, [model], [guide], data, **options)
    broken = data.clone()
    with torch.no_grad():
        guide.head.bias.fill_(float("nan"))
    found["not finite"] = error_of(fit, model, guide, broken, **OPTIONS)
    torch.save(found, Path(folder) / f"{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
