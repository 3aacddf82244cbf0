r"""Rényi's bound of each image, with the importance-weighted bound of IWAE as a special case."""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro.infer import RenyiELBO
from torch import Tensor

from pyro_gpvae.core._plates import data_plate, in_plate
from pyro_gpvae.model.elbo import DifferentiableELBO, sample_sites

__all__ = ["PerImageRenyiELBO"]


class PerImageRenyiELBO(DifferentiableELBO, RenyiELBO):
    r""":class:`pyro.infer.RenyiELBO` of every member of a batch, instead of their sum.

    .. math::
        \frac{1}{B} \sum_n \frac{1}{1 - \alpha} \log \frac{1}{K} \sum_{k=1}^K
        \Bigl[ \frac{p(x_n, z_{nk})}{q(z_{nk}|x_n)} \Bigr]^{1 - \alpha}

    :math:`\alpha = 0` is the bound of importance-weighted autoencoders (Burda et al., 2016).
    :func:`pyro_gpvae.fit` uses it for ``elbo=RenyiELBO(...)``. Model and guide must be
    :class:`~pyro_gpvae.PerImage`, without global sites, and the guide's sites reparametrised.
    """

    def unread_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Returns minus the bound; raises ValueError if the guide's sites are other ones."""
        particles = []
        for traces in self._get_traces(model, guide, args, kwargs):  # type: ignore[no-untyped-call]
            model_terms, guide_terms = (self._per_image(trace, len(args[0])) for trace in traces)
            particles.append(model_terms - guide_terms)
        # one trace holds all particles if they are vectorised
        log_weights = (1 - self.alpha) * torch.cat(particles)
        bound = log_weights.logsumexp(0) - math.log(len(log_weights))
        return -bound.mean() / (1 - self.alpha)

    def _per_image(self, trace: Any, batch_size: int) -> Tensor:
        """Returns the log density of a trace for each particle and image, (K, B)."""
        trace.compute_log_prob()
        plate = data_plate(trace.nodes, batch_size)
        vectorised = self.vectorize_particles and self.num_particles > 1
        count = self.num_particles if vectorised else 1
        terms = []
        for site in sample_sites(trace):
            name = site["name"]
            if not in_plate(site, plate):
                raise ValueError(
                    f"RenyiELBO compares draws of one image, but the site {name!r} is global: use "
                    "Trace_ELBO or TraceMeanField_ELBO"
                )
            if not (site["is_observed"] or site["fn"].has_rsample):
                raise ValueError(
                    f"the site {name!r} has no reparametrised samples, which RenyiELBO needs: use "
                    "Trace_ELBO"
                )
            # PerImage has divided by B
            terms.append(batch_size * site["log_prob"].reshape(count, -1, batch_size).sum(1))
        return torch.stack(terms).sum(0)
