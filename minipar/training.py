"""The training job: data, a serial model, a kind of parallelism, an optimizer, and the loop over steps.

`Job` composes the floors below and holds no cleverness of its own. With a communicator of one rank it is
the serial job, without a wrapper; `verification` runs it twice, serial and parallel, and compares.
"""

from __future__ import annotations

import math
import time
from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from minipar import optim, random
from minipar.agreement import agreed, on_every_rank
from minipar.amp import MixedPrecision, PolicyConfig
from minipar.backend import float_dtype, to_device
from minipar.comm.interface import Communicator
from minipar.config import STAGED_POLICIES, TrainConfig
from minipar.data import Batch, Data, Loader, load
from minipar.data.tiles import parse_tiles, with_patch_labels
from minipar.errors import MiniparError, UsageError
from minipar.layouts import check_layout, devices_of, microbatches_of, recipe_of
from minipar.mesh import Mesh
from minipar.models import (
    GPT,
    MLP,
    ConvNet,
    ConvNetConfig,
    GPTConfig,
    MLPConfig,
    Model,
    PatchNet,
    PatchNetConfig,
)
from minipar.parallel.distribute import distribute
from minipar.parallel.partition.assignment import Assignment
from minipar.parallel.partition.policies import assign, items_of
from minipar.parallel.partition.profile import agreed_costs
from minipar.parallel.pipeline.action import sizes as sizes_of
from minipar.parallel.pipeline.resolve import resolve_schedule
from minipar.parallel.strategies import Strategy, matrix_like
from minipar.parallel.tensor_parallel.plans import DEFAULT_CUT
from minipar.trace import DATA, OPTIMIZER, STEP, span, timed

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
        grad_norm: global 2-norm before clipping; None where no rank holds the summed gradient, or where a
            scaled gradient overflowed and the step was skipped.
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
    data = load(config.data, kind, seq_len=config.seq_len or 64, seed=config.seed)
    if config.patch is None:
        return data
    return with_patch_labels(data, config.patch, parse_tiles(config.tiles) if config.tiles else (1, 1))


def build_model(config: TrainConfig, info: Any) -> Model:
    """Return the serial model for these settings and this data, not materialised.

    Args:
        info: `Data.info`: vocabulary size, or image shape and number of classes.

    Raises:
        UsageError: a vocabulary smaller than the data's.
    """
    c: Any = config
    if config.model == "gpt":
        known = info["vocabulary_size"]
        if c.vocab is not None and c.vocab < known:
            raise UsageError(f"--vocab is {c.vocab}, and the data has {known} different characters: give as many")
        sizes = GPTConfig(c.vocab or known, c.seq_len, c.width, c.layers, c.heads, c.dropout, c.tied)
        return GPT(sizes)
    channels, height, width = info["image_shape"]
    if config.model == "mlp":
        return MLP(MLPConfig(channels * height * width, info["classes"], c.width, c.layers, c.dropout))
    if config.model == "patchnet":
        return PatchNet(PatchNetConfig(channels, info["classes"], c.width, c.layers, c.patch))
    return ConvNet(ConvNetConfig(channels, min(height, width), info["classes"], c.width, c.layers, c.norm))


def fitting_axes(config: TrainConfig, ranks: int) -> dict[str, int]:
    """Refuse a layout that does not fit, before anything is read or sent; return the size of each axis.

    Raises:
        UsageError: see `layouts.check_layout`; to be raised on every rank.
    """
    sizes_by_data = {"vocabulary_size": 2, "image_shape": (1, 8, 8), "classes": 2}  # no layout hangs on them
    try:
        model = build_model(config, sizes_by_data)
    except MiniparError as error:
        raise on_every_rank(error) from None
    return check_layout(config, ranks, model)


def build_optimizer(config: TrainConfig, strategy: Strategy) -> optim.Optimizer:
    """Return this rank's optimizer; weights of two or more axes decay, biases and norms do not."""
    c: Any = config
    pairs = strategy.optimizer_tensors()
    matrices = {"params": [t for p, t in pairs if matrix_like(p)], "weight_decay": c.weight_decay}
    vectors = {"params": [t for p, t in pairs if not matrix_like(p)], "weight_decay": 0.0}
    groups = [group for group in (matrices, vectors) if group["params"]]
    if config.optimizer == "sgd":
        return optim.SGD(groups, lr=c.lr, momentum=c.momentum)
    return (optim.AdamW if config.optimizer == "adamw" else optim.Adam)(groups, lr=c.lr)


