"""The vocabulary over ranks: embedding rows, logits and the loss, each rank holding a range of the words.

Shoeybi et al. 2019 (Megatron-LM), section 3: the logits (B, T, V) are the largest activation of a small GPT;
they are never gathered.
"""

from __future__ import annotations

from typing import Any

from minipar import kernels
from minipar.backend import Array, array_module
from minipar.comm.interface import Communicator, balanced
from minipar.errors import UsageError
from minipar.tensor import Tensor, primitive


def first_row(vocabulary: int, comm: Communicator) -> int:
    """Return the first word of this rank's range."""
    return sum(balanced(vocabulary, comm.size)[: comm.rank])


def check_ids(what: str, ids: Array, vocabulary: int) -> None:
    """Refuse words that no rank holds: every rank would take them for another's.

    Raises:
        ValueError: on every rank, since all see the same ids.
    """
    if ids.size and (int(ids.min()) < 0 or int(ids.max()) >= vocabulary):
        raise UsageError(f"{what} from {int(ids.min())} to {int(ids.max())}, expected 0 to {vocabulary - 1}")


@primitive(handles=("weight",))
def embed(weight, ids, start):
    """The rows of this rank's range of the table, zeros for ids outside: the ranks' sum is the embedding.

    weight (V/ranks, C): rows `start` and on. ids (...) → (..., C), to be summed over the ranks.
    """
    table = weight.data
    rows, width = table.shape
    here = (ids >= start) & (ids < start + rows)  # (...)
    found = ids[here] - start  # (words found here,)
    value = array_module(table).zeros((*ids.shape, width), dtype=table.dtype)
    value[here] = table[found]
    return value, lambda g: (lambda: kernels.of(g).embedding_backward(g[here], found, rows), None, None)


@primitive(fresh=True, precision="float32")
def _cross_entropy(logits, targets, comm, vocabulary, start, ignore_index, smoothing):
    """Losses (N,) from this rank's columns of the logits (N, V/ranks): two all-reduces, none backward.

    With m the largest logit, Z = Σ exp(z - m) and t the target: loss = log Z - (z_t - m), and with label
    smoothing ε: log Z - (1-ε) (z_t - m) - ε/V Σ (z - m).
    """
    xp, given = array_module(logits), logits.dtype
    shifted = logits.astype("float32" if given == "float16" else given)  # a copy; float16 overflows in sums
    n, width = shifted.shape
    top = shifted.max(axis=1) if width else xp.full(n, -xp.inf, dtype=shifted.dtype)
    comm.all_reduce_(top, op="max")  # (N,)
    shifted -= top[:, None]
    valid = targets != ignore_index
    here = xp.nonzero(valid & (targets >= start) & (targets < start + width))[0]  # rows whose target is ours
    column = targets[here] - start
    sums = xp.zeros((3 if smoothing else 2, n), dtype=shifted.dtype)  # Z, z_t - m, and Σ (z - m)
    sums[1, here] = shifted[here, column]
    if smoothing:
        shifted.sum(axis=1, out=sums[2])
    probs = xp.exp(shifted, out=shifted)  # (N, V/ranks), divided by Z below
    probs.sum(axis=1, out=sums[0])
    comm.all_reduce_(sums)
    z = sums[0]
    losses = xp.log(z) - (1 - smoothing) * sums[1]
    if smoothing:
        losses -= smoothing / vocabulary * sums[2]
    probs /= z[:, None]

    def vjp(g: Array) -> Any:
        dlogits = probs  # runs once, so in place
        if smoothing:
            dlogits -= smoothing / vocabulary
        dlogits[here, column] -= 1 - smoothing
        dlogits *= xp.where(valid, g, 0).astype(probs.dtype)[:, None]
        return dlogits.astype(given, copy=False), None, None, None, None, None, None

    return xp.where(valid, losses, 0).astype(given, copy=False), vjp


def cross_entropy(
    logits: Tensor,
    targets: Array,
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
        label_smoothing: see `ops.cross_entropy`.

    Raises:
        ValueError: shapes that do not fit, a target or a smoothing out of range; on every rank.
    """
    if not 0 <= label_smoothing <= 1:
        raise UsageError(f"cross_entropy: label_smoothing {label_smoothing} must lie in [0, 1]")
    if logits.shape[:-1] != targets.shape:
        raise UsageError(
            f"cross_entropy: logits {logits.shape} need targets {logits.shape[:-1]}, got {targets.shape}"
        )
    flat = targets.reshape(-1)
    check_ids("cross_entropy: targets", flat[flat != ignore_index], vocabulary)
    rows = logits.reshape((flat.size, logits.shape[-1]))  # (N, V/ranks)
    return _cross_entropy(rows, flat, comm, vocabulary, start, ignore_index, label_smoothing).sum()
