r"""The zoo: Pyro guides q(z|x) for models of images, one family in each file.

===================== ========= ===================================================================
class                 name      q(z|x), and where it comes from
===================== ========= ===================================================================
GaussianGuide         vae       N(m, diag s²) in one pass of an encoder. Kingma and Welling 2014
GPGuide               gp        the VAE with random, Gaussian-process m and log s. Kim 2022
FullCovarianceGuide   full      a Gaussian with the Cholesky factor of a full covariance
LowRankGuide          lowrank   a Gaussian with diagonal plus low-rank covariance. Ong et al. 2018
HouseholderGuide      hf        a Gaussian that reflections rotate. Tomczak and Welling 2016
IAFGuide              iaf       an inverse autoregressive flow of the Gaussian. Kingma et al. 2016
MixtureGuide          me        a mixture of M encoders, trained jointly
RecursiveMixtureGuide rme       a mixture that grows by one encoder at a time. Kim and Pavlovic 2020
SemiAmortizedGuide    sa        k gradient steps on the ELBO of each image. Kim et al. 2018
IterativeGuide        iterative T steps by a network that sees that gradient. Marino et al. 2018
LaplaceGuide          vlae      T Gauss-Newton steps, and the curvature there. Park et al. 2019
NewtonGuide           newton    T Newton steps, whose inverse Hessian is amortised
InstanceGuide         instance  the Gaussian of highest ELBO of each image, without an encoder
===================== ========= ===================================================================

All but the last extend :class:`guides.gaussian.GaussianGuide`: they share its encoder, and start
from a trained one with ``warm_start=``. A name is an entry point of the group
``pyro_gpvae.guides``; :mod:`pyro_gpvae.model.guide` states the contract. The guides may import
the packages core, model and evaluation of :mod:`pyro_gpvae`, which never imports them.
"""

from guides.covariance import FullCovarianceGuide, LowRankGuide
from guides.gaussian import GaussianGuide
from guides.gp import GPGuide
from guides.householder import HouseholderGuide
from guides.iaf import IAFGuide
from guides.instance import InstanceGuide
from guides.iterative import IterativeGuide
from guides.laplace import LaplaceGuide
from guides.mixture import MixtureGuide
from guides.newton import NewtonGuide
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
    "NewtonGuide",
    "RecursiveMixtureGuide",
    "SemiAmortizedGuide",
]
