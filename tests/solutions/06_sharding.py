"""Lesson 06, reference solution."""

import math

import numpy as np

from minipar.comm import balanced


def place_by_bytes(sizes: list[int], devices: int) -> list[list[int]]:
    held = [0] * devices
    placed: list[list[int]] = [[] for _ in range(devices)]
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        device = held.index(min(held))
        held[device] += sizes[i]
        placed[device].append(i)
    return [sorted(indices) for indices in placed]


def flat_pieces(sizes: list[int], ranks: int) -> list[list[tuple[int, int, int]]]:
    pieces: list[list[tuple[int, int, int]]] = []
    begin = 0
    for count in balanced(sum(sizes), ranks):
        mine, offset = [], 0
        for i, size in enumerate(sizes):
            start, stop = max(begin - offset, 0), min(begin + count - offset, size)
            if start < stop:
                mine.append((i, start, stop))
            offset += size
        pieces.append(mine)
        begin += count
    return pieces


def zero1_step(comm, weights, gradient, momentum, lr, beta):
    counts = balanced(len(weights), comm.size)
    start = sum(counts[: comm.rank])
    mine = comm.reduce_scatter(gradient, counts)
    momentum = beta * momentum + mine
    own = weights[start : start + counts[comm.rank]] - lr * momentum
    return comm.all_gather(own, counts), momentum


def zero3_linear(comm, own, shape, x):
    counts = balanced(shape[0] * shape[1], comm.size)
    y = x @ comm.all_gather(own, counts).reshape(shape).T

    def backward(g):
        dx = g @ comm.all_gather(own, counts).reshape(shape)
        return dx, comm.reduce_scatter((g.T @ x).reshape(-1), counts)

    return y, backward


def clipped_step(comm, weights, gradient, lr, max_norm):
    counts = balanced(len(weights), comm.size)
    start = sum(counts[: comm.rank])
    mine = comm.reduce_scatter(gradient, counts)
    norm = math.sqrt(comm.all_reduce(np.array([np.sum(mine**2)]))[0])
    scale = min(1.0, max_norm / norm) if norm > 0 else 1.0
    own = weights[start : start + counts[comm.rank]] - lr * scale * mine
    return comm.all_gather(own, counts)
