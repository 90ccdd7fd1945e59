"""Every way an array of the GPU goes through MPI, on two ranks: `mpirun -n 2 python mpi_arrays.py [cpu]`."""

import sys

import numpy as np

import minipar
from minipar.backend import array_module, to_device, to_host

DEVICE = sys.argv[1] if len(sys.argv) > 1 else "cuda"
comm = minipar.world(checks=True)
assert comm.size == 2
me, other = comm.rank, 1 - comm.rank


def here(values: object) -> object:
    return to_device(np.asarray(values, np.float32), DEVICE)


def check(what: str, got: object, want: object) -> None:
    assert array_module(got).__name__ == ("cupy" if DEVICE == "cuda" else "numpy"), f"{what}: it left the device"
    assert np.array_equal(to_host(got), np.asarray(want, np.float32)), f"{what}: {got}, wanted {want}"


x = here([me, 10.0 + me])
check("all_reduce", comm.all_reduce(x), [1, 21])
check("all_reduce max", comm.all_reduce(x, op="max"), [1, 11])
y = here([me, 10.0 + me])
comm.all_reduce_(y)
check("all_reduce_", y, [1, 21])
check("all_reduce_async", comm.all_reduce_async(x).wait(), [1, 21])
check("broadcast", comm.broadcast(x, root=1), [1, 11])
check("all_gather", comm.all_gather(x), [0, 10, 1, 11])
check("reduce_scatter", comm.reduce_scatter(x), [1] if me == 0 else [21])
parts = comm.all_to_all([here([me, 0.0]), here([me, 1.0])])
for rank, part in enumerate(parts):
    check("all_to_all", part, [rank, me])
check("scatter", comm.scatter([here([5.0]), here([6.0])] if me == 0 else None, root=0), [5 + me])
gathered = comm.gather(x, root=0)
if me == 0:
    check("gather", gathered[1], [1, 11])
for shape, dtype in ((None, None), ((2,), np.float32)):
    arriving = comm.irecv(other, tag=3, shape=shape, dtype=dtype)
    leaving = comm.isend(x, other, tag=3)
    check("irecv", arriving.wait(), [other, 10 + other])
    leaving.wait()
into = here([0.0, 0.0])
leaving = comm.isend(x, other, tag=4)
comm.recv_(into, other, tag=4)
leaving.wait()
check("recv_", into, [other, 10 + other])
