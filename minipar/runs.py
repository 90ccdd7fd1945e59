"""A run's directory: its settings, its metrics, its picture and its weights.

RUN/config.json         settings, layout, data facts, vocabulary, final validation
RUN/metrics.jsonl       one object a step: step loss grad_norm samples_per_s seconds
RUN/loss.png            the loss curve
RUN/precision.png       what a precision policy's decisions rest on
RUN/layout.txt          on several ranks: the mesh, and what each of them holds of every parameter
RUN/partition.png       with --partition: what each device holds, by kind of layer
RUN/model.safetensors   the trained weights; a GPT's in GPT-2's layout

Each file but the metrics, which grow, comes to be whole or not at all.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from minipar.amp import PrecisionPolicy
from minipar.backend import Array, to_host
from minipar.checkpoint.shard_file import data_of, header, mapped
from minipar.comm.guard import numbered
from minipar.config import TrainConfig
from minipar.data import Vocabulary
from minipar.errors import DataError, MiniparError, UsageError
from minipar.files import replacing
from minipar.models import GPT, Model
from minipar.models import gpt2_weights as gpt2
from minipar.plot import loss_curves, partition_bars, precision_histograms
from minipar.training import Job, StepRecord, build_model

WEIGHTS = "model.safetensors"


class WriteFailed(MiniparError, RuntimeError):
    """A file of a run's directory could not be written, though the directory could when the run began."""


class RunWriter:
    """Writes a run's directory; used by rank 0 only.

    Attributes:
        failure: why no more metrics are written; None while they are.

    Raises:
        UsageError: the directory cannot be made or written.
    """

    def __init__(self, directory: Path, job: Job):
        self.directory, self.job = directory, job
        self.failure: WriteFailed | None = None
        metrics = directory / "metrics.jsonl"
        try:
            directory.mkdir(parents=True, exist_ok=True)
            kept = metrics_until(metrics, job.steps_done) if job.steps_done else []
            with replacing(metrics) as path:
                path.write_text("".join(json.dumps(line) + "\n" for line in kept))
            self._metrics: TextIO = metrics.open("a")
            self._write_config(None)
        except OSError as error:
            raise UsageError(f"--out {directory} cannot be written: {error.strerror or error}") from None
        known = [line["loss"] for line in kept]
        self.losses: list[float] = known if kept and kept[-1]["step"] == job.steps_done else []
        self.first = job.steps_done - len(self.losses) + 1  # the step of the first of them

    def _write_config(self, validation: dict[str, float] | None) -> None:
        vocabulary = self.job.data.vocabulary
        facts = {
            "config": self.job.config.to_dict(),
            "ranks": self.job.comm.size,
            "data": dict(self.job.data.info),
            "vocabulary": vocabulary.to_dict() if vocabulary else None,
            "validation": validation,
        }
        with replacing(self.directory / "config.json") as path:
            path.write_text(json.dumps(facts, indent=2) + "\n")

    def layout(self, tables: Sequence[str]) -> None:
        """Write how the model lies on the ranks.

        Args:
            tables: each rank's; those of several ranks that are the same are written once.

        Raises:
            WriteFailed: names the file.
        """
        parts = [str(self.job.mesh)]
        for table in dict.fromkeys(tables):
            parts.append(f"{numbered(r for r, other in enumerate(tables) if other == table)}\n{table}")
        with self._told("layout.txt"), replacing(self.directory / "layout.txt") as path:
            path.write_text("\n\n".join(parts) + "\n")
        if self.job.assignment is not None:
            with self._told("partition.png"), replacing(self.directory / "partition.png") as path:
                partition_bars(self.job.assignment, path)

    def add(self, record: StepRecord) -> bool:
        """Append one step's line; return whether it could be written, else `failure` says why not.

        It raises nothing: rank 0 is alone here, and the others would be left in the next step.
        """
        self.losses.append(record.loss)
        if self.failure is None:
            try:
                self._metrics.write(json.dumps(asdict(record)) + "\n")
                self._metrics.flush()  # so that a run can be watched, and a killed one keeps its history
            except OSError as error:
                self.failure = self._failed("metrics.jsonl", error)
                with contextlib.suppress(OSError):  # closing tries to write what is still in the buffer
                    self._metrics.close()
        return self.failure is None

    def check(self) -> None:
        """Raise WriteFailed if the metrics could not be written."""
        if self.failure is not None:
            raise self.failure

    def finish(self, validation: dict[str, float], tensors: Iterable[tuple[str, Array]]) -> None:
        """Write the weights, the picture and the final validation.

        Args:
            tensors: (name, array) of the whole serial model, see `Strategy.tensors`.

        Raises:
            WriteFailed: names the file.
        """
        self._metrics.close()
        with self._told(WEIGHTS):
            write_weights(self.job.model, self.job.config.dtype, tensors, self.directory / WEIGHTS)
        config = self.job.config
        title = f"{config.model} on {self.job.data.info['name']}, {self.job.comm.size} ranks"
        at = {self.job.steps_done: validation["loss"]}
        curves = {"training": self.losses}
        with self._told("loss.png"), replacing(self.directory / "loss.png") as path:
            loss_curves(curves, path, validation=at, title=title, first=self.first)
        with self._told("config.json"):
            self._write_config(validation)

    def draw_policy(self, policy: PrecisionPolicy) -> None:
        """Draw what a policy's decisions rest on.

        Raises:
            WriteFailed: the picture cannot be written.
        """
        with self._told("precision.png"), replacing(self.directory / "precision.png") as path:
            precision_histograms(policy, path)

    @contextlib.contextmanager
    def _told(self, name: str) -> Iterator[None]:
        """Tell what the system refuses in one line."""
        try:
            yield
        except OSError as error:
            raise self._failed(name, error) from None

    def _failed(self, name: str, error: OSError) -> WriteFailed:
        return WriteFailed(
            f"{self.directory / name} cannot be written after step {self.job.steps_done}: {error.strerror or error};"
            " make room, or give another --out"
        )


