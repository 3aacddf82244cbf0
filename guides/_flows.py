r"""The distribution of a Gaussian after conditional transforms, which IAF and HF share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from pyro.distributions.conditional import ConditionalTransform
from torch import Size, Tensor
from torch.distributions import constraints

from pyro_gpvae.core._errors import check_finite

__all__ = ["FlowPosterior"]


class FlowPosterior(TorchDistribution):
    r"""Distribution of :math:`z = f_T \circ \dots \circ f_1(z_0)`, :math:`z_0 \sim` base.

    .. math:: \log q(z) = \log q_0(z_0) - \sum_t \log |\det \partial f_t / \partial z_{t-1}|

    It equals Pyro's ``ConditionalTransformedDistribution`` except for the cache. There each
    transform caches its last input and output and is part of a reference cycle, so that samples
    and their graphs live until Python's garbage collector runs. Here the density of the last sample
    is computed with it and kept with the distribution, so that scoring this tensor is free. Any
    other tensor, even an equal one, is scored by inverting the transforms, which takes p passes of
    the network for each IAF step.

    A kept density depends on the parameters through the computation of the sample. To
    differentiate the density with respect to z alone, score ``z.detach().requires_grad_()``.

    Arguments:
        base: A reparametrised distribution with batch shape (B,) and event shape (p,).
        steps: Pyro's conditional transforms, in the order of sampling.
        context: The features that condition them, (B, d).

    Raises:
        NonFiniteError: If z overflows in a step, forward or backward. Names the images.
    """

    arg_constraints = {}  # noqa: RUF012
    support = constraints.real_vector
    has_rsample = True

    def __init__(
        self,
        base: TorchDistribution,
        steps: Iterable[Any],
        context: Tensor,
        validate_args: bool | None = None,
    ) -> None:
        self.base = base
        self.steps = tuple(steps)
        self.context = context
        self._last: tuple[Any, ...] | None = None
        super().__init__(base.batch_shape, base.event_shape, validate_args=validate_args)

    def expand(
        self, batch_shape: Size | list[int] | tuple[int, ...], _instance: Any = None
    ) -> FlowPosterior:
        new = self._get_checked_instance(FlowPosterior, _instance)  # type: ignore[no-untyped-call]
        new.base = self.base.expand(batch_shape)
        new.steps = self.steps
        new.context = self.context
        new._last = None
        super(FlowPosterior, new).__init__(
            torch.Size(batch_shape), self.event_shape, validate_args=False
        )
        new._validate_args = self._validate_args
        return new

    def rsample(self, sample_shape: Size | list[int] | tuple[int, ...] = ()) -> Tensor:
        z: Tensor = self.base.rsample(torch.Size(sample_shape))
        if z.numel() == 0:  # torch cannot sum over the dimensions of no numbers
            return z
        log_q = self.base.log_prob(z)
        for t, step in enumerate(self.steps, start=1):
            z, log_det = self._apply(step, z)
            check_finite(f"z after step {t} of the flow", z)
            log_q = log_q - log_det
        self._last = z, log_q, _version(z), torch.is_grad_enabled()
        return z

    def log_prob(self, value: Tensor) -> Tensor:
        if value.numel() == 0:
            return value.sum(-1)
        if self._validate_args:
            self._validate_sample(value)
        if self._last is not None and value is self._last[0]:
            _, known, version, has_graph = self._last
            # unchanged since it was drawn, and with a graph if one is needed
            if version == _version(value) and (has_graph or not torch.is_grad_enabled()):
                return known
        shape = torch.broadcast_shapes(value.shape, self.batch_shape + self.event_shape)
        z = value.expand(shape)
        log_det = z.new_zeros(())
        for step in reversed(self.steps):
            z, log_det_of_step = self._apply(step, z, inverse=True)
            log_det = log_det + log_det_of_step
        check_finite("z before the flow", z)
        return self.base.log_prob(z) - log_det

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out the last sample: a copy of a tensor is never the tensor that was drawn."""
        return vars(self) | {"_last": None}

    def _apply(
        self, step: ConditionalTransform, value: Tensor, inverse: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Returns the output (or input) of a step, and log |det| of its Jacobian at the input."""
        transform = step.condition(self.context)
        other: Tensor = transform.inv(value) if inverse else transform(value)
        ends = (other, value) if inverse else (value, other)
        log_det: Tensor = transform.log_abs_det_jacobian(*ends)
        # the transform refers to itself and to its cache; without attributes both are freed now
        vars(transform).clear()
        return other, log_det


def _version(z: Tensor) -> int | None:
    """Returns the number of in-place changes; None for tensors of ``torch.inference_mode``."""
    return None if z.is_inference() else z._version
