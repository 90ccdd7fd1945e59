"""Run the `minipar` command in this process or as MPI jobs, and make data files for it."""

from __future__ import annotations

import os
import re
import struct
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from typer.testing import CliRunner

from minipar.cli import app

IDX_TYPES = {"uint8": 0x08, "float32": 0x0D}
ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
SMALL = {
    "mlp": ["--width", "8", "--batch", "6"],
    "convnet": ["--width", "8", "--layers", "1", "--batch", "6"],
    "gpt": ["--width", "16", "--layers", "1", "--heads", "2", "--seq-len", "8", "--batch", "6"],
}


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


def minipar(*words: object) -> Outcome:
    """Run a command in this process; an exception that is no exit is raised here."""
    result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    return Outcome(result.exit_code, ANSI.sub("", result.stdout), ANSI.sub("", result.stderr))


def process(*words: object, limit: float = 60.0, **environment: str) -> Outcome:
    """Run `python -m minipar ...` as a process of its own."""
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith(("PMI", "MINIPAR", "OMPI"))
    }
    job = subprocess.run(
        [sys.executable, "-m", "minipar", *map(str, words)],
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        timeout=limit,
    )
    return Outcome(job.returncode, job.stdout, job.stderr)


def assert_one_line(outcome: Outcome, code: int, *said: str) -> None:
    """The command ended with `code`, and told why in one line that has these parts."""
    assert outcome.code == code, outcome
    lines = outcome.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("minipar: "), outcome.err
    for part in said:
        assert part in lines[0], lines[0]
    assert "Traceback" not in outcome.out + outcome.err


def write_idx(path: Path, values: np.ndarray) -> Path:
    """Write an array as an IDX file."""
    header = struct.pack(f">HBB{values.ndim}I", 0, IDX_TYPES[values.dtype.name], values.ndim, *values.shape)
    path.write_bytes(header + values.astype(values.dtype.newbyteorder(">")).tobytes())
    return path


def idx_folder(folder: Path, samples: int = 12, dtype: str = "uint8") -> Path:
    """Write a data set of 4 × 4 images in MNIST's layout."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, n in (("train", samples), ("t10k", 5)):
        labels = (np.arange(n) % 3).astype(np.uint8)
        write_idx(folder / f"{name}-images-idx3-ubyte", rng.integers(0, 256, (n, 4, 4)).astype(dtype))
        write_idx(folder / f"{name}-labels-idx1-ubyte", labels)
    return folder
