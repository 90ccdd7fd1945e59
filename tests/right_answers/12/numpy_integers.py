"""Whole numbers that come from NumPy, and the reasons as a tuple."""

import numpy as np


def layouts(model, ranks):
    sizes = np.arange(1, max(ranks, model["batch"]) + 1)
    found = []
    for dp in sizes[ranks % sizes == 0]:
        for pp in sizes[ranks // dp % sizes == 0]:
            tp = ranks // dp // pp
            if tp == 0 or model["heads"] % tp or model["layers"] % pp or model["batch"] % dp:
                continue
            stages = 1 if dp == 1 else 2 if pp > 1 else 4
            for m in sizes[model["batch"] // dp % sizes == 0]:
                for zero in np.arange(stages):
                    found.append({"dp": dp, "pp": pp, "tp": tp, "zero": zero, "microbatches": m})
    return found


def choose(candidates, limit):
    need = np.array([sum(c["memory"].values()) for c in candidates])
    seconds = np.array([sum(c["seconds"].values()) for c in candidates])
    if not (need <= limit).any():
        raise ValueError(f"nothing fits; the least that is needed is {need.min():.0f}")
    best = np.lexsort((need, np.where(need <= limit, seconds, np.inf)))[0]
    parts = list(candidates[0]["seconds"])
    table = np.array([[c["seconds"][part] for part in parts] for c in candidates])
    reasons = [parts[k] for k in np.argmax(table - table[best], axis=1)]
    for i in range(len(candidates)):
        if need[i] > limit or seconds[i] == seconds[best]:
            reasons[i] = "memory"
    reasons[best] = "best"
    return best, tuple(reasons)
