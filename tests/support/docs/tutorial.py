"""Run docs/tutorial.ipynb and write its outputs into it: `python -m tests.support.docs.tutorial`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

from tests.support.docs.pages import ROOT

NOTEBOOK = ROOT / "docs/tutorial.ipynb"


def execute(folder: Path) -> Any:
    """The notebook with fresh outputs, run with that folder as the working directory.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell fails.
    """
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    where = {"metadata": {"path": str(folder)}}
    client = NotebookClient(notebook, timeout=300, kernel_name="python3", resources=where, coalesce_streams=True)
    return client.execute()


def texts(notebook: Any) -> list[str]:
    """What every cell of code printed, in order; warnings and progress bars aside."""
    return [
        "".join(output["text"] for output in cell.outputs if output.get("name") == "stdout")
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


def main() -> None:
    """Write what does not change by itself from run to run: no times, counts of runs or progress bars."""
    notebook = execute(ROOT / "build")
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.execution_count = None
            cell.outputs = [one for one in cell.outputs if one.get("name") != "stderr"]
            for output in cell.outputs:
                output.pop("execution_count", None)
                if output.output_type == "execute_result":
                    output.output_type = "display_data"
                data = output.get("data", {})
                data.pop("text/plain", None)
                if "image/jpeg" in data:  # of photographs, a tenth of the size
                    data.pop("image/png", None)
    NOTEBOOK.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
