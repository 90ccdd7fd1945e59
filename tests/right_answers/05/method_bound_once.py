"""The communicator's method is looked up once, before backward, and called for each bucket."""

import numpy as np


def backward_with_overlap(comm, loss, buckets):
    begin, works = comm.all_reduce_async_, []
    missing = [len(bucket) for bucket in buckets]

    def gradient_ready(i):
        missing[i] -= 1
        while len(works) < len(buckets) and missing[len(works)] == 0:
            flat = np.concatenate([p.grad.ravel() for p in buckets[len(works)]])
            works.append((begin(flat), flat))

    hooks = [p.register_hook(lambda p, i=i: gradient_ready(i)) for i, bucket in enumerate(buckets) for p in bucket]
    loss.backward()
    for remove in hooks:
        remove()
    for (work, flat), bucket in zip(works, buckets):
        work.wait()
        ends = np.cumsum([p.size for p in bucket])
        for p, values in zip(bucket, np.split(flat, ends[:-1])):
            p.grad = values.reshape(p.shape)


class OverlappedGradients:
    def __init__(self, comm, buckets):
        self.begin, self.buckets = comm.all_reduce_async_, buckets
        self.start()
        for i, bucket in enumerate(buckets):
            for p in bucket:
                p.register_hook(lambda p, i=i: self.gradient_ready(i))

    def start(self):
        self.missing, self.works = [len(bucket) for bucket in self.buckets], []

    def gradient_ready(self, i):
        self.missing[i] -= 1
        while len(self.works) < len(self.buckets) and self.missing[len(self.works)] == 0:
            flat = np.concatenate([p.grad.ravel() for p in self.buckets[len(self.works)]])
            self.works.append((self.begin(flat), flat))

    def finish(self):
        for (work, flat), bucket in zip(self.works, self.buckets):
            work.wait()
            ends = np.cumsum([p.size for p in bucket])
            for p, values in zip(bucket, np.split(flat, ends[:-1])):
                p.grad = values.reshape(p.shape)
        self.start()
