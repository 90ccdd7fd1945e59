"""`minipar calibrate`: measure this machine under the launcher, write machine.json and a picture of the fit."""

from __future__ import annotations

import sys
from pathlib import Path

from rich.table import Table

from minipar.comm import world
from minipar.comm.interface import Communicator
from minipar.comm.launcher import available_cores, run_mpi
from minipar.commands.report import console, say
from minipar.errors import DataError, UsageError
from minipar.planner.machine import Machine, write_machine
from minipar.plot import communication_fit

DTYPES = ("float32", "float64")
LIMIT = 600.0  # seconds after which the job is killed


def calibrate_command(ranks: int | None, out: Path, png: Path | None, dtype: str) -> int:
    """Measure on `ranks` MPI ranks (by default one a core), or on those of the job this runs in.

    Returns:
        An exit code.

    Raises:
        UsageError: an unknown dtype, or a directory that is not there.
    """
    if dtype not in DTYPES:
        raise UsageError(f"calibrate: --dtype {dtype} is unknown: use one of {', '.join(DTYPES)}")
    for path in (out, png):
        if path is not None and not path.parent.is_dir():
            raise UsageError(f"calibrate: there is no directory {path.parent} to write {path.name} in")
    comm = world()
    if comm.size > 1:
        if ranks not in (None, comm.size):
            raise UsageError(f"--ranks {ranks} inside an MPI job of {comm.size}: leave it out")
        measure_and_write(comm, out, png, dtype)
        return 0
    count = available_cores() if ranks is None else ranks
    if count < 1:
        raise UsageError(f"--ranks is {count}, it must be at least 1")
    words = [str(out), dtype, *([str(png)] if png is not None else [])]
    return run_mpi([sys.executable, "-m", "minipar.commands.calibrate", *words], count, timeout=LIMIT)


def measure_and_write(comm: Communicator, out: Path, png: Path | None, dtype: str) -> None:
    """Calibrate on these ranks; rank 0 writes and tells."""
    from minipar.planner.calibrate import calibrate

    screen = console()
    machine = calibrate(comm, dtype, lambda text: screen.print(f"measuring: {text}", markup=False))
    if comm.rank != 0:
        return
    write_machine(machine, out)
    report(machine, comm.size)
    facts = {"machine": str(out)}
    if png is not None and machine.measured is not None and machine.measured.fits:
        ranks = comm.size
        measured = machine.measured
        samples = {op: rows[ranks] for op, rows in measured.samples.items() if ranks in rows}
        fits = {op: rows[ranks] for op, rows in measured.fits.items() if ranks in rows}
        try:
            communication_fit(samples, fits, png, title=f"{machine.name}, {ranks} ranks")
        except OSError as error:
            raise DataError(f"{png} cannot be written: {error.strerror}") from None
        facts["picture"] = str(png)
    say(screen, facts)


def report(machine: Machine, ranks: int) -> None:
    """Print what was found: rates, and the fit of each operation with its largest error."""
    screen, measured = console(), machine.measured
    assert measured is not None
    rate = machine.matmul[measured.dtype].peak
    say(screen, {
        "": "",
        "matrix products": f"{rate / 1e9:.3g} GFLOP/s a rank in {measured.dtype}, {ranks} at once",
        "memory": f"{machine.bandwidth / 1e9:.3g} GB/s a rank",
        "an operation": f"{machine.overhead * 1e6:.3g} µs at least",
        "a step": f"{measured.step * 1e3:.3g} ms beside its operations",
        "overlap": f"{100 * machine.node.overlap:.0f} % of a sum takes place while the ranks compute",
    })  # fmt: skip
    if not measured.fits:
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("operation", "ranks", "α", "1/β", "largest error of α + βn"):
        table.add_column(heading, justify="left" if heading == "operation" else "right")
    for operation, rows in measured.fits.items():
        for n, (alpha, beta) in rows.items():
            bandwidth = f"{1e-9 / beta:.3g} GB/s" if beta else "–"
            error = f"{100 * measured.residuals[operation][n]:.0f} %"
            table.add_row(operation, str(n), f"{alpha * 1e6:.3g} µs", bandwidth, error)
    screen.print()
    screen.print(table)
    screen.print()


if __name__ == "__main__":
    target, precision, *picture = sys.argv[1:]
    measure_and_write(world(), Path(target), Path(picture[0]) if picture else None, precision)
