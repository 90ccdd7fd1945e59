"""SIGTERM lets a run finish its step, save and end well; Ctrl-C ends it at once; each with one line."""

import functools
import json
import os
import re
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minipar import launch, world
from minipar.checkpoint import newest, open_checkpoint
from minipar.runs import load_run
from minipar.stopping import StopRequest
from tests.faults import programs
from tests.faults.running import ROOT, SLACK, Outcome, minipar, mpirun, needs_proc

STEPS = 200
SMALL = ("--width", 16, "--layers", 1, "--heads", 2, "--seq-len", 8, "--batch", 6, "--steps", STEPS)
FIRST = "step   1/200"
TERM, INT, HUP, QUIT, KILL = signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGKILL
PROGRAMS = Path(programs.__file__)
TIME = 12  # seconds that a job is given which does not end; it is stuck before
LIMIT = 40.0  # seconds after which a job that does not react to its launcher's signal is killed

Jobs = Callable[[str], Outcome]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def jobs(place: Path) -> Jobs:
    """The jobs of this file by name, each run when it is first asked for and nothing else runs."""

    def train(name: str, *options: object) -> tuple[object, ...]:
        return ("train", "gpt", *SMALL, "--out", place / name, *options)

    def saving(name: str, *options: object) -> tuple[object, ...]:
        return train(name, "--checkpoint", place / f"{name}-saved", *options)

    def run(number: int, *words: object) -> Outcome:
        """`minipar run -n 2 words`; the launcher gets the signal."""
        return minipar("run", "-n", 2, *words, number=number, ready=FIRST, limit=LIMIT)

    def alone(number: int, *words: object) -> Outcome:
        return minipar(*words, "--ranks", 2, number=number, ready=FIRST, PYTHONUNBUFFERED="1")

    def plain(number: int, *words: object, **options: object) -> Outcome:
        """`mpirun -n 2 minipar words`; mpirun gets the signal."""
        return mpirun(
            2, "minipar", *map(str, words), number=number, ready=FIRST, PYTHONUNBUFFERED="1", **options
        )

    def stuck(number: int, **options: object) -> Outcome:
        return mpirun(2, "tests.faults.programs", "stuck", "1", number=number, MINIPAR_TIMEOUT="60", **options)

    def under_run(fault: str, *options: object, number: int | None = None) -> Outcome:
        return minipar(
            "run", "-n", 2, *options, PROGRAMS, fault, 1, number=number, limit=LIMIT, MINIPAR_TIMEOUT="60",
            PYTHONPATH=str(ROOT),
        )  # fmt: skip

    ways: dict[str, Callable[[], Outcome]] = {
        "uncut": lambda: minipar(*train("uncut", "--ranks", 2)),  # two ranks add alike on both engines
        "stopped": lambda: run(TERM, *saving("stopped")),
        "resumed": lambda: minipar("run", "-n", 2, *saving("stopped"), "--resume"),
        "mpirun": lambda: plain(TERM, *saving("mpirun")),
        "threads": lambda: alone(TERM, *saving("threads")),
        "terminal closed": lambda: run(HUP, *saving("terminal closed")),
        "launcher killed": lambda: run(KILL, *saving("launcher killed")),
        "launcher killed, ranks stuck": lambda: under_run("stuck", number=KILL),
        "launcher killed, ranks stopped": lambda: under_run("all_stopped", number=KILL),
        "quit": lambda: run(QUIT, *train("quit")),
        "out of time": lambda: under_run("hangs", "--timeout", TIME),
        "unsaved": lambda: run(TERM, *train("unsaved")),
        "interrupted": lambda: run(INT, *train("int")),
        "interrupted threads": lambda: alone(INT, *train("int2")),
        "interrupted mpirun": lambda: plain(INT, *train("int3")),
        "interrupted at a terminal": lambda: plain(INT, *train("int4"), group=True),
        "interrupted while stuck": lambda: stuck(INT),
        "interrupted at a terminal while stuck": lambda: stuck(INT, group=True),
        "terminated": lambda: stuck(TERM),
    }
    return functools.cache(lambda name: ways[name]())


pytestmark = [needs_proc, pytest.mark.mpi]


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", ("stopped", "mpirun", "threads", "terminal closed", "launcher killed"))
def test_sigterm_finishes_the_step_saves_and_exits_well(name: str, jobs: Jobs, place: Path) -> None:
    """So do a closed terminal and a launcher that is killed: the ranks are told to end by a SIGTERM."""
    job = jobs(name)
    assert job.code == (-KILL if name == "launcher killed" else 0), job
    assert not job.lines() and not job.orphans, job
    (said,) = re.findall(r"stopped by SIGTERM after step (\d+) of 200, saved (.*); to go on, give the same", job.out)
    step, path = int(said[0]), Path(said[1])
    assert 1 <= step < STEPS and path.parent == place / f"{name}-saved"
    assert open_checkpoint(path).step == step
    if name != "stopped":  # that one has gone on since
        assert newest(path.parent) == path and len(losses(place / name)) == step
    assert job.seconds < SLACK


