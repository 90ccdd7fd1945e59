"""Every combination that the pipeline is said to run, verified against serial training; the tests run a part.

    python -m tests.pipeline.full_grid                        # on threads, all
    python -m tests.pipeline.full_grid --quick                # a few of each kind
    mpirun -n 4 python -m tests.pipeline.full_grid --mpi      # the same under MPI, in one job

Under MPI each combination runs on the first ranks of the job; those that want more ranks are left out, and
counted. Prints the worst relative errors of each group and what is refused, and exits 1 if anything differs.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

import minipar
from minipar.comm.interface import Communicator
from minipar.errors import UsageError
from minipar.mesh import factorings
from minipar.parallel.pipeline.schedules import SCHEDULES
from minipar.training import load_data
from minipar.verification import Report, verify
from tests.pipeline.runs import EIGHT, settings

QUICK = 23  # of so many combinations of each kind one is run
LIMIT = 60.0  # seconds that one wait may take


@dataclass(frozen=True)
class Case:
    """One combination: settings of a model on so many ranks; `refused` if it must be, with these words."""

    group: str
    ranks: int
    kind: str
    options: dict[str, Any]
    refused: str = ""

    def __str__(self) -> str:
        shown = {k: v for k, v in self.options.items() if k not in EIGHT and v not in (None, False)}
        return f"{self.kind} on {self.ranks}: " + " ".join(f"{k}={v}" for k, v in shown.items())


def schedules_on_stages() -> Iterator[Case]:
    """Yield every schedule × stages × microbatches × accumulation × recompute × model."""
    for kind in ("gpt", "untied", "mlp", "convnet"):
        for schedule in SCHEDULES:
            for p in (2, 3, 4):
                for m in sorted({p, 2 * p, 8, 7}):
                    for accumulate in (1, 3):
                        for recompute in (False, True):
                            options = dict(
                                pp=p, schedule=schedule, microbatches=m, accumulate=accumulate, recompute=recompute
                            )  # fmt: skip
                            divides = schedule != "interleaved" or m % p == 0
                            yield Case(f"{kind}, {schedule}", p, kind, options, "" if divides else "divide")


def layouts_of_eight() -> Iterator[Case]:
    """Yield every factoring of 8 ranks into dp × pp × tp × ZeRO 0–1 × schedule, and ZeRO 2–3 where it may be."""
    for dp, pp, tp in factorings(8):
        for zero in (0, 1, 2, 3):
            for schedule in SCHEDULES if pp > 1 else (None,):
                options: dict[str, Any] = {**EIGHT, "dp": dp, "pp": pp, "tp": tp, "zero": zero, "steps": 1}
                if schedule is not None:
                    options |= {"schedule": schedule, "microbatches": pp * 2}
                yield Case(
                    f"8 ranks, ZeRO {zero}", 8, "gpt", options | {"sequence_parallel": tp == 2},
                    "with a pipeline is refused" if zero > 1 and pp > 1 else "",
                )  # fmt: skip


def tiles() -> Iterator[Case]:
    """Yield images in tiles through every schedule."""
    for schedule in SCHEDULES:
        for p in (2, 3) if schedule != "interleaved" else (2,):
            for grid in ("1x2", "2x2", "4x2"):
                yield Case("patchnet in tiles", p, "patchnet", dict(pp=p, schedule=schedule, tiles=grid))
    yield Case("convnet in tiles", 2, "convnet", dict(pp=2, tiles="2x2"), "reads 3 × 3 pixels")


@dataclass
class Found:
    """What came of a group of combinations."""

    passed: int = 0
    refused: dict[str, int] = field(default_factory=dict)  # by reason
    worst: dict[str, float] = field(default_factory=dict)  # by kind: largest relative error


Runner = Callable[[Case], Report]


def on_threads(case: Case) -> Report:
    """Run a combination on rank-threads."""
    config = settings(case.kind, **case.options)
    data = load_data(config)
    report: Report = minipar.launch(lambda: verify(config, minipar.world(), data), case.ranks, timeout=LIMIT)[0]
    return report


def under_mpi(world: Communicator) -> Runner:
    """Return what runs a combination on the first ranks of an MPI job, and tells the others what came of it."""
    groups: dict[int, Communicator | None] = {}

    def run(case: Case) -> Report:
        if case.ranks not in groups:
            groups[case.ranks] = world.split(0 if world.rank < case.ranks else None)
        part, outcome = groups[case.ranks], None
        if part is not None:
            with part.scope():  # verify frees what it splits, but not where it is refused half-way
                try:
                    outcome = verify(settings(case.kind, **case.options), part)
                except UsageError as error:
                    outcome = error
        outcome = world.broadcast_object(outcome)
        if isinstance(outcome, UsageError):
            raise outcome
        assert isinstance(outcome, Report)
        return outcome

    return run


def judge(case: Case, run: Runner, found: Found) -> str | None:
    """Run one combination and note what came of it; return what is wrong, or None."""
    try:
        report = run(case)
    except UsageError as error:
        if not case.refused or case.refused not in str(error):
            return f"refused: {error}"
        reason = str(error).split(":")[0] if "ZeRO" in str(error) else str(error).split(";")[0]
        found.refused[reason] = found.refused.get(reason, 0) + 1
        return None
    if case.refused:
        return "it was to be refused, and ran"
    for kind, worst in report.worst.items():
        found.worst[kind] = max(found.worst.get(kind, 0.0), worst.error)
    return None if report.holds else f"differs: {report}"


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.pipeline.full_grid", description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help=f"the same as --every {QUICK}")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="only each N-th combination")
    parser.add_argument("--mpi", action="store_true", help="on the ranks of this MPI job")
    options = parser.parse_args(words)
    world = minipar.world()
    if options.mpi and world.size == 1:
        parser.error("--mpi wants an MPI job: mpirun -n 4 python -m tests.pipeline.full_grid --mpi")
    run = under_mpi(world) if options.mpi else on_threads
    lists = [list(schedules_on_stages()), list(layouts_of_eight()), list(tiles())]
    every = QUICK if options.quick else options.every
    cases = [case for cases in lists for case in cases[::every]]
    fitting = [c for c in cases if not options.mpi or c.ranks <= world.size]
    groups: dict[str, Found] = {}
    failures = []
    start = time.monotonic()
    for done, case in enumerate(fitting):
        if world.rank == 0 and done and done % 100 == 0:
            print(f"{done} of {len(fitting)} after {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
        found = groups.setdefault(case.group, Found())
        wrong = judge(case, run, found)
        if wrong is None:
            found.passed += 1
        else:
            failures.append(f"{case}: {wrong}")
            if world.rank == 0:
                print(failures[-1], flush=True)
    if world.rank == 0:
        report(groups, len(cases) - len(fitting), time.monotonic() - start)
        print(f"{len(fitting) - len(failures)} passed, {len(failures)} failed")
    return 1 if failures or not fitting else 0


def report(groups: dict[str, Found], left_out: int, seconds: float) -> None:
    """Print the worst errors of each group, and what was refused."""
    table = Table(title=f"against serial training, float64, worst relative errors ({seconds:.0f} s)")
    for heading in ("group", "equal", "loss", "gradient", "weight"):
        table.add_column(heading, justify="left" if heading == "group" else "right")
    reasons: dict[str, int] = {}
    for name, found in groups.items():
        equal = found.passed - sum(found.refused.values())
        if equal:
            errors = [f"{found.worst[kind]:.1e}" for kind in ("loss", "gradient", "weight")]
            table.add_row(name, str(equal), *errors)
        for reason, n in found.refused.items():
            reasons[reason] = reasons.get(reason, 0) + n
    Console(width=100).print(table)
    for reason, n in reasons.items():
        print(f"refused, as it must be ({n}): {reason}")
    if left_out:
        print(f"left out for want of ranks: {left_out}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
