"""A training job's checkpoints: what is saved of it, when, and which settings a resumed run must share.

    saving = Saving(Path("checkpoints"), every=100, keep=3)
    saving.resume(job)                            # or not, for a fresh run
    for record in job.train():
        saving.after(job)                         # saves after every 100th step and after the last

Randomness is a function of (seed, step, …) and the learning rate one of the step, so a checkpoint holds
neither a generator's state nor a schedule's: the step, the data position, the loss scale and what a precision
policy has counted are all there is beside tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minipar.agreement import agreed, on_every_rank
from minipar.checkpoint import (
    PARAMETER,
    Manifest,
    Reader,
    as_plain,
    checkpoints,
    load,
    newest,
    open_checkpoint,
    save,
)
from minipar.checkpoint.folder import is_checkpoint, step_of
from minipar.checkpoint.manifest import BUFFER
from minipar.comm.interface import Communicator
from minipar.config import TrainConfig
from minipar.errors import DataError, UsageError
from minipar.models import Model
from minipar.training import Job, build_model

# Settings that say how a run is spread over ranks, not what it computes; and how long it is, which may grow.
FREE = {
    "device", "dp", "tp", "pp", "schedule", "microbatches", "chunks", "tiles", "recompute", "sequence_parallel",
    "convolution", "zero", "partition", "devices", "speeds", "memory", "aggregation", "average_every", "bucket_mb",
    "overlap", "accumulate", "steps",
}  # fmt: skip


@dataclass(frozen=True)
class Saving:
    """When a run saves, and what it keeps.

    Attributes:
        directory: of the run's checkpoints; or one checkpoint to go on from, and then the run saves beside it.
        every: steps from one to the next; the last step is always saved.
        keep: the newest so many stay.

    Raises:
        UsageError: numbers below 1.
    """

    directory: Path
    every: int = 100
    keep: int = 3

    def __post_init__(self) -> None:
        for name, value in (("every", self.every), ("keep", self.keep)):
            if value < 1:
                raise UsageError(f"--{name} is {value}, it must be at least 1")

    @property
    def place(self) -> Path:
        """The directory into which checkpoints go."""
        return self.directory.resolve().parent if is_checkpoint(self.directory) else self.directory

    def check_fresh(self, comm: Communicator) -> None:
        """Refuse to begin a run in a directory that holds, or is, another run's checkpoint. Collective."""

        def look() -> None:
            what = f"--checkpoint {self.directory}"
            if is_checkpoint(self.directory):
                raise UsageError(f"{what} names one checkpoint: go on from it with --resume, or give another directory")
            found = checkpoints(self.directory)
            if found:
                raise UsageError(
                    f"{what} holds {found[-1].name} already: go on from it with --resume, or give another directory"
                )

        agreed(comm, look)

    def resume(self, job: Job) -> Path:
        """Give a fresh job the state of the checkpoint to go on from; return that one's path. Collective.

        Raises:
            UsageError: as `resume`; or it is one checkpoint, and later ones stand in the way of the run's own.
            DataError: a damaged file; names it.
        """
        path = resume(job, self.directory)

        def look() -> None:
            later = [p for p in checkpoints(self.place) if step_of(p) > job.steps_done]
            if later:
                raise UsageError(
                    f"--checkpoint {self.directory} is of step {job.steps_done}, and {self.place} holds"
                    f" {later[-1].name} already: go on from the newest with --checkpoint {self.place}, or remove"
                    " the later ones, or copy this one into a directory of its own"
                )

        agreed(job.comm, look)
        return path

    def after(self, job: Job, stopping: bool = False) -> Path | None:
        """Save if it is time, or the run stops here; return the checkpoint's path. Collective, after a step."""
        if stopping or job.steps_done % self.every == 0 or job.steps_done == job.config.steps:
            return self.save(job)
        return None

    def save(self, job: Job) -> Path:
        """Save now and return the checkpoint's path. Collective; call it between two steps."""
        job.comm.mark(phase="checkpoint")
        return save_job(job, self.place, self.keep)


def check_can_save(job: Job) -> None:
    """Refuse a job whose state a checkpoint does not hold.

    Raises:
        UsageError: names the setting and the reason.
    """
    if job.strategy.own_mean:
        raise on_every_rank(UsageError(
            "--checkpoint with --aggregation local is refused: every rank has weights and moments of its own there,"
            " a checkpoint holds one state; use all_reduce or master"
        ))  # fmt: skip


