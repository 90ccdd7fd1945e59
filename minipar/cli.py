"""The `minipar` command: its subcommands and their options; what they do is in `minipar.commands`.

Every command runs alone, on ranks within this process (`--ranks N`), or on the ranks of the MPI job that it
finds itself in (`minipar run -n N …`, `mpirun -n N …`).
"""

from __future__ import annotations

import functools
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

import minipar
from minipar.agreement import agreed
from minipar.backend import keep_freed_memory, return_freed_memory
from minipar.comm import world
from minipar.commands.checkpoint import checkpoint_app
from minipar.commands.lessons import grade, lessons, start
from minipar.commands.options import config_options
from minipar.commands.planner import calibrate, plan
from minipar.commands.program import Commands, from_command_line, on_ranks, refuse_inside_job
from minipar.commands.trace import trace_app
from minipar.config import DEFAULTS, VERIFY_DEFAULTS, TrainConfig
from minipar.errors import UsageError

app = typer.Typer(
    name="minipar",
    cls=Commands,
    help="Train a serial model in parallel, and prove that nothing changed but the time it takes.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.add_typer(checkpoint_app, name="checkpoint")
app.add_typer(trace_app, name="trace")

Ranks = Annotated[
    int | None, typer.Option(help="ranks inside this process; under mpirun the job's ranks are used")
]


@app.command()
@config_options(DEFAULTS)
def train(
    config: TrainConfig,
    ranks: Ranks = None,
    out: Annotated[Path, typer.Option(help="directory for settings, metrics, picture and weights")] = Path(
        "runs/last"
    ),
    checkpoint: Annotated[Path | None, typer.Option(help="save checkpoints into this directory")] = None,
    every: Annotated[int | None, typer.Option(help="steps between checkpoints \\[default: 100]")] = None,
    keep: Annotated[int | None, typer.Option(help="how many of the newest checkpoints stay \\[default: 3]")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on from the newest of --checkpoint")] = False,
    trace: Annotated[bool, typer.Option("--trace", help="record what every rank does in the first 20 steps")] = False,
) -> None:
    """Train a model on real data.

    Example: minipar train gpt --data docs --ranks 2 --steps 300 --out runs/gpt
    Example: minipar train gpt --ranks 4 --tp 2 --checkpoint runs/gpt/checkpoints --every 50 --resume
    """
    from minipar.commands.checkpoint import saving_of
    from minipar.commands.job import run_training
    from minipar.stopping import StopRequest

    with from_command_line():
        settings = config.resolved()
        saving = saving_of(checkpoint, every, keep, resume)
    if settings.zero == 3:
        return_freed_memory()
    else:
        keep_freed_memory()
    with StopRequest() as stop:
        on_ranks(ranks, lambda comm: run_training(settings, comm, out, saving, resume, trace, stop))


@app.command()
@config_options(VERIFY_DEFAULTS, optimizer="sgd", dtype=None, device="cpu")
def verify(config: TrainConfig, ranks: Ranks = None) -> None:
    """Prove that parallel training equals serial training: every loss, gradient and weight, at every step.

    Outside an MPI job it runs on 2 ranks unless --ranks says otherwise.

    Example: minipar verify gpt --ranks 4
    """
    from minipar.commands.job import run_verification

    with from_command_line():
        settings = config.resolved(VERIFY_DEFAULTS)
    if not on_ranks(ranks, lambda comm: run_verification(settings, comm), default=2):
        raise typer.Exit(1)


@app.command(
    context_settings={
        "allow_extra_args": True,
        "ignore_unknown_options": True,
        "allow_interspersed_args": False,
    }
)
def run(
    context: typer.Context,
    ranks: Annotated[int, typer.Option("-n", "--ranks", help="MPI ranks to start")],
    timeout: Annotated[float | None, typer.Option(help="seconds after which the job is killed")] = None,
    hostfile: Annotated[
        Path | None, typer.Option(help="hosts to run on, one HOST:RANKS a line; see docs/clusters.md")
    ] = None,
    latency: Annotated[
        str | None, typer.Option(help="imitate a network: time a message takes, as 1ms; see --node-size")
    ] = None,
    bandwidth: Annotated[str | None, typer.Option(help="and bytes it carries, as 100MB/s")] = None,
    node_size: Annotated[
        int | None, typer.Option(help="ranks of a node; then give two of each, inside and between: 10us,1ms")
    ] = None,
    program: Annotated[str, typer.Argument(help="a script, or a minipar command with its options")] = "",
) -> None:
    """Start a script or a minipar command on N MPI ranks: this environment's mpirun, one BLAS thread a rank.

    Example: minipar run -n 4 verify gpt
    Example: minipar run -n 4 my_script.py --option value
    """
    from minipar.comm.launcher import run_mpi
    from minipar.comm.slow import network_environment
    from minipar.commands.report import TERMINAL

    with from_command_line():
        refuse_inside_job("run")
        if ranks < 1:
            raise UsageError(f"run: -n is {ranks}, it must be at least 1")
        if timeout is not None and not timeout > 0:
            raise UsageError(f"run: --timeout is {timeout:g}, it must be more than 0 seconds")
        commands = {c.name or c.callback.__name__ for c in app.registered_commands if c.callback} - {
            "run", "doctor", "plan", "lessons", "start", "grade",
        }  # fmt: skip
        words = [program, *context.args]
        if program == "minipar":
            words = words[1:]
        if words and words[0] in commands:
            command = [sys.executable, "-m", "minipar", *words]
        elif Path(program).is_file():
            command = [sys.executable, *words]
        else:
            known = ", ".join(sorted(commands))
            raise UsageError(f"run: {program!r} is neither a file nor a command that runs on ranks ({known})")
        env = {**os.environ, "PYTHONUNBUFFERED": "1", **network_environment(latency, bandwidth, node_size)}
        if sys.stdout.isatty():
            env[TERMINAL] = str(shutil.get_terminal_size().columns)
        if hostfile is not None and not hostfile.is_file():
            raise UsageError(f"run: --hostfile {hostfile} is no file")
        code = run_mpi(command, ranks, timeout=timeout, env=env, hostfile=str(hostfile) if hostfile else None)
    raise typer.Exit(code)


@app.command()
def generate(
    directory: Annotated[Path, typer.Argument(metavar="RUN", help="directory of a finished run")],
    prompt: Annotated[str, typer.Option(help="text to go on from")] = "The ",
    tokens: Annotated[int, typer.Option(help="how many characters to add")] = 300,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest; 1: as the model thinks")] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="choose among the k likeliest only")] = None,
    seed: Annotated[int, typer.Option(help="seed of the choice")] = 0,
) -> None:
    """Let a trained GPT go on from a prompt.

    Example: minipar generate runs/last --prompt "The " --tokens 200
    """
    from minipar.commands.job import continue_text
    from minipar.runs import load_run

    def work() -> str:
        if tokens < 0:
            raise UsageError(f"--tokens is {tokens}, it must not be negative")
        model, _, vocabulary = load_run(directory)
        return continue_text(model, vocabulary, prompt, tokens, temperature, top_k, seed)

    with from_command_line():
        comm = world()
    text = agreed(comm, work)
    if comm.rank == 0:
        typer.echo(text)


@app.command()
def compare(
    directories: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="directories of runs, going on or finished")
    ],
    png: Annotated[
        Path, typer.Option(help="draw the loss curves here, and speed over ranks beside it, as …-scaling")
    ] = Path("compare.png"),
) -> None:
    """Put runs side by side: a table, their loss curves in one picture, and how their speed scales with ranks.

    Example: minipar compare runs/one runs/two --png compare.png
    """
    from minipar.commands.compare import compare_command

    with from_command_line():
        comm = world()
    agreed(comm, lambda: compare_command(directories, png) if comm.rank == 0 else None)


