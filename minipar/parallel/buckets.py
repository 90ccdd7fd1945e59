"""Flat buckets: many small arrays as views of one long one, so that one message carries them all.

A message costs α + βn seconds for n bytes. A GPT has a dozen small tensors per block, each would pay α; a
bucket pays it once. `grad_buffer` makes backward write each gradient straight into its place. Ranks of one host that
will sum a bucket lay it where all of them read and write it (`Communicator.symmetric`).

Parameters of two-byte floats (a model in float16 throughout, without float32 master weights) are packed and
summed in float32 and rounded once: a sum over ranks in float16 could overflow on its way though its end fits,
and each hop would round. Dividing before the sum would avoid the first and lose small gradients instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from minipar.backend import Array, array_module, is_gpu_array
from minipar.comm.interface import Communicator
from minipar.errors import UsageError
from minipar.kernels.common import work_dtype
from minipar.nn import Parameter

BUCKET_MB = 25.0  # the largest bucket unless told otherwise; as PyTorch's DDP


class Bucket:
    """Some parameters of one dtype, and a flat array with room for one value per element of them.

    Args:
        comm: the ranks that will sum it; None where none do. Making one is collective.

    Attributes:
        flat: (n + len(params),): the elements in order, then one flag per parameter (see `mark_used`). In the
            parameters' dtype, in float32 for two-byte floats.
        views: one view of `flat` per parameter, in its shape.
        sums: the same memory again; a parameter's gradient is this object once it has been summed, so that a
            gradient that would be summed a second time is noticed.
    """

    def __init__(self, params: Sequence[Parameter], comm: Communicator | None = None):
        self.params = list(params)
        self.numel = sum(p.size for p in self.params)
        first = self.params[0].data
        dtype = work_dtype(first.dtype)
        self.rounded = dtype != first.dtype  # whether sums are rounded when they are handed out
        length = self.numel + len(self.params)
        if comm is None or is_gpu_array(first):
            self.flat: Array = array_module(first).zeros(length, dtype)
        else:
            self.flat = comm.symmetric(length, dtype)
        self.views: list[Array] = []
        start = 0
        for p in self.params:
            self.views.append(self.flat[start : start + p.size].reshape(p.shape))
            start += p.size
        self.sums = [view.view() for view in self.views]
        self.used = self.flat[self.numel :]
        self.all_used_here = False

    def mark_used(self) -> None:
        """Flag each parameter that has a gradient and zero the place of each that has none.

        The flags are summed together with the gradients. So every rank learns whether *any* rank used the
        parameter: if none did, its gradient is None everywhere, as in the serial run.

        Raises:
            UsageError: a gradient is the sum of the ranks already, and the next sum would count it again.
        """
        for p, total in zip(self.params, self.sums):
            if p.grad is total:
                raise UsageError(
                    f"the gradient of {p.name!r} is summed over the ranks already: call zero_grad before the"
                    " next backward, and run all but the last of several microbatches inside no_sync()"
                )
        self.all_used_here = all(p.grad is not None for p in self.params)
        self.used[...] = 1 if self.all_used_here else 0
        if self.all_used_here and all(p.grad is view for p, view in zip(self.params, self.views)):
            return
        for i, (p, view) in enumerate(zip(self.params, self.views)):
            self.used[i] = p.grad is not None
            if p.grad is None:
                view[...] = 0
            elif p.grad is not view:
                view[...] = p.grad

    def hand_out(self) -> None:
        """Set each parameter's gradient to the sum, or to None if no rank used the parameter."""
        # Reading the flags would make a GPU wait, and is not needed where this rank used everything itself.
        used = [1.0] * len(self.params) if self.all_used_here else self.used.tolist()
        for i, (p, flag) in enumerate(zip(self.params, used)):
            if self.rounded:
                self.sums[i] = self.views[i].astype(p.dtype)
            p.grad = self.sums[i] if flag else None

    def pack(self, value: Callable[[Parameter], Array]) -> Array:
        """Fill the flat array with `value(p)` of each parameter and return it without the flags."""
        for p, view in zip(self.params, self.views):
            view[...] = value(p)
        return self.flat[: self.numel]


def make_buckets(params: Sequence[Parameter], megabytes: float, comm: Communicator | None = None) -> list[Bucket]:
    """Group parameters into buckets of at most `megabytes` MiB of sums (a larger parameter is alone in one).

    The order is reversed: backward reaches the last layer first, so its bucket can be sent first. It depends
    on the model alone and is the same on every rank. For `comm` see `Bucket`.
    """
    limit = megabytes * 2**20
    groups: list[list[Parameter]] = []
    size = 0
    for p in reversed(params):
        nbytes = p.size * work_dtype(p.dtype).itemsize
        if groups and groups[-1][0].dtype == p.dtype and size + nbytes <= limit:
            groups[-1].append(p)
            size += nbytes
        else:
            groups.append([p])
            size = nbytes
    return [Bucket(group, comm) for group in groups]
