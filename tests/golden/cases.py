"""Numbers of every guide and estimator, computed through the public API.

What is called is imported and wrapped at the top of this file: after a renaming, these lines are
the only ones to change. Every case is a function without arguments; it returns a dictionary of
numbers, lists of numbers, and checksums. It depends on nothing that ran before it.

Running this file prints the record of all cases; see ``test_golden.py``.
"""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyro
import torch
from torch import Tensor, nn

from pyro_gpvae import (
    Checkpoints,
    ImageModel,
    MarginalPosterior,
    PerImage,
    RunConfig,
    annealed_evidence,
    bidirectional,
    build_decoder,
    build_encoder,
    decompose,
    elbo_terms,
    evidence_curve,
    fit,
    initial_sigma,
    load_data,
    log_evidence,
    log_weights,
    make_guide,
    reference_evidence,
    resume_run,
    train_run,
)
from pyro_gpvae import pair as with_global_prior
from pyro_gpvae.data.images import split_validation
from pyro_gpvae.evaluation.generation import reconstruct, sample_images
from pyro_gpvae.evaluation.uncertainty import (
    rank_correlation,
    uncertainty_scores,
    weight_information,
)
from pyro_gpvae.model.elbo import MeanFieldELBO, TraceELBO
from pyro_gpvae.model.stratified import StratifiedELBO
from pyro_gpvae.testing import linear_gaussian, simulation_based_calibration

Numbers = dict[str, Any]

TRAIN = partial(fit, batch_size=15, learning_rate=0.01, seed=5, progress=False)
EAGER = {"backend": "eager"}
COMPILED = {"backend": "compiled"}
EVIDENCE = partial(log_evidence, num_samples=20, chunk_size=100, seed=7)
ANNEALED = partial(annealed_evidence, num_chains=3, num_steps=5, chunk_size=20, seed=7)
BOTH_SIDES = partial(bidirectional, num_images=3, num_chains=3, num_steps=5, chunk_size=20, seed=7)
GAP = partial(
    decompose, num_train=15, num_samples=20, reference_samples=30, num_chains=3, num_steps=5,
    max_optimum_steps=50, chunk_size=100, seed=7,
)  # fmt: skip
REFERENCE = partial(
    reference_evidence, num_samples=30, num_chains=8, num_steps=5, chunk_size=100, seed=7
)
RUN = {
    "latent_dim": 2, "epochs": 2, "batch_size": 20, "train_images": 40, "validation": 8,
    "test_images": 6, "num_samples": 20, "chunk_size": 100, "device": "cpu",
}  # fmt: skip
LATENTS = 2
SHAPE = (1, 6, 6)

# --- the cases' common ground -------------------------------------------------------------------


def pair(
    spec: str, *, likelihood: str = "gaussian", latents: int = LATENTS
) -> tuple[ImageModel, Any]:
    """A small model and a guide for it, always the same."""
    pixels = math.prod(SHAPE)
    torch.manual_seed(1)
    decoder = nn.Sequential(
        nn.Linear(latents, 8), nn.Tanh(), nn.Linear(8, pixels), nn.Unflatten(1, SHAPE)
    )
    images = digits()[0]
    sigma = initial_sigma(images)
    model = ImageModel(SHAPE, latents, decoder, likelihood=likelihood, sigma=sigma)
    options: Numbers = {}
    if not spec.startswith("instance"):
        options["encoder"] = nn.Sequential(nn.Flatten(), nn.Linear(pixels, 7), nn.Tanh())
    guide = make_guide(spec, model, **options)
    return model, guide


def trained(spec: str, epochs: int = 4, **options: Any) -> tuple[ImageModel, Any]:
    """The same after a training."""
    model, guide = pair(spec, **options)
    TRAIN(model, guide, digits(options.get("likelihood") == "bernoulli")[0], epochs=epochs, **EAGER)
    return model, guide


