"""All ZeRO stages are given to pipelines."""

MESSAGE = "in every microbatch of a pipeline"


def divisors(n):
    return [k for k in range(1, n + 1) if n % k == 0]


def layouts(model, ranks):
    found = []
    for dp in divisors(ranks):
        for pp in divisors(ranks // dp):
            tp = ranks // dp // pp
            if model["heads"] % tp or model["layers"] % pp or model["batch"] % dp:
                continue
            stages = [0] if dp == 1 else [0, 1, 2, 3]
            for m in divisors(model["batch"] // dp):
                found += [{"dp": dp, "pp": pp, "tp": tp, "zero": zero, "microbatches": m} for zero in stages]
    return found
