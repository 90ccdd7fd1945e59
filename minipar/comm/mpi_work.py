"""What is under way in an MPI communicator: nonblocking collectives, sends, receives."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from mpi4py import MPI

from minipar.backend import Array
from minipar.comm.guard import Call
from minipar.comm.interface import Work
from minipar.comm.wire import (
    HEADER_BYTES,
    Staged,
    as_buffer,
    may_lie_on_a_gpu,
    on_device,
    read_header,
    receive_buffer,
    unstage,
)
from minipar.errors import MismatchError

if TYPE_CHECKING:
    from minipar.comm.mpi import MPICommunicator


class MPICollective(Work):
    """A nonblocking collective: first its comparison comes back, then its data is started, in one stage or several.

    Args:
        stages: each starts something and returns its request; one begins when the one before is complete.

    Attributes:
        error: why the data is never started, once that is known.
    """

    def __init__(
        self, comm: MPICommunicator, call: Call, stages: Sequence[Callable[[], Any]], finish: Callable[[], Array]
    ) -> None:
        self.call = call
        self.error: MismatchError | None = None
        self._comm = comm
        self._stages = deque(stages)  # those still to be started
        self._finish = finish
        self._comparison = comm.signatures.begin(call) if comm.checks else None
        self._data: Any = None  # the request of the last stage that was started
        self._complete = False
        self._result: Array | None = None

    def compared(self) -> bool | None:
        """Return whether the data may be started; None while a rank has not asked for it."""
        return True if self._comparison is None else self._comparison.result()

    def started(self) -> bool | None:
        """Start the stages that may be started; return True when the last one is, None before."""
        while self._stages and (self._data is None or self._data.Test()):
            self._data = self._stages.popleft()()
        return None if self._stages else True

    def wait(self) -> Any:
        if not self._complete:
            comm = self._comm
            comm.journal.wait_begins(self.call)
            comm.start_queued(until=self)
            if self.error is not None:
                comm.journal.wait_ends()
                raise MismatchError(*self.error.args)
            comm.underway.wait(self._data)
            self._result = self._finish()
            self._complete = True
            comm.journal.wait_ends()
        return self._result

    def done(self) -> bool:
        if self._complete:
            return True
        self._comm.progress()
        if self._stages:
            return self.error is not None
        return bool(self._data.Test())


class MPISend(Work):
    """A send under way: the header, which is small enough never to wait, and the data."""

    def __init__(self, comm: MPICommunicator, call: Call, requests: list[Any], buffers: Any) -> None:
        self._comm = comm
        self._call = call
        self._requests = requests
        self._buffers = buffers  # kept alive while MPI reads them

    def wait(self) -> None:
        self._comm.journal.wait_begins(self._call)
        self._comm.underway.wait(*self._requests)
        self._comm.journal.wait_ends()
        self._buffers = None

    def done(self) -> bool:
        return bool(MPI.Request.Testall(self._requests))


class MPIReceive(Work):
    """A receive under way: the header tells shape and dtype, the data follows.

    Messages with the same source and tag keep their order: the data of a receive is not posted before that
    of the receives asked for earlier. Where shape and dtype are known it is posted at once, but for a new array
    that may have to lie on a GPU: the header says whether.
    """

    def __init__(self, comm: MPICommunicator, call: Call, out: Array | None) -> None:
        self._comm = comm
        self._call = call
        self._out = out
        self._buffer: Any = None  # what MPI writes into
        self._data: Any = None  # the request, once the data is posted
        self._complete = False
        self._source, self._tag = call.peer or 0, call.tag or 0
        self._header = bytearray(HEADER_BYTES)
        self._told: tuple[tuple[int, ...], Any, bool] | None = None  # by the header
        self._announced = comm.side.Irecv(self._header, self._source, self._tag)
        self._line: deque[MPIReceive] = comm.incoming.setdefault((self._source, self._tag), deque())
        if call.shape is not None and not self._line and not (out is None and may_lie_on_a_gpu()):
            self._post(call.shape, call.dtype, gpu=False)
        else:
            self._line.append(self)

    def _post(self, shape: tuple[int, ...], dtype: Any, gpu: bool) -> None:
        self._buffer = receive_buffer(self._out, shape, dtype, gpu)
        self._data = self._comm.mpi.Irecv(as_buffer(self._buffer), self._source, self._tag)

    def _post_line(self, block: bool) -> bool:
        """Post the data of all in the line up to this one, as headers come; return whether this one is."""
        while self._data is None:
            head = self._line[0]
            if block:
                self._comm.underway.wait(head._announced)
            elif not head._announced.Test():
                return False
            head._post(*head._read())
            self._line.popleft()
        return True

    def _read(self) -> tuple[tuple[int, ...], Any, bool]:
        """Return what the header says, once it is there, if it is what this receive expects."""
        if self._told is not None:
            return self._told
        shape, dtype, gpu = read_header(self._header)
        call, comm = self._call, self._comm
        if call.shape is not None and (call.shape, call.dtype) != (shape, dtype):
            comm.journal.wait_ends()
            raise MismatchError(
                f"rank {comm.members[comm.rank]} called {call}; rank {comm.members[self._source]} sent "
                f"{shape} {dtype}: they differ in shape or dtype"
            )
        self._told = shape, dtype, gpu
        return self._told

    def wait(self) -> Any:
        if not self._complete:
            comm = self._comm
            comm.journal.wait_begins(self._call)
            self._post_line(block=True)
            comm.underway.wait(self._announced)
            gpu = self._read()[2]
            comm.underway.wait(self._data)
            if self._out is None:
                self._out = on_device(self._buffer, gpu)
            elif self._out is not self._buffer:
                unstage(Staged(self._buffer, self._buffer, self._out))
            comm._add("recv", 0, self._buffer.size, self._buffer.nbytes)
            comm.journal.wait_ends()
            self._complete = True
        return self._out

    def done(self) -> bool:
        if self._complete:
            return True
        if not (self._post_line(block=False) and self._announced.Test()):
            return False
        self._read()  # before the data, of which MPI would only say that it does not fit
        return bool(self._data.Test())
