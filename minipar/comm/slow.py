"""A communicator behind a slower network: one machine imitates several that are far apart.

    minipar run -n 2 --latency 1ms --bandwidth 100MB/s train gpt --pp 2
    minipar run -n 4 --latency 10us,1ms --bandwidth 10GB/s,100MB/s --node-size 2 train gpt   # inside a node, between

Every message arrives α + βn seconds after it was sent, at the earliest, and a collective ends that much after
its last rank began it as `Levels.collective` says. Nothing waits on the way: a rank that computes meanwhile
finds the message there, so what a program hides behind computation is hidden here, too. Time is that of the
machine's one monotonic clock, so all ranks must be on it.
"""

from __future__ import annotations

import functools
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from minipar.backend import Array
from minipar.comm.clock import Clock
from minipar.comm.guard import Call
from minipar.comm.interface import Communicator, Work
from minipar.comm.ledger import Ledger, vector_bytes
from minipar.comm.levels import Levels
from minipar.errors import UsageError
from minipar.units import quantity

LATENCY, BANDWIDTH, NODE_SIZE = "MINIPAR_LATENCY", "MINIPAR_BANDWIDTH", "MINIPAR_NODE_SIZE"
SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6}
BYTES = {"B/s": 1.0, "kB/s": 1e3, "MB/s": 1e6, "GB/s": 1e9}


class SlowCommunicator(Communicator):
    """`inner` behind a network: `clock.alpha` seconds a message and `clock.beta` a byte, or two levels of that.

    All ranks of a group wrap it at the same point of the program; what is split from it is as slow. Collectives
    of one group follow each other on the wire, messages do not slow each other (as in the pipeline simulator
    and in virtual time). The ledger counts what the program asked for, not the time stamps sent along.
    """

    def __init__(self, inner: Communicator, network: Clock | Levels) -> None:
        super().__init__(inner.rank, inner.members, inner.name, inner.journal)
        self.inner = inner
        self.network = network if isinstance(network, Levels) else Levels(network, network, 1)
        stamps = inner.split(0, name="slow")
        assert stamps is not None
        inner._add("split", -1, 0, 0)  # the program has not asked for it
        self._number = inner._number  # calls are numbered here from now on
        stamps.ledger = Ledger()
        self.stamps = stamps
        self.busy_until = 0.0  # when the wire is free for this group's next collective
        self._queue: deque[SlowCollective] = deque()  # whose end is not known yet, in the order of issue

    # Collectives --------------------------------------------------------------------------------------

    def _after(self, call: Call, nbytes: int, operation: Callable[..., Any], *arguments: Any) -> Any:
        """Run a blocking operation and return its result when it would have arrived.

        The operation comes first, and so does its check that all ranks mean the same. The stamp tells all of them
        when the last began and the largest size, which is not the same on each where lists of arrays are sent.
        """
        stamp = np.array([time.monotonic(), nbytes])
        result = operation(call, *arguments)
        latest, largest = self.stamps.all_reduce_(stamp, op="max").tolist()
        self.settle()
        sleep_until(self.ends(call, largest, latest))
        return result

    def ends(self, call: Call, nbytes: float, latest: float) -> float:
        """Return when a collective ends that its last rank began at `latest`; the wire is taken until then."""
        seconds = self.network.collective(call.operation, nbytes, self.members)
        self.busy_until = max(latest, self.busy_until) + seconds
        return self.busy_until

    def settle(self, until: SlowCollective | None = None) -> None:
        """Find out when the collectives under way end: all, or those up to one; in their order."""
        while self._queue and (until is None or until in self._queue):
            self._queue.popleft().settle()

    def _collective(self, call: Call, x: Array, out: Array | None) -> None:
        self._after(call, vector_bytes(call.operation, x, out), self.inner._collective, x, out)

    def _start(self, call: Call, x: Array, out: Array) -> Work:
        stamp = self.stamps.all_reduce_async_(np.array([time.monotonic()]), op="max")
        work = SlowCollective(self, call, vector_bytes(call.operation, x, out), self.inner._start(call, x, out), stamp)
        self._queue.append(work)
        return work

    def _gather(self, call: Call, x: Array) -> list[Array] | None:
        parts: list[Array] | None = self._after(call, x.nbytes, self.inner._gather, x)
        return parts

    def _scatter(self, call: Call, parts: Sequence[Array] | None) -> Array:
        largest = max((part.nbytes for part in parts or ()), default=0)
        return self._after(call, largest, self.inner._scatter, parts)

    def _all_to_all(self, call: Call, parts: Sequence[Array]) -> list[Array]:
        mine = sum(part.nbytes for part in parts)
        received: list[Array] = self._after(call, mine, self.inner._all_to_all, parts)
        return received

    def _barrier(self, call: Call) -> None:
        self._after(call, 0, self.inner._barrier)

    def _broadcast_object(self, call: Call, obj: Any) -> Any:
        return self._after(call, 0, self.inner._broadcast_object, obj)

    def _all_gather_object(self, call: Call, obj: Any) -> list[Any]:
        objects: list[Any] = self._after(call, 0, self.inner._all_gather_object, obj)
        return objects

    def _split(self, call: Call, color: int | None, key: int, prefix: str) -> Communicator | None:
        part = self._after(call, 0, self.inner._split, color, key, prefix)
        return part if part is None or part.size == 1 else SlowCommunicator(part, self.network)

    @property
    def has_symmetric_memory(self) -> bool:
        return self.inner.has_symmetric_memory

    def _symmetric(self, call: Call, n: int) -> Array:
        array: Array = self._after(call, 0, self.inner._symmetric, n)
        return array

    def _free(self) -> None:
        self.inner._release()

    # Messages -----------------------------------------------------------------------------------------

    def _isend(self, call: Call, x: Array) -> Work:
        to = self.members[call.peer or 0]
        arrival = np.array([time.monotonic() + self.network.message(self.members[self.rank], to, x.nbytes)])
        stamp = self.stamps.isend(arrival, call.peer or 0, call.tag or 0)
        return SlowSend(self.inner._isend(call, x), stamp)

    def _irecv(self, call: Call, out: Array | None) -> Work:
        stamp = self.stamps.irecv(call.peer or 0, call.tag or 0, (1,), "float64")
        return SlowReceive(self.inner._irecv(call, out), stamp)

    # Place and time -----------------------------------------------------------------------------------

    def abort(self, reason: str) -> None:
        self.inner.abort(reason)

    def compute(self, seconds: float) -> None:
        self.inner.compute(seconds)

    def now(self) -> float:
        return self.inner.now()


