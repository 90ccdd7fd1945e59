"""Pipelines under real MPI: equal to serial, refused in one line, ended by the stage that raises."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from minipar.comm.launcher import find_mpirun, is_open_mpi, job_environment
from minipar.errors import UsageError
from minipar.verification import Report
from tests.commands.command_line import Outcome, assert_one_line
from tests.pipeline import full_grid
from tests.pipeline.full_grid import Case, Found, judge

LIMIT = 100.0  # seconds for a job; the longest takes about 10
ROOT = Path(__file__).parents[2]


def job(ranks: int, *words: str) -> Outcome:
    """Run Python on MPI ranks from the top of the repository, started by plain mpirun."""
    program = find_mpirun()
    done = subprocess.run(
        [program, "-n", str(ranks), sys.executable, *words],
        env=job_environment(ranks, is_open_mpi(program)), cwd=ROOT, capture_output=True, text=True, timeout=LIMIT,
    )  # fmt: skip
    return Outcome(done.returncode, done.stdout, done.stderr)


@pytest.mark.mpi
def test_a_part_of_the_grid() -> None:
    done = job(4, "-m", "tests.pipeline.full_grid", "--mpi", "--every", "89")
    assert done.code == 0, done
    passed = done.out.splitlines()[-1]
    assert passed.endswith(" passed, 0 failed") and int(passed.split()[0]) >= 10, done.out


@pytest.mark.mpi
def test_a_stage_that_raises_ends_the_job_and_is_named() -> None:
    done = job(2, "-m", "tests.pipeline.mpi_failing_stage")
    assert done.code not in (0, 124)
    assert "ArithmeticError: planted" in done.err
    assert "rank 1, step 1, B1 on stage 1" in done.err, done.err


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("gpt", "--zero", 2), 2, ("ZeRO 2 with a pipeline is refused",)),
        (("gpt", "--layers", 1, "--schedule", "interleaved"), 2, ("3 blocks cannot fill 2 stages of 2 chunks",)),
        (("convnet", "--tiles", "2x2"), 2, ("stem.conv reads 3 × 3 pixels",)),
        (("gpt", "--schedule", "/no/such/file.csv"), 1, ("cannot be read",)),
    ],
)  # fmt: skip
def test_a_refusal_is_one_line(words: tuple[object, ...], code: int, said: tuple[str, ...]) -> None:
    """Printed once, not by every rank, and the job ends with the refusal's code."""
    assert_one_line(job(2, "-m", "minipar", "verify", *map(str, words), "--pp", "2", "--steps", "1"), code, *said)


def test_the_grid_can_fail() -> None:
    """It notices what differs, what is refused and was not to be, and what ran and was not to."""
    good = Report(1e-10)
    for worst in good.worst.values():
        worst.see(1e-16, "somewhere")
    bad = replace(good, replicas_differ=1)

    def refusing(case: Case) -> Report:
        raise UsageError("no reason")

    plain, refused = Case("g", 2, "gpt", {}), Case("g", 2, "gpt", {}, "good reason")
    assert judge(plain, lambda case: good, Found()) is None
    assert "differs" in (judge(plain, lambda case: bad, Found()) or "")
    assert "refused: no reason" in (judge(plain, refusing, Found()) or "")
    assert "refused: no reason" in (judge(refused, refusing, Found()) or "")
    assert "it was to be refused" in (judge(refused, lambda case: good, Found()) or "")


def test_the_grid_is_the_whole_grid() -> None:
    """Every schedule on 2, 3 and 4 stages; all ten factorings of 8 with both ZeRO stages."""
    stages = [case for case in full_grid.schedules_on_stages() if case.kind == "gpt" and not case.refused]
    assert {(c.options["schedule"], c.ranks) for c in stages} == {
        (s, p) for s in full_grid.SCHEDULES for p in (2, 3, 4)
    }
    assert {c.options["microbatches"] for c in stages if c.ranks == 3} == {3, 6, 7, 8}
    layouts = [c.options for c in full_grid.layouts_of_eight() if not c.refused and c.options["zero"] < 2]
    assert len({(o["dp"], o["pp"], o["tp"], o["zero"]) for o in layouts}) == 20
