"""Runs the benchmarks, prints one table, and writes it as JSON with what the machine is.

    python benchmarks/run.py                        # everything that can run here: 20 minutes on 2 cores
    python benchmarks/run.py --only one_rank        # one group; may be given again
    python benchmarks/run.py --skip planner         # all but one: this one calibrates and runs 17 layouts
    python benchmarks/run.py --quick                # small sizes and few turns: does everything still run?
    python benchmarks/run.py --markdown table.md    # all tables as Markdown as well

Every time is a median of runs that take turns with their peer's, one BLAS thread a rank. A ratio above 1 means
faster than the peer. A peer that is not installed, and a group that cannot run here, are named with the reason.
Results are written after each group. Run it on a quiet machine: the load is printed and kept with the figures.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import limits
import machine
from peers import Missing
from table import NOT_MEASURED, Line, markdown, show
from turns import HERE, ONE_THREAD

GROUPS = {  # and the module that measures each
    "one_rank": "one_rank",
    "two_ranks": "two_ranks",
    "pipelines": "pipelines",
    "communication": "communication",
    "tracing": "tracing",
    "graph": "graph",
    "growth": "growth",
    "planner": "predictions",
    "gpu": "gpu",
}
RESULTS = HERE / "results"
Tables = dict[str, list[Line]]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", action="append", choices=GROUPS, help="run this group (default: all)")
    parser.add_argument("--skip", action="append", choices=GROUPS, default=[], help="leave this group out")
    parser.add_argument("--quick", action="store_true", help="small sizes, few turns")
    parser.add_argument("--out", type=Path, help=f"folder for JSON and picture (default: {RESULTS}; none with --quick)")
    parser.add_argument("--markdown", type=Path, help="write all tables there as Markdown, with date and machine")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that programs that take turns are ended, too
    os.environ.update(ONE_THREAD)
    out = options.out or (None if options.quick else RESULTS)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    about = machine.facts()
    about["limits"] = limits.found(options.quick)
    tables: Tables = {"limits": limits.lines(about["limits"])}
    print(f"{header(about)}\n\n{show(tables['limits'])}", flush=True)
    groups = [group for group in options.only or GROUPS if group not in options.skip]
    failed: list[str] = []
    for group in groups:
        start = time.monotonic()
        tables[group], failure = run_group(group, options.quick, out)
        if group == "gpu" and tables[group][0].ours is not None:
            about |= importlib.import_module("gpu").card()
        failed += [group] if failure else []
        about["load_after"] = list(os.getloadavg())
        print(f"\n{group} ({time.monotonic() - start:.0f} s)\n{show(tables[group])}", flush=True)
        if out is not None:
            file = write(out, about, tables, groups if len(groups) < len(GROUPS) else ())
        if options.markdown is not None:
            options.markdown.write_text(report(about, tables))
    print(summary(tables))
    if out is not None:
        print(f"written: {file}")
    return 1 if failed else 0


def run_group(group: str, quick: bool, out: Path | None) -> tuple[list[Line], bool]:
    """Return a group's lines, and whether it failed: one group that does must not cost the figures of the others."""
    extra = {"picture": out / "growth.png"} if group == "growth" and out else {}
    try:
        return importlib.import_module(GROUPS[group]).measure(quick, **extra), False
    except Missing as why:
        return [Line(f"group {group}", None, note=str(why))], False
    except Exception as error:
        traceback.print_exc()
        return [Line(f"group {group}", None, note=f"failed: {type(error).__name__}: {error}")], True


def header(about: dict[str, Any]) -> str:
    """Return the machine in words."""
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    return (
        f"{about['date']}, {about['cpu']}, {about['cores']} cores, load {about['load'][0]:.1f}\n"
        f"commit {about['commit']}, Python {about['python']}, {versions}, {', '.join(about['blas'])}"
    )


def summary(tables: Tables) -> str:
    """Return what falls short and what was not measured, one a line."""
    lines = [line for table in tables.values() for line in table]
    short = [line for line in lines if line.verdict not in ("", "ok", NOT_MEASURED)]
    absent = [line for line in lines if line.verdict == NOT_MEASURED]
    return (
        f"\n{len(short)} below what is wanted"
        + "".join(f"\n  {line.work}: {line.verdict}" for line in short)
        + (f"\n{len(absent)} not measured" if absent else "")
        + "".join(f"\n  {line.work}: {line.note}" for line in absent)
    )


def report(about: dict[str, Any], tables: Tables) -> str:
    """Return everything as Markdown: the machine, then a table a group."""
    parts = [line + "  " for line in header(about).splitlines()]
    for group, lines in tables.items():
        parts += ["", f"**{group.replace('_', ' ')}**", "", markdown(lines)]
    return "\n".join([*parts, ""])


def write(out: Path, about: dict[str, Any], tables: Tables, named: Iterable[str]) -> Path:
    """Write the results so far to a file that has the groups in its name that are `named`; return it."""
    name = machine.stamp(about) + "".join(f"-{group}" for group in named)
    file = out / f"{name}.json"
    lines = {group: [line.as_dict() for line in table] for group, table in tables.items()}
    file.write_text(json.dumps({"machine": about, "lines": lines}, indent=1, ensure_ascii=False) + "\n")
    return file


if __name__ == "__main__":
    raise SystemExit(main())
