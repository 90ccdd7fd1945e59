"""Lesson 06, exercise: parameters, gradients and optimizer state, shared out over ranks.

Write four functions and mend a fifth. Everything is NumPy and a communicator: `comm.rank`, `comm.size`, and
lesson 3's `comm.reduce_scatter(x, counts)`, `comm.all_gather(x, counts)` and `comm.all_reduce(x)`, where
counts[r] is the number of elements (rows) of rank r. `balanced(n, ranks)` gives counts that differ by one at
most, the larger ones first. Grade yourself with `minipar grade 06 --file exercise.py`.
"""

import math

import numpy as np

from minipar.comm import balanced


def place_by_bytes(sizes: list[int], devices: int) -> list[list[int]]:
    """Place whole parameters on devices so that the fullest is not much fuller than the others.

    The greedy rule: take the parameters from the largest to the smallest (equal ones in their order), and put
    each on the device that holds fewest bytes so far (of several such devices the first).

    Args:
        sizes: bytes of each parameter.
        devices: at least 1.

    Returns:
        For each device the indices of the parameters on it, ascending; an empty list for a device that gets
        none. Every index appears once.
    """
    raise NotImplementedError("place_by_bytes: which parameter goes first, and onto which device?")


def flat_pieces(sizes: list[int], ranks: int) -> list[list[tuple[int, int, int]]]:
    """Lay parameters end to end and cut the line into equal ranges; say what each rank owns of each.

    Rank r owns `balanced(sum(sizes), ranks)[r]` elements of the line, rank 0 the first ones. A range may begin
    and end in the middle of a parameter, and hold several.

        sizes [5, 1, 4], 3 ranks: the line is aaaaabcccc, the ranges aaaa|abc|ccc
        [[(0, 0, 4)], [(0, 4, 5), (1, 0, 1), (2, 0, 1)], [(2, 1, 4)]]

    Args:
        sizes: elements of each parameter, in the order of the line; some may be 0.
        ranks: at least 1; there may be more ranks than elements.

    Returns:
        For each rank its pieces, in the order of the line: (parameter, start, stop), elements start … stop - 1
        counted within the parameter. No piece is empty.
    """
    raise NotImplementedError("flat_pieces: where does each range begin and end within each parameter?")


def zero1_step(comm, weights, gradient, momentum, lr, beta):
    """Take one step of SGD with momentum as ZeRO stage 1 does: optimizer state for this rank's range alone.

        v ← beta v + g,   w ← w - lr v,   g the sum of all ranks' gradients

    In all one reduce-scatter and one all-gather, of n elements each; the ranges are `balanced(n, ranks)`.

    Args:
        weights: (n,) float, whole, the same on every rank. Not changed.
        gradient: (n,) of this rank's samples; already divided by the global batch, so ranks are summed. Not
            changed.
        momentum: (counts[rank],) v of this rank's range. Not changed.
        lr, beta: numbers.

    Returns:
        (new weights (n,), the same on every rank; new momentum (counts[rank],)).
    """
    raise NotImplementedError("zero1_step: what does each rank have after the reduce-scatter?")


def zero3_linear(comm, own, shape, x):
    """Run a linear layer whose weight lies in ranges on the ranks, as ZeRO stage 3 does.

    The weight W (out, in) is laid out in memory order and cut into the ranges `balanced(out * in, ranks)`.
    It is gathered when forward needs it and again when backward needs it, and nobody keeps it in between:
    what `backward` captures is x and `own`, not the whole W. Capture `own` itself and no copy of it: backward
    gathers the values that the ranges have by then, which may have changed since forward.

    Args:
        own: (counts[rank],) this rank's range of W.
        shape: (out, in).
        x: (B, in) this rank's samples.

    Returns:
        (y, backward): y (B, out) = x Wᵀ, and a function of g, the gradient (B, out) of y, which returns
        (dx, own_gradient): dx (B, in), and (counts[rank],) this rank's range of the gradient of W, summed over
        the ranks.
    """
    raise NotImplementedError(
        "zero3_linear: gather, compute, let go; in backward gather again and reduce-scatter"
    )


# The bug hunt -----------------------------------------------------------------------------------------------
#
# The function below trains, its loss falls, and every replica has the same weights. Yet training on four ranks
# does not equal training on one. Find the fault and mend it; one more collective of a single number is allowed.


def clipped_step(comm, weights, gradient, lr, max_norm):
    """Take one step of SGD with gradient clipping; every rank updates its own range of the weights.

        g the sum of all ranks' gradients,   w ← w - lr g · min(1, max_norm / ‖g‖)

    ‖g‖ is the 2-norm of the whole g. The ranges are `balanced(n, ranks)`.

    Args:
        weights: (n,) whole, the same on every rank. Not changed.
        gradient: (n,) of this rank's samples; ranks are summed. Not changed.
        lr, max_norm: numbers above 0.

    Returns:
        The new weights (n,), the same on every rank.
    """
    counts = balanced(len(weights), comm.size)
    start = sum(counts[: comm.rank])
    mine = comm.reduce_scatter(gradient, counts)  # this rank's range of the sum
    norm = math.sqrt(np.sum(mine**2))
    scale = min(1.0, max_norm / norm) if norm > 0 else 1.0
    own = weights[start : start + counts[comm.rank]] - lr * scale * mine
    return comm.all_gather(own, counts)
