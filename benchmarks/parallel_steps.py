"""A GPT step on several ranks under any recipe, with every collective traced: what of it is exposed."""

from __future__ import annotations

from typing import Any

import numpy as np
from steps import VOCAB, Size, data_of
from turns import Step

import minipar
from minipar import Mesh, Recipe, distribute, optim
from minipar.backend import keep_freed_memory
from minipar.comm.traced import TracedCommunicator
from minipar.data import Batch
from minipar.models import GPT, GPTConfig
from minipar.trace import STEP, Trace, recording, span
from minipar.traces.file import RunTrace
from minipar.traces.report import examine


def ours(
    tp: int = 1,
    pp: int = 1,
    zero: int = 0,
    schedule: str = "1f1b",
    microbatches: int | None = None,
    tied: bool = True,
    trace: bool = True,
    **size: Any,
) -> Step:
    """minipar's step by a recipe; tells which share of its time goes where (see `traces.report`).

    Args:
        tp, pp: ranks that share the layers, and stages; the others share the batch.
        tied: whether the head is the embedding.
        trace: whether to record.
    """
    keep_freed_memory()
    s, plain = Size(**size), minipar.world()
    recorded = Trace(plain.now)
    comm = TracedCommunicator(plain, recorded) if trace and plain.size > 1 else plain
    model = GPT(GPTConfig(VOCAB, s.tokens, s.width, s.layers, s.heads, tied=tied))
    mesh = Mesh(comm, dp=None, tp=tp, pp=pp)
    cut = {"schedule": schedule, "microbatches": microbatches} if pp > 1 else {}
    recipe = Recipe(zero=zero, bucket_mb=8.0 if mesh.dp.size > 1 and not zero else None, **cut)  # type: ignore[arg-type]
    strategy = distribute(model, mesh, recipe, seed=0)
    optimizer = optim.AdamW([t for _, t in strategy.optimizer_tensors()], lr=1e-3)
    x, y = data_of(s, mesh.dp.rank, mesh.dp.size)
    targets = s.batch * s.tokens
    batch = Batch(x, y, np.arange(len(x)), mesh.dp.rank * len(x), s.batch, targets)

    def step() -> None:
        with recording(recorded if trace else None), span(STEP, f"step {len(recorded.spans)}"):
            optimizer.zero_grad()
            model.zero_grad()
            strategy.add_gradients(batch, targets, last=True)
            strategy.step(optimizer, targets)

    def told() -> dict[str, float]:
        if not trace:
            return {}
        recorded.on = False
        ranks = plain.all_gather_object(recorded.spans)  # ranks of one machine have one clock
        recorded.spans.clear()
        recorded.on = True
        report = examine(RunTrace(ranks, {}))
        return {} if report is None else {n: report.share(n) for n in ("work", "others", "transfer", "hidden")}

    return Step(step, comm.rank, comm.barrier, told)
