"""Activation recomputation: keep a block's input, throw its activations away, compute them again in backward.

Chen et al. 2016, "Training deep nets with sublinear memory cost". The replay draws the same dropout masks
(they are functions of position) and its operations join the backward run that is under way, so a parameter
used in several recomputed blocks still gets one gradient and fires its hooks once.
"""

from __future__ import annotations

import contextvars
from typing import Any

from minipar.backend import Array
from minipar.nn import Module
from minipar.tape import enable_grad, next_order, no_grad, replaying, running_backward
from minipar.tensor import Handle, Tensor, record


def recompute(module: Module, *inputs: Any) -> Tensor:
    """Return `module(*inputs)` without keeping its activations.

    Args:
        module: a module with one output tensor.
        inputs: tensors (or arrays of ids, which need no gradient).
    """
    handles = [Handle(p) for p in module.parameters()]
    context = contextvars.copy_context()  # the replay sees the same seed, step and precision
    with no_grad():
        value = module(*inputs)

    def replay() -> tuple[Tensor, list[Any]]:
        with enable_grad(), replaying():
            again = [
                x.detach().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x for x in inputs
            ]
            return module(*again), again

    def vjp(g: Array) -> Any:
        for handle in handles:
            handle.check()  # raises if a weight changed since forward: the replay would differ from it
        floor = next_order()
        output, again = context.copy().run(replay)
        run = running_backward()
        edge = output.edge()
        if edge is not None:  # None: the output depends on no input or parameter that wants a gradient
            run.push(edge, g)
            run.run(down_to=floor)
        # Parameters are older than `floor`: their gradients went into the run that is under way.
        return tuple(x.grad if isinstance(x, Tensor) else None for x in again) + (None,) * len(handles)

    return record("recompute", value.data, vjp, (*inputs, *(h.tensor for h in handles)))


def recompute_blocks(model: Any) -> None:
    """Let a model recompute each of its blocks, from outside: its forward is replaced."""

    def forward(x: Any) -> Tensor:
        for block in model.blocks:
            x = recompute(block, x)
        return x

    model.forward = forward
