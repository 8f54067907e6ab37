"""
Sphinx configuration: ``sphinx-build -W -c docs . build/docs``.

The sources begin at the project's root, so that one link serves in a repository's browser and in these pages.
"""

import sys
from pathlib import Path

import captum_fam

sys.path.append(str(Path(__file__).parent))
import gallery

project = "captum_fam"
author = "the captum_fam authors"
copyright = "2026, the captum_fam authors"
version = release = captum_fam.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
root_doc = "docs/index"
nitpicky = True
nitpick_ignore_regex = [("py:class", ".*")]  # the types of arguments are words as often as classes
include_patterns = ["docs/**", "tutorials/*.ipynb", "benchmarks/*.md", "benchmarks/*/*.md", "*.md"]
html_theme = "furo"
html_title = f"captum_fam {version}"

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # the tutorials keep their outputs

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings give types, in Captum's words

# The files serve where there is no network: they hold the few names that these pages mention.
intersphinx_mapping = {
    "torch": ("https://docs.pytorch.org/docs/stable/", (None, "docs/inventories/torch.inv")),
    "captum": ("https://captum.ai/api/", (None, "docs/inventories/captum.inv")),
}
intersphinx_timeout = 5

# What the docstrings call by their short names.
SHORT = {"Tensor": "torch.Tensor", "nn.Module": "torch.nn.Module"}


def setup(app):
    def in_full(app, env, node, contnode):
        node["reftarget"] = SHORT.get(node.get("reftarget"), node.get("reftarget"))

    def explorer(app, exception):
        """The page to explore that the gallery shows."""
        if exception is None and app.builder.format == "html":
            code, files = gallery.blocks()
            page = gallery.made(files["explorer.html"], gallery.prepared(code))
            folder = Path(app.outdir) / "docs" / "gallery"
            folder.mkdir(parents=True, exist_ok=True)
            page.save(folder / "explorer.html")

    app.connect("missing-reference", in_full, priority=400)  # before intersphinx looks for it
    app.connect("build-finished", explorer)
