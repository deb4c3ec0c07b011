"""Hooks of the site (mkdocs.yml): links that leave docs/ lead to the repository, and the tutorial becomes a page."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from nbconvert import MarkdownExporter

TUTORIAL = "tutorial.ipynb"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the tutorial, with the outputs that it was committed with."""
    notebook = Path(config.docs_dir, TUTORIAL)
    name = notebook.stem
    body, resources = MarkdownExporter().from_filename(str(notebook), {"output_files_dir": f"{name}_files"})
    files.append(File.generated(config, f"{name}.md", content=body))
    for path, content in resources["outputs"].items():
        files.append(File.generated(config, path, content=content))
    return files


def on_page_markdown(markdown: str, config: MkDocsConfig, **_: Any) -> str:
    """Docs are read in the repository too, where ../ leads out of docs/ and the tutorial is a notebook."""
    markdown = re.sub(r"\]\(\.\./([^)\s]+)\)", rf"]({config.repo_url}/blob/main/\1)", markdown)
    return markdown.replace(f"]({TUTORIAL})", f"]({TUTORIAL.replace('.ipynb', '.md')})")
