"""A network of patches for images, each seen alone: every patch says what the image shows.

Its convolutions are of patches that do not overlap and of 1 × 1, so no position ever reads another. That makes
it weaker than a ConvNet (it is a bag of local features, after Brendel and Bethge 2019), and lets images be cut
into tiles that flow through a pipeline as microbatches (`data/tiles.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

from minipar import nn, ops
from minipar.models.model import Model
from minipar.tensor import Tensor


@dataclass(frozen=True)
class PatchNetConfig:
    """Sizes of a PatchNet: patches of `patch` × `patch` pixels, `layers` blocks of `width` channels."""

    channels: int = 1
    classes: int = 10
    width: int = 32
    layers: int = 3
    patch: int = 2


class PatchStem(nn.Module):
    """Patches to features: (N, C, H, W) → (N, width, H / patch, W / patch)."""

    def __init__(self, config: PatchNetConfig):
        self.conv = nn.Conv2d(config.channels, config.width, config.patch, stride=config.patch)

    def forward(self, x: Tensor) -> Tensor:
        return ops.relu(self.conv(x))


class PatchBlock(nn.Module):
    """x + f(x), f two 1 × 1 convolutions: (N, width, h, w) → the same."""

    def __init__(self, width: int):
        self.conv1 = nn.Conv2d(width, width, 1)
        self.conv2 = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(ops.relu(self.conv1(x)))


class PatchHead(nn.Module):
    """Logits of every patch: (N, width, h, w) → (N, h, w, classes)."""

    def __init__(self, width: int, classes: int):
        self.conv = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).permute(0, 2, 3, 1)


class PatchNet(Model):
    """Stem, blocks, head: (N, C, H, W) → logits (N, H / patch, W / patch, classes)."""

    def __init__(self, config: PatchNetConfig):
        self.config = config
        self.stem = PatchStem(config)
        self.layers = nn.ModuleList([PatchBlock(config.width) for _ in range(config.layers)])
        self.head = PatchHead(config.width, config.classes)
        self.loss = nn.CrossEntropyLoss(reduction="sum")
        self.blocks = [self.stem, *self.layers, self.head]
