"""ZeRO 3 is given three passes, however many microbatches there are."""

MESSAGE = "right for one microbatch; ZeRO 3"


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
    passes = {0: 2, 1: 2, 2: m + 1, 3: 3}[zero]
    return {
        "compute": compute,
        "tensor": tensor,
        "bubble": (pp - 1) * (compute + tensor) / m,
        "data": passes * ring(gradients, dp, *link(machine, dp, pp * tp)),
    }
