"""ZeRO stage 3: a unit's parameters are gathered just before they are used and freed right after.

        forward     | unit 0 | unit 1 | unit 2 |      backward    | unit 2 | unit 1 | unit 0 |
        gather       0   1        2                                2   1        0
        free                 0        1        2                           2        1        0

The next unit's gather travels while this one computes. It is looked after as each of the block's modules
returns, and at each gradient in backward: MPI moves a message along only while it is called.

A pass (one forward or one backward) gathers every unit once, in one fixed order that depends on the model
alone: a unit that some rank skips is gathered there all the same, so the ranks' collectives match whatever
each of them computes.

Backward reads weights through handles, hence sees what was gathered again. An operation that saves a weight's
array instead keeps its unit's memory alive until backward; the numbers are right all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from minipar.comm.interface import Communicator, Work
from minipar.errors import UsageError
from minipar.nn import Module
from minipar.parallel.zero.flat_shards import FlatUnit
from minipar.tape import Backward, is_replaying, running_backward
from minipar.tensor import Tensor, record


def at_backward(x: Tensor, call: Callable[[], None]) -> Tensor:
    """Return `x`; in backward `call()` comes when its gradient is complete, before that goes further down."""

    def vjp(g: Any) -> Any:
        call()
        return g

    return record("at_backward", x.data, vjp, (x,))


class GatherOnUse:
    """Gathers and frees the units of one model.

    Args:
        comm: of this object's own: its collectives may lie anywhere between those of others.
        blocks: the modules in the order of forward; each takes and gives one tensor.
        units: the unit of each block, None for one that has no parameter to itself.
        shared: the unit of all other parameters: whole during an entire pass. None if there is none.
        prefetch: gather the next unit while this one computes.
    """

    def __init__(
        self,
        comm: Communicator,
        blocks: Sequence[Module],
        units: Sequence[FlatUnit | None],
        shared: FlatUnit | None,
        prefetch: bool,
    ):
        self.comm, self.shared, self.prefetch = comm, shared, prefetch
        self._first = [shared] if shared else []
        self._units = [unit for unit in units if unit is not None]
        self._order: list[FlatUnit] = []  # of the pass under way
        self._position: dict[int, int] = {}
        self._issued = 0  # how many of them have been asked for
        self._under_way: dict[int, Work] = {}  # by position: asked for and not yet taken
        self._pass: Backward | str | None = None
        self._wrapped: list[tuple[Module, Any]] = []
        for block, unit in zip(blocks, units):
            if unit is not None:
                self._wrap(block, unit)
        parameters = [p for unit in (*self._first, *self._units) for p in unit.params if prefetch and p.requires_grad]
        self._hooks = [p.register_hook(lambda _: self._poll()) for p in parameters]

    # The two passes -----------------------------------------------------------------------------------

    def forward(self, model: Module, inputs: tuple[Any, ...]) -> Tensor:
        """Return `model(*inputs)`, its units whole only while they run, also in the backward to come."""
        self._begin([*self._first, *self._units], "forward")
        y = model(*inputs)
        self._end()
        return at_backward(_one_tensor(y, type(model).__name__), self._begin_backward)

    def _begin_backward(self) -> None:
        run = running_backward()
        if self._pass is not run:
            self._begin([*self._first, *reversed(self._units)], run)
            run.at_end.append(self._end)

    def _begin(self, order: list[FlatUnit], kind: Backward | str) -> None:
        for work in self._under_way.values():  # of a pass that an exception broke off
            work.wait()
        self._free_all()
        self._order, self._position = order, {id(unit): i for i, unit in enumerate(order)}
        self._issued, self._under_way, self._pass = 0, {}, kind
        if self.shared:
            self.need(self.shared)

    def _end(self) -> None:
        """Gather what the pass has left out, as the other ranks may not have, and free everything."""
        while self._under_way or self._issued < len(self._order):
            if not self._under_way:
                self._issue()
            for work in self._under_way.values():
                work.wait()
            self._under_way = {}
        self._free_all()
        self._pass = None

    def _free_all(self) -> None:
        for unit in (*self._first, *self._units):
            unit.free()

    # One unit -----------------------------------------------------------------------------------------

    def need(self, unit: FlatUnit) -> None:
        """Make the unit whole, and send for the next one of the pass."""
        position = self._position[id(unit)]
        if unit.whole is None and position < self._issued and position not in self._under_way:
            unit.attach(self.comm.all_gather(unit.own))  # used a second time in this pass
        elif unit.whole is None:
            while self._issued <= position:
                self._issue()
            for earlier in [i for i in self._under_way if i < position]:
                self._under_way.pop(earlier).wait()  # not used on this rank
            unit.attach(self._under_way.pop(position).wait())
        if self.prefetch and not self._under_way and self._issued < len(self._order):
            self._issue()

    def _issue(self) -> None:
        self._under_way[self._issued] = self.comm.all_gather_async(self._order[self._issued].own)
        self._issued += 1

    def _poll(self) -> None:
        """Let the gather under way go on; with checks on, MPI does not begin its data otherwise."""
        for work in self._under_way.values():
            work.done()

    def bytes_under_way(self) -> int:
        """Return the size of the units that are being received."""
        return sum(self._order[i].padded * self._order[i].own.itemsize for i in self._under_way)

    def _wrap(self, block: Module, unit: FlatUnit) -> None:
        if self.prefetch:
            for _, module in block.named_modules():
                if module is not block:
                    self._poll_after(module)
        forward = block.forward

        def wrapped(*inputs: Any) -> Tensor:
            if self._pass is None:
                raise UsageError(
                    f"{unit.name} was called outside a forward of the Zero wrapper, which gathers its"
                    " parameters: call the wrapper, not the model"
                )
            self.need(unit)
            inputs = tuple([at_backward(x, unit.free) if isinstance(x, Tensor) else x for x in inputs])
            y = at_backward(_one_tensor(forward(*inputs), unit.name), enter)
            if not is_replaying():  # else its backward comes next
                unit.free()
            return y

        def enter() -> None:
            self._begin_backward()
            self.need(unit)

        self._replace(block, wrapped)

    def _poll_after(self, module: Module) -> None:
        forward = module.forward

        def wrapped(*inputs: Any) -> Any:
            y = forward(*inputs)
            self._poll()
            return y

        self._replace(module, wrapped)

    def _replace(self, module: Module, forward: Any) -> None:
        self._wrapped.append((module, vars(module).get("forward")))
        module.forward = forward  # type: ignore[method-assign]

    def unwrap(self) -> None:
        """Give the modules the forward back that they had, and leave their gradients alone."""
        for module, forward in reversed(self._wrapped):
            if forward is None:
                del vars(module)["forward"]
            else:
                module.forward = forward  # type: ignore[method-assign]
        for remove in self._hooks:
            remove()
        self._wrapped, self._hooks = [], []


def _one_tensor(y: Any, name: str) -> Tensor:
    if not isinstance(y, Tensor):
        returned = type(y).__name__
        raise UsageError(f"{name} returns a {returned}; ZeRO stage 3 needs units that return one tensor")
    return y
