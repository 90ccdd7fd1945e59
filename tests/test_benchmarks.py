"""The benchmarks' own arithmetic, and one turn of two programs, so that they still run when they are wanted."""

from __future__ import annotations

import importlib
import json
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

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


def test_a_figure_should_be_close_on_either_side() -> None:
    from table import close

    for real, verdict in ((100, "ok"), (109, "ok"), (91, "ok"), (112, "-2%"), (88, "-2%")):
        assert close("a pipeline", real, 100, "ms", "simulated", 0.1).verdict == verdict


def test_what_was_not_measured_says_why() -> None:
    from run import summary
    from table import Line, markdown, show
    from turns import Result, absent, beside, memory_beside

    ours, peer = Result(0.2, [0.2], 100.0, {}), Result(0.1, [0.1], 150.0, {})
    lines = [
        beside("a step", ours, absent("PyTorch is not installed"), "PyTorch", 1.0, "a note"),
        memory_beside("a step", ours, absent("PyTorch is not installed"), "PyTorch", 1.0),
        memory_beside("a step", ours, peer, "PyTorch", 1.0),
        memory_beside("a step", peer, ours, "PyTorch", 1.0),
        memory_beside("a step", peer, ours, "PyTorch", None),
        Line("group gpu", None, note="no GPU"),
    ]
    assert [line.verdict for line in lines] == ["not measured", "not measured", "ok", "-33%", "", "not measured"]
    assert lines[0].note == "a note; PyTorch is not installed"
    text = summary({"one": lines[:5], "gpu": lines[5:]})
    assert text.startswith("\n1 below what is wanted\n  a step, peak memory: -33%\n3 not measured\n")
    assert "group gpu: no GPU" in text and "nan" not in show(lines)
    rows = markdown([*lines, Line("a | b", 1.0, "ms")]).splitlines()
    assert len(rows) == 2 + 7 and all(row.count("|") == rows[0].count("|") for row in rows)


def test_a_peer_that_is_not_installed_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    import turns

    monkeypatch.setattr(turns, "missing", lambda package: f"{package} is not there")
    started: list[str] = []

    def launched(programs: Any, rounds: int, steps: int, draw: random.Random) -> Any:
        started.extend(program.engine for program in programs)
        n = len(started)  # how often it was launched
        return [[{"times": [1.0 * n, 9.0], "peak_mb": 50.0 - n, "told": {"share": 0.1 * n}}]]

    monkeypatch.setattr(turns, "_launched", launched)
    programs = [turns.Program("minipar", "a:b"), turns.Program("torch", "a:b", ranks=2)]
    ours, peer = turns.take_turns(programs, launches=3)
    assert peer.absent == "torch is not there" and started == ["minipar"] * 3
    assert ours.times == [1.0, 9.0, 2.0, 9.0, 3.0, 9.0] and ours.seconds == 6.0
    assert ours.peak_mb == 49.0 and ours.told == {"share": pytest.approx(0.2)}


def test_whatever_the_order_a_program_has_its_own_times(monkeypatch: pytest.MonkeyPatch) -> None:
    import turns

    orders: list[list[str]] = []

    def launched(programs: Any, rounds: int, steps: int, draw: random.Random) -> Any:
        orders.append([program.factory for program in programs])
        return [[{"times": [float(program.factory)], "peak_mb": 0.0, "told": {}}] for program in programs]

    monkeypatch.setattr(turns, "_launched", launched)
    results = turns.take_turns([turns.Program("minipar", str(n)) for n in range(5)], launches=4)
    assert [result.times for result in results] == [[float(n)] * 4 for n in range(5)]
    assert len({tuple(order) for order in orders}) == 4


def test_no_package_is_imported_to_find_out_whether_it_is_there() -> None:
    from peers import missing

    assert missing("numpy") is None
    assert missing("no_such_package") == "no_such_package is not installed (pip install 'minipar[parity]')"


