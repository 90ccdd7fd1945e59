"""Divides by the number of microbatches, though count is global."""

import numpy as np

from minipar import Tensor

MESSAGE = "times too small"


def accumulate_gradients(comm, model, pieces, count):
    model.zero_grad()
    for x, y in pieces:
        (model.loss(model(Tensor(x)), y) / count / len(pieces)).backward()
    for p in model.parameters():
        p.grad = comm.all_reduce(np.zeros_like(p.data) if p.grad is None else p.grad)
