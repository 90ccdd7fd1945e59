"""`run_script`: what a script printed on MPI ranks, or an exception that tells why it failed."""

from pathlib import Path

import pytest

from minipar.comm.launcher import run_script
from minipar.errors import CommunicationError, UsageError


def script(folder: Path, text: str) -> Path:
    path = folder / "script.py"
    path.write_text(f"import sys, time, minipar\ncomm = minipar.world()\n{text}\n")
    return path


@pytest.mark.mpi
def test_what_it_printed_is_returned(tmp_path: Path) -> None:
    text = "if comm.rank == 0: print(comm.size, sys.argv[1:])"
    assert run_script(script(tmp_path, text), 2, "--n", 3) == "2 ['--n', '3']\n"


@pytest.mark.mpi
def test_a_failure_raises_and_says_why(tmp_path: Path) -> None:
    text = "if comm.rank == 1: raise ValueError('boo')\ncomm.barrier()"
    with pytest.raises(
        CommunicationError, match=r"(?s)on 2 ranks ended with code 1:.*rank 1.*ValueError: boo"
    ):
        run_script(script(tmp_path, text), 2)


@pytest.mark.mpi
def test_a_job_that_hangs_is_ended(tmp_path: Path) -> None:
    with pytest.raises(CommunicationError, match=r"was ended after 2 s"):
        run_script(script(tmp_path, "time.sleep(600)"), 2, timeout=2)


def test_a_script_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none\.py is not a file"):
        run_script(tmp_path / "none.py", 2)
