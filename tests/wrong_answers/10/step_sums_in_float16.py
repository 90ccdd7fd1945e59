"""The float16 gradients of the ranks are summed as they are; all that follows is in float32."""

import numpy as np

MESSAGE = "mixed_step: the ranks' gradients were added up in float16"


def mixed_step(comm, master, moment, gradient_of, loss_scale, lr, momentum, max_norm):
    scale = loss_scale.scale
    with np.errstate(over="ignore", invalid="ignore"):
        g = comm.all_reduce(gradient_of(master.astype(np.float16), scale)).astype(np.float32) / np.float32(scale)
    overflowed = not np.isfinite(g).all()
    if not overflowed:
        norm = float(np.sqrt(np.sum(g.astype(np.float64) ** 2)))
        if norm > max_norm:
            g = g * np.float32(max_norm / norm)
        moment = np.float32(momentum) * moment + g
        master = master - np.float32(lr) * moment
    loss_scale.update(overflowed)
    return master.copy(), moment.copy()
