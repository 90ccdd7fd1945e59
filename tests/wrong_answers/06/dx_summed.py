"""The gradient of x is summed over the ranks, although each rank has its own samples."""

from minipar.comm import balanced

MESSAGE = "dx is not summed"


def zero3_linear(comm, own, shape, x):
    counts = balanced(shape[0] * shape[1], comm.size)
    y = x @ comm.all_gather(own, counts).reshape(shape).T

    def backward(g):
        dx = g @ comm.all_gather(own, counts).reshape(shape)
        total = sum(part.sum() for part in comm.all_to_all([dx] * comm.size))
        return dx + total, comm.reduce_scatter((g.T @ x).reshape(-1), counts)

    return y, backward
