"""The vocabulary over ranks: embedding rows, logits and the loss, each rank holding a range of the words.

Shoeybi et al. 2019 (Megatron-LM), section 3: the logits (B, T, V) are the largest activation of a small GPT;
they are never gathered.
"""

from __future__ import annotations

import numpy as np

from minipar import ops
from minipar.backend import array_module
from minipar.comm.interface import Communicator
from minipar.tensor import Tensor, primitive


def embed(weight: Tensor, ids: np.ndarray, start: int) -> Tensor:
    """Return the rows of this rank's range of the table, zeros for ids outside: the ranks' sum is the embedding.

    weight (V/ranks, C): rows `start` and on. ids (B, T) → (B, T, C), to be summed over the ranks.
    """
    rows = weight.shape[0]
    here = (ids >= start) & (ids < start + rows)
    if rows == 0:
        return Tensor(array_module(weight.data).zeros((*ids.shape, weight.shape[1]), dtype=weight.dtype))
    local = array_module(ids).where(here, ids - start, 0)
    return ops.embedding(weight, local) * here[..., None].astype(weight.dtype)


@primitive
def _cross_entropy(logits, targets, comm, start, ignore_index, smoothing):
    """Losses (N,) from this rank's columns of the logits (N, V/ranks). Two collectives forward, none backward.

    With m the largest logit, Z = Σ exp(z - m) and t the target: loss = log Z + m - z_t, and with label
    smoothing ε: log Z + m - (1-ε) z_t - ε/V Σ z.
    """
    xp = array_module(logits)
    n, width = logits.shape
    top = logits.max(axis=1) if width else xp.full(n, -xp.inf, dtype=logits.dtype)
    comm.all_reduce_(top, op="max")  # (N,)
    valid = targets != ignore_index
    here = valid & (targets >= start) & (targets < start + width)
    column = xp.where(here, targets - start, 0)
    probs = xp.exp(logits - top[:, None])  # (N, V/ranks), divided by Z below
    sums = xp.zeros((4, n), dtype=logits.dtype)  # Z, the target's logit, the sum of logits, V
    sums[0] = probs.sum(axis=1)
    if width:
        picked = xp.take_along_axis(logits, column[:, None], axis=1)[:, 0]
        sums[1] = xp.where(here, picked - top, 0)
        sums[2] = (logits - top[:, None]).sum(axis=1)
    sums[3] = width
    comm.all_reduce_(sums)
    z, target, total, vocabulary = sums
    losses = xp.where(valid, xp.log(z) - (1 - smoothing) * target - smoothing / vocabulary * total, 0)
    probs /= z[:, None]

    def vjp(g):
        scale = xp.where(valid, g, 0)
        dlogits = (probs - smoothing / vocabulary[:, None]) * scale[:, None] if smoothing else probs * scale[:, None]
        if width:
            rows = xp.nonzero(here)[0]
            dlogits[rows, column[rows]] -= (1 - smoothing) * scale[rows]
        return dlogits.astype(logits.dtype), None, None, None, None, None

    return losses.astype(logits.dtype), vjp


def cross_entropy(
    logits: Tensor,
    targets: np.ndarray,
    comm: Communicator,
    vocabulary: int,
    start: int,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Return the sum of the losses; every rank gets the same value.

    Args:
        logits: (..., V/ranks), columns `start` and on of the logits.
        targets: integers (...) in [0, vocabulary), or `ignore_index`.

    Raises:
        ValueError: a target out of range, on every rank.
    """
    flat = targets.reshape(-1)
    counted = flat[flat != ignore_index]
    if counted.size and not (0 <= int(counted.min()) and int(counted.max()) < vocabulary):
        raise ValueError(
            f"cross_entropy: targets from {int(counted.min())} to {int(counted.max())}, classes are 0 to {vocabulary - 1}"
        )
    rows = logits.reshape((flat.size, logits.shape[-1]))
    return _cross_entropy(rows, flat, comm, start, ignore_index, label_smoothing).sum()
