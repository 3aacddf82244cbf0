r"""Eq. (2) of the supplement with Pyro's own ELBO estimators: the scale of every site."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from pyro.infer.enum import get_importance_trace
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_gpvae.model import DATA_PLATE
from pyro_gpvae.program import Program

__all__ = ["Objective", "PerImage", "elbo_terms", "in_data_plate"]


def in_data_plate(site: Any) -> bool:
    """Whether a site of a Pyro trace belongs to an image, that is, lies in ``plate("data")``."""
    return any(frame.name == DATA_PLATE for frame in site["cond_indep_stack"])


class Objective(Protocol):
    """What training needs of an objective: the part of :class:`pyro.infer.ELBO` it calls."""

    def differentiable_loss(self, model: Any, guide: Any, x: Tensor, /) -> Tensor:
        """Returns minus the ELBO of a batch of images, with its gradient."""


class PerImage(Program):
    r"""A model or guide whose sites are scaled so that an ELBO estimates eq. (2) per image.

    .. math::
        E_{q(z|x)}[\log p(x|z)] - E_{q(W,U)}[KL(q(z|x,W,U) \| p(z))]
        - \tfrac{1}{N} KL(q(W,U) \| N(0, I)),

    averaged over the minibatch. Sites inside ``plate("data", B)`` weigh 1/B, global ones 1/N.
    That is Pyro's ``plate("data", N, subsample_size=B)`` under ``poutine.scale(scale=1/N)``, for
    programs that need not know N. Wrap model **and** guide: a scale on one of them alone trains
    the wrong objective without any warning.

    Arguments:
        program: A Pyro model or guide of images x (B, C, H, W).
        num_images: The number N of training images, never the batch size.

    Raises:
        ValueError: If num_images is not positive.

    Example:
        >>> from pyro.infer import SVI, Trace_ELBO
        >>> from pyro.optim import Adam
        >>> from pyro_gpvae import ImageModel
        >>> from guides import GPGuide
        >>> model = ImageModel((1, 28, 28), latent_dim=2)
        >>> guide = GPGuide(model)
        >>> pair = PerImage(model.pair(guide), 60_000), PerImage(guide, 60_000)
        >>> loss = SVI(*pair, Adam({"lr": 5e-4}), Trace_ELBO()).step(torch.rand(8, 1, 28, 28))
    """

    def __init__(self, program: Callable[..., Any], num_images: int) -> None:
        super().__init__()
        if num_images < 1:
            raise ValueError(f"num_images must be at least 1, got {num_images}")
        self.program = program
        self.num_images = num_images

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with _PerImageScale(self.num_images):
            return self.program(*args, **kwargs)


class _PerImageScale(Messenger):
    def __init__(self, num_images: int) -> None:
        super().__init__()
        self.num_images = num_images

    def _pyro_sample(self, msg: Any) -> None:
        sizes = [f.size for f in msg["cond_indep_stack"] if f.name == DATA_PLATE]
        msg["scale"] = msg["scale"] / (sizes[0] if sizes else self.num_images)


@torch.no_grad()
def elbo_terms(
    model: Callable[[Tensor], Any], guide: Callable[[Tensor], Any], x: Tensor, num_images: int
) -> dict[str, float]:
    """Estimates the terms of eq. (2) from one draw of the guide, in nats per image.

    Returns:
        ``log_likelihood`` (expected log p(x|z)), ``kl_z``, and ``kl_global`` (KL(q(W,U)‖p)/N);
        their signed sum is the ELBO. Sites under a mask count as the mask says.
    """
    model_trace, guide_trace = get_importance_trace(
        "flat", 1, PerImage(model, num_images), PerImage(guide, num_images), (x,), {}
    )
    terms = dict.fromkeys(("log_likelihood", "kl_z", "kl_global"), 0.0)
    for trace, sign in ((model_trace, 1.0), (guide_trace, -1.0)):
        for site in trace.nodes.values():
            if site["type"] != "sample":
                continue
            value = sign * float(site["log_prob_sum"])
            if site["is_observed"] and trace is model_trace:
                terms["log_likelihood"] += value
            else:
                terms["kl_z" if in_data_plate(site) else "kl_global"] -= value
    return terms