def sleep_until(moment: float) -> None:
    """Return at a time of the monotonic clock, without using the core until then."""
    while (left := moment - time.monotonic()) > 0:
        time.sleep(left)


class SlowCollective(Work):
    """A collective under way: the data, and the ranks' latest beginning, from which its end follows."""

    def __init__(self, comm: SlowCommunicator, call: Call, nbytes: int, work: Work, stamp: Work) -> None:
        self._comm, self._call, self._nbytes = comm, call, nbytes
        self._work, self._stamp = work, stamp
        self._end: float | None = None

    def settle(self) -> None:
        """Learn when this ends. Those before it are settled first (`SlowCommunicator.settle`)."""
        self._end = self._comm.ends(self._call, self._nbytes, float(self._stamp.wait()[0]))

    def wait(self) -> Any:
        result = self._work.wait()
        self._comm.settle(until=self)
        assert self._end is not None
        sleep_until(self._end)
        return result

    def done(self) -> bool:
        moved, stamped = self._work.done(), self._stamp.done()
        if not (moved and stamped):
            return False
        queue = self._comm._queue
        while queue and queue[0]._stamp.done():
            queue.popleft().settle()
        return self._end is not None and time.monotonic() >= self._end


class SlowSend(Work):
    """A send under way. The sender is free when the message has left; only its arrival is late."""

    def __init__(self, work: Work, stamp: Work) -> None:
        self._work, self._stamp = work, stamp

    def wait(self) -> Any:
        result = self._work.wait()
        self._stamp.wait()
        return result

    def done(self) -> bool:
        stamped, sent = self._stamp.done(), self._work.done()
        return stamped and sent


