"""The logits are gathered and the serial loss is computed on every rank."""

import numpy as np

MESSAGE = "the logits were sent"


def vocabulary_cross_entropy(comm, logits, targets, start):
    n, width = logits.shape
    counts = comm.all_gather(np.array([width])).tolist()
    whole = comm.all_gather(np.ascontiguousarray(logits.T), counts).T
    shifted = whole - whole.max(axis=1, keepdims=True)
    total = np.exp(shifted).sum(axis=1)

    def backward(g):
        gradient = np.exp(shifted) / total[:, None]
        gradient[np.arange(n), targets] -= 1
        return (gradient * g[:, None])[:, start : start + width]

    return np.log(total) - shifted[np.arange(n), targets], backward
