"""SIGTERM lets a run finish its step, save and end well; Ctrl-C ends it at once; each with one line."""

import json
import os
import re
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minipar import launch, world
from minipar.checkpoint import newest, open_checkpoint
from minipar.runs import load_run
from minipar.stopping import StopRequest
from tests.faults.running import Outcome, minipar, mpirun, needs_proc, slack

STEPS = 200
SMALL = ("--width", 16, "--layers", 1, "--heads", 2, "--seq-len", 8, "--batch", 6, "--steps", STEPS)
FIRST = "step   1/200"
TERM, INT = signal.SIGTERM, signal.SIGINT

Jobs = dict[str, Outcome]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def jobs(place: Path) -> Iterator[Jobs]:
    """All jobs of this file, three at a time."""

    def train(name: str, *options: object) -> tuple[object, ...]:
        return ("train", "gpt", *SMALL, "--out", place / name, *options)

    def saving(name: str, *options: object) -> tuple[object, ...]:
        return train(name, "--checkpoint", place / f"{name}-saved", *options)

    def stopped_and_resumed() -> tuple[Outcome, Outcome]:
        first = minipar("run", "-n", 2, *saving("stopped"), number=TERM, ready=FIRST, limit=100)
        return first, minipar("run", "-n", 2, *saving("stopped"), "--resume", limit=100)

    with ThreadPoolExecutor(3) as pool:
        both = pool.submit(stopped_and_resumed)
        found = {
            "uncut": pool.submit(minipar, *train("uncut", "--ranks", 2)),  # two ranks add alike on both engines
            "mpirun": pool.submit(
                mpirun, 2, "minipar", *map(str, saving("mpirun")), number=TERM, ready=FIRST, PYTHONUNBUFFERED="1"
            ),
            "threads": pool.submit(
                minipar, *saving("threads", "--ranks", 2), number=TERM, ready=FIRST, PYTHONUNBUFFERED="1"
            ),
            "unsaved": pool.submit(minipar, "run", "-n", 2, *train("unsaved"), number=TERM, ready=FIRST),
            "interrupted": pool.submit(minipar, "run", "-n", 2, *train("int"), number=INT, ready=FIRST),
            "interrupted threads": pool.submit(
                minipar, *train("int2", "--ranks", 2), number=INT, ready=FIRST, PYTHONUNBUFFERED="1"
            ),
            "interrupted while stuck": pool.submit(
                mpirun, 2, "tests.faults.programs", "stuck", number=INT, MINIPAR_TIMEOUT="60"
            ),
            "terminated": pool.submit(
                mpirun, 2, "tests.faults.programs", "stuck", number=TERM, MINIPAR_TIMEOUT="60"
            ),
        }  # fmt: skip
        done = {name: future.result() for name, future in found.items()}
        done["stopped"], done["resumed"] = both.result()
        yield done


pytestmark = [needs_proc, pytest.mark.mpi]


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", ("stopped", "mpirun", "threads"))
def test_sigterm_finishes_the_step_saves_and_exits_well(name: str, jobs: Jobs, place: Path) -> None:
    job = jobs[name]
    assert job.code == 0 and not job.lines() and not job.orphans, job
    (said,) = re.findall(r"stopped by SIGTERM after step (\d+) of 200, saved (.*); to go on, give the same", job.out)
    step, path = int(said[0]), Path(said[1])
    assert 1 <= step < STEPS and path.parent == place / f"{name}-saved"
    assert open_checkpoint(path).step == step
    if name != "stopped":  # that one has gone on since
        assert newest(path.parent) == path and len(losses(place / name)) == step
    assert job.seconds < slack()


def test_a_stopped_run_goes_on_bitwise_as_if_it_had_not_been(jobs: Jobs, place: Path) -> None:
    assert jobs["resumed"].code == 0 and jobs["uncut"].code == 0, jobs["resumed"]
    assert losses(place / "stopped") == losses(place / "uncut")
    whole, cut = (load_run(place / name)[0].state_dict() for name in ("uncut", "stopped"))
    assert all(whole[name].tobytes() == cut[name].tobytes() for name in whole)


def test_without_checkpoints_a_stopped_run_ends_as_a_finished_one(jobs: Jobs, place: Path) -> None:
    job = jobs["unsaved"]
    assert job.code == 0 and not job.lines() and not job.orphans, job
    assert "without --checkpoint it cannot go on later, so it ends here as a finished run" in job.out
    assert f"stopped by SIGTERM after step {len(losses(place / 'unsaved'))} of {STEPS};" in job.out
    load_run(place / "unsaved")


@pytest.mark.parametrize(
    ("name", "code", "said"),
    (
        ("interrupted", 130, r"[rank "),
        ("interrupted threads", 130, "minipar: interrupted at rank 0, step "),
        ("interrupted while stuck", 130, "step 3, backward] interrupted"),
        ("terminated", 143, "step 3, backward] ended by SIGTERM"),
    ),
)
def test_other_signals_end_a_job_with_one_line(name: str, code: int, said: str, jobs: Jobs) -> None:
    job = jobs[name]
    assert job.code == code, job
    assert len(job.lines()) == 1 and said in job.lines()[0], job.err
    assert job.seconds < slack() and not job.orphans


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

    def body() -> None:
        world().mark(step=5, phase="forward")
        at_work.set()
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


def test_ctrl_c_in_a_notebook_ends_the_cell_and_the_kernel_goes_on() -> None:
    manager_of = pytest.importorskip("jupyter_client.manager", reason="needs jupyter_client")
    pytest.importorskip("ipykernel", reason="needs ipykernel")
    manager, client = manager_of.start_new_kernel(kernel_name="python3")
    try:
        client.execute("import minipar, numpy as np", reply=True, timeout=60)
        loop = "print('ready', flush=True)\nwhile True: minipar.world().all_reduce(np.ones(3))"
        request = client.execute(f"def f():\n    exec({loop!r})\nminipar.launch(f, ranks=2)")
        while "ready" not in client.get_iopub_msg(timeout=60)["content"].get("text", ""):
            continue
        manager.interrupt_kernel()
        while (reply := client.get_shell_msg(timeout=60))["parent_header"].get("msg_id") != request:
            continue
        assert reply["content"]["ename"] == "KeyboardInterrupt"
        after = client.execute(
            "assert minipar.launch(lambda: minipar.world().rank, ranks=3) == [0, 1, 2]", reply=True, timeout=60
        )
        assert after["content"]["status"] == "ok", after["content"]
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
