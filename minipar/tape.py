"""The tape: what backward needs to know of each operation, and the one loop that runs it.

`Node` is one recorded operation; `Backward.run` walks from the newest operation to the oldest. Creation
order is already a topological order (an operation can only use what exists), so backward needs no sort and
no recursion: it always takes the newest node that holds a gradient, and by then every later use of that
node's output has contributed.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import numpy as np

from minipar import kernels
from minipar.backend import Array, array_module

if TYPE_CHECKING:
    from minipar.tensor import Tensor

Vjp = Callable[..., Any]
Edge = tuple["Node", int]

# Only the order of nodes made by one thread is ever compared, so ranks may share the counter.
_order = itertools.count()
_recording: ContextVar[bool] = ContextVar("recording", default=True)
_running: ContextVar[Backward | None] = ContextVar("running", default=None)
_replaying: ContextVar[bool] = ContextVar("replaying", default=False)


class Node:
    """One recorded operation: how to turn the gradient of its outputs into gradients of its inputs.

    Attributes:
        order: the operation's place in creation order.
        name: the primitive's name, for error messages.
        vjp: the vector-Jacobian product; None once used, so that saved activations are freed.
        edges: one (node, output index) per input, None where no gradient is wanted.
        dtypes: the dtype of each output; gradients are brought to it.
        fresh: whether every array that the vjp returns is memory that nobody else holds.
        grads: the gradient received so far for each output; None before the first, as most nodes are waiting
            for theirs most of the time.
        owned: bit i says that the tape may add to the gradient of output i in place.
        pending: whether the node waits on the heap of a backward run.
    """

    __slots__ = (
        "__weakref__", "dtypes", "edges", "fresh", "grads", "name", "order", "owned", "pending", "vjp",
    )  # fmt: skip

    def __init__(
        self,
        name: str,
        vjp: Vjp | None,
        edges: tuple[Edge | None, ...],
        dtypes: tuple[Any, ...],
        fresh: bool = False,
    ):
        self.order = next(_order)
        self.name = name
        self.vjp: Any = vjp
        self.edges = edges
        self.dtypes = dtypes
        self.fresh = fresh
        self.pending = False
        self.grads: list[Array | None] | None = None
        self.owned = 0

    def check(self) -> None:
        """Raise if this node cannot take a gradient; called before its first one when it has no vjp."""
        raise RuntimeError(
            f"backward: the graph of {self.name!r} was already used and freed; run forward again"
        )

    def receive(self, index: int, g: Array, owned: bool) -> None:
        """Add `g` to the gradient of output `index`; `owned` says that nobody else can see `g`."""
        dtype = self.dtypes[index]
        if g.dtype is not dtype and g.dtype != dtype:
            g, owned = kernels.of(g).cast(g, dtype), True
        if self.grads is None:
            self.grads, self.owned = [None] * len(self.dtypes), 0
        present = self.grads[index]
        if present is None:
            self.grads[index] = g
            self.owned |= owned << index
            return
        if self.owned >> index & 1:
            present += g
        elif owned:
            g += present
            present = g
        else:
            present = present + g
        self.grads[index] = present
        self.owned |= 1 << index


class Leaf(Node):
    """Where a gradient ends: in the `.grad` of a tensor that no operation made.

    A leaf is created at the tensor's first use in a graph, hence is older than every use, hence is reached
    after all of them: its hooks fire once, with the whole gradient, and as early as that is possible. All
    graphs that are alive at once share it, which is how a weight's deferred gradients from several
    microbatches become one.
    """

    __slots__ = ("deferred", "tensor", "version")

    def __init__(self, tensor: Tensor):
        super().__init__("leaf", None, (), (tensor.dtype,))
        self.tensor = tensor
        self.version = tensor.version
        self.deferred = 0  # weight gradients still to be computed by `run_deferred`

    def check(self) -> None:
        """Raise if the tensor's values changed since forward: its gradient would be one of neither."""
        if self.tensor.version != self.version:
            raise RuntimeError(
                f"backward: a leaf of shape {self.tensor.shape} was changed in place between forward and"
                f" backward (version {self.version}, now {self.tensor.version}):"
                " call backward before the optimizer's step"
            )

    def receive(self, index: int, g: Array, owned: bool) -> None:
        """See Node. A first gradient waits as it is: writing it into a buffer casts it without a copy of its own."""
        if self.grads is None and self.tensor.grad is None:
            self.grads, self.owned = [g], int(owned)
            return
        self._cast()
        super().receive(index, g, owned)

    def place(self, dtype: Any) -> Array | None:
        """Return the memory in which the first gradient of this dtype ends; None for any other."""
        buffer = self.tensor.grad_buffer
        first = self.grads is None and self.tensor.grad is None
        return buffer if first and buffer is not None and buffer.dtype == dtype else None

    def _cast(self) -> None:
        """Bring what was received so far to the tensor's dtype."""
        if self.grads is not None and (g := self.grads[0]) is not None and g.dtype != self.dtypes[0]:
            self.grads, self.owned = [kernels.of(g).cast(g, self.dtypes[0])], 1

    def finish(self) -> None:
        """Move the gradient into the tensor's `.grad` and call its hooks."""
        tensor = self.tensor
        if tensor.grad_buffer is None:
            self._cast()
        grads = self.grads
        if grads is not None and (g := grads[0]) is not None:
            if tensor.grad is not None:
                tensor.grad += g
            elif tensor.grad_buffer is not None:
                if g is not tensor.grad_buffer:
                    tensor.grad_buffer[...] = g
                tensor.grad = tensor.grad_buffer
            elif self.owned and not isinstance(g, np.generic):  # a 0-d result may have become a scalar
                tensor.grad = g
            else:
                tensor.grad = array_module(g).array(g)
            self.grads = None
        for hook in tuple(tensor.hooks):
            hook(tensor)


