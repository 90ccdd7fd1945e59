"""The heads are mended, but scores are still divided by the width of a head among all heads of the part."""

import numpy as np

MESSAGE = "the heads are right, the scale is not"


def attention(comm, x, w_qkv, w_out, heads):
    length, width = x.shape
    part = width // comm.size
    mine = slice(comm.rank * part, (comm.rank + 1) * part)
    head = width // heads
    q, k, v = ((x @ w[mine].T).reshape(length, part // head, head).swapaxes(0, 1) for w in np.split(w_qkv, 3))
    scores = q @ k.swapaxes(1, 2) / np.sqrt(part // heads)
    scores = np.where(np.tril(np.ones((length, length), bool)), scores, -np.inf)
    probs = np.exp(scores - scores.max(axis=2, keepdims=True))
    probs /= probs.sum(axis=2, keepdims=True)
    y = (probs @ v).swapaxes(0, 1).reshape(length, part)
    return comm.all_reduce(y @ w_out[:, mine].T)
