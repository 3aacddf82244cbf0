r"""Tests for guides, of this project and of anybody.

* :func:`check_guide` checks in seconds that a guide keeps what training and evaluation rely on.
* :func:`simulation_based_calibration` tests whether q(z|x) is the posterior of a model.
* :func:`linear_gaussian` builds a model with known posterior and evidence.

This package imports core, data, model and evaluation. No other package of the library imports it.
"""

from pyro_gpvae.testing.calibration import Calibration, simulation_based_calibration
from pyro_gpvae.testing.check import GuideError, Promise, Report, check_guide
from pyro_gpvae.testing.linear_gaussian import LinearGaussian, linear_gaussian

__all__ = [
    "Calibration",
    "GuideError",
    "LinearGaussian",
    "Promise",
    "Report",
    "check_guide",
    "linear_gaussian",
    "simulation_based_calibration",
]
