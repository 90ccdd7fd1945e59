"""How arrays travel through MPI: headers, digests, bytes, and GPU arrays by way of the host."""

import subprocess
import sys
import types
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from minipar.comm import guard, wire
from minipar.comm.guard import Call, mismatch, numbered


class FakeGPUArray:
    """As much of a CuPy array as staging needs. Its memory is only right once the stream is synchronised."""

    synchronised = 0

    def __init__(self, host: np.ndarray) -> None:
        self._host = host
        self.shape, self.dtype, self.size, self.nbytes = host.shape, host.dtype, host.size, host.nbytes

    def get(self, out: np.ndarray) -> np.ndarray:
        assert FakeGPUArray.synchronised, "read before the stream was synchronised"
        out[...] = self._host
        return out

    def set(self, host: np.ndarray) -> None:
        self._host[...] = host

    def reshape(self, *shape: int) -> "FakeGPUArray":
        return FakeGPUArray(self._host.reshape(*shape))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> type[FakeGPUArray]:
    def synchronize() -> None:
        FakeGPUArray.synchronised += 1

    def concatenate(parts: list[FakeGPUArray]) -> FakeGPUArray:
        FakeGPUArray.synchronised = 0  # one more kernel that is queued
        return FakeGPUArray(np.concatenate([part._host for part in parts]))

    cupy = types.ModuleType("cupy")
    cupy.concatenate = concatenate  # type: ignore[attr-defined]
    cupy.empty = lambda shape, dtype: FakeGPUArray(np.empty(shape, dtype))  # type: ignore[attr-defined]
    cupy.asarray = lambda x: x if isinstance(x, FakeGPUArray) else FakeGPUArray(x.copy())  # type: ignore[attr-defined]
    cupy.ndarray = FakeGPUArray  # type: ignore[attr-defined]
    cupy.cuda = types.SimpleNamespace(  # type: ignore[attr-defined]
        alloc_pinned_memory=bytearray,
        get_current_stream=lambda: types.SimpleNamespace(synchronize=synchronize),
    )
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(wire, "cuda_aware", lambda: False)
    FakeGPUArray.synchronised = 0
    return FakeGPUArray


def test_gpu_arrays_are_synchronised_and_staged(gpu: type[FakeGPUArray]) -> None:
    x, out = gpu(np.arange(6.0).reshape(2, 3)), gpu(np.zeros((2, 3)))
    staged = wire.stage(x, out)
    assert isinstance(staged.x, np.ndarray) and np.array_equal(staged.x, np.arange(6.0).reshape(2, 3))
    staged.out[...] = staged.x * 2
    assert not out._host.any()
    before = gpu.synchronised
    wire.unstage(staged)
    assert np.array_equal(out._host, 2 * x._host)
    assert gpu.synchronised == before + 1, "the host buffer is free only then"


def test_in_place_and_empty_gpu_arrays(gpu: type[FakeGPUArray]) -> None:
    x = gpu(np.ones(3))
    staged = wire.stage(x, x)
    assert staged.out is staged.x, "in place on the host, too"
    staged.out[...] = 5.0
    wire.unstage(staged)
    assert (x._host == 5).all()
    assert wire.stage(gpu(np.zeros((0, 4)))).x.shape == (0, 4)
    assert wire.stage(x).out is None


