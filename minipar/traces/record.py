"""Records the first steps of a training run: what `minipar train --trace` adds to a run's directory.

    RUN/trace.json   every rank's spans, for a trace viewer and for `minipar trace show RUN`
    RUN/gantt.png    a typical step as a picture, a row for each rank
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from minipar.agreement import agreed
from minipar.comm.interface import Communicator
from minipar.comm.traced import TracedCommunicator
from minipar.files import replacing, told
from minipar.trace import Trace
from minipar.traces.file import ClockedTrace, RunTrace, write
from minipar.traces.picture import draw_step

PICTURE = "gantt.png"
STEPS = 20  # what is recorded: enough to see what is typical, and a file that a browser opens at once


class RunRecorder:
    """One rank's recording of a run. Collective, as are its methods.

    Args:
        comm: the run's ranks; let the run use `self.comm` instead.
        steps: how many are recorded.

    Attributes:
        trace: to be the current one while the run trains (`trace.recording`).
    """

    def __init__(self, comm: Communicator, out: Path, steps: int = STEPS):
        self.trace = Trace(comm.now)
        self.out, self.steps, self.recorded, self.done = out, steps, 0, False
        self._clocked = ClockedTrace(self.trace, comm)
        self.comm = TracedCommunicator(comm, self.trace) if comm.size > 1 else comm

    def after_step(self, facts: dict[str, Any]) -> None:
        """Note that a step has ended; after the last to be recorded, write the files."""
        self.recorded += 1
        if self.recorded == self.steps:
            self.finish(facts)

    def finish(self, facts: dict[str, Any]) -> None:
        """Write the files, if they are not yet written and there was a step: one may resume a run at its end.

        Args:
            facts: about the run, for titles and advice; see `traces.report`.

        Raises:
            WriteFailed: names the file; on every rank.
        """
        if self.done or not self.recorded:
            return
        self.done = True
        run = self._clocked.collect(facts)
        agreed(self.comm, lambda: None if run is None else self._write(run))

    def _write(self, run: RunTrace) -> None:
        for name, make in (("trace.json", write), (PICTURE, draw_step)):
            with told(self.out / name), replacing(self.out / name) as path:
                make(run, path)

    def summary(self) -> str:
        """Return in words where the recording is."""
        if not self.recorded:
            return "none, as no step was left to record"
        return f"{self.out / PICTURE}; minipar trace show {self.out} says more"
