r"""Pyro guides for variational autoencoders: one family a file."""

from guides.covariance import FullCovarianceGuide, LowRankGuide
from guides.gaussian import GaussianGuide
from guides.gp import GPGuide
from guides.householder import HouseholderGuide
from guides.iaf import IAFGuide
from guides.instance import InstanceGuide
from guides.iterative import IterativeGuide
from guides.laplace import LaplaceGuide
from guides.mixture import MixtureGuide
from guides.recursive_mixture import RecursiveMixtureGuide
from guides.semi_amortized import SemiAmortizedGuide

__all__ = [
    "FullCovarianceGuide",
    "GPGuide",
    "GaussianGuide",
    "HouseholderGuide",
    "IAFGuide",
    "InstanceGuide",
    "IterativeGuide",
    "LaplaceGuide",
    "LowRankGuide",
    "MixtureGuide",
    "RecursiveMixtureGuide",
    "SemiAmortizedGuide",
]
