"""The training job: data, a serial model, a kind of parallelism, an optimizer, and the loop over steps.

`Job` composes the floors below and holds no cleverness of its own. With a communicator of one rank it is
the serial job, without a wrapper; `verification` runs it twice, serial and parallel, and compares.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from minipar import optim, random
from minipar.agreement import agreed, on_every_rank
from minipar.backend import float_dtype, to_device
from minipar.comm.interface import Communicator
from minipar.config import TrainConfig
from minipar.data import Batch, Data, Loader, load
from minipar.errors import MiniparError, UsageError
from minipar.models import GPT, MLP, ConvNet, ConvNetConfig, GPTConfig, MLPConfig, Model
from minipar.parallel import DataParallel, LocalSGD
from minipar.tape import no_grad
from minipar.tensor import Tensor


# A training that goes astray overflows; `TrainingFailed` says so, once, and NumPy's warnings add nothing.
overflow_is_reported = np.errstate(over="ignore", invalid="ignore")


class TrainingFailed(MiniparError, ArithmeticError):
    """The loss or the gradient norm stopped being a finite number."""


@dataclass(frozen=True)
class StepRecord:
    """What one step gave; the fields of a line in metrics.jsonl.

    Attributes:
        step: counted from 1.
        loss: mean over all valid targets of the global batch, in nats.
        grad_norm: global 2-norm before clipping; None where no rank holds the summed gradient.
        samples_per_s: samples of the global batch by the time of the step.
        seconds: since the start of training.
    """

    step: int
    loss: float
    grad_norm: float | None
    samples_per_s: float
    seconds: float


def load_data(config: TrainConfig) -> Data:
    """Return the data set that the settings name, of the kind the model reads."""
    assert config.data is not None
    kind: Any = "text" if config.model == "gpt" else "images"
    return load(config.data, kind, seq_len=config.seq_len or 64, seed=config.seed)


def build_model(config: TrainConfig, info: Any) -> Model:
    """Return the serial model for these settings and this data, not materialised.

    Args:
        info: `Data.info`: vocabulary size, or image shape and number of classes.
    """
    c: Any = config
    if config.model == "gpt":
        sizes = GPTConfig(info["vocabulary_size"], c.seq_len, c.width, c.layers, c.heads, c.dropout, c.tied)
        return GPT(sizes)
    channels, height, width = info["image_shape"]
    if config.model == "mlp":
        return MLP(MLPConfig(channels * height * width, info["classes"], c.width, c.layers, c.dropout))
    return ConvNet(ConvNetConfig(channels, min(height, width), info["classes"], c.width, c.layers, c.norm))


def build_optimizer(config: TrainConfig, model: Model) -> optim.Optimizer:
    """Return the optimizer; weight decay goes to weights of two or more axes, not to biases and norms."""
    c: Any = config
    matrices = [p for p in model.parameters() if len(p.global_shape) >= 2]
    vectors = [p for p in model.parameters() if len(p.global_shape) < 2]
    groups: list[dict[str, Any]] = [{"params": matrices, "weight_decay": c.weight_decay}]
    if vectors:
        groups.append({"params": vectors, "weight_decay": 0.0})
    if config.optimizer == "sgd":
        return optim.SGD(groups, lr=c.lr, momentum=c.momentum)
    return (optim.AdamW if config.optimizer == "adamw" else optim.Adam)(groups, lr=c.lr)


class Job:
    """One rank's part of a training run.

    Args:
        config: resolved settings.
        comm: the ranks that train together. One rank alone trains the plain model, without any wrapper.
        data: the data set, so that it is read once; None loads it.

    Raises:
        UsageError: a layout that does not fit the ranks, or settings that do not fit the data; on every rank.
        DataError: the data cannot be used; on every rank.
    """

    def __init__(self, config: TrainConfig, comm: Communicator, data: Data | None = None):
        self.config, self.comm = config, comm
        c: Any = config
        self.data, self.model = agreed(comm, lambda: self._prepare(data))
        self.local: LocalSGD | None = None
        self.parallel: DataParallel | None = None
        if comm.size > 1 and c.aggregation == "local":
            self.local = LocalSGD(self.model, comm, c.average_every or 1, c.bucket_mb)
        elif comm.size > 1:
            how = {"bucket_mb": c.bucket_mb, "overlap": c.overlap, "aggregation": c.aggregation}
            self.parallel = DataParallel(self.model, comm, **how)
        self.optimizer = build_optimizer(config, self.model)
        self.loader = self._loader(self.data.train, c.batch, shuffle=True)
        self.steps_done = 0

    def _prepare(self, data: Data | None) -> tuple[Data, Model]:
        """Return the data and the serial model: everything that can go wrong on one rank alone."""
        c, ranks = self.config, self.comm.size
        if c.dp is not None and c.dp != ranks:
            raise UsageError(f"--dp {c.dp} on {ranks} rank{'s'[:ranks > 1]}: data is the only axis, so --dp must be {ranks}")
        data = load_data(c) if data is None else data
        return data, build_model(c, data.info).materialize(c.seed, c.dtype, c.device)

    def _loader(self, dataset: Any, batch: int, shuffle: bool) -> Loader:
        return Loader(
            dataset, batch, rank=self.comm.rank, ranks=self.comm.size, seed=self.config.seed, shuffle=shuffle,
            dtype=float_dtype(self.config.dtype),
        )  # fmt: skip

    def loss_sum(self, batch: Batch) -> Tensor:
        """Return the sum of the losses of this rank's valid targets."""
        inputs = to_device(batch.inputs, self.config.device)
        x = inputs if self.config.model == "gpt" else Tensor(inputs)  # token ids carry no gradient
        return self.model.loss(self.model(x), to_device(batch.targets, self.config.device))

    @overflow_is_reported
    def forward_backward(self, batch: Batch) -> float:
        """Compute this step's gradients; return the global batch's mean loss, the same on every rank."""
        # Local SGD's ranks each minimise their own mean, all others the mean over the global batch.
        count = max(batch.local_count, 1) if self.local else batch.count
        self.model.zero_grad()
        total = 0.0
        pieces = batch.split(self.config.accumulate)
        for i, piece in enumerate(pieces):
            last = i == len(pieces) - 1
            waiting = contextlib.nullcontext() if last or self.parallel is None else self.parallel.no_sync()
            with waiting, random.at(seed=self.config.seed, step=self.steps_done, first_sample=piece.offset):
                loss = self.loss_sum(piece)
                (loss / count).backward()
            total += loss.item()
        return float(self.comm.all_reduce(np.array([total]))[0]) / batch.count

    @overflow_is_reported
    def update(self, batch: Batch) -> float | None:
        """Clip and take the optimizer's step; return the global gradient norm if this rank knows it.

        Raises:
            TrainingFailed: the norm is not finite; nothing is changed then.
        """
        c: Any = self.config
        self.optimizer.set_lr(
            optim.warmup_cosine(self.steps_done, peak=c.lr, warmup=c.warmup, total=c.steps, floor=c.lr / 10)
        )
        norm = None
        if self.local:
            if c.clip and batch.local_count:
                self._clip()
            self.local.step(self.optimizer, batch.local_count)
        else:
            if any(p.grad is not None for p in self.model.parameters()):
                norm = self._clip()
            if self.parallel:
                self.parallel.step(self.optimizer)
            else:
                self.optimizer.step()
        self.steps_done += 1
        return norm

    def _clip(self) -> float:
        """Scale the gradients at hand so that their norm is at most the limit; return the norm before that."""
        try:
            return optim.clip_grad_norm_(self.model.parameters(), self.config.clip or math.inf)
        except FloatingPointError as error:
            failure = self._failure(str(error))
            # Where gradients are summed on all ranks they are the same on all, else this rank speaks alone.
            raise on_every_rank(failure) if self.config.aggregation == "all_reduce" else failure from None

    def _failure(self, what: str) -> TrainingFailed:
        """Return the error of a training that went astray at this step."""
        return TrainingFailed(f"step {self.steps_done + 1}: {what}: lower --lr (now {self.config.lr}) or look at the data")

    def train(self) -> Iterator[StepRecord]:
        """Yield a record after each step.

        Raises:
            TrainingFailed: the loss (on every rank) or the gradient norm is no longer a finite number.
        """
        start = before = time.perf_counter()
        self.model.train()
        steps = self.config.steps
        assert steps is not None
        for batch in self.loader.steps(steps):
            self.comm.mark(step=self.steps_done + 1, phase="forward/backward")
            loss = self.forward_backward(batch)
            if not math.isfinite(loss):
                raise on_every_rank(self._failure(f"the loss is {loss}"))
            self.comm.mark(phase="update")
            norm = self.update(batch)
            now = time.perf_counter()
            yield StepRecord(self.steps_done, loss, norm, batch.samples / (now - before), now - start)
            before = now

    @overflow_is_reported
    def evaluate(self) -> dict[str, float]:
        """Return the validation loss (nats a target) and accuracy, each rank having run its share.

        Raises:
            TrainingFailed: the loss is not finite, so the weights are not either; on every rank.
        """
        c: Any = self.config
        self.comm.mark(phase="evaluation")
        sums = np.zeros(3)  # loss, hits, targets
        self.model.eval()
        with no_grad():
            for batch in self._loader(self.data.valid, c.batch, shuffle=False):
                if batch.local_count == 0:
                    continue
                inputs = to_device(batch.inputs, c.device)
                output = self.model(inputs if c.model == "gpt" else Tensor(inputs))
                targets = to_device(batch.targets, c.device)
                hits = (output.data.argmax(axis=-1) == targets).sum()
                sums += [self.model.loss(output, targets).item(), float(hits), batch.local_count]
        self.model.train()
        loss, hits, targets = self.comm.all_reduce(sums).tolist()
        if not math.isfinite(loss):
            raise on_every_rank(self._failure(f"the validation loss is {loss}"))
        return {"loss": loss / targets, "accuracy": hits / targets}
