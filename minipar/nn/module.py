"""Modules and parameters: the tree that a model is.

A parameter starts *unmaterialised*: a shape and an initialiser, no memory. `model.materialize(seed)` gives
every parameter its values, each from (seed, its name in the tree), so nothing depends on the order of
construction, and a distributed wrapper can fill only the slices that its rank holds.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Self

import numpy as np

from minipar import random
from minipar.backend import Array, float_dtype, is_gpu_array, to_device, to_host
from minipar.errors import UsageError
from minipar.nn.init import Initialiser
from minipar.tensor import Tensor


class Parameter(Tensor):
    """A tensor that is trained.

    Attributes:
        name: its path in the model, as in "h.0.attn.c_attn.weight"; set by `Module.materialize`.
        initialiser: the law its values start from.
        global_shape: its shape in the serial model; `shape` is what this rank holds of it.
        layout: how it lies over tensor-parallel ranks (`parallel.placement.Layout`); None in a serial model.
        place: how it lies on the whole mesh (`parallel.placement.Place`), once a strategy has taken it.
        sharded: (shape, dtype) of the values while they lie in pieces on several ranks and `data` is absent
            (ZeRO stage 3), else None.
    """

    __slots__ = ("global_shape", "initialiser", "layout", "name", "place", "sharded")
    is_weight = True

    def __init__(self, shape: tuple[int, ...], initialiser: Initialiser):
        super().__init__(np.zeros((), np.float32), requires_grad=True)
        del self.data  # no memory yet; __getattr__ explains
        self.global_shape = tuple(int(n) for n in shape)
        self.initialiser = initialiser
        self.layout: Any = None
        self.place: Any = None
        self.sharded: tuple[tuple[int, ...], np.dtype[Any]] | None = None
        self.name = ""

    def __getattr__(self, attribute: str) -> Any:  # only called for what is missing
        if attribute == "data":
            if self.sharded is not None:
                raise UsageError(
                    f"parameter {self.name} {self.shape} lies in pieces on the ranks (ZeRO stage 3), whole"
                    " only while its unit runs: call the Zero wrapper, not the model, or gather with full()"
                )
            raise UsageError(
                f"parameter {self.name or '(unnamed)'} {self.global_shape} has no values yet:"
                " call materialize(seed=...) on the model"
            )
        raise AttributeError(f"{type(self).__name__} has no attribute {attribute!r}")

    @property
    def is_materialized(self) -> bool:
        """Whether the values exist on this rank."""
        try:
            object.__getattribute__(self, "data")
        except AttributeError:
            return False
        return True

    @property
    def shape(self) -> tuple[int, ...]:
        if self.is_materialized:
            return self.data.shape
        return self.global_shape if self.sharded is None else self.sharded[0]

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.data.dtype if self.is_materialized or self.sharded is None else self.sharded[1]

    def materialize(self, seed: int, name: str, dtype: Any = "float32", device: str = "cpu") -> None:
        """Give the parameter its values: the serial initialisation, or this rank's part of it."""
        self.name = name
        key = random.stream(seed, name)
        if self.layout is None:
            values = self.initialiser.fill(key, self.global_shape)
        else:
            values = self.layout.initial(self.initialiser, key, self.global_shape)
        self.data = to_device(values.astype(float_dtype(dtype)), device)
        self.version += 1

    def __repr__(self) -> str:
        if self.is_materialized:
            return f"Parameter({self.name!r}, {self.shape}, {self.dtype})"
        if self.sharded is not None:
            return f"Parameter({self.name!r}, {self.shape}, {self.dtype}, in pieces on the ranks)"
        return f"Parameter({self.name!r}, {self.global_shape}, not materialised)"


class Buffer(Tensor):
    """A tensor that belongs to a module's state and is not trained, such as running statistics."""

    __slots__ = ()


