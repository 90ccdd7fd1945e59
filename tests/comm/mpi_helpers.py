"""Start real MPI jobs from tests, each with a time limit of its own."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from minipar.comm.launcher import find_mpirun, is_open_mpi, job_environment

HERE = Path(__file__).parent


class Outcome(NamedTuple):
    code: int
    out: str
    err: str
    seconds: float


def mpirun(
    ranks: int, script: Path, *arguments: str, limit: float = 60.0, launched: bool = False, **settings: str | None
) -> Outcome:
    """Run `mpirun -n ranks python script arguments`, plainly or as the launcher does.

    `settings` are environment variables; None takes one away.
    """
    program = find_mpirun()
    environment = dict(os.environ)
    if launched or is_open_mpi(program):  # Open MPI needs its settings to run as root and crowded
        environment = job_environment(ranks, is_open_mpi(program), environment)
    environment = {k: v for k, v in (environment | settings).items() if v is not None}
    start = time.monotonic()
    job = subprocess.run(
        [program, "-n", str(ranks), sys.executable, str(script), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=limit,
        start_new_session=True,
    )
    return Outcome(job.returncode, job.stdout, job.stderr, time.monotonic() - start)
