"""One rank of a training run goes wrong: the job ends, says which rank, at which step and why, and leaves nothing."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import pytest

from tests.faults.running import Outcome, mpirun, needs_proc, python, slack

pytestmark = [needs_proc, pytest.mark.mpi]
TIMEOUT = 3.0  # seconds of a wait, for faults that only the time-out ends
PATIENT = 60.0  # for the others: they must not need it


class Expected(NamedTuple):
    """What a fault leads to; `said` on both engines, `mpi` and `threads` on one (None: not to be tested there)."""

    code: int
    said: tuple[str, ...]
    mpi: tuple[str, ...] | None = ()
    threads: tuple[str, ...] | None = ()
    hangs: bool = False


DIED = "rank 1 died in step 3, backward (killed by a signal, crashed in native code"
HUNG = ("HangError", "rank 0 waits in ")
FAULTS = {
    "exception": Expected(
        1, ("ZeroDivisionError: by the guilty rank", "rank 1, step 3, backward"), threads=("raised on rank 1",)
    ),
    "killed": Expected(9, (DIED,), threads=None),
    "crashes": Expected(11, (DIED,), threads=None),
    "exits": Expected(3, ("[rank 1, step 3, backward] sys.exit(3)",)),
    "exits_well": Expected(1, (*HUNG, "rank 1 has finished"), hangs=True),
    "hangs": Expected(1, (*HUNG, "rank 1 is not in a communication (step 3, backward)"), hangs=True),
    "stuck": Expected(1, ("HangError", "waits in recv(source=0, tag=0) (step 3, backward)"), hangs=True),
    "skipped": Expected(
        1, ("HangError", "waits in all_reduce #", "last communications in world", "not called"), hangs=True
    ),
    "mismatched": Expected(
        1, ("MismatchError", "float32", "float64", "differ in dtype", "where the ranks part", "step 3, backward")
    ),
    "reordered": Expected(1, ("MismatchError", "differ in operation", "where the ranks part", "step 3, backward")),
    "aborts": Expected(1, ("rank 1, step 3, backward: aborted: had enough", "where the ranks part")),
}
CASES = [
    pytest.param(engine, fault, id=f"{engine}-{fault}")
    for engine in ("mpi", "threads")
    for fault, expected in FAULTS.items()
    if getattr(expected, engine) is not None
]


@pytest.fixture(scope="module")
def jobs() -> Iterator[dict[tuple[str, str], Future[Outcome]]]:
    """All faults, started ahead and three at a time: most of a job is waiting."""
    with ThreadPoolExecutor(3) as pool:

        def start(engine: str, fault: str) -> Future[Outcome]:
            timeout = str(TIMEOUT if FAULTS[fault].hangs else PATIENT)
            if engine == "mpi":
                return pool.submit(mpirun, 2, "tests.faults.programs", fault, MINIPAR_TIMEOUT=timeout)
            return pool.submit(python, "tests.faults.programs", fault, timeout)

        yield {case.values: start(*case.values) for case in CASES}  # type: ignore[misc]


@pytest.mark.parametrize(("engine", "fault"), CASES)
def test_a_fault_ends_the_job_and_is_named(
    engine: str, fault: str, jobs: dict[tuple[str, str], Future[Outcome]]
) -> None:
    job, expected = jobs[engine, fault].result(), FAULTS[fault]
    assert job.code == expected.code, job
    for text in (*expected.said, *getattr(expected, engine)):
        assert text in job.err, job.err
    assert job.seconds < (TIMEOUT if expected.hangs else 0) + slack()
    assert not job.orphans
    if engine == "mpi" and fault != "exception":
        assert "Traceback" not in job.err, job.err
