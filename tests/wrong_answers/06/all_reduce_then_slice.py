"""ZeRO 1 with an all-reduce of which each rank throws most away: right numbers, more traffic."""

from minipar.comm import balanced

MESSAGE = "reduce_scatter gives that for half the traffic"


def zero1_step(comm, weights, gradient, momentum, lr, beta):
    counts = balanced(len(weights), comm.size)
    start = sum(counts[: comm.rank])
    mine = slice(start, start + counts[comm.rank])
    momentum = beta * momentum + comm.all_reduce(gradient)[mine]
    return comm.all_gather(weights[mine] - lr * momentum, counts), momentum
