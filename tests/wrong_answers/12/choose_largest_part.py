"""The reason is the loser's largest part."""

MESSAGE = "its largest part is no reason"


def choose(candidates, limit):
    need = [sum(c["memory"].values()) for c in candidates]
    seconds = [sum(c["seconds"].values()) for c in candidates]
    fits = [i for i, n in enumerate(need) if n <= limit]
    if not fits:
        raise ValueError(f"nothing fits {limit} bytes; the least that is needed is {min(need):.0f}")
    best = min(fits, key=lambda i: (seconds[i], need[i]))
    mine = candidates[best]["seconds"]
    reasons = []
    for i, c in enumerate(candidates):
        if i == best:
            reasons.append("best")
        elif need[i] > limit or seconds[i] == seconds[best]:
            reasons.append("memory")
        else:
            reasons.append(max(mine, key=lambda part: c["seconds"][part]))
    return best, reasons
