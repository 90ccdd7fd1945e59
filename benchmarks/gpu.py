"""GPT-2 small on one GPU: minipar on CuPy beside PyTorch eager, in TF32 and float16, and as a captured graph.

    python benchmarks/gpu.py            # needs CuPy and a GPU; PyTorch with CUDA for the comparison
    python benchmarks/gpu.py --quick    # a small model: does everything run?

124 M parameters, sequence 1024, batch 8; forward, backward and AdamW over flat buffers, medians of steps that take
turns; "captured" is all of that as one CUDA graph. The peer's attention is PyTorch's own formula (math), which
computes float16 in float32 unless told otherwise, so beside it the same in float16, and its flash attention. The rate
is given as a share of a matrix product's, measured in the same precision. How often a step makes the host wait for the
GPU is counted, and how long the host takes to queue a step: where that is longer than the step itself, only a captured
one keeps the GPU busy. Results go to benchmarks/results/ with date, card and versions. Without a GPU it says so, and
that is no failure.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import machine
import numpy as np
from peers import Missing
from table import Line, faster, show
from turns import HERE
from waits import Waits

VOCAB = 50257
SIZE = {"tokens": 1024, "width": 768, "layers": 12, "heads": 12, "batch": 8}
SMALL = {"tokens": 128, "width": 128, "layers": 2, "heads": 4, "batch": 2}
WANTED = {"tf32": 0.9, "fp16": 0.8}  # beside PyTorch's math attention as it comes
PEERS = {"math": "PyTorch eager, math", "half": "PyTorch eager, math in fp16", "flash": "PyTorch eager, flash"}
SCALE = 1024.0  # of the loss in float16, fixed, so that nobody has to look at the gradients
Step = Callable[[], None]


def flops(s: dict[str, int]) -> float:
    """Return the operations of a step in matrix products, the causal half of attention's counted whole, as computed."""
    per_token = s["layers"] * (24 * s["width"] ** 2 + 4 * s["tokens"] * s["width"]) + 2 * VOCAB * s["width"]
    return 3.0 * per_token * s["tokens"] * s["batch"]


def tokens(s: dict[str, int]) -> np.ndarray:
    return np.random.default_rng(0).integers(0, VOCAB, (s["batch"], s["tokens"] + 1))


def ours(s: dict[str, int], precision: str, captured: bool) -> Step:
    """minipar's step; `captured`: forward, backward and AdamW as one CUDA graph."""
    from minipar import optim
    from minipar.amp import autocast
    from minipar.backend import to_device
    from minipar.flat import FlatTensor
    from minipar.kernels.gpu_graph import CapturedStep
    from minipar.models import GPT, GPTConfig

    config = GPTConfig(VOCAB, s["tokens"], s["width"], s["layers"], s["heads"])
    model = GPT(config).materialize(seed=0, dtype="float32", device="cuda")
    weights = FlatTensor(model.parameters())
    optimizer = optim.AdamW([weights], lr=1e-4, capturable=captured)
    ids = to_device(tokens(s), "cuda")
    x, y = ids[:, :-1].copy(), ids[:, 1:].copy()
    half = precision == "fp16"
    scale = SCALE if half else 1.0

    def step() -> None:
        model.zero_grad()
        with autocast("float16") if half else contextlib.nullcontext():
            loss = model.loss(model(x), y) / (y.size / scale)
        loss.backward()
        if half:
            gradient = weights.grad
            gradient *= np.float32(1 / scale)
        optimizer.step()

    return CapturedStep(step) if captured else step


def torchs(s: dict[str, int], precision: str, attention: str) -> Step:
    """PyTorch's step, eager; `attention` is one of PEERS."""
    import torch
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch_models import Gpt

    torch.backends.cuda.matmul.allow_tf32 = True
    model = Gpt(VOCAB, s["tokens"], s["width"], s["layers"], s["heads"]).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    ids = torch.from_numpy(tokens(s)).cuda()
    x, y = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    half = precision == "fp16"
    scale = SCALE if half else 1.0

    def step() -> None:
        optimizer.zero_grad()
        backend = SDPBackend.FLASH_ATTENTION if attention == "flash" else SDPBackend.MATH
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(attention == "half")
        with sdpa_kernel(backend), torch.autocast("cuda", torch.float16, enabled=half):
            loss = F.cross_entropy(model(x).view(-1, VOCAB), y.view(-1))
        (loss * scale).backward()
        if half:
            torch._foreach_mul_([p.grad for p in model.parameters()], 1 / scale)
        optimizer.step()

    return step


