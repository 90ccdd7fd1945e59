"""Lesson 07, reference solution."""

import numpy as np


def column_row_mlp(comm, x, w1, b1, w2, b2):
    h = np.maximum(x @ w1.T + b1, 0)
    y = comm.all_reduce(h @ w2.T) + b2

    def backward(g):
        dh = g @ w2 * (h > 0)
        return comm.all_reduce(dh @ w1), dh.T @ x, dh.sum(axis=0), g.T @ h, g.sum(axis=0)

    return y, backward


def vocabulary_embedding(comm, table, ids, start):
    here = (ids >= start) & (ids < start + len(table))
    found = ids[here] - start
    y = np.zeros((len(ids), table.shape[1]), table.dtype)
    y[here] = table[found]

    def backward(g):
        gradient = np.zeros_like(table)
        np.add.at(gradient, found, g[here])
        return gradient

    return comm.all_reduce(y), backward


def vocabulary_cross_entropy(comm, logits, targets, start):
    n, width = logits.shape
    shifted = logits - comm.all_reduce(logits.max(axis=1), op="max")[:, None]
    here = np.nonzero((targets >= start) & (targets < start + width))[0]
    column = targets[here] - start
    sums = np.zeros((2, n))
    sums[0] = np.exp(shifted).sum(axis=1)
    sums[1, here] = shifted[here, column]
    total, target = comm.all_reduce(sums)

    def backward(g):
        gradient = np.exp(shifted) / total[:, None]
        gradient[here, column] -= 1
        return gradient * g[:, None]

    return np.log(total) - target, backward


def convolve_rows(comm, rows, kernel):
    n, half = len(rows), len(kernel) // 2
    above = below = np.zeros((half, rows.shape[1]))
    if comm.rank % 2:  # odd ranks receive first, so that every send meets a receive
        above = comm.recv(comm.rank - 1)
        if comm.rank + 1 < comm.size:
            below = comm.recv(comm.rank + 1)
    if comm.rank + 1 < comm.size:
        comm.send(rows[n - half :].copy(), comm.rank + 1)
    if comm.rank > 0:
        comm.send(rows[:half].copy(), comm.rank - 1)
    if comm.rank % 2 == 0:
        if comm.rank + 1 < comm.size:
            below = comm.recv(comm.rank + 1)
        if comm.rank > 0:
            above = comm.recv(comm.rank - 1)
    image = np.concatenate([above, rows, below])
    return sum(kernel[k] * image[k : k + n] for k in range(len(kernel)))


def attention(comm, x, w_qkv, w_out, heads):
    length, width = x.shape
    part = width // comm.size
    mine = slice(comm.rank * part, (comm.rank + 1) * part)
    head = width // heads
    q, k, v = ((x @ w[mine].T).reshape(length, part // head, head).swapaxes(0, 1) for w in np.split(w_qkv, 3))
    scores = q @ k.swapaxes(1, 2) / np.sqrt(head)
    scores = np.where(np.tril(np.ones((length, length), bool)), scores, -np.inf)
    probs = np.exp(scores - scores.max(axis=2, keepdims=True))
    probs /= probs.sum(axis=2, keepdims=True)
    y = (probs @ v).swapaxes(0, 1).reshape(length, part)
    return comm.all_reduce(y @ w_out[:, mine].T)
