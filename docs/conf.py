r"""The documentation: ``sphinx-build -W --keep-going -b html docs docs/_build/html``.

The tutorials are executed while they are built. With the environment variable PYRO_GPVAE_SMOKE
set they run with budgets of a few seconds, and every page says so: the front matter of a page has
pairs of a text and its replacement under "smoke". A build fails if a link of a page leads nowhere,
or if a page needs a file from the web.
"""

from __future__ import annotations

import functools
import os
import pkgutil
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml
from docutils import nodes
from nbclient import NotebookClient
from PIL import Image
from sphinx.addnodes import download_reference
from sphinx.application import Sphinx
from sphinx.util import logging

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
    "sphinx_copybutton",
    "sphinx-mathjax-offline",  # MathJax in the built pages
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
copybutton_exclude = ".linenos, .gp, .go"  # prompts and output
# The output of %%bash arrives in pieces of 100 bytes. They are joined here, because myst-nb would
# break lines between them.
NotebookClient.__init__ = functools.partialmethod(  # type: ignore[assignment]
    NotebookClient.__init__, coalesce_streams=True
)
# Pyro imports tqdm, which warns without Jupyter's widgets. Pages have no progress bars.
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


def use_small_budgets(app: Sphinx, docname: str, source: list[str]) -> None:
    """Makes the replacements under "smoke" in the front matter of a page."""
    if not os.environ.get("PYRO_GPVAE_SMOKE") or not source[0].startswith("---\n"):
        return
    _, front, text = source[0].split("---\n", 2)
    for old, new in yaml.safe_load(front).get("smoke", []):
        if old not in text:
            raise ValueError(f"{docname}: there is no {old!r} to replace")
        text = text.replace(old, new)
    source[0] = f"---\n{front}---\n{text}"


def link_notebook(app: Sphinx, doctree: nodes.document) -> None:
    """Links a tutorial to its executed notebook, below its title."""
    name = app.env.docname
    if re.match(r"tutorials/\d", name):
        path = Path(app.env.mystnb_config.output_folder, f"{name}.ipynb")  # type: ignore[attr-defined]
        link = download_reference(reftarget="/" + os.path.relpath(path, app.srcdir))
        link += nodes.Text("Download this page as a notebook")
        title = next(doctree.findall(nodes.title))
        title.parent.insert(title.parent.index(title) + 1, nodes.paragraph("", "", link))


def shorten_warnings(app: Sphinx, doctree: nodes.document) -> None:
    """Removes the temporary file and the line of code from warnings in the outputs of cells."""
    for node in doctree.findall(nodes.literal_block):
        if "stderr" in node["classes"]:
            text = re.sub(r"^\S*/ipykernel_\S+ (.*)\n  .*$", r"\1", node.astext(), flags=re.M)
            node.rawsource = text
            node.children = [nodes.Text(text)]


def break_names(app: Sphinx, page: str, template: str, context: dict[str, Any], tree: Any) -> None:
    """Lets long names in code break after their parts, and nowhere else (see page.css)."""
    if "body" in context:
        ends = re.compile(r"(?<=[/_,=(])(?=\w)|(?<=::)|(?<=\w\.)(?=[a-z_]{5})")
        context["body"] = re.sub(
            r'(?<=<span class="pre">)[^<]{20,}(?=</span>)',
            lambda found: ends.sub("<wbr>", found[0]),
            context["body"],
        )


def mark_plots(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    """Marks images with a background: dark pages invert them. Figures of images have none."""
    for node in doctree.findall(nodes.image):
        with Image.open(Path(app.srcdir, node["uri"])) as image:
            if image.convert("RGBA").getpixel((0, 0))[3]:
                node["classes"].append("plot")


class Page(HTMLParser):
    """What a page defines and needs: its anchors, its links, and the files that it loads."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: set[str] = set()
        self.loaded: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attributes}
        self.anchors |= {found[name] for name in ("id", "name") if name in found}
        if "href" in found:
            (self.links if tag == "a" else self.loaded).add(found["href"])
        if "src" in found:
            self.loaded.add(found["src"])


def check_links(app: Sphinx, exception: Exception | None) -> None:
    """Warns of links to missing files and anchors, and of files that a page loads from the web."""
    if exception is not None or app.builder.format != "html":
        return
    folder = Path(app.outdir).resolve()
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in folder.rglob("*.html")}
    warn = logging.getLogger(__name__).warning
    for path, page in pages.items():
        for link in sorted(page.links | page.loaded):
            url = urlsplit(link)
            if url.scheme == "data" or (url.scheme and link in page.links):
                continue
            target = (path.parent / unquote(url.path)).resolve() if url.path else path
            if url.scheme or url.netloc:
                warn("%s loads %s", path.relative_to(folder), link)
            elif not target.is_file():
                warn("%s links to %s, which is missing", path.relative_to(folder), link)
            elif target in pages and unquote(url.fragment) not in {"", *pages[target].anchors}:
                warn("%s links to %s: no such anchor", path.relative_to(folder), link)


def setup(app: Sphinx) -> None:
    app.connect("source-read", use_small_budgets)
    app.connect("doctree-read", link_notebook, priority=100)  # before Sphinx collects downloads
    app.connect("doctree-read", shorten_warnings)
    app.connect("doctree-resolved", mark_plots)
    app.connect("html-page-context", break_names)
    app.connect("missing-reference", resolve_short_names)
    app.connect("build-finished", check_links, priority=900)  # after all files are copied
