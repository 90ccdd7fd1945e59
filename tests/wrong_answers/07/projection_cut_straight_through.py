"""The fused projection is cut into contiguous pieces, so queries, keys and values are mixed up."""

import numpy as np

MESSAGE = "the fused projection was cut straight through"


def attention(comm, x, w_qkv, w_out, heads):
    length, width = x.shape
    part = width // comm.size
    mine = slice(comm.rank * part, (comm.rank + 1) * part)
    head = width // heads
    own = w_qkv[3 * part * comm.rank : 3 * part * (comm.rank + 1)]
    q, k, v = ((x @ w.T).reshape(length, part // head, head).swapaxes(0, 1) for w in np.split(own, 3))
    scores = q @ k.swapaxes(1, 2) / np.sqrt(head)
    scores = np.where(np.tril(np.ones((length, length), bool)), scores, -np.inf)
    probs = np.exp(scores - scores.max(axis=2, keepdims=True))
    probs /= probs.sum(axis=2, keepdims=True)
    y = (probs @ v).swapaxes(0, 1).reshape(length, part)
    return comm.all_reduce(y @ w_out[:, mine].T)
