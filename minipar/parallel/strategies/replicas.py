"""Whole replicas of the model: data parallelism, and local SGD, which averages parameters now and then."""

from __future__ import annotations

import contextlib
from typing import Any

from minipar import optim
from minipar.comm.interface import Communicator
from minipar.models import Model
from minipar.nn import Module
from minipar.parallel.data_parallel import DataParallel
from minipar.parallel.local_sgd import LocalSGD
from minipar.parallel.strategies.strategy import Strategy


class Replicas(Strategy):
    """Data parallelism."""

    def __init__(self, model: Module, dp: Communicator, tp: Communicator | None, **options: Any):
        super().__init__(model, dp, tp)
        self.parallel = DataParallel(model, dp, **options)

    def waiting(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if last else self.parallel.no_sync()

    def synchronize(self) -> None:
        self.parallel.synchronize()

    def grad_norm(self) -> float | None:
        return super().grad_norm() if self.gradients_known() else None

    def step(self, optimizer: optim.Optimizer, targets: int) -> None:
        self.parallel.step(optimizer)

    def gradients_known(self) -> bool:
        return self.parallel.aggregation == "all_reduce" or self.batch_ranks.rank == 0


class AveragedParameters(Strategy):
    """Local SGD."""

    own_mean = True

    def __init__(self, model: Model, dp: Communicator, tp: Communicator | None, every: int, bucket_mb: float):
        super().__init__(model, dp, tp)
        self.local = LocalSGD(model, dp, every, bucket_mb)

    def step(self, optimizer: optim.Optimizer, targets: int) -> None:
        self.local.step(optimizer, targets)

    def finish_steps(self) -> None:
        self.local.average_rest()

    def gradients_known(self) -> bool:
        return False
