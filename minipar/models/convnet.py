"""A small residual network (He et al. 2016) for images."""

from __future__ import annotations

from dataclasses import dataclass

from minipar import nn, ops
from minipar.errors import UsageError
from minipar.models.model import Model
from minipar.tensor import Tensor


@dataclass(frozen=True)
class ConvNetConfig:
    """Sizes of a ConvNet.

    Attributes:
        layers: residual blocks; every second one halves the image and doubles the channels while the image
            is at least 4 pixels wide.
        norm: "group" equals serial training under any split of the batch. "batch" mixes samples, so its
            statistics must be summed over all ranks that share the batch.
    """

    channels: int = 3
    size: int = 32
    classes: int = 10
    width: int = 16
    layers: int = 3
    norm: str = "group"
    groups: int = 8


def _norm(config: ConvNetConfig, channels: int) -> nn.Module:
    if config.norm == "batch":
        return nn.BatchNorm2d(channels)
    if config.norm == "group":
        return nn.GroupNorm(min(config.groups, channels), channels)
    raise UsageError(f"norm {config.norm!r} is unknown: use group or batch")


class Stem(nn.Module):
    """3 × 3 convolution from image to features: (N, C, H, W) → (N, width, H, W)."""

    def __init__(self, config: ConvNetConfig):
        self.conv = nn.Conv2d(config.channels, config.width, 3, padding=1, bias=False)
        self.norm = _norm(config, config.width)

    def forward(self, x: Tensor) -> Tensor:
        return ops.relu(self.norm(self.conv(x)))


class ResidualBlock(nn.Module):
    """relu(f(x) + x), f two 3 × 3 convolutions: (N, C, H, W) → (N, O, H/stride, W/stride)."""

    def __init__(self, config: ConvNetConfig, inputs: int, outputs: int, stride: int):
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.norm1 = _norm(config, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = _norm(config, outputs)
        # Where the shape changes the way around is a strided 1 × 1 convolution.
        same = (inputs, stride) == (outputs, 1)
        self.project = None if same else nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = ops.relu(self.norm1(self.conv1(x)))
        h = self.norm2(self.conv2(h))
        return ops.relu(h + (x if self.project is None else self.project(x)))


class PoolHead(nn.Module):
    """Mean over all positions, then logits: (N, C, H, W) → (N, classes)."""

    def __init__(self, channels: int, classes: int):
        self.pool = nn.GlobalAvgPool2d()
        self.fc = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.pool(x))  # (N, C) in between


class ConvNet(Model):
    """Stem, residual blocks, pooling head: (N, C, H, W) → logits (N, classes)."""

    def __init__(self, config: ConvNetConfig):
        self.config = config
        self.stem = Stem(config)
        width, size, blocks = config.width, config.size, []
        for i in range(config.layers):
            halve = i % 2 == 1 and size >= 4
            blocks.append(ResidualBlock(config, width, width * 2 if halve else width, 2 if halve else 1))
            width, size = (width * 2, (size + 1) // 2) if halve else (width, size)
        self.layers = nn.ModuleList(blocks)
        self.head = PoolHead(width, config.classes)
        self.loss = nn.CrossEntropyLoss(reduction="sum")
        self.blocks = [self.stem, *self.layers, self.head]