def test_exposed_communication_is_judged_by_its_transfer() -> None:
    from turns import Result
    from two_ranks import data_parallel, exposed

    judged, told = exposed("ZeRO", Result(0.1, [], 50.0, {"transfer": 0.1, "others": 0.2}))
    assert judged.ratio == pytest.approx(0.9) and judged.verdict == "ok" and "others" not in judged.note
    assert told.ratio == pytest.approx(0.7) and told.verdict == ""
    results = [Result(seconds, [], 50.0, {}) for seconds in (0.8, 1.0, 1.2, 0.75, 1.25)]
    ddp, scaling, weak, share = data_parallel("dp", *results)  # ours, DDP, alone, apart, with twice the batch
    assert ddp.ratio == pytest.approx(1.25) and scaling.ratio == pytest.approx(1.5) and scaling.verdict == "-21%"
    assert weak.ratio == pytest.approx(2 * 1.2 / 1.25) and weak.verdict == "ok"
    assert "1.60" in scaling.note and share.ratio == pytest.approx(0.9375) and share.verdict == "-1%"


def test_programs_of_one_process_take_turns_and_the_first_turn_does_not_count() -> None:
    from graph import medians

    said: list[str] = []

    def run(name: str, seconds: list[float]) -> float:
        said.append(name)
        return seconds[len(said) // 2 % 4] if name == "a" else -1.0

    assert medians({"a": lambda: run("a", [9.0, 1.0, 3.0, 2.0]), "b": lambda: run("b", [])}, 3) == {"a": 2.0, "b": -1.0}
    assert said == ["a", "b"] * 4


def test_the_limits_of_the_machine() -> None:
    from limits import lines

    found = {"sgemm_gflops": 90.0, "copy_gb_per_s": 9.0, "two_sgemm": 1.5, "two_copy": 1.1}
    assert [line.ratio for line in lines(found)] == [None, None, 0.75, 0.55]


def test_a_pipeline_s_times_are_read_as_they_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    import pipeline
    from pipelines import line_of

    from minipar.parallel.pipeline.schedules import build_schedule
    from minipar.parallel.pipeline.simulator import Costs, simulate

    measured = pipeline.Measured(
        [{"F": [0.010, 0.010], "B": [0.020, 0.020]}] * 3,
        [simulate(build_schedule("1f1b", 2, 8), Costs(0.0105, 0.021, 0.0)).spans] * 3,
        [2, 1],
    )
    assert pipeline.report("1f1b", measured, 0.0, 8, SimpleNamespace(out=None))
    line = line_of("1f1b", capsys.readouterr().out)
    assert (line.peer, line.ours) == (pytest.approx(270), pytest.approx(283.5)) and line.verdict == "ok"
    with pytest.raises(RuntimeError, match="no times of zb-h1"):
        line_of("zb-h1", "1f1b\n")


def test_the_planner_s_figures_are_read_as_they_are_printed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import planner
    from predictions import lines_of

    from minipar.planner.presets import preset

    def ran(configs: list[Any], ranks: int, *network: str) -> Any:
        layouts = [SimpleNamespace(seconds=1.0, held=100, disturbed=0.0, timeline=None) for _ in configs]
        return SimpleNamespace(layouts=layouts, pace=lambda machine, model: 1.0)

    monkeypatch.setattr(planner, "run_layouts", ran)
    monkeypatch.setattr(planner, "predict", lambda *args: SimpleNamespace(seconds=1.2, timeline=None))
    machine = preset("a100-80gb")
    planner.planned("mlp", planner.MODELS["mlp"], machine, None)
    planner.behind_a_network(machine, None)
    lines = {line.work: line for line in lines_of(capsys.readouterr().out)}
    figures = {name.removeprefix("planner, mlp: "): line for name, line in lines.items()}
    assert figures["median error of 5 layouts"].ours == pytest.approx(20)
    assert figures["median error of 5 layouts"].verdict != "ok" and figures["worst error"].verdict == "ok"
    assert figures["chosen layout over the fastest"].ours == 0
    assert figures["worst error of memory"].verdict != "ok"
    assert figures["planner, gpt behind a network, pipeline"].ours == pytest.approx(20)
    assert len(lines) == 4 + 2


def test_a_group_that_cannot_run_or_fails_costs_its_own_lines_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import run
    from peers import Missing

    def measure(error: Exception) -> Any:
        def fail(quick: bool) -> None:
            raise error

        return SimpleNamespace(measure=fail)

    monkeypatch.setitem(sys.modules, "absent_group", measure(Missing("no GPU")))
    monkeypatch.setitem(sys.modules, "broken_group", measure(ValueError("a bug")))
    monkeypatch.setattr(run, "GROUPS", {"gpu": "absent_group", "graph": "broken_group"})
    assert [(line.note, failed) for group in run.GROUPS for (line,), failed in [run.run_group(group, True, None)]] == [
        ("no GPU", False),
        ("failed: ValueError: a bug", True),
    ]


def test_every_group_can_be_imported_and_the_gpu_s_says_what_it_lacks() -> None:
    from gpu import gpu, measure
    from peers import Missing
    from run import GROUPS

    for module in GROUPS.values():
        assert callable(importlib.import_module(module).measure)
    try:
        gpu()
    except Missing as why:
        with pytest.raises(Missing, match="device cuda"):
            measure(quick=True)
        script = [sys.executable, str(BENCHMARKS / "gpu.py")]
        job = subprocess.run(script, capture_output=True, text=True, timeout=60)
        assert (job.returncode, job.stdout) == (0, f"skipped: {why}\n"), job.stderr


def test_a_step_on_a_gpu_is_judged_beside_math_attention_alone() -> None:
    from gpu import compared, memory
    from turns import Result

    ours, math, flash = (Result(s, [], 50.0, {"queued": 0.03, "gib": g}) for s, g in ((0.1, 8), (0.12, 12), (0.05, 6)))
    judged, told = compared("step", ours, {"math": math, "flash": flash}, 0.8, 1e13, 2e14)
    assert (judged.ratio, judged.verdict) == (pytest.approx(1.2), "ok") and told.verdict == ""
    assert judged.note == "50% of the 200 TFLOP/s that a product reaches here; queued in 30 ms"
    (alone,) = compared("step", ours, {}, 0.8, 1e13, 2e14)
    assert alone.verdict == "not measured" and "PyTorch with CUDA is not installed" in alone.note
    assert memory("step", ours, math).ratio == 1.5 and memory("step", ours, None).ratio is None


def test_a_program_on_a_gpu_tells_of_the_steps_since_it_was_asked_last(monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu_steps

    clock = iter([0.0, 1.0, 10.0, 13.0])  # before and after each of two steps is queued
    monkeypatch.setattr(gpu_steps, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    said: list[str] = []
    step = gpu_steps.program(lambda: said.append("step"), lambda: said.append("wait"), lambda: 2**30, lambda: 3.0)
    step.run()
    assert said == ["step", "wait"] and step.told() == {"queued": 1.0, "gib": 1.0, "waits": 3.0}
    step.run()
    assert step.told()["queued"] == 3.0


def test_communication_is_measured_on_two_ranks() -> None:
    from communication import measure

    lines = measure(quick=True)
    assert len(lines) == 3 * 4 - 1 and all(line.ours > 0 and line.ratio > 0 for line in lines)


@pytest.mark.benchmarks
@pytest.mark.timeout(900)
def test_every_group_runs_in_small(tmp_path: Path) -> None:
    """All but the planner's, which is never small."""
    table = tmp_path / "table.md"
    command = [sys.executable, str(BENCHMARKS / "run.py"), "--quick", "--out", str(tmp_path), "--markdown", str(table)]
    job = subprocess.run(command, capture_output=True, text=True, timeout=800)
    assert job.returncode == 0, job.stdout + job.stderr
    (file,) = tmp_path.glob("*.json")
    lines = json.loads(file.read_text())["lines"]
    assert all(lines[group] for group in ("one_rank", "two_ranks", "pipelines", "tracing", "growth", "planner", "gpu"))
    assert "left out of --quick" in lines["planner"][0]["note"]
    assert (tmp_path / "growth.png").exists() and "**two ranks**" in table.read_text()


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

    with pytest.raises(RuntimeError, match="ended early"):
        take_turns([Program("minipar", "steps:nothing_of_this_name", {})], rounds=1)


def test_results_are_written_with_the_machine(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "run.py"), "--only", "graph", "--quick", "--out", str(tmp_path)]
    job = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert job.returncode == 0, job.stderr
    (file,) = tmp_path.glob("*-graph.json")
    found = json.loads(file.read_text())
    assert {"date", "cpu", "cores", "blas", "versions", "limits"} <= found["machine"].keys()
    limits = found["machine"]["limits"]
    assert limits.keys() == {"sgemm_gflops", "copy_gb_per_s", "two_sgemm", "two_copy"}
    assert all(0 < limits[name] < 20 for name in ("two_sgemm", "two_copy"))
    assert found["lines"]["limits"] and all("verdict" in line for line in found["lines"]["graph"])
    assert any("backward of 1,000 nodes" in line["work"] for line in found["lines"]["graph"])
    assert "below what is wanted" in job.stdout
