"""The holders of the table all-reduce its gradient over all ranks; the stages between do not take part."""

import numpy as np

MESSAGE = "the ranks wait for each other without end"


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
    if table is not None:
        dtable = comm.all_reduce(dtable)
    return weight - lr * dweight, None if table is None else table - lr * dtable
