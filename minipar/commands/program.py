"""How every command behaves: errors as one line on every rank, exit codes, and the ranks that it runs on."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import typer
from typer.core import TyperGroup

from minipar.agreement import is_on_every_rank, on_every_rank
from minipar.comm import launch, world
from minipar.comm.interface import Communicator
from minipar.comm.launch import ranks_in_environment
from minipar.errors import CommunicationError, MiniparError, UsageError

# What Typer raises for a wrong command line; where it is to be imported from depends on Typer's version.
CommandLineError: Any = typer.BadParameter.__mro__[2]
FAILURE, INTERRUPTED = 1, 130
TOO_LARGE = "a model too large for one rank trains on several, each under its own limit, with --zero 3, --tp or --pp"


class Interrupted(Exception):
    """Ctrl-C, kept from Typer, which would end without a word."""


class Commands(TyperGroup):
    """The commands. What a user got wrong becomes one line on standard error, and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise Interrupted(" ".join(["interrupted", *getattr(error, "__notes__", [])])) from None

    def main(self, *args: Any, **extra: Any) -> Any:
        """Run the command line and exit.

        Under MPI, an error that all ranks share is printed by rank 0 alone and every rank ends by itself; one
        that only some ranks have is left to the job's own hook, which names the rank and ends the others.
        """
        # Of another MPI's mpirun mpi4py warns in four lines; `world` refuses it in one.
        warnings.filterwarnings("ignore", "suspicious MPI execution environment", RuntimeWarning)
        try:
            code = super().main(*args, **{**extra, "standalone_mode": False})
        except CommandLineError as error:
            command = error.ctx.command_path if error.ctx else "minipar"
            text = " ".join(error.format_message().split()).removesuffix(".")
            code = told(f"{text}; see {command} --help", error.exit_code)
        except MiniparError as error:
            if not is_on_every_rank(error) and world().size > 1:
                raise
            notes = getattr(error, "__notes__", []) if isinstance(error, CommunicationError) else []
            code = told("\n".join([str(error), *notes]), error.exit_code)
        except MemoryError as error:
            if world().size > 1:
                raise  # the job's hook names the rank and ends the others
            code = told(f"out of memory: {str(error) or 'no more is to be had'}; {TOO_LARGE}", FAILURE)
        except Interrupted as error:
            ranks = ranks_in_environment()
            if ranks is not None and ranks[0] > 1:
                raise KeyboardInterrupt from None  # the job's hook ends all ranks
            code = told(str(error), INTERRUPTED)
        if code:
            raise SystemExit(code)  # not sys.exit, by which one rank of an MPI job ends all the others
        return code


def told(message: str, code: int) -> int:
    """Print an error that every rank has, on rank 0, and return `code`."""
    try:
        first = world().rank == 0
    except UsageError:  # the MPI job is not what its launcher says: each process speaks for itself
        first = True
    if first:
        typer.echo(f"minipar: {message}", err=True)
    return code


@contextlib.contextmanager
def from_command_line() -> Iterator[None]:
    """Inside, errors come from what all ranks were given alike, so all of them raise them."""
    try:
        yield
    except MiniparError as error:
        raise on_every_rank(error) from None


def refuse_inside_job(command: str) -> None:
    """Refuse a command that starts MPI jobs of its own on the ranks of one."""
    ranks = ranks_in_environment()
    if ranks is not None and ranks[0] > 1:
        raise UsageError(
            f"{command} starts ranks itself, but this is an MPI job of {ranks[0]}: use it without mpirun"
        )


def on_ranks(ranks: int | None, work: Callable[[Communicator], Any], default: int = 1) -> Any:
    """Run `work` on the MPI job's ranks if this is one, else on `ranks` (or `default`) threads.

    Returns:
        What `work` returns on rank 0 (under MPI, on this rank).
    """
    with from_command_line():
        if ranks is not None and ranks < 1:
            raise UsageError(f"--ranks is {ranks}, it must be at least 1")
        here = world()
        if here.size > 1 and ranks not in (None, here.size):
            raise UsageError(
                f"--ranks {ranks} inside an MPI job of {here.size}: leave it out, or start {ranks} ranks"
            )
    if here.size > 1:
        return work(here)
    threads = ranks or default
    return launch(lambda: work(world()), threads)[0] if threads > 1 else work(here)
