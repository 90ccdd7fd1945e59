"""Batch norm under parallelism: it mixes the samples of a batch, so that not every way to cut a batch is open to it."""

from __future__ import annotations

from minipar.comm.interface import Communicator
from minipar.errors import UsageError
from minipar.nn import BatchNorm2d, Module


def batch_norms(model: Module) -> dict[str, BatchNorm2d]:
    """Return a model's batch norms by path."""
    return {name: m for name, m in model.named_modules() if isinstance(m, BatchNorm2d)}


def share_statistics(model: Module, comm: Communicator) -> None:
    """Let batch norm see the whole batch of these ranks. Collective.

    Over a communicator of its own, so that its sums never mix with those of gradients under way.
    """
    norms = batch_norms(model)
    if norms:
        group = comm.split(0, name="statistics")
        assert group is not None
        for norm in norms.values():
            norm.reduce = group.all_reduce


def refuse_microbatches(model: Module) -> None:
    """Raise UsageError for a model with batch norm: its statistics would be those of one microbatch."""
    for name in batch_norms(model):
        raise UsageError(
            f"{name} is batch norm, which mixes the samples of a batch, so microbatches change its result; use group"
            " norm"
        )
