"""Lesson 12, reference solution."""


def memory(model, layout):
    dp, pp, tp, zero, m = (layout[k] for k in ("dp", "pp", "tp", "zero", "microbatches"))
    elements = model["layers"] / pp * model["parameters"] / tp
    live = min(m, pp)
    samples = model["batch"] / dp / m
    return {
        "parameters": 4 * elements / (dp if zero >= 3 else 1),
        "gradients": 4 * elements / (dp if zero >= 2 else 1),
        "optimizer": 8 * elements / (dp if zero >= 1 else 1),
        "activations": live * samples * model["layers"] / pp * model["activations"] / tp,
    }


def link(machine, ranks, distance):
    return machine["near" if ranks * distance <= machine["node"] else "far"]


def ring(n_bytes, ranks, alpha, beta):
    return (ranks - 1) * (alpha + beta * n_bytes / ranks)


def step_seconds(model, machine, layout):
    dp, pp, tp, zero, m = (layout[k] for k in ("dp", "pp", "tp", "zero", "microbatches"))
    samples, blocks = model["batch"] / dp / m, model["layers"] / pp
    n = samples * model["boundary"]
    compute = m * samples * blocks * model["work"] / tp / machine["speed"]
    tensor = m * blocks * 4 * 2 * ring(n, tp, *link(machine, tp, 1))
    gradients = 4 * blocks * model["parameters"] / tp
    passes = {0: 2, 1: 2, 2: m + 1, 3: 3 * m}[zero]
    return {
        "compute": compute,
        "tensor": tensor,
        "bubble": (pp - 1) * (compute + tensor) / m,
        "data": passes * ring(gradients, dp, *link(machine, dp, pp * tp)),
    }


def divisors(n):
    return [k for k in range(1, n + 1) if n % k == 0]


def layouts(model, ranks):
    found = []
    for dp in divisors(ranks):
        for pp in divisors(ranks // dp):
            tp = ranks // dp // pp
            if model["heads"] % tp or model["layers"] % pp or model["batch"] % dp:
                continue
            stages = [0] if dp == 1 else [0, 1] if pp > 1 else [0, 1, 2, 3]
            for m in divisors(model["batch"] // dp):
                found += [{"dp": dp, "pp": pp, "tp": tp, "zero": zero, "microbatches": m} for zero in stages]
    return found


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
            reasons.append(max(mine, key=lambda part: c["seconds"][part] - mine[part]))
    return best, reasons


def microbatches_for(stages, batch, work, speed, overhead):
    best = None
    for m in divisors(batch):
        useful = batch * work / (stages * speed) + m * overhead
        bubble = (stages - 1) / (m + stages - 1)
        seconds = useful / (1 - bubble)
        if best is None or seconds < best[1]:
            best = m, seconds
    return best
