"""Imports matplotlib without the ``matplotlibrc`` of the working directory.

Matplotlib reads it before all others, and a setting such as ``text.usetex`` starts a program. The
working directory may be one that somebody else filled. The user's own settings hold, and so does a
matplotlib that is imported already.
"""

import contextlib
from pathlib import Path

with contextlib.chdir(Path(__file__).parent):
    import matplotlib  # noqa: F401
