r"""Pyro guides for variational autoencoders: one family a file."""

from guides.gaussian import GaussianGuide
from guides.gp import GPGuide

__all__ = ["GPGuide", "GaussianGuide"]
