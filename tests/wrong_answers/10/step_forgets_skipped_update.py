"""The scale is not updated when a step is skipped, so it overflows again and again."""

import numpy as np

MESSAGE = "call loss_scale.update once in every step"


def mixed_step(comm, master, moment, gradient_of, loss_scale, lr, momentum, max_norm):
    scale = loss_scale.scale
    with np.errstate(over="ignore", invalid="ignore"):
        g = comm.all_reduce(gradient_of(master.astype(np.float16), scale).astype(np.float32))
        g = g / np.float32(scale)
    overflowed = not np.isfinite(g).all()
    if not overflowed:
        norm = float(np.sqrt(np.sum(g.astype(np.float64) ** 2)))
        if norm > max_norm:
            g = g * np.float32(max_norm / norm)
        moment = np.float32(momentum) * moment + g
        master = master - np.float32(lr) * moment
    if not overflowed:
        loss_scale.update(False)
    return master.copy(), moment.copy()
