"""`minipar checkpoint`: look at checkpoints, check them, and take plain weights out of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from minipar.errors import UsageError

if TYPE_CHECKING:  # imported where it is used: `minipar --help` needs none of it
    from minipar.resume import Saving

checkpoint_app = typer.Typer(
    help="Look at checkpoints, check them, and take plain weights out of them.", no_args_is_help=True
)
Place = Annotated[Path, typer.Argument(metavar="DIR", help="a checkpoint, or a directory of them: then the newest")]


@checkpoint_app.command()
def show(directory: Place) -> None:
    """Print what a checkpoint holds; only its manifest is read.

    Example: minipar checkpoint show checkpoints
    """
    from rich.table import Table

    from minipar.checkpoint import checkpoints, newest, read_manifest
    from minipar.commands.report import console, say

    def look() -> Any:
        path = newest(directory)
        return path, read_manifest(path)

    found = _on_first_rank(look)
    if found is None:
        return
    path, m = found
    table = Table()
    for heading, justify in (("kind", "left"), ("tensors", "right"), ("elements", "right"), ("blocks", "right")):
        table.add_column(heading, justify=justify)  # type: ignore[arg-type]
    for kind, tensors in m.kinds().items():
        elements = sum(math.prod(t.shape) for t in tensors.values())
        blocks = sum(len(t.blocks) for t in tensors.values())
        table.add_row(kind, str(len(tensors)), f"{elements:,}", str(blocks))
    files = Table()
    for heading, justify in (("file", "left"), ("bytes", "right"), ("sha256", "left")):
        files.add_column(heading, justify=justify)  # type: ignore[arg-type]
    for name, facts in m.files.items():
        files.add_row(name, f"{facts['bytes']:,}", facts["sha256"][:16])
    loader = m.scalars.get("loader", {})
    screen = console()
    say(screen, {
        "checkpoint": path,
        "model": f"{m.config.get('model')}, {m.config.get('optimizer')}, seed {m.config.get('seed')}",
        "step": f"{m.step} of {m.config.get('steps')}",
        "data": f"{m.config.get('data')}, epoch {loader.get('epoch')}, batch {loader.get('index')}",
        "written by": ", ".join(f"{k} {v}" for k, v in m.layout.items() if v is not None),
        "in directory": ", ".join(p.name for p in checkpoints(path.parent)),
    })  # fmt: skip
    screen.print(table)
    screen.print(files)


@checkpoint_app.command()
def verify(directory: Place) -> None:
    """Compute every file's sum again and compare it with the manifest.

    Example: minipar checkpoint verify checkpoints
    """
    from minipar.checkpoint import newest, open_checkpoint
    from minipar.commands.report import console

    def look() -> Any:
        path = newest(directory)
        return path, open_checkpoint(path)

    found = _on_first_rank(look)
    if found is not None:
        path, m = found
        total = sum(facts["bytes"] for facts in m.files.values())
        facts = f"{len(m.files)} files, {total:,} bytes, {len(m.tensors)} tensors, all whole"
        console().print(f"{path}: {facts}", markup=False, soft_wrap=True)


@checkpoint_app.command()
def export(
    directory: Place,
    out: Annotated[Path, typer.Argument(metavar="FILE", help="where to, such as model.safetensors")],
) -> None:
    """Write a checkpoint's weights as one plain safetensors file; a GPT's in GPT-2's naming.

    Example: minipar checkpoint export checkpoints model.safetensors
    """
    from minipar.checkpoint import newest, open_checkpoint
    from minipar.commands.report import console
    from minipar.resume import saved_model
    from minipar.weights import save_weights

    def write() -> Path:
        path = newest(directory)
        model = saved_model(path, open_checkpoint(path))
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            save_weights(model, out)
        except OSError as error:
            raise UsageError(f"{out} cannot be written: {error.strerror or error}") from None
        return path

    path = _on_first_rank(write)
    if path is not None:
        console().print(f"{path}: weights written to {out}", markup=False, soft_wrap=True)


def _on_first_rank(work: Callable[[], Any]) -> Any:
    """Return `work()` on rank 0, None elsewhere; its error is everyone's."""
    from minipar.agreement import agreed
    from minipar.comm import world

    comm = world()
    return agreed(comm, lambda: work() if comm.rank == 0 else None)


def saving_of(checkpoint: Path | None, every: int | None, keep: int | None, resume: bool) -> Saving | None:
    """Return what `minipar train`'s options ask for.

    Raises:
        UsageError: one of the others without --checkpoint, or a number below 1.
    """
    from minipar.resume import Saving

    given = {"every": every, "keep": keep}
    if checkpoint is None:
        for name, value in {**given, "resume": resume or None}.items():
            if value is not None:
                raise UsageError(f"--{name} is about checkpoints: give --checkpoint DIR as well")
        return None
    return Saving(checkpoint, **{name: value for name, value in given.items() if value is not None})
