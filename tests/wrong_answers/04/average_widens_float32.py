"""float32 parameters become float64: the array is replaced, not written into."""

import numpy as np

MESSAGE = "p.assign_ keeps their dtype"


def average_parameters(comm, model, seen):
    total = float(comm.all_reduce(np.array(float(seen))))
    share = seen / total if total else 1 / comm.size
    for p in model.parameters():
        p.data = comm.all_reduce(p.data * np.float64(share))
