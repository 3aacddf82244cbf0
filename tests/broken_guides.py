"""Sound guides of many kinds, each with mistakes to switch on by name.

A guide passes ``check_guide`` without its bug, so that nothing but the bug is what the kit finds.
"""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import nn

from pyro_gpvae.model.elbo import Block

GENERATOR = np.random.default_rng(0)


class Encoder(nn.Module):
    """Features, mean and scale; bugs are switched on by name."""

    bug: str | None = None

    def __init__(self, model, bug=None):
        super().__init__()
        self.bug = bug
        p = model.latent_dim
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Tanh())
        self.loc, self.log_scale = nn.Linear(8, p), nn.Linear(8, p)
        self._model = (model,)

    def encode(self, x):
        features = self.encoder(x)
        return features, self.loc(features), self.log_scale(features).exp()


class Small(Encoder):
    """A diagonal Gaussian."""

    def posterior(self, x):
        _, loc, scale = self.encode(x)
        return dist.Normal(loc, scale).to_event(1)

    def forward(self, x):
        with pyro.plate("data", len(x), dim=-1):
            return pyro.sample("z", self.posterior(x))


class Sites(Small):
    def forward(self, x):
        q = self.posterior(x)
        if self.bug == "no plate":
            return pyro.sample("z", q)
        size = 60_000 if self.bug == "plate of N" else len(x)
        name = "images" if self.bug == "plate name" else "data"
        with (
            pyro.plate(name, size, subsample=torch.arange(len(x)), dim=-1),
            pyro.poutine.scale(scale=0.5 if self.bug == "scale" else 1.0),
            pyro.poutine.mask(mask=self.bug != "mask"),
        ):
            if self.bug == "unknown site":
                pyro.sample("w", q)
            return pyro.sample("latent" if self.bug == "site name" else "z", q)


class Random(Small):
    """Noise inside posterior(x)."""

    def posterior(self, x):
        _, loc, scale = self.encode(x)
        noise = torch.randn_like(loc)
        if self.bug == "numpy":
            noise = torch.as_tensor(GENERATOR.normal(size=loc.shape), dtype=loc.dtype)
        return dist.Normal(loc + 0.5 * noise, scale).to_event(1)


class Traced(Encoder):
    """Without posterior(x): noise must be in sample sites."""

    def forward(self, x):
        _, loc, scale = self.encode(x)
        if self.bug == "noise of all particles":
            loc = loc + torch.randn_like(loc)
        with pyro.plate("data", len(x), dim=-1):
            return pyro.sample("z", dist.Normal(loc, scale).to_event(1))


class Cached(Small):
    def encode(self, x):
        key = {"cache by shape": x.shape, "cache by tensor": (x.data_ptr(), x.shape)}.get(self.bug)
        if key is None:
            return super().encode(x)
        self._cache = getattr(self, "_cache", {})
        if key not in self._cache:
            self._cache[key] = tuple(value.detach() for value in super().encode(x))
        return self._cache[key]


class Gaussian(dist.TorchDistribution):
    """A diagonal Gaussian written by hand, with a memory of its last sample."""

    arg_constraints = {}  # noqa: RUF012
    has_rsample = True

    def __init__(self, loc, scale, bug=None):
        self.loc, self.scale, self.bug = loc, scale, bug
        super().__init__(loc.shape[:-1], loc.shape[-1:], validate_args=False)

    def expand(self, batch_shape, _instance=None):
        shape = (*batch_shape, *self.event_shape)
        return Gaussian(self.loc.expand(shape), self.scale.expand(shape), self.bug)

    def rsample(self, sample_shape=()):
        shape = self._extended_shape(sample_shape)
        loc, scale = self.loc.expand(shape), self.scale.expand(shape)
        if self.bug == "tile" and len(sample_shape) == 1:
            loc = self.loc.repeat_interleave(sample_shape[0], 0).view(shape)
        if self.bug == "detached":
            loc = loc.detach()
        noise = torch.randn(shape, dtype=loc.dtype)
        if self.bug == "shared noise":
            noise = noise[..., :1, :].expand(shape)
        if self.bug == "one draw":
            noise = torch.randn(shape[-2:], dtype=loc.dtype).expand(shape)
        self.last = loc + scale * noise
        return self.last

    def log_prob(self, value):
        if self.bug == "stale sample":
            value = getattr(self, "last", value)
        log_q = dist.Normal(self.loc, self.scale).to_event(1).log_prob(value)
        if self.bug == "density of all samples" and value.dim() == 3:
            log_q = log_q + 20 * math.log(len(value))
        return log_q


