"""What all models have in common: a list of blocks that each take and give one tensor, and a loss."""

from __future__ import annotations

from typing import Any

from minipar.nn import CrossEntropyLoss, Module
from minipar.tensor import Tensor


class Model(Module):
    """A serial model. Nothing here, or in any model, knows of parallelism.

    Attributes:
        blocks: the modules that forward runs one after the other, each from one tensor to one tensor. They
            are what recomputation wraps, what layer parallelism places and what a pipeline cuts.
        loss: (output, targets) → the *sum* of the losses of all valid targets. The training loop divides by
            the number of valid targets in the global batch, once.
    """

    blocks: list[Module]
    loss: CrossEntropyLoss

    def forward(self, x: Any) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x
