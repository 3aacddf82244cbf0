r"""The data plate, which tells the sites of an image from global ones."""

from __future__ import annotations

from typing import Any

from pyro.poutine.util import site_is_subsample

__all__ = ["DATA_PLATE", "data_frame", "in_data_plate", "is_global"]

#: Name of the plate over images, in models and in guides.
DATA_PLATE = "data"


def in_data_plate(site: Any) -> bool:
    """Whether a site of a Pyro trace belongs to an image, that is, lies in ``plate("data")``."""
    return any(frame.name == DATA_PLATE for frame in site["cond_indep_stack"])


def data_frame(site: Any) -> Any:
    """The frame of ``plate("data", B)`` that a site lies in; None for a global site.

    The plate's name tells local from global sites. Under another name z and x would be taken for
    global ones, and weighed wrongly; a plate that subsamples would be weighed twice.

    Raises:
        ValueError: If z, or what is observed along dimension -1, lies in another plate or none,
            or the plate subsamples.
    """
    frames = {frame.name: frame for frame in site["cond_indep_stack"]}
    name, data = site["name"], frames.get(DATA_PLATE)
    if data is not None and data.full_size != data.size:
        raise ValueError(
            f"the site {name!r} lies in plate({DATA_PLATE!r}, {data.full_size}) of which "
            f"{data.size} are taken: write plate({DATA_PLATE!r}, len(x)); the number N of all "
            "images is PerImage's"
        )
    others = [frame.name for frame in frames.values() if frame.dim == -1]
    # deterministic values are recorded as observed
    observed = site["is_observed"] and not site["infer"].get("_deterministic")
    if data is None and (name == "z" or (observed and others)):
        where = f"plate({others[0]!r})" if others else "no plate"
        raise ValueError(
            f"the site {name!r} lies in {where}: what belongs to an image must be in "
            f"plate({DATA_PLATE!r}, len(x)), whose name tells it from global sites"
        )
    return data


def is_global(site: Any) -> bool:
    """Whether a site belongs to no image; refuses those that only seem not to."""
    if site["type"] != "sample" or site_is_subsample(site):
        return False
    return data_frame(site) is None
