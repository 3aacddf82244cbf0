r"""Options that several commands share, and their way into functions of the library."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["Where", "keywords"]


@dataclass(kw_only=True)
class Where:
    """Where the data and the device of a run are now, and whether its code is trusted.

    Attributes:
        data: Name or .npz path of the run's data, if they have moved.
        root: Folder of data sets, if it has moved.
        device: "cpu", "cuda" or "cuda:INDEX"; None is that of the run.
        trust_guide: Import the guide MODULE:CLASS that the run names.
    """

    data: str | None = None
    root: str | None = None
    device: str | None = None
    trust_guide: bool = False


def keywords(command: Any) -> dict[str, Any]:
    """Returns the options of a command as keyword arguments; ``quiet`` becomes ``progress``."""
    options = dict(vars(command))
    if "quiet" in options:
        options["progress"] = not options.pop("quiet")
    return options
