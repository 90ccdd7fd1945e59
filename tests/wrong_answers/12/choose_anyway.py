"""Where nothing fits the smallest is returned."""

MESSAGE = "a layout that cannot be run"


def choose(candidates, limit):
    need = [sum(c["memory"].values()) for c in candidates]
    seconds = [sum(c["seconds"].values()) for c in candidates]
    fits = [i for i, n in enumerate(need) if n <= limit]
    if not fits:
        fits = [need.index(min(need))]
    best = min(fits, key=lambda i: (seconds[i], need[i]))
    mine = candidates[best]["seconds"]
    reasons = []
    for i, c in enumerate(candidates):
        if i == best:
            reasons.append("best")
        elif need[i] > limit or seconds[i] == seconds[best]:
            reasons.append("memory")
        else:
            reasons.append(max(mine, key=lambda part: c["seconds"][part] - mine[part]))
    return best, reasons
