r"""The history of a training: one row for each epoch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyro_gpvae.core._errors import NonFiniteError, nonfinite_as_error
from pyro_gpvae.core._seeds import seeded
from pyro_gpvae.data.batch import Data, size_of, split_batch, take, to_batch
from pyro_gpvae.model.elbo import elbo_terms
from pyro_gpvae.model.guide import HasDiagnostics
from pyro_gpvae.training._batches import SAMPLE_SIZE
from pyro_gpvae.training._divergence import with_advice
from pyro_gpvae.training._state import TrainingState
from pyro_gpvae.training.checkpoint import Checkpoints
from pyro_gpvae.training.step import Backend

if TYPE_CHECKING:
    import pandas as pd

#: The columns of a history, apart from the guide's diagnostics.
COLUMNS = [
    *("epoch", "step", "loss", "log_likelihood", "kl_z", "kl_global", "sigma", "validation_elbo"),
    *("skipped", "seconds"),
]


@dataclass
class History:
    """One row for each epoch of a training, see :func:`fit`, and how its steps were made.

    ``best_epoch`` is the epoch whose parameters were kept, with ``keep_best``.
    """

    rows: list[dict[str, float]] = field(default_factory=list)
    backend: Backend = "eager"
    best_epoch: int | None = None

    def frame(self) -> pd.DataFrame:
        """Returns the rows as a table."""
        import pandas as pd

        return pd.DataFrame(self.rows)


def end_epoch(
    state: TrainingState, validation: Data | None, checkpoints: Checkpoints | None
) -> dict[str, float]:
    """Ends an epoch, and returns its row of the history."""
    step = state.training_step
    row: dict[str, float] = {"epoch": state.epoch + 1, "step": state.step}
    row["loss"] = state.end_epoch()
    try:
        # seeded: evaluation must not change the training's random numbers
        with seeded(state.options["seed"], step.device), nonfinite_as_error():
            row |= _terms(state, validation)
    except NonFiniteError as error:
        if step.counters.halt:
            found = NonFiniteError(f"not finite after step {state.step}: {error}", state.step)
            raise with_advice(found, state.skipped, checkpoints) from error
    return row | {"skipped": state.skipped, "seconds": state.seconds()}


def _terms(state: TrainingState, validation: Data | None) -> dict[str, float]:
    """The terms of eq. (2), σ, and the guide's diagnostics, on some training images."""
    model, guide = state.training_step.model, state.training_step.guide
    num_images = state.data.num_images
    sample = take(state.data.sample, slice(SAMPLE_SIZE))
    row = elbo_terms(model, guide, sample, num_images)
    sigma = getattr(model, "sigma", None)
    if isinstance(sigma, Tensor) and sigma.numel() == 1:
        row["sigma"] = float(sigma.detach())
    if isinstance(guide, HasDiagnostics):
        with torch.no_grad():
            for name, value in guide.diagnostics(*to_batch(sample, model, guide)).items():
                row[f"guide_{name}" if name in COLUMNS else name] = float(value)
    if validation is not None:
        row["validation_elbo"] = 0.0
        for part in split_batch(validation, SAMPLE_SIZE):
            terms = elbo_terms(model, guide, part, num_images)
            bound = terms["log_likelihood"] - terms["kl_z"]
            row["validation_elbo"] += len(part[0]) / size_of(validation) * bound
    return row
