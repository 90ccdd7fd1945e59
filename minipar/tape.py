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

from minipar.backend import Array, array_module

if TYPE_CHECKING:
    from minipar.tensor import Tensor

Vjp = Callable[..., Any]
Edge = tuple["Node", int]

# Only the order of nodes made by one thread is ever compared, so ranks may share the counter.
_order = itertools.count()
_recording: ContextVar[bool] = ContextVar("recording", default=True)
_running: ContextVar[Backward | None] = ContextVar("running", default=None)


class Node:
    """One recorded operation: how to turn the gradient of its outputs into gradients of its inputs.

    Attributes:
        order: the operation's place in creation order.
        name: the primitive's name, for error messages.
        vjp: the vector-Jacobian product; None once used, so that saved activations are freed.
        edges: one (node, output index) per input, None where no gradient is wanted.
        dtypes: the dtype of each output; gradients are brought to it.
        grads: the gradient received so far for each output.
        owned: whether the tape allocated that gradient itself and may add to it in place.
    """

    __slots__ = ("__weakref__", "dtypes", "edges", "grads", "name", "order", "owned", "vjp")

    def __init__(
        self, name: str, vjp: Vjp | None, edges: tuple[Edge | None, ...], dtypes: tuple[Any, ...]
    ):
        self.order = next(_order)
        self.name = name
        self.vjp = vjp
        self.edges = edges
        self.dtypes = dtypes
        self.grads: list[Array | None] = [None] * len(dtypes)
        self.owned = [False] * len(dtypes)

    def receive(self, index: int, g: Array, owned: bool) -> None:
        """Add `g` to the gradient of output `index`; `owned` says that nobody else can see `g`."""
        if g.dtype != self.dtypes[index]:
            g, owned = g.astype(self.dtypes[index]), True
        present = self.grads[index]
        if present is None:
            self.grads[index], self.owned[index] = g, owned
            return
        if self.owned[index]:
            present += g
        elif owned:
            g += present
            present = g
        else:
            present = present + g
        self.grads[index], self.owned[index] = present, True


class Leaf(Node):
    """Where a gradient ends: in the `.grad` of a tensor that no operation made.

    A leaf is created at the tensor's first use in a graph, hence is older than every use, hence is reached
    after all of them: its hooks fire once, with the whole gradient, and as early as that is possible.
    """

    __slots__ = ("deferred", "tensor")

    def __init__(self, tensor: Tensor):
        super().__init__("leaf", None, (), (tensor.dtype,))
        self.tensor = tensor
        self.deferred = 0  # weight gradients still to be computed by `run_deferred`

    def finish(self) -> None:
        """Move the gradient into the tensor's `.grad` and call its hooks."""
        tensor, g = self.tensor, self.grads[0]
        array_type = type(tensor.data)  # a 0-d result may have become a NumPy scalar on the way
        tensor._leaf = None
        if g is not None:
            if tensor.grad is not None:
                tensor.grad += g
            elif tensor.grad_buffer is not None:
                tensor.grad_buffer[...] = g
                tensor.grad = tensor.grad_buffer
            else:
                tensor.grad = g if self.owned[0] and isinstance(g, array_type) else array_module(g).array(g)
            self.grads[0] = None
        for hook in tuple(tensor.hooks):
            hook(tensor)


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

    def start(self, edge: Edge | None, g: Array) -> None:
        """Run from the node that `edge` names down to the leaves, then call what is in `at_end`."""
        token = _running.set(self)
        try:
            self.push(edge, g)
            self.run()
            while self.at_end:
                self.at_end.pop(0)()
        finally:
            _running.reset(token)
            for _, node in self.heap:  # only after an exception: leave no half-filled gradients behind
                node.grads = [None] * len(node.grads)

    def push(self, edge: Edge | None, g: Array, owned: bool = False) -> None:
        """Hand gradient `g` to a node and put it on the heap if this is its first."""
        if edge is None:
            return
        node, index = edge
        if all(x is None for x in node.grads):
            heapq.heappush(self.heap, (-node.order, node))
        node.receive(index, g, owned)

    def run(self, down_to: int = -1) -> None:
        """Process every pending node created after `down_to`, newest first."""
        heap, deferred = self.heap, self.deferred
        while heap and -heap[0][0] > down_to:
            node = heapq.heappop(heap)[1]
            if type(node) is Leaf:
                if not node.deferred:
                    node.finish()
                continue
            vjp, grads = node.vjp, node.grads
            if vjp is None:
                raise RuntimeError(f"backward: the graph of {node.name!r} was already used and freed; run forward again")
            edges = node.edges
            node.vjp, node.edges, node.grads = None, (), [None] * len(grads)
            result = vjp(grads[0] if len(grads) == 1 else grads)
            del vjp, grads  # what the closure saved is freed before the next node runs
            if type(result) is not tuple:
                result = (result,)
            for edge, g in zip(edges, result, strict=False):
                if edge is None or g is None:
                    continue
                if not callable(g):
                    self.push(edge, g)
                elif deferred is not None and type(edge[0]) is Leaf:
                    edge[0].deferred += 1
                    deferred.append((edge[0], g))
                else:
                    self.push(edge, g(), owned=True)


def run_deferred(deferred: Deferred) -> None:
    """Compute the weight gradients that backward put off (the W of a zero-bubble schedule), in their order.

    A leaf is finished, and its hooks fire, after the last of its own.
    """
    while deferred:
        leaf, thunk = deferred.pop(0)
        leaf.receive(0, thunk(), owned=True)
        leaf.deferred -= 1
        if not leaf.deferred:
            leaf.finish()


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
def grad_mode(enabled: bool) -> Iterator[None]:
    """Record operations inside, or not."""
    token = _recording.set(enabled)
    try:
        yield
    finally:
        _recording.reset(token)


def no_grad() -> contextlib.AbstractContextManager[None]:
    """Inside, nothing is recorded: evaluation, optimizer steps."""
    return grad_mode(False)


def enable_grad() -> contextlib.AbstractContextManager[None]:
    """Inside, operations are recorded again, also within `no_grad`."""
    return grad_mode(True)


def is_grad_enabled() -> bool:
    """Whether operations are being recorded on this rank and thread."""
    return _recording.get()
