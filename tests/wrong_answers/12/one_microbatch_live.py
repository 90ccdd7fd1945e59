"""Activations of a single microbatch are counted, in a pipeline too."""

MESSAGE = "of them before its first backward"


def memory(model, layout):
    dp, pp, tp, zero, m = (layout[k] for k in ("dp", "pp", "tp", "zero", "microbatches"))
    elements = model["layers"] / pp * model["parameters"] / tp
    live = 1
    samples = model["batch"] / dp / m
    return {
        "parameters": 4 * elements / (dp if zero >= 3 else 1),
        "gradients": 4 * elements / (dp if zero >= 2 else 1),
        "optimizer": 8 * elements / (dp if zero >= 1 else 1),
        "activations": live * samples * model["layers"] / pp * model["activations"] / tp,
    }
