"""What the commands do, as functions of settings and a communicator: the same on threads and under MPI."""

from __future__ import annotations

import math
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np

from minipar.agreement import agreed
from minipar.amp import PrecisionPolicy
from minipar.comm.guard import numbered
from minipar.comm.interface import Communicator
from minipar.commands.report import console, progress, say, verify_table
from minipar.config import TrainConfig
from minipar.data import Data, Vocabulary
from minipar.errors import UsageError
from minipar.files import replacing, told
from minipar.models import GPT, Model, generate
from minipar.parallel.pipeline.resolve import DEFAULT_SCHEDULE
from minipar.parallel.strategies.layers import Layers
from minipar.parallel.strategies.pipelined import Pipelined
from minipar.planner.fullest import fullest, whole_batch
from minipar.plot import memory_bars
from minipar.resume import Saving, check_can_save
from minipar.runs import WEIGHTS, RunWriter
from minipar.stopping import StopRequest
from minipar.trace import recording
from minipar.traces.record import RunRecorder
from minipar.training import Job, fitting_axes
from minipar.verification import verify
from minipar.weights import written_model

MEMORY = "memory.png"


def run_training(
    config: TrainConfig,
    comm: Communicator,
    out: Path,
    saving: Saving | None = None,
    resuming: bool = False,
    tracing: bool = False,
    stop: StopRequest | None = None,
) -> None:
    """Train, write the run's directory and print what came of it. Rank 0 prints and writes.

    Args:
        saving: when to save checkpoints; None for never.
        resuming: go on from the newest checkpoint.
        tracing: record the first steps, see `traces.record`.
        stop: asked to stop, the run ends after its step; it saves a checkpoint where it has `saving`, and goes
            on as if this had been the last step where it has not.
    """
    fitting_axes(config, comm.size)
    recorder = RunRecorder(comm, out) if tracing else None
    if recorder is not None:
        comm = recorder.comm
    job = Job(config, comm)
    master = comm.rank == 0
    stop = stop or StopRequest()
    start: dict[str, str] = {}
    if saving is not None:
        check_can_save(job)
        if resuming:
            path = saving.resume(job)
            start = {"resumed": f"{path}, step {job.steps_done} of {config.steps}"}
        else:
            saving.check_fresh(comm)
    writer = agreed(comm, lambda: RunWriter(out, job) if master else None)
    screen = console()
    if master:
        n = sum(math.prod(p.global_shape) for p in job.model.parameters())
        say(screen, {
            "model": f"{config.model}, {n:,} parameters, {precision_of(config)}",
            "data": f"{job.data.info['name']}, {len(job.data.train):,} training samples",
            "ranks": ranks_of(job),
            **start,
        })  # fmt: skip
    if comm.size > 1:
        show_layout(job, writer)
    if master and comm.size > len(job.data.train):
        screen.print(
            f"more ranks ({comm.size}) than training samples ({len(job.data.train)}): some stay idle"
        )
    records, stopping, saved = job.train(), False, None
    with recording(recorder.trace if recorder else None):
        for record in progress(records, config.steps or 0, screen) if master else records:
            if writer and not writer.add(record):
                stop.asked = True  # the ranks stop together, and save what they have; `check` tells why
            stopping = stop.agreed(comm) and job.steps_done < (config.steps or 0)
            saved = saving.after(job, stopping) if saving else None
            if recorder:
                recorder.after_step(facts_of(job))
            if stopping:
                break
    agreed(comm, lambda: writer.check() if writer else None)
    if recorder:
        recorder.finish(facts_of(job))
    if stopping:
        if master:
            screen.print(stopped_line(job, saved), markup=False, soft_wrap=True)
        if saved:
            return
    validation = job.evaluate()
    agreed(comm, lambda: conclude(writer, job, validation))
    memory = draw_memory(job, out) if tracing else ""
    if master and config.amp == "fp16":
        scaler = job.precision.scaler
        say(screen, {"loss scale": f"{scaler.get_scale():g}, {job.precision.skipped} steps skipped"})
    if writer:
        seconds = job.seconds_done
        say(screen, {
            "": "",
            "validation": f"loss {validation['loss']:.3f} nats, accuracy {validation['accuracy']:.1%}",
            "time": f"{seconds:.0f} s, {job.samples_done / seconds:,.0f} samples/s",
            "loss curve": out / "loss.png",
            "weights": out / WEIGHTS,
            **({"trace": recorder.summary(), "memory": memory} if recorder else {}),
        })  # fmt: skip
        if config.model == "gpt":
            screen.print("\nsample of what it writes:\n")
            prompt = sample_prompt(job.data)
            screen.print(
                continue_text(
                    written_model(job, out / WEIGHTS), job.data.vocabulary, prompt, 300, 0.8, None, config.seed
                ),
                markup=False,
            )


def draw_memory(job: Job, out: Path) -> str:
    """Draw what each rank of a job that has trained holds at its fullest, by kind; return where to. Collective.

    One more batch runs forward and backward, and no step is taken: so this comes when all else is done.

    Raises:
        WriteFailed: on every rank.
    """
    if isinstance(job.strategy, Layers):
        return "not counted where a policy places whole layers: they run forward and backward in one go"
    ranks = job.comm.all_gather_object(vars(fullest(job, whole_batch(job))))
    picture = out / MEMORY

    def draw() -> None:
        with told(picture), replacing(picture) as path:
            memory_bars({f"rank {rank}": kinds for rank, kinds in enumerate(ranks)}, path, title=run_text(job))

    agreed(job.comm, draw if job.comm.rank == 0 else lambda: None)
    return str(picture)


