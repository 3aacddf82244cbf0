"""Measures how well a model explains images, and how well a guide infers.

Evaluators take a Pyro model, a guide and images (uint8 or floats), and compute in the dtype and on
the device of the parameters. They leave modules, buffers, Pyro's store and, given a seed, the
random state as they found them. This package imports ``core``, ``data`` and ``model`` only.
"""

from pyro_gpvae.evaluation._autoguides import Autoguide, load_autoguide, optimise_autoguide
from pyro_gpvae.evaluation.importance import PARETO_LIMIT, log_evidence
from pyro_gpvae.evaluation.optimum import (
    Covariance,
    InstanceOptimum,
    check_optimum_options,
    optimise_gaussian,
)
from pyro_gpvae.evaluation.reference import WIDTHS, reference_evidence

__all__ = [
    "PARETO_LIMIT", "WIDTHS", "Autoguide", "Covariance", "InstanceOptimum",
    "check_optimum_options", "load_autoguide", "log_evidence", "optimise_autoguide",
    "optimise_gaussian", "reference_evidence",
]  # fmt: skip
