"""Measures how well a model explains images, and how well a guide infers.

* ``importance``: log weights and IWAE; ``annealing``: AIS and BDMC; ``reference``: the most
  reliable estimate of log p(x) of each image.
* ``optimum``: the Gaussian of highest ELBO of each image; ``gap``: the parts of the inference gap.
* ``uncertainty``, ``posterior_grid``: what a random encoder knows about its own errors.
* ``generation``, ``active_units``: samples, reconstructions, used latent dimensions.

Evaluators take a Pyro model, a guide and images (uint8 or floats), and compute in the dtype and on
the device of the parameters. They leave modules, buffers, Pyro's store and, given a seed, the
random state as they found them. This room imports ``core``, ``data`` and ``model`` only.
"""

from pyro_gpvae.evaluation._autoguides import Autoguide, load_autoguide, optimise_autoguide
from pyro_gpvae.evaluation.annealing import (
    AnnealedEvidence,
    Sandwich,
    annealed_evidence,
    bidirectional,
)
from pyro_gpvae.evaluation.gap import Gap, decompose
from pyro_gpvae.evaluation.importance import (
    PARETO_LIMIT,
    Evidence,
    ParetoWarning,
    evidence_curve,
    log_evidence,
    log_weights,
    pareto_k,
)
from pyro_gpvae.evaluation.optimum import (
    Covariance,
    InstanceOptimum,
    check_optimum_options,
    optimise_gaussian,
)
from pyro_gpvae.evaluation.reference import WIDTHS, ReferenceEvidence, reference_evidence

__all__ = [
    "PARETO_LIMIT",
    "WIDTHS",
    "AnnealedEvidence",
    "Autoguide",
    "Covariance",
    "Evidence",
    "Gap",
    "InstanceOptimum",
    "ParetoWarning",
    "ReferenceEvidence",
    "Sandwich",
    "annealed_evidence",
    "bidirectional",
    "check_optimum_options",
    "decompose",
    "evidence_curve",
    "load_autoguide",
    "log_evidence",
    "log_weights",
    "optimise_autoguide",
    "optimise_gaussian",
    "pareto_k",
    "reference_evidence",
]
