r"""Posteriors in two dimensions: the true one and that of a random encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Ellipse, Patch
from numpy.typing import ArrayLike, NDArray

from pyro_gpvae.plots._style import COLOURS, finish, panels
from pyro_gpvae.plots.images import show_pixels, to_pixels

__all__ = ["posterior_panels"]

_TRUE, _MARGINAL, _DRAW = COLOURS[0], COLOURS[1], "0.35"
#: The probabilities inside the contours, and the radius of a 2-D Gaussian for the larger one.
_MASSES = (0.5, 0.9)
_RADIUS = float(np.sqrt(-2 * np.log(1 - _MASSES[1])))

Floats = NDArray[np.floating[Any]]


def posterior_panels(
    images: ArrayLike,
    record: Mapping[str, Floats],
    titles: Sequence[str],
    columns: int = 3,
    caption: str = "",
) -> Figure:
    """Draws each image next to its true posterior, draws of q(z|x, f, h), and q(z|x).

    The contours contain 50 % and 90 % of the probability, those of the draws 90 %.

    Arguments:
        images: Images (B, C, H, W), uint8 or floats in [0, 1].
        record: As ``posterior_record`` of :mod:`pyro_gpvae.evaluation` returns it.
        titles: The title of each panel.
        columns: The number of panels in a row.
        caption: Text below the figure.
    """
    pixels = to_pixels(images)
    if len(titles) != len(pixels) or len(record["f"]) != len(pixels):
        raise ValueError(
            f"expected a title and a posterior for each of {len(pixels)} images, got "
            f"{len(titles)} and {len(record['f'])}"
        )
    columns = min(columns, len(pixels))
    rows = -(-len(pixels) // columns)
    ratios, height = (1, 3) * columns, 2.9 * rows + 0.9
    figure, grid = panels(3.4 * columns, height, rows, 2 * columns, width_ratios=ratios)
    for index, (picture, axes) in enumerate(grid.reshape(-1, 2)):
        if index >= len(pixels):
            picture.set_axis_off()
            axes.set_axis_off()
            continue
        show_pixels(picture, pixels[index])
        _panel(axes, {name: values[index] for name, values in record.items()})
        axes.set_title(titles[index], fontsize=10)
    figure.legend(
        handles=[
            Patch(color=_TRUE, alpha=0.5, label="true posterior p(z|x)"),
            Line2D([], [], color=_DRAW, linewidth=0.8, label="draws of q(z|x, f, h)"),
            Line2D([], [], color=_MARGINAL, linestyle="--", label="marginal q(z|x)"),
        ],
        loc="upper center", ncols=3, frameon=False, fontsize=9,
    )  # fmt: skip
    return finish(figure, caption, title=" ")


def _panel(axes: Axes, record: Mapping[str, Floats]) -> None:
    density = record["density"]
    levels = [*_levels(density), density.max() * 1.01]
    for some, alpha in ((levels, 0.4), (levels[1:], 0.5)):
        axes.contourf(record["z1"], record["z2"], density.T, some, colors=_TRUE, alpha=alpha)
    for f, h in zip(record["f"], record["h"], strict=True):
        width, height = 2 * _RADIUS * h
        axes.add_patch(
            Ellipse((f[0], f[1]), width, height, fill=False, edgecolor=_DRAW, linewidth=0.6)
        )
    axes.contour(
        record["q1"], record["q2"], record["q"].T, _levels(record["q"]), colors=_MARGINAL,
        linestyles="--", linewidths=1.4,
    )  # fmt: skip
    inside = density >= levels[0]
    limits = []
    for name in (0, 1):
        z, q = record[f"z{name + 1}"], record[f"q{name + 1}"]
        held = z[inside.any(1 - name)]
        radii = _RADIUS * record["h"][:, name]
        centre, half = q.mean(), (q[-1] - q[0]) / 2 * 0.6  # 2.4 standard deviations of q(z|x)
        low = min(held.min(), (record["f"][:, name] - radii).min(), centre - half)
        high = max(held.max(), (record["f"][:, name] + radii).max(), centre + half)
        margin = 0.08 * (high - low)
        limits.append((low - margin, high + margin))
    axes.set(xlim=limits[0], ylim=limits[1])
    axes.set_xlabel("z₁ (prior standard deviations)", fontsize=8)
    axes.set_ylabel("z₂ (prior standard deviations)", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.locator_params("x", nbins=3)
    axes.locator_params("y", nbins=5)
    axes.spines[["top", "right"]].set_visible(False)


def _levels(density: Floats) -> list[float]:
    """Returns the densities at the borders of the regions of 90 % and 50 % probability."""
    ordered = np.sort(density.ravel())[::-1]
    held = np.cumsum(ordered) / ordered.sum()
    return [float(ordered[np.searchsorted(held, mass)]) for mass in reversed(_MASSES)]
