"""Lets programs take turns, so that their times see the same machine: medians of interleaved runs.

    take_turns([Program("minipar", "steps:ours", {"width": 256}),
                Program("torch", "steps:torchs", {"width": 256})])

A program is a function `module:name` of this directory that returns a `Step`. Each runs in processes of its own,
so that peak memory is its own, too: one process, or ranks under minipar's mpirun or torch's launcher. Every process
holds a connection to the parent, which tells it when to take a few steps. Those whose turn it is not sleep in a
read: six that looked for a word 500 times a second would take 7 % of two cores from the one that is measured.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import socket
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
Answer = dict[str, Any]  # of a turn: "times" of its steps, "peak_mb" so far, and what the program "told"
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


@dataclass
class Step:
    """What a program does again and again.

    Attributes:
        run: one step.
        rank: this process's rank.
        barrier: waits for all ranks.
        told: figures that the program gives of its steps since it was asked last (on rank 0); every rank calls it.
    """

    run: Callable[[], Any]
    rank: int = 0
    barrier: Callable[[], Any] = lambda: None
    told: Callable[[], dict[str, float]] = dict


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

    def start(self, address: Path) -> subprocess.Popen[bytes]:
        """Start its processes, which report to the socket at `address`."""
        script = [str(HERE / "turns.py"), self.factory, json.dumps(self.arguments)]
        command = [sys.executable, *script]
        if self.ranks > 1 and self.engine == "minipar":
            command = [sys.executable, "-m", "minipar", "run", "-n", str(self.ranks), *script]
        elif self.ranks > 1:
            command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={self.ranks}", *script]
        env = {**os.environ, **ONE_THREAD, "TURNS": str(address), "MINIPAR_TIMEOUT": "900"}
        quiet = subprocess.DEVNULL if self.engine == "torch" else None
        env.update(self.environment)
        return subprocess.Popen(command, stdout=quiet, stderr=quiet, env=env)


@dataclass
class Result:
    """What a program gave.

    Attributes:
        seconds: the median of a step; nan where the program is absent.
        times: of every step that counts.
        peak_mb: the largest resident memory of rank 0, libraries included, in MiB.
        told: the figures that the program gave, each its median over turns.
        absent: why it did not run on this machine; None if it did.
    """

    seconds: float
    times: list[float]
    peak_mb: float
    told: dict[str, float]
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


def take_turns(programs: Sequence[Program], rounds: int = 8, steps: int = 3, launches: int = 1) -> list[Result]:
    """Run the programs in turn, `steps` steps each time; the first round warms up and does not count.

    A program whose peer is not installed is left out: its result says why.

    Args:
        launches: how often all of them are started anew: where a process's memory lies changes its speed by some
            percent. There are `rounds` after each. Each time in another order, and so are the turns: the program that
            came first was up to 3 % slower than the same program in another place.

    Raises:
        RuntimeError: a program ended early.
    """
    reasons = [program.missing for program in programs]
    present = [program for program, why in zip(programs, reasons) if why is None]
    found: list[list[Answer]] = [[] for _ in present]
    draw = random.Random(0)
    for _ in range(launches):
        order = draw.sample(range(len(present)), len(present))
        for i, answers in zip(order, _launched([present[i] for i in order], rounds, steps, draw)):
            found[i] += answers
    results = (result_of(answers) for answers in found)
    return [next(results) if why is None else absent(why) for why in reasons]


def _launched(programs: Sequence[Program], rounds: int, steps: int, draw: random.Random) -> list[list[Answer]]:
    """Start the programs, and return what each answered in the rounds that count; `draw` gives each turn's order."""
    answers: list[list[Answer]] = [[] for _ in programs]
    with tempfile.TemporaryDirectory() as folder:
        jobs: list[Job] = []
        try:
            for i, program in enumerate(programs):
                jobs.append(Job(program, Path(folder) / str(i)))
            for turn in range(rounds + 1):
                for i in draw.sample(range(len(jobs)), len(jobs)):
                    answer = jobs[i].turn(steps)
                    if turn:
                        answers[i].append(answer)
        finally:
            for job in jobs:
                job.end()
    return answers


def result_of(answers: Sequence[Answer]) -> Result:
    """Return medians over all turns, and the highest peak."""
    times = [seconds for answer in answers for seconds in answer["times"]]
    told = {name: statistics.median(answer["told"][name] for answer in answers) for name in answers[0]["told"]}
    return Result(statistics.median(times), times, max(answer["peak_mb"] for answer in answers), told)


class Job:
    """A program's processes, each at the other end of a connection; they start at once and sleep until their turn.

    Raises:
        RuntimeError: it ended before all of its processes had reported.
    """

    def __init__(self, program: Program, address: Path):
        self.program = program
        self._ranks: list[Any] = []  # a file to write to and read from, by rank
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(address))
            listener.listen()
            listener.settimeout(0.5)
            self._process = program.start(address)
            connected: dict[int, Any] = {}
            while len(connected) < program.ranks:
                try:
                    connection, _ = listener.accept()
                except TimeoutError:
                    if self._process.poll() is not None:
                        raise self._ended() from None
                    continue
                connection.settimeout(None)
                words = connection.makefile("rw")
                connection.close()  # the file keeps it open
                connected[int(self._read(words))] = words
            self._ranks = [connected[rank] for rank in range(program.ranks)]

    def turn(self, steps: int) -> Answer:
        """Let every rank take `steps` steps and return what rank 0 answers."""
        for words in self._ranks:
            print(steps, file=words, flush=True)
        answers = [self._read(words) for words in self._ranks]
        return dict(json.loads(answers[0]))

    def end(self) -> None:
        """End every process: a closed connection tells it to."""
        for words in self._ranks:
            words.close()
        self._process.wait(timeout=120)

    def _read(self, words: Any) -> str:
        line = str(words.readline())
        if not line:
            raise self._ended()
        return line

    def _ended(self) -> RuntimeError:
        return RuntimeError(f"{self.program} ended early (exit code {self._process.wait(timeout=120)})")


def serve(factory: str, arguments: dict[str, Any]) -> None:
    """Take as many steps as each line from the parent says, and answer with their times."""
    module, name = factory.split(":")
    step: Step = getattr(importlib.import_module(module), name)(**arguments)
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(os.environ["TURNS"])
        with connection.makefile("rw") as words:
            print(step.rank, file=words, flush=True)
            for steps in words:
                times = []
                step.barrier()
                for _ in range(int(steps)):
                    start = time.perf_counter()
                    step.run()
                    times.append(time.perf_counter() - start)
                answer = {"times": times, "peak_mb": peak_mb(), "told": step.told()}
                print(json.dumps(answer), file=words, flush=True)


def peak_mb() -> float:
    """Return this process's largest resident memory so far, in MiB; nan where Linux's /proc does not tell it.

    Without minipar's own function for it: to import minipar would count as memory of the peer's process.
    """
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) / 2**10 for line in lines if line.startswith("VmHWM")), float("nan"))


if __name__ == "__main__":
    serve(sys.argv[1], json.loads(sys.argv[2]))
