"""ZeRO's backward: each unit's gradients are summed over the ranks, every range going to its owner alone.

        backward         | unit 2 | unit 1 | unit 0 |
        reduce-scatter            |   2    |   1    |   0   | shared |

Stage 1 keeps whole gradients until backward is over and sums them then. Stages 2 and 3 send a unit as soon as
its last gradient has come, and free it. The order of units is fixed, so all ranks' collectives match, even
where a parameter was used on some of them only: its place in the flat gradient is zero on the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from minipar.backend import Array
from minipar.comm.interface import Communicator, Work
from minipar.errors import UsageError
from minipar.nn import Parameter
from minipar.parallel.zero.flat_shards import FlatUnit
from minipar.tape import Backward, running_backward
from minipar.tensor import Tensor


class Sum:
    """The sum of one unit's gradients over the ranks, under way or complete.

    Attributes:
        used: which of the unit's parameters, by index, had a gradient on this rank.
        chunk: (count,) this rank's range of the sum, once complete.
    """

    def __init__(self, unit: FlatUnit, work: Work, nbytes: int, used: set[int]):
        self.unit, self.used = unit, used
        self.work: Work | None = work  # holds the whole gradient, of so many bytes
        self.nbytes = nbytes
        self.chunk: Array | None = None

    def wait(self) -> Array:
        """Return the chunk; the whole gradient is freed."""
        if self.work is not None:
            self.chunk, self.work = self.work.wait(), None
        assert self.chunk is not None
        return self.chunk


class ScatterGradients:
    """Takes gradients from the tape and gives each owner its range of their sum.

    A rank that is ahead of the others goes on while its sums are under way: nothing here waits before the end
    of backward, so ranks that use different parameters cannot block each other.

    Args:
        units: by block in the order of forward, None for a block without parameters to itself.
        shared: the unit of all other parameters, None if there is none. It is summed last.
        names: of the parameters, by id.
        stage: of ZeRO.

    Attributes:
        active: whether gradients are summed at the end of backward.
    """

    def __init__(
        self,
        comm: Communicator,
        units: Sequence[FlatUnit | None],
        shared: FlatUnit | None,
        names: dict[int, str],
        stage: int,
    ):
        self.comm, self.names, self.stage, self.active = comm, names, stage, True
        every = [u for u in (*reversed(units), shared) if u is not None]
        self._trained = {id(u): sum(p.requires_grad for p in u.params) for u in every}  # how many
        self._order = [u for u in every if self._trained[id(u)]]
        self._turn = {id(unit): i for i, unit in enumerate(self._order)}
        self._unit_of = {id(p): unit for unit in self._order for p in unit.params}
        self._shared = shared
        self._sent: list[Sum] = []
        self._run: Backward | None = None
        trained = [p for unit in self._order for p in unit.params if p.requires_grad]
        self._hooks = [p.register_hook(self._gradient_ready) for p in trained]

    def remove_hooks(self) -> None:
        """Leave the parameters' gradients alone from now on."""
        for remove in self._hooks:
            remove()

    def bytes_under_way(self) -> int:
        """Return the size of the whole gradients that are being sent."""
        return sum(s.nbytes for s in self._sent if s.work is not None)

    def _gradient_ready(self, p: Tensor) -> None:
        if not self.active:
            return
        run = running_backward()
        if run.deferred is not None:
            raise UsageError(
                "ZeRO sums gradients in backward, which deferred weight gradients outlive; in stage 1 use"
                " no_sync() and call synchronize() once they are computed"
            )
        if run is not self._run:  # the first gradient of this backward
            if self._sent:
                raise UsageError(
                    "the backward before this one was broken off while its gradients were being summed:"
                    " wrap a fresh model"
                )
            self._run = run
            run.at_end.append(self.finish)
        if self.stage > 1:
            assert isinstance(p, Parameter)
            self._take(p)

    def _take(self, p: Parameter) -> None:
        """Stages 2 and 3: put the gradient into its unit's flat one, and send that once it is full."""
        unit = self._unit_of[id(p)]
        turn = self._turn[id(unit)]
        if turn < len(self._sent):
            raise UsageError(
                f"the gradient of {self.names[id(p)]} came after {unit.name} was summed: give units in the"
                " order in which forward uses them"
            )
        unit.take_gradient(p)
        if unit is self._shared:  # its parameters are used anywhere; it is sent at the end
            return
        while len(self._sent) < turn:  # backward is done with those: what they still lack has no gradient
            self._send()
        if len(unit.arrived) == self._trained[id(unit)]:
            if len(unit.arrived) == len(unit.params):
                unit.is_done()  # a first unit has no input whose gradient would say so
            self._send()
        for s in self._sent:  # MPI moves a message along only while it is called
            if s.work is not None and s.work.done():
                s.wait()

    def _send(self) -> None:
        unit = self._order[len(self._sent)]
        used, unit.arrived = unit.arrived, set()
        flat = unit.send_gradient()
        self._sent.append(Sum(unit, self.comm.reduce_scatter_async(flat), flat.nbytes, used))

    def finish(self) -> None:
        """Send what has not been sent and hand out the sums. Every rank calls it at the same time."""
        self._run = None
        while len(self._sent) < len(self._order):
            if self.stage == 1:
                unit = self._order[len(self._sent)]
                for p in unit.params:
                    if p.grad is not None:
                        unit.take_gradient(p)
            self._send()
        starts = [0, *accumulate(len(s.unit.params) for s in self._sent)]
        here = {start + i for start, s in zip(starts, self._sent) for i in s.used}
        anywhere = on_any_rank(self.comm, here, starts[-1])
        for start, s in zip(starts, self._sent):
            s.unit.add_gradient(s.wait(), {i for i in range(len(s.unit.params)) if start + i in anywhere})
        self._sent = []


def on_any_rank(comm: Communicator, here: set[int], n: int) -> set[int]:
    """Return which of 0 … n - 1 are in `here` on at least one rank."""
    flags = np.zeros(n, np.uint8)
    flags[list(here)] = 1
    return set(np.flatnonzero(comm.all_reduce(flags, op="max")).tolist())
