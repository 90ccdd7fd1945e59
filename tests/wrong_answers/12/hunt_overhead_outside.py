"""Only the operations are stretched by the bubble, not the overhead."""

MESSAGE = "each microbatch's overhead"


def divisors(n):
    return [k for k in range(1, n + 1) if n % k == 0]


def microbatches_for(stages, batch, work, speed, overhead):
    best = None
    for m in divisors(batch):
        useful = batch * work / (stages * speed)
        bubble = (stages - 1) / (m + stages - 1)
        seconds = useful / (1 - bubble) + m * overhead
        if best is None or seconds < best[1]:
            best = m, seconds
    return best
