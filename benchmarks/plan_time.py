"""How long does `minipar plan` take? Published models on a thousand GPUs and more; the aim is 5 seconds for 175 B.

    python benchmarks/plan_time.py

Each is planned in a process that has planned nothing before, as the command does; with the time stand the layout
chosen and the reason, so that an expert can say whether they are the right ones.
"""

from __future__ import annotations

import multiprocessing
import time

AIM = 5.0  # seconds, for CASES[0]
CASES = (
    ("gpt-175b", "a100-80gb", 1024, 1536),
    ("gpt3-13b", "h100-80gb", 256, 1024),
    ("megatron-530b", "a100-80gb", 2520, 2520),
    ("megatron-1t", "a100-80gb", 3072, 3072),
)


def planned(model: str, machine: str, ranks: int, batch: int) -> tuple[float, int, str]:
    """Return seconds, how many grids and ZeRO stages were possible, and why the winner is the winner."""
    from minipar.planner.explain import winner_text
    from minipar.planner.layout import PRECISIONS
    from minipar.planner.plan import plan
    from minipar.planner.presets import MODELS, preset
    from minipar.planner.shapes import shape_of

    shape, where = shape_of("gpt", MODELS[model]), preset(machine)
    start = time.perf_counter()
    found = plan(shape, where, ranks, batch, PRECISIONS["fp16"])
    text = winner_text(found)
    return time.perf_counter() - start, len(found.candidates), text


def main() -> None:
    for model, machine, ranks, batch in CASES:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            seconds, count, text = pool.apply(planned, (model, machine, ranks, batch))
        print(f"{model} on {ranks} × {machine}: {seconds:.2f} s, best of {count}\n    {text}\n", flush=True)
        if model == CASES[0][0] and seconds > AIM:
            print(f"    slower than the {AIM:g} s that it may take\n")


if __name__ == "__main__":
    main()