class SlowReceive(Work):
    """A receive under way: complete once the time stamp that came along has passed."""

    def __init__(self, work: Work, stamp: Work) -> None:
        self._work, self._stamp = work, stamp

    def wait(self) -> Any:
        result = self._work.wait()  # first: a rank that waits in vain is to say for what the program asked
        sleep_until(float(self._stamp.wait()[0]))
        return result

    def done(self) -> bool:
        stamped, received = self._stamp.done(), self._work.done()
        return stamped and received and time.monotonic() >= float(self._stamp.wait()[0])


def parse_latency(text: str) -> float:
    """Return the seconds of "1ms", "50us" or "0.5s"."""
    return _number(text, SECONDS, "--latency")


def parse_bandwidth(text: str) -> float:
    """Return the bytes a second of "100MB/s" or "1GB/s"."""
    return _number(text, BYTES, "--bandwidth")


def _number(text: str, units: dict[str, float], option: str) -> float:
    value = quantity(text, units)
    if not value:
        known, example = ", ".join(units), "1ms" if units is SECONDS else "100MB/s"
        raise UsageError(f"{option} {text} must be a number above zero with a unit ({known}), such as {example}")
    return value


def network_environment(
    latency: str | None, bandwidth: str | None, node_size: int | None = None
) -> dict[str, str]:
    """Return the variables that put a job behind such a network.

    Args:
        latency, bandwidth: of every link; with `node_size` two of each, inside a node and between nodes: "10us,1ms".

    Raises:
        UsageError: no such time or bandwidth, or two of them without the size of a node.
    """
    if "" in (latency, bandwidth):
        raise UsageError("--latency and --bandwidth are empty: give 1ms or 100MB/s, for example, or leave them out")
    out = {} if node_size is None else {NODE_SIZE: str(node_size)}
    out |= {} if latency is None else {LATENCY: latency}
    out |= {} if bandwidth is None else {BANDWIDTH: bandwidth}
    _network(latency, bandwidth, node_size)
    return out


def _network(latency: str | None, bandwidth: str | None, node_size: int | None) -> Clock | Levels | None:
    given = [text for text in (latency, bandwidth) if text]
    if node_size is None and any("," in text for text in given):
        raise UsageError(f"{', '.join(given)}: for links inside a node and between nodes give --node-size as well")
    if not given:
        if node_size is not None:
            raise UsageError("--node-size is for --latency or --bandwidth, of the links in a node and between nodes")
        return None

    def both(text: str | None, parse: Callable[[str], float]) -> list[float]:
        words = text.split(",") if text else []
        if len(words) > 2:
            raise UsageError(f"{text}: give one for all links, or two: inside a node and between nodes")
        return [parse(word) for word in words] * (2 if len(words) == 1 else 1) or [0.0, 0.0]

    alphas = both(latency, parse_latency)
    betas = both(bandwidth, lambda text: 1 / parse_bandwidth(text))
    node, cluster = (Clock(alpha, beta) for alpha, beta in zip(alphas, betas))
    return node if node_size is None else Levels(node, cluster, node_size)


def network_in_environment() -> Clock | Levels | None:
    """Return the network that `minipar run` was asked to imitate; None if it was not."""
    size = os.environ.get(NODE_SIZE)
    return _network(os.environ.get(LATENCY), os.environ.get(BANDWIDTH), int(size) if size else None)


def as_environment_says(comm: Communicator) -> Communicator:
    """Return `comm`, behind the network that MINIPAR_LATENCY, _BANDWIDTH and _NODE_SIZE describe if they are set.

    The same object each time. The first call is collective.
    """
    network = network_in_environment()
    return comm if network is None or comm.size == 1 else _behind(comm, network)


@functools.cache
def _behind(comm: Communicator, network: Clock | Levels) -> Communicator:
    return SlowCommunicator(comm, network)
