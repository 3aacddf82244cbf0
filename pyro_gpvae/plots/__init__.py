r"""Pictures: pure functions from arrays and tables to matplotlib figures.

Every figure is built without pyplot, so that no global state changes and no display is needed.
``figure.savefig("name.png")`` writes it. It imports no other package; ``runs``, ``cli`` and
experiments use it.
"""

from pyro_gpvae.plots import _matplotlib  # first  # noqa: F401
from pyro_gpvae.plots.curves import loss_curves
from pyro_gpvae.plots.gap import gap_ladder, uncertainty_scatter
from pyro_gpvae.plots.images import (
    image_grid,
    missed_images,
    reconstructions,
    uncertain_images,
)
from pyro_gpvae.plots.latent import latent_map
from pyro_gpvae.plots.posterior import posterior_panels

__all__ = [
    "gap_ladder",
    "image_grid",
    "latent_map",
    "loss_curves",
    "missed_images",
    "posterior_panels",
    "reconstructions",
    "uncertain_images",
    "uncertainty_scatter",
]
