"""Which names of other modules a source uses: for exercises in which a part of minipar is to be written anew.

Read from the source, before any of it runs. It tells a learner what the exercise asked to do without, and is no lock: a
name that a program puts together as it runs goes unseen.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence


def forbidden_use(tree: ast.Module, forbidden: Sequence[str]) -> tuple[str, int] | None:
    """Return the first name used that is one of `forbidden`, or lies in one, and its line; None if none does."""
    for name, line in names_used(tree):
        if any(name == part or name.startswith(f"{part}.") for part in forbidden):
            return name, line
    return None


def names_used(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Yield what is imported, and what is reached with dots from there, each by its full name and with its line.

    `from minipar import comm as c` and `c.collectives.cost` are "minipar.comm" and "minipar.comm.collectives.cost".
    """
    meaning: dict[str, str] = {}  # the full name of each imported one
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
                package = alias.name.partition(".")[0]  # which is all that `import a.b` binds
                meaning[alias.asname or package] = alias.name if alias.asname else package
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                meaning[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                yield f"{node.module}.{alias.name}", node.lineno
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            first, _, rest = ast.unparse(node).partition(".")
            if first in meaning:
                yield f"{meaning[first]}.{rest}", node.lineno
