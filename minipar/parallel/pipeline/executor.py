"""Runs a schedule: one loop for every schedule there is.

The executor does what the list says and decides nothing. For each action it gets the input that has arrived,
computes, and passes the output on. Receives are posted ahead of their use and sends are not waited for until
the step is over, so messages travel while the stage computes. Every receive has memory of its own: backward
still reads an input long after the next one has arrived.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from minipar import random
from minipar.backend import Array
from minipar.comm.interface import Communicator, Work
from minipar.data import Batch
from minipar.models import Model
from minipar.parallel.pipeline.action import COMPUTE, Action, Schedule, tag, virtual_stage
from minipar.parallel.pipeline.communication import with_communication
from minipar.parallel.pipeline.stage import Stage
from minipar.recompute import recompute
from minipar.tape import Deferred, no_grad, run_deferred
from minipar.tensor import Tensor

AHEAD = 2  # receives are posted before this many computing actions that come earlier


@dataclass
class Span:
    """When an action ran, in the communicator's time (seconds)."""

    action: Action
    start: float
    end: float


@dataclass
class InFlight:
    """A microbatch between its forward and its backward on one virtual stage."""

    x: Any
    y: Tensor
    deferred: Deferred = field(default_factory=list)


class Executor:
    """One rank's part of a pipeline.

    Args:
        stage: the blocks that this rank holds.
        loss: (output, targets) → sum of losses; used on the last stage.
        pp: the ranks of the pipeline.
        schedule: computing actions of each rank; sends and receives are put in here.
        recompute: keep a block's input only and run its forward again in backward.
        declare: seconds of virtual time of an action, for a communicator with a clock.

    Attributes:
        spans: the last step's actions with their times.
        peak_live: the largest number of microbatches in flight at once, over all steps.
    """

    def __init__(
        self,
        stage: Stage,
        model: Model,
        pp: Communicator,
        schedule: Schedule,
        *,
        recompute: bool = False,
        declare: Callable[[Action], float] | None = None,
    ):
        self.stage, self.model, self.pp = stage, model, pp
        self.recompute, self.declare = recompute, declare
        self.microbatches = 1 + max(a.microbatch for actions in schedule for a in actions)
        self.last_stage = len(stage.chunks) * pp.size - 1
        self.actions: Sequence[Action] = with_communication(schedule)[pp.rank]
        self.spans: list[Span] = []
        self.peak_live = 0
        self._shapes: dict[tuple[str, int], tuple[tuple[int, ...], Any]] = {}  # of one sample, by message kind

    def run(self, pieces: Sequence[Batch], count: int) -> float:
        """Run forward and backward of all microbatches; return the sum of losses (0 except on the last stage).

        Args:
            pieces: the microbatches, as many as the schedule has; empty ones are legal.
            count: valid targets of the global batch, which losses are divided by.
        """
        self.pieces, self.count, self.total = pieces, count, 0.0
        self.live: dict[tuple[int, int], InFlight] = {}
        self.arriving: dict[tuple[str, int, int], Work] = {}
        self.outgoing: dict[tuple[str, int, int], Array] = {}
        self.sent: list[Work] = []
        self.spans = []
        posted = 0
        for i, action in enumerate(self.actions):
            posted = self._post_receives(i, posted)
            if action.kind in COMPUTE:
                self._compute(action)
            elif action.kind in ("SEND_F", "SEND_B"):
                self._send(action)
        for work in self.sent:
            work.wait()
        return self.total

    # Messages -----------------------------------------------------------------------------------------

    def _post_receives(self, position: int, posted: int) -> int:
        """Begin every receive that the next few actions need; return how far the list has been looked through."""
        ahead = 0
        i = max(posted, position)
        while i < len(self.actions) and ahead <= AHEAD:
            action = self.actions[i]
            if action.kind in COMPUTE:
                ahead += 1
            elif action.kind in ("RECV_F", "RECV_B"):
                self._receive(action)
            i += 1
        return max(i, posted)

    def _receive(self, action: Action) -> None:
        assert action.peer is not None
        key = (action.kind[-1], action.chunk, action.microbatch)
        if key in self.arriving:
            return
        number = tag(action, self.pp.size, self.microbatches)
        known = self._shapes.get((action.kind, action.chunk))
        samples = self.pieces[action.microbatch].local_samples
        shape, dtype = ((samples, *known[0]), known[1]) if known else (None, None)
        self.arriving[key] = self.pp.irecv(action.peer, number, shape, dtype)

    def _received(self, kind: str, action: Action) -> Array:
        if self.pp.size == 1:  # the neighbouring chunk is on this rank: nothing was sent
            neighbour = action.chunk + (-1 if kind == "F" else 1)
            return self.outgoing.pop((kind, neighbour, action.microbatch))
        array: Array = self.arriving.pop((kind, action.chunk, action.microbatch)).wait()
        self._shapes[(f"RECV_{kind}", action.chunk)] = (array.shape[1:], array.dtype)
        return array

    def _send(self, action: Action) -> None:
        assert action.peer is not None
        array = self.outgoing.pop((action.kind[-1], action.chunk, action.microbatch))
        self.sent = [work for work in self.sent if not work.done()]  # what has left need not be kept
        self.sent.append(self.pp.isend(array, action.peer, tag(action, self.pp.size, self.microbatches)))

    # Computation --------------------------------------------------------------------------------------

    def _compute(self, action: Action) -> None:
        here = virtual_stage(action, self.pp.size)
        self.pp.mark(phase=f"{action.kind}{action.microbatch} on stage {here}")
        x = None
        if action.kind == "F" and here > 0:
            x = self._received("F", action)
        g = None
        if action.kind in ("B", "I") and here < self.last_stage:
            g = self._received("B", action)
        start = self.pp.now()
        if action.kind == "F":
            self._forward(action, here, x)
        elif action.kind == "W":
            run_deferred(self.live.pop((action.chunk, action.microbatch)).deferred)
        else:
            self._backward(action, here, g)
        if self.declare is not None:
            self.pp.compute(self.declare(action))
        self.spans.append(Span(action, start, self.pp.now()))

    def _forward(self, action: Action, here: int, arrived: Array | None) -> None:
        piece = self.pieces[action.microbatch]
        if arrived is not None:
            x: Any = Tensor(arrived, requires_grad=True)
        else:
            x = Tensor(piece.inputs) if piece.inputs.dtype.kind == "f" else piece.inputs
        y = x
        with random.at(first_sample=piece.offset):
            for block in self.stage.chunks[action.chunk]:
                y = recompute(block, y) if self.recompute else block(y)
            if here == self.last_stage:
                loss = self.model.loss(y, piece.targets)
                self.total += loss.item()
                y = loss / self.count
            else:
                self.outgoing[("F", action.chunk, action.microbatch)] = y.data
        self.live[(action.chunk, action.microbatch)] = InFlight(x, y)
        self.peak_live = max(self.peak_live, len(self.live))

    def _backward(self, action: Action, here: int, g: Array | None) -> None:
        key = (action.chunk, action.microbatch)
        flight = self.live[key]
        split = action.kind == "I"
        if flight.y.requires_grad:
            flight.y.backward(g, deferred=flight.deferred if split else None)
        if here > 0:
            assert flight.x.grad is not None
            self.outgoing[("B", action.chunk, action.microbatch)] = flight.x.grad
        if split:
            flight.x = flight.y = None  # type: ignore[assignment]  # what W needs is in its thunks
        else:
            del self.live[key]

    def evaluate(self, inputs: Any, targets: Any, hits: Callable[[Array, Any], int]) -> tuple[float, int]:
        """Return (sum of losses, hits) of a batch that runs through all stages; the same on every rank."""
        sums = np.zeros(2)
        x: Any = Tensor(inputs) if inputs.dtype.kind == "f" else inputs
        with no_grad():
            for chunk, blocks in enumerate(self.stage.chunks):
                here = chunk * self.pp.size + self.pp.rank
                if here > 0:
                    x = Tensor(self._from(here - 1))
                for block in blocks:
                    x = block(x)
                if here < self.last_stage:
                    self._to(here + 1, x.data)
                else:
                    sums[:] = self.model.loss(x, targets).item(), hits(x.data, targets)
        loss, hit = self.pp.broadcast(sums, root=self.pp.size - 1).tolist()
        return loss, int(hit)

    def _from(self, stage: int) -> Array:
        source = stage % self.pp.size
        return self._own if source == self.pp.rank else self.pp.recv(source)

    def _to(self, stage: int, x: Array) -> None:
        dest = stage % self.pp.size
        if dest == self.pp.rank:
            self._own = x  # one rank alone: the next chunk is here as well
        else:
            self.pp.send(x, dest)
