"""Evidence in float32 is that of float64."""

from __future__ import annotations

import copy
import math
import warnings
from functools import cache

import pytest
import torch
from torch.overrides import TorchFunctionMode

from guides import GaussianGuide
from pyro_gpvae import (
    ImageModel,
    available_guides,
    fit,
    load_data,
    log_evidence,
    make_guide,
)
from pyro_gpvae.evaluation.importance import ParetoWarning

pytestmark = pytest.mark.slow
BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


class SameNoise(TorchFunctionMode):
    """Draws random numbers in float64 and rounds them, so that both precisions get the same."""

    def __init__(self, seed):
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, shape):
        return torch.randn(tuple(shape), generator=self.generator, dtype=torch.float64)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if kwargs.get("generator") is not None:
            return func(*args, **kwargs)
        match func.__name__:
            case "randn":
                shape = args if isinstance(args[0], int) else args[0]
                return self.normal(shape).to(kwargs["dtype"])
            case "randn_like":
                return self.normal(args[0].shape).to(args[0])
            case "normal":
                mean, deviation = args
                noise = self.normal(torch.broadcast_shapes(mean.shape, deviation.shape))
                return mean + deviation * noise.to(mean)
            case "normal_":
                return args[0].copy_(self.normal(args[0].shape))
            case "multinomial":
                mass, count = args[:2]
                uniform = torch.rand(
                    *mass.shape[:-1], count, generator=self.generator, dtype=torch.float64
                )
                below = mass.double().cumsum(-1)[..., :-1].contiguous()
                return torch.searchsorted(below, uniform)
            case "rand" | "rand_like" | "uniform_" | "exponential_" | "bernoulli":
                raise NotImplementedError(func.__name__)
        return func(*args, **kwargs)


@cache
def trained():
    """A VAE trained for seconds on digits, with the σ that longer training arrives at."""
    data = load_data("mnist5k")
    torch.manual_seed(0)
    model = ImageModel(data.image_shape, 10, sigma=0.12)
    vae = GaussianGuide(model)
    options = {"epochs": 6, "batch_size": 64, "learning_rate": 2e-3}
    fit(model, vae, data.train[:1000], progress=False, **options)
    return model, vae, data.test


PRECISE = [
    "vae",
    "gp",
    "gp:covariance=full",
    "gp:features=own",
    "full",
    "lowrank:3",
    "iaf:2",
    "hf:4",
    "me:3",
    "rme:3",
    "sa:2",
    "sa:2,natural=False,line_search=False,step_size=1e-4",
    "iterative:2",
    "vlae:0",
    "vlae:2",
    "vlae:2,step=damped",
    "instance:num_starts=1",
    "instance:full,num_starts=1",
]


def test_every_registered_guide_is_in_both_precisions():
    assert set(available_guides()) == {spec.partition(":")[0] for spec in PRECISE}


@pytest.fixture
def one_thread():
    """Sums in one order: several threads round differently."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(count)


@pytest.mark.parametrize("spec", PRECISE)
def test_float32_evidence_is_that_of_float64(spec, one_thread):
    # An image for which a line search has to choose between two steps that are equal to rounding
    # may take the other one, and so another proposal: one in 800 such choices, on digits.
    model, vae, digits = trained()
    x = digits[:2] if spec.startswith("instance") else digits[:10]
    assert 0.1 < float(model.log_sigma.detach().exp()) < 0.2
    torch.manual_seed(1)
    model = copy.deepcopy(model)
    guide = make_guide(spec, model, **({} if "instance" in spec else {"warm_start": vae}))
    with torch.no_grad():  # away from initial values, where much is zero
        for parameter in guide.parameters():
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 1
            parameter += 0.05 / math.sqrt(fan_in) * torch.randn_like(parameter)
    model64, guide64 = copy.deepcopy((model, guide))
    results = []
    for pair in ((model, guide), (model64.double(), guide64.double())):
        with SameNoise(0), warnings.catch_warnings():
            warnings.simplefilter("ignore", ParetoWarning)
            results.append(log_evidence(*pair, x, 100))
    single, double = results
    assert (single.log_evidence.dtype, double.log_evidence.dtype) == (torch.float32, torch.float64)
    for name in ("log_evidence", "elbo"):
        gap = (getattr(single, name).double() - getattr(double, name)).abs()
        assert 0 < float(gap.max()) < 1e-3
