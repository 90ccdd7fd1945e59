"""The sum is computed and not put into p.grad."""

import numpy as np

MESSAGE = "stepped with its own gradient"


def step_at_master(comm, model, optimizer, master=0):
    for p in model.parameters():
        p.grad = np.zeros_like(p.data) if p.grad is None else p.grad
        comm.reduce(p.grad, root=master)
    if comm.rank == master:
        optimizer.step()
    for p in model.parameters():
        p.assign_(comm.broadcast(p.data, root=master))
        p.grad = None
