"""The tensor, and how an array function becomes a differentiable operation.

`primitive` is the whole bridge: it takes a function from arrays to (value, vector-Jacobian product) and
makes it an operation on tensors that the tape records. First-order gradients only: a gradient is a plain
array and is not recorded itself.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import weakref
from collections.abc import Callable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from minipar.backend import Array, array_module, is_floating, to_device, to_host
from minipar.calls import by_position, naming
from minipar.tape import Backward, Deferred, Edge, Leaf, Node, Vjp, is_grad_enabled

Hook = Callable[["Tensor"], None]


class Tensor:
    """An array with a gradient: `data` (NumPy or CuPy), and how it was made.

    Attributes:
        data: the values, an array of any shape.
        requires_grad: whether backward computes a gradient for it.
        grad: the gradient after backward: a plain array of the same shape and dtype, or None.
        grad_buffer: memory for `grad` chosen by someone else (a view into a bucket), or None.
        version: counts the changes of `data` since creation; see `Handle`.
        hooks: called with the tensor when its gradient is complete (leaves only).
    """

    __slots__ = (
        "__weakref__", "_leaf", "_maker", "data", "grad", "grad_buffer", "hooks", "requires_grad", "version",
    )  # fmt: skip
    __array_priority__ = 1000  # array * tensor calls Tensor.__rmul__
    __array_ufunc__ = None
    is_weight = False  # whether its gradient may be put off (see `run_deferred`): parameters say True

    def __init__(self, data: Any, requires_grad: bool = False, dtype: Any = None):
        if isinstance(data, Tensor):
            data = data.data
        # A Python float or list of floats is float32, as everywhere in this field; arrays keep their dtype.
        if not hasattr(data, "dtype"):
            data = np.asarray(data)
            if dtype is None and data.dtype == np.float64:
                dtype = np.float32
        elif not hasattr(data, "shape") or np.isscalar(data):
            data = np.asarray(data)
        if dtype is not None and data.dtype != dtype:
            data = data.astype(dtype)
        if requires_grad and not is_floating(data.dtype):
            raise TypeError(f"only floating tensors can require a gradient, this one is {data.dtype}")
        self.data: Array = data
        self.requires_grad = requires_grad
        self.grad: Array | None = None
        self.grad_buffer: Array | None = None
        self.version = 0
        self.hooks: tuple[Hook, ...] | list[Hook] = ()
        self._maker: Edge | None = None  # (node, output index) of the operation that made it
        self._leaf: weakref.ref[Leaf] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.data.dtype

    @property
    def ndim(self) -> int:
        return self.data.ndim

    @property
    def size(self) -> int:
        return self.data.size

    @property
    def is_leaf(self) -> bool:
        """True if no recorded operation made this tensor, so its gradient is kept in `.grad`."""
        return self._maker is None

    def __len__(self) -> int:
        return len(self.data)

    def __repr__(self) -> str:
        values = np.array2string(to_host(self.data), precision=4, separator=", ", prefix="Tensor(")
        return f"Tensor({values}, {self.dtype}{', requires_grad=True' if self.requires_grad else ''})"

    def __bool__(self) -> bool:
        return bool(self.data)  # without this, Python would ask for the length

    def __float__(self) -> float:
        return float(self.data)

    def __getstate__(self) -> tuple[None, dict[str, Any]]:
        """What copy.deepcopy and pickle take along: not the graph, nor what others attached to the tensor."""
        if self._maker is not None:
            raise RuntimeError("only leaves can be copied or pickled; detach() this tensor first")
        state: dict[str, Any] = {}
        for name in [n for kind in type(self).__mro__ for n in getattr(kind, "__slots__", ())]:
            with contextlib.suppress(AttributeError):  # a parameter without values has no `data`
                state[name] = object.__getattribute__(self, name)
        del state["__weakref__"]
        return None, {**state, "_leaf": None, "grad_buffer": None, "hooks": ()}

    def item(self) -> float:
        """Return the value of a one-element tensor as a Python number."""
        return self.data.item()

    def numpy(self) -> Array:
        """Return the values as a NumPy array: shared memory on the CPU, a copy from a GPU."""
        return to_host(self.data)

    def detach(self) -> Tensor:
        """Return a tensor that shares the values and is cut off from the tape."""
        return Tensor(self.data)

    def to(self, device: str) -> Tensor:
        """Return the values on `device` ("cpu", "cuda"), cut off from the tape."""
        return Tensor(to_device(self.data, device))

    def requires_grad_(self, requires_grad: bool = True) -> Tensor:
        """Set `requires_grad` in place and return the tensor itself."""
        self.requires_grad = requires_grad
        return self

    def assign_(self, values: Any) -> Tensor:
        """Overwrite a leaf's values in place, outside the tape; backward of earlier uses then raises."""
        if self._maker is not None:
            raise RuntimeError("assign_ is for leaves (parameters, data); an operation made this tensor")
        self.data[...] = values.data if isinstance(values, Tensor) else values
        self.version += 1
        return self

    def zero_grad(self) -> None:
        """Forget the gradient."""
        self.grad = None

    def register_hook(self, hook: Hook) -> Callable[[], None]:
        """Call `hook(tensor)` whenever this leaf's gradient is complete, once per backward.

        Returns:
            A function that removes the hook again.
        """
        if self._maker is not None:
            raise RuntimeError("hooks belong to leaves (parameters); this tensor was made by an operation")
        self.hooks = [*self.hooks, hook]

        def remove() -> None:
            self.hooks = [h for h in self.hooks if h is not hook]

        return remove

    def edge(self) -> Edge | None:
        """Return where a gradient for this tensor goes: its maker, or its leaf; None if none is wanted."""
        if not self.requires_grad:
            return None
        if self._maker is not None:
            return self._maker
        leaf = self._leaf() if self._leaf is not None else None
        # A leaf that an older graph still holds is shared, unless the values have changed since.
        if leaf is None or leaf.version != self.version:
            leaf = Leaf(self)
            self._leaf = weakref.ref(leaf)
        return leaf, 0

    def backward(self, gradient: Any = None, *, deferred: Deferred | None = None) -> None:
        """Add d(self)/d(leaf) to the `.grad` of every leaf that this tensor was computed from.

        Args:
            gradient: the gradient of the loss with respect to this tensor, same shape; 1 for a scalar.
            deferred: collects weight gradients instead of computing them (see `run_deferred`).

        Raises:
            RuntimeError: nothing to differentiate, a missing or misshapen gradient, or a graph used twice.
        """
        edge, xp = self.edge(), array_module(self.data)
        if edge is None:
            raise RuntimeError("backward: this tensor depends on nothing that requires a gradient")
        g = gradient.data if isinstance(gradient, Tensor) else gradient
        if g is None:
            if self.size != 1:
                raise RuntimeError(
                    f"backward: a tensor of shape {self.shape} needs a gradient;"
                    " only a scalar's is 1 by itself"
                )
            g = xp.ones_like(self.data)
        g = xp.asarray(g)
        if g.shape != self.shape:
            raise RuntimeError(f"backward: gradient of shape {g.shape} for a tensor of shape {self.shape}")
        Backward(deferred).start(edge, g)

    if TYPE_CHECKING:  # operators and methods are installed by minipar.ops.methods
        _operator: Any = None
        __add__ = __sub__ = __mul__ = __truediv__ = __pow__ = __matmul__ = __neg__ = __getitem__ = _operator
        __radd__ = __rsub__ = __rmul__ = __rtruediv__ = __rpow__ = __rmatmul__ = _operator
        __lt__ = __le__ = __gt__ = __ge__ = _operator
        reshape: Any
        permute: Any
        T: Any

        def __getattr__(self, name: str) -> Any: ...


