"""Who minipar is measured beside, and what to do where one of them is not installed: say so and go on."""

from __future__ import annotations

import importlib.util

HOW = {"torch": "PyTorch", "autograd": "HIPS autograd"}  # make parity installs both


class Missing(Exception):
    """Something that a benchmark needs is not on this machine; the text says what."""


def missing(package: str) -> str | None:
    """Return why a peer cannot run here, None if it can. The package is not imported to find out."""
    if importlib.util.find_spec(package) is not None:
        return None
    return f"{HOW.get(package, package)} is not installed (pip install 'minipar[parity]')"
