"""The ranks' second way to talk, besides MPI: a TCP connection from each to rank 0, for the watchdog.

Rank 0 says over MPI at which of its addresses it listens, and two secret words. A caller says the one and its
rank, and waits for the other: behind an address that is also its own host's (the loopback, a bridge of
containers) somebody else may listen.
"""

from __future__ import annotations

import json
import secrets
import socket
import struct
import sys
import threading
import time
from typing import Any

from minipar.comm.guard import numbered

CONNECT_SECONDS = 10.0  # to set up the connections
GREETING_SECONDS = 2.5  # of these, that one greeting may take
WORD_BYTES = 32


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


def connect(comm: Any, rank: int, size: int) -> dict[int, Line]:
    """Set up the connections over the MPI communicator `comm`; collective.

    Returns:
        On rank 0 the connections to all other ranks, elsewhere the one to rank 0. Rank 0 names those which are
        missing because a rank could not reach it within CONNECT_SECONDS.
    """
    if size == 1:
        return {}
    listener = invitation = None
    if rank == 0:
        listener = socket.create_server(("", 0), backlog=size)
        words = secrets.token_hex(WORD_BYTES // 2), secrets.token_hex(WORD_BYTES // 2)
        invitation = (own_addresses(), listener.getsockname()[1], words)
    addresses, port, words = comm.bcast(invitation, 0)
    lines = call_in(addresses, port, words, rank) if listener is None else accept(listener, words, size - 1)
    connected = comm.allgather(rank == 0 or bool(lines))
    missing = [r for r, there in enumerate(connected) if not there]
    if rank == 0 and missing:
        print(f"minipar: no TCP to {numbered(missing)}: a hang will not tell what they wait for", file=sys.stderr)
    return {r: line for r, line in lines.items() if r not in missing}  # they may have called and not been heard


def accept(listener: socket.socket, words: tuple[str, str], callers: int) -> dict[int, Line]:
    """Take so many calls of ranks, and answer them."""
    lines: dict[int, Line] = {}
    deadline = time.monotonic() + CONNECT_SECONDS
    with listener:
        while len(lines) < callers and time.monotonic() < deadline:
            listener.settimeout(max(deadline - time.monotonic(), 0.01))
            try:
                connection, _ = listener.accept()
                connection.settimeout(GREETING_SECONDS)
                hello = connection.recv(WORD_BYTES + 4, socket.MSG_WAITALL)
                word, rank = hello[:WORD_BYTES], hello[WORD_BYTES:]
                if len(rank) == 4 and secrets.compare_digest(word, words[0].encode()):
                    connection.sendall(words[1].encode())
                    connection.settimeout(None)
                    lines[struct.unpack("!I", rank)[0]] = Line(connection)
                else:
                    connection.close()
            except OSError:  # whoever it was has gone; a rank calls again at another address
                continue
    return lines


def call_in(addresses: list[str], port: int, words: tuple[str, str], rank: int) -> dict[int, Line]:
    """Call rank 0 at one address after the other until it answers; {} if it does at none."""
    for address in addresses:
        try:
            connection = socket.create_connection((address, port), timeout=GREETING_SECONDS)
            connection.sendall(words[0].encode() + struct.pack("!I", rank))
            answer = connection.recv(WORD_BYTES, socket.MSG_WAITALL)
        except OSError:
            continue
        if secrets.compare_digest(answer, words[1].encode()):
            connection.settimeout(None)
            return {0: Line(connection)}
        connection.close()
    return {}


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
