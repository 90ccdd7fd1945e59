"""How the call of a primitive is read: its arguments by position, and its errors with names."""

from __future__ import annotations

import inspect
from typing import Any

from minipar.errors import UsageError


def by_position(
    args: tuple[Any, ...], kwargs: dict[str, Any], positional: dict[str, Any]
) -> tuple[Any, ...]:
    """Return `args` with the arguments in `kwargs` that have a position; they are removed from `kwargs`.

    The tape knows inputs by position, so an argument given by name must not be missed.
    """
    names = list(positional)
    last = max((names.index(k) for k in kwargs if k in positional), default=-1)
    for name in names[len(args) : last + 1]:
        value = kwargs.pop(name, positional[name])
        if value is inspect.Parameter.empty:
            raise TypeError(f"argument {name!r} is missing")
        args += (value,)
    return args


def naming(error: Exception, name: str, args: tuple[Any, ...]) -> Exception:
    """Return `error` as one line that starts with the operation's name and ends with its inputs' shapes."""
    name, message = name.lstrip("_"), str(error)
    if message.startswith(f"{name}:"):
        return error
    shapes = ", ".join(f"{a.shape} {a.dtype}" for a in args if hasattr(a, "shape"))
    kind = next(k for k in (UsageError, ValueError, IndexError, TypeError) if isinstance(error, k))
    return kind(f"{name}: {message} (inputs {shapes})")
