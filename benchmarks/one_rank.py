"""Training steps on one rank beside PyTorch eager: GPT, MLP, ConvNet, and an MLP so small that Python rules."""

from __future__ import annotations

from dataclasses import dataclass

from machine import sgemm_rate
from steps import Size
from table import Line
from turns import Program, beside, memory_beside, take_turns


@dataclass(frozen=True)
class Work:
    """A model at a size, what is wanted of its speed and memory, and how many steps make a turn."""

    name: str
    size: Size
    wanted: float
    memory: float | None = 1.0  # of a convolution it is only reported: what is unfolded costs
    steps: int = 3


WORKS = (
    Work("GPT width 256", Size("gpt", 16, 256), 1.0),
    Work("GPT width 512", Size("gpt", 16, 512), 1.0, steps=1),
    Work("MLP 784-1024×6-10, batch 512", Size("mlp", 512, 1024, 7), 1.0),
    Work("ConvNet 32×32×3, batch 64", Size("convnet", 64, 16, 3), 0.6, None),
    Work("MLP width 32, 6 layers, batch 32", Size("mlp", 32, 32, 6), 0.7, steps=200),
)
SGEMM_SHARE = 0.75  # of the measured rate, wanted of the GPT of width 512


def measure(quick: bool) -> list[Line]:
    """Return the lines of each model; with `quick` the small ones, in few turns."""
    lines = []
    for work in WORKS:
        if quick and work.size.width in (512, 1024):
            continue
        size, peer_name = vars(work.size), "PyTorch eager"
        programs = [Program("minipar", "steps:ours", size), Program("torch", "steps:torchs", size)]
        rate = sgemm_rate()
        ours, peer = take_turns(programs, 1 if quick else 9, work.steps)
        lines += [
            beside(work.name, ours, peer, peer_name, work.wanted),
            memory_beside(work.name, ours, peer, peer_name, work.memory),
        ]
        if work.size.model == "gpt":
            rate = max(rate, sgemm_rate())
            reached = work.size.flops / ours.seconds
            wanted = SGEMM_SHARE if work.size.width == 512 else None
            lines.append(
                Line(
                    f"{work.name}, arithmetic", reached / 1e9, "GFLOP/s", rate / 1e9, "sgemm 1024³, measured",
                    reached / rate, wanted,
                )
            )  # fmt: skip
    return lines
