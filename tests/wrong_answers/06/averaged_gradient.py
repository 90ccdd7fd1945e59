"""ZeRO 1 divides the sum of gradients by the number of ranks."""

from minipar.comm import balanced

MESSAGE = "it was averaged over ranks"


def zero1_step(comm, weights, gradient, momentum, lr, beta):
    counts = balanced(len(weights), comm.size)
    start = sum(counts[: comm.rank])
    mine = comm.reduce_scatter(gradient, counts) / comm.size
    momentum = beta * momentum + mine
    own = weights[start : start + counts[comm.rank]] - lr * momentum
    return comm.all_gather(own, counts), momentum
