from __future__ import annotations

import importlib.util

# `make docs` has what builds the site and runs the tutorial; the other environments have not.
collect_ignore = [] if importlib.util.find_spec("mkdocs") else ["test_site.py", "test_tutorial.py"]
