r"""The instance-wise optimum as a guide: a posterior of its own for each image."""

from pyro_gpvae.evaluation.optimum import InstanceGuide, InstanceOptimum

__all__ = ["InstanceGuide", "InstanceOptimum"]
