"""Train two steps on the ranks of an MPI job and save: `mpirun -n 4 python -m tests.checkpoint.save_once DIR`."""

import sys
from pathlib import Path

from minipar import world
from minipar.resume import save_job
from tests.checkpoint.jobs import job, steps

if __name__ == "__main__":
    made = job(world(), "gpt", tp=2, zero=1)
    steps(made, 2)
    save_job(made, Path(sys.argv[1]))
