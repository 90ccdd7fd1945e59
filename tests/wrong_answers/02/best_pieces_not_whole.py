"""The formula without making it a whole number."""

import math

MESSAGE = "the formula is right, but k is a whole number"


def best_pieces(ranks, n_bytes, alpha, beta):
    return max(1.0, math.sqrt((ranks - 2) * beta * n_bytes / alpha))
