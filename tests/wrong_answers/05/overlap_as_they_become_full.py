"""A full bucket goes at once, without regard to those before it."""

import numpy as np

MESSAGE = "Begin them in the order of the list"


def backward_with_overlap(comm, loss, buckets):
    flats = [np.zeros(sum(p.size for p in bucket), bucket[0].dtype) for bucket in buckets]
    missing = [len(bucket) for bucket in buckets]
    works = {}

    def gradient_ready(i):
        missing[i] -= 1
        if missing[i] == 0:
            flats[i][...] = np.concatenate([p.grad.ravel() for p in buckets[i]])
            works[i] = comm.all_reduce_async_(flats[i])

    hooks = [
        p.register_hook(lambda p, i=i: gradient_ready(i)) for i, bucket in enumerate(buckets) for p in bucket
    ]
    loss.backward()
    for remove in hooks:
        remove()
    for i, bucket in enumerate(buckets):
        works[i].wait()
        start = 0
        for p in bucket:
            p.grad = flats[i][start : start + p.size].reshape(p.shape)
            start += p.size
