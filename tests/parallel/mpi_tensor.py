"""Tensor parallelism on real MPI: `mpirun -n N python mpi_tensor.py`. Ends 0 if every scenario holds."""

import numpy as np

from minipar import Tensor, world
from minipar.comm.differentiable import recv, send
from tests.parallel.tensor_runs import SCENARIOS

comm = world()
for name, scenario in SCENARIOS.items():
    if comm.size != 3 and "gpt" in scenario.kind:
        scenario = type(scenario)("gpt-tied", scenario.options)
    comm.mark(phase=name)
    scenario(comm)

comm.mark(phase="send and recv")
x = Tensor(np.arange(3.0), requires_grad=True)
if comm.rank == 0:
    back = recv(comm, comm.size - 1, token=send(x * 1.0, comm, 1))
    (back * back).sum().backward()
    np.testing.assert_array_equal(x.grad, 2 * 4.0 ** (comm.size - 1) * x.data)
else:
    token = send(recv(comm, comm.rank - 1) * 2.0, comm, (comm.rank + 1) % comm.size)
    token.backward(token.data)
print(f"rank {comm.rank}: {len(SCENARIOS)} scenarios hold")
