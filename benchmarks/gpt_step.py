"""One GPT training step, minipar beside PyTorch: forward, backward and AdamW, medians of interleaved runs.

    python benchmarks/gpt_step.py                 # one rank, then two ranks data parallel
    python benchmarks/gpt_step.py --width 512

Model: 4 layers, 4 heads, 128 tokens, batch 16, vocabulary 96, tied head, float32, one thread a rank. Each
engine runs in processes of its own; the parent tells them in turn to run a few steps, so that both see the same
machine. Peak memory is the process's (VmHWM).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

SIZES = dict(vocab=96, tokens=128, batch=16, layers=4, heads=4)


def peak_mb() -> float:
    """Return this process's largest resident memory so far, in MiB."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


# --- The two engines: each returns a function that takes one step ------------------------------------------


def minipar_step(width: int, ranks: int) -> Any:
    import numpy as np

    import minipar
    from minipar import optim
    from minipar.backend import keep_freed_memory
    from minipar.models import GPT, GPTConfig
    from minipar.parallel import DataParallel

    keep_freed_memory()
    comm = minipar.world()
    config = GPTConfig(SIZES["vocab"], SIZES["tokens"], width, SIZES["layers"], SIZES["heads"])
    model = GPT(config).materialize(seed=0)
    run: Any = DataParallel(model, comm) if ranks > 1 else model
    optimizer = optim.AdamW(model.parameters(), lr=1e-3)
    rows = SIZES["batch"] // ranks
    ids = np.random.default_rng(comm.rank).integers(0, SIZES["vocab"], (rows, SIZES["tokens"] + 1))
    x, y = ids[:, :-1].copy(), ids[:, 1:].copy()

    def step() -> None:
        model.zero_grad()
        (model.loss(run(x), y) / (SIZES["batch"] * SIZES["tokens"])).backward()
        optimizer.step()

    return step, comm.rank, comm.barrier


def torch_step(width: int, ranks: int) -> Any:
    import torch
    import torch.distributed as dist
    import torch.nn.functional as F
    from torch import nn

    torch.set_num_threads(1)
    rank = 0
    if ranks > 1:
        dist.init_process_group("gloo")
        rank = dist.get_rank()
    heads = SIZES["heads"]

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
            self.c_attn, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.fc, self.out = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

        def forward(self, x: Any) -> Any:
            b, t, c = x.shape
            q, k, v = (
                p.view(b, t, heads, c // heads).transpose(1, 2) for p in self.c_attn(self.ln_1(x)).split(c, 2)
            )
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.proj(y.transpose(1, 2).reshape(b, t, c))
            return x + self.out(F.gelu(self.fc(self.ln_2(x)), approximate="tanh"))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wte, self.wpe = nn.Embedding(SIZES["vocab"], width), nn.Embedding(SIZES["tokens"], width)
            self.h, self.ln_f = nn.ModuleList([Block() for _ in range(SIZES["layers"])]), nn.LayerNorm(width)

        def forward(self, ids: Any) -> Any:
            x = self.wte(ids) + self.wpe.weight[: ids.shape[1]]
            for block in self.h:
                x = block(x)
            return self.ln_f(x) @ self.wte.weight.T

    torch.manual_seed(0)
    model: Any = Model()
    run = nn.parallel.DistributedDataParallel(model) if ranks > 1 else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    rows = SIZES["batch"] // ranks
    ids = torch.randint(0, SIZES["vocab"], (rows, SIZES["tokens"] + 1))
    x, y = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(run(x).view(-1, SIZES["vocab"]), y.view(-1)).backward()
        optimizer.step()

    return step, rank, dist.barrier if ranks > 1 else lambda: None


def serve(engine: str, width: int, ranks: int) -> None:
    """Take steps when told to: a line `N` on rank 0's standard input runs N steps and answers their times."""
    step, rank, barrier = (minipar_step if engine == "minipar" else torch_step)(width, ranks)
    for _ in range(2):
        step()
    go = os.environ["GPT_STEP_GO"]  # a file that counts rounds, so that every rank hears the command
    done = 0
    while True:
        while (told := _read(go)) == done:
            time.sleep(0.002)
        done = told
        if done < 0:
            break
        times = []
        barrier()
        for _ in range(3):
            start = time.perf_counter()
            step()
            times.append(time.perf_counter() - start)
        if rank == 0:
            print(json.dumps({"times": times, "peak": peak_mb()}), flush=True)


def _read(path: str) -> int:
    with open(path) as file:
        text = file.read()
    return int(text) if text else 0


# --- The parent: starts both engines and lets them take turns ------------------------------------------------


def start(engine: str, width: int, ranks: int, go: str) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, "--serve", engine, "--width", str(width), "--ranks", str(ranks)]
    env = {**os.environ, "GPT_STEP_GO": go, "PYTHONUNBUFFERED": "1", "MINIPAR_TIMEOUT": "600"}
    env.update(dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"))
    if ranks > 1 and engine == "minipar":
        command = [sys.executable, "-m", "minipar", "run", "-n", str(ranks), *command[1:]]
    elif ranks > 1:
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", *command[1:]]
    quiet = subprocess.DEVNULL if engine == "torch" else None
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=quiet, text=True, env=env)