def stopped_line(job: Job, saved: Path | None) -> str:
    """Return what to tell of a run that was asked to stop."""
    at = f"stopped by SIGTERM after step {job.steps_done} of {job.config.steps}"
    if saved is None:
        return f"{at}; without --checkpoint it cannot go on later, so it ends here as a finished run"
    return f"{at}, saved {saved}; to go on, give the same command with --resume"


def conclude(writer: RunWriter | None, job: Job, validation: dict[str, float]) -> None:
    """Write what a run leaves behind; print a precision policy's decisions, each with its reason. Collective.

    Raises:
        WriteFailed: on rank 0, once every rank has brought what it holds.
    """
    weights = job.strategy.tensors()
    try:
        if writer is not None:
            report(writer, job.precision.policy)
            writer.finish(validation, weights)
    finally:
        deque(weights, maxlen=0)  # what rank 0 does not write, be it all


def report(writer: RunWriter, policy: PrecisionPolicy | None) -> None:
    """Print a precision policy's decisions, each with its reason, and draw what they rest on."""
    if policy is not None and policy.observing:
        steps = policy.config.observe
        console().print(f"precision policy: undecided, it needs {steps} steps without overflow")
    elif policy is not None:
        console().print(policy.table(), markup=False, soft_wrap=True)
        writer.draw_policy(policy)


def precision_of(config: TrainConfig) -> str:
    """Return the precision in words."""
    return f"{config.dtype}" if config.amp == "off" else f"{config.amp} with {config.dtype} master weights"


def sample_prompt(data: Data) -> str:
    """Return "The ", or the validation text's first characters where the vocabulary lacks one of those."""
    vocabulary, usual = data.vocabulary, "The "
    assert vocabulary is not None
    if set(usual) <= set(vocabulary.characters):
        return usual
    first, _ = data.valid.fetch(np.array([0]))
    return vocabulary.decode(first[0][: len(usual)])


def ranks_of(job: Job) -> str:
    """Return how many ranks there are and how they work together, in words."""
    return f"{job.comm.size}" + (f", {job.layout()}" if job.layout() else "")


def show_layout(job: Job, writer: RunWriter | None) -> None:
    """Print the mesh, a partition's table and the bytes of parameters by rank; rank 0 writes the rest down.

    Collective. RUN/layout.txt has every rank's table of parameters, RUN/partition.png the partition's bars.
    """
    sizes: list[int] = job.comm.all_gather_object(job.strategy.parameter_bytes())
    tables: list[str] = job.comm.all_gather_object(str(job.strategy))
    agreed(job.comm, lambda: writer.layout(tables) if writer else None)
    if writer is None:
        return
    screen = console()
    screen.print(str(job.mesh), markup=False, soft_wrap=True)
    if job.assignment is not None:
        screen.print(job.assignment.table())
    held = [(numbered(r for r, other in enumerate(sizes) if other == size), size) for size in dict.fromkeys(sizes)]
    say(screen, {"held": ", ".join(f"{size:,} bytes of parameters on {ranks}" for ranks, size in held)})


def run_text(job: Job) -> str:
    """Return what ran in a line: "gpt on ranks 4, dp 2 × tp 2"."""
    return f"{job.config.model} on ranks {ranks_of(job)}"


def facts_of(job: Job) -> dict[str, Any]:
    """Return what a trace says of the run that it was taken from."""
    piped = job.strategy.executor if isinstance(job.strategy, Pipelined) else None
    return {
        "run": run_text(job),
        "microbatches": None if piped is None else piped.microbatches,
        "schedule": None if piped is None else job.config.schedule or DEFAULT_SCHEDULE,
    }


def run_verification(config: TrainConfig, comm: Communicator) -> bool:
    """Compare the parallel run with the serial one, print the table (rank 0), return whether it holds."""
    report = verify(config, comm)
    if comm.rank == 0:
        how = f" ({report.layout})" if report.layout else ""
        what = f"{config.model} on {comm.size} ranks{how} against serial, {config.steps} SGD steps"
        console().print(verify_table(report, f"{what}, {precision_of(config)}"))
    return report.holds


def continue_text(
    model: Model,
    vocabulary: Vocabulary | None,
    prompt: str,
    tokens: int,
    temperature: float,
    top_k: int | None,
    seed: int,
) -> str:
    """Return `prompt` and `tokens` more characters from a GPT.

    Raises:
        UsageError: the model is no GPT, or the prompt is empty or has a character it never saw.
    """
    if not isinstance(model, GPT) or vocabulary is None:
        raise UsageError("generate: this run's model is no GPT on text")
    ids = vocabulary.encode(prompt)
    options: dict[str, Any] = dict(temperature=temperature, top_k=top_k, seed=seed, vocab=len(vocabulary))
    return vocabulary.decode(generate(model, ids, tokens, **options))
