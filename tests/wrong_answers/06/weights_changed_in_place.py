"""The step writes into the weights that it was given."""

from minipar.comm import balanced

MESSAGE = "changed its argument weights in place"


def zero1_step(comm, weights, gradient, momentum, lr, beta):
    counts = balanced(len(weights), comm.size)
    start = sum(counts[: comm.rank])
    momentum = beta * momentum + comm.reduce_scatter(gradient, counts)
    own = weights[start : start + counts[comm.rank]]
    own -= lr * momentum
    return comm.all_gather(own, counts), momentum
