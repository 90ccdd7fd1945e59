"""Reference solution of lesson 3."""

import numpy as np


def ring_reduce_scatter(comm, x):
    size, after, before = comm.size, (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    chunks = x.reshape(size, len(x) // size, *x.shape[1:])
    total = chunks[(comm.rank - 1) % size].copy()  # chunk c starts on rank c + 1
    for step in range(1, size):
        sending = comm.isend(total, after)
        received = comm.recv(before)
        sending.wait()
        total = received + chunks[(comm.rank - 1 - step) % size]
    return total


def ring_all_gather(comm, chunk):
    size, after, before = comm.size, (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    chunks = [chunk] * size
    for step in range(1, size):
        sending = comm.isend(chunks[(comm.rank - step + 1) % size], after)
        chunks[(comm.rank - step) % size] = comm.recv(before)
        sending.wait()
    return np.concatenate(chunks)


def tree_broadcast(comm, x, root=0):
    size = comm.size
    place = (comm.rank - root) % size  # ranks counted from the root
    have = x.copy()
    distance = 1
    while distance < size:
        if place < distance and place + distance < size:
            comm.send(have, (comm.rank + distance) % size)
        elif distance <= place < 2 * distance:
            have = comm.recv((comm.rank - distance) % size)
        distance *= 2
    return have


def all_reduce_seconds(n_bytes, ranks, alpha, beta):
    levels = ranks.bit_length() - 1
    bytes_sent = 2 * (ranks - 1) / ranks * n_bytes
    return {
        "ring": 2 * (ranks - 1) * alpha + bytes_sent * beta,
        "doubling": levels * (alpha + n_bytes * beta),
        "halving_doubling": 2 * levels * alpha + bytes_sent * beta,
    }


def doubling_all_reduce(comm, x):
    total = x.copy()
    power = 1 << (comm.size.bit_length() - 1)
    if comm.rank >= power:  # no partner in every round: hand in, and get the result back
        comm.send(total, comm.rank - power)
        return comm.recv(comm.rank - power)
    folded = comm.rank + power < comm.size
    if folded:
        total = total + comm.recv(comm.rank + power)
    distance = 1
    while distance < power:
        partner = comm.rank ^ distance
        sending = comm.isend(total, partner)
        received = comm.recv(partner)
        sending.wait()
        total = total + received
        distance *= 2
    if folded:
        comm.send(total, comm.rank + power)
    return total
