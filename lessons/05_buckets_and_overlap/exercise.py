"""Exercise 5: buckets, and sums that run behind backward.

Write the four functions, then find the bug in the class at the end. What you need to know of the engine:

    remove = p.register_hook(f)      f(p) is called in each backward when p.grad is complete; remove() ends that
    loss.backward()                  calls the hooks, the last layer's first
    work = comm.all_reduce_async_(a) begin to sum the array `a` in place, over all ranks; returns at once
    work.wait()                      return when the sum is in `a`; until then nobody may touch it

`minipar.parallel`, with its `DataParallel` and `make_buckets`, is not allowed here, nor is `minipar.distribute`: you
are writing them. Have your work judged with `minipar grade 05 --file exercise.py`.
"""

import numpy as np


def flat_bucket(shapes, dtype):
    """Return one flat array of zeros, and for each shape a view of its place in it.

    Args:
        shapes: list of tuples; () and shapes with a 0 in them are legal.
        dtype: of the array.

    Returns:
        (flat, views): flat is (n,) with n the elements of all shapes together. views[i] has shape shapes[i] and
        lies in `flat` behind views[i-1], C order: whoever writes into a view writes into `flat`.
    """
    raise NotImplementedError("flat_bucket: slices of one array, each in its shape")


def assign_buckets(sizes, limit):
    """Group parameters into buckets, the last parameter first.

    Go through the parameters from the last to the first and put each into the current bucket as long as the
    bucket's size stays at `limit` or below; otherwise begin a new bucket with it. A parameter larger than the
    limit is alone in one.

    Args:
        sizes: bytes of each parameter, in the order of the model. limit: bytes.

    Returns:
        list of buckets, each a list of positions in `sizes`: assign_buckets([3, 3, 1, 2], 4) is
        [[3, 2], [1], [0]].
    """
    raise NotImplementedError("assign_buckets: from the last parameter to the first, up to the limit")


def step_seconds(ready, seconds, backward_seconds):
    """Return when a step ends, and how much of its communication is exposed.

    Sums of buckets run beside backward. All ranks send the buckets in the order of the list, one after the
    other: a sum begins when its bucket is full *and* the sum before it is over.

    Args:
        ready: for each bucket the time at which it is full, counted from the start of backward. Need not ascend:
            a bucket may be full before an earlier one.
        seconds: how long each bucket's sum takes.
        backward_seconds: when backward is over; no bucket is full later.

    Returns:
        (end, exposed): the time at which backward and all sums are over, and how much later that is than
        backward alone. (backward_seconds, 0) without buckets.
    """
    raise NotImplementedError("step_seconds: each sum begins when its bucket is full and the wires are free")


def backward_with_overlap(comm, loss, buckets):
    """Run backward from `loss`, with the gradients summed over the ranks meanwhile, a bucket at a time.

    Args:
        loss: a Tensor, this rank's part of the loss, divided by the global count.
        buckets: lists of parameters, each parameter in one bucket, the same on every rank. All of them have
            p.grad None before, and each gets a gradient in this backward.

    Contract:
        - Afterwards every p.grad is the sum over the ranks, in the shape and dtype of p.
        - Each bucket is summed by one `all_reduce_async_` of a flat array. It begins as soon as the last of the
          bucket's gradients is complete and the buckets before it in the list have begun: the same order on every
          rank, though gradients may arrive in another order on some.
        - Backward never waits for a sum; this function waits for all of them before it returns.
        - No hook is left on any parameter, so that the function can be called again in the next step.
    """
    raise NotImplementedError(
        "backward_with_overlap: hooks count a bucket down, full buckets go at once, wait last"
    )


class OverlappedGradients:
    """BUG HUNT. The same as an object that is made once: hooks stay, each step is a backward and a `finish`.

        overlapped = OverlappedGradients(comm, buckets)
        for each step:
            model.zero_grad(); loss.backward(); overlapped.finish(); optimizer.step()

    Its author compared the gradients of one step with the serial ones, and they were equal. In a long run the
    loss falls more slowly on 8 ranks than on 1. Compare the gradients of a few steps, not of one.

    Mend it, and keep what is good: one collective a bucket and step, begun during backward.
    """

    def __init__(self, comm, buckets):
        self.comm, self.buckets = comm, buckets
        self.flats = [np.zeros(sum(p.size for p in bucket), bucket[0].dtype) for bucket in buckets]
        self.missing = [len(bucket) for bucket in buckets]
        self.works = []
        for i, bucket in enumerate(buckets):
            for p in bucket:
                p.register_hook(lambda p, i=i: self.gradient_ready(i))

    def gradient_ready(self, i):
        """Count bucket i down, and send every bucket whose turn it is and that is full."""
        self.missing[i] -= 1
        while len(self.works) < len(self.buckets) and self.missing[len(self.works)] == 0:
            flat, bucket = self.flats[len(self.works)], self.buckets[len(self.works)]
            flat[...] = np.concatenate([p.grad.ravel() for p in bucket])
            self.works.append(self.comm.all_reduce_async_(flat))

    def finish(self):
        """Wait for the sums and put them into the parameters' gradients."""
        for work, flat, bucket in zip(self.works, self.flats, self.buckets):
            work.wait()
            start = 0
            for p in bucket:
                p.grad = flat[start : start + p.size].reshape(p.shape).copy()
                start += p.size
        self.works = []
