"""The watchdog of an MPI job: who waits for what when nothing moves, and who has died.

MPI cannot tell why it waits, so the ranks have a second way to talk: a TCP connection from each to rank 0,
served by a thread that sleeps until something is said. A rank that has waited for `timeout` seconds in one
communication says so; rank 0 then asks all ranks what they are doing (the answer comes from their service
threads, whatever the program itself is stuck in), prints the answers as one line, and ends the job. A
connection that breaks without a farewell is a rank that was killed. A rank that returns from its program says
that it has finished and stays until all have, so that it can still be named.

Limits: the ranks must be able to reach rank 0 by TCP (otherwise one line says which cannot, and a hang names
only what is known); a rank stuck in native code that keeps the interpreter lock "does not answer".
"""

from __future__ import annotations

import json
import secrets
import select
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from minipar.comm.flight import entries, parting
from minipar.comm.guard import Journal, numbered, report

CONNECT_SECONDS = 10.0  # to set up the connections
ANSWER_SECONDS = 2.0  # that a rank has to say what it is doing


class Line:
    """A TCP connection that carries JSON objects, one a line."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self._unread = b""
        self._lock = threading.Lock()

    def send(self, **message: Any) -> None:
        """Send one object; a connection that is gone is noticed by the reader, so not here."""
        data = json.dumps(message).encode() + b"\n"
        with self._lock:
            try:
                self.connection.sendall(data)
            except OSError:
                return

    def receive(self) -> list[dict[str, Any]] | None:
        """Return the objects that have come, or None when the other end is gone."""
        try:
            data = self.connection.recv(65536)
        except OSError:
            return None
        if not data:
            return None
        *lines, self._unread = (self._unread + data).split(b"\n")
        return [json.loads(line) for line in lines]


class Watchdog:
    """The service of one rank.

    Args:
        fail: prints a line and ends the job; it never returns.
        lost: ends the job because of the rank whose connection broke; it never returns either.
    """

    def __init__(
        self, journal: Journal, timeout: float, fail: Callable[[str], None], lost: Callable[[int], None]
    ) -> None:
        self.journal = journal
        self.timeout = timeout
        self._fail = fail
        self._lost = lost
        self._lines: dict[int, Line] = {}  # rank 0: to every other rank; elsewhere: to rank 0
        self._gone: set[int] = set()  # ranks that said farewell
        self._answers: dict[int, str] = {}
        self._records: dict[int, list[Any]] = {}  # the flight recorders of those who answered
        self._ends: dict[int, str] = {}  # why ranks end, where it is an error
        self._asked_at: float | None = None
        self._reason = ""
        self._hangs = True  # what is asked about: a hang, or an abort
        self._all_finished = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="minipar-watchdog", daemon=True)

    def connect(self, comm: Any) -> None:
        """Set up the connections over the MPI communicator `comm` (collective), and begin to watch."""
        rank, size = self.journal.rank, self.journal.size
        if size > 1:
            listener = token = None
            if rank == 0:
                listener = socket.create_server(("", 0), backlog=size)
                token = secrets.token_hex(16)
                invitation = (own_addresses(), listener.getsockname()[1], token)
            else:
                invitation = None
            addresses, port, token = comm.bcast(invitation, 0)
            if rank == 0:
                assert listener is not None
                self._accept(listener, token)
            else:
                self._call_in(addresses, port, token)
            connected = comm.allgather(rank == 0 or bool(self._lines))
            if rank == 0 and not all(connected):
                who = numbered(r for r, there in enumerate(connected) if not there)
                print(f"minipar: no TCP to {who}: a hang will not tell what they wait for", file=sys.stderr)
        self._thread.start()

    def _accept(self, listener: socket.socket, token: str) -> None:
        deadline = time.monotonic() + CONNECT_SECONDS
        with listener:
            while len(self._lines) < self.journal.size - 1 and time.monotonic() < deadline:
                listener.settimeout(max(deadline - time.monotonic(), 0.01))
                try:
                    connection, _ = listener.accept()
                    connection.settimeout(CONNECT_SECONDS)
                    hello = connection.recv(36, socket.MSG_WAITALL)
                except OSError:
                    continue
                if len(hello) == 36 and secrets.compare_digest(hello[:32], token.encode()):
                    connection.settimeout(None)
                    self._lines[struct.unpack("!I", hello[32:])[0]] = Line(connection)
                else:
                    connection.close()

    def _call_in(self, addresses: list[str], port: int, token: str) -> None:
        for address in addresses:
            try:
                connection = socket.create_connection((address, port), timeout=CONNECT_SECONDS / 4)
                connection.sendall(token.encode() + struct.pack("!I", self.journal.rank))
            except OSError:
                continue
            connection.settimeout(None)
            self._lines[0] = Line(connection)
            return

    # The service thread -------------------------------------------------------------------------------

    def _serve(self) -> None:
        tick = min(0.25, self.timeout / 4)
        while not self._all_finished.is_set():
            if self._lines:
                by_connection = {line.connection: rank for rank, line in self._lines.items()}
                for connection in select.select(list(by_connection), [], [], tick)[0]:
                    self._hear(by_connection[connection])
            else:
                self._all_finished.wait(tick)
            self._look_at_own_wait()
            if self._asked_at is not None:
                self._conclude()

    def _hear(self, rank: int) -> None:
        messages = self._lines[rank].receive()
        if messages is None:
            del self._lines[rank]
            if rank not in self._gone and not self._all_finished.is_set():
                self._lost(rank)
            return
        for message in messages:
            if "ask" in message:
                self._lines[rank].send(state=self.journal.state(), record=entries(self.journal))
            elif "overdue" in message:
                self._ask(message["overdue"])
            elif "abort" in message:
                self._ask(message["abort"], hangs=False)
            elif "ends" in message:
                self._gone.add(rank)
                self._note_end(rank, message["ends"])
            elif "farewell" in message:
                self._gone.add(rank)
                if message["farewell"] == "finished":
                    self._note_answer(rank, message)
                    self._let_go_if_all_finished()
            elif "state" in message:
                self._note_answer(rank, message)
            elif "released" in message:
                self._gone.add(rank)
                self._all_finished.set()

    def _look_at_own_wait(self) -> None:
        call, since = self.journal.waiting, self.journal.waiting_since
        if call is None or time.monotonic() - since < self.timeout or call is not self.journal.waiting:
            return
        reason = f"rank {self.journal.rank} has waited {self.timeout:g} s"
        if self.journal.rank == 0:
            self._ask(reason)
        elif self._lines:
            self._lines[0].send(overdue=reason)
            self.journal.waiting_since = time.monotonic()  # say it once
        else:
            self._fail(report({self.journal.rank: self.journal.state()}, reason))

    def _note_answer(self, rank: int, message: dict[str, Any]) -> None:
        self._answers[rank], self._records[rank] = message["state"], message["record"]

    def _ask(self, reason: str, hangs: bool = True) -> None:
        if self._asked_at is None:
            self._reason, self._hangs, self._asked_at = reason, hangs, time.monotonic()
            for line in self._lines.values():
                line.send(ask=True)

    def _conclude(self) -> None:
        """Report once all have answered, or have had their time to."""
        assert self._asked_at is not None
        states = {0: self.journal.state(), **self._answers}
        if len(states) < self.journal.size and time.monotonic() - self._asked_at < ANSWER_SECONDS:
            return
        for rank in range(self.journal.size):
            states.setdefault(rank, "does not answer")
        said = "HangError: " + report(states, self._reason) if self._hangs else self._reason
        self._fail("\n".join(filter(None, [said, parting({0: entries(self.journal), **self._records})])))

    def abort(self, text: str) -> None:
        """End the job for a reason of the program's own, once the ranks have told what they were doing."""
        if self.journal.rank == 0:
            self._ask(text, hangs=False)
        elif self._lines:
            self._lines[0].send(abort=text)
        time.sleep(2 * ANSWER_SECONDS)  # rank 0 ends this process before
        self._fail(text)

    # The end ------------------------------------------------------------------------------------------

    def farewell(self, kind: str) -> None:
        """Tell rank 0 that this rank's end ("finished" or "failed") is its own doing."""
        self._gone.add(0)
        if self.journal.rank != 0 and self._lines:
            self._lines[0].send(farewell=kind, state=self.journal.state(), record=entries(self.journal))

    def all_end_alike(self, text: str, seconds: float) -> bool:
        """Return whether, within so many seconds, every rank ends for the reason that `text` gives."""
        self._gone.add(0)
        if self.journal.rank == 0:
            self._note_end(0, text)
        elif self._lines:
            self._lines[0].send(ends=text)
        return self._all_finished.wait(seconds)

    def _note_end(self, rank: int, text: str) -> None:
        self._ends[rank] = text
        if len(self._ends) == self.journal.size and len(set(self._ends.values())) == 1:
            self._release()

    def wait_for_all(self) -> None:
        """Return when every rank has finished; called at the interpreter's exit."""
        self.journal.finished = True
        self.farewell("finished")
        if self.journal.rank == 0:
            self._let_go_if_all_finished()
        self._all_finished.wait(None if self._lines else 0.0)

    def _let_go_if_all_finished(self) -> None:
        if self.journal.rank == 0 and self.journal.finished and set(self._lines) <= self._gone:
            self._release()

    def _release(self) -> None:
        for line in self._lines.values():
            line.send(released=True)
        self._all_finished.set()


def own_addresses() -> list[str]:
    """Return this host's IPv4 addresses, the loopback first: ranks on the same host take that."""
    addresses = ["127.0.0.1"]
    try:
        found = socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)
        addresses += [str(info[4][0]) for info in found]
    except OSError:  # a host whose name does not resolve still has its interfaces, below
        pass
    if sys.platform == "linux":
        import fcntl

        get_interface_address = 0x8915  # SIOCGIFADDR
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            for _, name in socket.if_nameindex():
                request = struct.pack("256s", name.encode()[:15])
                try:
                    reply = fcntl.ioctl(probe.fileno(), get_interface_address, request)
                except OSError:  # an interface without an IPv4 address
                    continue
                addresses.append(socket.inet_ntoa(reply[20:24]))
    return list(dict.fromkeys(addresses))
