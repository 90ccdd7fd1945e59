"""Two ranks over MPI: data parallel beside DDP and beside one rank; what tensor parallelism and ZeRO expose."""

from __future__ import annotations

from steps import Size
from table import Line, faster
from turns import Program, Result, beside, take_turns

SCALING = 1.9  # times one rank's speed, wanted of two
LAUNCHES = 6  # of what is compared with one rank, where a percent counts
EXPOSED = 0.15  # of the step, at most
RECIPES = {
    "tensor parallel": {"tp": 2},
    "ZeRO 1": {"zero": 1},
    "ZeRO 2": {"zero": 2},
    "ZeRO 3": {"zero": 3},
}


def measure(quick: bool) -> list[Line]:
    """Return the lines of two ranks."""
    rounds, launches, lines = (1 if quick else 6), (1 if quick else LAUNCHES), []
    for width in (256,) if quick else (256, 512):
        size = {"model": "gpt", "width": width}
        results = take_turns(
            [
                Program("minipar", "steps:ours", size, ranks=2),
                Program("torch", "steps:torchs", size, ranks=2),
                Program("minipar", "steps:ours", size),
                Program("minipar", "steps:ours", {**size, "apart": True}, ranks=2),
                Program("minipar", "steps:ours", {**size, "batch": 2 * Size().batch}, ranks=2),
            ],
            rounds // launches,
            launches=launches,
        )
        lines += data_parallel(f"GPT width {width}, 2 ranks data parallel", *results)
    width = 256 if quick else 512
    for name, recipe in RECIPES.items():
        program = Program("minipar", "parallel_steps:ours", {"width": width, **recipe}, ranks=2)
        (ours,) = take_turns([program], rounds)
        lines += exposed(f"GPT width {width}, 2 ranks {name}", ours)
    return lines


def data_parallel(work: str, ours: Result, ddp: Result, alone: Result, apart: Result, double: Result) -> list[Line]:
    """Return the lines beside DDP, beside one rank, and beside what two ranks reach here without a message.

    Two cores of a machine share its memory and its power, virtual ones may share more: two ranks that train side by
    side and never speak, nor wait for each other, tell how much of that is the machine's.

    Beside one rank twice: with that rank's batch cut in two, so that a step should take half the time (strong
    scaling), and with a batch as large on each (weak scaling), in which a step does twice the work. The optimizer's
    step, which every rank takes on all parameters, weighs twice as much in the first.
    """
    memory = f"{ours.peak_mb:.0f} | {ddp.peak_mb:.0f} MiB a rank" if ddp.absent is None else f"{ours.peak_mb:.0f} MiB"
    memory += ", ours with what it touches of the other rank's gradients"
    bound = f"the same two ranks without a message: {alone.seconds / apart.seconds:.2f}"
    return [
        beside(work, ours, ddp, "PyTorch DDP", 1.0, memory),
        beside(work, ours, alone, "minipar, 1 rank", SCALING, bound),
        weak_scaling(work, double, alone),
        # 1.9 of two whole cores is 95 % of what they can do; so is this, of the cores that there are.
        beside(f"{work}, messages", ours, apart, "the same ranks without a message", SCALING / 2),
    ]


def weak_scaling(work: str, double: Result, alone: Result) -> Line:
    """Return the line of a step with twice the batch beside two steps of one rank."""
    work = f"{work}, as large a batch on each"
    return faster(work, double.seconds, 2 * alone.seconds, "minipar, 1 rank, 2 steps", SCALING, "weak scaling")


def exposed(work: str, ours: Result) -> list[Line]:
    """Return the line that is judged, the transfer, and the one that is reported: with waiting for the other rank.

    `traces.report` calls both exposed. The transfer, from when both ranks have reached a collective to its end, is
    what communication costs, and what a better overlap or a faster ring would save. Waiting for a rank that is
    still computing is no communication: it comes from unequal work, and on a machine whose cores are shared with
    other programs from whichever rank they held up; no change to the communication would remove it.
    """
    transfer, others = ours.told["transfer"], ours.told["others"]
    told = f"transfer {transfer:.1%} + waiting for the other rank {others:.1%} of the step"
    memory = f"; {ours.peak_mb:.0f} MiB a rank"
    milliseconds, name = ours.seconds * 1e3, "the rest of the step"
    return [
        Line(f"{work}, transfer", milliseconds, "ms", None, name, 1 - transfer, 1 - EXPOSED, told + memory),
        Line(f"{work}, transfer and waiting", milliseconds, "ms", None, name, 1 - transfer - others, None, told),
    ]
