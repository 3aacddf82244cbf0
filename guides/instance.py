"""The instance-wise optimum as a guide: each image has its own posterior, without amortisation."""

from __future__ import annotations

from typing import Any

from pyro.distributions import TorchDistribution
from torch import Tensor

from pyro_gpvae.core._programs import BorrowedModules, Program
from pyro_gpvae.evaluation import (
    Autoguide,
    Covariance,
    InstanceOptimum,
    check_optimum_options,
    load_autoguide,
    optimise_autoguide,
    optimise_gaussian,
)
from pyro_gpvae.model.density import sample_posterior

__all__ = ["InstanceGuide"]


class InstanceGuide(Program):
    """The Gaussian of highest ELBO of each image: the reference for the amortisation gap.

    The guide has no parameters. It calls
    :func:`pyro_gpvae.evaluation.optimum.optimise_gaussian`, which explains the method, for every
    batch, and serves as the proposal of :func:`pyro_gpvae.log_evidence` for any model.

    Arguments:
        model: The model, any Pyro program whose latents are continuous.
        covariance: "diagonal" or "full".
        warm_start: A guide, whose posterior mean is the start where its q(z|x) is known.
        tolerance: The tolerance of the ELBO of an image, in nats.
        max_steps: The largest number of steps; by default 200, and 3000 of Adam with an autoguide.
        num_starts: The number of starting points of the search for a mode.
        autoguide: A class of :mod:`pyro.infer.autoguide`, its name, or a function from a Pyro
            model to a guide, which takes the place of the Gaussian; see
            :func:`pyro_gpvae.evaluation.optimise_autoguide`.

    Raises:
        ValueError: If an option is unknown, or a number is not positive.

    Example:
        >>> import torch
        >>> from pyro_gpvae import ImageModel
        >>> guide = InstanceGuide(ImageModel((1, 28, 28), latent_dim=2))
        >>> guide.optimise(torch.rand(3, 1, 28, 28)).converged
        tensor([True, True, True])
    """

    def __init__(
        self,
        model: Any,
        covariance: Covariance = "diagonal",
        *,
        warm_start: Any = None,
        tolerance: float = 0.05,
        max_steps: int | None = None,
        num_starts: int = 2,
        autoguide: Autoguide | None = None,
    ) -> None:
        super().__init__()
        if autoguide is not None and covariance != "diagonal":
            raise ValueError(
                f"covariance={covariance!r} with an autoguide: its family determines the covariance"
            )
        if max_steps is None:
            max_steps = 200 if autoguide is None else 3000
        check_optimum_options(covariance, tolerance, max_steps, num_starts)
        self.covariance: Covariance = covariance
        self.tolerance = tolerance
        self.max_steps = max_steps
        self.num_starts = num_starts
        self.autoguide = None if autoguide is None else load_autoguide(autoguide)
        # in tuples, so that their parameters are not this guide's
        self._model, self._start = BorrowedModules((model,)), BorrowedModules((warm_start,))

    def optimise(self, *batch: Tensor) -> InstanceOptimum:
        """Optimises the posterior of each member of a batch, such as images (B, C, H, W).

        Raises:
            torch.linalg.LinAlgError: If the curvature of an image's log joint is not finite;
                names the image.
        """
        (model,), (start,) = self._model, self._start
        options: Any = {
            "start": start,
            "tolerance": self.tolerance,
            "max_steps": self.max_steps,
            "num_starts": self.num_starts,
        }
        if self.autoguide is not None:
            return optimise_autoguide(model, batch, self.autoguide, **options)
        return optimise_gaussian(model, batch, self.covariance, **options)

    def posterior(self, *batch: Tensor) -> TorchDistribution:
        """Returns q*(z|x), batch shape (B,), event shape (p,); warns of images not converged.

        For a model with several latent sites, or constrained ones, it is a
        :class:`pyro_gpvae.model.density.LatentPosterior`.
        """
        optimum = self.optimise(*batch)
        optimum.warn_unless_converged()
        return optimum.posterior

    def forward(self, *batch: Tensor) -> None:
        optimum = self.optimise(*batch)
        optimum.warn_unless_converged()
        density = optimum.density
        name, plate = next(iter(density.sites)), density.structure.plate
        sample_posterior(optimum.posterior, len(density), plate, name)
