"""How a captured step is ordered with its caller's work, on a CuPy that only writes down what it is asked."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest

from minipar.kernels import gpu_graph
from minipar.kernels.gpu_graph import CapturedStep, capturing


class Stream:
    """A stream that notes what is done on it, and to it."""

    current: ClassVar[list[Stream]] = []

    def __init__(self, name: str, notes: list[str]):
        self.name, self.notes = name, notes

    def __enter__(self) -> None:
        Stream.current.append(self)

    def __exit__(self, *error: Any) -> None:
        Stream.current.pop()

    def note(self, what: str) -> str:
        self.notes.append(f"{self.name}: {what}")
        return f"what {self.name} has queued"

    def record(self) -> str:
        return f"what {self.name} has queued"

    def wait_event(self, event: str) -> None:
        self.note(f"waits for {event}")

    def synchronize(self) -> None:
        self.note("the host waits")

    def begin_capture(self) -> None:
        self.note("capture begins")

    def end_capture(self) -> Any:
        self.note("capture ends")
        return types.SimpleNamespace(launch=lambda stream: stream.note("launch"))


@pytest.fixture
def notes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    notes: list[str] = []
    Stream.current = [Stream("caller", notes)]
    cuda = types.SimpleNamespace(
        Stream=lambda non_blocking: Stream("graph", notes),
        MemoryPool=lambda: types.SimpleNamespace(malloc=None),
        get_current_stream=lambda: Stream.current[-1],
        using_allocator=lambda malloc: contextlib.nullcontext(),
    )
    monkeypatch.setattr(gpu_graph, "device_module", lambda device: types.SimpleNamespace(cuda=cuda))
    yield notes


def test_a_replay_waits_for_the_caller_s_work_and_the_caller_for_it_and_the_host_for_nothing(notes: list[str]) -> None:
    step = CapturedStep(lambda: Stream.current[-1].note("work"))
    assert notes == [
        "caller: the host waits",
        "graph: work",
        "graph: work",
        "graph: the host waits",
        "graph: capture begins",
        "graph: work",
        "graph: capture ends",
    ]
    notes.clear()
    step()
    assert notes == [
        "graph: waits for what caller has queued",
        "graph: launch",
        "caller: waits for what graph has queued",
    ]


def test_what_python_has_to_repeat_is_repeated_at_each_replay_only(notes: list[str]) -> None:
    def work() -> None:
        graph = capturing.get()
        if graph is not None:
            graph.at_replay.append(lambda: notes.append("counted"))

    step = CapturedStep(work)
    assert "counted" not in notes and capturing.get() is None
    step()
    step()
    assert notes.count("counted") == 2


def test_a_capture_that_fails_leaves_nothing_behind(notes: list[str]) -> None:
    def work() -> None:
        if capturing.get() is not None:
            raise ValueError("a value was read back")

    with pytest.raises(ValueError, match="a value was read back"):
        CapturedStep(work)
    assert notes[-1] == "graph: capture ends" and capturing.get() is None


def test_what_broke_a_capture_off_is_told_and_not_that_it_was_broken_off(
    notes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def work() -> None:
        if capturing.get() is not None:
            raise ValueError("a value was read back")

    def invalidated(stream: Stream) -> None:
        raise RuntimeError("cudaErrorStreamCaptureInvalidated")

    monkeypatch.setattr(Stream, "end_capture", invalidated)
    with pytest.raises(ValueError, match="a value was read back"):
        CapturedStep(work)
    assert capturing.get() is None
