"""Plain values as bytes: what a probe is given and what it returns travels in this form, never as pickle.

A value is a number, a string, a bool, None, an array of numbers, or a list, tuple or dict of values. The form
is a JSON header and after it the arrays' bytes, so reading one cannot run code, whoever wrote it.
"""

from __future__ import annotations

import json
import math
import struct
from typing import Any

import ml_dtypes
import numpy as np

MOST_BYTES = 64 * 2**20
LENGTH = struct.Struct("!Q")
DTYPES = {str(np.dtype(code)): np.dtype(code) for code in "?bhilqBHILQefdFD"}
DTYPES["bfloat16"] = np.dtype(ml_dtypes.bfloat16)


class NotPlain(TypeError):
    """A value that does not travel; the message names its place and its type."""


class Unreadable(ValueError):
    """Bytes that are not a packed value."""


def pack(value: Any) -> bytes:
    """Return `value` as bytes.

    Raises:
        NotPlain: something in it is neither a number, a string, an array of numbers nor a container of these,
            or its arrays have more than 64 MiB.
    """
    arrays: list[np.ndarray] = []
    header = json.dumps(_tree(value, arrays, "the result")).encode()
    if len(header) + sum(array.nbytes for array in arrays) > MOST_BYTES:
        raise NotPlain(f"returned more than {MOST_BYTES >> 20} MiB: what is all that?")
    return b"".join([LENGTH.pack(len(header)), header, *(array.tobytes() for array in arrays)])


def unpack(data: bytes) -> Any:
    """Return the value that `pack` made these bytes of; arrays are fresh and writable.

    Raises:
        Unreadable: `pack` made them of none.
    """
    try:
        (length,) = LENGTH.unpack_from(data)
        tree = json.loads(data[LENGTH.size : LENGTH.size + length])
        place = [LENGTH.size + length]
        value = _value(tree, data, place)
    except (
        ValueError,
        TypeError,
        KeyError,
        IndexError,
        AttributeError,
        RecursionError,
        struct.error,
    ) as error:
        raise Unreadable(f"not a packed value: {error}") from None
    if place[0] != len(data):
        raise Unreadable("not a packed value: bytes are left over")
    return value


def _tree(value: Any, arrays: list[np.ndarray], name: str) -> Any:
    if value is None or isinstance(value, bool | str):
        return str(value) if isinstance(value, str) else value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float) and not isinstance(value, np.generic):
        return float(value)
    if isinstance(value, np.ndarray | np.generic):
        if str(value.dtype) not in DTYPES:
            raise NotPlain(f"{name} is an array of {value.dtype}; an array of numbers was expected")
        arrays.append(np.ascontiguousarray(value).reshape(value.shape))
        kind = "array" if isinstance(value, np.ndarray) else "number"
        return {kind: [str(value.dtype), list(value.shape)]}
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_tree(part, arrays, f"{name}[{i}]") for i, part in enumerate(value)]}
    if isinstance(value, dict):
        return {
            "dict": [
                [_tree(key, arrays, f"a key of {name}"), _tree(part, arrays, f"{name}[{key!r}]")]
                for key, part in value.items()
            ]
        }
    kind = type(value).__name__
    hint = "; return its .data" if kind in ("Tensor", "Parameter") else ""
    raise NotPlain(f"{name} is a {kind}; a number, an array or a list of these was expected{hint}")


def _value(tree: Any, data: bytes, place: list[int]) -> Any:
    if not isinstance(tree, dict):
        if isinstance(tree, list):
            raise ValueError("a list without a tag")
        return tree
    ((kind, content),) = tree.items()
    if kind in ("array", "number"):
        dtype, shape = DTYPES[content[0]], tuple(map(int, content[1]))
        if any(n < 0 for n in shape):
            raise ValueError("a negative length")
        count = math.prod(shape)
        end = place[0] + count * dtype.itemsize
        array = np.frombuffer(data[place[0] : end], dtype).reshape(shape).copy()
        place[0] = end
        return array if kind == "array" else array[()]
    if kind == "dict":
        return {_value(key, data, place): _value(part, data, place) for key, part in content}
    parts = [_value(part, data, place) for part in content]
    return {"list": list, "tuple": tuple}[kind](parts)
