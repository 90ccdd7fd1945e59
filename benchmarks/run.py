"""Runs the benchmarks, prints one table, and writes it as JSON with what the machine is.

    python benchmarks/run.py                        # everything, about half an hour on 2 cores
    python benchmarks/run.py --only one_rank        # one group; may be given again
    python benchmarks/run.py --quick                # small sizes and few turns: does everything still run?

Every time is a median of runs that take turns with their peer's, one BLAS thread a rank. A ratio above 1 means
faster than the peer. Run it on a quiet machine: the load is printed and kept with the figures.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import time
from pathlib import Path
from typing import Any

import machine
from table import Line, show
from turns import HERE, ONE_THREAD

GROUPS = ("one_rank", "two_ranks", "pipelines", "communication", "tracing", "graph", "growth")
RESULTS = HERE / "results"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", action="append", choices=GROUPS, help="run this group (default: all)")
    parser.add_argument("--quick", action="store_true", help="small sizes, few turns")
    parser.add_argument("--out", type=Path, help=f"folder for JSON and picture (default: {RESULTS}; none with --quick)")
    options = parser.parse_args()
    os.environ.update(ONE_THREAD)
    out = options.out or (None if options.quick else RESULTS)
    about = machine.facts()
    about["sgemm_gflops"] = round(machine.sgemm_rate() / 1e9, 1)
    about["copy_gb_per_s"] = round(machine.copy_rate() / 1e9, 1)
    print(header(about), flush=True)
    lines: dict[str, list[Line]] = {}
    for group in options.only or GROUPS:
        start = time.monotonic()
        extra = {"picture": out / "growth.png"} if group == "growth" and out else {}
        if out:
            out.mkdir(parents=True, exist_ok=True)
        lines[group] = importlib.import_module(group).measure(options.quick, **extra)
        print(f"\n{group} ({time.monotonic() - start:.0f} s)\n{show(lines[group])}", flush=True)
    about["load_after"] = list(os.getloadavg())
    short = [line for group in lines.values() for line in group if line.verdict not in ("", "ok")]
    print(f"\n{len(short)} below what is wanted" + "".join(f"\n  {line.work}: {line.verdict}" for line in short))
    if out:
        file = write(out, about, lines, options.only)
        print(f"written: {file}")


def header(about: dict[str, Any]) -> str:
    """Return the machine in words."""
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    return (
        f"{about['date']}, {about['cpu']}, {about['cores']} cores, load {about['load'][0]:.1f}\n"
        f"{versions}, {', '.join(about['blas'])}\n"
        f"measured limits of one core: sgemm {about['sgemm_gflops']} GFLOP/s, copy {about['copy_gb_per_s']} GB/s"
    )


def write(out: Path, about: dict[str, Any], lines: dict[str, list[Line]], only: list[str] | None) -> Path:
    """Write the results; return the file."""
    name = about["date"][:10] + "".join(f"-{group}" for group in only or ())
    file = out / f"{name}.json"
    tables = {group: [line.as_dict() for line in table] for group, table in lines.items()}
    file.write_text(json.dumps({"machine": about, "lines": tables}, indent=1, ensure_ascii=False) + "\n")
    return file


if __name__ == "__main__":
    main()
