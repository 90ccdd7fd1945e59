"""Published runs, and the cost model held against them. `python -m tests.planner.published` prints the table."""

from __future__ import annotations

import statistics
from dataclasses import replace
from typing import NamedTuple

from minipar.models import GPTConfig
from minipar.planner.fit import fitted
from minipar.planner.layout import PRECISIONS, Layout
from minipar.planner.machine import Machine
from minipar.planner.presets import preset
from minipar.planner.shapes import shape_of
from minipar.planner.step_time import predict
from minipar.planner.work import gpt_flops

MIXED = PRECISIONS["mixed"]
VOCAB, TOKENS = 51200, 2048


class Run(NamedTuple):
    """A row of table 1 of D. Narayanan et al., "Efficient large-scale language model training on GPU clusters
    using Megatron-LM", 2021 (SC '21): weak scaling on A100 GPUs of 80 GB, 8 to a node with NVLink and NVSwitch,
    8 InfiniBand HDR cards a node. Mixed precision, all activations recomputed, interleaved schedule with
    scatter/gather; vocabulary 51,200, 2,048 tokens. TFLOP/s a GPU by the paper's count of operations."""

    billions: float
    heads: int
    width: int
    layers: int
    tensor: int
    pipeline: int
    gpus: int
    batch: int
    tflops: int


MEGATRON = (
    Run(1.7, 24, 2304, 24, 1, 1, 32, 512, 137),
    Run(3.6, 32, 3072, 30, 2, 1, 64, 512, 138),
    Run(7.5, 32, 4096, 36, 4, 1, 128, 512, 142),
    Run(18.4, 48, 6144, 40, 8, 1, 256, 1024, 135),
    Run(39.1, 64, 8192, 48, 8, 2, 512, 1536, 138),
    Run(76.1, 80, 10240, 60, 8, 4, 1024, 1792, 140),
    Run(145.6, 96, 12288, 80, 8, 8, 1536, 2304, 148),
    Run(310.1, 128, 16384, 96, 8, 16, 1920, 2160, 155),
    Run(529.6, 128, 20480, 105, 8, 35, 2520, 2520, 163),
    Run(1008.0, 160, 25600, 128, 8, 64, 3072, 3072, 163),
)
CALIBRATED_ON = (0, 9)  # the smallest and the largest


def as_published(machine: Machine) -> Machine:
    """Return the machine as Megatron-LM of 2021 used it: sums of gradients and messages hidden by nothing."""
    return replace(
        machine, node=replace(machine.node, overlap=0.0), cluster=replace(machine.cluster, overlap=0.0)
    )


def tflops(run: Run, machine: Machine) -> float:
    """Return the predicted TFLOP/s a GPU, with the best microbatch and number of chunks, which the table lacks."""
    model = shape_of("gpt", GPTConfig(VOCAB, TOKENS, run.width, run.layers, run.heads), dropout=True)
    dp = run.gpus // (run.tensor * run.pipeline)
    seconds = []
    for samples in (1, 2, 4, 8):
        if run.batch % (dp * samples):
            continue
        m = run.batch // (dp * samples)
        for chunks in range(1, min(run.layers // run.pipeline, 8) + 1):
            if chunks > 1 and (run.pipeline == 1 or m % run.pipeline or run.layers % (run.pipeline * chunks)):
                continue
            schedule = "" if run.pipeline == 1 else "interleaved" if chunks > 1 else "1f1b"
            layout = Layout(dp, run.pipeline, run.tensor, 0, schedule, m, chunks, recompute=True)
            seconds.append(predict(model, machine, layout, run.batch, MIXED, scattered=True).seconds)
    flops = gpt_flops(run.batch, TOKENS, run.layers, run.width, VOCAB, recompute=True)
    return flops / min(seconds) / run.gpus / 1e12


def calibrated() -> Machine:
    """Return the A100 preset fitted to two rows."""
    start = as_published(preset("a100-80gb"))
    rows = [MEGATRON[i] for i in CALIBRATED_ON]
    return fitted(start, "float16", [(lambda m, run=run: tflops(run, m), float(run.tflops)) for run in rows])


def errors(predicted: list[float]) -> list[float]:
    """Return the relative errors of the rows that nothing was calibrated on."""
    others = [i for i in range(len(MEGATRON)) if i not in CALIBRATED_ON]
    return [abs(predicted[i] / MEGATRON[i].tflops - 1) for i in others]


def naive() -> float:
    """Return the one rate that fits the two rows best: what a constant part of the peak would predict."""
    return statistics.mean(MEGATRON[i].tflops for i in CALIBRATED_ON)


def main() -> None:
    """Print published, predicted and naive."""
    machine = calibrated()
    predicted = [tflops(run, machine) for run in MEGATRON]
    constant = naive()
    rate = machine.matmul["float16"]
    print(f"fitted: {100 * rate.efficiency:.0f} % of the peak, {machine.bandwidth / 1e9:.0f} GB/s of memory")
    print("billions   gpus  tp  pp  published  predicted         naive (one rate)")
    for i, (run, p) in enumerate(zip(MEGATRON, predicted)):
        fit = "fitted" if i in CALIBRATED_ON else f"{100 * (p / run.tflops - 1):+5.1f} %"
        print(
            f"{run.billions:8.1f}  {run.gpus:5d}  {run.tensor:2d}  {run.pipeline:2d}  {run.tflops:9d}  {p:9.1f}"
            f"  {fit:>8}  {100 * (constant / run.tflops - 1):+6.1f} %"
        )
    guess = errors([constant] * len(MEGATRON))
    mean = 100 * statistics.mean(errors(predicted))
    print(f"mean error of the other eight: {mean:.1f} %, naive {100 * statistics.mean(guess):.1f} %")


if __name__ == "__main__":
    main()
