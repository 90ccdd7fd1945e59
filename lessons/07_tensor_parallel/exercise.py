"""Lesson 07, exercise: layers that several ranks compute together, for the same samples.

Write four functions and mend a fifth. Everything is NumPy and a communicator. A function that has a backward
returns (value, backward), where `backward` takes the gradient of the value: forward and backward stand side by
side, as in the engine's primitives. Every rank calls every function with its own parts of the weights and the
same samples. Grade yourself with `minipar grade 07 --file exercise.py`.
"""

import numpy as np


def column_row_mlp(comm, x, w1, b1, w2, b2):
    """Two linear layers with a ReLU between, the hidden features cut over the ranks.

        h = relu(x W1ᵀ + b1),   y = h W2ᵀ + b2

    One all-reduce of y.size elements in forward, one of x.size in backward, nothing else.

    Args:
        x: (B, C), the same on every rank.
        w1, b1: (F_r, C) and (F_r,): this rank's hidden features; F_r may differ from rank to rank.
        w2: (O, F_r): the columns that belong to them.
        b2: (O,) whole, the same on every rank.

    Returns:
        (y, backward): y (B, O), the same on every rank; backward(g), g (B, O) the same on every rank, returns
        (dx, dw1, db1, dw2, db2): dx (B, C) and db2 (O,) those of the whole layer, the same on every rank; the
        others those of this rank's parts.
    """
    raise NotImplementedError("column_row_mlp: which result is a term of a sum, and which gradient?")


def vocabulary_embedding(comm, table, ids, start):
    """Look words up in a table whose rows lie on the ranks.

    One all-reduce in forward, no communication in backward.

    Args:
        table: (V_r, C): the rows of words start … start + V_r - 1.
        ids: (T,) integers, the same on every rank; every word is on some rank, and may occur several times.
        start: the first word of this rank.

    Returns:
        (y, backward): y (T, C), the same on every rank; backward(g), g (T, C), returns (V_r, C), the gradient of
        this rank's rows.
    """
    raise NotImplementedError(
        "vocabulary_embedding: what does a rank contribute for a word that it does not hold?"
    )


def vocabulary_cross_entropy(comm, logits, targets, start):
    """The cross-entropy of logits whose vocabulary lies on the ranks, without gathering the logits.

        loss = log Σ exp(z - m) - (z_t - m),   m the largest logit of the sample, t its target

    The losses are finite for logits of ±10,000. At most 3 N elements are all-reduced in forward, N the number of
    samples; there is no communication in backward. (`comm.all_reduce(x, op="max")` takes the maximum.)

    Args:
        logits: (N, V_r): columns start … start + V_r - 1 of the logits.
        targets: (N,) integers, the same on every rank.
        start: the first word of this rank.

    Returns:
        (losses, backward): losses (N,), the same on every rank; backward(g), g (N,), returns (N, V_r), the
        gradient of this rank's columns.
    """
    raise NotImplementedError(
        "vocabulary_cross_entropy: which three numbers a sample must the ranks agree on?"
    )


def convolve_rows(comm, rows, kernel):
    """Convolve an image along its rows, the image cut into intervals of rows, one a rank, in order.

        out[i] = Σ_k kernel[k] · image[i + k - K // 2],   rows outside the image count as zeros

    What a rank reads of its neighbours' rows, the halo, is sent with `comm.send(x, dest)` and received with
    `comm.recv(source)`: no more than K // 2 rows to each neighbour, and nothing to any other rank. A send returns
    only when its receive has begun, so mind the order.

    Args:
        rows: (n_r, W): this rank's rows, at least K // 2 of them; n_r may differ from rank to rank.
        kernel: (K,), K odd.

    Returns:
        (n_r, W): this rank's rows of the result.
    """
    raise NotImplementedError(
        "convolve_rows: which rows come from above, which from below, and who sends first?"
    )


# The bug hunt -----------------------------------------------------------------------------------------------
#
# On one rank the function below is right. On several it runs, gives finite numbers of the right shape, the same
# on every rank, and a model trains with it; but it is not the same model. Find the fault and mend it.


def attention(comm, x, w_qkv, w_out, heads):
    """Causal self-attention of one sequence, the heads cut over the ranks.

    Each rank computes `heads / ranks` whole heads, each C / heads features wide, with its rows of the three
    projections; one all-reduce of (T, C) adds what the heads contribute.

    Args:
        x: (T, C), the same on every rank.
        w_qkv: (3 C, C): the projections to queries, keys and values, one below the other. Within each, head h
            has the rows h · C/heads and on.
        w_out: (C, C): the projection after attention; its columns are the heads' features, in order.
        heads: of the whole layer; a multiple of the number of ranks.

    Returns:
        (T, C), the same on every rank.
    """
    length, width = x.shape
    part = width // comm.size  # features of this rank's heads
    mine = slice(comm.rank * part, (comm.rank + 1) * part)
    head = part // heads
    q, k, v = (
        (x @ w[mine].T).reshape(length, part // head, head).swapaxes(0, 1)  # (heads, T, head)
        for w in np.split(w_qkv, 3)
    )
    scores = q @ k.swapaxes(1, 2) / np.sqrt(head)  # (heads, T, T)
    scores = np.where(np.tril(np.ones((length, length), bool)), scores, -np.inf)
    probs = np.exp(scores - scores.max(axis=2, keepdims=True))
    probs /= probs.sum(axis=2, keepdims=True)
    y = (probs @ v).swapaxes(0, 1).reshape(length, part)
    return comm.all_reduce(y @ w_out[:, mine].T)
