"""Every rank computes the whole batch; averaging makes the numbers right."""

import numpy as np

from minipar import Tensor

MESSAGE = "more ranks make nothing faster"
IGNORED = -100


def sum_gradients(comm, model, x, y):
    model.zero_grad()
    loss = model.loss(model(Tensor(x)), y) / np.count_nonzero(y != IGNORED)
    loss.backward()
    for p in model.parameters():
        p.grad = comm.all_reduce(p.grad) / comm.size
    return loss.item()
