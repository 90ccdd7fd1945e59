"""PyTorch's pipeline of a GPT in two stages (torch.distributed.pipelining on gloo): the peer of ours."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from steps import VOCAB, Size, data_of
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch_models import Block
from turns import Step

SCHEDULES = {"1f1b": Schedule1F1B, "gpipe": ScheduleGPipe}


class Stage(nn.Module):
    """Half of a GPT: the first embeds, the last has the head, untied."""

    def __init__(self, size: Size, first: bool) -> None:
        super().__init__()
        self.first = first
        if first:
            self.wte, self.wpe = nn.Embedding(VOCAB, size.width), nn.Embedding(size.tokens, size.width)
        self.h = nn.ModuleList([Block(size.width, size.heads) for _ in range(size.layers // 2)])
        if not first:
            self.ln_f, self.head = nn.LayerNorm(size.width), nn.Linear(size.width, VOCAB, bias=False)

    def forward(self, x: Any) -> Any:
        if self.first:
            x = self.wte(x) + self.wpe.weight[: x.shape[1]]
        for block in self.h:
            x = block(x)
        return x if self.first else self.head(self.ln_f(x))


def torchs(schedule: str = "1f1b", microbatches: int = 8, **size: Any) -> Step:
    """PyTorch's step: forward and backward by the schedule, AdamW."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, s = dist.get_rank(), Size(**size)
    torch.manual_seed(rank)
    module = Stage(s, rank == 0)
    stage = PipelineStage(module, rank, 2, torch.device("cpu"))

    def loss(out: Any, y: Any) -> Any:
        return F.cross_entropy(out.reshape(-1, VOCAB), y.reshape(-1))

    run = SCHEDULES[schedule](stage, n_microbatches=microbatches, loss_fn=loss)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    x, y = (torch.from_numpy(a) for a in data_of(s, 0, 1))

    def step() -> None:
        optimizer.zero_grad()
        if rank == 0:
            run.step(x)
        else:
            run.step(target=y)
        optimizer.step()

    return Step(step, rank, dist.barrier)
