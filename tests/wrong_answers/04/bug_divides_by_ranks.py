"""Moves the sum out of the loop, and averages over the ranks."""

import numpy as np

from minipar import Tensor

MESSAGE = "are summed over ranks, not averaged"


def accumulate_gradients(comm, model, pieces, count):
    model.zero_grad()
    for x, y in pieces:
        (model.loss(model(Tensor(x)), y) / count).backward()
    for p in model.parameters():
        p.grad = comm.all_reduce(np.zeros_like(p.data) if p.grad is None else p.grad) / comm.size
