"""Each rank updates its range with its own gradient; nothing is reduced."""

from minipar.comm import balanced

MESSAGE = "the other ranks' samples were lost"


def zero1_step(comm, weights, gradient, momentum, lr, beta):
    counts = balanced(len(weights), comm.size)
    start = sum(counts[: comm.rank])
    mine = slice(start, start + counts[comm.rank])
    momentum = beta * momentum + gradient[mine]
    return comm.all_gather(weights[mine] - lr * momentum, counts), momentum
