"""Runs a schedule: one loop for every schedule there is.

The executor does what the list says and decides nothing. For each action it gets the input that has arrived,
computes, and passes the output on. Receives are posted ahead of their use and sends are not waited for until
the step is over, so messages travel while the stage computes. Every receive has memory of its own: backward
still reads an input long after the next one has arrived.

What is kept of a microbatch is what its backward will read, and no more: an output is let go when it has been
sent, and between I and W there are only the deferred weight gradients and what these captured.

No thread of its own moves the messages: between two processes of one machine the receiver fetches even large
ones by itself (measured: MPICH, 2 MiB arrive in 4–8 ms while the sender computes for 300 ms), and for
networks where MPI needs to be called meanwhile, each action asks after the messages that are under way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from minipar import random
from minipar.backend import Array, array_module, summand, synchronize
from minipar.comm.interface import Communicator, Work
from minipar.data import Batch
from minipar.errors import UsageError
from minipar.models import Model
from minipar.parallel.pipeline.action import (
    COMPUTE,
    RECEIVES,
    SENDS,
    Action,
    Schedule,
    has_communication,
    sizes,
    tag,
    virtual_stage,
)
from minipar.parallel.pipeline.communication import with_communication
from minipar.parallel.pipeline.simulator import Span
from minipar.parallel.pipeline.stage import Stage
from minipar.recompute import recompute
from minipar.tape import Backward, Deferred, Edge, no_grad, run_deferred
from minipar.tensor import Tensor, as_input
from minipar.trace import ACTION, add_span, is_recording

AHEAD = 2  # receives are posted before this many computing actions that come earlier


@dataclass
class InFlight:
    """A microbatch between its forward and its backward on one virtual stage."""

    x: Tensor | None  # the input that has a gradient to send back; None on the first stage, and after I
    output: Edge | None  # where backward begins: not the output's values, which only the next stage needs
    g: Array | None = None  # the gradient to begin with, where it does not arrive: 1 of the loss
    deferred: Deferred = field(default_factory=list)  # what W will compute


class Executor:
    """One rank's part of a pipeline.

    Args:
        stage: the blocks that this rank holds.
        model: the whole model, of which its loss is used, on the last stage.
        pp: the ranks of the pipeline.
        schedule: of all ranks, one that `checker` accepts; sends and receives are put in if it has none.
        recompute: keep a block's input only and run its forward again in backward.
        declare: seconds of virtual time of an action, for a communicator with a clock.
        announce: told a microbatch's inputs before its forward on every stage, also where only activations
            arrive: for what must be known of the whole (how long a sequence is that ranks hold parts of).

    Attributes:
        watch: called after each computing action, while what is in flight lies in `live`; by default nothing.
        spans: the last step's actions with their times in seconds (`Communicator.now`); on a GPU those at which
            they were queued, unless a trace is being recorded.
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
        announce: Callable[[Any], None] = lambda inputs: None,
    ):
        self.stage, self.model, self.pp = stage, model, pp
        self.recompute, self.declare, self.announce = recompute, declare, announce
        self.microbatches = sizes(schedule).microbatches
        self.last_stage = len(stage.chunks) * pp.size - 1
        complete = schedule if has_communication(schedule) else with_communication(schedule)
        self.actions: Sequence[Action] = complete[pp.rank]
        self.spans: list[Span] = []
        self.peak_live = 0
        self.watch: Callable[[], None] = lambda: None
        self._shapes: dict[
            tuple[str, int], tuple[tuple[int, ...], Any]
        ] = {}  # of one sample, by message kind

    def run(self, pieces: Sequence[Batch], count: float) -> Any:
        """Run forward and backward of all microbatches; return the sum of losses (0 except on the last stage).

        On a GPU the sum is a scalar array that nobody has waited for.

        Args:
            pieces: the microbatches, as many as the schedule has; empty ones are legal.
            count: valid targets of the global batch (over the loss scale), which losses are divided by.

        Raises:
            UsageError: another number of pieces than the schedule has.
        """
        if len(pieces) != self.microbatches:
            raise UsageError(
                f"pipeline: {len(pieces)} pieces for a schedule of {self.microbatches} microbatches"
            )
        self.pieces, self.count = pieces, count
        self.total: Any = 0.0
        self.live: dict[tuple[int, int], InFlight] = {}
        self.arriving: dict[tuple[str, int, int], Work] = {}
        self.outgoing: dict[tuple[str, int, int], Array] = {}
        self.sent: list[Work] = []
        self.spans = []
        posted = 0
        for i, action in enumerate(self.actions):
            self.pp.mark(phase=str(action))
            posted = self._post_receives(i, posted)
            if action.kind in COMPUTE:
                self._compute(action)
            elif action.kind in SENDS:
                self._send(action)
        for work in self.sent:
            work.wait()
        self.sent, self.pieces = [], ()
        return self.total

    def forget_shapes(self) -> None:
        """Learn the messages' shapes and dtypes anew: the model computes in another precision from now on."""
        self._shapes = {}

    # Messages -----------------------------------------------------------------------------------------

    def _post_receives(self, position: int, posted: int) -> int:
        """Begin every receive that the next few actions need; return how far the list has been looked through."""
        ahead = 0
        i = max(posted, position)
        while i < len(self.actions) and ahead <= AHEAD:
            action = self.actions[i]
            if action.kind in COMPUTE:
                ahead += 1
            elif action.kind in RECEIVES:
                self._receive(action)
            i += 1
        return i

    def _receive(self, action: Action) -> None:
        assert action.peer is not None
        key = (action.kind[-1], action.chunk, action.microbatch)
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
        self.sent.append(self.pp.isend(array, action.peer, tag(action, self.pp.size, self.microbatches)))

    def _progress(self) -> None:
        """Let messages move, which some engines do only while they are called, and let go of what has left."""
        self.sent = [work for work in self.sent if not work.done()]
        for work in self.arriving.values():
            work.done()

    # Computation --------------------------------------------------------------------------------------

    def _compute(self, action: Action) -> None:
        self._progress()
        here = virtual_stage(action, self.pp.size)
        self.pp.mark(phase=f"{action.kind}{action.microbatch} on stage {here}")
        arrived = None
        if action.kind == "F" and here > 0:
            arrived = self._received("F", action)
        elif action.kind in ("B", "I") and here < self.last_stage:
            arrived = self._received("B", action)
        start = self.pp.now()
        if action.kind == "F":
            result = self._forward(action, here, arrived)
        elif action.kind == "W":
            result = None
            run_deferred(self.live.pop((action.chunk, action.microbatch)).deferred)
        else:
            result = self._backward(action, arrived)
        if is_recording():  # a span ends with its work; else nothing waits here: a send does so by itself
            synchronize(self.pieces[action.microbatch].inputs)
        if result is not None:
            self.outgoing[("F" if action.kind == "F" else "B", action.chunk, action.microbatch)] = result
        if self.declare is not None:
            self.pp.compute(self.declare(action))
        end = self.pp.now()
        self.watch()
        self.spans.append(Span(action, start, end))
        add_span(ACTION, f"{action.kind}{action.microbatch}", start, end, stage=here)

    def _forward(self, action: Action, here: int, arrived: Array | None) -> Array | None:
        """Run a chunk's blocks; return what the next stage needs."""
        piece = self.pieces[action.microbatch]
        self.announce(piece.inputs)
        x = None if arrived is None else Tensor(arrived, requires_grad=True)
        y: Any = as_input(piece.inputs) if x is None else x
        g = None
        with random.at(first_sample=piece.offset):
            for block in self.stage.chunks[action.chunk]:
                y = recompute(block, y) if self.recompute else block(y)
            if here == self.last_stage:
                loss = self.model.loss(y, piece.targets)
                self.total += summand(loss.data)
                y = loss / self.count
                g = array_module(y.data).ones_like(y.data)
        self.live[(action.chunk, action.microbatch)] = InFlight(x, y.edge(), g)
        self.peak_live = max(self.peak_live, len(self.live))
        return None if here == self.last_stage else y.data

    def _backward(self, action: Action, arrived: Array | None) -> Array | None:
        """Run backward of a chunk, with I without its weight gradients; return what the stage before needs."""
        key = (action.chunk, action.microbatch)
        flight = self.live[key]
        split = action.kind == "I"
        g = flight.g if arrived is None else arrived
        if flight.output is not None:
            assert g is not None
            Backward(flight.deferred if split else None).start(flight.output, g)
        back = None if flight.x is None else flight.x.grad
        if split:
            flight.x = flight.output = flight.g = None  # what W needs is in its thunks
        else:
            del self.live[key]
        return back

    def evaluate(self, inputs: Any, targets: Any, hits: Callable[[Array, Any], int]) -> tuple[float, int]:
        """Return (sum of losses, hits) of a batch that runs through all stages; the same on every rank."""
        sums = np.zeros(2)
        self.announce(inputs)
        x: Any = as_input(inputs)
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
