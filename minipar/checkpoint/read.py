"""Load: check every file, then let each rank read the boxes it needs, whatever layout wrote them.

    stored by 2 ranks       wanted by 3 ranks       rank 1 reads
    a a a │ b b b           x x │ y y │ z z         the overlap of y with a, and of y with b
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from minipar import optim
from minipar.agreement import agreed
from minipar.backend import Array, is_gpu_array, to_device
from minipar.checkpoint.manifest import BUFFER, PARAMETER, Entry, Manifest, read_manifest
from minipar.checkpoint.shard_file import check_file
from minipar.comm.interface import Communicator
from minipar.errors import DataError, UsageError
from minipar.parallel.region import Box, Region, intersection, slices, volume
from minipar.parallel.strategies import HeldTensor, Strategy


def open_checkpoint(path: Path, comm: Communicator | None = None) -> Manifest:
    """Return the manifest of a checkpoint whose every file is there, whole and unchanged.

    Args:
        comm: the ranks that load it share the work of checking. Collective then.

    Raises:
        DataError: a file is missing, damaged, of another run, or one too many; names it, on every rank.
        UsageError: a newer version of the format.
    """
    if comm is None:
        manifest = read_manifest(path)
        _check_files(path, manifest, sorted(manifest.files))
        return manifest
    manifest = agreed(comm, lambda: read_manifest(path))
    mine = sorted(manifest.files)[comm.rank :: comm.size]
    agreed(comm, lambda: _check_files(path, manifest, mine))
    return manifest


def _check_files(path: Path, manifest: Manifest, names: Iterable[str]) -> None:
    extra = sorted({p.name for p in path.glob("*.safetensors")} - manifest.files.keys())
    if extra:
        raise DataError(f"{path / extra[0]} is not of this checkpoint: its manifest does not list it; remove the file")
    for name in names:
        check_file(path / name, manifest.files[name])


class Reader:
    """Reads boxes of tensors from a checkpoint's files, which are opened once. A context manager.

    Raises:
        DataError: a file does not hold what the manifest says; names the file.
    """

    def __init__(self, path: Path):
        self.path = path
        self._open: dict[str, Any] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _file(self, name: str) -> Any:
        if name not in self._open:
            self._open[name] = self._stack.enter_context(safe_open(self.path / name, "numpy"))
        return self._open[name]

    def fill(self, entry: Entry, box: Box, out: Array) -> None:
        """Copy the elements in `box` of a stored tensor into `out`, an array of the box's shape."""
        missing = volume(box)
        for block in entry.blocks:
            common = intersection(box, block.box)
            if common is None:
                continue
            try:
                file = self._file(block.file)
                part = file.get_slice(block.key)[slices(common, block.box)] if common else file.get_tensor(block.key)
            except (SafetensorError, OSError) as error:
                raise DataError(f"{self.path / block.file} cannot be read: {error}") from None
            if part.dtype.name != entry.dtype:
                raise DataError(
                    f"{self.path / block.file}: {entry.name} is {part.dtype}, the manifest says {entry.dtype}"
                )
            out[slices(common, box)] = part
            missing -= part.size
        if missing:
            raise DataError(f"{self.path}: {missing} elements of {entry.kind} {entry.name} are not stored")

    def part(self, entry: Entry, region: Region, shape: tuple[int, ...]) -> Array:
        """Return what lies in a region, as an array of the shape in which its rank holds it."""
        array = np.empty(shape, entry.dtype)
        for box, view in region.boxes(array):
            self.fill(entry, box, view)
        return array

    def tensor(self, entry: Entry) -> Array:
        """Return a whole tensor."""
        return self.part(entry, Region(tuple(entry.shape)), tuple(entry.shape))


def load(
    path: Path, manifest: Manifest, comm: Communicator, strategy: Strategy, optimizer: optim.Optimizer
) -> None:
    """Give a distributed model and its optimizer the state of a checkpoint, of whatever layout. Collective.

    Each rank reads the elements that it holds, and no others.

    Args:
        manifest: what `open_checkpoint` returned.

    Raises:
        UsageError: the state is of another model; nothing is changed then.
        DataError: a file does not hold what the manifest says.
    """
    parameters, buffers = strategy.parameters_held(), strategy.buffers_held()
    agreed(comm, lambda: _check_fit(path, manifest, parameters, buffers))

    def read() -> None:
        kinds = manifest.kinds()
        with Reader(path) as reader:
            for kind, held_here in ((PARAMETER, parameters), (BUFFER, buffers)):
                for held in held_here:
                    t = held.tensor
                    values = reader.part(kinds[kind][held.name], held.region, t.shape) if t.size else np.empty(t.shape)
                    t.assign_(to_device(values, "cuda" if is_gpu_array(t.data) else "cpu"))
            _load_optimizer(reader, manifest, parameters, optimizer)

    agreed(comm, read)
    strategy.reload()


def _load_optimizer(
    reader: Reader, manifest: Manifest, parameters: list[HeldTensor], optimizer: optim.Optimizer
) -> None:
    """Restore optimizer state; a parameter that was never stepped has none."""
    kinds = {k: tensors for k, tensors in manifest.kinds().items() if k not in (PARAMETER, BUFFER)}
    state: dict[int, dict[str, Any]] = {i: {} for i in optimizer.state}
    position = {id(t): i for i, t in enumerate(optimizer.tensors())}
    for held in parameters:
        mine = state[position[id(held.tensor)]]
        for kind, values in manifest.scalars["optimizer"].items():
            if held.name in values:
                mine[kind] = values[held.name]
        for kind, tensors in kinds.items():
            if held.name in tensors:
                mine[kind] = reader.part(tensors[held.name], held.region, held.tensor.shape)
    optimizer.load_state_dict({"state": state, "groups": optimizer.state_dict()["groups"]})


def _check_fit(path: Path, manifest: Manifest, parameters: list[HeldTensor], buffers: list[HeldTensor]) -> None:
    """Raise UsageError unless the stored tensors are those of this model."""
    kinds = manifest.kinds()
    for kind, held_here in ((PARAMETER, parameters), (BUFFER, buffers)):
        for held in held_here:
            entry = kinds.get(kind, {}).get(held.name)
            shape, dtype = held.region.shape, held.tensor.dtype.name
            if entry is None and held.tensor.size:
                raise UsageError(f"checkpoint {path} is of another model: it has no {kind} {held.name} {shape}")
            if entry is not None and (tuple(entry.shape), entry.dtype) != (shape, dtype):
                raise UsageError(
                    f"checkpoint {path} is of another model: {kind} {held.name} is {tuple(entry.shape)} {entry.dtype}"
                    f" there, {shape} {dtype} here"
                )