class ByHand(Small):
    def posterior(self, x):
        return Gaussian(*self.encode(x)[1:], self.bug)


class Encoded(Small):
    def encode(self, x):
        features, loc, scale = super().encode(x.flip(0) if self.bug == "order" else x)
        if self.bug == "dtype":
            loc = loc @ torch.eye(loc.shape[-1], dtype=torch.float32)
        if self.bug == "overflow":
            scale = scale * 1e30 * 1e30
        if self.bug == "centred":
            loc = loc - loc.mean(0)
        if self.bug == "half detached":
            scale = torch.cat([scale[:, :1], scale[:, 1:].detach()], -1)
        if self.bug == "no image":
            loc, scale = 0 * loc + self.loc.bias, 0 * scale + self.log_scale.bias.exp()
        return features, loc, scale


class Refined(Small):
    """One gradient step on each image's own ELBO, with noise of its own."""

    def posterior(self, x):
        (model,) = self._model
        _, loc, scale = self.encode(x)
        with torch.enable_grad():
            at = loc if loc.requires_grad else loc.detach().requires_grad_()
            z = at + scale * torch.randn_like(scale)
            log_joint = model.log_joint(x, z)
            objective = log_joint.mean() if self.bug == "batch mean" else log_joint.sum()
            (gradient,) = torch.autograd.grad(objective, at, create_graph=loc.requires_grad)
        return dist.Normal(loc + 0.1 * gradient, scale).to_event(1)


class Sinh(torch.distributions.Transform):
    """z = sinh(a z₀) / a in each dimension."""

    domain = codomain = torch.distributions.constraints.real
    bijective = True

    def __init__(self, a, sign):
        super().__init__()
        self.a, self.direction = a, sign

    def _call(self, x):
        return torch.sinh(self.a * x) / self.a

    def _inverse(self, y):
        return torch.asinh(self.a * y) / self.a

    def log_abs_det_jacobian(self, x, y):
        return self.direction * torch.log(torch.cosh(self.a * x))


class Flow(Small):
    def __init__(self, model, bug=None):
        super().__init__(model, bug)
        self.context = nn.Linear(8, model.latent_dim)

    def posterior(self, x):
        features, loc, scale = self.encode(x)
        context = (0 if self.bug == "no context" else 1) * self.context(features)
        transform = Sinh(0.5 + context.sigmoid(), -1 if self.bug == "log-determinant" else 1)
        return dist.TransformedDistribution(dist.Normal(loc, scale), [transform]).to_event(1)


class WeighedMixture(dist.MixtureSameFamily):
    """A mixture of two components, with mistakes in its weights."""

    bug = None

    def log_prob(self, value):
        logits = self.mixture_distribution.logits
        if self.bug == "weights that sum to three":
            logits = logits + math.log(3)
        if self.bug == "exchanged weights in the density":
            logits = logits.flip(-1)
        parts = self.component_distribution.log_prob(value.unsqueeze(-2))
        return (logits + parts).logsumexp(-1)


class Mixture(Small):
    def __init__(self, model, bug=None):
        super().__init__(model, bug)
        self.gate = nn.Linear(8, 2)

    def posterior(self, x):
        features, loc, scale = self.encode(x)
        shift = torch.tensor([[-1.0], [1.0]], dtype=loc.dtype)
        logits = self.gate(features) + torch.tensor([0.0, 1.0], dtype=loc.dtype)
        parts = dist.Normal(loc.unsqueeze(-2) + shift, 0.5 * scale.unsqueeze(-2)).to_event(1)
        kind = type("WeighedMixture", (WeighedMixture,), {"bug": self.bug})
        return kind(dist.Categorical(logits=logits), parts)


class Apart(Small):
    """A trace and a posterior written separately."""

    def forward(self, x):
        _, loc, scale = self.encode(x)
        if self.bug == "variance":
            scale = scale**2
        with pyro.plate("data", len(x), dim=-1):
            return pyro.sample("z", dist.Normal(loc, scale).to_event(1))


