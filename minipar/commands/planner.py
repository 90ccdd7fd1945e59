"""The options of `minipar calibrate` and `minipar plan`; what they do is in the two files of those names."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def calibrate(
    ranks: Annotated[int | None, typer.Option(help="MPI ranks to measure on; default: one a core")] = None,
    out: Annotated[Path, typer.Option(help="where to write the machine")] = Path("machine.json"),
    png: Annotated[Path | None, typer.Option(help="draw the fit of communication times here")] = None,
    dtype: Annotated[str, typer.Option(help="precision of the operations [float32|float64]")] = "float32",
) -> None:
    """Measure this machine for `minipar plan`: operations, memory, messages and collectives.

    Starts the ranks itself, or measures on those of the MPI job that it finds itself in.

    Example: minipar calibrate --ranks 2 --out machine.json --png fit.png
    """
    from minipar.commands.calibrate import calibrate_command

    code = calibrate_command(ranks, out, png, dtype)
    if code:
        raise typer.Exit(code)


def plan(
    model: Annotated[str, typer.Option(help="mlp, convnet, gpt, or a preset such as gpt-175b")],
    machine: Annotated[
        str | None, typer.Option(help="a file by minipar calibrate, or a preset; default: machine.json")
    ] = None,
    network: Annotated[
        str | None, typer.Option(help="of a preset, such as infiniband-hdr or ethernet-100")
    ] = None,
    ranks: Annotated[int | None, typer.Option(help="ranks in all; default: those of one node")] = None,
    memory: Annotated[
        str | None, typer.Option(help="of one rank, such as 80GiB; default: the machine's")
    ] = None,
    batch: Annotated[int | None, typer.Option(help="samples in the global batch")] = None,
    layers: Annotated[int | None, typer.Option(help="blocks of the model")] = None,
    width: Annotated[int | None, typer.Option(help="channels")] = None,
    heads: Annotated[int | None, typer.Option(help="attention heads")] = None,
    seq_len: Annotated[int | None, typer.Option(help="tokens in a sample")] = None,
    vocab: Annotated[int | None, typer.Option(help="size of the vocabulary; default: the data's")] = None,
    data: Annotated[str | None, typer.Option(help="as for minipar train")] = None,
    precision: Annotated[str | None, typer.Option(help="float32, float64 or fp16")] = None,
    run_top: Annotated[
        int | None, typer.Option(help="run the best so many layouts here, beside the prediction")
    ] = None,
    latency: Annotated[
        str | None, typer.Option(help="imitate a network: time a message takes, as 1ms")
    ] = None,
    bandwidth: Annotated[str | None, typer.Option(help="and bytes it carries, as 100MB/s")] = None,
    png: Annotated[
        Path | None, typer.Option(help="draw the comparison here, and the memory beside it")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="all layouts and all reasons, not the best few")] = False,
) -> None:
    """Choose a layout: rank all that are possible, explain the best, print the command that runs it.

    Example: minipar plan --model gpt-175b --machine a100-80gb --ranks 1024
    Example: minipar plan --model gpt --ranks 2 --run-top 5
    """
    from minipar.commands.plan import plan_command

    sizes = dict(batch=batch, layers=layers, width=width, heads=heads, seq_len=seq_len, vocab=vocab, data=data)
    plan_command(
        model, machine, network, ranks, memory, precision, sizes, run_top, latency, bandwidth, png, everything
    )
