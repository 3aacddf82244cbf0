r"""``pyro-gpvae guides``."""

from __future__ import annotations

from dataclasses import dataclass

from pyro_gpvae.cli._text import one_line
from pyro_gpvae.model.guide import available_guides

__all__ = ["Guides"]


@dataclass
class Guides:
    """List the registered guides."""

    def run(self) -> None:
        for name, point in available_guides().items():
            try:
                lines = (point.load().__doc__ or "").strip().splitlines()
                print(f"{name:<12} {lines[0] if lines else '(not documented)'}")
            except Exception as error:  # another package's mistake must not hide the rest
                print(f"{name:<12} cannot be loaded from {point.value}: {one_line(error)}")
        print("A guide of your own: --guide MODULE:CLASS, found in the current directory.")
