"""A training run in which a rank goes wrong in step 3: `python -m tests.faults.programs FAULT GUILTY [SECONDS]`.

GUILTY is that rank. Under mpirun the ranks are the job's; alone, two threads. It prints `ready` when the fault
strikes. SECONDS is the time-out of the threads (MPI's is in its environment).
"""

from __future__ import annotations

import os
import signal
import sys
import threading

import numpy as np

from minipar import launch, world
from minipar.comm import Communicator
from minipar.comm.launch import ranks_in_environment
from tests.checkpoint.jobs import job
from tests.faults.running import READY

STEP = 3


def strike(fault: str, guilty_rank: int, comm: Communicator) -> None:
    """Do on every rank what makes up the fault: between the backward of a step and its optimizer."""
    guilty, x = comm.rank == guilty_rank, np.ones(4, np.float32)
    if fault == "all_stopped":
        comm.barrier()
    if guilty:
        print(READY, flush=True)
    if fault == "exception" and guilty:
        raise ZeroDivisionError("by the guilty rank")
    if fault == "exits" and guilty:
        sys.exit(3)
    if fault == "exits_well" and guilty:
        sys.exit(0)
    if fault == "killed" and guilty:
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "crashes" and guilty:
        os.kill(os.getpid(), signal.SIGSEGV)
    if fault == "all_stopped" or (fault == "stopped" and guilty):  # none of its threads runs any more
        os.kill(os.getpid(), signal.SIGSTOP)
    if fault == "interrupted" and guilty:  # by somebody who presses Ctrl-C twice
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
        os.kill(os.getpid(), signal.SIGINT)
    if fault == "hangs" and guilty:
        threading.Event().wait()
    if fault == "stuck":  # every rank waits where no Python code runs
        comm.recv((comm.rank + 1) % comm.size)
    if fault == "skipped" and not guilty:
        comm.all_reduce(x)
    if fault == "mismatched":
        comm.all_reduce(x.astype(np.float64) if guilty else x)
    if fault == "reordered":
        first, then = (comm.broadcast, comm.all_reduce) if guilty else (comm.all_reduce, comm.broadcast)
        first(x)
        then(x)
    if fault == "aborts" and guilty:
        for other in set(range(comm.size)) - {guilty_rank}:
            comm.recv(other)  # sent when it has called its all-reduce
        comm.abort("had enough")
    elif fault == "aborts":
        comm.all_reduce_async(x)
        comm.send(x, guilty_rank)


def train(fault: str, guilty_rank: int) -> None:
    comm = world()
    made = job(comm, "gpt", dropout=0.0)
    ordinary = made.strategy.finish_gradients

    def finish_gradients() -> None:
        if made.steps_done == STEP - 1:
            strike(fault, guilty_rank, comm)
        ordinary()

    made.strategy.finish_gradients = finish_gradients  # type: ignore[method-assign]
    for record in made.train():
        assert record.step != STEP, "the fault did nothing"


if __name__ == "__main__":
    if ranks_in_environment():
        train(sys.argv[1], int(sys.argv[2]))
    else:
        launch(train, 2, sys.argv[1], int(sys.argv[2]), timeout=float(sys.argv[3]))
