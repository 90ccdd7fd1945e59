"""What a rank of a running job holds at its fullest: what `planner.memory` predicts, counted.

fullest(job, whole_batch(job)).total
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from minipar import random
from minipar.data import Batch
from minipar.nn import Module
from minipar.parallel.batch_norm import batch_norms
from minipar.parallel.memory import Held, Root, held
from minipar.parallel.strategies.pipelined import Pipelined
from minipar.parallel.strategies.sharded import Sharded
from minipar.parallel.strategies.strategy import Strategy
from minipar.parallel.zero.zero import Zero
from minipar.tape import Edge, is_replaying
from minipar.tensor import Tensor
from minipar.training import Job


def whole_batch(job: Job) -> Batch:
    """Return one of the loader's next batches: the larger of two, since the last one of an epoch may be smaller."""
    return max(job.loader.steps(2), key=lambda batch: batch.samples)


def fullest(job: Job, batch: Batch) -> Held:
    """Return this rank's bytes by kind, each at the moment of a step when there are most of it. Collective.

    Parameters, their copies of mixed precision, and optimizer state are those between steps; gradients those at the
    end of the last backward, before ranks sum them; activations those after a forward, at a pipeline's fullest
    action, or where a recomputed block's come back. The gradients of a model with batch norm, which takes no
    microbatches, are those after the sum.

    Args:
        job: of any strategy but `Layers`, which has no moment between forward and backward. It takes no step; its
            gradients are lost.
        batch: of the job's loader, on which forward and backward run.
    """
    job.optimizer.zero_grad()
    job.model.zero_grad()
    counted = _counted(job.strategy)
    seen = [held(counted, job.optimizer)]
    roots: list[Root] = []  # of all that is under way; those that backward is through with keep nothing

    def count(*more: Root) -> None:
        seen.append(held(counted, under_way=[*roots, *more]))

    whole = bool(batch_norms(job.model))  # then the sum cannot be put off
    moment = random.at(seed=job.config.seed, step=job.steps_done, first_sample=batch.offset)
    with moment, job.precision.context(), job.strategy.waiting(last=whole), _replays(counted, count):
        if isinstance(job.strategy, Pipelined):
            strategy, executor = job.strategy, job.strategy.executor

            def watch() -> None:
                flights = executor.live.values()
                roots[:] = [edge for f in flights if f.output is not None for edge in _behind(f.output)]
                roots.extend(f.deferred for f in flights)
                count()

            executor.watch = watch
            with strategy.inner.waiting(last=False):
                executor.run(strategy.cut(job.here(batch)), batch.count)
            executor.watch = lambda: None
        else:
            piece = job.here(batch.split(job.config.accumulate)[0])
            loss = job.model.loss(job.strategy.run(piece.inputs), piece.targets)
            edge = loss.edge()
            assert edge is not None
            roots[:] = _behind(edge)
            count()
            loss.backward()
            roots.clear()
            count()
    job.optimizer.zero_grad()
    job.model.zero_grad()
    return Held(
        seen[0].parameters + job.precision.copy_bytes,
        max(x.gradients for x in seen),
        seen[0].optimizer,
        max(x.activations for x in seen),
    )


def _behind(edge: Edge) -> list[Edge]:
    """Return an edge to every node of the graph behind `edge`: backward cuts the graph as it goes."""
    nodes = {id(edge[0]): edge[0]}
    stack = [edge[0]]
    while stack:
        for following in stack.pop().edges:
            if following is not None and id(following[0]) not in nodes:
                nodes[id(following[0])] = following[0]
                stack.append(following[0])
    return [(node, 0) for node in nodes.values()]


@contextlib.contextmanager
def _replays(counted: Module | Zero, count: Callable[..., None]) -> Iterator[None]:
    """Inside, `count` is called with the graph of each recomputed block as soon as it is there again."""
    model: Any = counted.model if isinstance(counted, Zero) else counted
    blocks: list[Any] = list(dict.fromkeys(model.blocks))

    def watched(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(*inputs: Any) -> Tensor:
            output = forward(*inputs)
            if is_replaying() and (edge := output.edge()) is not None:
                given: Any = [(None, lambda: inputs)]  # as a deferred gradient would, it keeps the block's inputs
                count(edge, given)
            return output

        return run

    usual = [block.__dict__.get("forward") for block in blocks]
    for block in blocks:
        block.forward = watched(block.forward)
    try:
        yield
    finally:
        for block, forward in zip(blocks, usual):
            if forward is None:
                del block.forward
            else:
                block.forward = forward


def _counted(strategy: Strategy) -> Module | Zero:
    """Return what of a strategy holds this rank's parameters and gradients."""
    inner = strategy.inner if isinstance(strategy, Pipelined) else strategy
    if isinstance(inner, Sharded):
        return inner.zero
    model: Module = strategy.stage if isinstance(strategy, Pipelined) else strategy.model
    return model
