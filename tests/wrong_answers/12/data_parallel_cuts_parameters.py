"""Every kind of state is divided over the data-parallel ranks, ZeRO or not."""

MESSAGE = "data parallelism cuts the batch, not the model"


def memory(model, layout):
    dp, pp, tp, _, m = (layout[k] for k in ("dp", "pp", "tp", "zero", "microbatches"))
    elements = model["layers"] / pp * model["parameters"] / tp / dp
    live = min(m, pp)
    samples = model["batch"] / dp / m
    return {
        "parameters": 4 * elements,
        "gradients": 4 * elements,
        "optimizer": 8 * elements,
        "activations": live * samples * model["layers"] / pp * model["activations"] / tp,
    }
