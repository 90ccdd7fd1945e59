"""Numbers with a unit: "80GiB" as it is read, "3.2 GiB" as it is written."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

BYTES = {"": 1, "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
NUMBER = re.compile(r"(\d+\.?\d*(?:[eE][+-]?\d+)?|\.\d+(?:[eE][+-]?\d+)?)\s*(\S*)")


def quantity(text: str, units: Mapping[str, float]) -> float | None:
    """Return what a number says with one of these units, "" for none; None for any other text."""
    found = NUMBER.fullmatch(text.strip())
    if found is None or found[2] not in units:
        return None
    value = float(found[1]) * units[found[2]]
    return value if math.isfinite(value) else None


def bytes_text(n: float) -> str:
    """Return bytes with three digits and a binary unit."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if n >= size:
            return f"{n / size:.3g} {unit}" if n / size < 1000 else f"{n / size:,.0f} {unit}"
    return f"{n:.0f} B"
