"""A run whose directory lies on a disk that fills up ends with one line on all ranks, on both engines."""

import re
import sys
from pathlib import Path

import pytest

from tests.faults.running import needs_proc, run
from tests.faults.test_storage import COMMANDS, NAMESPACE, REASON

pytestmark = [
    pytest.mark.faults, needs_proc, pytest.mark.mpi,
    pytest.mark.skipif(bool(REASON), reason=f"no mount namespace: {REASON}"),
]  # fmt: skip
SMALL = "--width 16 --layers 1 --heads 2 --seq-len 8 --batch 6"
SCRIPT = """
set -e
mount -t tmpfs -o size={size} none {place}
code=0
{python} -m minipar {command} --out {place} {small} --steps {steps} || code=$?
echo files: $(ls {place})
exit $code
"""


@pytest.mark.parametrize("engine", COMMANDS)
@pytest.mark.parametrize(
    ("size", "steps", "name"), (("16k", 2, "model.safetensors"), ("40k", 2, "loss.png"), ("16k", 300, "metrics.jsonl"))
)
def test_the_run_ends_with_one_line(size: str, steps: int, name: str, engine: str, tmp_path: Path) -> None:
    """Settings, layout and metrics of two steps take three or four pages of 4 kB, weights five, the picture more."""
    text = SCRIPT.format(
        size=size, place=tmp_path, python=sys.executable, command=COMMANDS[engine], small=SMALL, steps=steps
    )
    job = run([*NAMESPACE, "sh", "-c", text])
    assert job.code == 1 and not job.orphans, job
    assert len(job.lines()) == 1, job.err
    said = r"minipar: {} cannot be written after step \d+: No space left on device; make room, .* \(on rank 0 of 2\)"
    assert re.fullmatch(said.format(re.escape(str(tmp_path / name))), job.lines()[0]), job.err
    files = re.search(r"files: (.*)", job.out)
    assert files is not None and ".partial" not in files[1], "nothing half written is left"
