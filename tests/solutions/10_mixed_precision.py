"""Lesson 10: the reference solution."""

import numpy as np


def lost_share(g, scale=1.0):
    with np.errstate(over="ignore", under="ignore"):
        half = (g * np.float32(scale)).astype(np.float16)
    there = g != 0
    n = int(there.sum())
    if n == 0:
        return 0.0, 0.0
    return float((half[there] == 0).sum() / n), float(np.isinf(half[there]).sum() / n)


class LossScale:
    def __init__(self, init=2.0**16, growth=2.0, backoff=0.5, interval=2000, floor=1.0):
        self.scale, self.good = float(init), 0
        self.growth, self.backoff, self.interval, self.floor = growth, backoff, interval, floor

    def update(self, overflowed: bool) -> None:
        if overflowed:
            self.scale, self.good = max(self.scale * self.backoff, self.floor), 0
            return
        self.good += 1
        if self.good == self.interval:
            self.scale, self.good = self.scale * self.growth, 0


def sum_gradients(comm, g):
    return comm.all_reduce(g.astype(np.float32))


def any_overflow(comm, gradients):
    mine = any(not np.isfinite(g).all() for g in gradients)
    return bool(comm.all_reduce(np.array([mine], np.uint8), op="max")[0])


def mixed_step(comm, master, moment, gradient_of, loss_scale, lr, momentum, max_norm):
    scale = loss_scale.scale
    with np.errstate(over="ignore", invalid="ignore"):
        g = sum_gradients(comm, gradient_of(master.astype(np.float16), scale))
        g = g / np.float32(scale)
    overflowed = any_overflow(comm, [g])
    if not overflowed:
        norm = float(np.sqrt(np.sum(g.astype(np.float64) ** 2)))
        if norm > max_norm:
            g = g * np.float32(max_norm / norm)
        moment = np.float32(momentum) * moment + g
        master = master - np.float32(lr) * moment
    loss_scale.update(overflowed)
    return master.copy(), moment.copy()


def accumulated_gradient(weights, pieces, gradient_of, scale):
    total = np.zeros(weights.shape, np.float32)  # a float16 sum swallows what is small beside it
    with np.errstate(over="ignore", invalid="ignore"):
        for piece in pieces:
            total += gradient_of(weights, piece, scale)
        gradient = total / np.float32(scale)
    return gradient, bool(not np.isfinite(gradient).all())
