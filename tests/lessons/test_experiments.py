"""Every lesson's experiment runs under mpirun with two ranks, three of them with four, and says what it needs alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from minipar.comm.launcher import run_script
from minipar.grading.manifest import Entry
from tests.lessons.lesson_files import ENTRIES, written

ON_FOUR = (2, 3, 4)  # lessons
PNG = b"\x89PNG\r\n\x1a\n"


def check(entry: Entry, ranks: int, folder: Path) -> None:
    picture = folder / "picture.png"
    printed = run_script(entry.file("experiment.py"), ranks, "--out", picture, timeout=100)
    assert len(printed.splitlines()) > 3, printed
    assert picture.read_bytes().startswith(PNG) and picture.stat().st_size > 5000


@pytest.mark.mpi
@pytest.mark.parametrize("entry", written("experiment"))
def test_on_two_ranks(entry: Entry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    check(entry, 2, tmp_path)


@pytest.mark.mpi
@pytest.mark.lessons
@pytest.mark.parametrize(
    "entry", [entry for entry in ENTRIES if entry.number in ON_FOUR], ids=lambda e: e.name
)
def test_on_four_ranks(entry: Entry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    check(entry, 4, tmp_path)


@pytest.mark.parametrize("entry", written("experiment"))
def test_alone(entry: Entry, tmp_path: Path) -> None:
    """Without mpirun it runs, or says in a line how to start it."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MINIPAR", "PMI", "OMPI"))}
    job = subprocess.run(
        [sys.executable, str(entry.file("experiment.py")), "--out", "alone.png"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
    )
    said = job.stdout + job.stderr
    assert "Traceback" not in said
    if job.returncode:
        assert job.returncode == 2 and "mpirun -n" in said, said
    else:
        assert (tmp_path / "alone.png").read_bytes().startswith(PNG)
