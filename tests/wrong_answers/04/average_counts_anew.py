"""The counts are summed again for every parameter."""

import numpy as np

MESSAGE = "one all_reduce a parameter and one for the counts are enough"


def average_parameters(comm, model, seen):
    for p in model.parameters():
        total = float(comm.all_reduce(np.array(float(seen))))
        share = seen / total if total else 1 / comm.size
        p.assign_(comm.all_reduce(p.data * p.dtype.type(share)))