def save_job(job: Job, directory: Path, keep: int | None = None) -> Path:
    """Save a job between two steps; return the checkpoint's path. Collective.

    Raises:
        UsageError: a job that cannot be saved, or a checkpoint of this step exists.
        SaveFailed: it cannot be written; earlier checkpoints are untouched.
    """
    check_can_save(job)
    c = job.config
    layout = {"ranks": job.comm.size, **job.mesh.shape, "zero": c.zero, "partition": c.partition}
    return save(
        directory, job.steps_done, job.comm, job.strategy, job.optimizer, keep=keep,
        config=as_plain(c.to_dict()), layout=layout, scalars=as_plain(_scalars(job)),
    )  # fmt: skip


def _scalars(job: Job) -> dict[str, Any]:
    return {
        "loader": job.loader.state_dict(),
        "scaler": job.precision.scaler.state_dict(),
        "skipped": job.precision.skipped,
        "policy": job.precision.policy_state(),
        "lr": job.optimizer.param_groups[0]["lr"],
        "seconds": job.seconds_done,
        "data": _data_facts(job),
    }


def _data_facts(job: Job) -> dict[str, Any]:
    vocabulary = job.data.vocabulary
    facts: dict[str, Any] = as_plain(
        {**job.data.info, "vocabulary": vocabulary.to_dict() if vocabulary is not None else None}
    )
    return facts


def resume(job: Job, directory: Path) -> Path:
    """Give a fresh job the state of the newest complete checkpoint; return that one's path. Collective.

    Args:
        directory: of checkpoints, or one checkpoint.

    Raises:
        UsageError: no checkpoint, or one of another run: names the settings that differ.
        DataError: a damaged file; names it.
    """
    check_can_save(job)
    path = agreed(job.comm, lambda: newest(directory))
    manifest = open_checkpoint(path, job.comm)
    agreed(job.comm, lambda: _check_same_run(path, manifest, job))
    load(path, manifest, job.comm, job.strategy, job.optimizer)
    saved = manifest.scalars
    job.loader.load_state_dict(saved["loader"])
    job.precision.scaler.load_state_dict(saved["scaler"])
    job.precision.skipped = saved["skipped"]
    agreed(job.comm, lambda: job.precision.load_policy_state(saved.get("policy")))
    job.optimizer.set_lr(saved["lr"])
    job.steps_done, job.seconds_done = manifest.step, saved["seconds"]
    return path


def _check_same_run(path: Path, manifest: Manifest, job: Job) -> None:
    """Refuse to go on from a checkpoint of another run."""
    here = as_plain(job.config.to_dict())
    there = {**as_plain(TrainConfig().to_dict()), **manifest.config}  # settings that came later have their default
    wrong = [
        f"--{name.replace('_', '-')} {there.get(name)} (now {here.get(name)})"
        for name in here.keys() | there.keys()
        if name not in FREE and here.get(name) != there.get(name)
    ]
    if wrong:
        raise UsageError(f"checkpoint {path} is of another run: {', '.join(sorted(wrong))}; give that run's settings")
    missing = {"loader", "scaler", "skipped", "lr", "seconds", "data", "optimizer"} - manifest.scalars.keys()
    if missing:
        raise DataError(f"checkpoint {path} is no training job's: it lacks {', '.join(sorted(missing))}")
    facts, saved = _data_facts(job), manifest.scalars["data"]
    differing = sorted(key for key in facts.keys() | saved.keys() if facts.get(key) != saved.get(key))
    if differing:
        raise UsageError(f"checkpoint {path} is of other data: {', '.join(differing)} differ; train on the same data")
    if manifest.step > (job.config.steps or 0):
        raise UsageError(
            f"checkpoint {path} is of step {manifest.step}, beyond --steps {job.config.steps}: give more steps"
        )


def saved_model(path: Path, manifest: Manifest) -> Model:
    """Return the serial model with the weights of a training job's checkpoint.

    Args:
        manifest: what `open_checkpoint` returned.

    Raises:
        DataError: the checkpoint is no training job's.
    """
    try:
        config = TrainConfig(**manifest.config)
        model = build_model(config, manifest.scalars["data"])
    except (KeyError, TypeError) as error:
        raise DataError(f"checkpoint {path} is no training job's: {error}") from None
    kinds = manifest.kinds()
    with Reader(path) as reader:
        tensors = {**kinds[PARAMETER], **kinds.get(BUFFER, {})}
        state = {name: reader.tensor(entry) for name, entry in tensors.items()}
    model.assign_paths()
    model.load_state_dict(state)
    return model
