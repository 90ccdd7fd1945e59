"""Do the tests find faults? Plant each known fault in a copy of the code and see its tests turn red.

    python -m tests.mutations.run                 # all faults
    python -m tests.mutations.run bucket norm     # those with one of these words in the name

Every module of this package that defines FAULTS takes part. First the selected tests run once on a clean
copy, where they must pass; then each fault runs only the tests that guard it, where they must fail: not
because the code no longer imports, and not by hanging. Exits 1 if a fault survives.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import queue
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import tests.mutations
from tests.mutations.fault import Fault

ROOT = Path(__file__).parents[2]
WORKERS = 2
CLEAN_LIMIT, FAULT_LIMIT = 900.0, 120.0  # seconds for the clean run, and for one fault; the longest takes 43
PASSED, FAILED = 0, 1  # pytest's exit codes; from 2 on it could not run the tests


def known_faults() -> list[Fault]:
    """Return the faults of every module of this package that defines FAULTS."""
    found: list[Fault] = []
    for module in pkgutil.iter_modules(tests.mutations.__path__):
        if module.name != "run":
            found += getattr(importlib.import_module(f"tests.mutations.{module.name}"), "FAULTS", [])
    return found


def copy_of_the_code(place: Path) -> Path:
    """Copy the package, the tests and what they read beside them."""
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("minipar", "tests", "docs", "benchmarks", "lessons"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, place / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "Makefile"):
        shutil.copy(ROOT / name, place / name)
    return place


def run_tests(place: Path, arguments: Iterable[str], limit: float) -> tuple[int | None, str]:
    """Run pytest in a copy; return its exit code (None: out of time) and the end of what it printed."""
    environment = {**os.environ, "PYTHONPATH": str(place), "PYTHONDONTWRITEBYTECODE": "1"}
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        environment[variable] = "1"
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-m", "", "-p", "no:cacheprovider", *arguments]
    try:
        job = subprocess.run(
            command, cwd=place, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            timeout=limit, start_new_session=True,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return None, f"out of time ({limit:g} s)"
    return job.returncode, "\n".join(job.stdout.splitlines()[-15:])


def clean_run(place: Path, faults: list[Fault]) -> str | None:
    """Run the tests of all faults on the clean code; return what is wrong, or None."""
    plain: dict[str, None] = {}  # test ids, each once, in order; arguments with options run by themselves
    others: dict[str, None] = {}
    for fault in faults:
        words = shlex.split(fault.tests)
        if any(word.startswith("-") for word in words):
            others[fault.tests] = None
        else:
            plain.update(dict.fromkeys(words))
    together = [["-n", str(WORKERS), "--dist", "loadfile", *plain]] if plain else []
    for arguments in [*together, *map(shlex.split, others)]:
        code, output = run_tests(place, arguments, CLEAN_LIMIT)
        if code != PASSED:
            return output
    return None


def plant(place: Path, fault: Fault) -> str | None:
    """Plant `fault`, run its tests, take it out again; return what is wrong, or None if they turned red."""
    file = place / fault.file
    text = file.read_text()
    if text.count(fault.old) != 1:
        return f"the text to replace occurs {text.count(fault.old)} times in {fault.file}"
    file.write_text(text.replace(fault.old, fault.new))
    try:
        code, output = run_tests(place, shlex.split(fault.tests), FAULT_LIMIT)
    finally:
        file.write_text(text)
    if code == FAILED:
        return None
    return "SURVIVED: its tests pass" if code == PASSED else f"its tests did not fail but broke off: {output}"


def main(words: list[str]) -> int:
    """Run the check on the faults whose name has one of `words` (all without any); return the exit code."""
    faults = [f for f in known_faults() if not words or any(word in f.name for word in words)]
    width = max((len(f.name) for f in faults), default=0)
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="minipar-mutations-") as directory:
        places: queue.Queue[Path] = queue.Queue()
        for worker in range(WORKERS):
            place = Path(directory) / str(worker)
            place.mkdir()
            places.put(copy_of_the_code(place))

        wrong = clean_run(Path(directory) / "0", faults)
        if wrong is not None:
            print(f"the tests fail without any fault:\n{wrong}")
            return 1
        print(f"without faults: the tests pass ({time.monotonic() - start:.0f} s)", flush=True)

        def check(fault: Fault) -> str | None:
            place, began = places.get(), time.monotonic()
            try:
                wrong = plant(place, fault)
            finally:
                places.put(place)
            line = f"{fault.name:<{width}}  {time.monotonic() - began:4.1f} s  {wrong or 'red'}"
            print(line, flush=True)
            return None if wrong is None else line

        with ThreadPoolExecutor(WORKERS) as pool:
            missed = [line for line in pool.map(check, faults) if line is not None]
    print("\n".join(missed), end="\n" if missed else "")  # again, where a long record is cut to its end
    print(f"{len(faults) - len(missed)} passed, {len(missed)} failed in {time.monotonic() - start:.0f} s")
    return 0 if faults and not missed else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
