"""Each rank divides by its own count, and gradients are summed."""

import numpy as np

from minipar import Tensor
from minipar.data import share

MESSAGE = "was each rank's loss divided by its own count"
IGNORED = -100


def sum_gradients(comm, model, x, y):
    mine = share(len(x), comm.rank, comm.size)
    model.zero_grad()
    total = np.zeros(())
    if mine.stop > mine.start:
        loss = model.loss(model(Tensor(x[mine])), y[mine]) / max(np.count_nonzero(y[mine] != IGNORED), 1)
        loss.backward()
        total = loss.data
    for p in model.parameters():
        p.grad = comm.all_reduce(np.zeros_like(p.data) if p.grad is None else p.grad)
    return float(comm.all_reduce(total))
