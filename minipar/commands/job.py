"""What the commands do, as functions of settings and a communicator: the same on threads and under MPI."""

from __future__ import annotations

import math
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np

from minipar.agreement import agreed
from minipar.amp import PrecisionPolicy
from minipar.comm.interface import Communicator
from minipar.comm.launcher import available_cores
from minipar.commands.report import console, progress, say, verify_table
from minipar.config import TrainConfig
from minipar.data import Data, Vocabulary
from minipar.errors import UsageError
from minipar.mesh import Mesh
from minipar.models import GPT, Model, generate
from minipar.plot import precision_histograms
from minipar.resume import Saving, check_can_save, resume
from minipar.runs import WEIGHTS, RunWriter, written_model
from minipar.stopping import StopRequest
from minipar.trace import recording
from minipar.traces.record import RunRecorder
from minipar.training import Job
from minipar.verification import verify


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
    recorder = RunRecorder(comm, out) if tracing else None
    if recorder is not None:
        comm = recorder.comm
    job = Job(config, comm)
    master = comm.rank == 0
    start: dict[str, str] = {}
    if saving is not None:
        check_can_save(job)
        if resuming:
            path = resume(job, saving.directory)
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
            "ranks": layout_of(config, job.mesh),
            **start,
        })  # fmt: skip
        if comm.size > len(job.data.train):
            screen.print(
                f"more ranks ({comm.size}) than training samples ({len(job.data.train)}): some stay idle"
            )
    records, stopping, saved = job.train(), False, None
    with recording(recorder.trace if recorder else None):
        for record in progress(records, config.steps or 0, screen) if master else records:
            if writer:
                writer.add(record)
            stopping = stop is not None and stop.agreed(comm) and job.steps_done < (config.steps or 0)
            saved = saving.after(job, stopping) if saving else None
            if recorder:
                recorder.after_step(facts_of(config, job.mesh))
            if stopping:
                break
    if recorder:
        recorder.finish(facts_of(config, job.mesh))
    if stopping:
        if master:
            screen.print(stopped_line(job, saved), markup=False, soft_wrap=True)
        if saved:
            return
    validation = job.evaluate()
    weights = job.strategy.tensors()
    if writer:
        writer.finish(validation, weights)
    else:
        deque(weights, maxlen=0)  # every rank brings what it holds
    if master and config.amp == "fp16":
        scaler = job.precision.scaler
        say(screen, {"loss scale": f"{scaler.get_scale():g}, {job.precision.skipped} steps skipped"})
    if master and job.precision.policy is not None:
        report_policy(job.precision.policy, out)
    if writer:
        seconds = job.seconds_done
        say(screen, {
            "": "",
            "validation": f"loss {validation['loss']:.3f} nats, accuracy {validation['accuracy']:.1%}",
            "time": f"{seconds:.0f} s, {job.steps_done * (config.batch or 0) / seconds:,.0f} samples/s",
            "loss curve": out / "loss.png",
            "weights": out / WEIGHTS,
            **({"trace": f"{out / 'gantt.png'}; minipar trace show {out} says more"} if tracing else {}),
        })  # fmt: skip
        if config.model == "gpt":
            screen.print("\nsample of what it writes:\n")
            prompt = sample_prompt(job.data)
            screen.print(
                continue_text(
                    written_model(job, out), job.data.vocabulary, prompt, 300, 0.8, None, config.seed
                ),
                markup=False,
            )


def stopped_line(job: Job, saved: Path | None) -> str:
    """Return what to tell of a run that was asked to stop."""
    at = f"stopped by SIGTERM after step {job.steps_done} of {job.config.steps}"
    if saved is None:
        return f"{at}; without --checkpoint it cannot go on later, so it ends here as a finished run"
    return f"{at}, saved {saved}; to go on, give the same command with --resume"


def report_policy(policy: PrecisionPolicy, out: Path) -> None:
    """Print each parameter's precision with its reason, and draw what they rest on into RUN/precision.png."""
    if policy.observing:
        steps = policy.config.observe
        console().print(f"precision policy: undecided, it needs {steps} steps without overflow")
        return
    console().print(policy.table(), markup=False, soft_wrap=True)
    precision_histograms(policy, out / "precision.png")


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


def layout_of(config: TrainConfig, mesh: Mesh) -> str:
    """Return the layout in words: ranks, axes, and what else is on."""
    axes = [f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1]
    extras = [config.aggregation] if config.aggregation != "all_reduce" else []
    extras += ["sequence parallel"] if config.sequence_parallel else []
    extras += [f"ZeRO {config.zero}"] if config.zero else []
    extras += [f"partition by {config.partition}"] if config.partition else []
    return f"{mesh.world.size}" + "".join(f", {part}" for part in [" × ".join(axes), *extras] if part)


def facts_of(config: TrainConfig, mesh: Mesh) -> dict[str, Any]:
    """Return what a trace says of the run that it was taken from."""
    stages = config.pp > 1
    return {
        "run": f"{config.model} on ranks {layout_of(config, mesh)}",
        "cores": available_cores(),
        "microbatches": (config.microbatches or 2 * config.pp) if stages else None,
        "schedule": (config.schedule or "1f1b") if stages else None,
    }


def run_verification(config: TrainConfig, comm: Communicator) -> bool:
    """Compare the parallel run with the serial one, print the table (rank 0), return whether it holds."""
    report = verify(config, comm)
    if comm.rank == 0:
        what = f"{config.model} on {comm.size} ranks against serial, {config.steps} SGD steps"
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
    return vocabulary.decode(generate(model, ids, tokens, temperature=temperature, top_k=top_k, seed=seed))
