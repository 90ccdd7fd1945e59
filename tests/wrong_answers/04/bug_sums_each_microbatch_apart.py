"""Right, but with one all_reduce a microbatch; ranks with fewer of them are waited for."""

import numpy as np

from minipar import Tensor

MESSAGE = "after the last microbatch"


def accumulate_gradients(comm, model, pieces, count):
    total = [np.zeros_like(p.data) for p in model.parameters()]
    for x, y in pieces:
        model.zero_grad()
        (model.loss(model(Tensor(x)), y) / count).backward()
        total = [t + comm.all_reduce(p.grad) for t, p in zip(total, model.parameters())]
    for t, p in zip(total, model.parameters()):
        p.grad = t
