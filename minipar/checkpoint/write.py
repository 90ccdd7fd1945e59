"""Save: every rank writes the elements it answers for into a file of its own, and rank 0 the manifest, last.

    rank 0      lock DIR, make DIR/step-N.partial
    all         write shard-RANK.safetensors
    rank 0      write manifest.json, rename to DIR/step-N, remove old checkpoints

A save that ends anywhere before the rename leaves nothing that is taken for a checkpoint, and the one before
untouched.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from minipar import optim
from minipar.agreement import agreed
from minipar.backend import Array, to_host
from minipar.checkpoint import folder
from minipar.checkpoint.manifest import BUFFER, PARAMETER, Block, Entry, Manifest, check
from minipar.checkpoint.shard_file import write_shard
from minipar.comm.interface import Communicator
from minipar.errors import MiniparError, UsageError
from minipar.parallel.strategies import HeldTensor, Strategy

T = TypeVar("T")


class SaveFailed(MiniparError, RuntimeError):
    """A checkpoint could not be written: the disk is full, or the directory cannot be written."""


@dataclass
class Shard:
    """What one rank writes.

    Attributes:
        arrays: by key of the file.
        tensors: what the manifest says of them, blocks of this rank only.
        scalars: {name of optimizer state that is no array: {parameter: value}}.
    """

    file: str
    arrays: dict[str, Array] = field(default_factory=dict)
    tensors: list[Entry] = field(default_factory=list)
    scalars: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, held: HeldTensor, kind: str, array: Array) -> None:
        """Take an array that lies where `held` does."""
        blocks = []
        for box, view in held.region.boxes(array):
            key = f"{kind}/{held.name}/" + ",".join(f"{a}:{b}" for a, b in box)
            self.arrays[key] = to_host(view)
            blocks.append(Block(self.file, key, [a for a, _ in box], [b - a for a, b in box]))
        if blocks:
            self.tensors.append(Entry(held.name, kind, list(held.region.shape), array.dtype.name, blocks))


def shard_of(strategy: Strategy, optimizer: optim.Optimizer, rank: int) -> Shard:
    """Return what a rank answers for: its parameters, its buffers and the optimizer state of its parameters."""
    shard = Shard(f"shard-{rank:05d}.safetensors")
    position = {id(t): i for i, t in enumerate(optimizer.tensors())}
    for held in strategy.parameters_held():
        if not held.saves:
            continue
        shard.add(held, PARAMETER, held.tensor.data)
        for kind, value in optimizer.state[position[id(held.tensor)]].items():
            if hasattr(value, "dtype"):
                shard.add(held, kind, value)
            else:
                shard.scalars.setdefault(kind, {})[held.name] = value
    for held in strategy.buffers_held():
        if held.saves:
            shard.add(held, BUFFER, held.tensor.data)
    return shard


def save(
    directory: Path,
    step: int,
    comm: Communicator,
    strategy: Strategy,
    optimizer: optim.Optimizer,
    *,
    config: Mapping[str, Any],
    layout: Mapping[str, Any],
    scalars: Mapping[str, Any],
    keep: int | None = None,
) -> Path:
    """Save a checkpoint of `step` and return its path. Collective; call it between two steps.

    Args:
        directory: of checkpoints; it is made if need be.
        config, layout, scalars: plain values for the manifest.
        keep: remove all but so many of the newest checkpoints, once this one is complete; None to keep all.

    Raises:
        UsageError: ranks train parameters of their own (`own_mean`), `keep` is below 1, there is a checkpoint of
            this step, another job is saving into the directory, or an array has a dtype that cannot be stored.
        SaveFailed: it cannot be written, and earlier checkpoints are as they were; or it is complete, and old
            ones cannot be removed. On every rank.
    """
    if strategy.own_mean:
        raise UsageError(
            "a checkpoint holds one state, and with aggregation local every rank has weights and moments of"
            " its own: use all_reduce or master"
        )
    if keep is not None and keep < 1:
        raise UsageError(f"keep is {keep}: the checkpoint that is saved stays, so give at least 1, or None for all")
    final = folder.checkpoint_path(directory, step)
    partial = final.with_name(f"step-{step:08d}{folder.PARTIAL}")

    def on_first(work: Callable[[], T]) -> T | None:
        return agreed(comm, lambda: _written(work, final, step) if comm.rank == 0 else None)

    lock = on_first(lambda: folder.begin(directory, step))
    try:
        try:
            shard = shard_of(strategy, optimizer, comm.rank)
            about = {"step": str(step), "rank": str(comm.rank), "ranks": str(comm.size)}
            path = partial / shard.file

            def write() -> dict[str, Any] | None:
                return write_shard(path, shard.arrays, about) if shard.arrays else None

            facts = agreed(comm, lambda: _written(write, final, step))
            shard.arrays.clear()
            parts = comm.all_gather_object((shard, facts))

            def complete() -> Path:
                manifest = Manifest(
                    step, dict(config), dict(layout), {**scalars, "optimizer": _joined_scalars(parts)},
                    {part.file: written for part, written in parts if written}, _joined_tensors(parts),
                )  # fmt: skip
                check(manifest)
                return folder.finish(partial, manifest.encode())

            on_first(complete)
        except MiniparError:
            if comm.rank == 0:  # room for whatever comes next; what cannot be removed now goes at the next save
                shutil.rmtree(partial, ignore_errors=True)
            raise
        if keep is not None:
            agreed(comm, lambda: _remove_old(directory, keep, final) if comm.rank == 0 else None)
    finally:
        if lock is not None:
            os.close(lock)
    return final


def _written(work: Callable[[], T], checkpoint: Path, step: int) -> T:
    """Return `work()`; what the system refuses is told in one line."""
    try:
        return work()
    except OSError as error:
        reason = error.strerror or error
        raise SaveFailed(
            f"checkpoint {checkpoint} of step {step} cannot be written: {reason}; earlier ones are untouched"
        ) from None


def _remove_old(directory: Path, keep: int, newest: Path) -> None:
    """Remove what is beyond `keep`; a failure does not touch the checkpoint that has just been completed."""
    try:
        folder.remove_old(directory, keep)
    except OSError as error:
        raise SaveFailed(
            f"checkpoint {newest} is complete, but older ones in {directory} cannot be removed:"
            f" {error.strerror or error}; remove them, and go on with --resume"
        ) from None


def _joined_tensors(parts: list[tuple[Shard, Any]]) -> list[Entry]:
    """Return each tensor once, with the blocks of all ranks."""
    found: dict[tuple[str, str], Entry] = {}
    for shard, _ in parts:
        for entry in shard.tensors:
            known = found.setdefault((entry.kind, entry.name), Entry(**{**vars(entry), "blocks": []}))
            known.blocks.extend(entry.blocks)
    return list(found.values())


def _joined_scalars(parts: list[tuple[Shard, Any]]) -> dict[str, dict[str, Any]]:
    """Return {kind: {parameter: value}}: all pieces of a parameter have taken the same steps."""
    found: dict[str, dict[str, Any]] = {}
    for shard, _ in parts:
        for kind, values in shard.scalars.items():
            known = found.setdefault(kind, {})
            for name, value in values.items():
                if known.setdefault(name, value) != value:
                    raise AssertionError(f"optimizer {kind} of {name} is {known[name]} on one rank, {value} on another")
    return found


def as_plain(value: Any) -> Any:
    """Return numbers, tuples and nested values as JSON gives them back."""
    if isinstance(value, Mapping):
        return {str(k): as_plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [as_plain(v) for v in value]
    return value.item() if isinstance(value, np.generic) else value
