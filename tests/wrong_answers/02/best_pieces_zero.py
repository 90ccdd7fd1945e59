"""Zero pieces for two ranks."""

import math

MESSAGE = "an array is at least one piece"


def best_pieces(ranks, n_bytes, alpha, beta):
    return round(math.sqrt((ranks - 2) * beta * n_bytes / alpha))
