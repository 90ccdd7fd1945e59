"""Weighted by the counts, which are never divided by their total."""

MESSAGE = "divide by what all ranks together have seen"


def average_parameters(comm, model, seen):
    for p in model.parameters():
        p.assign_(comm.all_reduce(p.data * seen))
