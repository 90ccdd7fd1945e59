"""The last stage runs its backwards in descending order, the others expect them in ascending order."""

import numpy as np

MESSAGE = "it must meet the x and y of the same microbatch"


def gpipe_step(comm, weight, inputs, targets, count):
    first, last = comm.rank == 0, comm.rank == comm.size - 1
    kept, gradient = [], np.zeros_like(weight)
    for x in inputs:
        x = x if first else comm.recv(comm.rank - 1)
        y = np.tanh(x @ weight.T)
        comm.compute(1.0)
        kept.append((x, y))
        if not last:
            comm.send(y, comm.rank + 1)
    order = range(len(inputs))
    for i in reversed(order) if last else order:
        x, y = kept[i]
        g = (y - targets[i]) / count if last else comm.recv(comm.rank + 1)
        g = g * (1 - y * y)
        gradient += g.T @ x
        comm.compute(2.0)
        if not first:
            comm.send(g @ weight, comm.rank - 1)
    return gradient
