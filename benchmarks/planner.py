"""How good are the planner's predictions? It plans, runs its best layouts here, and compares; needs a quiet machine.

    python benchmarks/planner.py                          # calibrates first, about a minute
    python benchmarks/planner.py --machine machine.json   # what minipar calibrate wrote on this machine today
    python benchmarks/planner.py --pictures docs          # draws the timelines, predicted above measured

Two ranks. A prediction is for the machine as it was when calibrated, times its pace at the moment, which a
reference step tells that takes turns with the layouts; the error without that factor stands beside it. Part
one: MLP, ConvNet and GPT, the best five layouts each; the median layout should be predicted
within 15 % and each within 25 %, memory within 10 %, and the layout chosen be the fastest or within 5 % of it.
Part two: the same GPT with a pipeline and with data parallelism behind a network of 1 ms and 100 MB/s, within
15 %.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

from minipar.commands.calibrate import calibrate_command
from minipar.commands.plan import subject_of
from minipar.planner.explain import bytes_text, seconds_text, step_parts
from minipar.planner.layout import PRECISIONS, Layout
from minipar.planner.machine import Machine, read_machine
from minipar.planner.plan import plan
from minipar.planner.reference import CALM
from minipar.planner.run_layouts import Ran, config_of, run_layouts
from minipar.planner.step_time import predict
from minipar.plot import gantt_pair, plan_comparison

RANKS, TOP = 2, 5
MODELS: dict[str, dict[str, Any]] = {
    "mlp": dict(width=512, layers=4, batch=512),
    "convnet": dict(width=16, layers=3, batch=64),
    "gpt": dict(width=128, layers=4, seq_len=64, batch=32),
}
LATENCY, BANDWIDTH = "1ms", "100MB/s"
ALPHA, BETA = 1e-3, 1e-8
SLOW = {
    "pipeline": Layout(pp=2, schedule="1f1b", microbatches=4),
    "data parallel": Layout(dp=2),
}


def busy_text(run: Ran) -> str:
    """Say it if other programs disturbed the run."""
    return f"   machine busy: {100 * run.disturbed:.0f} % of the step" if run.disturbed > CALM else ""


def planned(model: str, sizes: dict[str, Any], machine: Machine, pictures: Path | None) -> list[str]:
    """Plan, run the best layouts, print the comparison; return what falls short."""
    subject = subject_of(model, sizes)
    found = plan(subject.shape, machine, RANKS, sizes["batch"], PRECISIONS["float32"])
    chosen = found.candidates[:TOP]
    ran = run_layouts([config_of(subject.config, c.layout) for c in chosen], RANKS)
    runs, pace = ran.layouts, ran.pace(machine, model)
    print(f"\n{model} {sizes}: {pace:.2f} times as long as when calibrated")
    errors, memory = [], []
    for c, run in zip(chosen, runs):
        seconds = predict(subject.shape, machine.paced(pace), c.layout, sizes["batch"]).seconds
        error, unpaced = seconds / run.seconds - 1, c.step.seconds / run.seconds - 1
        errors.append(error)
        predicted, measured = seconds_text(seconds), seconds_text(run.seconds)
        memory.append(c.memory.total / run.held - 1)
        print(
            f"  {c.layout!s:<36} predicted {predicted:>8}  measured {measured:>8}  {100 * error:+6.1f} %"
            f" (as calibrated {100 * unpaced:+4.0f} %)"
            f"   memory {bytes_text(c.memory.total):>8}  held {bytes_text(run.held):>8}  {100 * memory[-1]:+5.1f} %"
            f"{busy_text(run)}"
        )
    median, worst = statistics.median(map(abs, errors)), max(map(abs, errors))
    slower = runs[0].seconds / min(run.seconds for run in runs) - 1
    print(f"  median {100 * median:.1f} %, worst {100 * worst:.1f} %, chosen {100 * slower:.1f} % above the fastest")
    if pictures is not None:
        plan_comparison(
            {str(c.layout): step_parts(c) for c in chosen}, pictures / f"plan-{model}.png",
            measured={str(c.layout): run.seconds for c, run in zip(chosen, runs)}, title=f"{model}, {RANKS} ranks",
        )  # fmt: skip
    short = []
    for name, value, limit in (
        ("median", median, 0.15),
        ("worst", worst, 0.25),
        ("choice", slower, 0.05),
        ("memory", max(map(abs, memory)), 0.10),
    ):
        if value > limit:
            short.append(f"{model}: {name} {100 * value:.0f} %, should be at most {100 * limit:.0f} %")
    return short


def behind_a_network(machine: Machine, pictures: Path | None) -> list[str]:
    """Run a pipeline and data parallelism behind an imitated network; return what falls short."""
    sizes, short = MODELS["gpt"], []
    subject = subject_of("gpt", sizes)
    configs = [config_of(subject.config, layout) for layout in SLOW.values()]
    ran = run_layouts(configs, RANKS, LATENCY, BANDWIDTH)
    pace = ran.pace(machine, "gpt")
    slow = machine.paced(pace).slowed(ALPHA, BETA)
    print(f"\ngpt behind a network of {LATENCY} and {BANDWIDTH}: {pace:.2f} times as long as when calibrated")
    for (name, layout), run in zip(SLOW.items(), ran.layouts):
        step = predict(subject.shape, slow, layout, sizes["batch"])
        error = step.seconds / run.seconds - 1
        fast = predict(subject.shape, machine.paced(pace), layout, sizes["batch"])
        print(
            f"  {name:<14} predicted {seconds_text(step.seconds):>8}  measured {seconds_text(run.seconds):>8}"
            f"  {100 * error:+6.1f} %   (without the network predicted {seconds_text(fast.seconds)}){busy_text(run)}"
        )
        if abs(error) > 0.15:
            short.append(f"{name} behind a network: {100 * error:+.0f} %, should be within 15 %")
        if pictures is not None and run.timeline is not None and step.timeline is not None:
            title = f"gpt, {layout}, {LATENCY} and {BANDWIDTH}"
            gantt_pair(step.timeline, run.timeline, pictures / "predicted-above-measured.png", title=title, unit="s")
    return short


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machine", type=Path, help="by default this machine is calibrated first")
    parser.add_argument("--pictures", type=Path, help="directory for pictures")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = args.machine
        if path is None:
            path = Path(folder) / "machine.json"
            if code := calibrate_command(RANKS, path, None, "float32"):
                raise SystemExit(code)
        machine = read_machine(path)
    short = [line for model, sizes in MODELS.items() for line in planned(model, sizes, machine, args.pictures)]
    short += behind_a_network(machine, args.pictures)
    print("\n" + ("\n".join(short) if short else "all predictions within their limits"))


if __name__ == "__main__":
    main()
