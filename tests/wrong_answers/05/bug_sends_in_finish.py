"""Sums everything in finish: right, and all of it exposed."""

import numpy as np

MESSAGE = "all sums begin when backward is over"


class OverlappedGradients:
    def __init__(self, comm, buckets):
        self.comm, self.buckets = comm, buckets

    def finish(self):
        for bucket in self.buckets:
            flat = self.comm.all_reduce(np.concatenate([p.grad.ravel() for p in bucket]))
            start = 0
            for p in bucket:
                p.grad = flat[start : start + p.size].reshape(p.shape)
                start += p.size
