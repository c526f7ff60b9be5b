"""Makes a site of these documents and of the docstrings: `make docs`."""

from dn_detr import __version__

project = "dn_detr"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
# The root of the repository is Sphinx' source folder: the documents link to files outside docs/.
include_patterns = ["*.md", "docs/*.md", "benchmarks/results/README.md"]
root_doc = "docs/index"
html_theme = "furo"
html_title = f"dn_detr {__version__}"
html_show_copyright = False
html_copy_source = False

myst_heading_anchors = 4  # links such as training.md#loss-names, as on GitHub
autodoc_member_order = "bysource"
