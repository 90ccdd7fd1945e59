"""The benchmarks' own arithmetic, and one turn of two programs, so that they still run when they are wanted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def test_a_line_says_by_how_much_it_falls_short() -> None:
    from table import Line, faster, show

    line = faster("a step", 0.2, 0.1, "peer", 1.0)
    assert (line.ours, line.peer, line.ratio, line.verdict) == (200, 100, 0.5, "-50%")
    assert faster("a step", 0.1, 0.11, "peer", 1.0).verdict == "ok"
    assert Line("reported", 1.0, "ms").verdict == ""
    text = show([line, Line("reported", 1.0, "ms")])
    assert "a step" in text and "-50%" in text and "200 ms" in text


def test_exponents_of_power_laws() -> None:
    from growth import exponent

    assert exponent([1, 2, 4], [3, 12, 48]) == pytest.approx(2)


def test_operations_of_a_gpt_step() -> None:
    """One layer and head, counted by hand: 2·(12·4² weights + 2·3 attention... ) a token, three passes."""
    from steps import Size

    s = Size("gpt", batch=2, width=4, layers=1, tokens=3, heads=1)
    a_token = 2 * 12 * 4**2 + 2 * 3 * 4 + 2 * 96 * 4
    assert s.flops == 3 * 2 * 3 * a_token


def test_programs_take_turns() -> None:
    from turns import Program, take_turns

    size = {"model": "mlp", "batch": 4, "width": 8, "layers": 2}
    one, other = take_turns([Program("minipar", "steps:ours", size)] * 2, rounds=2, steps=3)
    assert len(one.times) == len(other.times) == 6
    assert one.seconds > 0 and 10 < one.peak_mb < 2000


def test_a_program_that_ends_early_is_told() -> None:
    from turns import Program, take_turns

    with pytest.raises(SystemExit, match="ended early"):
        take_turns([Program("torch", "steps:nothing_of_this_name", {})], rounds=1)


def test_results_are_written_with_the_machine(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "run.py"), "--only", "graph", "--quick", "--out", str(tmp_path)]
    job = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert job.returncode == 0, job.stderr
    (file,) = tmp_path.glob("*-graph.json")
    found = json.loads(file.read_text())
    assert {"date", "cpu", "cores", "blas", "versions", "sgemm_gflops", "copy_gb_per_s"} <= found["machine"].keys()
    assert any("backward of 1,000 nodes" in line["work"] for line in found["lines"]["graph"])
    assert "below what is wanted" in job.stdout
