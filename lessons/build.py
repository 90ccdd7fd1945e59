"""Make a lesson's notebook from its source: `python -m lessons.build 04`, or `all`.

`walkthrough.py` (percent format, made for reading and for diffs) is the source; `walkthrough.ipynb` is made from
it, executed, and kept with its outputs, so that it reads well on a repository page. `--check` compares both
without executing. Needs the `lessons` extra: pip install -e '.[lessons]'.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from minipar.errors import MiniparError, UsageError
from minipar.grading.manifest import Entry, find_entry, read_manifest

KERNEL = "python3"
CELL_SECONDS = 120


def read_source(path: Path) -> Any:
    """Return the notebook that a percent-format file describes, without outputs, its cells numbered.

    Raises:
        UsageError: its header does not name the kernel `python3`, so JupyterLab would ask for one.
    """
    notebook = jupytext.read(path, fmt="py:percent")
    if notebook.metadata.get("kernelspec", {}).get("name") != KERNEL:
        raise UsageError(f"{path}: the header must name the kernel {KERNEL}; see lessons/01_autograd")
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    notebook.metadata = nbformat.from_dict({
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": KERNEL},
        "language_info": {"name": "python"},
    })  # fmt: skip
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number:03}"
        cell.metadata.clear()
    return notebook


def execute(notebook: Any, folder: Path) -> Any:
    """Run all cells in `folder`, from top to bottom; the outputs stay in the notebook.

    Raises:
        CellExecutionError: a cell raised.
    """
    NotebookClient(
        notebook,
        kernel_name=KERNEL,
        timeout=CELL_SECONDS,
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(folder)}},
        extra_arguments=["--log-level=ERROR"],  # it warns that its port, on this machine, is not encrypted
    ).execute()
    for cell in notebook.cells:
        cell.metadata.clear()
    notebook.metadata["language_info"] = {"name": "python"}  # not which Python it was
    return notebook


def build(entry: Entry) -> float:
    """Make a lesson's notebook and return the seconds that its cells took."""
    notebook = read_source(entry.file("walkthrough.py"))
    start = time.monotonic()
    execute(notebook, entry.folder)
    nbformat.validate(notebook)
    target = entry.folder / "walkthrough.ipynb"
    target.write_text(nbformat.writes(notebook, indent=1) + "\n", encoding="utf-8")
    return time.monotonic() - start


def differences(entry: Entry) -> list[str]:
    """Return how a lesson's notebook differs from its source, or was not executed; empty if it agrees."""
    source = read_source(entry.file("walkthrough.py"))
    notebook = nbformat.read(entry.file("walkthrough.ipynb"), as_version=4)
    name = f"lesson {entry.number:02}"
    found = []
    if notebook.metadata.get("kernelspec", {}).get("name") != KERNEL:
        found.append(f"{name}: the notebook names no kernel {KERNEL}")
    if len(source.cells) != len(notebook.cells):
        found.append(
            f"{name}: {len(source.cells)} cells in walkthrough.py, {len(notebook.cells)} in the notebook"
        )
    for number, (wanted, cell) in enumerate(zip(source.cells, notebook.cells)):
        if (wanted.cell_type, wanted.source) != (cell.cell_type, cell.source):
            found.append(f"{name}: cell {number} differs: {wanted.source.splitlines()[:1]}")
        elif cell.cell_type == "code" and cell.execution_count is None:
            found.append(f"{name}: cell {number} was not executed")
        elif any(output.output_type == "error" for output in cell.get("outputs", [])):
            found.append(f"{name}: cell {number} ended with an error")
    return found


def main() -> int:
    """Build or check; return the exit code."""
    parser = argparse.ArgumentParser(description="Make lessons' notebooks from their sources.")
    parser.add_argument("lesson", help="a lesson's number, or all")
    parser.add_argument("--check", action="store_true", help="compare with the notebooks, execute nothing")
    options = parser.parse_args()
    try:
        everything = options.lesson == "all"
        chosen = read_manifest() if everything else [find_entry(options.lesson)]
        bad = []
        for entry in chosen:
            if options.check:
                bad += differences(entry)
            else:
                print(f"{entry.name}: {build(entry):.1f} s", flush=True)
    except MiniparError as error:
        print(f"lessons.build: {error}", file=sys.stderr)
        return error.exit_code
    except CellExecutionError as error:
        print(error, file=sys.stderr)
        return 1
    for line in bad:
        print(line)
    if bad:
        print("make the notebooks anew: python -m lessons.build " + options.lesson)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
