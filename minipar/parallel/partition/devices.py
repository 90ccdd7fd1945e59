"""Devices of unequal speed and memory, written as text: "2xA,1xB".

    parse_devices("2xA,1xB", speeds={"A": 1.0, "B": 0.5}, memory={"B": 2**20}, ranks=3)
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping

from minipar.errors import UsageError
from minipar.parallel.partition.assignment import Device
from minipar.units import BYTES, quantity


def parse_devices(
    text: str,
    speeds: Mapping[str, float] | None,
    memory: Mapping[str, int] | None = None,
    ranks: int | None = None,
) -> list[Device]:
    """Return the devices that `text` lists, one for each rank in that order.

    Args:
        text: COUNTxTYPE, separated by commas.
        speeds: work in unit time by type, relative to each other; every type needs one. None: all are alike.
        memory: bytes of parameters that a device can hold, by type; a type left out has no limit.
        ranks: how many devices there must be; None for any number.

    Raises:
        UsageError: malformed text, a type without speed, a setting for a type that is not in the text, a
            value out of range, or a number of devices other than `ranks`.
    """
    memory = {} if memory is None else memory
    devices: list[Device] = []
    made: Counter[str] = Counter()  # devices by type
    for entry in text.split(","):
        match = re.fullmatch(r"\s*(\d+)x([A-Za-z]\w*)\s*", entry)
        if match is None or int(match[1]) < 1:
            raise UsageError(
                f"devices {text!r}: {entry.strip()!r} must be a count of at least 1 and a type, as in 2xA,1xB"
            )
        kind = match[2]
        if speeds is not None and kind not in speeds:
            known = ", ".join(speeds) or "none"
            raise UsageError(
                f"devices {text!r}: type {kind} has no speed (given: {known}); give it one, as in {kind}=0.5"
            )
        for _ in range(int(match[1])):
            speed = 1.0 if speeds is None else speeds[kind]
            devices.append(Device(f"{kind}-{made[kind]}", speed, memory.get(kind)))
            made[kind] += 1
    for what, table in (("speed", speeds or {}), ("memory", memory)):
        for kind, value in table.items():
            if kind not in made:
                raise UsageError(f"devices {text!r}: {what} for type {kind}, which is not among them")
            if not (math.isfinite(value) and value > 0):
                raise UsageError(f"devices {text!r}: {what} {value} of type {kind} must be a positive number")
    if ranks is not None and len(devices) != ranks:
        raise UsageError(f"devices {text!r} are {len(devices)}, there are {ranks} ranks: give one for each")
    return devices


def parse_speeds(text: str) -> dict[str, float]:
    """Return {type: speed} from text such as "A=1,B=0.5"."""
    return {kind: _number(text, value, "speeds", {"": 1}) for kind, value in _pairs(text, "speeds")}


def parse_memory(text: str) -> dict[str, int]:
    """Return {type: bytes} from text such as "A=64MiB,B=512KiB"."""
    return {kind: int(_number(text, value, "memory", BYTES)) for kind, value in _pairs(text, "memory")}


def _pairs(text: str, what: str) -> list[tuple[str, str]]:
    pairs = [tuple(part.strip() for part in entry.split("=")) for entry in text.split(",")]
    if any(len(pair) != 2 or not all(pair) for pair in pairs):
        raise UsageError(f"{what} {text!r}: write TYPE=VALUE separated by commas, as in A=1,B=0.5")
    if len({pair[0] for pair in pairs}) < len(pairs):
        raise UsageError(f"{what} {text!r}: a type is given twice")
    return [(pair[0], pair[1]) for pair in pairs]


def _number(text: str, value: str, what: str, units: Mapping[str, int]) -> float:
    found = quantity(value, units)
    if found is None:
        known = f" with a unit of {', '.join(u for u in units if u)}" if len(units) > 1 else ""
        raise UsageError(f"{what} {text!r}: {value!r} must be a number{known}")
    return found
