r"""A conformance kit: check in seconds that a guide keeps what training and evaluation rely on."""

from pyro_gpvae.testing.calibration import Calibration, simulation_based_calibration
from pyro_gpvae.testing.check import check_guide
from pyro_gpvae.testing.linear_gaussian import LinearGaussian, linear_gaussian
from pyro_gpvae.testing.report import GuideError, Promise, Report

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
