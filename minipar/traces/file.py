"""A run's trace as a file: every rank's spans on one clock, in the form that trace viewers open.

The file is JSON in the Trace Event Format (Google, "Trace Event Format", 2016): drop it on
https://ui.perfetto.dev, or open chrome://tracing. A rank is a process; what it did is one thread of it, and
what was under way in the background are asynchronous tracks below. `read` gives the same spans back.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minipar.backend import peak_gpu_memory, peak_memory
from minipar.comm.interface import Communicator
from minipar.comm.launcher import core_numbers
from minipar.comm.traced import clock_offset
from minipar.errors import DataError, UsageError
from minipar.trace import FLIGHT, Span, Trace

MICROSECONDS = 1e6
PER_RANK = ("clock_error", "peak_memory", "gpu_memory", "host", "process", "cores")


class RunTrace:
    """The spans of all ranks, in seconds since the first of them began.

    Attributes:
        ranks: each rank's spans, by start; a span comes before those within it.
    """

    def __init__(self, ranks: Sequence[Sequence[Span]], facts: dict[str, Any]):
        self.ranks = [sorted(spans, key=lambda s: (s.start, -s.end)) for spans in ranks]
        self.facts = facts


class ClockedTrace:
    """A rank's trace with its clock's distance from rank 0's, taken when recording starts and when it ends."""

    def __init__(self, trace: Trace, comm: Communicator):
        self.trace, self.comm = trace, comm
        self.first = (comm.now(), *clock_offset(comm))

    def collect(self, facts: dict[str, Any], **own: Any) -> RunTrace | None:
        """Stop recording; return all ranks' spans on rank 0's clock, on rank 0. Collective.

        Args:
            facts: about the run; rank 0's are kept.
            own: about this rank; become lists with one entry a rank.
        """
        self.trace.on = False
        (begin, ahead, error), (end, ahead_then, error_then) = self.first, self._now()
        drift = (ahead_then - ahead) / (end - begin) if end > begin else 0.0

        def on_rank_0(t: float) -> float:
            return t - ahead - drift * (t - begin)

        spans = [
            s._replace(start=on_rank_0(s.start), end=on_rank_0(s.end))._asdict() for s in self.trace.spans
        ]
        own |= {
            "clock_error": max(error, error_then),
            "peak_memory": peak_memory(),
            "gpu_memory": peak_gpu_memory(),
            "host": platform.node(),
            "process": f"{platform.node()} {os.getpid()}",
            "cores": core_numbers(),
        }
        mine = {"spans": spans, "own": own}
        parts = self.comm.gather(np.frombuffer(json.dumps(mine).encode(), np.uint8), root=0)
        if parts is None:
            return None
        told = [json.loads(part.tobytes()) for part in parts]
        zero = min((s["start"] for rank in told for s in rank["spans"]), default=0.0)
        ranks = [
            [Span(**{**s, "start": s["start"] - zero, "end": s["end"] - zero}) for s in rank["spans"]]
            for rank in told
        ]
        return RunTrace(ranks, facts | {key: [rank["own"][key] for rank in told] for key in own})

    def _now(self) -> tuple[float, float, float]:
        now = self.comm.now()
        return (now, *clock_offset(self.comm))


def write(trace: RunTrace, path: Path) -> None:
    """Write a trace where viewers can read it, a line an event."""
    events: list[dict[str, Any]] = []
    for rank, spans in enumerate(trace.ranks):
        place = {"pid": rank, "tid": 0}
        events.append({"ph": "M", "name": "process_name", **place, "args": {"name": f"rank {rank}"}})
        events.append({"ph": "M", "name": "process_sort_index", **place, "args": {"sort_index": rank}})
        events.append({"ph": "M", "name": "thread_name", **place, "args": {"name": "what it does"}})
        for i, s in enumerate(spans):
            start, length = s.start * MICROSECONDS, (s.end - s.start) * MICROSECONDS
            event = {"name": s.name, "cat": s.kind, **place, "ts": start}
            if s.kind == FLIGHT:
                both = {**event, "id": f"{rank}.{i}"}
                events.append({**both, "ph": "b", "args": s.facts})
                events.append({**both, "ph": "e", "ts": start + length})
            else:
                events.append({**event, "ph": "X", "dur": length, "args": s.facts})
    lines = ",\n".join(json.dumps(event) for event in events)
    path.write_text(f'{{"otherData": {json.dumps(trace.facts)},\n"traceEvents": [\n{lines}\n]}}\n')


def read(path: Path) -> RunTrace:
    """Return what `write` wrote.

    Raises:
        UsageError: there is no such file.
        DataError: it is not one of ours.
    """
    if not path.is_file():
        raise UsageError(f"{path} does not exist: record one with minipar train MODEL --trace --out RUN")
    try:
        content = json.loads(path.read_text())
        facts = dict(content["otherData"])
        ranks: dict[int, list[Span]] = {}
        begun: dict[str, Any] = {}
        for event in content["traceEvents"]:
            spans = ranks.setdefault(event["pid"], [])
            if event["ph"] in ("X", "e"):
                opened = begun.pop(event["id"]) if event["ph"] == "e" else event
                start = opened["ts"] / MICROSECONDS
                end = (event["ts"] if event["ph"] == "e" else start * MICROSECONDS + event["dur"]) / MICROSECONDS
                spans.append(Span(event["cat"], event["name"], start, end, opened["args"]))
            elif event["ph"] == "b":
                begun[event["id"]] = event
        known = {len(facts[key]) for key in PER_RANK}
    except KeyError as error:
        raise DataError(f"{path} is no trace of minipar: {error} is missing") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is no trace of minipar: {error}") from None
    if sorted(ranks) != list(range(len(ranks))) or known != {len(ranks)}:
        raise DataError(f"{path} is damaged: ranks are missing")
    return RunTrace([ranks[rank] for rank in range(len(ranks))], facts)
