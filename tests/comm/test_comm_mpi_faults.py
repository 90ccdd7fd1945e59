"""A job in which one rank goes wrong ends, non-zero, within seconds, and says which rank and where."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from mpi_helpers import HERE, Outcome, mpirun

from minipar.comm.launch import default_checks, mpi_timeout, refuse_foreign_launcher
from minipar.comm.launcher import find_mpirun, run_mpi
from minipar.errors import UsageError

pytestmark = pytest.mark.mpi
SCRIPT = HERE / "mpi_faults.py"
TIMEOUT = 1.2
# Seconds that a job may take from mpirun's start, two other jobs beside it. How long it outlives its fault is
# measured by tests/faults, one job at a time.
LIMIT = 15

HANGS = {  # (fault, ranks): what is said
    ("skips", 3): "ranks 0-1 wait in all_reduce #2 of (4,) float32 (step 2, backward); "
    "rank 2 has finished (step 2, backward); its last was all_reduce #1",
    ("waits_elsewhere", 2): "rank 1 waits in recv(source=0, tag=3) (step 2, backward)",
    ("computes", 2): "rank 1 is not in a communication (step 2, backward); its last was all_reduce #1",
    ("sends_in_a_circle", 2): "rank 1 waits in send(dest=0, tag=0) of (4,) float32",
}
FAILURES = {  # fault: exit code and what is said
    "raises": (1, "[rank 1, step 2, backward] ZeroDivisionError: by the guilty rank"),
    "raises_usage": (2, "[rank 1, step 2, backward] UsageError: batch 7 does not divide"),
    "all_raise_usage": (2, "[rank 0, step 2, backward] UsageError: batch 7 does not divide"),
    "raises_in_thread": (1, "[rank 1, step 2, backward, thread loader] IndexError"),
    "exits": (3, "[rank 1, step 2, backward] sys.exit(3)"),
    "all_exit": (2, "the reason"),
    "aborts": (1, "rank 1, step 2, backward: aborted: had enough"),
    "mismatch": (
        1,
        "MismatchError: rank 0 called all_reduce #2 of (4,) float32; rank 1 called broadcast #2(root=0)",
    ),
    "wrong_shape_received": (1, "rank 1 sent (4,) float32: they differ in shape or dtype"),
    "wrong_shape_polled": (1, "rank 1 sent (4,) float32: they differ in shape or dtype"),
}
Jobs = dict[str, Future[Outcome]]


@pytest.fixture(scope="module")
def jobs() -> Iterator[Jobs]:
    """All faults, started ahead and three at a time: most of a job is waiting."""
    patient = {"MINIPAR_TIMEOUT": "60", "MPIR_CVAR_ENABLE_HEAVY_YIELD": "1"}
    hasty = {**patient, "MINIPAR_TIMEOUT": str(TIMEOUT)}
    with ThreadPoolExecutor(3) as pool:

        def start(fault: str, ranks: int, **settings: str) -> Future[Outcome]:
            return pool.submit(mpirun, ranks, SCRIPT, fault, limit=60, **settings)

        started = {fault: start(fault, ranks, **hasty) for fault, ranks in HANGS}
        started["unchecked"] = start("skips", 2, **hasty, MINIPAR_CHECKS="0")
        started["finishes_late"] = start("finishes_late", 2, **hasty)
        for fault in (*FAILURES, "exits_caught", "killed"):
            started[fault] = start(fault, 3 if fault == "killed" else 2, **patient)
        yield started


@pytest.mark.parametrize("fault", [fault for fault, _ in HANGS])
def test_a_hang_ends_at_the_timeout_and_says_what_each_rank_does(fault: str, jobs: Jobs) -> None:
    job = jobs[fault].result()
    (said,) = [text for (name, _), text in HANGS.items() if name == fault]
    assert job.code == 1
    assert "HangError" in job.err and f"has waited {TIMEOUT} s" in job.err
    assert said in job.err, job.err
    assert TIMEOUT < job.seconds < TIMEOUT + LIMIT


def test_checks_off_still_ends_a_hang(jobs: Jobs) -> None:
    job = jobs["unchecked"].result()
    assert job.code == 1 and "rank 0 waits in all_reduce #2" in job.err and "rank 1 has finished" in job.err


@pytest.mark.parametrize("fault", FAILURES)
def test_a_failure_ends_the_job_and_names_the_rank(fault: str, jobs: Jobs) -> None:
    job, (code, said) = jobs[fault].result(), FAILURES[fault]
    assert job.code == code, job.err
    assert said in job.err, job.err
    assert ("Traceback" in job.err) == (fault in ("raises", "raises_in_thread")), job.err
    assert job.seconds < LIMIT


@pytest.mark.parametrize("fault", ("all_raise_usage", "all_exit"))
def test_what_all_ranks_say_is_said_once(fault: str, jobs: Jobs) -> None:
    said = jobs[fault].result().err
    assert said.count(FAILURES[fault][1].split("] ")[-1]) == 1
    assert "Abort(" not in said and "rank 1" not in said


def test_a_killed_rank_ends_the_job_and_is_named(jobs: Jobs) -> None:
    """Its monitor says so before mpirun knows; the ranks that mpirun then kills are not named."""
    job = jobs["killed"].result()
    assert job.code != 0 and job.seconds < LIMIT
    assert "minipar: rank 2 died in step 2, backward (killed by a signal" in job.err, job
    assert job.err.count("died") == 1


def test_an_exit_that_was_caught_is_none(jobs: Jobs) -> None:
    job = jobs["exits_caught"].result()
    assert job.code == 0, job.err


def test_waiting_for_others_at_the_exit_is_no_hang(jobs: Jobs) -> None:
    job = jobs["finishes_late"].result()
    assert job.code == 0, job.err
    assert sorted(job.out.split("\n")) == ["", "finished 0", "finished 1"]


# The launcher -----------------------------------------------------------------------------------------


def script(directory: Path, text: str) -> list[str]:
    file = directory / "script.py"
    file.write_text(text)
    return [sys.executable, str(file)]


def test_launcher_sets_up_the_job_and_returns_its_code(tmp_path: Path) -> None:
    command = script(
        tmp_path,
        "import os, sys\n"
        "from minipar.comm import world\n"
        "comm = world()\n"
        "variables = ('MINIPAR_WORLD_SIZE', 'OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS')\n"
        f"with open(r'{tmp_path}/' + str(comm.rank), 'w') as file:\n"
        "    file.write(' '.join(os.environ[name] for name in variables))\n"
        "comm.barrier()\n"
        "sys.exit(5)\n",
    )
    assert run_mpi(command, 2, timeout=30) == 5
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == ["2 1 1", "2 1 1"]


def test_launcher_kills_the_job_at_the_timeout(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pids = tmp_path / "pids"
    pids.mkdir()
    command = script(
        tmp_path,
        f"import os, time; open(os.path.join({str(pids)!r}, str(os.getpid())), 'w'); time.sleep(60)",
    )
    start = time.monotonic()
    assert run_mpi(command, 2, timeout=1.5) == 124
    assert time.monotonic() - start < LIMIT
    assert "killed after 1.5 s: ranks 0-1 have told nothing here; it ran " in capfd.readouterr().err
    assert_gone(pids)


def assert_gone(pids: Path) -> None:
    left = [int(file.name) for file in pids.iterdir()]
    assert len(left) == 2
    deadline = time.monotonic() + 10
    while left and time.monotonic() < deadline:
        left = [pid for pid in left if alive(pid)]
    assert not left, "orphans"


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")
    return not status.exists() or status.read_text().rsplit(")", 1)[1].split()[0] != "Z"


@pytest.mark.parametrize("number", (signal.SIGINT, signal.SIGTERM))
def test_launcher_passes_signals_on(tmp_path: Path, number: signal.Signals) -> None:
    pids = tmp_path / "pids"
    pids.mkdir()
    command = script(
        tmp_path,
        f"import os, time; open(os.path.join({str(pids)!r}, str(os.getpid())), 'w'); time.sleep(60)",
    )
    program = f"import sys; from minipar.comm.launcher import run_mpi; sys.exit(run_mpi({command!r}, 2))"
    launcher = subprocess.Popen([sys.executable, "-c", program])
    deadline = time.monotonic() + 20
    while len(list(pids.iterdir())) < 2 and time.monotonic() < deadline:
        continue
    launcher.send_signal(number)
    assert launcher.wait(20) != 0
    assert_gone(pids)


def test_a_world_of_another_size_is_refused(tmp_path: Path) -> None:
    command = script(tmp_path, "from minipar.comm import world; world()")
    job = mpirun(2, Path(command[1]), MINIPAR_WORLD_SIZE="3", limit=30)
    assert job.code == 2
    assert "UsageError: MINIPAR_WORLD_SIZE says 3 ranks, but MPI has 2" in job.err


def outside_any_launcher() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(("PMI", "MINIPAR"))}


def test_open_mpis_mpirun_is_noticed_before_mpich_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PMI_SIZE", "MPI4PY_LIBMPI", "MPI4PY_MPIABI"):
        monkeypatch.delenv(name, raising=False)
    module = sys.modules[refuse_foreign_launcher.__module__]  # the package has a function of its name
    monkeypatch.setattr(module, "_installed", lambda name: name == "mpich")
    refuse_foreign_launcher()
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    with pytest.raises(UsageError, match="mpirun is Open MPI's, but mpi4py uses MPICH"):
        refuse_foreign_launcher()
    monkeypatch.setattr(module, "_installed", lambda name: True)
    refuse_foreign_launcher()


@pytest.mark.parametrize("variable", ("PMI_SIZE", "SLURM_STEP_NUM_TASKS"))
def test_another_mpis_launcher_is_noticed(variable: str) -> None:
    """Under a foreign mpirun each process is a world of one, and its variables say that there are more."""
    job = subprocess.run(
        [sys.executable, "-c", "from minipar.comm import world; world()"],
        env={**outside_any_launcher(), variable: "4"},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert job.returncode == 2
    assert f"UsageError: {variable} says 4 ranks, but MPI has 1" in job.stderr
    assert "minipar run -n 4" in job.stderr and "Traceback" not in job.stderr


def test_settings_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MINIPAR_TIMEOUT", "MINIPAR_CHECKS"):
        monkeypatch.delenv(name, raising=False)
    assert mpi_timeout() == 60 and default_checks() is True
    monkeypatch.setenv("MINIPAR_TIMEOUT", "2.5")
    monkeypatch.setenv("MINIPAR_CHECKS", "0")
    assert mpi_timeout() == 2.5 and default_checks() is False
    for wrong in ("soon", "0", "-1", "nan"):
        monkeypatch.setenv("MINIPAR_TIMEOUT", wrong)
        with pytest.raises(UsageError, match=f"MINIPAR_TIMEOUT='{wrong}'"):
            mpi_timeout()
    monkeypatch.setenv("MINIPAR_CHECKS", "yes")
    with pytest.raises(UsageError, match="MINIPAR_CHECKS='yes'"):
        default_checks()


def test_launcher_refuses_what_cannot_be(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="ranks=0"):
        run_mpi(["true"], 0)
    assert Path(find_mpirun()).parent == Path(sys.executable).parent
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match="no mpirun"):
        find_mpirun()


def test_a_single_rank_does_not_import_mpi() -> None:
    program = (
        "import sys; from minipar.comm import world; import numpy as np\n"
        "assert world().all_reduce(np.ones(3)).sum() == 3 and world() is world()\n"
        "assert 'mpi4py' not in sys.modules"
    )
    job = subprocess.run([sys.executable, "-c", program], env=outside_any_launcher(), timeout=30)
    assert job.returncode == 0
