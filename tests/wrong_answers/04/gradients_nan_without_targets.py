"""Means weighted by their counts are right, but a rank whose targets are all ignored divides 0 by 0."""

import numpy as np

from minipar import Tensor
from minipar.data import share

MESSAGE = "divides 0 by 0"
IGNORED = -100


def sum_gradients(comm, model, x, y):
    mine = share(len(x), comm.rank, comm.size)
    count = np.count_nonzero(y != IGNORED)
    own = np.count_nonzero(y[mine] != IGNORED)
    model.zero_grad()
    total = np.zeros(())
    if mine.stop > mine.start:
        loss = model.loss(model(Tensor(x[mine])), y[mine]) / np.float64(own) * (own / count)
        loss.backward()
        total = loss.data
    for p in model.parameters():
        p.grad = comm.all_reduce(np.zeros_like(p.data) if p.grad is None else p.grad)
    return float(comm.all_reduce(total))
