"""Reference solution of lesson 4."""

import numpy as np

from minipar import Tensor

IGNORED = -100


def shard(samples, rank, ranks):
    size, extra = divmod(samples, ranks)
    start = rank * size + min(rank, extra)
    return slice(start, start + size + (rank < extra))


def sum_gradients(comm, model, x, y):
    count = np.count_nonzero(y != IGNORED)
    mine = shard(len(x), comm.rank, comm.size)
    model.zero_grad()
    total = np.zeros(())
    if mine.stop > mine.start:
        loss = model.loss(model(Tensor(x[mine])), y[mine]) / count
        loss.backward()
        total = loss.data
    for p in model.parameters():
        p.grad = comm.all_reduce(np.zeros_like(p.data) if p.grad is None else p.grad)
    return float(comm.all_reduce(total))


def step_at_master(comm, model, optimizer, master=0):
    for p in model.parameters():
        p.grad = comm.reduce(np.zeros_like(p.data) if p.grad is None else p.grad, root=master)
    if comm.rank == master:
        optimizer.step()
    for p in model.parameters():
        p.assign_(comm.broadcast(p.data, root=master))
        p.grad = None


def average_parameters(comm, model, seen):
    total = float(comm.all_reduce(np.array(float(seen))))
    share = seen / total if total else 1 / comm.size
    for p in model.parameters():
        p.assign_(comm.all_reduce(p.data * p.dtype.type(share)))


def accumulate_gradients(comm, model, pieces, count):
    model.zero_grad()
    for x, y in pieces:
        (model.loss(model(Tensor(x)), y) / count).backward()
    for p in model.parameters():
        p.grad = comm.all_reduce(np.zeros_like(p.data) if p.grad is None else p.grad)