class Module:
    """A node of the model's tree: parameters, buffers and submodules are whatever attributes it has.

    A plain list is not searched, so that a module may refer to others without owning them; `ModuleList` owns.
    """

    training = True
    path = ""  # its name in the tree, set by `materialize`

    def forward(self, *inputs: Any) -> Any:
        raise TypeError(f"{type(self).__name__} defines no forward")

    def __call__(self, *inputs: Any) -> Any:
        return self.forward(*inputs)

    def children(self) -> Iterator[tuple[str, Module]]:
        """Yield (attribute, submodule) in the order in which they were set."""
        for name, value in vars(self).items():
            if isinstance(value, Module):
                yield name, value

    def named_modules(self, prefix: str = "", seen: set[int] | None = None) -> Iterator[tuple[str, Module]]:
        """Yield (path, module) of this module and all below it, parents first, a shared one once."""
        seen = set() if seen is None else seen
        if id(self) in seen:
            return
        seen.add(id(self))
        yield prefix, self
        for name, child in self.children():
            yield from child.named_modules(f"{prefix}.{name}" if prefix else name, seen)

    def _named_tensors(self, kind: type[Any]) -> Iterator[tuple[str, Any]]:
        seen: set[int] = set()
        for path, module in self.named_modules():
            for name, value in vars(module).items():
                if isinstance(value, kind) and id(value) not in seen:
                    seen.add(id(value))
                    yield (f"{path}.{name}" if path else name), value

    def named_parameters(self) -> Iterator[tuple[str, Parameter]]:
        """Yield (path, parameter), a shared parameter once, under its first path."""
        yield from self._named_tensors(Parameter)

    def parameters(self) -> Iterator[Parameter]:
        """Yield the parameters, a shared one once."""
        for _, p in self.named_parameters():
            yield p

    def named_buffers(self) -> Iterator[tuple[str, Buffer]]:
        """Yield (path, buffer)."""
        yield from self._named_tensors(Buffer)

    def materialize(self, seed: int, dtype: Any = "float32", device: str = "cpu") -> Self:
        """Give every parameter below this module its values, and every module its path.

        Args:
            seed: the run's seed; each parameter draws from the stream (seed, its path).
            dtype: "float32", "float64" or "float16".
            device: "cpu" or "cuda".
        """
        self.assign_paths()
        for name, p in self.named_parameters():
            p.materialize(seed, name, dtype, device)
        for _, b in self.named_buffers():
            b.data = to_device(b.data.astype(float_dtype(dtype)), device)
        return self

    def assign_paths(self) -> None:
        """Tell every module and parameter its path in this tree."""
        for path, module in self.named_modules():
            module.path = path
        for name, p in self.named_parameters():
            p.name = name

    def state_dict(self) -> dict[str, Array]:
        """Return {path: array} of parameters and buffers: host copies."""
        tensors = [*self.named_parameters(), *self.named_buffers()]
        # In C order: safetensors writes memory as it lies.
        return {name: np.array(to_host(t.data), order="C") for name, t in tensors}

    def load_state_dict(self, state: dict[str, Array]) -> None:
        """Overwrite parameters and buffers by path, keeping dtype and device.

        Raises:
            UsageError: a missing or unexpected path, a shape that differs, or a dtype that is not one of the
                engine's. Nothing is changed then.
        """
        own: dict[str, Any] = dict([*self.named_parameters(), *self.named_buffers()])
        missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
        if missing or unexpected:
            raise UsageError(
                f"state does not fit the model: missing {missing or 'none'},"
                f" unexpected {unexpected or 'none'}"
            )
        for name, t in own.items():
            if tuple(state[name].shape) != t.shape:
                raise UsageError(
                    f"state does not fit the model: {name} is {tuple(state[name].shape)}, expected {t.shape}"
                )
            float_dtype(state[name].dtype)
        for name, t in own.items():
            if isinstance(t, Parameter) and not t.is_materialized:
                t.name, t.data = name, np.empty(t.shape, state[name].dtype)
            t.assign_(to_device(state[name].astype(t.dtype), "cuda" if is_gpu_array(t.data) else "cpu"))

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for p in self.parameters():
            p.grad = None

    def train(self, mode: bool = True) -> Self:
        """Set training (dropout on, batch statistics) or evaluation for the whole tree."""
        for _, module in self.named_modules():
            module.training = mode
        return self

    def eval(self) -> Self:
        """Set evaluation for the whole tree."""
        return self.train(False)

    def extra_repr(self) -> str:
        """Return what stands between the parentheses when the module is printed."""
        return ""

    def __repr__(self) -> str:
        lines = [f"({name}): " + repr(child).replace("\n", "\n  ") for name, child in self.children()]
        if not lines:
            return f"{type(self).__name__}({self.extra_repr()})"
        return f"{type(self).__name__}({self.extra_repr()}\n  " + "\n  ".join(lines) + "\n)"


class Sequential(Module):
    """Modules applied one after the other; indexed and iterated like a list."""

    def __init__(self, *modules: Module):
        for i, module in enumerate(modules):
            vars(self)[str(i)] = module

    def forward(self, x: Any) -> Any:
        for module in self:
            x = module(x)
        return x

    def __iter__(self) -> Iterator[Module]:
        return (child for _, child in self.children())

    def __len__(self) -> int:
        return len(list(self.children()))

    def __getitem__(self, i: int) -> Module:
        return list(self)[i]


class ModuleList(Sequential):
    """A list of modules that owns them and leaves their use to the parent."""

    def __init__(self, modules: Any):
        super().__init__(*modules)

    def forward(self, *inputs: Any) -> Any:
        raise TypeError("a ModuleList is not called; loop over its modules")
