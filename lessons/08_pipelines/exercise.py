"""Lesson 08, exercise: a model's blocks on several ranks, and a batch in microbatches.

Write four functions and mend a fifth. Stages are counted from 0, microbatches too; rank s of a communicator is
stage s. `comm.send(x, dest)` and `comm.recv(source)` are lesson 2's: a send returns when its receive has begun,
messages between two ranks arrive in the order in which they were sent, and what is received is fresh memory.
Grade yourself with `minipar grade 08 --file exercise.py`.
"""

import numpy as np

Action = tuple[str, int]


def split_stages(costs: list[float], stages: int) -> list[tuple[int, int]]:
    """Cut a row of blocks into contiguous stages so that the largest sum of costs is as small as it can be.

    Args:
        costs: of each block, not negative, at most 16 of them.
        stages: from 1 to len(costs).

    Returns:
        For each stage (start, stop): it has the blocks start … stop - 1. No stage is empty. If several cuts are
        best, any of them.
    """
    raise NotImplementedError("split_stages: try every place for the last cut, and solve what is before it")


def gpipe(stages: int, microbatches: int) -> list[list[Action]]:
    """Return GPipe's schedule: on every stage all forwards, then all backwards.

    Args:
        stages, microbatches: at least 1.

    Returns:
        schedule[stage] is the list of what that stage does, in order: pairs (kind, microbatch) with kind "F" or
        "B", such as ("F", 3). Forwards are in ascending order; backwards too, or all of them in descending order
        (then on every stage).
    """
    raise NotImplementedError("gpipe: what does each stage do, in order?")


def gpipe_seconds(
    forward: list[float], backward: list[float], microbatches: int, message: float = 0.0
) -> float:
    """Return how long one step of GPipe takes, from the start of the first forward to the end of the last backward.

    Every action starts when its stage is free and what it needs has arrived. An activation (forward) or its
    gradient (backward) arrives at the neighbour `message` seconds after the action that made it has ended, and
    travels while both stages go on computing.

    Args:
        forward, backward: seconds of one microbatch on each stage; stages may differ.
        microbatches: at least 1.
        message: seconds a message travels.
    """
    raise NotImplementedError(
        "gpipe_seconds: which stage sets the pace, and what do filling and draining add?"
    )


def gpipe_step(comm, weight, inputs, targets, count):
    """Run this rank's stage of one GPipe step, and return the gradient of its weight.

    A stage is one layer, y = tanh(x Wᵀ). The loss is ½ Σ (y - target)² / count over all samples of all
    microbatches, y being the last stage's output.

    So that the time can be judged, tell the virtual clock of each action, before its result is sent on:
    `comm.compute(1.0)` for a forward and `comm.compute(2.0)` for a backward.

    Args:
        weight: (d, d), W of this stage.
        inputs: list of (n_i, d), one a microbatch; used by the first stage. Sizes n_i may differ.
        targets: list of (n_i, d); used by the last stage.
        count: samples of the whole batch.

    Returns:
        (d, d), the gradient of the loss of the whole batch with respect to this stage's weight.
    """
    raise NotImplementedError("gpipe_step: what must be kept of each microbatch until its backward?")


# The bug hunt -----------------------------------------------------------------------------------------------
#
# The function below is a pipeline with a tied table: the first stage looks words up in it, the last one makes
# logits with it. On one rank it is right. On several it runs, and its loss falls. Find the fault and mend it.


def tied_step(comm, weight, table, ids, targets, count, lr):
    """Take one step of SGD on a pipeline whose first and last stage share a table.

        first stage   x = table[ids]
        every stage   y = tanh(x Wᵀ)
        last stage    loss = Σ cross-entropy(y tableᵀ, targets) / count

    Args:
        weight: (C, C), W of this stage.
        table: (V, C) on the first and the last rank, which hold the same values; None on all others.
        ids, targets: lists of (n_i,) integers, one a microbatch.
        count: targets of the whole batch.
        lr: the learning rate.

    Returns:
        (new weight, new table): the weights after the step of the serial model. The table's copies stay the
        same, bit for bit; None where there is none.
    """
    first, last = comm.rank == 0, comm.rank == comm.size - 1
    dweight, dtable = np.zeros_like(weight), None if table is None else np.zeros_like(table)
    kept = []
    for words in ids:
        x = table[words] if first else comm.recv(comm.rank - 1)  # (n, C)
        y = np.tanh(x @ weight.T)
        kept.append((x, y))
        if not last:
            comm.send(y, comm.rank + 1)
    for i, (x, y) in enumerate(kept):
        if last:
            logits = y @ table.T  # (n, V)
            probs = np.exp(logits - logits.max(axis=1, keepdims=True))
            probs /= probs.sum(axis=1, keepdims=True)
            probs[np.arange(len(y)), targets[i]] -= 1
            dtable += probs.T @ y / count
            g = probs @ table / count  # (n, C)
        else:
            g = comm.recv(comm.rank + 1)
        g = g * (1 - y * y)  # through tanh
        dweight += g.T @ x
        if first:
            np.add.at(dtable, ids[i], g @ weight)
        else:
            comm.send(g @ weight, comm.rank - 1)
    return weight - lr * dweight, None if table is None else table - lr * dtable
