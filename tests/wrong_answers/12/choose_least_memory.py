"""Of those that fit the smallest is chosen."""

MESSAGE = "Memory is a limit, the seconds decide"


def choose(candidates, limit):
    need = [sum(c["memory"].values()) for c in candidates]
    seconds = [sum(c["seconds"].values()) for c in candidates]
    fits = [i for i, n in enumerate(need) if n <= limit]
    if not fits:
        raise ValueError(f"nothing fits {limit} bytes; the least that is needed is {min(need):.0f}")
    best = min(fits, key=lambda i: (need[i], seconds[i]))
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
