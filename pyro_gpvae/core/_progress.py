"""Progress bars on terminals and in Jupyter."""

from __future__ import annotations

import warnings

from tqdm import TqdmWarning

with warnings.catch_warnings():
    warnings.simplefilter("ignore", TqdmWarning)  # Jupyter without its widgets has no bars
    from tqdm.auto import tqdm as tqdm

#: Whether bars are widgets of a notebook. Its standard error is no terminal.
IN_NOTEBOOK = any(kind.__name__ == "tqdm_notebook" for kind in tqdm.__mro__)


def progress_bar(shown: bool | str | None, label: str, total: int, unit: str = "it") -> tqdm:
    """Returns a progress bar with the time left.

    It is shown if ``shown`` is True, or its label; None shows it on a terminal and in a notebook.
    """
    disable = not shown if shown is not None else (False if IN_NOTEBOOK else None)
    text = shown if isinstance(shown, str) else label
    return tqdm(total=total, desc=text, disable=disable, unit=unit, unit_scale=total > 10**5)
