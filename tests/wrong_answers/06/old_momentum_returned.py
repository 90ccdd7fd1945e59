"""The momentum returned is the one that came in."""

from minipar.comm import balanced

MESSAGE = "was the old one returned?"


def zero1_step(comm, weights, gradient, momentum, lr, beta):
    counts = balanced(len(weights), comm.size)
    start = sum(counts[: comm.rank])
    new = beta * momentum + comm.reduce_scatter(gradient, counts)
    own = weights[start : start + counts[comm.rank]] - lr * new
    return comm.all_gather(own, counts), momentum
