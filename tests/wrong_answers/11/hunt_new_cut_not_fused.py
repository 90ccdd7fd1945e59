"""Parts are joined block by block, and the new cut forgets the blocks."""

import numpy as np

MESSAGE = "cut as if it were not fused"


def recut(parts, dim, groups, ranks):
    pieces = [np.split(part, groups, axis=dim) for part in parts]
    blocks = [np.concatenate([piece[group] for piece in pieces], axis=dim) for group in range(groups)]
    return np.split(np.concatenate(blocks, axis=dim), ranks, axis=dim)
