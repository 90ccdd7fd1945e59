"""The loop variable is not bound, so every hook counts the last bucket down."""

import numpy as np

MESSAGE = "A lambda in a loop keeps the variable"


def backward_with_overlap(comm, loss, buckets):
    flats = [np.zeros(sum(p.size for p in bucket), bucket[0].dtype) for bucket in buckets]
    missing = [len(bucket) for bucket in buckets]
    works = []

    def gradient_ready(i):
        missing[i] -= 1
        while len(works) < len(buckets) and missing[len(works)] == 0:
            flat, bucket = flats[len(works)], buckets[len(works)]
            flat[...] = np.concatenate([p.grad.ravel() for p in bucket])
            works.append(comm.all_reduce_async_(flat))

    hooks = []
    for i, bucket in enumerate(buckets):
        for p in bucket:
            hooks.append(p.register_hook(lambda p: gradient_ready(i)))  # noqa: B023
    loss.backward()
    for remove in hooks:
        remove()
    for work, bucket, flat in zip(works, buckets, flats):
        work.wait()
        start = 0
        for p in bucket:
            p.grad = flat[start : start + p.size].reshape(p.shape)
            start += p.size
