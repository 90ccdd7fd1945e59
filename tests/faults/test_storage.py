"""A checkpoint that cannot be written ends the run with one line on all ranks; earlier checkpoints still load.

The disks are real: small and read-only file systems in memory, in a mount namespace that ends with the job.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.running import SLACK, Outcome, needs_proc, run

NAMESPACE = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--user", "--map-root-user", "--mount"]


def can_mount() -> str:
    """Return why no file system can be mounted here, "" if one can."""
    try:
        tried = subprocess.run(
            [*NAMESPACE, "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True, text=True, timeout=20
        )
    except (FileNotFoundError, subprocess.TimeoutExpired) as error:
        return str(error)
    return tried.stderr.strip() or "mount failed" if tried.returncode else ""


REASON = can_mount()
pytestmark = [needs_proc, pytest.mark.mpi, pytest.mark.skipif(bool(REASON), reason=f"no mount namespace: {REASON}")]

SMALL = (
    "--width 16 --layers 1 --heads 2 --seq-len 8 --batch 6 --steps 40 --checkpoint {place} --every 5 --keep 100"
)
SCRIPT = """
set -e
mount -t tmpfs -o {options} none {place}
code=0
{python} -m minipar {command} --out {out} || code=$?
echo over
{python} -m minipar checkpoint verify {place} || test $code = 1
exit $code
"""


def on_disk(options: str, place: Path, command: str) -> Outcome:
    """Run a minipar command that saves into a file system of its own; then look at the newest checkpoint."""
    place.mkdir(parents=True)
    text = SCRIPT.format(
        options=options, place=place, python=sys.executable, out=place.with_name("run"),
        command=f"{command} {SMALL.format(place=place)}",
    )  # fmt: skip
    return run([*NAMESPACE, "sh", "-c", text], ready="1/40", over="over", PYTHONUNBUFFERED="1")


COMMANDS = {"threads": "train gpt --ranks 2", "mpi": "run -n 2 train gpt"}
DISKS = {"full": "size=300k", "read-only": "ro"}


@pytest.mark.parametrize("engine", COMMANDS)
@pytest.mark.parametrize(
    ("disk", "reason"), (("full", "No space left on device"), ("read-only", "Read-only file system"))
)
def test_the_run_ends_with_one_line(disk: str, reason: str, engine: str, tmp_path: Path) -> None:
    """Even root cannot write to a file system that is read-only."""
    place = tmp_path / "saved"
    job = on_disk(DISKS[disk], place, COMMANDS[engine])
    assert job.code == 1 and not job.orphans, job
    assert job.seconds < SLACK, "from the first step on"
    said = job.lines() if disk == "full" else job.lines()[:1]
    assert len(said) == 1, job.err
    assert said[0].startswith(f"minipar: checkpoint {place / 'step-000000'}") and "on rank 0 of 2" in said[0]
    assert f"cannot be written: {reason}; earlier ones are untouched" in said[0]
    if disk == "full":
        assert re.search(r"step-000000\d[05]: 1 files, .*, all whole$", job.out), "an earlier one still loads"