class Handle:
    """A parameter captured by reference: read again at backward instead of being saved.

    A weight that was freed and gathered again (ZeRO stage 3) is then seen as it is at that time. A weight
    whose *values* changed in between would give a wrong gradient without a sign, so that raises.
    """

    __slots__ = ("tensor", "version")

    def __init__(self, tensor: Tensor):
        self.tensor = tensor
        self.version = tensor.version

    def check(self) -> None:
        """Raise if the values have changed since the handle was made."""
        if self.tensor.version != self.version:
            raise RuntimeError(
                f"backward: a parameter of shape {self.tensor.shape} was changed in place between forward and"
                f" backward (version {self.version}, now {self.tensor.version}):"
                " call backward before the optimizer's step"
            )

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.tensor.dtype

    @property
    def data(self) -> Array:
        self.check()
        return self.tensor.data


class Casting(Protocol):
    """What changes the precision of a primitive's inputs; see `amp.autocast`."""

    def cast(self, precision: str, args: tuple[Any, ...], values: list[Any]) -> None:
        """Bring `values`, which are the arrays and handles of `args`, to this precision, in place."""


casting: ContextVar[Casting | None] = ContextVar("casting", default=None)


def primitive(
    fn: Callable[..., Any] | None = None,
    *,
    handles: tuple[str, ...] = (),
    fresh: bool = False,
    precision: str | None = None,
) -> Any:
    """Turn `fn(arrays) -> (value, vjp)` into an operation on tensors that the tape records.

    `fn` gets plain arrays. Its vjp takes the gradient of the value and returns one gradient for each
    positional argument (a bare one if there is one argument): an array, None where there is none, or a
    *thunk* that computes it. A thunk runs only if its gradient is wanted, its result must be fresh memory,
    and a weight's thunk may be put off (`run_deferred`); a `Placeable` thunk can put its result straight
    into the place that the weight's gradient has (`grad_buffer`). A value that is a tuple makes several outputs; the
    vjp then gets a list with one gradient each, None for outputs that were not used.

    What the vjp captures lives until backward, so it captures what it needs and no more: a shape rather
    than an array where the shape is enough.

    Args:
        handles: names of arguments that arrive as a `Handle` instead of as an array.
        fresh: every array that the vjp returns is memory that nobody else holds (not its own argument, a
            saved value or a view of one), so that the tape may add to it in place.
        precision: what autocast brings floating inputs to: "low", "float32", or None: they stay as they are,
            and NumPy promotes inputs of several dtypes to the widest. "inside": they stay as they are, and
            `fn` computes, and returns, float32.
    """
    if fn is None:
        return functools.partial(primitive, handles=handles, fresh=fresh, precision=precision)
    name = fn.__name__
    positional = {
        p.name: p.default
        for p in inspect.signature(fn).parameters.values()
        if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    }
    by_handle = tuple(i for i, p in enumerate(positional) if p in handles)

    @functools.wraps(fn)
    def operation(*args: Any, **kwargs: Any) -> Any:
        if kwargs:
            args = by_position(args, kwargs, positional)
        # A NumPy scalar counts as a Python number: it must not widen float32 to float64.
        values = [
            a.data if isinstance(a, Tensor) else a.item() if isinstance(a, np.generic) else a for a in args
        ]
        for i in by_handle:
            if i < len(args) and args[i] is not None:
                values[i] = Handle(args[i] if isinstance(args[i], Tensor) else Tensor(args[i]))
        if precision is not None and (active := casting.get()) is not None:
            active.cast(precision, args, values)
        try:
            value, vjp = fn(*values, **kwargs)
        except (ValueError, IndexError, TypeError) as error:
            raise naming(error, name, args) from error
        return record(name, value, vjp, args, fresh)

    operation.precision = precision  # type: ignore[attr-defined]
    return operation


