r"""The documentation: ``sphinx-build -W --keep-going -b html docs docs/_build/html``.

The tutorials are executed while they are built. With the environment variable PYRO_GPVAE_SMOKE
set they run with budgets of a few seconds, and every page says so.
"""

from __future__ import annotations

import functools
import os
import pkgutil
from typing import Any

from docutils import nodes
from nbclient import NotebookClient
from sphinx.application import Sphinx

import pyro_gpvae

project = "pyro-gpvae"
author = "The pyro-gpvae authors"
project_copyright = author
version = release = pyro_gpvae.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build", "results/*"]

html_theme = "furo"
html_title = "pyro-gpvae"
html_static_path = ["_static"]
html_css_files = ["page.css"]
html_theme_options: dict[str, Any] = {}
if os.environ.get("PYRO_GPVAE_SMOKE"):
    html_theme_options["announcement"] = (
        "This is a test build. The tutorials ran with very small budgets (PYRO_GPVAE_SMOKE), "
        "so their numbers and pictures mean nothing."
    )

myst_enable_extensions = ["amsmath", "colon_fence", "dollarmath"]
myst_heading_anchors = 3

nb_execution_mode = "auto"
nb_execution_raise_on_error = True
nb_execution_in_temp = True
nb_execution_timeout = 600
# The output of %%bash arrives in pieces of 100 bytes. They are joined here, because myst-nb would
# break lines between them.
NotebookClient.__init__ = functools.partialmethod(  # type: ignore[assignment]
    NotebookClient.__init__, coalesce_streams=True
)
# Without Jupyter's widgets tqdm warns, although progress bars are off in the tutorials.
os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"

# Names of this project must be documented. Types of other libraries are shown as text.
nitpicky = True
nitpick_ignore_regex = [(r"py:.*", r"(?!pyro_gpvae\.|guides\.).*")]
autodoc_inherit_docstrings = False  # of torch.nn.Module.forward, for one
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_preserve_defaults = True
napoleon_use_ivar = True
napoleon_use_rtype = False
napoleon_numpy_docstring = False


def public_name(name: str) -> str | None:
    """Where an object is documented: ``pyro_gpvae.fit`` lives in ``pyro_gpvae.training.loop``."""
    if name.partition(".")[0] not in ("pyro_gpvae", "guides"):
        return None
    try:
        found = pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        return None
    found = getattr(found, "fget", found)  # a property
    if not hasattr(found, "__qualname__"):
        return None
    return f"{found.__module__}.{found.__qualname__}"


def resolve_short_names(app: Sphinx, env: Any, node: Any, content: nodes.Element) -> Any:
    """Links ``pyro_gpvae.ImageModel`` to ``pyro_gpvae.model.image_model.ImageModel``."""
    target = public_name(str(node.get("reftarget", "")))
    if node.get("refdomain") != "py" or target is None or target == node["reftarget"]:
        return None
    domain = env.get_domain("py")
    return domain.resolve_xref(
        env, node["refdoc"], app.builder, node["reftype"], target, node, content
    )


def setup(app: Sphinx) -> None:
    app.connect("missing-reference", resolve_short_names)