def measure(width: int, ranks: int, rounds: int) -> dict[str, dict[str, float]]:
    """Return median seconds a step and peak MiB of rank 0 for both engines, interleaved."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        go = {engine: os.path.join(folder, engine) for engine in ("minipar", "torch")}
        for path in go.values():
            _tell(path, 0)
        jobs = {engine: start(engine, width, ranks, path) for engine, path in go.items()}
        times: dict[str, list[float]] = {engine: [] for engine in jobs}
        peak: dict[str, float] = {}
        try:
            for i in range(1, rounds + 1):
                for engine, job in jobs.items():
                    _tell(go[engine], i)
                    assert job.stdout is not None
                    answer = json.loads(job.stdout.readline() or '{"times": [], "peak": 0}')
                    if not answer["times"]:
                        raise SystemExit(f"{engine} with {ranks} ranks ended early (exit code {job.wait()})")
                    if i > 1:  # the first round warms caches and pools
                        times[engine] += answer["times"]
                    peak[engine] = answer["peak"]
        finally:
            for path in go.values():
                _tell(path, -1)
            for job in jobs.values():
                job.wait(timeout=60)
    return {e: {"seconds": statistics.median(times[e]), "peak_mb": peak[e]} for e in jobs}


def _tell(path: str, number: int) -> None:
    with open(path + ".new", "w") as file:
        file.write(str(number))
    os.replace(path + ".new", path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument(
        "--rounds", type=int, default=8, help="turns of three steps each, the first not counted"
    )
    parser.add_argument("--ranks", type=int, default=0, help="1 or 2 only (default: both)")
    parser.add_argument("--serve", choices=["minipar", "torch"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve, args.width, args.ranks)
        return
    print(f"GPT step, width {args.width}, {SIZES}, float32, one thread a rank, medians")
    print(
        f"{'ranks':>5}  {'minipar ms':>10}  {'PyTorch ms':>10}  {'throughput ratio':>16}"
        f"  {'minipar MiB':>11}  {'PyTorch MiB':>11}"
    )
    for ranks in [args.ranks] if args.ranks else [1, 2]:
        m = measure(args.width, ranks, args.rounds)
        ours, peer = m["minipar"], m["torch"]
        print(
            f"{ranks:>5}  {ours['seconds'] * 1e3:>10.0f}  {peer['seconds'] * 1e3:>10.0f}"
            f"  {peer['seconds'] / ours['seconds']:>16.2f}  {ours['peak_mb']:>11.0f}  {peer['peak_mb']:>11.0f}"
        )


if __name__ == "__main__":
    main()