def digits(binary: bool = False) -> tuple[Tensor, Tensor]:
    """15 training and 4 test digits of 6x6 pixels, uint8."""
    data = mnist5k().take(15, 4)
    if binary:
        data = data.binarized(seed=3)
    return data.train[..., 4:28:4, 4:28:4], data.test[..., 4:28:4, 4:28:4]


@cache
def mnist5k() -> Any:
    return load_data("mnist5k")


def pixels(images: Tensor) -> Tensor:
    return images.to(torch.float64) / 255


def numbers(value: Any) -> Any:
    """Tensors, arrays and dictionaries of them as lists of Python's numbers."""
    if isinstance(value, Tensor):
        return numbers(value.detach().cpu().tolist())
    if isinstance(value, np.ndarray | np.generic):
        return numbers(value.tolist())
    if isinstance(value, dict):
        return {str(name): numbers(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [numbers(part) for part in value]
    return value


def columns(frame: Any) -> Numbers:
    """The columns of a table, but for times."""
    return {name: frame[name].tolist() for name in frame.columns if name != "seconds"}


def weights(*programs: Any) -> Numbers:
    """Two sums over all parameters and buffers, and their number."""
    tensors = [
        tensor.detach().double().flatten()
        for program in programs
        for _, tensor in sorted(program.state_dict().items())
    ]
    flat = torch.cat(tensors)
    sign = 1 - 2 * (torch.arange(len(flat)) % 2)
    return {
        "count": len(flat),
        "squares": flat.square().sum().item(),
        "alternating": (sign * flat).sum().item(),
    }


def of_training(history: Any, model: Any, guide: Any) -> Numbers:
    """The losses of all epochs, everything else of the last, and the parameters."""
    table = columns(history.frame())
    return {
        "loss": table["loss"],
        "last": {name: values[-1] for name, values in table.items()},
        "weights": weights(model, guide),
    }


def attributes(result: Any, *names: str) -> Numbers:
    return {name: getattr(result, name) for name in names}


def checksum(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


class Stopped(BaseException):
    """A training was stopped."""


@contextmanager
def stopping_at(step: int) -> Iterator[None]:
    """The process ends right after the checkpoint of a step."""
    save = Checkpoints.save

    def dying(self: Checkpoints, state: Any) -> None:
        save(self, state)
        if state.step == step:
            raise Stopped

    with mock.patch.object(Checkpoints, "save", dying):
        try:
            yield
        except Stopped:
            return
    raise AssertionError(f"the training was not stopped at step {step}")


# --- cases: guides ------------------------------------------------------------------------------

#: The number of steps of each guide: fewer where a step takes long, or only an option differs.
GUIDES = dict.fromkeys(
    ["vae", "gp", "gp:estimator=weights", "full", "lowrank:2", "iaf:2,hidden_dim=8"], 20
)
GUIDES |= dict.fromkeys(["hf:2", "me:2", "rme:2", "sa:1", "iterative:2,hidden=8", "vlae:1"], 20)
GUIDES |= dict.fromkeys(
    [
        "gp:num_nodes=8,initial_scale=0.1",
        "gp:estimator=weights,initial_scale=0.1",
        "gp:estimator=marginal,initial_scale=0.1,num_nodes=8",
        "gp:covariance=full,initial_scale=0.1",
        "gp:covariance=full,estimator=weights,initial_scale=0.1",
        "gp:features=own,initial_scale=0.1",
        "lowrank:1",
        "iaf:1,hidden_dim=8",
        "hf:1",
        "me:3",
        "rme:3",
        "sa:2",
        "sa:2,line_search=False",
        "vlae:2",
        "vlae:1,step=damped",
    ],
    6,
)
GUIDES |= dict.fromkeys(["instance", "instance:full"], 3)
BERNOULLI = ["vae", "gp", "iaf:2,hidden_dim=8", "me:2", "rme:2", "sa:1", "iterative:2,hidden=8"]
BERNOULLI += ["vlae:1", "instance"]


def of_guide(spec: str, epochs: int, likelihood: str = "gaussian") -> Numbers:
    """Steps with all images in a batch, and what the trained guide is worth."""
    model, guide = pair(spec, likelihood=likelihood)
    train, test = digits(likelihood == "bernoulli")
    history = TRAIN(model, guide, train, epochs=epochs, **EAGER)
    found = of_training(history, model, guide)
    evidence = EVIDENCE(model, guide, test)
    names = ("log_evidence", "elbo", "standard_error", "effective_sample_size")
    found["evidence"] = attributes(evidence, *names)
    torch.manual_seed(8)
    found["elbo_terms"] = elbo_terms(model, guide, pixels(test), 15)
    if hasattr(guide, "posterior"):
        torch.manual_seed(9)
        q = guide.posterior(pixels(test))
        z = q.sample((2,))
        found["posterior"] = {"z": z, "log_prob": q.log_prob(z)}
    return found


def minibatches(spec: str, batch_size: int) -> Numbers:
    """Shuffled minibatches, the last of them smaller where the size does not divide."""
    model, guide = pair(spec, latents=3)
    train, test = digits()
    history = TRAIN(model, guide, train, epochs=2, batch_size=batch_size, validation=test, **EAGER)
    return of_training(history, model, guide)


def autoguide() -> Numbers:
    """Pyro's own autoguide for each image, under a trained decoder."""
    model, vae = trained("vae")
    guide = make_guide("instance:autoguide=AutoNormal,max_steps=60", model, warm_start=vae)
    torch.manual_seed(8)
    optimum = guide.optimise(pixels(digits()[1][:1]))
    return attributes(optimum, "elbo", "gap", "steps")


def instance(spec: str) -> Numbers:
    """The optimum of each image under a trained decoder, from the trained encoder and from 0."""
    model, vae = trained("vae")
    test = digits()[1]
    found: Numbers = {}
    for name, start in (("warm", vae), ("cold", None)):
        guide = make_guide(spec, model, warm_start=start)
        optimum = guide.optimise(pixels(test))
        found[name] = attributes(optimum, "elbo", "gap", "steps", "jitter") | {
            "mean": optimum.posterior.mean,
            "variance": optimum.posterior.variance,
            "evidence": EVIDENCE(model, guide, test).log_evidence,
        }
    return found


def warm_started(spec: str) -> Numbers:
    """A guide that begins with a trained encoder."""
    model, vae = trained("vae")
    guide = make_guide(spec, model, warm_start=vae)
    history = TRAIN(model, guide, digits()[0], epochs=3, **EAGER)
    return of_training(history, model, guide)


# --- cases: estimators --------------------------------------------------------------------------

MEASURED = ["vae", "gp:initial_scale=0.1", "iaf:2,hidden_dim=8", "me:2", "sa:1"]


def annealing(spec: str) -> Numbers:
    model, guide = trained(spec)
    test = digits()[1]
    names = ("log_evidence", "standard_error", "effective_sample_size", "acceptance_rate")
    found: Numbers = {}
    for name, start in (("guide", guide), ("prior", None)):
        found[name] = attributes(ANNEALED(model, test, start), *names)
    return found


def both_sides(spec: str) -> Numbers:
    model, guide = trained(spec)
    names = ("lower", "upper", "lower_error", "upper_error")
    return attributes(BOTH_SIDES(model, guide), *names, "x", "z")


def gap(spec: str) -> Numbers:
    model, guide = trained(spec)
    return columns(GAP(model, guide, digits()[1][:3]).table())


def reference(spec: str) -> Numbers:
    model, guide = trained(spec)
    result = REFERENCE(model, digits()[1][:3], guide)
    names = ("log_evidence", "standard_error", "estimator", "pareto_k", "trusted", "estimates")
    return attributes(result, *names)


def curve(spec: str) -> Numbers:
    """Log weights, and the bound for several K."""
    model, guide = trained(spec)
    torch.manual_seed(7)
    log_w = log_weights(model, guide, digits()[1], 40, chunk_size=30)
    return {"log_weights": log_w, "curve": evidence_curve(log_w, [1, 5, 20])}


def tails(spec: str) -> Numbers:
    """Enough samples for the Pareto k̂."""
    model, guide = trained(spec)
    evidence = EVIDENCE(model, guide, digits()[1], num_samples=60)
    return attributes(evidence, "log_evidence", "pareto_k", "standard_error", "num_samples")


def without_density() -> Numbers:
    """A guide that is a plain callable, which has to be replayed."""
    model, guide = trained("gp:initial_scale=0.1")

    def replayed(x: Tensor) -> Any:
        return guide(x)

    found = EVIDENCE(model, replayed, digits()[1])
    return attributes(found, "log_evidence", "elbo", "effective_sample_size")


OBJECTIVES: dict[str, tuple[str, Callable[[], Any]]] = {
    "stratified-me": ("me:2", StratifiedELBO),
    "stratified-me-particles": ("me:3", partial(StratifiedELBO, num_particles=3)),
    "trace-vae": ("vae", TraceELBO),
    "trace-gp": ("gp:estimator=weights,initial_scale=0.1", TraceELBO),
    "mean-field-vae": ("vae", MeanFieldELBO),
    "mean-field-full": ("full", MeanFieldELBO),
    "mean-field-gp": ("gp:estimator=weights,initial_scale=0.1", MeanFieldELBO),
}


def objective(spec: str, elbo: Callable[[], Any]) -> Numbers:
    """The value of an objective, and its gradient."""
    model, guide = trained(spec)
    for program in (model, guide):
        program.requires_grad_(True)
    torch.manual_seed(6)
    programs = PerImage(with_global_prior(model, guide), 15), PerImage(guide, 15)
    loss = elbo().differentiable_loss(*programs, pixels(digits()[0]))
    loss.backward()
    parameters = [p for program in (model, guide) for _, p in program.named_parameters()]
    gradients = [p.grad.norm() for p in parameters if p.grad is not None]
    return {"loss": loss, "gradients": sorted(numbers(gradients))}


def uncertainty(spec: str) -> Numbers:
    model, guide = trained(spec)
    train = pixels(digits()[0])
    scores = uncertainty_scores(model, guide, train)
    price = weight_information(guide, train)
    correlation = rank_correlation(scores["uncertainty"], price.numpy(), num_bootstrap=50, seed=2)
    a, v, b, r = guide.moments(train[:3])
    return {
        "scores": columns(scores),
        "price": price,
        "correlation": list(correlation),
        "moments": {"a": a, "v": v, "b": b, "r": r},
        "kl_weights": guide.kl_weights(),
    }


def generated(spec: str) -> Numbers:
    model, guide = trained(spec)
    _, test = digits()
    z, images = sample_images(model, 3, seed=4)
    noisy = sample_images(model, 3, noise=True, seed=4).images
    again = reconstruct(model, guide, test, seed=4)
    return {
        "z": z,
        "images": images.flatten(1).sum(1),
        "noisy": noisy.flatten(1).sum(1),
        "reconstructed": {"z": again.z, "images": again.images.flatten(1).sum(1)},
    }


def marginal_posterior() -> Numbers:
    """The marginal of eq. (7): density and draws."""
    a, b = torch.tensor([0.1, -2.0, 0.0]), torch.tensor([-0.3, 0.5, -4.0])
    v, r = torch.tensor([0.4, 1.5, 1e-3]), torch.tensor([0.2, 1.0, 1e-3])
    q = MarginalPosterior(a, v, b, r)
    z = torch.linspace(-4, 4, 7)[:, None]
    torch.manual_seed(2)
    draws = q.sample((2,))
    return {"log_prob": q.log_prob(z), "draws": draws, "mean": q.mean, "variance": q.variance}


def known_evidence() -> Numbers:
    """The linear Gaussian model, whose evidence is exact; and calibration on it."""
    model = linear_gaussian((1, 4, 4), latent_dim=2).double()
    x = model.images(3)
    calibration = simulation_based_calibration(model, model, 40, 9, seed=1)
    return {
        "exact": model.log_evidence(x),
        "annealed": ANNEALED(model, x).log_evidence,
        "reference": REFERENCE(model, x).log_evidence,
        "ranks": calibration.ranks,
    }


# --- cases: runs --------------------------------------------------------------------------------


def of_record(record: Numbers, folder: Path) -> Numbers:
    """The numbers of a run folder, but for times."""
    names = ("scores", "sigma", "diagnostics", "steps")
    found = {name: record[name] for name in names if record[name] is not None}
    for file in ("history.csv", "scores.csv"):
        lines = [line.split(",") for line in (folder / file).read_text().splitlines()]
        table = dict(zip(lines[0], zip(*lines[1:], strict=True), strict=True))
        found[file] = {name: list(map(float, table[name])) for name in table if name != "seconds"}
    return found


def run_folder(**options: Any) -> Numbers:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        record = train_run(RunConfig(**(RUN | options)), out, progress=False)
        return of_record(record, out)


def resumed_run(step: int, **options: Any) -> Numbers:
    """Equals the case of the run that was never stopped."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        with stopping_at(step):
            train_run(RunConfig(**(RUN | options)), out, progress=False, checkpoint_every=1)
        return of_record(resume_run(out, progress=False), out)


def resumed_fit(spec: str, step: int | None) -> Numbers:
    """A training that is stopped after a step, and goes on; None is never."""
    with tempfile.TemporaryDirectory() as folder:
        options = {"epochs": 3, "batch_size": 4, **EAGER}
        if step is not None:
            model, guide = pair(spec)
            with stopping_at(step):
                TRAIN(
                    model, guide, digits()[0], checkpoints=Checkpoints(folder, every=1), **options
                )
        model, guide = pair(spec)
        saving = Checkpoints(folder, every=1, resume=True)
        history = TRAIN(model, guide, digits()[0], checkpoints=saving, **options)
        return of_training(history, model, guide)


# --- cases: networks and data -------------------------------------------------------------------


def networks(*shape: int) -> Numbers:
    """The networks of Tables 1-3: sizes, and what they say of fixed inputs."""
    found: Numbers = {}
    x = torch.linspace(0, 1, 2 * math.prod(shape)).reshape(2, *shape)
    z = torch.linspace(-1, 1, 6).reshape(2, 3)
    torch.manual_seed(3)
    for name, network, batch in (
        ("encoder", build_encoder(shape), x),
        ("conv", build_decoder(shape, 3, "conv"), z),
        ("fc", build_decoder(shape, 3, "fc"), z),
    ):
        output = network(batch)
        found[name] = {
            "shape": list(output.shape),
            "sum": output.sum(),
            "absolute": output.abs().sum(),
            "weights": weights(network),
        }
    return found


def data() -> Numbers:
    """The digits that come with the package, and which of them are held out."""
    images = load_data("mnist5k")
    found: Numbers = {"sigma": initial_sigma(images.train)}
    for name in ("train", "test", "train_labels", "test_labels"):
        part = getattr(images, name)
        found[name] = {"shape": list(part.shape), "sum": int(part.sum()), "sha256": checksum(part)}
    binary = images.binarized(seed=3)
    found["binarized"] = [checksum(binary.train), checksum(binary.test)]
    train, validation = split_validation(images.train, 500)
    found["split"] = [checksum(train), checksum(validation)]
    kept, held_out = split_validation(torch.arange(20), 6, seed=1)
    found["order"] = {"train": kept, "validation": held_out}
    return found


# --- all of them --------------------------------------------------------------------------------

CASES: dict[str, Callable[[], Numbers]] = {
    f"guide-{spec}": partial(of_guide, spec, steps) for spec, steps in GUIDES.items()
}
CASES |= {f"bernoulli-{spec}": partial(of_guide, spec, 3, "bernoulli") for spec in BERNOULLI}
for _spec in ("vae", "gp", "iaf:2,hidden_dim=8", "rme:2", "sa:1"):
    CASES[f"minibatches-5-{_spec}"] = partial(minibatches, _spec, 5)
    CASES[f"minibatches-4-{_spec}"] = partial(minibatches, _spec, 4)
for _spec in ("gp", "iaf:2,hidden_dim=8", "me:2", "sa:1", "vlae:1"):
    CASES[f"warm-start-{_spec}"] = partial(warm_started, _spec)
CASES |= {f"optimum-{spec}": partial(instance, spec) for spec in ("instance", "instance:full")}
CASES["optimum-autoguide"] = autoguide
for _name, _case in {
    "annealed": annealing,
    "gap": gap,
    "reference": reference,
    "generated": generated,
}.items():
    CASES |= {f"{_name}-{spec}": partial(_case, spec) for spec in MEASURED}
for _spec in MEASURED[:2]:
    CASES[f"both-sides-{_spec}"] = partial(both_sides, _spec)
    CASES[f"curve-{_spec}"] = partial(curve, _spec)
    CASES[f"tails-{_spec}"] = partial(tails, _spec)
CASES["without-density"] = without_density
CASES |= {f"objective-{n}": partial(objective, *of) for n, of in OBJECTIVES.items()}
for _spec in ("gp:initial_scale=0.1", "gp:covariance=full,initial_scale=0.1"):
    CASES[f"uncertainty-{_spec}"] = partial(uncertainty, _spec)
CASES["marginal-posterior"] = marginal_posterior
CASES["known-evidence"] = known_evidence
CASES["run-vae"] = partial(run_folder, guide="vae")
CASES["run-iaf"] = partial(run_folder, guide="iaf:1", decoder="fc", seed=1)
CASES["run-bernoulli"] = partial(run_folder, guide="vae", likelihood="bernoulli")
CASES["run-vae-resumed"] = partial(resumed_run, 3, guide="vae")
for _step in (None, 2, 8):
    _of = "undisturbed" if _step is None else f"stopped-at-{_step}"
    CASES[f"fit-gp-{_of}"] = partial(resumed_fit, "gp:initial_scale=0.1", _step)
for _shape in ((1, 28, 28), (3, 32, 32), (3, 64, 64)):
    CASES[f"networks-{_shape[-1]}"] = partial(networks, *_shape)
CASES["data"] = data

#: Cases that must have the numbers of another.
SAME = {"run-vae-resumed": "run-vae"} | {
    f"fit-gp-stopped-at-{step}": "fit-gp-undisturbed" for step in (2, 8)
}


def compute(name: str) -> Numbers:
    """The numbers of a case, in float64 on one thread; leaves torch as it was."""
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    pyro.clear_param_store()
    with torch.random.fork_rng(devices=[]):
        torch.set_default_dtype(torch.float64)
        torch.set_num_threads(1)
        try:
            torch.manual_seed(0)
            found: Numbers = numbers(CASES[name]())
            return found
        finally:
            torch.set_default_dtype(dtype)
            torch.set_num_threads(threads)
            pyro.clear_param_store()


def compact(record: Any, indent: int = 0) -> str:
    """JSON with one line for each list of numbers."""
    if not isinstance(record, dict):
        return json.dumps(record)
    space = " " * (indent + 1)
    lines = (f"{space}{json.dumps(k)}: {compact(v, indent + 1)}" for k, v in record.items())
    return "{\n" + ",\n".join(lines) + "\n" + " " * indent + "}"


if __name__ == "__main__":
    print(compact({name: compute(name) for name in CASES}))
