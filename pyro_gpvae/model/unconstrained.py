r"""Any Pyro program as a model of one real vector, for the amortised guides of this library."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_gpvae.core._plates import DATA_PLATE
from pyro_gpvae.core._programs import Program, PyroProgram, modules_of
from pyro_gpvae.data.batch import Batch, Data, to_batch
from pyro_gpvae.model._local import name_of
from pyro_gpvae.model.density import JointDensity

__all__ = ["UnconstrainedModel"]


class UnconstrainedModel(Program):
    r"""A Pyro program whose local latents are one real vector, the site ``"z"``.

    .. math::
        p(z) = N(z; 0, I), \qquad p(x|z) = \frac{p(x, u = z)}{N(z; 0, I)},

    where p(x, u) is the density of the program and its data for unconstrained latents, see
    :class:`pyro_gpvae.model.density.JointDensity`. The joint density, and therefore log p(x) and
    the true posterior, are those of the program; N(0, I) is only a reference, and not its prior.

    A guide that infers a real vector can be trained for this model, whatever the names, numbers,
    shapes and supports of the program's latents are: ``newton``, ``sa``, ``gp``, flows, mixtures
    and the Gaussians of this library, with an encoder for the data. ``vlae`` needs the decoder of
    an :class:`pyro_gpvae.ImageModel`.

    Arguments:
        program: A Pyro model of one tensor, whose local latents are continuous.
        example: A few members of the data, (B, ...), from which the shapes are taken.

    Attributes:
        latent_dim: The length p of z.
        image_shape: The shape of one member of the data.

    Raises:
        ValueError: If the data are several tensors, a parameter of the program is in no module
            (``pyro.param``), or :class:`pyro_gpvae.model.density.JointDensity` refuses the program.

    Example:
        >>> def program(counts):
        ...     with pyro.plate("data", len(counts)):
        ...         rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        ...         pyro.sample("counts", dist.Poisson(rate), obs=counts)
        >>> model = UnconstrainedModel(program, torch.tensor([3, 0, 5]))
        >>> model.latent_dim, model.constrain(torch.tensor([3]), torch.zeros(1, 1))
        (1, {'rate': tensor([1.])})
    """

    def __init__(self, program: PyroProgram, example: Data) -> None:
        super().__init__()
        batch = to_batch(example, program)
        if len(batch) != 1:
            raise ValueError(
                f"the data must be one tensor, got {len(batch)}: join them, for example by "
                "torch.cat(..., dim=-1), and take them apart in the program"
            )
        self.parts = nn.ModuleList(modules_of(program).values())
        self._check_parameters(program, batch)
        self._density = JointDensity(program, batch)
        self.latent_dim = self._density.dim
        self.image_shape = tuple(batch[0].shape[1:])
        self._zero: Tensor
        self.register_buffer("_zero", self._density.origin[0], persistent=False)

    def _check_parameters(self, program: PyroProgram, batch: Batch) -> None:
        with torch.no_grad(), poutine.block(), poutine.trace(param_only=True) as capture:
            program(*batch)
        own = {id(parameter) for parameter in self.parameters()}
        for name, site in capture.trace.nodes.items():
            value: Any = site["value"]
            if id(value.unconstrained()) not in own:
                raise ValueError(
                    f"the parameter {name!r} of {name_of(program)} is in no module, and would not "
                    "be trained: write the program as a torch.nn.Module with nn.Parameters"
                )

    def prior(self) -> TorchDistribution:
        """Returns the reference N(0, I): batch shape (), event shape (p,)."""
        return dist.Normal(self._zero, torch.ones_like(self._zero)).to_event(1)

    def likelihood(self, z: Tensor) -> TorchDistribution:
        """Returns p(x|z) for z (..., B, p), without draws: batch shape (..., B)."""
        return _Ratio(self, z)

    def log_joint(self, x: Tensor, z: Tensor) -> Tensor:
        """Returns log p(x, u = z) in nats, (..., B), for data x (B, ...) and z (..., B, p)."""
        density = self._density.of((x,))
        return density.log_prob(z.reshape(-1, *z.shape[-2:])).reshape(z.shape[:-1])

    def constrain(self, x: Tensor, z: Tensor) -> dict[str, Tensor]:
        """Returns the latent sites of the program by name, for data x (B, ...) and z (B, p)."""
        found = self._density.of((x,)).constrain(z)
        return {name: site["value"] for name, site in found.sites.items()}

    def forward(self, x: Tensor) -> Tensor:
        with pyro.plate(DATA_PLATE, len(x), dim=-1):
            z: Tensor = pyro.sample("z", self.prior())
            pyro.sample("x", self.likelihood(z), obs=x)
        return z


class _Ratio(TorchDistribution):
    """The density of data given z, relative to the reference N(0, I) of z."""

    arg_constraints = {}  # noqa: RUF012
    support = constraints.real

    def __init__(self, model: UnconstrainedModel, z: Tensor) -> None:
        self.model, self.z = model, z
        super().__init__(z.shape[:-1], torch.Size(model.image_shape), validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        return self.model.log_joint(value, self.z) - self.model.prior().log_prob(self.z)

    def expand(self, batch_shape: Any, _instance: Any = None) -> _Ratio:
        return _Ratio(self.model, self.z.expand(*batch_shape, self.z.shape[-1]))
