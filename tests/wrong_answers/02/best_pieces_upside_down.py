"""The fraction upside down."""

import math

MESSAGE = "the fraction is upside down"


def best_pieces(ranks, n_bytes, alpha, beta):
    return 1 if ranks == 2 else max(1, round(math.sqrt(alpha / ((ranks - 2) * beta * n_bytes))))
