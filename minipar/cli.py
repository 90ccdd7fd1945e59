"""The `minipar` command: train, verify, run, generate, doctor.

Every command runs alone, on ranks within this process (`--ranks N`), or on the ranks of the MPI job that it
finds itself in (`minipar run -n N …`, `mpirun -n N …`).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

import minipar
from minipar.backend import keep_freed_memory
from minipar.comm import launch, world
from minipar.comm.interface import Communicator
from minipar.config import DEFAULTS, VERIFY_DEFAULTS, TrainConfig
from minipar.errors import MiniparError, UsageError
from minipar.options import config_options

app = typer.Typer(
    name="minipar",
    help="Train a serial model in parallel, and prove that nothing changed but the time it takes.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Ranks = Annotated[int | None, typer.Option(help="ranks inside this process; under mpirun the job's ranks are used")]


@contextlib.contextmanager
def reported() -> Iterator[None]:
    """Turn an error meant for the user into one line and an exit code; under MPI the job's own hook does."""
    try:
        yield
    except MiniparError as error:
        if world().size > 1:
            raise
        typer.echo(f"minipar: {error}", err=True)
        raise typer.Exit(error.exit_code) from None


def on_ranks(ranks: int | None, work: Callable[[Communicator], Any]) -> Any:
    """Run `work` on the MPI job's ranks if this is one, else on `ranks` threads; return rank 0's result."""
    here = world()
    if here.size > 1:
        if ranks not in (None, here.size):
            raise UsageError(f"--ranks {ranks} inside an MPI job of {here.size}: leave it out, or start {ranks} ranks")
        return work(here)
    if ranks is not None and ranks < 1:
        raise UsageError(f"--ranks is {ranks}, it must be at least 1")
    return launch(lambda: work(world()), ranks)[0] if ranks and ranks > 1 else work(here)


@app.command()
@config_options(DEFAULTS)
def train(
    config: TrainConfig,
    ranks: Ranks = None,
    out: Annotated[Path, typer.Option(help="directory for settings, metrics, picture and weights")] = Path("runs/last"),
) -> None:
    """Train a model on real data.

    Example: minipar train gpt --data docs --ranks 2 --steps 300 --out runs/gpt
    """
    from minipar.job import run_training

    with reported():
        settings = config.resolved()
        keep_freed_memory()
        on_ranks(ranks, lambda comm: run_training(settings, comm, out))


@app.command()
@config_options(VERIFY_DEFAULTS, optimizer="sgd", dtype="float64", device="cpu")
def verify(config: TrainConfig, ranks: Ranks = None) -> None:
    """Prove that parallel training equals serial training: every loss, gradient and weight, at every step.

    Example: minipar verify gpt --ranks 4
    """
    from minipar.job import run_verification

    with reported():
        settings = config.resolved(VERIFY_DEFAULTS)
        holds = on_ranks(ranks, lambda comm: run_verification(settings, comm))
    if not holds:
        raise typer.Exit(1)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False}
)
def run(
    context: typer.Context,
    ranks: Annotated[int, typer.Option("-n", "--ranks", help="MPI ranks to start")],
    timeout: Annotated[float | None, typer.Option(help="seconds after which the job is killed")] = None,
    program: Annotated[str, typer.Argument(help="a script, or a minipar command with its options")] = "",
) -> None:
    """Start a script, or a minipar command, on N MPI ranks: this environment's mpirun, one BLAS thread a rank.

    Example: minipar run -n 4 verify gpt
    Example: minipar run -n 4 my_script.py --option value
    """
    from minipar.comm.launcher import run_mpi
    from minipar.report import TERMINAL

    with reported():
        commands = {c.name or c.callback.__name__ for c in app.registered_commands if c.callback} - {"run"}
        words = [program, *context.args]
        if program == "minipar":
            words = words[1:]
        if words and words[0] in commands:
            command = [sys.executable, "-m", "minipar", *words]
        elif Path(program).is_file():
            command = [sys.executable, *words]
        else:
            raise UsageError(f"run: {program!r} is neither a file nor one of {', '.join(sorted(commands))}")
        env = {**os.environ, "PYTHONUNBUFFERED": "1"}
        if sys.stdout.isatty():
            env[TERMINAL] = str(shutil.get_terminal_size().columns)
        code = run_mpi(command, ranks, timeout=timeout, env=env)
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
    from minipar.job import continue_text
    from minipar.runs import load_run

    with reported():
        if tokens < 0:
            raise UsageError(f"--tokens is {tokens}, it must not be negative")
        model, _, vocabulary = load_run(directory)
        typer.echo(continue_text(model, vocabulary, prompt, tokens, temperature, top_k, seed))


@app.command()
def doctor() -> None:
    """Look at everything a parallel run needs, and say what to do about what is wrong.

    Example: minipar doctor
    """
    from minipar.doctor import examine
    from minipar.report import console, doctor_table

    findings = examine()
    console().print(doctor_table(findings))
    if not all(f.well for f in findings):
        raise typer.Exit(1)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"minipar {minipar.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")] = False,
) -> None:
    """Train a serial model in parallel, and prove that nothing changed but the time it takes."""


def main() -> None:
    """Entry point of the console script."""
    app()
