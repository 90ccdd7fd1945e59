"""A trained model's weights as one plain safetensors file, written tensor by tensor; a GPT's in GPT-2's layout."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from minipar.backend import Array, to_host
from minipar.checkpoint.shard_file import data_of, header, mapped
from minipar.files import replacing
from minipar.models import GPT, Model
from minipar.models import gpt2_weights as gpt2
from minipar.training import Job, build_model


def save_weights(model: Model, path: Path) -> None:
    """Write a model's weights as safetensors; a GPT's in GPT-2's layout. `path` is whole, or as it was before.

    Raises:
        OSError: it cannot be written.
    """
    tensors = [*model.named_parameters(), *model.named_buffers()]
    write_weights(model, tensors[0][1].dtype, ((name, to_host(t.data)) for name, t in tensors), path)


def write_weights(model: Model, dtype: Any, tensors: Iterable[tuple[str, Array]], path: Path) -> None:
    """Write a model's weights as `save_weights` does, one tensor after the other, as they come.

    So the model need not fit this rank: no more than one tensor of it is here at a time. The file gets its
    name once it is whole.

    Args:
        model: for names and shapes; it needs no values.
        dtype: of all tensors.
        tensors: (name, array), each of the model's once, in any order.

    Raises:
        OSError: the file cannot be written.
    """
    turned = gpt2.turned if isinstance(model, GPT) else lambda name, value: value
    shapes = {name: p.global_shape for name, p in model.named_parameters()}
    shapes |= {name: b.shape for name, b in model.named_buffers()}
    facts = {name: (turned(name, np.broadcast_to(0, shape)).shape, str(dtype)) for name, shape in shapes.items()}
    begin, starts = header(facts, {})
    with replacing(path) as partial, partial.open("wb") as file:
        file.write(begin)
        for name, array in tensors:
            file.seek(starts.pop(name))
            file.write(data_of(turned(name, array.astype(dtype, copy=False))))
        assert not starts, f"no values for {', '.join(starts)}"


def written_model(job: Job, path: Path) -> Model:
    """Return the serial model of a job whose weights have been written, read from the file as they are used."""
    model = build_model(job.config, job.data.info)
    model.assign_paths()
    tensors = mapped(path)
    for name, t in [*model.named_parameters(), *model.named_buffers()]:
        t.data = gpt2.turned(name, tensors[name]) if isinstance(model, GPT) else tensors[name]
    return model