def test_a_cuda_aware_library_gets_the_array_itself(
    gpu: type[FakeGPUArray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "cuda_aware", lambda: True)
    x = gpu(np.ones(3))
    assert wire.stage(x, x) == wire.Staged(x, x, None)
    assert gpu.synchronised == 1


def test_parts_are_joined_before_mpi_reads_them(gpu: type[FakeGPUArray]) -> None:
    flat = wire.joined([gpu(np.ones((2, 2))), gpu(np.zeros(1))])
    assert flat._host.tolist() == [1, 1, 1, 1, 0]
    assert gpu.synchronised == 1, "else MPI reads what the memory held before"
    assert wire.joined([np.ones((2, 2)), np.zeros(1)]).tolist() == [1, 1, 1, 1, 0]


@pytest.mark.parametrize("op", ("max", "min"))
def test_what_python_reduces_is_staged_even_where_mpi_reads_gpu_memory(
    gpu: type[FakeGPUArray], monkeypatch: pytest.MonkeyPatch, op: str
) -> None:
    monkeypatch.setattr(wire, "cuda_aware", lambda: True)
    x = gpu(np.ones(3, np.float32))
    assert isinstance(wire.stage(x, x, op).x, np.ndarray)
    assert wire.stage(x, x, "sum").x is x
    whole = gpu(np.ones(3, np.int64))
    assert wire.stage(whole, whole, op).x is whole


class Message:
    """MPI of one message to come: the header is there, the data arrives in whatever buffer it is given."""

    def __init__(self, x: Any) -> None:
        self.x, self.into = x, []
        self.rank, self.members, self.incoming = 0, (0, 1), {}
        self.side = types.SimpleNamespace(Irecv=self.header)
        self.mpi = types.SimpleNamespace(Irecv=self.data)
        self.journal = types.SimpleNamespace(wait_begins=lambda call: None, wait_ends=lambda: None)
        self.underway = types.SimpleNamespace(wait=lambda request: request.Wait())

    def header(self, buffer: bytearray, source: int, tag: int) -> Any:
        buffer[:] = wire.pack_header(self.x)
        return types.SimpleNamespace(Wait=lambda: None, Test=lambda: True)

    def data(self, buffer: Any, source: int, tag: int) -> Any:
        self.into.append(buffer)
        host = buffer if isinstance(buffer, np.ndarray) else buffer._host
        host[...] = self.x._host if isinstance(self.x, FakeGPUArray) else self.x
        return types.SimpleNamespace(Wait=lambda: None, Test=lambda: True)

    def _add(self, *counts: Any) -> None: ...


@pytest.mark.parametrize("aware", (False, True))
@pytest.mark.parametrize("known", (False, True))
@pytest.mark.parametrize("where", ("new", "gpu", "host"))
def test_a_gpu_message_is_received_where_it_belongs(
    gpu: type[FakeGPUArray], monkeypatch: pytest.MonkeyPatch, where: str, known: bool, aware: bool
) -> None:
    """Straight into GPU memory where MPI can, which must be idle; else through pinned memory of the host."""
    from minipar.comm.mpi_work import MPIReceive

    monkeypatch.setattr(wire, "cuda_aware", lambda: aware)
    pinned: list[np.ndarray] = []
    monkeypatch.setattr(wire, "pinned", lambda shape, dtype: pinned.append(np.empty(shape, dtype)) or pinned[-1])
    sent = np.arange(6, dtype=np.float32).reshape(2, 3)
    out = {"new": None, "gpu": gpu(np.zeros((2, 3), np.float32)), "host": np.zeros((2, 3), np.float32)}[where]
    comm, call = Message(gpu(sent)), make_call(operation="recv", shape=(2, 3) if known else None, peer=1, tag=0)
    receive = MPIReceive(comm, call, out)  # type: ignore[arg-type]
    assert bool(comm.into) == (known and out is not None), "of a new array only the header tells where it belongs"
    got = receive.wait()
    (buffer,) = comm.into
    assert np.array_equal(got if where == "host" else got._host, sent)
    assert out is None or got is out
    if where == "host":
        assert buffer is out and not pinned
    elif aware:
        assert buffer is got and gpu.synchronised and not pinned
    else:
        assert buffer is pinned[0]


def test_numpy_arrays_are_not_copied() -> None:
    x, out = np.ones(3), np.ones(3)
    assert wire.stage(x, out).x is x and wire.stage(x, out).out is out


@pytest.mark.parametrize("dtype", (np.float16, np.float32, np.int64, bool, np.complex128, ml_dtypes.bfloat16))
@pytest.mark.parametrize("shape", ((), (0,), (3, 0, 5), (2, 3, 4)))
def test_headers_round_trip(shape: tuple[int, ...], dtype: type) -> None:
    header = bytearray(wire.pack_header(np.zeros(shape, dtype)))
    assert len(header) == wire.HEADER_BYTES
    assert wire.read_header(header) == (shape, np.dtype(dtype), False)


def test_dtypes_that_mpi_does_not_know_travel_as_bytes() -> None:
    x = np.zeros((2, 3), ml_dtypes.bfloat16)
    assert wire.as_buffer(x).dtype == np.uint8 and wire.as_buffer(x).size == 12
    assert wire.elements(x, [2, 0]) == [12, 0]
    y = np.zeros((2, 3), np.float32)
    assert wire.as_buffer(y) is y and wire.elements(y, [1, 1]) == [3, 3]


def make_call(**changes: object) -> Call:
    call = Call()
    values = dict(
        operation="all_reduce", background=False, group="world", number=3, shape=(4,), dtype=np.dtype("f4"),
        agree=(4,), symmetric=0, op="sum", root=None, counts=None, peer=None, tag=None, step=None, phase=None,
        since=0.0,
    )  # fmt: skip
    for name, value in {**values, **changes}.items():
        setattr(call, name, value)
    return call


def test_digests_differ_with_every_part_of_a_signature_and_are_the_same_in_every_process() -> None:
    from minipar.comm.signatures import DIGEST_BITS, digest_of, signature_of

    calls = [
        make_call(),
        make_call(operation="reduce"),
        make_call(background=True),
        make_call(number=4),
        make_call(dtype=np.dtype("f8")),
        make_call(agree=(5,)),
        make_call(op="max"),
        make_call(root=0),
        make_call(counts=(2, 2)),
        make_call(symmetric=1),
    ]
    digests = [digest_of(signature_of(call, 2)) for call in calls]
    assert len(set(digests)) == len(calls)
    assert all(0 <= digest < 2**DIGEST_BITS for digest in digests)
    program = (
        "import numpy as np; from minipar.comm.signatures import digest_of\n"
        "print(digest_of(('all_reduce', False, np.dtype('f4'), 'sum', None, None, (4,), 0, 1)))"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30)
    assert int(run.stdout) == digests[0], run.stderr


def test_mismatch_texts() -> None:
    calls = {
        rank: (call.signature, str(call))
        for rank, call in enumerate([make_call(), make_call(), make_call(dtype=np.dtype("f8"), op="max")])
    }
    assert mismatch(calls) == (
        "ranks 0-1 called all_reduce #3 of (4,) float32; "
        "rank 2 called all_reduce #3(op=max) of (4,) float64: they differ in dtype and op"
    )
    assert numbered([4]) == "rank 4" and numbered([5, 0, 2, 3, 4]) == "ranks 0, 2-5"
    done = "has finished; its last was b"
    texts = {0: "waits in a", 1: done, 2: done}
    assert guard.grouped(texts) == "rank 0 waits in a; ranks 1-2 have finished; their last was b"
