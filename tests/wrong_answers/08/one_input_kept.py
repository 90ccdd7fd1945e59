"""Only the activations of the last microbatch are kept for backward."""

import numpy as np

MESSAGE = "used the activations of the last one"


def gpipe_step(comm, weight, inputs, targets, count):
    first, last = comm.rank == 0, comm.rank == comm.size - 1
    gradient, m = np.zeros_like(weight), len(inputs)
    for x in inputs:
        x = x if first else comm.recv(comm.rank - 1)
        y = np.tanh(x @ weight.T)
        comm.compute(1.0)
        if not last:
            comm.send(y, comm.rank + 1)
    for i in range(m):
        g = (y - targets[i]) / count if last else comm.recv(comm.rank + 1)
        g = g * (1 - y * y)
        gradient += g.T @ x
        comm.compute(2.0)
        if not first:
            comm.send(g @ weight, comm.rank - 1)
    return gradient
