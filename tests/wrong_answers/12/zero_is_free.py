"""ZeRO 2 and 3 are given the traffic of plain data parallelism."""

MESSAGE = "two passes, as without ZeRO"


def link(machine, ranks, distance):
    return machine["near" if ranks * distance <= machine["node"] else "far"]


def ring(n_bytes, ranks, alpha, beta):
    return (ranks - 1) * (alpha + beta * n_bytes / ranks)


def step_seconds(model, machine, layout):
    dp, pp, tp, _, m = (layout[k] for k in ("dp", "pp", "tp", "zero", "microbatches"))
    samples, blocks = model["batch"] / dp / m, model["layers"] / pp
    n = samples * model["boundary"]
    compute = m * samples * blocks * model["work"] / tp / machine["speed"]
    tensor = m * blocks * 4 * 2 * ring(n, tp, *link(machine, tp, 1))
    gradients = 4 * blocks * model["parameters"] / tp
    passes = 2
    return {
        "compute": compute,
        "tensor": tensor,
        "bubble": (pp - 1) * (compute + tensor) / m,
        "data": passes * ring(gradients, dp, *link(machine, dp, pp * tp)),
    }
