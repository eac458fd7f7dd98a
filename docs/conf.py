"""Settings of the documentation site, which `make docs` builds."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import jaxpoison  # noqa: E402 (found by the line above)

project = "jaxpoison"
author = "The jaxpoison developers"
copyright = author
release = version = jaxpoison.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "site_extension",
]
exclude_patterns = ["README.md"]
default_role = "literal"  # what one pair of backquotes is in docstrings
nitpicky = True
# There is no index of other packages without a network, and some errors are not public.
nitpick_ignore_regex = [
    (r"py:.*", r"(jax|jaxlib|numpy|np|flax|optax|pathlib|collections|os|types|typing)\b.*"),
    (r"py:class", r"tuple\[.*"),
    (r"py:exc", r"Unreadable|MissingDataError"),
]

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

add_module_names = False
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autosummary_generate = False
maximum_signature_line_length = 80
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_attr_annotations = False
napoleon_use_rtype = False
python_use_unqualified_type_names = True
toc_object_entries_show_parents = "hide"

html_theme = "furo"
html_title = "jaxpoison"
html_show_sphinx = False
html_static_path = ["static"]
html_css_files = ["site.css"]
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True
