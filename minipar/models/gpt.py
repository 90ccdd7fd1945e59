"""GPT-2 (Radford et al. 2019): pre-norm transformer with learned positions.

Submodules carry the names of GPT-2's public checkpoints (`wte`, `h.0.attn.c_attn`, …); `gpt2_weights` reads
and writes that layout.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from minipar import nn, ops
from minipar.backend import array_module
from minipar.errors import UsageError
from minipar.models.model import Model
from minipar.nn.init import Constant, Normal
from minipar.tensor import Tensor


@dataclass(frozen=True)
class GPTConfig:
    """Sizes of a GPT: `layers` blocks of `heads` heads, `width` channels in all, up to `seq_len` tokens."""

    vocab: int = 50257
    seq_len: int = 1024
    width: int = 768
    layers: int = 12
    heads: int = 12
    dropout: float = 0.0
    tied: bool = True

    def __post_init__(self) -> None:
        if min(self.vocab, self.seq_len, self.width, self.layers, self.heads) < 1:
            raise UsageError(f"GPT: every size must be at least 1, got {self}")
        if self.width % self.heads:
            divisors = [n for n in range(1, self.width + 1) if self.width % n == 0 and n <= 2 * self.heads]
            raise UsageError(
                f"GPT: {self.heads} heads do not divide width {self.width}; these would: {divisors}"
            )


def _linear(inputs: int, outputs: int, std: float = 0.02, bias: bool = True) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias, weight_init=Normal(std), bias_init=Constant(0.0))


class Attention(nn.Module):
    """Causal self-attention: (B, T, C) → (B, T, C)."""

    def __init__(self, config: GPTConfig):
        self.head_dim = config.width // config.heads
        self.c_attn = _linear(config.width, 3 * config.width)
        # Residual branches start smaller by 1/√(2·layers), so that their sum keeps its size (GPT-2, 2.3).
        self.c_proj = _linear(config.width, config.width, 0.02 / (2 * config.layers) ** 0.5)
        self.attn_drop = nn.Dropout(config.dropout)
        self.resid_drop = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.c_attn(x)  # (B, T, 3·H·D); H is read off, so that a slice of the heads works as well
        if self.training and self.attn_drop.p:
            y = self._with_dropout(qkv)
        else:
            y = ops.self_attention(qkv, self.head_dim)  # (B, T, H·D)
        return self.resid_drop(self.c_proj(y))

    def _with_dropout(self, qkv: Tensor) -> Tensor:
        """The same, step by step, since the probabilities themselves are dropped out."""
        b, t, width = qkv.shape
        heads = width // (3 * self.head_dim)
        parts = qkv.split(width // 3, axis=2)
        q, k, v = (p.reshape(b, t, heads, self.head_dim).swapaxes(1, 2) for p in parts)  # (B, H, T, D)
        scores = (q @ k.swapaxes(-1, -2)) * self.head_dim**-0.5  # (B, H, T, T)
        past = array_module(qkv.data).tril(array_module(qkv.data).ones((t, t), dtype=bool))
        probs = self.attn_drop(ops.softmax(ops.where(past, scores, -np.inf)))
        return (probs @ v).swapaxes(1, 2).reshape(b, t, heads * self.head_dim)


class FeedForward(nn.Module):
    """Linear to four times the width, GELU, linear back: (B, T, C) → (B, T, C)."""

    def __init__(self, config: GPTConfig):
        self.c_fc = _linear(config.width, 4 * config.width)
        self.act = nn.GELU("tanh")
        self.c_proj = _linear(4 * config.width, config.width, 0.02 / (2 * config.layers) ** 0.5)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.c_proj(self.act(self.c_fc(x))))


class Block(nn.Module):
    """Attention and feed-forward, each added to the residual stream after a norm: (B, T, C) → (B, T, C)."""

    def __init__(self, config: GPTConfig):
        self.ln_1 = nn.LayerNorm(config.width)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.width)
        self.mlp = FeedForward(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Embed(nn.Module):
    """Token plus position: ids (B, T) → (B, T, C)."""

    def __init__(self, wte: nn.Embedding, wpe: nn.Embedding, drop: nn.Dropout):
        self.wte, self.wpe, self.drop = wte, wpe, drop

    def forward(self, ids: Any) -> Tensor:
        ids = ids.data if isinstance(ids, Tensor) else ids
        if ids.shape[1] > self.wpe.weight.shape[0]:
            raise ValueError(
                f"GPT: {ids.shape[1]} tokens, the model has positions for {self.wpe.weight.shape[0]}"
            )
        return self.drop(self.wte(ids) + self.wpe.weight[: ids.shape[1]])


class Head(nn.Module):
    """Final norm and projection to the vocabulary: (B, T, C) → (B, T, V). `out` owns the weight (V, C)."""

    def __init__(self, ln_f: nn.LayerNorm, out: nn.Embedding | nn.Linear):
        self.ln_f, self.out = ln_f, out

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(self.ln_f(x), self.out.weight)


class GPT(Model):
    """ids (B, T) → logits (B, T, V)."""

    def __init__(self, config: GPTConfig):
        self.config = config
        self.wte = nn.Embedding(config.vocab, config.width, Normal(0.02))
        self.wpe = nn.Embedding(config.seq_len, config.width, Normal(0.02))
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList([Block(config) for _ in range(config.layers)])
        self.ln_f = nn.LayerNorm(config.width)
        self.lm_head = None if config.tied else _linear(config.width, config.vocab, bias=False)
        self.loss = nn.CrossEntropyLoss(reduction="sum")
        self.blocks = [
            Embed(self.wte, self.wpe, self.drop),
            *self.h,
            Head(self.ln_f, self.wte if self.lm_head is None else self.lm_head),
        ]
