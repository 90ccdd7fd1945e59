"""Backward uses the weight that forward gathered: right numbers, but every layer's weight stays whole."""

from minipar.comm import balanced

MESSAGE = "the whole weight was kept since forward"


def zero3_linear(comm, own, shape, x):
    counts = balanced(shape[0] * shape[1], comm.size)
    whole = comm.all_gather(own, counts).reshape(shape)

    def backward(g):
        return g @ whole, comm.reduce_scatter((g.T @ x).reshape(-1), counts)

    return x @ whole.T, backward
