r"""VLAE: the Laplace approximation at a refined mean, by Jacobians of the decoder."""

from __future__ import annotations

from functools import partial
from typing import Literal, get_args

import pyro.distributions as dist
from torch import Tensor, nn

from guides.gaussian import GaussianGuide
from guides.refinement import RefinementELBO, sample_refined
from pyro_gpvae.core._errors import check_at_least, check_finite
from pyro_gpvae.core._programs import BorrowedModules
from pyro_gpvae.model.curvature import (
    STEP_SIZES,
    inverse_cholesky,
    line_search,
    linearize,
)
from pyro_gpvae.model.elbo import Objective
from pyro_gpvae.model.image_model import ImageModel

__all__ = ["LaplaceGuide", "LaplacePosterior"]

Step = Literal["line_search", "damped"]


class LaplaceGuide(GaussianGuide):
    r"""VLAE(T): T steps from the encoder's mean towards the mode, and the curvature there.

    .. math::
        \mu_0 &= m(x), \qquad J = \partial g / \partial z \text{ at } \mu_t, \qquad
        \Lambda = J^\top J / \sigma^2 + I \\
        \mu' &= \Lambda^{-1} J^\top (x - g(\mu_t) + J \mu_t) / \sigma^2, \qquad
        \mu_{t+1} = (1 - \alpha_t) \mu_t + \alpha_t \mu' \\
        q(z|x) &= N(z; \mu_T, \Lambda^{-1}), \qquad \Lambda \text{ at } \mu_T

    with full covariance. The difference :math:`\mu' - \mu_t = \Lambda^{-1} \nabla_z \log
    p(x, \mu_t)` is the Gauss-Newton step. For Bernoulli pixels of probability π it is the
    generalised Gauss-Newton step, with :math:`\Lambda = J^\top \mathrm{diag}(\pi (1 - \pi)) J + I`.
    Gradients flow through the steps and Λ to the encoder and the decoder. The encoder's s(x) is not
    used, so that T = 0 is not the VAE: its covariance is Λ⁻¹ at m(x).

    A whole Gauss-Newton step ends at the same point wherever it starts, so that it has no gradient
    for the encoder. With the line search the guide is therefore trained by
    :class:`guides.refinement.RefinementELBO`, which moves the starts towards the ends. The damped
    steps keep at least half of the gradient, and are trained by the ELBO, as published.

    Jacobians are exact for any decoder without batch statistics, by forward-mode differentiation:
    p products share one forward pass (:func:`pyro_gpvae.model.curvature.decoder_jacobian`). They
    are computed in the precision of the parameters. The cost for each image, in forward passes of
    the decoder (Table 1, p = 10, CPU), is about p + 3 for each of the T + 1 Jacobians, and 5 for
    the line search of each step.

    References:
        Park, Kim and Kim, *Variational Laplace Autoencoders*, 2019.
        https://proceedings.mlr.press/v97/park19a.html

    Arguments:
        model: The model, whose decoder and likelihood are used. Its parameters are not part of the
            guide.
        num_steps: T, at least 0.
        encoder, warm_start: See :class:`guides.gaussian.GaussianGuide`.
        step: "damped" is the published :math:`\alpha_t = 0.5 / (t + 1)`. "line_search" takes for
            each image the α of 1, ½, ¼, 0.1 and 0 that gives the highest log p(x, z), so that no
            step lowers it.

    Raises:
        ValueError: If num_steps is negative, the step is unknown, or the model has no decoder.
        torch.linalg.LinAlgError: From :meth:`posterior`, if the precision of an image is
            singular or not finite. Names the image.
        NonFiniteError: From :meth:`posterior`, if a mean is not finite. Names the image.

    Example:
        >>> import torch
        >>> from pyro_gpvae import ImageModel
        >>> guide = LaplaceGuide(ImageModel((1, 28, 28), latent_dim=3), 1)
        >>> guide.posterior(torch.zeros(5, 1, 28, 28)).covariance_matrix.shape
        torch.Size([5, 3, 3])
    """

    def __init__(
        self,
        model: ImageModel,
        num_steps: int = 2,
        encoder: nn.Module | None = None,
        *,
        step: Step = "line_search",
        warm_start: GaussianGuide | None = None,
    ) -> None:
        check_at_least(0, num_steps=num_steps)
        if step not in get_args(Step):
            raise ValueError(f"step must be one of {get_args(Step)}, got {step!r}")
        if not isinstance(getattr(model, "decoder", None), nn.Module):
            raise ValueError(
                f"{type(self).__name__} differentiates model.decoder, which the model "
                f"{type(model).__name__} does not have"
            )
        super().__init__(model, encoder, warm_start=warm_start)
        self.num_steps = num_steps
        self.step: Step = step
        self._model = BorrowedModules((model,))

    def posterior(self, x: Tensor) -> LaplacePosterior:
        """Returns N(μ_T, Λ⁻¹): batch shape (B,), event shape (p,)."""
        return self._refine(x)[0]

    def forward(self, x: Tensor) -> Tensor:
        return sample_refined(*self._refine(x))

    def elbo(self) -> Objective:
        """Returns RefinementELBO for steps with the line search, else the ELBO of Gaussians."""
        refines = self.num_steps > 0 and self.step == "line_search"
        return RefinementELBO() if refines else super().elbo()

    def _refine(self, x: Tensor) -> tuple[LaplacePosterior, list[Tensor]]:
        """Returns q(z|x), and the points μ_0, ..., μ_{T-1}."""
        (model,) = self._model
        _, loc, _ = self.encode(x)
        starts = []
        for t in range(self.num_steps):
            starts.append(loc)
            gradient, precision = linearize(model, x, loc)
            factor, _ = inverse_cholesky(precision)
            direction = (factor @ (factor.mT @ gradient.unsqueeze(-1))).squeeze(-1)
            sizes = STEP_SIZES if self.step == "line_search" else (0.5 / (t + 1),)
            loc = line_search(partial(model.log_joint, x), loc, direction.to(loc.dtype), sizes)
            check_finite(f"the mean after step {t + 1}", loc)
        _, precision = linearize(model, x, loc)
        factor, jitter = inverse_cholesky(precision)
        q = LaplacePosterior(loc, scale_tril=factor.to(loc.dtype))
        q.jitter = jitter
        return q, starts


class LaplacePosterior(dist.MultivariateNormal):
    """N(μ_T, Λ⁻¹) of each image.

    Attributes:
        jitter: What was added to the diagonal of Λ to factorise it, as a share of the mean of the
            diagonal, (B,). It is zero unless Λ is singular to rounding, see
            :func:`pyro_gpvae.model.curvature.inverse_cholesky`.
    """

    jitter: Tensor