class Job:
    """One rank's part of a training run.

    Args:
        config: resolved settings.
        comm: the ranks that train together. One rank alone trains the plain model, without any wrapper.
        data: the data set, so that it is read once; None loads it.

    Attributes:
        mesh: the ranks by axis.
        recipe: how the model is distributed over the mesh.
        assignment: where the partition policy has laid the parameters; None without one.
        precision: autocast, loss scale and precision policy.
        strategy: the distributed model.
        steps_done, seconds_done: steps taken and time spent in `train`, those before a resume included.

    Raises:
        UsageError: a layout that does not fit the ranks, or settings that do not fit the data; on every rank.
        DataError: the data cannot be used; on every rank.
    """

    def __init__(self, config: TrainConfig, comm: Communicator, data: Data | None = None):
        self.config, self.comm = config, comm
        c: Any = config
        sizes = fitting_axes(config, comm.size)
        self.data, self.model, policy = agreed(comm, lambda: self._prepare(data))
        self.precision = MixedPrecision(c.amp, comm, c.loss_scale, policy)
        self.mesh = Mesh(comm, **sizes)
        self.assignment = self._assignment()
        self.recipe = recipe_of(config, self.assignment)
        self.strategy = distribute(self.model, self.mesh, self.recipe, seed=c.seed, dtype=c.dtype, device=c.device)
        self.optimizer = build_optimizer(config, self.strategy)
        self.loader = self._loader(self.data.train, c.batch, shuffle=True)
        self.steps_done = 0
        self.seconds_done = 0.0

    @property
    def samples_done(self) -> int:
        """Samples of all steps taken, over all ranks; the last batch of an epoch may be smaller than the others."""
        return self.loader.samples_of(self.steps_done)

    def layout(self) -> str:
        """Return in words how the ranks work together, as in "dp 2 × tp 2, ZeRO 1"; "" for one rank."""
        r = self.recipe
        parts = [" × ".join(f"{axis} {size}" for axis, size in self.mesh.shape.items() if size > 1)]
        parts += [r.aggregation] if r.aggregation != "all_reduce" else []
        parts += ["sequence parallel"] if r.sequence_parallel else []
        cut = self.mesh.tp.size > 1 and isinstance(self.model, ConvNet | PatchNet)
        parts += [f"convolutions cut by {r.convolution or DEFAULT_CUT}"] if cut else []
        parts += [f"ZeRO {r.zero}"] if r.zero else []
        parts += [f"partition by {r.assignment.policy}"] if r.assignment is not None else []
        return ", ".join(part for part in parts if part)

    def _prepare(self, data: Data | None) -> tuple[Data, Model, PolicyConfig | None]:
        """Return data, serial model and precision policy: all that can go wrong on one rank alone."""
        file = self.config.precision_policy
        policy = PolicyConfig.read(file) if file is not None else None
        data = load_data(self.config) if data is None else data
        return data, build_model(self.config, data.info), policy

    def _assignment(self) -> Assignment | None:
        """Return the parameters' places by the chosen policy, equal on all ranks; None without a policy."""
        c: Any = self.config
        if c.partition is None:
            return None
        ranks = self.comm.size
        if c.pp > 1:
            schedule = resolve_schedule(self.comm, c.schedule, c.pp, microbatches_of(c), c.chunks)
            ranks = c.pp * sizes_of(schedule).chunks
        devices, costs = agreed(self.comm, lambda: devices_of(c, ranks)), None
        if c.partition in STAGED_POLICIES:
            some = np.arange(min(c.batch, len(self.data.train)))
            sample = self.data.train.fetch(some, float_dtype(c.dtype))[0]
            placed = agreed(self.comm, lambda: to_device(sample, c.device))  # to be timed where it will run
            costs = agreed_costs(self.model, placed, self.comm, dtype=c.dtype)
        return agreed(self.comm, lambda: assign(c.partition, items_of(self.model, c.dtype), devices, costs))

    def _loader(self, dataset: Any, batch: int, shuffle: bool) -> Loader:
        ranks = self.strategy.batch_ranks
        return Loader(
            dataset, batch, rank=ranks.rank, ranks=ranks.size, seed=self.config.seed, shuffle=shuffle,
            dtype=float_dtype(self.config.dtype),
        )  # fmt: skip

    def here(self, batch: Batch) -> Batch:
        """Return a batch of the loader, or a piece of one, where the model is: on this rank's device."""
        device = self.config.device
        return replace(
            batch, inputs=to_device(batch.inputs, device), targets=to_device(batch.targets, device)
        )

    @overflow_is_reported
    def forward_backward(self, batch: Batch) -> float:
        """Compute this step's gradients; return the global batch's mean loss, the same on every rank."""
        count = max(batch.local_count, 1) if self.strategy.own_mean else batch.count
        self.optimizer.zero_grad()
        self.model.zero_grad()
        total: Any = 0.0  # on a GPU it stays there until the last piece is through
        divisor = self.precision.divisor(count)
        pieces = batch.split(self.config.accumulate)
        for i, piece in enumerate(pieces):
            moment = random.at(seed=self.config.seed, step=self.steps_done, first_sample=piece.offset)
            with moment, self.precision.context():
                total += self.strategy.add_gradients(self.here(piece), divisor, last=i == len(pieces) - 1)
        self.strategy.finish_gradients()
        return float(self.strategy.batch_ranks.all_reduce(np.array([float(total)]))[0]) / batch.count

    @overflow_is_reported
    def update(self, batch: Batch) -> float | None:
        """Unscale, clip and take the optimizer's step; return the global gradient norm if it is known here.

        Where a scaled gradient overflowed on any rank, every rank skips the step: no norm, and nothing but
        the loss scale is changed.

        Raises:
            TrainingFailed: the norm is not finite, or gradients overflow at the smallest loss scale; nothing
                is changed then.
        """
        c: Any = self.config
        self.optimizer.set_lr(
            optim.warmup_cosine(self.steps_done, peak=c.lr, warmup=c.warmup, total=c.steps, floor=c.lr / 10)
        )
        overflowed, norm = self.precision.unscale(self.optimizer), None
        scaler = self.precision.scaler
        if overflowed and scaler.get_scale() <= scaler.floor:
            what = f"gradients overflow at the smallest loss scale allowed, {scaler.floor:g}"
            raise on_every_rank(self._failure(what))
        if not overflowed:
            if self.precision.observe(self.strategy.optimizer_tensors()):
                self.strategy.precision_changed()
            norm = self.strategy.grad_norm()
            if norm is not None:
                self._clip(norm)
        self.precision.step(self.optimizer, lambda: self.strategy.step(self.optimizer, batch.local_count))
        self.steps_done += 1
        return None if self.strategy.own_mean else norm

    def _clip(self, norm: float) -> None:
        """Scale the gradients at hand so that their norm is at most the limit."""
        tensors = [t for _, t in self.strategy.optimizer_tensors()]
        try:
            optim.clip_grad_norm_(tensors, self.config.clip or math.inf, norm)
        except FloatingPointError as error:
            failure = self._failure(str(error))
            # Where gradients are summed on all ranks they are the same on all, else this rank speaks alone.
            raise on_every_rank(failure) if self.config.aggregation == "all_reduce" else failure from None

    def _failure(self, what: str) -> TrainingFailed:
        """Return the error of a training that went astray at this step."""
        return TrainingFailed(
            f"step {self.steps_done + 1}: {what}: lower --lr (now {self.config.lr}) or look at the data"
        )

    def train(self) -> Generator[StepRecord, None, None]:
        """Yield a record after each step that is still to do.

        Raises:
            TrainingFailed: the loss (on every rank) or the gradient norm is no longer a finite number.
        """
        before = time.perf_counter()
        start = before - self.seconds_done
        self.model.train()
        steps = self.config.steps
        assert steps is not None
        for batch in timed(DATA, self.loader.steps(steps - self.steps_done)):
            with span(STEP, f"step {self.steps_done + 1}"):
                self.comm.mark(step=self.steps_done + 1, phase="forward")
                loss = self.forward_backward(batch)
                if not math.isfinite(loss):
                    raise on_every_rank(self._failure(f"the loss is {loss}"))
                self.comm.mark(phase="optimizer")
                with span(OPTIMIZER):
                    norm = self.update(batch)
            now = time.perf_counter()
            self.seconds_done = now - start
            yield StepRecord(self.steps_done, loss, norm, batch.samples / (now - before), self.seconds_done)
            before = now

    @overflow_is_reported
    def evaluate(self) -> dict[str, float]:
        """Return the validation loss (nats a target) and accuracy, each rank having run its share.

        Parameters that ranks hold apart (`--aggregation local`) are averaged first: what is judged is one model.

        Raises:
            TrainingFailed: the loss is not finite, so the weights are not either; on every rank.
        """
        c: Any = self.config
        self.comm.mark(phase="evaluation")
        self.strategy.finish_steps()
        sums = np.zeros(3)  # loss, hits, targets
        self.model.eval()
        for batch in self._loader(self.data.valid, c.batch, shuffle=False):
            # A rank without samples runs as well: with sharded parameters the others need its part of them.
            here = self.here(batch)
            with self.precision.context():
                loss, hits = self.strategy.evaluate(here.inputs, here.targets)
            sums += [loss, float(hits), batch.local_count]
        self.model.train()
        loss, hits, targets = self.strategy.batch_ranks.all_reduce(sums).tolist()
        if not math.isfinite(loss):
            raise on_every_rank(self._failure(f"the validation loss is {loss}"))
        return {"loss": loss / targets, "accuracy": hits / targets}