def metrics_until(path: Path, step: int) -> list[dict[str, Any]]:
    """Return the lines of a metrics file up to a step: what a run resumed there has behind it.

    Steps after it are done again. A killed run may have left half a line at the end, which is none.
    """
    lines: list[dict[str, Any]] = []
    for text in path.read_text().splitlines() if path.is_file() else []:
        try:
            line = json.loads(text)
        except ValueError:
            break
        if line["step"] > step:
            break
        lines.append(line)
    return lines


def save_weights(model: Model, path: Path) -> None:
    """Write a model's weights as safetensors; a GPT's in GPT-2's layout. `path` is whole, or as it was before.

    Raises:
        OSError: it cannot be written.
    """
    tensors = [*model.named_parameters(), *model.named_buffers()]
    write_weights(model, tensors[0][1].dtype, ((name, to_host(t.data)) for name, t in tensors), path)


def read_history(directory: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return what a run's config.json says, and its steps' lines; of a run that is going on those there are.

    Raises:
        UsageError: the directory holds no run.
        DataError: a file in it is damaged.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise UsageError(no_run(directory))
    try:
        facts: dict[str, Any] = json.loads(path.read_text())
        TrainConfig(**facts["config"])
        lines = metrics_until(directory / "metrics.jsonl", sys.maxsize)
        _ = facts["ranks"], facts["validation"], [(line["loss"], line["samples_per_s"]) for line in lines]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged: {error}") from None
    return facts, lines


def no_run(directory: Path) -> str:
    """Return the line that says that a directory holds no run."""
    path = directory / "config.json"
    return f"{directory} holds no run: {path} does not exist; make one with minipar train --out {directory}"


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


def written_model(job: Job, directory: Path) -> Model:
    """Return the serial model of a run that has just finished, its weights read from the file as they are used."""
    model = build_model(job.config, job.data.info)
    model.assign_paths()
    tensors = mapped(directory / WEIGHTS)
    for name, t in [*model.named_parameters(), *model.named_buffers()]:
        t.data = gpt2.turned(name, tensors[name]) if isinstance(model, GPT) else tensors[name]
    return model


def load_run(directory: Path) -> tuple[Model, TrainConfig, Vocabulary | None]:
    """Return a finished run's model, settings and vocabulary.

    Raises:
        UsageError: the directory holds no finished run.
        DataError: a file in it is damaged.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise UsageError(no_run(directory))
    try:
        facts: dict[str, Any] = json.loads(path.read_text())
        config = TrainConfig(**facts["config"])
        vocabulary = Vocabulary.from_dict(facts["vocabulary"]) if facts["vocabulary"] else None
        model = build_model(config, facts["data"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged: {error}") from None
    state = gpt2.read_safetensors(directory / WEIGHTS)
    model.assign_paths()
    model.load_state_dict(gpt2.from_gpt2(state) if isinstance(model, GPT) else state)
    return model, config, vocabulary
