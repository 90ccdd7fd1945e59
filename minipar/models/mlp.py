"""A multilayer perceptron for images or feature vectors."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from minipar import nn, ops
from minipar.errors import UsageError
from minipar.models.model import Model
from minipar.tensor import Tensor


@dataclass(frozen=True)
class MLPConfig:
    """Sizes of an MLP: `layers` linear layers, the inner ones `width` wide."""

    inputs: int = 784
    classes: int = 10
    width: int = 128
    layers: int = 3
    dropout: float = 0.0


class MLPBlock(nn.Module):
    """Linear, ReLU, dropout: (N, in) → (N, out). The first block flattens (N, C, H, W)."""

    def __init__(self, inputs: int, outputs: int, dropout: float):
        self.fc = nn.Linear(inputs, outputs)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(ops.relu(self.fc(ops.flatten(x, 1))))


class MLPHead(nn.Module):
    """The last linear layer, to logits: (N, in) → (N, classes)."""

    def __init__(self, inputs: int, classes: int):
        self.fc = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(ops.flatten(x, 1))


class MLP(Model):
    """Flatten, then `layers` linear layers with ReLU between: (N, ...) → logits (N, classes)."""

    def __init__(self, config: MLPConfig):
        if config.layers < 1:
            raise UsageError(f"MLP: {config.layers} layers are not possible, use at least 1")
        self.config = config
        sizes = [config.inputs, *[config.width] * (config.layers - 1)]
        hidden: list[Any] = [MLPBlock(i, o, config.dropout) for i, o in pairwise(sizes)]
        self.layers = nn.ModuleList([*hidden, MLPHead(sizes[-1], config.classes)])
        self.loss = nn.CrossEntropyLoss(reduction="sum")
        self.blocks = list(self.layers)
