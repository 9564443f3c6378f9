"""Run every notebook of this folder again and keep its outputs:

    python examples/notebooks/execute.py [NAME ...]

It needs nbclient and ipykernel beside attnzoo: pip install nbclient ipykernel.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
SECONDS = 300


def execute(path: Path) -> None:
    """Run one notebook from the root of the checkout, so that it finds the result files; cells keep
    what they print and draw."""
    import nbformat  # pyright: ignore[reportMissingImports]
    from nbclient import NotebookClient  # pyright: ignore[reportMissingImports]

    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(FOLDER.parent.parent)}}
    NotebookClient(notebook, timeout=SECONDS, kernel_name="python3", resources=resources).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # the times of the run
        if cell.cell_type == "code":
            cell.outputs = joined(cell.outputs)
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}
    }
    nbformat.write(notebook, path)


def joined(outputs: list[Any]) -> list[Any]:
    """The outputs of a cell, what is printed in one piece."""
    kept: list[Any] = []
    for output in outputs:
        before = kept[-1] if kept else {}
        if output["output_type"] == "stream" and before.get("name") == output["name"]:
            before["text"] += output["text"]
        else:
            kept.append(output)
    return kept


def main(names: list[str]) -> None:
    """Run those that are named, or all."""
    for path in sorted(FOLDER.glob("*.ipynb")):
        if not names or path.stem in names:
            execute(path)
            print(f"executed {path.name}, {path.stat().st_size // 1024} KiB")


if __name__ == "__main__":
    main(sys.argv[1:])
