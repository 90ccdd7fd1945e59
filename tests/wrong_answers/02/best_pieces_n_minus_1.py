"""Counts N-1 where the formula has N-2."""

import math

MESSAGE = "is in the formula as N - 2 + k"


def best_pieces(ranks, n_bytes, alpha, beta):
    return max(1, round(math.sqrt((ranks - 1) * beta * n_bytes / alpha)))