def medians(steps: dict[str, Step], wait: Callable[[], Any], rounds: int) -> tuple[dict[str, float], dict[str, float]]:
    """Return each step's median seconds until it was done, and until it was queued.

    They take turns, and the first two turns warm up.
    """
    done: dict[str, list[float]] = {name: [] for name in steps}
    queued: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 2):
        for name, step in steps.items():
            wait()
            start = time.perf_counter()
            step()
            queued_after = time.perf_counter() - start
            wait()
            if turn > 1:
                done[name].append(time.perf_counter() - start)
                queued[name].append(queued_after)
    first, second = ({name: statistics.median(t) for name, t in times.items()} for times in (done, queued))
    return first, second


def matmul_rate(cupy: Any, dtype: str, size: int) -> float:
    """Return operations a second of a square matrix product on the GPU."""
    from minipar.kernels import gpu_blas

    a = cupy.ones((size, size), dtype)
    wait = cupy.cuda.get_current_stream().synchronize

    def run() -> None:
        gpu_blas.matmul(a, a)
        wait()

    return 2 * size**3 / machine.median_seconds(run)


def taken(step: Step, held: Callable[[], int]) -> int:
    """Return how many bytes of the GPU's memory a step's framework holds after two of them, its pool included."""
    step()
    step()
    return int(held())


def torch_bytes() -> Callable[[], int]:
    """Return a function that gives the bytes which PyTorch has taken since now."""
    import torch

    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    return lambda: torch.cuda.memory_reserved() - before


def memory(work: str, ours: int, peer: int | None = None) -> Line:
    """Return the line of the memory that each takes from the GPU; it is only reported."""
    gib = 2.0**30
    ratio = None if peer is None else peer / ours
    theirs = None if peer is None else peer / gib
    return Line(f"{work}, memory taken", ours / gib, "GiB", theirs, PEERS["math"], ratio)


def waited(cupy: Any, work: str, step: Step) -> Line:
    """Return the line of how often a step makes the host wait: wanted is never."""
    with Waits(cupy) as waits:
        step()
    told = f"by call: {waits}"
    return Line(f"{work}, waits of the host", waits.total, "a step", 0, "none", float(waits.total == 0), 1.0, told)


def measure(quick: bool) -> list[Line]:
    """Return the lines of both precisions.

    Raises:
        Missing: there is no CuPy or no GPU here.
    """
    os.environ["CUPY_TF32"] = "1"  # read by CuPy at its first product in float32, and by minipar's at each
    cupy = gpu()
    s, lines = (SMALL if quick else SIZE), []
    with_torch = has_torch()
    for precision, wanted in WANTED.items():
        work = f"GPT-2 small step, {precision}"
        steps = {"ours": ours(s, precision, captured=False)}
        held = [taken(steps["ours"], cupy.get_default_memory_pool().total_bytes)]
        steps["graph"] = ours(s, precision, captured=True)
        if with_torch:
            bytes_since = torch_bytes()
            steps["math"] = torchs(s, precision, "math")
            held.append(taken(steps["math"], bytes_since))
            if precision == "fp16":  # flash attention takes no float32
                steps |= {name: torchs(s, precision, name) for name in ("half", "flash")}
        seconds, queued = medians(steps, cupy.cuda.Device().synchronize, 3 if quick else 15)
        rate = matmul_rate(cupy, "float16" if precision == "fp16" else "float32", 1024 if quick else 8192)
        for name in ("ours", "graph"):
            reached = flops(s) / seconds[name]
            how = work + (", captured" if name == "graph" else "")
            note = f"{reached / rate:.0%} of the {rate / 1e12:.0f} TFLOP/s that a product reaches here"
            if name == "ours":
                note += f"; queued in {queued[name] * 1e3:.0f} ms"
            if not with_torch:
                note += "; PyTorch with CUDA is not installed"
                lines.append(Line(how, seconds[name] * 1e3, "ms", None, PEERS["math"], None, wanted, note))
            for peer in (name for name in PEERS if name in seconds):
                want, told = (wanted, note) if peer == "math" else (None, "")
                lines.append(faster(how, seconds[name], seconds[peer], PEERS[peer], want, told))
        lines.append(waited(cupy, work, steps["ours"]))
        lines.append(memory(work, *held))
        steps.clear()
        cupy.get_default_memory_pool().free_all_blocks()
    return lines


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
