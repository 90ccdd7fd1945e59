"""What the backend tells about the process."""

from __future__ import annotations

import subprocess
import sys

import pytest

CHILD = "from minipar.backend import peak_memory; print(peak_memory())"
LARGE_PARENT = f"""
import subprocess, sys
import numpy as np
ballast = np.ones(2**26)
subprocess.run([sys.executable, "-c", {CHILD!r}], check=True)
"""


def told(code: str) -> int:
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="Linux counts what a process was started from as its own peak")
def test_peak_memory_is_not_that_of_the_process_which_started_it() -> None:
    assert 0 < told(LARGE_PARENT) < 2**28  # the parent holds twice that


def test_peak_memory_stays_after_the_memory_is_given_back() -> None:
    assert told(f"import numpy as np; np.ones(2**26); {CHILD}") > 2**29
