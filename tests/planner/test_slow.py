"""The communicator behind a slower network: same results, nothing arrives early, waiting costs no core."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from minipar import launch, world
from minipar.comm.clock import Clock
from minipar.comm.levels import Levels
from minipar.comm.slow import (
    SlowCommunicator,
    network_environment,
    network_in_environment,
    parse_bandwidth,
    parse_latency,
)
from minipar.config import VERIFY_DEFAULTS, TrainConfig
from minipar.errors import HangError, MismatchError, UsageError
from minipar.training import Job

CLOCK = Clock(alpha=0.01, beta=1e-6)
X = np.arange(1000.0)  # 8,000 bytes: 8 ms on the wire


def slow() -> SlowCommunicator:
    return SlowCommunicator(world(), CLOCK)


@pytest.mark.parametrize("ranks", [2, 3])
def test_results_are_those_of_the_communicator_inside(ranks: int) -> None:
    def work() -> bool:
        fast = world()
        comm = SlowCommunicator(fast, Clock(1e-4, 1e-9))
        x = X + comm.rank
        same = [
            np.array_equal(comm.all_reduce(x), fast.all_reduce(x)),
            np.array_equal(comm.all_gather(x), fast.all_gather(x)),
            np.array_equal(comm.reduce_scatter(x), fast.reduce_scatter(x)),
            np.array_equal(comm.broadcast(x, root=1), fast.broadcast(x, root=1)),
            np.array_equal(comm.all_reduce_async(x).wait(), fast.all_reduce(x)),
            comm.all_gather_object(comm.rank) == list(range(ranks)),
            np.array_equal(comm.all_to_all([x] * ranks)[1], X + 1),
            np.array_equal(comm.scatter([X] * ranks if comm.rank == 0 else None), X),
        ]
        part = comm.split(0)
        assert isinstance(part, SlowCommunicator)
        sending = part.isend(x, (part.rank + 1) % ranks, 7)
        got = part.recv((part.rank - 1) % ranks, 7)
        sending.wait()
        comm.barrier()
        return all(same) and np.array_equal(got, X + (comm.rank - 1) % ranks)

    assert all(launch(work, ranks))


def test_what_the_program_did_not_ask_for_is_neither_counted_nor_blamed() -> None:
    def work() -> tuple[dict[tuple[str, str], tuple[int, int, int]], list[int]]:
        comm = SlowCommunicator(world(), Clock(1e-4))
        comm.barrier()
        comm.all_reduce(X)
        numbers = [call.number for call in comm.journal.entries if call.group == "world"]
        return comm.ledger.as_dict(), numbers

    for counts, numbers in launch(work, 2, timeout=20):
        assert counts == {("barrier", "world"): (1, 0, 0), ("all_reduce", "world"): (1, 1000, 8000)}
        assert numbers == sorted(set(numbers))

    def stuck() -> None:
        comm = SlowCommunicator(world(), Clock(1e-4))
        if comm.rank == 0:
            comm.recv(1, tag=5)
        comm.barrier()

    with pytest.raises(HangError, match=r"rank 0 waits in recv\(source=1, tag=5\)(?! of)"):
        launch(stuck, 2, timeout=0.5)


OPERATIONS = {
    "all_reduce": lambda comm: comm.all_reduce(X),
    "async": lambda comm: comm.all_reduce_async(X).wait(),
    "all_gather": lambda comm: comm.all_gather(X),
    "barrier": lambda comm: comm.barrier(),
    "recv": lambda comm: comm.send(X, 1) if comm.rank == 0 else comm.recv(0),
}


@pytest.mark.parametrize(
    ("name", "seconds"),
    [("all_reduce", 0.02 + 0.008), ("async", 0.02 + 0.008), ("all_gather", 0.01 + 0.008), ("barrier", 0.01),
     ("recv", 0.01 + 0.008)],
)  # fmt: skip
def test_nothing_arrives_before_its_time(name: str, seconds: float) -> None:
    def work() -> tuple[float, float]:
        comm = slow()
        comm.inner.barrier()
        start = time.monotonic()
        OPERATIONS[name](comm)
        return start, time.monotonic()

    times = launch(work, 2)
    if name == "recv":  # the message's time begins when it is sent
        times = [(times[0][0], times[1][1])]
    assert all(end - start >= seconds for start, end in times)


def test_collectives_follow_each_other_and_start_with_the_last_rank() -> None:
    def work() -> tuple[float, float]:
        comm = slow()
        first = comm.ends(_call("all_reduce"), 8000, 100.0)
        second = comm.ends(_call("all_reduce"), 8000, 100.0)
        return first, second

    first, second = launch(work, 2)[0]
    assert first == pytest.approx(100.028)
    assert second == pytest.approx(100.056)


def _call(operation: str):
    from minipar.comm.guard import Call

    call = Call()
    call.operation = operation
    return call


def test_a_message_is_there_when_its_time_has_passed_meanwhile() -> None:
    def work() -> tuple[bool, bool]:
        comm = slow()
        if comm.rank == 0:
            comm.send(X, 1)
            return True, True
        work = comm.irecv(0)
        while not work.done():  # the receiver goes on; the message lands by itself
            time.sleep(0.001)
        start = time.thread_time()
        work.wait()
        return work.done(), time.thread_time() - start < 0.01

    assert launch(work, 2) == [(True, True)] * 2


def test_the_ledger_counts_what_the_program_asked_for() -> None:
    def work() -> dict:
        comm = slow()
        comm.ledger.reset()
        comm.all_reduce(X)
        if comm.rank == 0:
            comm.send(X, 1)
        else:
            comm.recv(0)
        return comm.ledger.as_dict()

    first, second = launch(work, 2)
    assert first == {("all_reduce", "world"): (1, 1000, 8000), ("send", "world"): (1, 1000, 8000)}
    assert second == {("all_reduce", "world"): (1, 1000, 8000), ("recv", "world"): (1, 1000, 8000)}


@pytest.mark.parametrize("options", [dict(dp=2), dict(pp=2, microbatches=4), dict(zero=2)], ids=str)
def test_training_behind_it_gives_the_same_losses(options: dict) -> None:
    config = TrainConfig(model="mlp", steps=3, optimizer="sgd", dtype="float64", device="cpu", **options)
    config = config.resolved(VERIFY_DEFAULTS)

    def losses(network: bool) -> list[float]:
        def work() -> list[float]:
            comm = SlowCommunicator(world(), Clock(1e-3, 1e-8)) if network else world()
            return [record.loss for record in Job(config, comm).train()]

        return launch(work, 2)[0]

    assert losses(True) == losses(False)


def test_units_are_read_and_wrong_ones_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse_latency("1ms") == 1e-3 and parse_latency("50us") == pytest.approx(5e-5)
    assert parse_bandwidth("100MB/s") == 1e8 and parse_bandwidth("2 GB/s") == 2e9
    for text in ("1", "ms", "-1ms", "0s", "1 parsec", "1..2ms"):
        with pytest.raises(UsageError, match="--latency"):
            parse_latency(text)
    with pytest.raises(UsageError, match="100MB/s"):
        parse_bandwidth("100Mbit")
    assert network_environment(None, None) == {}
    for name, value in network_environment("1ms", "100MB/s").items():
        monkeypatch.setenv(name, value)
    assert network_in_environment() == Clock(1e-3, 1e-8)
    for name, value in network_environment("1ms,1s", "100MB/s", 2).items():
        monkeypatch.setenv(name, value)
    assert network_in_environment() == Levels(Clock(1e-3, 1e-8), Clock(1.0, 1e-8), 2)


@pytest.mark.parametrize(
    ("latency", "bandwidth", "node_size", "told"),
    [("10us,1ms", None, None, "--node-size"), (None, None, 2, "--latency"), ("1us,1ms,1s", None, 2, "inside a node"),
     ("1ms", "1GB/s", 0, "at least 1"), ("1us,", None, 2, "--latency")],
)  # fmt: skip
def test_levels_that_cannot_be(
    latency: str | None, bandwidth: str | None, node_size: int | None, told: str
) -> None:
    with pytest.raises(UsageError, match=told):
        network_environment(latency, bandwidth, node_size)


NETWORK = Levels(Clock(1e-3, 1e-8), Clock(1e-1, 1e-6), 2)


def test_links_inside_a_node_and_between_nodes() -> None:
    assert NETWORK.message(0, 1, 1000) == pytest.approx(1e-3 + 1e-5)
    assert NETWORK.message(1, 2, 1000) == pytest.approx(1e-1 + 1e-3)
    inside = NETWORK.collective("all_reduce", 1000, (2, 3))
    assert inside == pytest.approx(Clock(1e-3, 1e-8).collective("all_reduce", 1000, 2))
    assert NETWORK.collective("all_reduce", 1000, (1, 3)) == pytest.approx(2 * 1e-1 + 1e-3)
    # Reduce-scatter inside, an all-reduce of each half across, all-gather inside.
    assert NETWORK.collective("all_reduce", 1000, range(4)) == pytest.approx(2 * (1e-3 + 5e-6) + 2e-1 + 5e-4)


BETWEEN = Levels(Clock(0.0), Clock(0.0, 1.0), 4)  # only bytes that leave a node cost anything
WITHIN = Levels(Clock(0.0, 1.0), Clock(0.0), 4)


@pytest.mark.parametrize(
    ("operation", "between", "within"),
    [
        ("all_reduce", 2, 12),  # a quarter of 8 bytes for each rank, half of it twice; 3/4 of 8 twice
        ("reduce_scatter", 1, 6),
        ("all_gather", 1, 6),
        ("broadcast", 2, 12),
        ("reduce", 2, 12),
        ("all_to_all", 4, 6),  # of each rank's 8 bytes half are for the other node
        ("gather", 8, 48),  # each place's 8 bytes enter the root's node, whose 3 others hand on 16 each
        ("scatter", 8, 48),
        ("barrier", 0, 0),
    ],
)
def test_bytes_between_nodes_and_within(operation: str, between: float, within: float) -> None:
    assert BETWEEN.collective(operation, 8, range(8)) == between
    assert WITHIN.collective(operation, 8, range(8)) == within


def test_a_short_broadcast_goes_whole_where_cutting_it_takes_more_messages() -> None:
    assert Levels(Clock(1.0), Clock(1.0), 4).collective("broadcast", 8, range(8)) == 3  # lg 4 + lg 2


def test_sizes_that_differ_are_those_of_the_largest_on_every_rank() -> None:
    def work() -> list[float]:
        comm = SlowCommunicator(world(), Clock(0.0, 1e-6))
        ends = []
        for operation in (comm.gather, lambda x: comm.all_to_all([x, x])):
            comm.busy_until = 2.0**40  # in the far future: what is added to it depends on the size alone
            operation(np.zeros(1000 * (1 + comm.rank)))
            ends.append(comm.busy_until - 2.0**40)
        return ends

    with mock.patch("minipar.comm.slow.sleep_until"):
        for ends in launch(work, 2):
            assert ends == pytest.approx([0.016, 0.016], rel=0.05)


@pytest.mark.parametrize("operation", ["gather", "scatter", "all_to_all"])
def test_another_call_on_one_rank_is_a_mismatch(operation: str) -> None:
    def work() -> None:
        comm = slow()
        if comm.rank == 0:
            comm.all_reduce(X)
        elif operation == "gather":
            comm.gather(X)
        elif operation == "scatter":
            comm.scatter(None)
        else:
            comm.all_to_all([X, X])

    with pytest.raises(MismatchError, match=f"rank 0 called all_reduce.*rank 1 called {operation}"):
        launch(work, 2)


def test_ranks_of_a_node_are_near_each_other_and_others_far() -> None:
    def work() -> tuple[float, float, float, float]:
        comm = SlowCommunicator(world(), Levels(Clock(0.002), Clock(0.05), 2))
        pair, across = comm.split(comm.rank // 2), comm.split(comm.rank % 2)
        assert isinstance(pair, SlowCommunicator) and isinstance(across, SlowCommunicator)
        ends = [group.ends(_call("all_reduce"), 0, 0.0) for group in (pair, across)]
        comm.inner.barrier()
        start = time.monotonic()
        if comm.rank == 1:
            comm.send(X, 2)
        elif comm.rank == 2:
            comm.recv(1)
        return ends[0], ends[1], start, time.monotonic()

    ranks = launch(work, 4)
    for near, far, _, _ in ranks:
        assert near == pytest.approx(0.004) and far == pytest.approx(0.1)
    assert ranks[2][3] - ranks[1][2] >= 0.05  # from when the sender began to when the receiver had it


PROGRAM = """
import time
import numpy as np
import minipar

comm = minipar.world()
assert comm is minipar.world()
start = time.monotonic()
comm.all_reduce(np.ones(1000))  # 2 messages' latency, and 8 ms of bytes
assert time.monotonic() - start >= 0.048, "too early"
work = comm.all_reduce_async(np.ones(1000))
while not work.done():
    time.sleep(0.001)
assert np.array_equal(work.wait(), np.full(1000, 2.0))
print(f"rank {comm.rank} fine", flush=True)
"""


@pytest.mark.mpi
def test_minipar_run_imitates_a_network(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    words = ["run", "-n", "2", "--timeout", "60", "--latency", "20ms", "--bandwidth", "1MB/s", str(program)]
    job = subprocess.run([sys.executable, "-m", "minipar", *words], capture_output=True, text=True, timeout=90)
    assert job.returncode == 0, job.stderr
    assert "rank 0 fine" in job.stdout and "rank 1 fine" in job.stdout
