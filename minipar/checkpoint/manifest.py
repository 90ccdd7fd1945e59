"""The manifest: which file of a checkpoint holds which part of which tensor, and every file's sum.

    {
     "format": "minipar checkpoint", "version": 1,
     "step": 300,
     "config": {"model": "gpt", …}, "layout": {"ranks": 4, "dp": 2, "pp": 1, "tp": 2, …},
     "scalars": {"loader": …, "scaler": …, "optimizer": {"step": {"wte.weight": 300, …}}, …},
     "files": {"shard-00000.safetensors": {"bytes": 81234, "sha256": "…"}, …},
     "tensors": [{"name": "wte.weight", "kind": "exp_avg", "shape": [94, 128], "dtype": "float32",
                  "blocks": [{"file": "shard-00000.safetensors", "key": "…", "start": [0, 0], "shape": [47, 128]}, …]}],
     "sha256": "…"
    }

The last entry is the sum of all others, and the text is written in exactly one way, so that any byte that
changes is noticed. Both hold for every version of the format: a file whose version is too high but whose sum
fits is a newer minipar's, one whose sum does not fit is damaged.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from minipar.errors import DataError, UsageError
from minipar.parallel.region import Box, intersection, volume

FORMAT, VERSION = "minipar checkpoint", 1
MANIFEST = "manifest.json"
PARAMETER, BUFFER = "parameter", "buffer"  # other kinds are optimizer state, by the optimizer's own names


@dataclass(frozen=True)
class Block:
    """A box of a tensor, stored under a key of one safetensors file."""

    file: str
    key: str
    start: list[int]
    shape: list[int]

    @property
    def box(self) -> Box:
        return tuple((a, a + n) for a, n in zip(self.start, self.shape))


@dataclass(frozen=True)
class Entry:
    """A tensor of the serial model's state.

    Attributes:
        name: the parameter's, or buffer's, path.
        kind: parameter, buffer, or a name of optimizer state, such as exp_avg.
        shape, dtype: of the whole tensor.
        blocks: boxes that cover each element once.
    """

    name: str
    kind: str
    shape: list[int]
    dtype: str
    blocks: list[Block]


@dataclass(frozen=True)
class Manifest:
    """Everything that a checkpoint says about itself.

    Attributes:
        step: optimizer steps done.
        config: the run's settings.
        layout: the ranks along each axis and what else says how the state was spread; for the reader only.
        scalars: what is no tensor: data position, step counts, loss scale, learning rate.
        files: {name: {"bytes": …, "sha256": …}}.
        tensors: all tensors.
    """

    step: int
    config: dict[str, Any]
    layout: dict[str, Any]
    scalars: dict[str, Any]
    files: dict[str, dict[str, Any]]
    tensors: list[Entry]

    def kinds(self) -> dict[str, dict[str, Entry]]:
        """Return the tensors as {kind: {name: tensor}}."""
        found: dict[str, dict[str, Entry]] = {}
        for entry in self.tensors:
            found.setdefault(entry.kind, {})[entry.name] = entry
        return found

    def encode(self) -> str:
        """Return the text of the file."""
        body = {"format": FORMAT, "version": VERSION, **asdict(self)}
        return _text({**body, "sha256": _sum(body)})


def _text(body: dict[str, Any]) -> str:
    return json.dumps(body, indent=1) + "\n"


def _sum(body: dict[str, Any]) -> str:
    return hashlib.sha256(_text(body).encode()).hexdigest()


def read_manifest(checkpoint: Path) -> Manifest:
    """Return a checkpoint's manifest.

    Raises:
        UsageError: it is of a newer version of the format.
        DataError: it is missing, damaged, or says that elements are stored twice or not at all.
    """
    path = checkpoint / MANIFEST
    try:
        text = path.read_bytes().decode()
        body: dict[str, Any] = json.loads(text)
        version, said = body["version"], body.pop("sha256")
        newer = body["format"] == FORMAT and isinstance(version, int) and version > VERSION
    except OSError as error:
        raise DataError(f"checkpoint {checkpoint}: {path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise DataError(f"{path} is damaged: it is no manifest of a checkpoint; use another checkpoint") from None
    if said != _sum(body) or text != _text({**body, "sha256": said}):
        raise DataError(f"{path} is damaged: its contents do not have the sha256 that it says; use another checkpoint")
    if newer:
        raise UsageError(
            f"{path} is of format version {version}, this minipar reads versions up to {VERSION}: use a newer minipar"
        )
    if body.pop("format") != FORMAT or body.pop("version") != VERSION:
        raise DataError(f"{path} is no manifest of a {FORMAT} of version {VERSION}")
    try:
        tensors = [Entry(**{**t, "blocks": [Block(**b) for b in t["blocks"]]}) for t in body.pop("tensors")]
        manifest = Manifest(**body, tensors=tensors)
        check(manifest)
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} does not say what a manifest says: {error}") from None
    except ValueError as error:
        raise DataError(f"{path}: {error}") from None
    return manifest


def check(manifest: Manifest) -> None:
    """Refuse a manifest in which some element is not stored exactly once.

    Raises:
        ValueError: names the tensor.
    """
    for (name, kind), times in Counter((entry.name, entry.kind) for entry in manifest.tensors).items():
        if times > 1:
            raise ValueError(f"{kind} {name} is listed {times} times")
    for entry in manifest.tensors:
        what = f"{entry.kind} {entry.name} {tuple(entry.shape)}"
        for block in entry.blocks:
            if block.file not in manifest.files:
                raise ValueError(f"{what} lies in {block.file}, which is not listed")
        boxes = [block.box for block in entry.blocks]
        _check_inside(what, boxes, entry.shape)
        if sum(map(volume, boxes)) != math.prod(entry.shape):
            stored = sum(map(volume, boxes))
            raise ValueError(f"{what}: {stored} of {math.prod(entry.shape)} elements are stored")


def _check_inside(what: str, boxes: list[Box], shape: Iterable[int]) -> None:
    """Raise ValueError if boxes overlap or reach beyond the tensor."""
    everything = tuple((0, n) for n in shape)
    for i, box in enumerate(boxes):
        if len(box) != len(everything) or intersection(box, everything) != box:
            raise ValueError(f"{what}: a block reaches beyond it")
        if any(intersection(box, other) is not None for other in boxes[:i]):
            raise ValueError(f"{what}: elements are stored twice")
