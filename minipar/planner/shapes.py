"""Models as the planner sees them: a row of blocks, each a list of counted operations. Nothing is allocated.

    shape = shape_of("gpt", GPTConfig(50257, 1024, 768, 12, 12))
    shape.blocks(samples=8, tp=2)[1].parameters          # of one transformer block, on one of two ranks

A block is asked for as one rank sees it: for so many samples, cut over `tp` ranks by the default plan of
`parallel.tensor_parallel.plans`. Where shares are uneven the largest is meant, since the others wait for it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from minipar.errors import UsageError
from minipar.models import ConvNetConfig, GPTConfig, MLPConfig
from minipar.planner import work
from minipar.planner.layout import Precision
from minipar.planner.work import Op


@dataclass(frozen=True)
class Message:
    """A collective of tensor parallelism: operation, elements of the whole vector, and the pass it is in.

    Attributes:
        low: in mixed precision it is of the products' precision; else, as every sum, of float32.
    """

    operation: str
    elements: int
    when: str  # forward or backward
    low: bool = False

    def bytes(self, precision: Precision) -> float:
        """Return the bytes of the whole vector."""
        return self.elements * (precision.activations if self.low else precision.sent)


@dataclass(frozen=True)
class Block:
    """One block of a model on one rank, for one microbatch.

    Attributes:
        output: elements handed on to the next block.
        borrowed: elements that belong to an earlier block; a pipeline stage that has only this one holds a copy.
        input: elements that recomputation keeps instead of what the operations save.
        low_output, low_input: in mixed precision these are of the products' precision; else of float32.
    """

    name: str
    ops: tuple[Op, ...]
    output: int
    input: int
    messages: tuple[Message, ...] = ()
    borrowed: int = 0
    low_output: bool = False
    low_input: bool = False

    @functools.cached_property
    def tensors(self) -> tuple[int, ...]:
        """Elements of each parameter tensor that this block owns."""
        return tuple(n for op in self.ops for n in op.parameters)

    @functools.cached_property
    def parameters(self) -> int:
        """Elements of all its parameters."""
        return sum(self.tensors)

    def output_bytes(self, precision: Precision) -> float:
        """Return the bytes handed on to the next block, and as a gradient back."""
        return self.output * (precision.activations if self.low_output else precision.sent)

    def input_bytes(self, precision: Precision) -> float:
        """Return the bytes that recomputation keeps."""
        return self.input * (precision.activations if self.low_input else precision.high)

    def kept_bytes(self, precision: Precision) -> float:
        """Return the bytes kept for backward, what the loss keeps included."""
        return sum(_kept(op, precision) for op in self.ops)

    def loss_bytes(self, precision: Precision) -> float:
        """Return the bytes that the loss keeps, in the last block: it is no part of the block, nor recomputed."""
        return sum(_kept(op, precision) for op in self.ops if op.kind == "cross_entropy")

    def replayed_bytes(self, precision: Precision) -> float:
        """Return the bytes that come back when the block is recomputed, beside the input that it is given."""
        first = self.ops[0]  # keeps that very input, or its copy in the products' precision, or nothing
        same = first.high or self.low_input or precision.high == precision.activations
        known = self.input_bytes(precision) if first.saved and same else 0.0
        return self.kept_bytes(precision) - self.loss_bytes(precision) - known

    def flops(self) -> float:
        """Return the operations of forward and backward."""
        return sum(op.flops(work) for op in self.ops for work in ("forward", "input", "weight"))


def _kept(op: Op, precision: Precision) -> float:
    copied = op.cast * precision.activations if precision.high != precision.activations else 0.0
    high = precision.scores if op.kind == "attention" else precision.high
    return (op.saved - op.high) * precision.activations + op.high * high + copied


@dataclass(frozen=True)
class Shape:
    """A model's sizes, and its blocks as one rank sees them.

    Attributes:
        model: gpt, mlp or convnet.
        config: the model's own config.
        build: (samples, tp, sequence_parallel) → blocks; use `blocks`, which remembers.
        dropout: count dropout's memory traffic; the engine's attention then is another one, so only for
            comparison with published runs.
    """

    model: str
    config: Any
    build: Callable[..., list[Block]]
    dropout: bool = False

    def blocks(self, samples: int, tp: int = 1, sequence_parallel: bool = False) -> list[Block]:
        """Return the row of blocks; alike blocks are one object."""
        return _blocks(self, samples, tp, sequence_parallel)

    @property
    def parameters(self) -> int:
        """Elements of all parameters, tied ones once."""
        return sum(block.parameters for block in self.blocks(1))

    @property
    def seq_len(self) -> int:
        """Tokens in a sample; 1 for images."""
        return int(getattr(self.config, "seq_len", 1))

    def tp_limit(self) -> tuple[int, str]:
        """Return the most ranks that can share a layer, and what sets that limit."""
        if self.model == "gpt":
            return self.config.heads, f"{self.config.heads} attention heads"
        if self.model == "mlp":
            limit = min(self.config.width, self.config.classes) if self.config.layers > 1 else 1
            return limit, "the narrowest layer"
        return self.config.width, f"{self.config.width} channels"


@functools.lru_cache(maxsize=4096)
def _blocks(shape: Shape, samples: int, tp: int, sequence_parallel: bool) -> list[Block]:
    return shape.build(shape.config, samples, tp, sequence_parallel, shape.dropout)


def shape_of(model: str, config: Any, dropout: bool = False) -> Shape:
    """Return the shape of a model with this config.

    Raises:
        UsageError: an unknown model.
    """
    builders: dict[str, Callable[..., list[Block]]] = {
        "gpt": gpt_blocks, "mlp": mlp_blocks, "convnet": convnet_blocks,
    }  # fmt: skip
    if model not in builders:
        raise UsageError(f"model {model!r} is unknown: use one of {', '.join(builders)}")
    return Shape(model, config, builders[model], dropout)


def share(n: int, ranks: int) -> int:
    """Return the largest of `ranks` nearly equal shares of n."""
    return -(-n // ranks)


def gpt_blocks(
    c: GPTConfig, samples: int, tp: int, sequence_parallel: bool, dropout: bool = False
) -> list[Block]:
    """Embedding, transformer blocks, head: Megatron-LM's cut (Shoeybi et al. 2019, section 3).

    A block sends two all-reduces of (B, T, C) forward and two backward. Sequence parallelism makes each an
    all-gather and a reduce-scatter of as many bytes, and divides what lies between them by `tp` (Korthikanti
    et al. 2022, section 4.2).
    """
    t, width = c.seq_len, c.width
    rows = samples * t
    outside = samples * share(t, tp) if sequence_parallel else rows  # rows of norms and residuals
    heads, hidden, vocab = share(c.heads, tp), share(4 * width, tp), share(c.vocab, tp)
    inner = heads * (width // c.heads)
    residual = (work.dropout_add if dropout else work.add)(outside * width)
    layer = (
        work.layer_norm(outside, width),
        work.linear(rows, width, 3 * inner),
        work.attention(samples, heads, t, width // c.heads, dropout=dropout),
        _row(work.linear(rows, inner, width), width),
        residual,
        work.layer_norm(outside, width),
        work.linear(rows, width, hidden),
        work.gelu(rows * hidden),
        _row(work.linear(rows, hidden, width), width),
        residual,
    )
    n = rows * width
    sums: tuple[Message, ...] = ()
    if tp > 1 and sequence_parallel:
        pair = ("all_gather", "reduce_scatter")
        # Norms see a part of the sequence, so their four gradients are summed as well.
        sums = tuple(Message(op, n, when) for when in ("forward", "backward") for op in pair * 2)
        sums += tuple(Message("all_reduce", width, "backward") for _ in range(4))
    elif tp > 1:
        sums = tuple(Message("all_reduce", n, when) for when in ("forward", "backward") for _ in range(2))
    block = Block("block", layer, outside * width, outside * width, sums)
    look_up = work.embedding(rows, vocab, width)
    positions = Op("add", (n,), moved=(3.0 * n, 0.0, 1.0 * n), parameters=(t * width,))
    first: tuple[Message, ...] = (Message("all_reduce", n, "forward"),) if tp > 1 else ()
    if tp > 1 and sequence_parallel:
        first += (Message("all_gather", n, "backward"),)
    embed = Block("embedding", (look_up, positions), outside * width, 2 * rows, first)
    head_ops = (
        work.layer_norm(outside, width),
        work.linear(rows, width, vocab, bias=False),
        work.cross_entropy(rows, vocab, parallel=tp > 1),
    )
    last: tuple[Message, ...] = ()
    if tp > 1:
        last = (Message("all_reduce", 3 * rows, "forward"),)
        last += (Message("all_gather", n, "forward"),) if sequence_parallel else ()
        last += (Message("reduce_scatter" if sequence_parallel else "all_reduce", n, "backward"),)
    borrowed = 0
    if c.tied:
        borrowed = vocab * width
        head_ops = (head_ops[0], _without_parameters(head_ops[1]), head_ops[2])
    head = Block("head", head_ops, 0, outside * width, last, borrowed)
    return [embed, *[block] * c.layers, head]


def _without_parameters(op: Op) -> Op:
    return replace(op, parameters=())


def _row(op: Op, outputs: int) -> Op:
    """A row-parallel layer: its bias is whole on every rank."""
    return replace(op, parameters=(op.parameters[0], outputs))


def mlp_blocks(
    c: MLPConfig, samples: int, tp: int, sequence_parallel: bool = False, dropout: bool = False
) -> list[Block]:
    """Linear layers with ReLU between; with `tp` cut by columns and rows in turn, an odd last one joined."""
    sizes = [c.inputs, *[c.width] * (c.layers - 1), c.classes]
    blocks = []
    for i in range(c.layers):
        inputs, outputs, last = sizes[i], sizes[i + 1], i == c.layers - 1
        row = i % 2 == 1
        here_in, here_out = (share(inputs, tp), outputs) if row else (inputs, share(outputs, tp))
        fc = work.linear(samples, here_in, here_out, keeps_input=i == 0, first=i == 0)
        sums: list[Message] = []
        if tp > 1 and row:
            fc = _row(fc, outputs)
            sums.append(Message("all_reduce", samples * outputs, "forward"))
        elif tp > 1:
            if i:
                sums.append(Message("all_reduce", samples * inputs, "backward"))
            if last:
                sums.append(Message("all_gather", samples * outputs, "forward", low=True))
        after = work.cross_entropy(samples, outputs) if last else work.relu(samples * here_out)
        blocks.append(
            Block(
                f"layer {i}", (fc, after), samples * here_out, samples * here_in, tuple(sums),
                low_output=True, low_input=i > 0,
            )
        )
    return blocks


def convnet_blocks(
    c: ConvNetConfig, samples: int, tp: int, sequence_parallel: bool = False, dropout: bool = False
) -> list[Block]:
    """Stem, residual blocks, pooling head; with `tp` each convolution is cut by output channels and joined."""

    def conv(inputs: int, outputs: int, size: int, kernel: int, stride: int = 1, **more: Any) -> Op:
        return work.convolution(samples, inputs, share(outputs, tp), size, kernel, stride, **more)

    def around(inputs: int, outputs: int, size: int, stride: int, first: bool = False) -> list[Message]:
        out = -(-size // stride)
        joined = [Message("all_gather", samples * outputs * out * out, "forward", low=True)]
        return joined + ([] if first else [Message("all_reduce", samples * inputs * size * size, "backward")])

    def normed(channels: int, size: int) -> Op:
        return work.group_norm(samples, channels, size, min(c.groups, channels))

    width, size = c.width, c.size
    pixels = samples * width * size * size
    stem = (
        conv(c.channels, width, size, 3, keeps_input=True, first=True),
        normed(width, size),
        work.relu(pixels, high=True),
    )
    sums = tuple(around(c.channels, width, size, 1, first=True)) if tp > 1 else ()
    blocks = [Block("stem", stem, pixels, samples * c.channels * size * size, sums)]
    for i in range(c.layers):
        halve = i % 2 == 1 and size >= 4
        outputs, stride = (2 * width, 2) if halve else (width, 1)
        after = (size + 1) // 2 if halve else size
        n = samples * outputs * after * after
        ops = [
            conv(width, outputs, size, 3, stride), normed(outputs, after), work.relu(n, high=True),
            conv(outputs, outputs, after, 3), normed(outputs, after), work.add(n), work.relu(n, high=True),
        ]  # fmt: skip
        messages = around(width, outputs, size, stride) + around(outputs, outputs, after, 1)
        if halve:
            ops.append(conv(width, outputs, size, 1, stride))
            messages += around(width, outputs, size, stride)
        blocks.append(
            Block(
                f"residual {i}", tuple(ops), n, samples * width * size * size,
                tuple(messages) if tp > 1 else (),
            )
        )  # fmt: skip
        width, size = outputs, after
    head = (
        work.global_pool(samples, width, size),
        work.linear(samples, width, c.classes),
        work.cross_entropy(samples, c.classes),
    )
    blocks.append(Block("head", head, 0, samples * width * size * size))
    return blocks
