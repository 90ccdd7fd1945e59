"""Rounds are counted with the natural logarithm."""

import numpy as np

MESSAGE = "so it is to base 2"


def all_reduce_seconds(n_bytes, ranks, alpha, beta):
    levels, sent = np.log(ranks), 2 * (ranks - 1) / ranks * n_bytes
    return {
        "ring": 2 * (ranks - 1) * alpha + sent * beta,
        "doubling": levels * (alpha + n_bytes * beta),
        "halving_doubling": 2 * levels * alpha + sent * beta,
    }
