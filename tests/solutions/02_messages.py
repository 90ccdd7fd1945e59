"""Reference solution of exercise 2."""

import math

import numpy as np


def exchange(comm, x, partner):
    sending = comm.isend(x, partner)
    received = comm.recv(partner)
    sending.wait()
    return received


def shift(comm, x, distance):
    sending = comm.isend(x, (comm.rank + distance) % comm.size)
    received = comm.recv((comm.rank - distance) % comm.size)
    sending.wait()
    return received


def relay(comm, x, pieces):
    whole = x.copy()
    for piece in np.split(whole, pieces):
        if comm.rank > 0:
            piece[...] = comm.recv(comm.rank - 1)
        if comm.rank < comm.size - 1:
            comm.send(piece, comm.rank + 1)
    return whole


def best_pieces(ranks, n_bytes, alpha, beta):
    low = max(1, math.floor(math.sqrt((ranks - 2) * beta * n_bytes / alpha)))
    return min((low, low + 1), key=lambda k: (ranks - 2 + k) * (alpha + beta * n_bytes / k))


def smooth(comm, u, steps):
    left, right = (comm.rank - 1) % comm.size, (comm.rank + 1) % comm.size
    leftwards, rightwards = 1, 2  # tags: with two ranks both messages come from the same one
    u = u.copy()
    for _ in range(steps):
        to_left = comm.isend(u[:1], left, leftwards)
        to_right = comm.isend(u[-1:], right, rightwards)
        from_left = comm.recv(left, rightwards)
        from_right = comm.recv(right, leftwards)
        to_left.wait()
        to_right.wait()
        wide = np.concatenate([from_left, u, from_right])
        u = (wide[:-2] + 2 * wide[1:-1] + wide[2:]) / 4
    return u
