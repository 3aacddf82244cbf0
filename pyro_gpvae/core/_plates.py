r"""The data plate, which separates local sites from global ones."""

from __future__ import annotations

from typing import Any

from pyro.poutine.util import site_is_subsample

__all__ = ["DATA_PLATE", "data_frame", "in_data_plate", "is_global"]

#: The name of the plate over images in models and guides.
DATA_PLATE = "data"


def in_data_plate(site: Any) -> bool:
    """Returns whether a site of a Pyro trace is local, that is, inside ``plate("data")``."""
    return any(frame.name == DATA_PLATE for frame in site["cond_indep_stack"])


def data_frame(site: Any) -> Any:
    """Returns the frame of ``plate("data", B)`` around a site, or None for a global site.

    Raises:
        ValueError: If z, or an observed site with a plate at dimension -1, is not in the data
            plate: it would be scaled by 1/N. If the plate subsamples: it would be scaled twice.
    """
    frames = {frame.name: frame for frame in site["cond_indep_stack"]}
    name, data = site["name"], frames.get(DATA_PLATE)
    if data is not None and data.full_size != data.size:
        raise ValueError(
            f"the site {name!r} lies in plate({DATA_PLATE!r}, {data.full_size}), of which "
            f"{data.size} are taken: write plate({DATA_PLATE!r}, len(x)), and give the number N of "
            "training images to PerImage"
        )
    others = [frame.name for frame in frames.values() if frame.dim == -1]
    # Pyro records deterministic values as observed
    observed = site["is_observed"] and not site["infer"].get("_deterministic")
    if data is None and (name == "z" or (observed and others)):
        where = f"plate({others[0]!r})" if others else "no plate"
        raise ValueError(
            f"the site {name!r} lies in {where}: what belongs to an image must be in "
            f"plate({DATA_PLATE!r}, len(x)), whose name separates local sites from global ones"
        )
    return data


def is_global(site: Any) -> bool:
    """Returns whether a site is global; raises ValueError where :func:`data_frame` does."""
    sampled = site["type"] == "sample" and not site_is_subsample(site)
    return sampled and data_frame(site) is None
