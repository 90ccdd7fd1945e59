"""Zeroing before every microbatch keeps only the last."""

import numpy as np

from minipar import Tensor

MESSAGE = "only the last microbatch is in the gradient"


def accumulate_gradients(comm, model, pieces, count):
    for x, y in pieces:
        model.zero_grad()
        (model.loss(model(Tensor(x)), y) / count).backward()
    for p in model.parameters():
        p.grad = comm.all_reduce(np.zeros_like(p.data) if p.grad is None else p.grad)