class Placeable:
    """A thunk whose gradient can be computed straight into memory, such as a weight's place in a bucket.

    Attributes:
        compute: returns the gradient, in the array it is given or, given None, in fresh memory.
        dtype: of the gradient.
    """

    __slots__ = ("compute", "dtype")

    def __init__(self, compute: Callable[[Array | None], Array], dtype: Any):
        self.compute = compute
        self.dtype = dtype

    def __call__(self) -> Array:
        return self.compute(None)


def computed(thunk: Callable[[], Array], node: Node) -> Array:
    """Return the gradient that a thunk computes for `node`, already in its place where both have one."""
    if type(thunk) is Placeable and type(node) is Leaf:
        return thunk.compute(node.place(thunk.dtype))
    return thunk()


Deferred = list[tuple[Leaf, Callable[[], Array]]]


class Backward:
    """One run of backward: a heap of the nodes that hold a gradient, newest first.

    Attributes:
        at_end: functions to call when the run is over; hooks add to it (see `running_backward`).
        deferred: where weight gradients are put off to, or None to compute them at once.
    """

    def __init__(self, deferred: Deferred | None = None):
        self.heap: list[tuple[int, Node]] = []
        self.deferred = deferred
        self.at_end: list[Callable[[], None]] = []

    def start(self, edge: Edge, g: Array) -> None:
        """Run from the node that `edge` names down to the leaves, then call what is in `at_end`."""
        self.push(edge, g)
        self.carry_out(self.run)

    def carry_out(self, work: Callable[[], None]) -> None:
        """Do `work` as the backward run that hooks see, then call what they left in `at_end`."""
        token = _running.set(self)
        try:
            work()
            while self.at_end:
                self.at_end.pop(0)()
        finally:
            _running.reset(token)
            for _, node in self.heap:  # only after an exception: leave no half-filled gradients behind
                node.pending, node.grads = False, None

    def push(self, edge: Edge, g: Array, owned: bool = False) -> None:
        """Hand gradient `g` to a node and put it on the heap if this is its first."""
        node, index = edge
        if not node.pending:
            if node.vjp is None:
                node.check()
            node.pending = True
            heapq.heappush(self.heap, (-node.order, node))
        node.receive(index, g, owned)

    def run(self, down_to: int = -1) -> None:
        """Process every pending node created after `down_to`, newest first."""
        heap, deferred = self.heap, self.deferred
        while heap and -heap[0][0] > down_to:
            node = heapq.heappop(heap)[1]
            node.pending = False
            if type(node) is Leaf:
                if not node.deferred:
                    node.finish()
                continue
            vjp, edges, grads, fresh = node.vjp, node.edges, node.grads, node.fresh
            assert grads is not None  # it is here because it received one
            node.vjp, node.edges, node.grads = None, (), None
            result = vjp(grads[0] if len(grads) == 1 else grads)
            del vjp, grads  # what the closure saved is freed before the next node runs
            if type(result) is not tuple:
                result = (result,)
            for edge, g in zip(edges, result, strict=False):
                if edge is None or g is None:
                    continue
                if not callable(g):
                    self.push(edge, g, fresh)
                elif deferred is not None and type(edge[0]) is Leaf and edge[0].tensor.is_weight:
                    edge[0].deferred += 1
                    deferred.append((edge[0], g))
                else:
                    self.push(edge, computed(g, edge[0]), owned=True)
            result = g = None  # nor are gradients kept alive past their use


def run_deferred(deferred: Deferred) -> None:
    """Compute the weight gradients that backward put off (the W of a zero-bubble schedule), in their order.

    A leaf is finished, and its hooks fire, after the last of its own.
    """

    def work() -> None:
        while deferred:
            leaf, thunk = deferred.pop(0)
            leaf.check()
            leaf.receive(0, computed(thunk, leaf), owned=True)
            leaf.deferred -= 1
            if not leaf.deferred:
                leaf.finish()

    Backward().carry_out(work)


def running_backward() -> Backward:
    """Return the backward run that this code is called from (inside a vjp or a hook)."""
    run = _running.get()
    if run is None:
        raise RuntimeError("no backward is running here: this belongs inside a hook or a vjp")
    return run


def next_order() -> int:
    """Return a new place in creation order: every node made from now on comes after it."""
    return next(_order)


@contextlib.contextmanager
def _set(variable: ContextVar[bool], value: bool) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def no_grad() -> contextlib.AbstractContextManager[None]:
    """Inside, nothing is recorded: evaluation, optimizer steps."""
    return _set(_recording, False)


def enable_grad() -> contextlib.AbstractContextManager[None]:
    """Inside, operations are recorded again, also within `no_grad`."""
    return _set(_recording, True)


def is_grad_enabled() -> bool:
    """Whether operations are being recorded on this rank and thread."""
    return _recording.get()


def replaying() -> contextlib.AbstractContextManager[None]:
    """Inside, forward is a replay of one that already happened (see `recompute`)."""
    return _set(_replaying, True)


def is_replaying() -> bool:
    """Whether this forward is a replay, so that what counts forwards (running statistics) must not count."""
    return _replaying.get()
