"""What a rank of a running job holds at its fullest: what `planner.memory` predicts, counted.

fullest(job, batch).total
"""

from __future__ import annotations

from minipar import random
from minipar.data import Batch
from minipar.nn import Module
from minipar.parallel.memory import Held, Root, held
from minipar.parallel.strategies.pipelined import Pipelined
from minipar.parallel.strategies.sharded import Sharded
from minipar.parallel.strategies.strategy import Strategy
from minipar.parallel.zero.zero import Zero
from minipar.training import Job


def fullest(job: Job, batch: Batch) -> Held:
    """Return this rank's bytes by kind, each at the moment of a step when there are most of it. Collective.

    Parameters and optimizer state are those between steps; gradients those at the end of the last backward,
    before ranks sum them; activations those after a forward, or at a pipeline's fullest action.

    Args:
        batch: on which forward and backward run. The job takes no step; its gradients are lost.
    """
    job.optimizer.zero_grad()
    job.model.zero_grad()
    counted = _counted(job.strategy)
    seen = [held(counted, job.optimizer)]
    if isinstance(job.strategy, Pipelined):
        strategy, executor = job.strategy, job.strategy.executor

        def count() -> None:
            flights = executor.live.values()
            under_way: list[Root] = [f.output for f in flights if f.output is not None]
            seen.append(held(counted, under_way=[*under_way, *(f.deferred for f in flights)]))

        executor.watch = count
        moment = random.at(seed=job.config.seed, step=job.steps_done, first_sample=batch.offset)
        with moment, strategy.inner.waiting(last=False):
            executor.run(strategy.cut(batch), batch.count)
        executor.watch = lambda: None
    else:
        piece = batch.split(job.config.accumulate)[0]
        moment = random.at(seed=job.config.seed, step=job.steps_done, first_sample=piece.offset)
        with moment, job.strategy.waiting(last=False):
            loss = job.model.loss(job.strategy.run(piece.inputs), piece.targets)
            seen.append(held(counted, output=loss))
            loss.backward()
        seen.append(held(counted))
    job.optimizer.zero_grad()
    job.model.zero_grad()
    return Held(
        seen[0].parameters,
        max(x.gradients for x in seen),
        seen[0].optimizer,
        max(x.activations for x in seen),
    )


def _counted(strategy: Strategy) -> Module | Zero:
    """Return what of a strategy holds this rank's parameters and gradients."""
    inner = strategy.inner if isinstance(strategy, Pipelined) else strategy
    if isinstance(inner, Sharded):
        return inner.zero
    model: Module = strategy.stage if isinstance(strategy, Pipelined) else strategy.model
    return model
