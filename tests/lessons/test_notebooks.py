"""Every notebook agrees with its source, was executed, and executes again from top to bottom."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from minipar.grading.manifest import Entry
from tests.lessons.lesson_files import written


@pytest.fixture(scope="module")
def build() -> Any:
    """`lessons.build`, where the `lessons` extra is installed."""
    for name in ("jupytext", "nbclient", "ipykernel"):
        pytest.importorskip(name, reason="pip install -e '.[lessons]'")
    import lessons.build

    return lessons.build


def outputs(notebook: Any, kind: str) -> int:
    """Return how many outputs of a notebook have a form of this MIME type."""
    return sum(
        kind in output.get("data", {})
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
    )


@pytest.mark.parametrize("entry", written("walkthrough"))
def test_notebook_is_its_source_executed(entry: Entry, build: Any) -> None:
    assert build.differences(entry) == []
    import nbformat

    notebook = nbformat.read(entry.file("walkthrough.ipynb"), as_version=4)
    assert outputs(notebook, "image/png") >= 2
    assert [cell.id for cell in notebook.cells] == [f"cell-{i:03}" for i in range(len(notebook.cells))]
    last = [cell.source for cell in notebook.cells if "## Check yourself" in cell.source]
    assert len(last) == 1, "it ends with questions whose answers its cells compute"


@pytest.mark.timeout(300)
@pytest.mark.parametrize("entry", written("walkthrough"))
def test_notebook_executes(entry: Entry, build: Any) -> None:
    def files() -> set[Path]:
        return {path for path in entry.folder.iterdir() if path.name != "__pycache__"}

    before = files()
    notebook = build.execute(build.read_source(entry.file("walkthrough.py")), entry.folder)
    assert outputs(notebook, "image/png") >= 2
    assert files() == before, "a walkthrough leaves no files in the lesson's folder"


def test_differences_are_found(build: Any, tmp_path: Path) -> None:
    """What `--check` says of a notebook that is not its source executed."""
    header = (
        "# ---\n# jupyter:\n#   kernelspec:\n#     display_name: Python 3\n#     language: python\n"
        "#     name: python3\n# ---\n"
    )
    (tmp_path / "walkthrough.py").write_text(
        header + "# %% [markdown]\n# # Title\n\n# %%\n1 + 1\n\n# %%\n2 + 2\n"
    )
    entry = Entry(tmp_path, 1, "01_trial", "", "", (), 0)
    build.build(entry)
    assert build.differences(entry) == []
    made = (tmp_path / "walkthrough.ipynb").read_text()
    build.build(entry)
    assert (tmp_path / "walkthrough.ipynb").read_text() == made, "made twice, it is the same byte for byte"
    for old, new, said in (
        ("1 + 1", "1 + 3", "cell 1 differs"),
        ('"execution_count": 1', '"execution_count": null', "cell 1 was not executed"),
        ('"name": "python3"', '"name": "other"', "names no kernel"),
    ):
        assert made.count(old) >= 1
        (tmp_path / "walkthrough.ipynb").write_text(made.replace(old, new, 1))
        assert any(said in line for line in build.differences(entry)), build.differences(entry)
