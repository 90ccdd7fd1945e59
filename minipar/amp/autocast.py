"""Autocast: each operation in the precision that suits it, chosen where the operation is called.

    with autocast("float16"):
        loss = model.loss(model(x), targets)      # linear layers in float16, softmax and loss in float32
    loss.backward()                               # outside: each vjp has the precision of its forward

A primitive states its own kind (`@primitive(precision=...)`), after the lists of torch.autocast:

    low       linear, matmul, einsum, conv2d, attention: where the time goes, and hardware adds up in float32
    float32   softmax, log_softmax, other losses, norms, exp, log, pow, and what sums: sum, mean, var, logsumexp,
              prod, cumsum: these overflow float16 (largest number 65504) or lose what is small
    inside    cross-entropy: float32 as well, but cast number by number in its kernel, since a copy of the
              logits would be the largest array of the step
    (none)    all others stay in the dtype they are given; where several meet, the widest

Parameters stay float32: they are the master weights, to which an optimizer adds what float16 would round
away. They are cast on use. A gradient always comes back in the dtype of its input (the tape sees to that), so
a parameter's is float32, and sums over microbatches, over uses and over ranks are float32 sums: no all-reduce
of gradients can overflow float16. The term of one use is rounded to float16 once, as a GPU rounds it; a loss
scale (`GradScaler`) keeps it in range.

float64 is never cast, as in PyTorch. bfloat16 (through ml_dtypes) works on NumPy, where multiplying by a
Python number gives float32; CuPy has no bfloat16, so it is refused there.
"""

from __future__ import annotations

import weakref
from contextvars import ContextVar
from typing import Any, Self

import ml_dtypes
import numpy as np

from minipar import kernels
from minipar.backend import Array, is_gpu_array
from minipar.errors import UsageError
from minipar.kernels.gpu_graph import Capture, capturing
from minipar.tensor import Casting, Handle, Tensor, casting

FLOAT32 = np.dtype("float32")
LOW_DTYPES = {"float16": np.dtype("float16"), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
CASTABLE = frozenset((FLOAT32, *LOW_DTYPES.values()))

# What held before each `with` of this context, innermost first: one object may be entered by several ranks.
_outer: ContextVar[tuple[Casting | None, ...]] = ContextVar("outer_casting", default=())


def low_dtype(name: Any) -> np.dtype[Any]:
    """Return the dtype of "float16" or "bfloat16".

    Raises:
        UsageError: any other name.
    """
    for known, dtype in LOW_DTYPES.items():
        if name in (known, dtype):
            return dtype
    raise UsageError(f"autocast: dtype {name!r} is unknown: use float16 or bfloat16")


class autocast:
    """A context in which operations choose their precision. It holds for this rank and thread alone.

    The cast copy of a parameter is kept and used again, also in backward, until the parameter's version
    changes (an optimizer's step) or its array is gone (ZeRO stage 3 frees it). The copies live in this
    object: enter one object at every step, or a new one each time. A CUDA graph (`CapturedStep`) makes copies of
    its own, or its replays would go on with those of the weights at the time of the capture.

    Args:
        dtype: the low precision, "float16" or "bfloat16".
        enabled: False switches autocast off inside another autocast.
        cache_enabled: keep cast copies of parameters.

    Attributes:
        float32_parameters: names of parameters whose operations stay in float32; see `PrecisionPolicy`.
        only_float32: low-precision operations compute in float32 as well; what they use is noted in `met`.
        met: names of the parameters that low-precision operations have used.
    """

    def __init__(self, dtype: Any = "float16", enabled: bool = True, cache_enabled: bool = True):
        self.dtype, self.enabled, self.cache_enabled = low_dtype(dtype), enabled, cache_enabled
        self.float32_parameters: frozenset[str] = frozenset()
        self.only_float32 = False
        self.met: set[str] = set()
        # By id of the source array: (reference that empties the entry, version, copy, the graph it is a part of).
        self._copies: dict[int, tuple[weakref.ref[Any], int, Array, Capture | None]] = {}

    def __enter__(self) -> Self:
        _outer.set((casting.get(), *_outer.get()))
        casting.set(self if self.enabled else None)
        return self

    def __exit__(self, *error: Any) -> None:
        before, *rest = _outer.get()
        _outer.set(tuple(rest))
        casting.set(before)

    def cast(self, precision: str, args: tuple[Any, ...], values: list[Any]) -> None:
        """Bring the tensors among `args` to the operation's precision: what `primitive` calls.

        Args:
            precision: "low", "float32", or "inside", where there is nothing to do.
            values: the arrays and handles of `args`, replaced in place. Plain arrays are left alone.
        """
        if precision == "inside":
            return
        target = FLOAT32
        if precision == "low":
            names = [a.name for a in args if isinstance(a, Tensor) and a.is_weight and a.name]  # type: ignore[attr-defined]
            self.met.update(names)
            if not (self.only_float32 or self.float32_parameters.intersection(names)):
                target = self.dtype
        for i, a in enumerate(args):
            if not isinstance(a, Tensor):
                continue
            value = values[i]
            dtype = a.dtype
            if dtype == target or dtype not in CASTABLE:
                continue
            if isinstance(value, Handle):
                values[i] = _CastHandle(value, self, target)
            else:
                values[i] = self.copy_of(a, target)

    def copy_of(self, t: Tensor, dtype: np.dtype[Any]) -> Array:
        """Return a tensor's values in `dtype`; a parameter's copy is made once for each version of it.

        Raises:
            UsageError: bfloat16 on a GPU.
        """
        data = t.data
        if dtype.kind == "V" and is_gpu_array(data):
            raise UsageError("autocast: CuPy has no bfloat16; use float16 on a GPU, or --device cpu")
        if not (t.is_weight and self.cache_enabled):
            return kernels.of(data).cast(data, dtype)
        key, copies, graph = id(data), self._copies, capturing.get()
        found = copies.get(key)
        if found is not None:
            of, version, copy, part_of = found
            if of() is data and version == t.version and copy.dtype == dtype and part_of is graph:
                return copy
        copy = kernels.of(data).cast(data, dtype)
        copies[key] = weakref.ref(data, lambda _: copies.pop(key, None)), t.version, copy, graph
        return copy

    @property
    def copy_bytes(self) -> int:
        """Bytes of the copies of parameters that are kept."""
        return sum(copy.nbytes for _, _, copy, _ in self._copies.values())


class _CastHandle(Handle):
    """A parameter captured by reference and read in another precision, then as now."""

    __slots__ = ("_dtype", "casting")

    def __init__(self, handle: Handle, casting: autocast, dtype: np.dtype[Any]):
        self.tensor, self.version = handle.tensor, handle.version
        self.casting, self._dtype = casting, dtype

    @property
    def dtype(self) -> np.dtype[Any]:
        return self._dtype

    @property
    def data(self) -> Array:
        self.check()
        return self.casting.copy_of(self.tensor, self._dtype)
