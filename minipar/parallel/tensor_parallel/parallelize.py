"""Tensor parallelism: the layers of a serial model cut over ranks, by a plan.

`parallelize(model, comm, plan)` walks the plan, a table from names (`*` matches any part) to *styles*. A
style says how a module's parameters are placed and what happens around its forward. The pattern behind all
of them (Shoeybi et al. 2019, figure 3):

    x ── copy_to ── A (columns) ── f ── B (rows) ── reduce_from ── y
         backward:                                  forward:
         all-reduce                                 all-reduce

A's outputs are cut by feature, B's inputs likewise, so between the two nothing is sent.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any

from minipar.comm.interface import Communicator, balanced
from minipar.errors import UsageError
from minipar.nn import Module
from minipar.parallel.placement import Layout, Replicate, Shard, check_place, place

SEQUENCE = 1  # the axis of (B, T, C) that sequence parallelism cuts


class Style:
    """How one module is cut: `cuts` says which parameters, and `apply` wraps the forward once they are.

    Attributes:
        kind: the modules that it is for.
    """

    kind: type[Module] = Module

    def check(self, module: Any, name: str) -> None:
        """Refuse a module that cannot be cut in this way, whatever the number of ranks. Changes nothing."""

    def cuts(self, module: Any) -> dict[str, Shard]:
        """Return {attribute: how it is cut} of the module's parameters that are not whole on every rank."""
        return {}

    def apply(self, module: Any, name: str, comm: Communicator) -> None:
        """Wrap the forward of `module`, called `name`, whose parameters now lie on the ranks of `comm`."""
        raise TypeError(f"{type(self).__name__} does not say how to cut a module")


Plan = Mapping[str, Style | tuple[Style, ...]]


_length: ContextVar[int] = ContextVar("sequence_length", default=0)


class SequenceLength:
    """The whole length of the sequence at hand, set where it is cut and read where it is joined again.

    It cannot be told from a part, since parts are uneven. It lives in the context, as the moment of `random`
    does: each rank-thread has its own, and a recomputed block sees the length of its own forward.
    """

    @property
    def total(self) -> int:
        return _length.get()

    @total.setter
    def total(self, length: int) -> None:
        _length.set(length)

    def counts(self, ranks: int) -> list[int]:
        """Return each rank's length."""
        return balanced(self.total, ranks)


def around(
    module: Module, enter: Callable[..., Any] | None = None, leave: Callable[..., Any] | None = None
) -> None:
    """Run `enter` on a module's input and `leave` on its output, from outside."""
    forward = module.forward

    def wrapped(*inputs: Any) -> Any:
        if enter is not None:
            inputs = (enter(inputs[0]), *inputs[1:])
        output = forward(*inputs)
        return leave(output) if leave is not None else output

    module.forward = wrapped  # type: ignore[method-assign]


def parallelize(model: Module, comm: Communicator, plan: Plan) -> Module:
    """Cut a serial model over the ranks of `comm`, in place, and return it. Nothing is sent.

    What the plan does not cut is placed as whole on every rank. A single rank has nothing to cut: the model
    stays the serial one, bitwise.

    Args:
        model: materialised (each rank then keeps its part) or not (each rank then initialises its part only).
        plan: name patterns to styles; a tuple of styles is applied in order.

    Raises:
        UsageError: a pattern that matches nothing, two patterns that match one module, a module of another
            kind than the style is for, or a size that cannot be cut; the same on every rank. The model is as
            it was then.
    """
    chosen = check_plan(model, comm.size, plan)
    if comm.size > 1:
        for name, module, styles in chosen:
            for style in styles:
                for attribute, cut in style.cuts(module).items():
                    place(getattr(module, attribute), f"{name}.{attribute}", cut, comm)
                style.apply(module, name, comm)
        for p in model.parameters():
            if p.layout is None:
                p.layout = Layout(Replicate(), comm)
    return model


def check_plan(model: Module, ranks: int, plan: Plan) -> list[tuple[str, Module, tuple[Style, ...]]]:
    """Refuse a plan that `parallelize` could not carry out on so many ranks; nothing is changed.

    Returns:
        (name, module, its styles) of every module that the plan names, in the plan's order.

    Raises:
        UsageError: as `parallelize`.
    """
    chosen = _resolve(dict(model.named_modules()), plan)
    placed: dict[int, Shard] = {}
    for name, module, styles in chosen if ranks > 1 else ():
        for style in styles:
            style.check(module, name)
            for attribute, cut in style.cuts(module).items():
                p, full = getattr(module, attribute), f"{name}.{attribute}"
                if id(p) in placed:
                    raise UsageError(f"{full} is placed twice, as {placed[id(p)]} and as {cut}; place it once")
                check_place(p, full, cut, ranks)
                placed[id(p)] = cut
    return chosen


def _resolve(modules: dict[str, Module], plan: Plan) -> list[tuple[str, Module, tuple[Style, ...]]]:
    """Return (name, module, its styles) of every module that the plan names, in the plan's order."""
    chosen: dict[str, str] = {}
    found = []
    for pattern, entry in plan.items():
        styles = entry if isinstance(entry, tuple) else (entry,)
        names = [name for name in modules if fnmatch.fnmatchcase(name, pattern)]
        if not names:
            known = ", ".join(name for name in modules if name)
            raise UsageError(f"plan: {pattern!r} matches no module; the model has {known}")
        for name in names:
            if name in chosen:
                raise UsageError(
                    f"plan: both {chosen[name]!r} and {pattern!r} match {name}; a module is cut once"
                )
            chosen[name] = pattern
            for style in styles:
                if not isinstance(modules[name], style.kind):
                    raise UsageError(
                        f"plan: {pattern!r} puts {type(style).__name__} on {name},"
                        f" a {type(modules[name]).__name__}; it is for {style.kind.__name__}"
                    )
            found.append((name, modules[name], styles))
    return found