def record(name: str, value: Any, vjp: Vjp, inputs: tuple[Any, ...], fresh: bool = False) -> Any:
    """Wrap `value` (an array, or a tuple of them) in tensors and put one node on the tape if it is needed."""
    node = None
    several = isinstance(value, tuple)
    if is_grad_enabled():
        edges = tuple([a.edge() if isinstance(a, Tensor) and a.requires_grad else None for a in inputs])
        if any(edges):
            dtypes = tuple([v.dtype for v in value]) if several else (value.dtype,)
            node = Node(name, vjp, edges, dtypes, fresh)
    if several:
        return tuple([_made(v, node, i) for i, v in enumerate(value)])
    return _made(value, node, 0)


def _made(data: Any, node: Node | None, index: int) -> Tensor:
    """Return a tensor for an operation's output, without the checks of `Tensor.__init__`."""
    if isinstance(data, np.generic):  # NumPy turns 0-d results into scalars
        data = np.asarray(data)
    out = Tensor.__new__(Tensor)
    out.data = data
    out.requires_grad = node is not None and is_floating(data.dtype)
    out.grad = None
    out.grad_buffer = None
    out.version = 0
    out.hooks = ()
    out._maker = None if node is None else (node, index)
    out._leaf = None
    return out


def as_input(inputs: Array) -> Any:
    """Return what a model's first block takes: floats as a tensor; token ids stay an array, they have no gradient."""
    return Tensor(inputs) if is_floating(inputs.dtype) else inputs


def tensor(data: Any, requires_grad: bool = False, dtype: Any = None) -> Tensor:
    """Return a tensor with its own copy of `data` (array, number or nested list)."""
    made = Tensor(data, requires_grad, dtype)
    made.data = made.data.copy()
    return made
