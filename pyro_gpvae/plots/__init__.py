r"""Pictures: pure functions from arrays and tables to matplotlib figures.

Every figure is built without pyplot, so that no global state changes and no display is needed.
``figure.savefig("name.png")`` writes it. This room imports no other room; ``runs``, ``cli`` and
experiments use it.
"""

from pyro_gpvae.plots.curves import loss_curves
from pyro_gpvae.plots.gap import gap_ladder, uncertainty_scatter
from pyro_gpvae.plots.generation import active_units_chart, traversals
from pyro_gpvae.plots.images import image_grid, image_table, reconstructions, uncertain_images
from pyro_gpvae.plots.posterior import posterior_panels

__all__ = [
    "active_units_chart",
    "gap_ladder",
    "image_grid",
    "image_table",
    "loss_curves",
    "posterior_panels",
    "reconstructions",
    "traversals",
    "uncertain_images",
    "uncertainty_scatter",
]
