"""A step's GPU work captured once as a CUDA graph, then launched as a whole: no Python between its kernels.

    step = CapturedStep(lambda: compute_gradients(model, inputs, targets))
    inputs[...], targets[...] = next_batch   # in place: the graph reads and writes the memory it was captured with
    step()

What is captured must be the same work every time. No value may be read back to the host, and sizes may not change.
Numbers computed in Python stay what they were: a dropout mask's step, a learning rate. AdamW with `capturable=True`
keeps what changes on the GPU, so that the optimizer's step can be a part of the graph; loss scaling with a fixed
scale as well. What is uploaded from the host, and CuPy's own calls of cuBLAS, it refuses.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from minipar.backend import device_module


class Capture:
    """One capture: who keeps a value from one use to the next looks here whether it was made for a graph.

    Attributes:
        at_replay: what Python has to do at every replay, which repeats the work of the GPU alone: an optimizer
            counts the new version of its parameters.
    """

    def __init__(self) -> None:
        self.at_replay: list[Callable[[], None]] = []


# The capture under way here, None outside. A copy made in one graph exists for that graph alone: outside it is
# memory that was never written, and another graph would not write it again.
capturing: ContextVar[Capture | None] = ContextVar("capturing", default=None)


class CapturedStep:
    """Capture `work`, whose GPU work is the same every time, and replay it when called.

    Args:
        work: called twice before the capture, so that kernels are compiled and cuBLAS has its workspace. These are
            real calls: where the optimizer is part of it, two steps are taken.

    Attributes:
        result: what `work` returned while it was captured; its arrays are written again by every replay.

    Raises:
        UsageError: there is no GPU.
    """

    def __init__(self, work: Callable[[], Any]):
        self.cupy = device_module("cuda")
        self.stream = self.cupy.cuda.Stream(non_blocking=True)  # the default stream cannot be captured
        # Memory that the graph writes must stay its own: nothing else may allocate from this pool.
        self.pool = self.cupy.cuda.MemoryPool()
        self.capture = Capture()
        self.cupy.cuda.get_current_stream().synchronize()
        with self.cupy.cuda.using_allocator(self.pool.malloc), self.stream:
            for _ in range(2):
                work()
            self.stream.synchronize()
            token = capturing.set(self.capture)
            self.stream.begin_capture()
            try:
                self.result = work()
            except BaseException:
                with contextlib.suppress(RuntimeError):  # CUDA's, for a capture broken off: what broke it off is told
                    self.stream.end_capture()
                raise
            finally:
                capturing.reset(token)
            self.graph = self.stream.end_capture()

    def __call__(self) -> Any:
        """Launch everything, wait for nothing on the host; return `result`.

        The graph's stream waits for what the caller's has queued, such as the next batch, and the caller's for the
        graph, so that whatever comes next there sees its results.
        """
        caller = self.cupy.cuda.get_current_stream()
        self.stream.wait_event(caller.record())
        self.graph.launch(self.stream)
        caller.wait_event(self.stream.record())
        for repeat in self.capture.at_replay:
            repeat()
        return self.result
