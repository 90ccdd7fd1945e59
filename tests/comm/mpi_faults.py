"""Programs that go wrong on one rank: `mpirun -n N python mpi_faults.py FAULT`. The last rank is at fault."""

import os
import signal
import sys
import threading
import time

import numpy as np

from minipar.comm import world
from minipar.errors import UsageError

comm, fault = world(), sys.argv[1]
guilty = comm.rank == comm.size - 1
x = np.ones(4, np.float32)
comm.mark(step=2, phase="backward")
comm.all_reduce(x)

if fault == "skips":  # an all-reduce, and has finished while the others wait
    if not guilty:
        comm.all_reduce(x)
elif fault == "waits_elsewhere":
    comm.recv(0, tag=3) if guilty else comm.all_reduce(x)
elif fault == "computes":
    if guilty:
        time.sleep(60)
    comm.barrier()
elif fault == "sends_in_a_circle":
    comm.send(x, (comm.rank + 1) % comm.size)
elif fault == "raises":
    if guilty:
        raise ZeroDivisionError("by the guilty rank")
    comm.barrier()
elif fault == "raises_usage":
    if guilty:
        raise UsageError("batch 7 does not divide")
    comm.barrier()
elif fault == "all_raise_usage":
    raise UsageError("batch 7 does not divide")
elif fault == "raises_in_thread":
    if guilty:
        threading.Thread(target=lambda: [][1], name="loader").start()
    comm.recv(comm.rank)
elif fault == "exits":
    if guilty:
        sys.exit(3)
    comm.barrier()
elif fault == "all_exit":
    print("the reason", file=sys.stderr) if comm.rank == 0 else None
    sys.exit(2)
elif fault == "exits_caught":
    try:
        sys.exit(3)
    except SystemExit:
        comm.barrier()
elif fault == "killed":
    if guilty:
        os.kill(os.getpid(), signal.SIGKILL)
    comm.barrier()
elif fault == "aborts":
    if guilty:
        comm.abort("had enough")
    comm.barrier()
elif fault == "mismatch":
    comm.broadcast(x) if guilty else comm.all_reduce(x)
elif fault == "wrong_shape_received":
    if guilty:
        comm.send(x, 0)
    elif comm.rank == 0:
        comm.recv(comm.size - 1, shape=(3,), dtype=np.float32)  # too short for what comes
elif fault == "wrong_shape_polled":
    if guilty:
        comm.send(x, 0)
    elif comm.rank == 0:
        work = comm.irecv(comm.size - 1, shape=(3,), dtype=np.float32)
        while not work.done():
            pass
elif fault == "finishes_late":
    if guilty:
        time.sleep(1.5)  # longer than the time-out of the test: waiting at the exit is no hang
    print("finished", comm.rank)
else:
    raise AssertionError(fault)
