"""What one rank holds of a pipelined model: the blocks of its virtual stages, and copies of tied weights.

With p ranks and v chunks the model is cut into p·v virtual stages; rank r holds the stages r, r + p, r + 2p, …
Weights of other stages are freed, or never come to be.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from minipar.backend import array_module
from minipar.comm.interface import Communicator
from minipar.errors import UsageError
from minipar.models import Model
from minipar.nn import Module, Parameter
from minipar.parallel.batch_norm import refuse_microbatches


class Stage(Module):
    """The part of a model that one rank of the pipeline runs; its parameters keep the serial model's names.

    Args:
        model: the serial model, without values.
        pp: the ranks of the pipeline, in the order of the stages.
        cuts: the blocks of each virtual stage, p·v ranges.

    Attributes:
        chunks: this rank's lists of blocks, one for each chunk.
        users: for every parameter of the model the ranks that hold it, the one that uses it first first.
        owned: the names of the held parameters that count here: a tied one counts where it is used first.
        tied: (parameter, the ranks that hold a copy of it).

    Raises:
        UsageError: cuts that are not one range for each virtual stage, or batch norm.
    """

    def __init__(self, model: Model, pp: Communicator, cuts: Sequence[range]):
        check_cuts(model, cuts, pp.size)
        model.assign_paths()
        held = range(pp.rank, len(cuts), pp.size)
        self.chunks = [model.blocks[cuts[k].start : cuts[k].stop] for k in held]
        self.blocks = [block for chunk in self.chunks for block in chunk]
        here = {id(p) for block in self.blocks for p in block.parameters()}
        self.held = {name: p for name, p in model.named_parameters() if id(p) in here}
        ranks_of = _ranks_using(model, cuts, pp.size)
        self.users = {name: ranks_of[id(p)] for name, p in model.named_parameters()}
        self.owned = {name for name in self.held if self.users[name][0] == pp.rank}
        self.tied: list[tuple[Parameter, Communicator]] = []
        for name, ranks in self.users.items():
            if len(ranks) > 1:
                group = pp.split(0 if pp.rank in ranks else None, name="tied")
                if group is not None:
                    self.tied.append((self.held[name], group))

    def materialize(self, seed: int, dtype: Any = "float32", device: str = "cpu") -> Stage:
        """Give the held parameters their values, bitwise the serial initialisation's."""
        for name, p in self.held.items():
            p.materialize(seed, name, dtype, device)
        return self

    def assign_paths(self) -> None:
        """Keep the serial model's paths."""

    def named_modules(self, prefix: str = "", seen: set[int] | None = None) -> Iterator[tuple[str, Module]]:
        seen = set() if seen is None else seen
        yield prefix, self
        for i, block in enumerate(self.blocks):
            yield from block.named_modules(f"{prefix}.{i}" if prefix else str(i), seen)

    def named_parameters(self) -> Iterator[tuple[str, Parameter]]:
        yield from self.held.items()

    def sum_tied(self, replicas: Communicator | None = None) -> None:
        """Make each tied weight's gradient the sum over all its uses, bitwise the same on every holder.

        The holders of copies must have added in one order. So this sum comes after the one over the ranks that
        share the batch, except where that one cuts the gradient into ranges, differently on each stage (ZeRO):
        then give these ranks, and the whole sum is handed to the first of them, zeros to the others.
        """
        for p, group in self.tied:
            if not p.requires_grad:
                continue
            g = array_module(p.data).zeros_like(p.data) if p.grad is None else p.grad
            if replicas is not None:
                g = replicas.all_reduce(g)
            total = group.all_reduce(g)
            if replicas is not None and replicas.rank > 0:
                total[...] = 0
            if p.grad is not None:
                p.grad[...] = total
            else:
                p.grad = total


def check_cuts(model: Model, cuts: Sequence[range], ranks: int) -> None:
    """Refuse a model that cannot run in microbatches, or cuts that do not give each rank as many stages.

    Raises:
        UsageError: says which, and what would work.
    """
    refuse_microbatches(model)
    if not cuts or len(cuts) % ranks:
        raise UsageError(
            f"pipeline: {len(cuts)} virtual stages do not divide by {ranks} ranks; give each rank as many"
        )
    starts = [0, *(cut.stop for cut in cuts)]
    whole = starts[-1] == len(model.blocks) and all(len(c) and c.start == a for c, a in zip(cuts, starts))
    if not whole:
        raise UsageError(
            f"pipeline: cuts {', '.join(f'{c.start}–{c.stop}' for c in cuts)} must follow each other,"
            f" none empty, from 0 to {len(model.blocks)}, the number of blocks"
        )


def _ranks_using(model: Model, cuts: Sequence[range], ranks: int) -> dict[int, list[int]]:
    """Return, by the id of each parameter, the ranks whose blocks use it, the rank of its first use first."""
    found: dict[int, list[int]] = {}
    for k, cut in enumerate(cuts):
        for block in model.blocks[cut.start : cut.stop]:
            for p in block.parameters():
                users = found.setdefault(id(p), [])
                if k % ranks not in users:
                    users.append(k % ranks)
    return found
