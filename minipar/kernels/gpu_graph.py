"""A step's GPU work captured once as a CUDA graph, then launched as a whole: no Python between its kernels.

    step = CapturedStep(lambda: compute_gradients(model, inputs, targets))
    inputs[...], targets[...] = next_batch   # in place: the graph reads and writes the memory it was captured with
    step()

What is captured must be the same work every time: no value may be read back to the host, sizes may not change, and
numbers computed in Python (a learning rate, Adam's bias corrections) stay what they were. So forward and backward
are for capturing, and the optimizer's step is not.

Not run on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from minipar.backend import device_module


class CapturedStep:
    """Capture `work`, whose GPU work is the same every time, and replay it when called.

    Args:
        work: called twice before the capture, so that kernels are compiled and cuBLAS has its workspace.

    Attributes:
        result: what `work` returned while it was captured; its arrays are written again by every replay.

    Raises:
        UsageError: there is no GPU.
    """

    def __init__(self, work: Callable[[], Any]):
        cupy = device_module("cuda")
        self.stream = cupy.cuda.Stream(non_blocking=True)  # the default stream cannot be captured
        # Memory that the graph writes must stay its own: nothing else may allocate from this pool.
        self.pool = cupy.cuda.MemoryPool()
        cupy.cuda.get_current_stream().synchronize()
        with cupy.cuda.using_allocator(self.pool.malloc), self.stream:
            for _ in range(2):
                work()
            self.stream.synchronize()
            self.stream.begin_capture()
            try:
                self.result = work()
            finally:
                self.graph = self.stream.end_capture()

    def __call__(self) -> Any:
        """Launch everything, wait for nothing; return `result`."""
        self.graph.launch(self.stream)
        return self.result

    def synchronize(self) -> None:
        """Wait until the last replay has ended."""
        self.stream.synchronize()
