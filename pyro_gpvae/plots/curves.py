r"""Training curves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from pyro_gpvae.plots._style import COLOURS, STYLES, finish, panels, tidy

__all__ = ["loss_curves"]


def loss_curves(histories: Mapping[str, pd.DataFrame], caption: str = "") -> Figure:
    """Draws the ELBO and the learned σ of each run, ``fit(...).frame()`` by label."""
    figure, ((left, right),) = panels(9, 4.2, columns=2)
    for index, (label, frame) in enumerate(histories.items()):
        style: dict[str, Any] = {
            "color": COLOURS[index % len(COLOURS)],
            "linestyle": STYLES[index % len(STYLES)],
            "marker": "o" if len(frame) == 1 else None,  # a line through one point is invisible
        }
        left.plot(frame["epoch"], -frame["loss"], label=label, **style)
        if "validation_elbo" in frame:
            style["alpha"] = 0.5
            left.plot(frame["epoch"], frame["validation_elbo"], label=f"{label}, held out", **style)
            style["alpha"] = 1.0
        if "sigma" in frame:
            right.plot(frame["epoch"], frame["sigma"], label=label, **style)
    tidy(left, "epoch", "ELBO on training images (nats per image)")
    tidy(right, "epoch", "noise σ (pixels in [0, 1])")
    for axes in (left, right):
        axes.xaxis.get_major_locator().set_params(integer=True)
    # the first epochs are far below the others: leave them out, so that the rest is not flat
    elbos = np.concatenate([-frame["loss"].to_numpy(float) for frame in histories.values()])
    low, high = float(np.quantile(elbos, 0.1)), float(elbos.max())
    if high > low and len(elbos) > 10:
        left.set_ylim(low - 0.15 * (high - low), high + 0.1 * (high - low))
    left.legend(frameon=False)
    return finish(figure, caption)
