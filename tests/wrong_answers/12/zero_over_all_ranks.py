"""ZeRO divides over all ranks of the mesh."""

MESSAGE = "the others hold other parts"


def memory(model, layout):
    dp, pp, tp, zero, m = (layout[k] for k in ("dp", "pp", "tp", "zero", "microbatches"))
    elements = model["layers"] / pp * model["parameters"] / tp
    live = min(m, pp)
    everyone = dp * pp * tp
    samples = model["batch"] / dp / m
    return {
        "parameters": 4 * elements / (everyone if zero >= 3 else 1),
        "gradients": 4 * elements / (everyone if zero >= 2 else 1),
        "optimizer": 8 * elements / (everyone if zero >= 1 else 1),
        "activations": live * samples * model["layers"] / pp * model["activations"] / tp,
    }
