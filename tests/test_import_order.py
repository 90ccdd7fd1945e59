"""Where a package states the order of its modules, all are named, and each imports only those before it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

import minipar

STATED = {  # package: what of its docstring is the list
    "comm": r"within the floor: (.*?)\.",
    "planner": r"order of imports:(.*)",
    "parallel.pipeline": r"within the package:(.*)",
    "grading": r"Order of imports: (.*?)\.\n\n",
}


def stated(package: str) -> list[str]:
    found = re.search(STATED[package], import_module(f"minipar.{package}").__doc__ or "", re.DOTALL)
    assert found is not None
    lines = re.findall(r"^    (\w+)", found[1], re.MULTILINE)
    return lines or re.findall(r"\w+", re.sub(r"\([^)]*\)", "", found[1]))


def imported(tree: ast.AST) -> Iterator[ast.ImportFrom]:
    """Yield the imports that run when a module is loaded."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ImportFrom):
            yield node
        elif not isinstance(node, ast.FunctionDef) and not (isinstance(node, ast.If) and "CHECKING" in ast.dump(node)):
            yield from imported(node)


@pytest.mark.parametrize("package", STATED)
def test_modules_import_those_before_them(package: str) -> None:
    order, whole = stated(package), f"minipar.{package}."
    folder = Path(import_module(f"minipar.{package}").__file__ or "").parent
    assert sorted(order) == sorted(path.stem for path in folder.glob("*.py") if path.stem != "__init__")
    for place, name in enumerate(order):
        for node in imported(ast.parse((folder / f"{name}.py").read_text())):
            if (node.module or "").startswith(whole):
                assert (node.module or "").removeprefix(whole) in order[:place], f"{name} imports {node.module}"


def test_floors_import_those_below() -> None:
    """The package's own docstring: a line begins with a floor's number, or goes on with its names."""
    lines = re.findall(r"^ {4}(?:\d  | {3})((?:\w+(?:, |,$| |$))+)", minipar.__doc__ or "", re.MULTILINE)
    order = [name for line in lines for name in re.findall(r"\w+", line)]
    folder = Path(minipar.__file__).parent
    there = {path.stem for path in folder.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert sorted(order) == sorted(there - {"__init__", "__main__"})
    for place, name in enumerate(order):
        below = {*order[: place + 1], "__version__"}
        files = [path] if (path := folder / f"{name}.py").exists() else (folder / name).rglob("*.py")
        for path in files:
            for node in imported(ast.parse(path.read_text())):
                if node.module == "minipar":
                    assert {alias.name for alias in node.names} <= below, f"{path} imports {ast.unparse(node)}"
                elif (node.module or "").startswith("minipar."):
                    assert (node.module or "").split(".")[1] in below, f"{path} imports {node.module}"
