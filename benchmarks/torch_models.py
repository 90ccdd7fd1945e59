"""minipar's models written for PyTorch, layer by layer the same: the peers of the benchmarks."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    """A transformer block as GPT-2's."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.c_attn, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc, self.out = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Any) -> Any:
        b, t, c = x.shape
        q, k, v = (
            p.view(b, t, self.heads, c // self.heads).transpose(1, 2)
            for p in self.c_attn(self.ln_1(x)).split(c, 2)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).reshape(b, t, c))
        return x + self.out(F.gelu(self.fc(self.ln_2(x)), approximate="tanh"))


class Gpt(nn.Module):
    """GPT-2 with a tied head: ids (B, T) → logits (B, T, V)."""

    def __init__(self, vocab: int, tokens: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocab, width), nn.Embedding(tokens, width)
        self.h, self.ln_f = nn.ModuleList([Block(width, heads) for _ in range(layers)]), nn.LayerNorm(width)

    def forward(self, ids: Any) -> Any:
        x = self.wte(ids) + self.wpe.weight[: ids.shape[1]]
        for block in self.h:
            x = block(x)
        return self.ln_f(x) @ self.wte.weight.T


class Mlp(nn.Sequential):
    """Linear layers with ReLU between: (N, inputs) → (N, classes)."""

    def __init__(self, inputs: int, classes: int, width: int, layers: int) -> None:
        sizes = [inputs, *[width] * (layers - 1), classes]
        parts: list[nn.Module] = []
        for i, o in pairwise(sizes):
            parts += [nn.Linear(i, o), nn.ReLU()]
        super().__init__(*parts[:-1])


class Residual(nn.Module):
    """relu(f(x) + x), f two 3 × 3 convolutions with group norm."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm1, self.norm2 = (nn.GroupNorm(min(8, outputs), outputs) for _ in range(2))
        same = (inputs, stride) == (outputs, 1)
        self.project = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)

    def forward(self, x: Any) -> Any:
        h = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(h + self.project(x))


class ConvNet(nn.Module):
    """A small residual network: (N, 3, 32, 32) → (N, classes)."""

    def __init__(self, classes: int, width: int, layers: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, width, 3, padding=1, bias=False), nn.GroupNorm(min(8, width), width)
        blocks: list[nn.Module] = []
        for i in range(layers):
            blocks.append(Residual(width, width * (1 + i % 2), 1 + i % 2))
            width *= 1 + i % 2
        self.layers, self.fc = nn.Sequential(*blocks), nn.Linear(width, classes)

    def forward(self, x: Any) -> Any:
        h = self.layers(F.relu(self.norm(self.conv(x))))
        return self.fc(h.mean((2, 3)))
