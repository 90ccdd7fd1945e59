"""A rank without samples returns at once, and the others wait for it."""

import numpy as np

from minipar import Tensor
from minipar.data import share

MESSAGE = "Every rank must call every collective"
IGNORED = -100


def sum_gradients(comm, model, x, y):
    count = np.count_nonzero(y != IGNORED)
    mine = share(len(x), comm.rank, comm.size)
    model.zero_grad()
    total = np.zeros(())
    if mine.stop == mine.start:
        return 0.0
    if mine.stop > mine.start:
        loss = model.loss(model(Tensor(x[mine])), y[mine]) / count
        loss.backward()
        total = loss.data
    for p in model.parameters():
        p.grad = comm.all_reduce(np.zeros_like(p.data) if p.grad is None else p.grad)
    return float(comm.all_reduce(total))
