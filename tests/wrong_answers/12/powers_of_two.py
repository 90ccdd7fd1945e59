"""Only powers of two are tried."""

MESSAGE = "not only powers of 2"


def divisors(n):
    return [k for k in range(1, n + 1) if n % k == 0]


def layouts(model, ranks):
    found = []
    for dp in (1, 2, 4, 8):
        if ranks % dp:
            continue
        for pp in divisors(ranks // dp):
            tp = ranks // dp // pp
            if model["heads"] % tp or model["layers"] % pp or model["batch"] % dp:
                continue
            stages = [0] if dp == 1 else [0, 1] if pp > 1 else [0, 1, 2, 3]
            for m in divisors(model["batch"] // dp):
                found += [{"dp": dp, "pp": pp, "tp": tp, "zero": zero, "microbatches": m} for zero in stages]
    return found
