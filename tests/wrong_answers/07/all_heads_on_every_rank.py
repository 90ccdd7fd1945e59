"""Every rank computes all heads, and the all-reduce adds the same result as often as there are ranks."""

import numpy as np

MESSAGE = "every rank computed all heads"


def attention(comm, x, w_qkv, w_out, heads):
    length, width = x.shape
    head = width // heads
    q, k, v = ((x @ w.T).reshape(length, heads, head).swapaxes(0, 1) for w in np.split(w_qkv, 3))
    scores = q @ k.swapaxes(1, 2) / np.sqrt(head)
    scores = np.where(np.tril(np.ones((length, length), bool)), scores, -np.inf)
    probs = np.exp(scores - scores.max(axis=2, keepdims=True))
    probs /= probs.sum(axis=2, keepdims=True)
    y = (probs @ v).swapaxes(0, 1).reshape(length, width)
    return comm.all_reduce(y @ w_out.T)
