r"""Pictures: pure functions from arrays and tables to a matplotlib figure.

Every figure is built without pyplot, so that nothing global changes and no display is needed;
``figure.savefig("name.png")`` writes it.
"""

from pyro_gpvae.plots.curves import gap_against_time, loss_curves
from pyro_gpvae.plots.images import image_grid, reconstructions, uncertain_images

__all__ = ["gap_against_time", "image_grid", "loss_curves", "reconstructions", "uncertain_images"]
