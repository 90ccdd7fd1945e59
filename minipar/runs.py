"""A run's directory: its settings, its metrics, its picture and its weights.

RUN/config.json         settings, layout, data facts, vocabulary, final validation
RUN/metrics.jsonl       one object a step: step loss grad_norm samples_per_s seconds
RUN/loss.png            the loss curve
RUN/layout.txt          on several ranks: the mesh, and what each of them holds of every parameter
RUN/partition.png       with --partition: what each device holds, by kind of layer
RUN/model.safetensors   the trained weights; a GPT's in GPT-2's layout
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from safetensors.numpy import save_file

from minipar.comm.guard import numbered
from minipar.config import TrainConfig
from minipar.data import Vocabulary
from minipar.errors import DataError, UsageError
from minipar.models import GPT, Model
from minipar.models import gpt2_weights as gpt2
from minipar.plot import loss_curves, partition_bars
from minipar.training import Job, StepRecord, build_model


class RunWriter:
    """Writes a run's directory; used by rank 0 only.

    Raises:
        UsageError: the directory cannot be made or written.
    """

    def __init__(self, directory: Path, job: Job):
        self.directory, self.job = directory, job
        metrics = directory / "metrics.jsonl"
        try:
            directory.mkdir(parents=True, exist_ok=True)
            kept = metrics_until(metrics, job.steps_done) if job.steps_done else []
            self._metrics: TextIO = metrics.open("w")
            self._metrics.writelines(json.dumps(line) + "\n" for line in kept)
            self._metrics.flush()
        except OSError as error:
            raise UsageError(f"--out {directory} cannot be written: {error.strerror}") from None
        known = [line["loss"] for line in kept]
        self.losses: list[float] = known if kept and kept[-1]["step"] == job.steps_done else []
        self.first = job.steps_done - len(self.losses) + 1  # the step of the first of them
        self._write_config(None)

    def _write_config(self, validation: dict[str, float] | None) -> None:
        vocabulary = self.job.data.vocabulary
        facts = {
            "config": self.job.config.to_dict(),
            "ranks": self.job.comm.size,
            "data": dict(self.job.data.info),
            "vocabulary": vocabulary.to_dict() if vocabulary else None,
            "validation": validation,
        }
        (self.directory / "config.json").write_text(json.dumps(facts, indent=2) + "\n")

    def layout(self, tables: Sequence[str]) -> None:
        """Write how the model lies on the ranks.

        Args:
            tables: each rank's; those of several ranks that are the same are written once.
        """
        parts = [str(self.job.mesh)]
        for table in dict.fromkeys(tables):
            parts.append(f"{numbered(r for r, other in enumerate(tables) if other == table)}\n{table}")
        (self.directory / "layout.txt").write_text("\n\n".join(parts) + "\n")
        if self.job.assignment is not None:
            partition_bars(self.job.assignment, self.directory / "partition.png")

    def add(self, record: StepRecord) -> None:
        """Append one step's line."""
        self.losses.append(record.loss)
        self._metrics.write(json.dumps(asdict(record)) + "\n")
        self._metrics.flush()  # so that a run can be watched, and a killed one keeps its history

    def finish(self, validation: dict[str, float], model: Model) -> None:
        """Write the weights, the picture and the final validation."""
        self._metrics.close()
        save_weights(model, self.directory / "model.safetensors")
        config = self.job.config
        title = f"{config.model} on {self.job.data.info['name']}, {self.job.comm.size} ranks"
        at = {self.job.steps_done: validation["loss"]}
        curves = {"training": self.losses}
        loss_curves(curves, self.directory / "loss.png", validation=at, title=title, first=self.first)
        self._write_config(validation)


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
    """Write a model's weights as safetensors; a GPT's in GPT-2's layout."""
    if isinstance(model, GPT):
        gpt2.save(model, path)
    else:
        save_file(model.state_dict(), path)


def load_run(directory: Path) -> tuple[Model, TrainConfig, Vocabulary | None]:
    """Return a finished run's model, settings and vocabulary.

    Raises:
        UsageError: the directory holds no finished run.
        DataError: a file in it is damaged.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise UsageError(
            f"{directory} holds no run: {path} does not exist; make one with minipar train --out {directory}"
        )
    try:
        facts: dict[str, Any] = json.loads(path.read_text())
        config = TrainConfig(**facts["config"])
        vocabulary = Vocabulary.from_dict(facts["vocabulary"]) if facts["vocabulary"] else None
        model = build_model(config, facts["data"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged: {error}") from None
    state = gpt2.read_safetensors(directory / "model.safetensors")
    model.assign_paths()
    model.load_state_dict(gpt2.from_gpt2(state) if isinstance(model, GPT) else state)
    return model, config, vocabulary
