"""Norms of the ranks are added up instead of their squares."""

import numpy as np

MESSAGE = "norms do not add up, their squares do"


def gradient_norm(comm, held):
    mine = sum(float(np.sum(g.astype(np.float64) ** 2)) / copies for g, copies in held)
    return float(comm.all_reduce(np.array([mine**0.5], np.float64))[0])
