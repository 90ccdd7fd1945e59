"""Two ranks over MPI: data parallel beside DDP and beside one rank; what tensor parallelism and ZeRO expose."""

from __future__ import annotations

from table import Line, faster
from turns import Program, take_turns

EXPOSED = 0.15  # of the step, at most
RECIPES = {
    "tensor parallel": {"tp": 2},
    "ZeRO 1": {"zero": 1},
    "ZeRO 2": {"zero": 2},
    "ZeRO 3": {"zero": 3},
}


def measure(quick: bool) -> list[Line]:
    """Return the lines of two ranks."""
    rounds, lines = (1 if quick else 6), []
    for width in (256,) if quick else (256, 512):
        size = {"model": "gpt", "width": width}
        ours, ddp, alone = take_turns(
            [
                Program("minipar", "steps:ours", size, ranks=2),
                Program("torch", "steps:torchs", size, ranks=2),
                Program("minipar", "steps:ours", size),
            ],
            rounds,
        )
        work, memory = f"GPT width {width}, 2 ranks data parallel", f"{ours.peak_mb:.0f} | {ddp.peak_mb:.0f} MiB a rank"
        lines += [
            faster(work, ours.seconds, ddp.seconds, "PyTorch DDP", 1.0, memory),
            faster(work, ours.seconds, alone.seconds, "minipar, 1 rank", 1.9),
        ]
    width = 256 if quick else 512
    for name, recipe in RECIPES.items():
        (ours,) = take_turns(
            [Program("minipar", "parallel_steps:ours", {"width": width, **recipe}, ranks=2)], rounds
        )
        shares = ours.told
        exposed = shares["transfer"]
        lines.append(
            Line(
                f"GPT width {width}, 2 ranks {name}", ours.seconds * 1e3, "ms", None, "exposed communication",
                1 - exposed, 1 - EXPOSED,
                f"exposed {exposed:.1%} (and {shares['others']:.1%} waiting for the other rank),"
                f" {ours.peak_mb:.0f} MiB a rank",
            )
        )  # fmt: skip
    return lines
