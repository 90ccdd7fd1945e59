"""Every command explains itself with an example; `doctor` says what is wrong and what to do about it."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from minipar import __version__, doctor
from minipar.config import TrainConfig
from tests.commands.command_line import minipar

COMMANDS = ("train", "verify", "run", "generate", "doctor")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example(command: str) -> None:
    done = minipar(command, "--help")
    assert done.code == 0
    assert f"Example: minipar {command}" in done.out
    assert minipar(command, "-h").out == done.out


def test_minipar_alone_shows_the_commands() -> None:
    done = minipar()
    assert done.code == 0 and all(command in done.out for command in COMMANDS)
    assert minipar("--help").out.split() == done.out.split()
    assert minipar("--version").out == f"minipar {__version__}\n"


@pytest.mark.parametrize("command", ("train", "verify"))
def test_every_setting_is_an_option_with_a_help_text(command: str) -> None:
    text = minipar(command, "--help").out
    for f in fields(TrainConfig):
        if f.name != "model":
            assert f.metadata["help"] and f"--{f.name.replace('_', '-')[:20]}" in text, f.name


@pytest.mark.mpi
def test_doctor_finds_this_environment_well() -> None:
    done = minipar("doctor")
    assert done.code == 0, done.out
    for subject in ("Python", "NumPy", "BLAS", "MPI library", "MPI launcher", "GPU", "cores"):
        assert re.search(rf"ok\s+{subject}\s", done.out), (subject, done.out)
    assert "1 + 2 = 3 on both" in done.out


def test_doctor_names_a_fix_and_exits_1(monkeypatch: pytest.MonkeyPatch) -> None:
    bad = doctor.Finding("MPI launcher", "no mpirun was found", False, "pip install mpich")
    monkeypatch.setattr(doctor, "examine", lambda: [doctor.Finding("Python", "3.11"), bad])
    done = minipar("doctor")
    assert done.code == 1
    assert "no mpirun was found" in done.out and "fix: pip install mpich" in done.out


def test_doctor_notices_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    finding = doctor._launcher()
    assert not finding.well and "no mpirun" in finding.found and "pip install" in finding.fix
    assert not doctor._two_ranks().well


@pytest.mark.parametrize(
    ("script", "found"),
    [("exit 3", "ends without a word, exit code 3"), ("sleep 60", "does not start within"),
     ("echo no >&2; exit 1", "no")],
)
def test_doctor_survives_an_mpi_that_says_nothing(
    script: str, found: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\nexec sh -c '{script}'\n")
    python.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(python))
    monkeypatch.setattr(doctor, "MPI_SECONDS", 1)
    finding = doctor._mpi_library()
    assert not finding.well and found in finding.found and finding.fix == "pip install mpi4py mpich"
