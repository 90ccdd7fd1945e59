"""Lesson 08, reference solution."""

from functools import cache

import numpy as np


def split_stages(costs, stages):
    @cache
    def best(k, stop):  # (largest sum, cuts) of the first `stop` blocks in k stages
        if k == 1:
            return sum(costs[:stop]), ((0, stop),)
        options = []
        for start in range(k - 1, stop):
            largest, cuts = best(k - 1, start)
            options.append((max(largest, sum(costs[start:stop])), (*cuts, (start, stop))))
        return min(options)

    return list(best(stages, len(costs))[1])


def gpipe(stages, microbatches):
    return [[(kind, i) for kind in "FB" for i in range(microbatches)] for _ in range(stages)]


def gpipe_seconds(forward, backward, microbatches, message=0.0):
    crossing = (len(forward) - 1) * message
    return sum(sum(c) + (microbatches - 1) * max(c) + crossing for c in (forward, backward))


def gpipe_step(comm, weight, inputs, targets, count):
    first, last = comm.rank == 0, comm.rank == comm.size - 1
    kept, gradient = [], np.zeros_like(weight)
    for x in inputs:
        if not first:
            x = comm.recv(comm.rank - 1)
        y = np.tanh(x @ weight.T)
        comm.compute(1.0)
        kept.append((x, y))
        if not last:
            comm.send(y, comm.rank + 1)
    for i, (x, y) in enumerate(kept):
        g = (y - targets[i]) / count if last else comm.recv(comm.rank + 1)
        g = g * (1 - y * y)
        gradient += g.T @ x
        comm.compute(2.0)
        if not first:
            comm.send(g @ weight, comm.rank - 1)
    return gradient


def tied_step(comm, weight, table, ids, targets, count, lr):
    first, last = comm.rank == 0, comm.rank == comm.size - 1
    dweight, dtable = np.zeros_like(weight), None if table is None else np.zeros_like(table)
    kept = []
    for words in ids:
        x = table[words] if first else comm.recv(comm.rank - 1)
        y = np.tanh(x @ weight.T)
        kept.append((x, y))
        if not last:
            comm.send(y, comm.rank + 1)
    for i, (x, y) in enumerate(kept):
        if last:
            logits = y @ table.T
            probs = np.exp(logits - logits.max(axis=1, keepdims=True))
            probs /= probs.sum(axis=1, keepdims=True)
            probs[np.arange(len(y)), targets[i]] -= 1
            dtable += probs.T @ y / count
            g = probs @ table / count
        else:
            g = comm.recv(comm.rank + 1)
        g = g * (1 - y * y)
        dweight += g.T @ x
        if first:
            np.add.at(dtable, ids[i], g @ weight)
        else:
            comm.send(g @ weight, comm.rank - 1)
    if comm.size > 1 and (first or last):  # two copies of one weight: its gradient is the sum of both uses
        other = comm.size - 1 if first else 0
        work = comm.isend(dtable.copy(), other)
        dtable = dtable + comm.recv(other)
        work.wait()
    return weight - lr * dweight, None if table is None else table - lr * dtable
