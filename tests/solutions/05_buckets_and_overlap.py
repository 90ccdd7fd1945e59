"""Reference solution of lesson 5."""

import math

import numpy as np


def flat_bucket(shapes, dtype):
    sizes = [math.prod(shape) for shape in shapes]
    flat, views, start = np.zeros(sum(sizes), dtype), [], 0
    for shape, size in zip(shapes, sizes):
        views.append(flat[start : start + size].reshape(shape))
        start += size
    return flat, views


def assign_buckets(sizes, limit):
    buckets, total = [], 0
    for i in reversed(range(len(sizes))):
        if buckets and total + sizes[i] <= limit:
            buckets[-1].append(i)
            total += sizes[i]
        else:
            buckets.append([i])
            total = sizes[i]
    return buckets


def step_seconds(ready, seconds, backward_seconds):
    free = 0.0
    for full, took in zip(ready, seconds):
        free = max(full, free) + took
    end = max(backward_seconds, free)
    return end, end - backward_seconds


def backward_with_overlap(comm, loss, buckets):
    filled = [flat_bucket([p.shape for p in bucket], bucket[0].dtype) for bucket in buckets]
    missing = [len(bucket) for bucket in buckets]
    works = []

    def gradient_ready(i):
        missing[i] -= 1
        while len(works) < len(buckets) and missing[len(works)] == 0:
            flat, views = filled[len(works)]
            for p, view in zip(buckets[len(works)], views):
                view[...] = p.grad
            works.append(comm.all_reduce_async_(flat))

    hooks = [
        p.register_hook(lambda p, i=i: gradient_ready(i)) for i, bucket in enumerate(buckets) for p in bucket
    ]
    loss.backward()
    for remove in hooks:
        remove()
    for work, bucket, (_, views) in zip(works, buckets, filled):
        work.wait()
        for p, view in zip(bucket, views):
            p.grad = view


class OverlappedGradients:
    def __init__(self, comm, buckets):
        self.comm, self.buckets = comm, buckets
        self.flats = [np.zeros(sum(p.size for p in bucket), bucket[0].dtype) for bucket in buckets]
        self.missing = [len(bucket) for bucket in buckets]
        self.works = []
        for i, bucket in enumerate(buckets):
            for p in bucket:
                p.register_hook(lambda p, i=i: self.gradient_ready(i))

    def gradient_ready(self, i):
        self.missing[i] -= 1
        while len(self.works) < len(self.buckets) and self.missing[len(self.works)] == 0:
            flat, bucket = self.flats[len(self.works)], self.buckets[len(self.works)]
            flat[...] = np.concatenate([p.grad.ravel() for p in bucket])
            self.works.append(self.comm.all_reduce_async_(flat))

    def finish(self):
        for work, flat, bucket in zip(self.works, self.flats, self.buckets):
            work.wait()
            start = 0
            for p in bucket:
                p.grad = flat[start : start + p.size].reshape(p.shape).copy()
                start += p.size
        self.works = []
        self.missing = [len(bucket) for bucket in self.buckets]