@app.command()
def schedule(
    name: Annotated[
        str, typer.Argument(help="naive, gpipe, 1f1b, interleaved, zb-h1, or a CSV file of your own")
    ],
    stages: Annotated[
        int | None, typer.Option("-p", "--stages", help="ranks of the pipeline \\[default: 4]")
    ] = None,
    microbatches: Annotated[
        int | None, typer.Option("-m", "--microbatches", help="pieces of the batch \\[default: 8]")
    ] = None,
    chunks: Annotated[int | None, typer.Option(help="virtual stages a rank, for interleaved")] = None,
    costs: Annotated[str | None, typer.Option(help="times F,I,W or F,I,W,message \\[default: 1,1,1,0]")] = None,
    csv: Annotated[Path | None, typer.Option(help="write the schedule here, a line a stage")] = None,
    png: Annotated[Path | None, typer.Option(help="draw the timeline here")] = None,
) -> None:
    """Look at a pipeline schedule: its timeline, bubble and live activations, beside the papers' formulas.

    Example: minipar schedule zb-h1 -p 4 -m 8 --png zb.png
    """
    from minipar.commands.schedule import schedule_command

    with from_command_line():
        if world().rank == 0:
            schedule_command(name, stages, microbatches, chunks, costs, csv, png)


@app.command()
def doctor() -> None:
    """Look at everything a parallel run needs, and say what to do about what is wrong.

    Example: minipar doctor
    """
    from minipar.commands.report import console, doctor_table
    from minipar.doctor import examine

    with from_command_line():
        refuse_inside_job("doctor")
    findings = examine()
    console().print(doctor_table(findings))
    if not all(f.well for f in findings):
        raise typer.Exit(1)


def outside_jobs(command: Callable[..., None], refused: bool = True) -> Callable[..., None]:
    """Let a command's errors be told once, and itself be refused on the ranks of an MPI job."""

    @functools.wraps(command)
    def refusing(*args: Any, **options: Any) -> None:
        with from_command_line():
            if refused:
                refuse_inside_job(command.__name__)
            command(*args, **options)

    return refusing


for command in (lessons, start, grade, plan):
    app.command()(outside_jobs(command))
app.command()(outside_jobs(calibrate, refused=False))


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"minipar {minipar.__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    """Train a serial model in parallel, and prove that nothing changed but the time it takes."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main() -> None:
    """Entry point of the console script."""
    app()
