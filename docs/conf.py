"""Configuration of the documentation site: `make docs` builds it into docs/_build/html."""

import sb3_mbmpo

project = "sb3_mbmpo"
author = "The sb3_mbmpo authors"
project_copyright = author
version = release = sb3_mbmpo.__version__

extensions = [
    "myst_nb",  # Markdown, with the notebook's stored outputs
    "sphinx.ext.autodoc",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
exclude_patterns = ["_build", "results/runs", "**.ipynb_checkpoints"]

# ---------------------------------------------------------------- Markdown and the notebook

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
# tests/test_docs.py executes the notebook; the site shows the outputs that are stored in it
nb_execution_mode = "off"

# ---------------------------------------------------------------- API reference

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 100

# ---------------------------------------------------------------- HTML

html_theme = "furo"
html_title = f"sb3_mbmpo {version}"
html_copy_source = False
html_show_sourcelink = False
