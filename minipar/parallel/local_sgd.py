"""Local SGD: ranks train alone and average their parameters every few steps.

McMahan et al. 2017 (federated averaging), Stich 2019. One message every `every` steps instead of one a step;
the price is that after a local step the ranks' gradients are taken at different weights. After a single SGD
step averaging parameters equals averaging gradients; with Adam, or more steps, it does not.
"""

from __future__ import annotations

import numpy as np

from minipar import optim
from minipar.backend import array_module
from minipar.comm.interface import Communicator
from minipar.errors import UsageError
from minipar.nn import BatchNorm2d, Module
from minipar.parallel.buckets import BUCKET_MB, make_buckets


class LocalSGD:
    """A model whose parameters are averaged over the ranks of `comm` when `every` steps were taken since the last time.

    Each rank divides its loss by its *own* number of valid targets; the average weights ranks by the targets
    they have seen since the last one. Frozen parameters are equal from the start and left alone.

    Raises:
        UsageError: `every` below 1, or a model with batch norm: every rank would keep statistics of its own.
    """

    def __init__(self, model: Module, comm: Communicator, every: int = 1, bucket_mb: float = BUCKET_MB):
        if every < 1:
            raise UsageError(
                f"LocalSGD: parameters are averaged every {every} steps; give a number of at least 1"
            )
        if any(isinstance(m, BatchNorm2d) for _, m in model.named_modules()):
            raise UsageError("LocalSGD: batch norm would keep other statistics on every rank; use group norm")
        self.model, self.comm, self.every = model, comm, every
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.buckets = make_buckets(self.params, bucket_mb)
        self._since = 0  # steps since the last average, the same number on every rank
        self._seen = 0.0
        for tensor in [*model.parameters(), *(buffer for _, buffer in model.named_buffers())]:
            tensor.assign_(comm.broadcast(tensor.data, root=0))

    def step(self, optimizer: optim.Optimizer, targets: int) -> None:
        """Take a local step and, when it is time, average.

        Args:
            targets: valid targets in this rank's share of the batch.
        """
        if targets:
            optimizer.step()
        self._since += 1
        self._seen += targets
        if self._since == self.every:
            self.average()

    def average(self) -> None:
        """Replace every parameter by the ranks' mean, weighted by the targets each has seen."""
        total = float(self.comm.all_reduce(np.array([self._seen]))[0])
        share = self._seen / total if total else 1 / self.comm.size
        for bucket in self.buckets:
            flat = bucket.pack(lambda p: p.data * array_module(p.data).asarray(share, dtype=p.dtype))
            self.comm.all_reduce_(flat)
            for p, view in zip(bucket.params, bucket.views):
                p.assign_(view)
        self._since, self._seen = 0, 0.0

    def average_rest(self) -> None:
        """Average where steps were taken since the last time, so that all ranks hold one model. Collective."""
        if self._since:
            self.average()
