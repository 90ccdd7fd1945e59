"""The receive is mended, and the gradient divided by the number of microbatches."""

import numpy as np

MESSAGE = "their gradients add up"


def run_stage(comm, actions, weight, inputs, targets):
    first, last = comm.rank == 0, comm.rank == comm.size - 1
    back = np.empty_like(inputs[0])
    gradient = np.zeros_like(weight)
    kept, sent = {}, []
    for kind, i in actions:
        if kind == "F":
            x = inputs[i] if first else comm.recv(comm.rank - 1, tag=i)
            y = np.tanh(x @ weight)
            kept[i] = x, y
            if not last:
                sent.append(comm.isend(y, comm.rank + 1, tag=i))
        else:
            x, y = kept.pop(i)
            g = y - targets[i] if last else comm.recv_(back, comm.rank + 1, tag=i)
            g = g * (1 - y * y)
            gradient += x.T @ g
            if not first:
                sent.append(comm.isend(g @ weight.T, comm.rank - 1, tag=i))
    for work in sent:
        work.wait()
    return gradient / len(inputs)
