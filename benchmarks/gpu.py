"""GPT-2 small on one GPU: minipar on CuPy beside PyTorch eager, in TF32 and float16, and as a captured graph.

    python benchmarks/gpu.py            # needs CuPy and a GPU; PyTorch with CUDA for the comparison
    python benchmarks/gpu.py --quick    # a small model: does everything run?

124 M parameters, sequence 1024, batch 8; forward, backward and AdamW over flat buffers, medians of steps that take
turns, each program in a process of its own (`gpu_steps`); "captured" is all of that as one CUDA graph. The peer's
attention is PyTorch's own formula (math), which computes float16 in float32 unless told otherwise, so beside it the
same in float16, and its flash attention. The rate is given as a share of a matrix product's, measured in the same
precision. How often a step makes the host wait for the GPU is counted, and how long the host takes to queue a step:
where that is longer than the step itself, only a captured one keeps the GPU busy. Results go to benchmarks/results/
with date, card and versions. Without a GPU it says so, and that is no failure.
"""

from __future__ import annotations

import argparse
import json
import os
from typing import Any

import machine
from gpu_steps import flops
from peers import Missing
from table import Line, faster, show
from turns import HERE, Program, Result, take_turns

SIZE = {"tokens": 1024, "width": 768, "layers": 12, "heads": 12, "batch": 8}
SMALL = {"tokens": 128, "width": 128, "layers": 2, "heads": 4, "batch": 2}
WANTED = {"tf32": 0.9, "fp16": 0.8}  # beside PyTorch's math attention as it comes
PEERS = {"math": "PyTorch eager, math", "half": "PyTorch eager, math in fp16", "flash": "PyTorch eager, flash"}


def matmul_rate(cupy: Any, dtype: str, size: int) -> float:
    """Return operations a second of a square matrix product on the GPU."""
    from minipar.kernels import gpu_blas

    a = cupy.ones((size, size), dtype)
    wait = cupy.cuda.get_current_stream().synchronize

    def run() -> None:
        gpu_blas.matmul(a, a)
        wait()

    return 2 * size**3 / machine.median_seconds(run)


def measure(quick: bool) -> list[Line]:
    """Return the lines of both precisions.

    Raises:
        Missing: there is no CuPy or no GPU here.
    """
    os.environ["CUPY_TF32"] = "1"  # read by CuPy at its first product in float32, and by minipar's at each
    cupy = gpu()
    size, lines = (SMALL if quick else SIZE), []
    for precision, wanted in WANTED.items():
        rate = matmul_rate(cupy, "float16" if precision == "fp16" else "float32", 1024 if quick else 8192)
        cupy.get_default_memory_pool().free_all_blocks()
        attention = ["math"] if precision == "tf32" else list(PEERS)  # flash attention takes no float32
        common = {"precision": precision, **size}
        programs = [Program("minipar", "gpu_steps:ours", {**common, "captured": how}) for how in (False, True)]
        if has_torch():
            programs += [Program("torch", "gpu_steps:torchs", {**common, "attention": kind}) for kind in attention]
        eager, captured, *peers = take_turns(programs, 1 if quick else 5)
        work, beside = f"GPT-2 small step, {precision}", dict(zip(attention, peers))
        lines += compared(work, eager, beside, wanted, flops(size), rate)
        lines += compared(f"{work}, captured", captured, beside, wanted, flops(size), rate)
        waits = eager.told["waits"]
        lines.append(Line(f"{work}, waits of the host", waits, "a step", 0, "none", float(waits == 0), 1.0))
        lines.append(memory(work, eager, beside.get("math")))
    return lines


def compared(
    work: str, ours: Result, beside: dict[str, Result], wanted: float, operations: float, rate: float
) -> list[Line]:
    """Return the lines of a step beside each peer; only the first is judged."""
    reached = operations / ours.seconds
    note = f"{reached / rate:.0%} of the {rate / 1e12:.0f} TFLOP/s that a product reaches here"
    note += f"; queued in {ours.told['queued'] * 1e3:.0f} ms"
    if not beside:
        note += "; PyTorch with CUDA is not installed"
        return [Line(work, ours.seconds * 1e3, "ms", None, PEERS["math"], None, wanted, note)]
    judged = {"math": (wanted, note)}
    return [
        faster(work, ours.seconds, peer.seconds, PEERS[kind], *judged.get(kind, (None, "")))
        for kind, peer in beside.items()
    ]


def memory(work: str, ours: Result, peer: Result | None) -> Line:
    """Return the line of the memory that each takes from the GPU; it is only reported."""
    mine, theirs = ours.told["gib"], None if peer is None else peer.told["gib"]
    ratio = None if theirs is None else theirs / mine
    return Line(f"{work}, memory taken", mine, "GiB", theirs, PEERS["math"], ratio)


def gpu() -> Any:
    """Return CuPy where there is a GPU.

    Raises:
        Missing: CuPy or a GPU is not here.
    """
    from minipar.backend import device_module
    from minipar.errors import UsageError

    try:
        return device_module("cuda")
    except UsageError as error:
        raise Missing(str(error)) from None


def has_torch() -> bool:
    """Return whether PyTorch is here and reaches the GPU."""
    try:
        import torch
    except ImportError:
        return False
    return bool(torch.cuda.is_available())


def card() -> dict[str, Any]:
    """Return what the card is, and the versions of its driver and of CUDA."""
    runtime = gpu().cuda.runtime
    return {
        "gpu": runtime.getDeviceProperties(0)["name"].decode(),
        "cuda": runtime.runtimeGetVersion(),
        "driver": runtime.driverGetVersion(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small model, few steps")
    options = parser.parse_args()
    try:
        lines = measure(options.quick)
    except Missing as why:
        print(f"skipped: {why}")
        return
    about = machine.facts() | card()
    print(f"{about['date']}, {about['gpu']}, CUDA {about['cuda']}\n{show(lines)}")
    if not options.quick:
        file = HERE / "results" / f"{machine.stamp(about)}-gpu.json"
        file.parent.mkdir(exist_ok=True)
        told = {"machine": about, "lines": {"gpu": [line.as_dict() for line in lines]}}
        file.write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n")
        print(f"written: {file}")


if __name__ == "__main__":
    main()
