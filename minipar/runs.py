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

from minipar.amp import PrecisionPolicy
from minipar.backend import Array
from minipar.comm.guard import numbered
from minipar.config import TrainConfig
from minipar.data import Vocabulary
from minipar.errors import DataError, UsageError
from minipar.files import WriteFailed, replacing, told, write_failed
from minipar.models import GPT, Model
from minipar.models import gpt2_weights as gpt2
from minipar.plot import loss_curves, partition_bars, precision_histograms
from minipar.training import Job, StepRecord, build_model
from minipar.weights import write_weights

WEIGHTS = "model.safetensors"


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
                self.failure = write_failed(self.directory / "metrics.jsonl", error, self._when())
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

    def _told(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Tell what the system refuses in one line."""
        return told(self.directory / name, self._when())

    def _when(self) -> str:
        return f"after step {self.job.steps_done}"


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


@contextlib.contextmanager
def facts_of_run(directory: Path) -> Iterator[dict[str, Any]]:
    """Give what a run's config.json says; what the block finds missing or wrong in it is a DataError.

    Raises:
        UsageError: the directory holds no run.
        DataError: names the file.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise UsageError(no_run(directory))
    try:
        yield json.loads(path.read_text())
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged: {error}") from None


def read_history(directory: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return what a run's config.json says, and its steps' lines; of a run that is going on those there are.

    Raises:
        UsageError: the directory holds no run.
        DataError: a file in it is damaged.
    """
    with facts_of_run(directory) as facts:
        TrainConfig(**facts["config"])
        lines = metrics_until(directory / "metrics.jsonl", sys.maxsize)
        _ = facts["ranks"], facts["validation"], [(line["loss"], line["samples_per_s"]) for line in lines]
    return facts, lines


def no_run(directory: Path) -> str:
    """Return the line that says that a directory holds no run."""
    path = directory / "config.json"
    return f"{directory} holds no run: {path} does not exist; make one with minipar train --out {directory}"


def load_run(directory: Path) -> tuple[Model, TrainConfig, Vocabulary | None]:
    """Return a finished run's model, settings and vocabulary.

    Raises:
        UsageError: the directory holds no finished run.
        DataError: a file in it is damaged.
    """
    with facts_of_run(directory) as facts:
        config = TrainConfig(**facts["config"])
        vocabulary = Vocabulary.from_dict(facts["vocabulary"]) if facts["vocabulary"] else None
        model = build_model(config, facts["data"])
    state = gpt2.read_safetensors(directory / WEIGHTS)
    model.assign_paths()
    model.load_state_dict(gpt2.from_gpt2(state) if isinstance(model, GPT) else state)
    return model, config, vocabulary
