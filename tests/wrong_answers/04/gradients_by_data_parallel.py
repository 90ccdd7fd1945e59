"""The wrapper that the lesson is about does the work."""

import numpy as np

from minipar import Tensor
from minipar.parallel import DataParallel

MESSAGE = "minipar.parallel.DataParallel is not to be used in this exercise"


def sum_gradients(comm, model, x, y):
    count = np.count_nonzero(y != -100)
    size, extra = divmod(len(x), comm.size)
    start = comm.rank * size + min(comm.rank, extra)
    mine = slice(start, start + size + (comm.rank < extra))
    model.zero_grad()
    parallel = DataParallel(model, comm)
    loss = model.loss(parallel(Tensor(x[mine])), y[mine]) / count
    loss.backward()
    parallel.synchronize()
    return float(comm.all_reduce(loss.data))
