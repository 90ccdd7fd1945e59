"""The gradient's range is cut out of this rank's own gradient, without a sum."""

from minipar.comm import balanced

MESSAGE = "the sum over ranks is missing"


def zero3_linear(comm, own, shape, x):
    counts = balanced(shape[0] * shape[1], comm.size)
    start = sum(counts[: comm.rank])
    y = x @ comm.all_gather(own, counts).reshape(shape).T

    def backward(g):
        dx = g @ comm.all_gather(own, counts).reshape(shape)
        return dx, (g.T @ x).reshape(-1)[start : start + counts[comm.rank]]

    return y, backward
