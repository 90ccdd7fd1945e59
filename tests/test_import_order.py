"""Where a package states the order of its modules, all are named, and each imports only those before it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

STATED = {  # package: what of its docstring is the list
    "comm": r"within the floor: (.*?)\.",
    "planner": r"order of imports:(.*)",
    "parallel.pipeline": r"within the package:(.*)",
}


def stated(package: str) -> list[str]:
    found = re.search(STATED[package], import_module(f"minipar.{package}").__doc__ or "", re.DOTALL)
    assert found is not None
    lines = re.findall(r"^    (\w+)", found[1], re.MULTILINE)
    return lines or re.findall(r"\w+", found[1])


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
