r"""What the promises are checked with: disturbed copies of model and guide, and images."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from pyro_gpvae.model._precomputed import PrecomputedPosterior
from pyro_gpvae.model.networks import ImageShape
from pyro_gpvae.testing.quadrature import Quadrature
from pyro_gpvae.testing.tools import (
    Finding,
    Guide,
    Make,
    disturb,
    largest_gap,
    within,
    z_site,
)

__all__ = [
    "Kit",
    "all_equal",
    "fixed_noise",
    "log_density",
]


class Kit:
    """The guide and model under test, as disturbed copies, and the images."""

    def __init__(self, guide: Guide, model: Guide, x: Tensor, make: Make | None, seed: int) -> None:
        self.given = model, guide
        self.given_x = x
        self.build = make
        self.seed = seed
        self._quadrature: Quadrature | None = None

    def copy_given(self) -> None:
        """Sets ``model``, ``guide`` and ``x``; ``pristine``, which is only ever copied."""
        exact = isinstance(self.given[1], nn.Module)
        modules = [program for program in self.given if isinstance(program, nn.Module)]
        first = next((p for module in modules for p in module.parameters()), self.given_x)
        self.given_x = self.given_x.to(first)
        self.pristine = copy.deepcopy(self.given)
        for number, program in enumerate(self.pristine):
            if isinstance(program, nn.Module):
                disturb(program.double() if exact else program, self.seed + number)
                program.eval()
        self.x = self.given_x.double() if exact else self.given_x
        self.tolerance = 1e-6 if self.x.dtype == torch.float64 else 1e-3
        #: other images, different from those at the same positions
        self.other = 1 - self.x.roll(1, 0)
        self.model, self.guide = self.fresh()

    def fresh(self) -> tuple[Any, Any]:
        """Model and guide as they were before any call."""
        return copy.deepcopy(self.pristine)

    def make(self, model: Any, seed: int = 1) -> Any:
        """A new guide for another model, in evaluation mode and in the precision of x."""
        assert self.build is not None
        torch.manual_seed(self.seed + seed)
        guide: Any = self.build(model)
        return guide.to(self.x.dtype).eval() if isinstance(guide, nn.Module) else guide

    @property
    def image_shape(self) -> ImageShape:
        channels, height, width = self.x.shape[1:]
        return channels, height, width

    @property
    def latent_dim(self) -> int:
        return z_site(self.guide, self.x[:1])["value"].shape[-1]

    @torch.no_grad()
    def rows(self, guide: Any, x: Tensor, seed: int = 0) -> dict[str, Tensor]:
        """What a guide gives for images under a seed: tensors with one row an image."""
        torch.manual_seed(self.seed + seed)
        site = z_site(guide, x)
        z = site["value"]
        rows = {"z": z, "its log density": site["fn"].log_prob(z).unsqueeze(-1)}
        torch.manual_seed(self.seed + seed)
        q = None
        if hasattr(guide, "posterior"):
            q = guide.posterior(x)
            rows["1 sample"] = q.sample()
        draws, log_q = self.draws(guide, x, 3, q)
        return rows | {"3 samples": draws.transpose(0, 1), "their log density": log_q.mT}

    @torch.no_grad()
    def draws(self, guide: Any, x: Tensor, count: int, q: Any = None) -> tuple[Tensor, Tensor]:
        """Samples (K, B, p) as evaluation draws them, and their log density (K, B)."""
        if not hasattr(guide, "posterior"):
            site = z_site(guide, x, count)
            return site["value"], site["fn"].log_prob(site["value"])
        q = guide.posterior(x) if q is None else q
        z = q.sample((count,))
        return z, q.log_prob(z)

    def quadrature(self) -> Quadrature:
        if self._quadrature is None:
            self._quadrature = Quadrature(self)
        return self._quadrature


@torch.no_grad()
def fixed_noise(guide: Any, x: Tensor) -> Any:
    return PrecomputedPosterior(guide.posterior(x)) if hasattr(guide, "posterior") else guide


def log_density(kit: Kit, x: Tensor, z: Tensor) -> Tensor:
    """log q(z|x) (K, B) at given z (K, B, p), always under the same seed."""
    torch.manual_seed(kit.seed)
    q = kit.guide.posterior(x) if hasattr(kit.guide, "posterior") else z_site(kit.guide, x)["fn"]
    log_q: Tensor = q.log_prob(z)
    return log_q


def all_equal(kit: Kit, a: dict[str, Tensor], b: dict[str, Tensor], account: str) -> Finding:
    gaps = {what: largest_gap(a[what], b[what]) for what in a}
    what, gap = max(gaps.items(), key=lambda item: item[1])
    return within(gap, kit.tolerance, account.format(what=what, gap=gap))
