"""One rank of a training run goes wrong: the job ends, says which rank, at which step and why, and leaves nothing."""

import re
from typing import NamedTuple

import pytest

from tests.faults.running import SLACK, mpirun, needs_proc, python

pytestmark = [needs_proc, pytest.mark.mpi]
TIMEOUT = 3.0  # seconds of a wait, for faults that only the time-out ends
PATIENT = 60.0  # for the others: they must not need it


class Expected(NamedTuple):
    """What a fault of one of two ranks leads to.

    Attributes:
        code: the job's.
        cause: said on both engines, and `also`; {guilty} and {other} are the ranks.
        mpi, threads: what more is said on that engine; None where the fault cannot be.
        hangs: the job ends by the time-out only.
        either: rank 0, the watchdog's hub, is at fault in its turn.
    """

    code: int
    cause: str
    also: tuple[str, ...] = ()
    mpi: tuple[str, ...] | None = ()
    threads: tuple[str, ...] | None = ()
    hangs: bool = False
    either: bool = False


HERE = "step 3, backward"
DIED = "rank {guilty} died in step 3, backward (killed by a signal, crashed in native code"
HUNG = ("HangError", "rank {other} waits in ")
FAULTS = {
    "exception": Expected(
        1, "ZeroDivisionError: by the guilty rank", (f"rank {{guilty}}, {HERE}",), threads=("raised on rank {guilty}",),
        either=True,
    ),
    "killed": Expected(9, DIED, threads=None, either=True),
    "crashes": Expected(11, DIED, threads=None),
    "interrupted": Expected(130, f"[rank {{guilty}}, {HERE}] interrupted", threads=None),
    "exits": Expected(3, f"[rank {{guilty}}, {HERE}] sys.exit(3)", either=True),
    "exits_well": Expected(1, "rank {guilty} has finished (step 3, backward)", HUNG, hangs=True, either=True),
    "hangs": Expected(
        1, "rank {guilty} is not in a communication (step 3, backward)", HUNG, hangs=True, either=True
    ),
    "stopped": Expected(1, "rank {guilty} does not answer", HUNG, threads=None, hangs=True, either=True),
    "stuck": Expected(1, f"rank {{guilty}} waits in recv(source={{other}}, tag=0) ({HERE})", HUNG, hangs=True),
    "skipped": Expected(
        1, "rank {other} waits in all_reduce #", ("HangError", "last communications in world", "not called"), hangs=True
    ),
    "mismatched": Expected(
        1, "differ in dtype", ("MismatchError", "rank {guilty} called all_reduce #", "float64", "where the ranks part")
    ),
    "reordered": Expected(
        1, "differ in operation", ("MismatchError", "rank {guilty} called broadcast #", "where the ranks part")
    ),
    "aborts": Expected(1, f"rank {{guilty}}, {HERE}: aborted: had enough", ("where the ranks part",)),
}  # fmt: skip
CASES = [
    pytest.param(engine, fault, guilty, id=f"{engine}-{fault}-{guilty}")
    for engine in ("mpi", "threads")
    for fault, expected in FAULTS.items()
    for guilty in ((0, 1) if expected.either else (1,))
    if getattr(expected, engine) is not None
]


@pytest.mark.parametrize(("engine", "fault", "guilty"), CASES)
def test_a_fault_ends_the_job_and_is_named(engine: str, fault: str, guilty: int) -> None:
    expected = FAULTS[fault]
    timeout = str(TIMEOUT if expected.hangs else PATIENT)
    if engine == "mpi":
        job = mpirun(2, "tests.faults.programs", fault, str(guilty), MINIPAR_TIMEOUT=timeout)
    else:
        job = python("tests.faults.programs", fault, guilty, timeout)
    assert job.code == expected.code, job
    for text in (expected.cause, *expected.also, *getattr(expected, engine)):
        assert text.format(guilty=guilty, other=1 - guilty) in job.err, job.err
    assert re.search(rf"\brank {guilty}\b", job.err) and HERE in job.err, job.err
    assert job.seconds < (TIMEOUT if expected.hangs else 0) + SLACK
    assert not job.orphans
    if engine == "mpi" and fault != "exception":
        assert "Traceback" not in job.err, job.err
