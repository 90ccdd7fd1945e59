"""Says in words what holds a run back, from the report of its trace, and what would help."""

from __future__ import annotations

from collections import Counter
from typing import Any

from minipar.traces.report import TraceReport
from minipar.units import bytes_text

LITTLE = 0.05  # a share of the time below which it is not worth an advice
SMALL_MESSAGE = 64 * 1024  # bytes up to which the start of a message costs more than its length


def advice(report: TraceReport, facts: dict[str, Any]) -> list[str]:
    """Return sentences: what takes the time, then each loss worth naming with what to do about it, largest first.

    Args:
        facts: of the run; `cores` and `host` of each rank, `microbatches` and `schedule` are read where they are there.
    """
    work = report.share("work")
    losses = {name: report.share(name) for name in ("others", "transfer", "stages", "data", "rest")}
    named = [name for name in sorted(losses, key=lambda name: -losses[name]) if losses[name] >= LITTLE]
    first = f"The ranks work {work:.0%} of the time"
    if (crowd := crowded(facts)) is not None:
        host, ranks, cores = crowd
        where = f" on {host}" if ranks < len(report.ranks) else ""
        return [
            f"{first}: the {ranks} of them{where} share {cores} cores and take turns, so the shares above say little"
            " about the layout. Use as many ranks as cores to learn more."
        ]
    if not named:
        return [f"{first}: nothing holds this run back but the work itself."]
    write = {"others": _others, "transfer": _transfer, "stages": _stages, "data": _data, "rest": _rest}
    return [f"{first}."] + [write[name](report, facts) for name in named]


def crowded(facts: dict[str, Any]) -> tuple[str, int, int] | None:
    """Return (host, its ranks, their cores) of the host with the fewest cores a rank, None if each rank has one.

    A launcher may have bound each rank to cores of its own, so it is the cores of all of a host's ranks that count.
    """
    cores: dict[str, set[int]] = {}
    ranks: Counter[str] = Counter()
    for host, mine in zip(facts.get("host", ()), facts.get("cores", ())):
        cores.setdefault(host, set()).update(mine)
        ranks[host] += 1
    if not ranks:
        return None
    worst = min(ranks, key=lambda host: len(cores[host]) / ranks[host])
    return (worst, ranks[worst], len(cores[worst])) if len(cores[worst]) < ranks[worst] else None


def _others(report: TraceReport, facts: dict[str, Any]) -> str:
    lost = f"They wait for each other {report.share('others'):.0%} of the time"
    if report.imbalance < LITTLE:
        return (
            f"{lost}, although all work equally long: they are disturbed at different moments, by other"
            " programs or by the machine; on a quiet machine this goes away."
        )
    return (
        f"{lost}: rank {report.busiest} works {report.imbalance:.0%} longer than the mean, and the others wait for"
        " it in their collectives. Give it less (a smaller part of the model or of the batch), or find what"
        " else runs on its core."
    )


def _transfer(report: TraceReport, facts: dict[str, Any]) -> str:
    def cost(key: tuple[str, str]) -> float:
        return report.traffic[key].transfer

    (operation, group) = max(report.traffic, key=cost)
    row = report.traffic[operation, group]
    size = row.bytes / row.calls if row.calls else None  # None: all were begun before the steps looked at
    hidden = report.share("hidden")
    buckets = " (larger buckets)" if (operation, group) == ("all_reduce", "dp") else ""
    helps = (
        f"the messages are small, so that starting them costs most: send fewer, larger ones{buckets}"
        if size is not None and size < SMALL_MESSAGE
        else "the bytes cost most: a larger batch a rank means more work for the same bytes"
    )
    return (
        f"Communication that nothing hides takes {report.share('transfer'):.0%} of the time (hidden behind work: up to"
        f" {hidden:.0%}). Most of it is {operation} in {group}"
        + (f", {bytes_text(size)} a call; {helps}." if size is not None else ".")
    )


def _stages(report: TraceReport, facts: dict[str, Any]) -> str:
    lost = f"Stages wait for their neighbours {report.share('stages'):.0%} of the time"
    if report.bubble is not None:
        lost += f" (bubble within the pipeline: {report.bubble:.0%})"
    m = facts.get("microbatches")
    if report.imbalance > 2 * LITTLE:
        return (
            f"{lost}: rank {report.busiest} works {report.imbalance:.0%} longer than the mean, and a pipeline is as"
            " fast as its slowest stage. Cut the model into more equal stages."
        )
    if m is None:
        return f"{lost}: only one rank works at a time; cut the batch into microbatches with a pipeline."
    if facts.get("schedule") == "naive":
        return f"{lost}: with schedule naive one stage works at a time, however many microbatches; use 1f1b or zb-h1."
    other = "" if facts.get("schedule") == "zb-h1" else ", and so does schedule zb-h1"
    return f"{lost}. More microbatches (now {m}) shrink the bubble{other}."


def _data(report: TraceReport, facts: dict[str, Any]) -> str:
    return f"Making batches takes {report.share('data'):.0%} of the time: have simpler data, or make them ahead."


def _rest(report: TraceReport, facts: dict[str, Any]) -> str:
    return (
        f"Outside of all this passes {report.share('rest'):.0%} of the time: Python between the operations, printing,"
        " checkpoints. A larger batch or a wider model makes it count less."
    )
