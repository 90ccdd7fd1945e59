"""Data parallelism: every rank holds the whole model and computes the gradient of its share of the batch.

        rank 0: samples 0-2 ── gradient ──┐
        rank 1: samples 3-5 ── gradient ──┼── sum ── every rank takes the same step
        rank 2: samples 6-7 ── gradient ──┘

The loss of each piece is its *sum* over the number of valid targets of the whole batch, so gradients are
summed, never averaged, and unequal shares need no weights. Li et al. 2020, "PyTorch Distributed".
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from minipar import optim
from minipar.comm.interface import Communicator, Work
from minipar.errors import UsageError
from minipar.nn import Module, Parameter
from minipar.ops.normalisation import alone
from minipar.parallel.batch_norm import batch_norms, refuse_microbatches, share_statistics
from minipar.parallel.buckets import BUCKET_MB, Bucket, make_buckets
from minipar.tape import Backward, running_backward
from minipar.tensor import Tensor

AGGREGATIONS = ("all_reduce", "master")
ALL_AGGREGATIONS = (*AGGREGATIONS, "local")  # with that of `LocalSGD`
MASTER = 0


class DataParallel:
    """A model whose gradients are summed over the ranks of `comm` at the end of every backward.

    Each parameter's hook counts its bucket down; a full bucket is sent at once, while backward goes on with
    the layers before it. Buckets leave in one fixed order on every rank, whatever order gradients arrive in.

    Args:
        model: a materialised model, the same on every rank in all but its values.
        comm: the ranks that share the batch.
        bucket_mb: largest bucket in MiB.
        overlap: send during backward (default), or all buckets after it. Only for "all_reduce".
        aggregation: "all_reduce": every rank gets the sum and takes the step. "master": the sum goes to rank
            0, which alone takes the step and sends the new parameters (a parameter server).

    Raises:
        UsageError: unknown aggregation, overlap with "master", a bucket size that is not positive, or a model
            that is not materialised.
    """

    def __init__(
        self,
        model: Module,
        comm: Communicator,
        *,
        bucket_mb: float = BUCKET_MB,
        overlap: bool | None = None,
        aggregation: str = "all_reduce",
    ):
        if aggregation not in AGGREGATIONS:
            raise UsageError(f"aggregation {aggregation!r} is unknown: use one of {', '.join(AGGREGATIONS)}")
        if aggregation == "master" and overlap:
            raise UsageError(
                "aggregation master sums after backward, so it cannot overlap; leave overlap out"
            )
        if bucket_mb <= 0:
            raise UsageError(f"bucket_mb = {bucket_mb} must be positive")
        for name, p in model.named_parameters():
            if not p.is_materialized:
                raise UsageError(
                    f"DataParallel: {name} has no values yet; call model.materialize(seed, dtype) first"
                )
        self.model, self.comm, self.aggregation = model, comm, aggregation
        self.overlap = aggregation == "all_reduce" if overlap is None else overlap
        self.params: list[Parameter] = [p for p in model.parameters() if p.requires_grad]
        self.buckets = make_buckets(self.params, bucket_mb, comm if aggregation == "all_reduce" else None)
        self._bucket_of = {id(p): i for i, bucket in enumerate(self.buckets) for p in bucket.params}
        self._missing = [len(bucket.params) for bucket in self.buckets]
        self._sent: list[Work] = []
        self._synchronising = True
        self._run: Backward | None = None  # the backward whose gradients are being counted
        self._share_values()
        for bucket in self.buckets:
            for p, view in zip(bucket.params, bucket.views):
                p.grad_buffer = view if view.dtype == p.dtype else None
        self._hooks = [p.register_hook(self._gradient_ready) for p in self.params]
        share_statistics(model, comm)

    def __call__(self, *inputs: Any) -> Any:
        return self.model(*inputs)

    def _share_values(self) -> None:
        """Give every rank the master's parameters and buffers."""
        for bucket in self.buckets:
            self._broadcast(bucket)
        frozen = [p for p in self.model.parameters() if not p.requires_grad]
        for tensor in [*frozen, *(buffer for _, buffer in self.model.named_buffers())]:
            tensor.assign_(self.comm.broadcast(tensor.data, root=MASTER))

    def _broadcast(self, bucket: Bucket) -> None:
        self.comm.broadcast_(bucket.pack(lambda p: p.data), root=MASTER)
        for p, view in zip(bucket.params, bucket.views):
            p.assign_(view)

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Inside, backward only adds to this rank's gradients: for all but the last of several microbatches.

        Raises:
            UsageError: the model has batch norm, whose statistics would be those of one microbatch.
        """
        refuse_microbatches(self.model)
        before, self._synchronising = self._synchronising, False
        try:
            yield
        finally:
            self._synchronising = before

    def _gradient_ready(self, p: Tensor) -> None:
        if not self._synchronising:
            return
        run = running_backward()
        if run is not self._run:  # the first gradient of this backward
            if self._sent:
                raise UsageError(
                    "the backward before this one was broken off while its buckets were summed: the sums"
                    " may still write into the gradients; call detach() and wrap the model again"
                )
            self._run = run
            self._missing = [len(bucket.params) for bucket in self.buckets]
            run.at_end.append(self.synchronize)
        self._missing[self._bucket_of[id(p)]] -= 1
        if self.overlap:
            self._send_full_buckets()

    def _send_full_buckets(self) -> None:
        while len(self._sent) < len(self.buckets) and self._missing[len(self._sent)] == 0:
            self._send_next()
        for work in self._sent[-2:]:
            work.done()  # MPI moves a message along only while it is called

    def _send_next(self) -> None:
        bucket = self.buckets[len(self._sent)]
        bucket.mark_used()
        self._sent.append(self.comm.all_reduce_async_(bucket.flat))

    def synchronize(self) -> None:
        """Sum all gradients over the ranks now. Backward calls it; call it yourself only where no gradient
        was computed at all on this rank, so that the others do not wait.

        Raises:
            UsageError: a gradient would be summed twice (see `Bucket.mark_used`).
        """
        self._run = None
        if self.aggregation == "master":
            for bucket in self.buckets:
                bucket.mark_used()
                total = self.comm.reduce(bucket.flat, root=MASTER)
                if total is None:
                    for p in bucket.params:
                        p.grad = None
                else:
                    bucket.flat[...] = total
                    bucket.hand_out()
            return
        while len(self._sent) < len(self.buckets):
            self._send_next()
        for work, bucket in zip(self._sent, self.buckets):
            work.wait()
            bucket.hand_out()
        self._sent = []

    def step(self, optimizer: optim.Optimizer) -> None:
        """Take the optimizer's step: on every rank, or on the master, which then sends the parameters."""
        if self.aggregation == "all_reduce":
            optimizer.step()
            return
        if self.comm.rank == MASTER:
            optimizer.step()
        for p in self.params:
            p.grad = None  # its memory, the bucket, carries the parameters now
        for bucket in self.buckets:
            self._broadcast(bucket)

    def detach(self) -> None:
        """Remove the hooks and buffers: the model is a plain serial model again."""
        for work in self._sent:  # of a backward that was broken off
            work.wait()
        for remove in self._hooks:
            remove()
        for p in self.params:
            p.grad_buffer = None
        for norm in batch_norms(self.model).values():
            norm.reduce = alone
