"""A training step of GPT-2 small on a GPU, in minipar and in PyTorch: the programs that take turns.

Forward, backward and AdamW over flat buffers; in float16 the loss is scaled by a constant in both, so that nobody has
to look at the gradients. A program tells how long it took to queue a step, how much of the GPU's memory it holds, its
framework's pool included, and how often its step makes the host wait.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable

import numpy as np
from turns import Step
from waits import Waits

VOCAB = 50257
SCALE = 1024.0  # of the loss in float16


def flops(s: dict[str, int]) -> float:
    """Return the operations of a step in matrix products, the causal half of attention's counted whole, as computed."""
    per_token = s["layers"] * (24 * s["width"] ** 2 + 4 * s["tokens"] * s["width"]) + 2 * VOCAB * s["width"]
    return 3.0 * per_token * s["tokens"] * s["batch"]


def tokens(s: dict[str, int]) -> np.ndarray:
    return np.random.default_rng(0).integers(0, VOCAB, (s["batch"], s["tokens"] + 1))


def ours(precision: str, captured: bool, **s: int) -> Step:
    """minipar's step; `captured`: forward, backward and AdamW as one CUDA graph."""
    from minipar import optim
    from minipar.amp import autocast
    from minipar.backend import array_module, to_device
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

    def forward_backward_update() -> None:
        model.zero_grad()
        with autocast("float16") if half else contextlib.nullcontext():
            loss = model.loss(model(x), y) / (y.size / scale)
        loss.backward()
        if half:
            gradient = weights.grad
            gradient *= np.float32(1 / scale)
        optimizer.step()

    cupy = array_module(x)
    step = CapturedStep(forward_backward_update) if captured else forward_backward_update

    def waits() -> float:
        with Waits(cupy) as found:
            step()
        return float(found.total)

    return program(
        step, cupy.cuda.Device().synchronize, cupy.get_default_memory_pool().total_bytes, None if captured else waits
    )


def torchs(precision: str, attention: str, **s: int) -> Step:
    """PyTorch's step, eager; `attention` is "math", "half" (math in float16) or "flash"."""
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

    return program(step, torch.cuda.synchronize, torch.cuda.memory_reserved)


def program(
    step: Callable[[], None], wait: Callable[[], None], held: Callable[[], int],
    waits: Callable[[], float] | None = None,
) -> Step:  # fmt: skip
    """Return the program of a step that is over when the GPU is done with it.

    Args:
        wait: until that is so.
        held: the bytes that the framework holds.
        waits: how often a step makes the host wait; it takes one.
    """
    queued: list[float] = []

    def run() -> None:
        start = time.perf_counter()
        step()
        queued.append(time.perf_counter() - start)
        wait()

    def told() -> dict[str, float]:
        found = {"queued": statistics.median(queued), "gib": held() / 2**30}
        queued.clear()
        return found if waits is None else {**found, "waits": waits()}

    return Step(run, told=told)


