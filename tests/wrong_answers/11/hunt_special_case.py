"""The same number of ranks is passed through, and the join is as wrong as before."""

import numpy as np

MESSAGE = "queries, keys and values are mixed"


def recut(parts, dim, groups, ranks):
    if len(parts) == ranks:
        return [part.copy() for part in parts]
    whole = np.concatenate(parts, axis=dim)
    cuts = [np.split(block, ranks, axis=dim) for block in np.split(whole, groups, axis=dim)]
    return [np.concatenate([cut[rank] for cut in cuts], axis=dim) for rank in range(ranks)]