def test_a_stopped_run_goes_on_bitwise_as_if_it_had_not_been(jobs: Jobs, place: Path) -> None:
    assert jobs("stopped").code == 0 and jobs("resumed").code == 0 and jobs("uncut").code == 0, jobs("resumed")
    assert losses(place / "stopped") == losses(place / "uncut")
    whole, cut = (load_run(place / name)[0].state_dict() for name in ("uncut", "stopped"))
    assert all(whole[name].tobytes() == cut[name].tobytes() for name in whole)


def test_without_checkpoints_a_stopped_run_ends_as_a_finished_one(jobs: Jobs, place: Path) -> None:
    job = jobs("unsaved")
    assert job.code == 0 and not job.lines() and not job.orphans, job
    assert "without --checkpoint it cannot go on later, so it ends here as a finished run" in job.out
    assert f"stopped by SIGTERM after step {len(losses(place / 'unsaved'))} of {STEPS};" in job.out
    load_run(place / "unsaved")
    assert job.seconds < SLACK


@pytest.mark.parametrize(
    ("name", "code", "said"),
    (
        ("interrupted", 130, r"[rank "),
        ("interrupted threads", 130, "minipar: interrupted at rank 0, step "),
        ("interrupted mpirun", 130, r"[rank "),
        ("interrupted at a terminal", 130, r"[rank "),
        ("interrupted while stuck", 130, "step 3, backward] interrupted"),
        ("interrupted at a terminal while stuck", 130, "step 3, backward] interrupted"),
        ("launcher killed, ranks stuck", -KILL, "step 3, backward] ended by SIGTERM"),
        ("terminated", 143, "step 3, backward] ended by SIGTERM"),
    ),
)
def test_other_signals_end_a_job_with_one_line(name: str, code: int, said: str, jobs: Jobs) -> None:
    job = jobs(name)
    assert job.code == code, job
    assert len(job.lines()) == 1 and said in job.lines()[0] and "step " in job.lines()[0], job.err
    assert job.seconds < SLACK and not job.orphans


def test_ranks_that_react_to_nothing_end_with_their_launcher(jobs: Jobs) -> None:
    job = jobs("launcher killed, ranks stopped")
    assert job.code == -KILL and job.seconds < SLACK and not job.orphans, job


def test_sigquit_ends_the_ranks_as_it_ends_a_program(jobs: Jobs) -> None:
    job = jobs("quit")
    assert job.code not in (0, 1) and job.seconds < SLACK and not job.orphans, job
    assert re.search(r"rank \d died in step \d+, .*\(killed by a signal", job.err), job


def test_a_job_that_is_out_of_time_says_where_its_ranks_were(jobs: Jobs) -> None:
    job = jobs("out of time")
    assert job.code == 124 and job.seconds < TIME + SLACK and not job.orphans, job
    said = f"minipar: the job was killed after {TIME} s: ranks 0-1 were in step 3, backward; it ran "
    assert job.lines()[0].startswith(said), job.err


# In this process -------------------------------------------------------------------------------------


def test_ranks_agree_on_the_step_even_if_only_one_was_asked() -> None:
    def program() -> int:
        comm, stop = world(), StopRequest()
        for step in range(1, 10):
            stop.asked |= comm.rank == 2 and step == 4
            if stop.agreed(comm):
                return step
        return 0

    assert launch(program, 3) == [4, 4, 4]


def test_a_stop_request_gives_the_handler_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.asked and stop.agreed(world())
    assert signal.getsignal(signal.SIGTERM) is before


def waits() -> None:
    world().recv(0) if world().rank == 1 else world().barrier()


def computes() -> None:
    while True:
        np.arange(10).sum()


def communicates() -> None:
    while True:
        world().all_reduce(np.ones(3))


def launches() -> None:
    launch(computes, 2)


@pytest.mark.parametrize("program", (waits, computes, communicates, launches))
def test_ctrl_c_ends_ranks_in_this_process_and_leaves_it_usable(program: Any) -> None:
    def ranks() -> list[str]:
        return [thread.name for thread in threading.enumerate() if thread.name.startswith("minipar-rank")]

    at_work = threading.Event()
    all_at_work = threading.Barrier(3, at_work.set)  # one who is not would be named without its step

    def body() -> None:
        world().mark(step=5, phase="forward")
        all_at_work.wait()
        if program is waits:
            world().barrier()
            if world().rank == 2:
                computes()
        program()

    def press() -> None:
        at_work.wait()
        os.kill(os.getpid(), signal.SIGINT)

    before = ranks()
    finger = threading.Thread(target=press)
    finger.start()
    with pytest.raises(KeyboardInterrupt) as caught:
        launch(body, 3)
    finger.join()
    assert caught.value.__notes__ == ["at rank 0, step 5, forward (of 3 ranks)"]
    assert ranks() == before
    assert launch(lambda: float(world().all_reduce(np.ones(1))[0]), 3) == [3.0] * 3
