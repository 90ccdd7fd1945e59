"""all_reduce, and every rank steps: right weights, and state everywhere."""

import numpy as np

MESSAGE = "gives every rank a sum that only the master needs"


def step_at_master(comm, model, optimizer, master=0):
    for p in model.parameters():
        p.grad = comm.all_reduce(np.zeros_like(p.data) if p.grad is None else p.grad)
    optimizer.step()
    for p in model.parameters():
        p.grad = None
