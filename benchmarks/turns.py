"""Lets programs take turns, so that their times see the same machine: medians of interleaved runs.

    take_turns([Program("minipar", "gpt_steps:minipar_gpt", {"width": 256}),
                Program("torch", "gpt_steps:torch_gpt", {"width": 256})])

A program is a function `module:name` of this directory that returns a `Step`. Each runs in processes of its own,
so that peak memory is its own, too: one process, or ranks under minipar's mpirun or torch's launcher. The
parent tells them by a file's content to take a few steps each, in turn.
"""

from __future__ import annotations

import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peers import missing
from table import Line, faster

HERE = Path(__file__).parent
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


@dataclass
class Step:
    """What a program does again and again.

    Attributes:
        run: one step.
        rank: this process's rank.
        barrier: waits for all ranks.
        told: what the program says about itself in the end (on rank 0); every rank calls it.
    """

    run: Callable[[], Any]
    rank: int = 0
    barrier: Callable[[], Any] = lambda: None
    told: Callable[[], dict[str, Any]] = dict


@dataclass
class Program:
    """A program that takes turns.

    Attributes:
        engine: "minipar" or "torch", which says how several ranks are started.
        factory: `module:function` that returns a `Step`, given `arguments`.
        environment: variables set for it.
    """

    engine: str
    factory: str
    arguments: dict[str, Any] = field(default_factory=dict)
    ranks: int = 1
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def missing(self) -> str | None:
        """Why it cannot run on this machine, None if it can."""
        return missing("torch") if self.engine == "torch" else None

    def start(self, go: Path) -> subprocess.Popen[str]:
        script = [str(HERE / "turns.py"), self.factory, json.dumps(self.arguments)]
        command = [sys.executable, *script]
        if self.ranks > 1 and self.engine == "minipar":
            command = [sys.executable, "-m", "minipar", "run", "-n", str(self.ranks), *script]
        elif self.ranks > 1:
            command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={self.ranks}", *script]
        env = {**os.environ, **ONE_THREAD, "GO": str(go), "PYTHONUNBUFFERED": "1", "MINIPAR_TIMEOUT": "900"}
        quiet = subprocess.DEVNULL if self.engine == "torch" else None
        env.update(self.environment)
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=quiet, text=True, env=env)


@dataclass
class Result:
    """What a program gave.

    Attributes:
        seconds: the median of a step; nan where the program is absent.
        times: of every step that counts.
        peak_mb: the largest resident memory of rank 0, libraries included, in MiB.
        told: what the program said about itself.
        absent: why it did not run on this machine; None if it did.
    """

    seconds: float
    times: list[float]
    peak_mb: float
    told: dict[str, Any]
    absent: str | None = None


def absent(reason: str) -> Result:
    """Return the result of a program that cannot run here."""
    return Result(float("nan"), [], float("nan"), {}, reason)


def beside(work: str, ours: Result, peer: Result, name: str, wanted: float | None, note: str = "") -> Line:
    """Return the line of our step beside the peer's; of ours alone, with the reason, where the peer is absent."""
    if peer.absent is None:
        return faster(work, ours.seconds, peer.seconds, name, wanted, note)
    told = "; ".join(text for text in (note, peer.absent) if text)
    return Line(work, ours.seconds * 1e3, "ms", None, name, None, wanted, told)


def memory_beside(work: str, ours: Result, peer: Result, name: str, wanted: float | None) -> Line:
    """Return the line of our peak memory beside the peer's: the ratio is how many times ours theirs is."""
    work = f"{work}, peak memory"
    if peer.absent is None:
        note = "of the process, libraries included"
        return Line(work, ours.peak_mb, "MiB", peer.peak_mb, name, peer.peak_mb / ours.peak_mb, wanted, note)
    return Line(work, ours.peak_mb, "MiB", None, name, None, wanted, peer.absent)


def take_turns(programs: Sequence[Program], rounds: int = 8, steps: int = 3) -> list[Result]:
    """Run the programs in turn, `steps` steps each time; the first round warms up and does not count.

    A program whose peer is not installed is left out: its result says why.

    Raises:
        RuntimeError: a program ended early.
    """
    reasons = [program.missing for program in programs]
    here = iter(_take_turns([p for p, why in zip(programs, reasons) if why is None], rounds, steps))
    return [next(here) if why is None else absent(why) for why in reasons]


def _take_turns(programs: Sequence[Program], rounds: int, steps: int) -> list[Result]:
    times: list[list[float]] = [[] for _ in programs]
    answers: list[dict[str, Any]] = [{} for _ in programs]
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / str(i) for i in range(len(programs))]
        for file in files:
            tell(file, [0, 0])
        jobs = [program.start(file) for program, file in zip(programs, files)]
        try:
            for turn in range(1, rounds + 2):
                for i, (file, job) in enumerate(zip(files, jobs)):
                    tell(file, [turn, steps])
                    assert job.stdout is not None
                    line = job.stdout.readline()
                    if not line:
                        raise RuntimeError(f"{programs[i]} ended early (exit code {job.wait()})")
                    answers[i] = json.loads(line)
                    times[i] += answers[i]["times"] if turn > 1 else []
        finally:
            for file in files:
                tell(file, [-1, 0])
            for job in jobs:
                job.wait(timeout=120)
    return [
        Result(statistics.median(t), t, answer["peak_mb"], answer["told"]) for t, answer in zip(times, answers)
    ]


def tell(file: Path, words: list[int]) -> None:
    """Write a command: which turn it is, and how many steps to take; turn -1 ends the program."""
    new = file.with_suffix(".new")
    new.write_text(json.dumps(words))
    new.replace(file)


def serve(factory: str, arguments: dict[str, Any]) -> None:
    """Take steps when told to, and answer with their times (rank 0)."""
    module, name = factory.split(":")
    step: Step = getattr(importlib.import_module(module), name)(**arguments)
    go, last = Path(os.environ["GO"]), 0
    while True:
        turn, steps = json.loads(go.read_text())
        if turn == last:
            time.sleep(0.002)
            continue
        if turn < 0:
            break
        last, times = turn, []
        step.barrier()
        for _ in range(steps):
            start = time.perf_counter()
            step.run()
            times.append(time.perf_counter() - start)
        told = step.told()
        if step.rank == 0:
            print(json.dumps({"times": times, "peak_mb": peak_mb(), "told": told}), flush=True)


def peak_mb() -> float:
    """Return this process's largest resident memory so far, in MiB."""
    from minipar.backend import peak_memory

    return peak_memory() / 2**20


if __name__ == "__main__":
    serve(sys.argv[1], json.loads(sys.argv[2]))