class Auxiliary(Small):
    """z = loc + u + ..., with u an auxiliary site that posterior(x) integrates out."""

    def posterior(self, x):
        _, loc, scale = self.encode(x)
        extra = 0.0 if self.bug == "spread left out" else 0.09
        return dist.Normal(loc, (scale**2 + extra).sqrt()).to_event(1)

    def forward(self, x):
        _, loc, scale = self.encode(x)
        with pyro.plate("data", len(x), dim=-1):
            q_u = dist.Normal(torch.zeros_like(loc), 0.3).to_event(1)
            u = pyro.sample("u", q_u, infer={"is_auxiliary": True})
            return pyro.sample("z", dist.Normal(loc + u, scale).to_event(1))


class UnscaledELBO(Trace_ELBO):  # takes log densities whatever their scale
    def differentiable_loss(self, model, guide, x):
        return super().differentiable_loss(model.program, guide.program, x)


class Global(Encoder):
    """A global random shift of the mean, without posterior(x)."""

    def __init__(self, model, bug=None):
        super().__init__(model, bug)
        p = model.latent_dim
        self.w_loc, self.w_log_scale = nn.Parameter(torch.ones(p)), nn.Parameter(torch.zeros(p) - 1)

    def global_prior(self):
        zero = torch.zeros_like(self.w_loc)
        return {"w": dist.Normal(zero, zero + 1).to_event(1)}

    def forward(self, x):
        _, loc, scale = self.encode(x)
        q_w = dist.Normal(self.w_loc, self.w_log_scale.exp()).to_event(1)
        (prior,) = self.global_prior().values()
        with pyro.poutine.mask(mask=self.bug != "missing 1/N"):
            w = pyro.sample("w", q_w)
        with pyro.plate("data", len(x), dim=-1):
            if self.bug == "missing 1/N":
                kl = torch.distributions.kl_divergence(q_w, prior)
                pyro.factor("kl", kl.expand(len(x)), has_rsample=True)
            return pyro.sample("z", dist.Normal(loc + w, scale).to_event(1))

    def elbo(self):
        return UnscaledELBO() if self.bug == "sum over the batch" else TraceMeanField_ELBO()


class Permuted(Small):
    def __init__(self, model, bug=None):
        super().__init__(model, bug)
        order = torch.randperm(16)
        if bug == "not saved":
            self.order = order
        else:
            self.register_buffer("order", order)

    def encode(self, x):
        return super().encode(x.flatten(1)[:, self.order])


class Blocks(Small):
    def blocks(self, model):
        elbo = TraceMeanField_ELBO()
        blocks = [Block(elbo, list(self.parameters())), Block(elbo, list(model.parameters()))]
        return blocks[:1] if self.bug == "model left out" else blocks


SOUND = [Small, Sites, Traced, Random, ByHand, Refined, Flow, Mixture, Apart, Auxiliary, Global]
SOUND += [Permuted, Blocks]

# fmt: off
_BUGS = {  # the promise that a bug breaks
    Sites: {"site name": "sites", "no plate": "sites", "plate name": "sites",
            "plate of N": "sites", "unknown site": "sites", "scale": "sites", "mask": "sites"},
    Traced: {"noise of all particles": "noise"},
    Encoded: {"dtype": "copy", "overflow": "finite", "no image": "image",
              "centred": "batch", "order": "batch", "half detached": "gradient"},
    Random: {"numpy": "seed"},
    Cached: {"cache by shape": "memory", "cache by tensor": "memory"},
    ByHand: {"stale sample": "memory", "shared noise": "noise", "one draw": "noise",
             "tile": "batch", "detached": "pathwise", "density of all samples": "chunks"},
    Refined: {"batch mean": "chunks"},
    Flow: {"no context": "gradient", "log-determinant": "evidence"},
    Blocks: {"model left out": "gradient"},
    Mixture: {"weights that sum to three": "evidence",
              "exchanged weights in the density": "evidence"},
    Apart: {"variance": "trace"},
    Auxiliary: {"spread left out": "trace"},
    Global: {"missing 1/N": "scale", "sum over the batch": "scale"},
    Permuted: {"not saved": "save"},
}
BUGS = [(kind, bug, promise) for kind, bugs in _BUGS.items() for bug, promise in bugs.items()]
#: What the error says about some of them.
WORDS = {
    "scale": "'z' has the scale 0.5 in the guide and 1 in the model",
    "mask": "'z' is masked in the guide",
    "noise of all particles": "torch.randn outside pyro.sample",
    "half detached": r"guide.log_scale.weight \(8 of 16 elements\)",
    "plate of N": "takes 4 of its members",
}
