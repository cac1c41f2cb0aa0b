"""The site: `make docs` builds docs/ into docs/_build/html. Warnings are errors."""

from __future__ import annotations

from loratools import __version__

project = "loratools"
author = "the loratools authors"
release = version = __version__
extensions = ["myst_parser", "sphinx_copybutton"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
# Links go to headings as they do on the pages of a repository.
myst_heading_anchors = 4
html_theme = "furo"
html_title = f"loratools {__version__}"
html_static_path: list[str] = []
copybutton_prompt_text = r"\$ |>>> "
copybutton_prompt_is_regexp = True
