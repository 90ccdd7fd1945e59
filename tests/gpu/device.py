"""Whether there is a GPU for the tests, and if not, why not."""

from __future__ import annotations

import pytest

from minipar.backend import device_module
from minipar.errors import UsageError


def reason() -> str | None:
    """Return what is missing for tests on a GPU; None if nothing is."""
    try:
        device_module("cuda")
    except UsageError as error:
        return str(error)
    return None


REASON = reason()
needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(REASON is not None, reason=f"{REASON}")]
