"""One training step of a GPT, an MLP and a ConvNet, in minipar and in PyTorch: the programs that take turns.

Forward, backward and AdamW in float32 on made-up data, the same sizes and the same arithmetic in both.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import numpy as np
from turns import Step

VOCAB, CLASSES = 96, 10


@dataclasses.dataclass(frozen=True)
class Size:
    """What a step works on; fields that a model has no use for are left out.

    Attributes:
        model: "gpt", "mlp" or "convnet".
        batch: samples over all ranks.
        tokens: of a GPT's sample.
    """

    model: str = "gpt"
    batch: int = 16
    width: int = 256
    layers: int = 4
    tokens: int = 128
    heads: int = 4

    @property
    def flops(self) -> float:
        """Operations of a GPT step in matrix products: 2 a weight and token, and attention's; backward is double.

        Per token and layer 12 width² weights; attention's two products take 4 · tokens · width, of which a causal
        mask needs half (Narayanan et al. 2021, appendix, without the head's recomputation).
        """
        assert self.model == "gpt"
        per_token = self.layers * (2 * 12 * self.width**2 + 2 * self.tokens * self.width) + 2 * VOCAB * self.width
        return 3.0 * per_token * self.tokens * self.batch


def data_of(size: Size, rank: int, ranks: int) -> tuple[Any, Any]:
    """Return this rank's inputs and targets: token ids, or images."""
    rng, rows = np.random.default_rng(rank), size.batch // ranks
    if size.model == "gpt":
        ids = rng.integers(0, VOCAB, (rows, size.tokens + 1))
        return ids[:, :-1].copy(), ids[:, 1:].copy()
    shape = (rows, 784) if size.model == "mlp" else (rows, 3, 32, 32)
    return rng.standard_normal(shape, np.float32), rng.integers(0, CLASSES, rows)


def ours(apart: bool = False, **size: Any) -> Step:
    """minipar's step; with several ranks data parallel.

    Args:
        apart: each rank trains a model of its own, in the same buckets and without a message.
    """
    import minipar
    from minipar import Tensor, optim
    from minipar.backend import keep_freed_memory
    from minipar.models import GPT, MLP, ConvNet, ConvNetConfig, GPTConfig, MLPConfig
    from minipar.parallel import DataParallel

    keep_freed_memory()
    s, comm = Size(**size), minipar.world()
    model: Any = {
        "gpt": lambda: GPT(GPTConfig(VOCAB, s.tokens, s.width, s.layers, s.heads)),
        "mlp": lambda: MLP(MLPConfig(784, CLASSES, s.width, s.layers)),
        "convnet": lambda: ConvNet(ConvNetConfig(3, 32, CLASSES, s.width, s.layers)),
    }[s.model]()
    model.materialize(seed=0)
    ranks = comm.split(comm.rank) if apart else comm
    run = DataParallel(model, ranks) if comm.size > 1 else model
    optimizer = optim.AdamW(model.parameters(), lr=1e-3)
    x, y = data_of(s, comm.rank, comm.size)
    targets = y.size * comm.size

    def step() -> None:
        model.zero_grad()
        (model.loss(run(x if s.model == "gpt" else Tensor(x)), y) / targets).backward()
        optimizer.step()

    return Step(step, comm.rank, comm.barrier)


def torchs(**size: Any) -> Step:
    """PyTorch's step, eager; with several ranks DistributedDataParallel on gloo."""
    import torch
    import torch.distributed as dist
    import torch.nn.functional as F
    from torch_models import ConvNet, Gpt, Mlp

    torch.set_num_threads(1)
    s, rank, ranks = Size(**size), 0, 1
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")
        rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model: Any = {
        "gpt": lambda: Gpt(VOCAB, s.tokens, s.width, s.layers, s.heads),
        "mlp": lambda: Mlp(784, CLASSES, s.width, s.layers),
        "convnet": lambda: ConvNet(CLASSES, s.width, s.layers),
    }[s.model]()
    run = torch.nn.parallel.DistributedDataParallel(model) if ranks > 1 else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    x, y = (torch.from_numpy(a) for a in data_of(s, rank, ranks))

    def step() -> None:
        optimizer.zero_grad()
        out = run(x)
        F.cross_entropy(out.view(-1, out.shape[-1]), y.view(-1)).backward()
        optimizer.step()

    return Step(step, rank, dist.barrier if ranks > 1 else lambda: None)
