"""Always rounds down."""

import math

MESSAGE = "rounded the wrong way"


def best_pieces(ranks, n_bytes, alpha, beta):
    return max(1, int(math.sqrt((ranks - 2) * beta * n_bytes / alpha)))
