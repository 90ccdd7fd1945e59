"""Every rank gathers the parameters of all ranks, and adds them up itself: N times the memory."""

import numpy as np

MESSAGE = "the average is right, with calls of {'all_gather': 5}"


def average_parameters(comm, model, seen):
    of_ranks = comm.all_gather(np.array([float(seen)]))
    total = of_ranks.sum()
    for p in model.parameters():
        everyone = comm.all_gather(p.data[None])
        shares = of_ranks / total if total else np.full(comm.size, 1 / comm.size)
        p.assign_(np.tensordot(shares, everyone, axes=1).astype(p.dtype))
