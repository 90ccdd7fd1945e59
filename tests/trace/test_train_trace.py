"""`minipar train --trace` on threads and under MPI, in every kind of parallelism; `minipar trace show`."""

from __future__ import annotations

from pathlib import Path

import pytest

from minipar.errors import UsageError
from minipar.traces.file import RunTrace, read
from minipar.traces.picture import draw_step
from minipar.traces.record import STEPS
from minipar.traces.report import examine, steps_of
from tests.commands.command_line import SMALL, assert_one_line, minipar, process

WHOLE = {"step", "data", "optimizer"}
PIPELINE = ["--pp", 2, "--layers", 2, "--microbatches", 2]
LAYOUTS = {
    "serial": ([], 1, WHOLE | {"forward", "backward"}),
    "data parallel": ([], 2, WHOLE | {"forward", "backward", "flight", "wait", "collective"}),
    "tensor parallel": (["--tp", 2], 2, WHOLE | {"forward", "backward", "collective"}),
    "zero 3": (["--zero", 3], 2, WHOLE | {"forward", "backward", "flight", "wait", "collective"}),
    "pipeline": (PIPELINE, 2, WHOLE | {"action", "flight", "wait", "collective"}),
    "layers": (["--partition", "cost"], 2, WHOLE | {"forward", "backward", "flight", "wait", "collective"}),
}


def small(run: Path) -> list[object]:
    """Return a small model's options, and a small text to learn."""
    run.mkdir(exist_ok=True)
    text = run / "text.txt"
    text.write_text("a small text to learn. " * 60)
    return ["gpt", *SMALL["gpt"], "--data", text]


def recorded(run: Path, *words: object, ranks: int = 1) -> RunTrace:
    done = minipar("train", *small(run), *words, "--ranks", ranks, "--trace", "--out", run)
    assert done.code == 0, done
    return read(run / "trace.json")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_kind_of_parallelism_leaves_its_spans(layout: str, tmp_path: Path) -> None:
    words, ranks, kinds = LAYOUTS[layout]
    trace = recorded(tmp_path, *words, "--steps", 3, ranks=ranks)
    assert len(trace.ranks) == ranks
    assert [name for name, _, _ in steps_of(trace)] == ["step 1", "step 2", "step 3"]
    for spans in trace.ranks:
        assert {s.kind for s in spans} == kinds
        assert all(0 <= s.start <= s.end for s in spans)
    report = examine(trace)
    assert report is not None and 0 < report.share("work") <= 1
    assert (report.bubble is not None) == (layout == "pipeline")
    picture = (tmp_path / "gantt.png").read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n" and len(picture) > 5_000


def test_actions_of_a_pipeline_are_those_of_its_schedule(tmp_path: Path) -> None:
    trace = recorded(tmp_path, *PIPELINE, "--schedule", "zb-h1", "--steps", 1, ranks=2)
    for spans in trace.ranks:
        assert sorted(s.name for s in spans if s.kind == "action") == ["F0", "F1", "I0", "I1", "W0", "W1"]


def test_only_the_first_steps_are_recorded(tmp_path: Path) -> None:
    trace = recorded(tmp_path, "--steps", STEPS + 2, ranks=2)
    assert len(steps_of(trace)) == STEPS
    for spans in trace.ranks:
        assert sum(s.kind == "forward" for s in spans) == STEPS


def test_a_run_without_trace_leaves_none(tmp_path: Path) -> None:
    done = minipar("train", *small(tmp_path), "--steps", 1, "--out", tmp_path)
    assert done.code == 0 and not (tmp_path / "trace.json").exists()
    assert_one_line(minipar("trace", "show", tmp_path), 2, "trace.json does not exist", "--trace")


def test_the_same_weights_with_and_without_a_trace(tmp_path: Path) -> None:
    for name, words in (("with", ["--trace"]), ("without", [])):
        settings = ["--steps", 2, "--ranks", 2, "--zero", 2, *words, "--out", tmp_path / name]
        done = minipar("train", *small(tmp_path), *settings)
        assert done.code == 0
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("with", "without")]
    assert weights[0] == weights[1]
    assert (tmp_path / "with" / "memory.png").stat().st_size > 1000


def test_a_run_that_is_resumed_at_its_end_has_nothing_to_record(tmp_path: Path) -> None:
    words = [*small(tmp_path), "--steps", 2, "--trace", "--checkpoint", tmp_path / "saved", "--out", tmp_path]
    assert minipar("train", *words).code == 0
    before = (tmp_path / "trace.json").read_bytes()
    again = minipar("train", *words, "--resume")
    assert again.code == 0, again
    assert "trace       none, as no step was left to record" in again.out
    assert (tmp_path / "trace.json").read_bytes() == before, "what was recorded stays"


def test_a_trace_without_a_step_is_not_drawn(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no whole step"):
        draw_step(RunTrace([[], []], {}), tmp_path / "gantt.png")


@pytest.mark.parametrize("name", ["trace.json", "gantt.png", "memory.png"])
def test_a_file_that_cannot_be_written_is_told_in_a_line(name: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    (out / name).mkdir(parents=True)
    done = minipar("train", *small(tmp_path), "--steps", 2, "--ranks", 2, "--trace", "--out", out)
    assert_one_line(done, 1, f"{out / name} cannot be written", "on rank 0 of 2", "--out")


def test_show_prints_shares_traffic_and_words(tmp_path: Path) -> None:
    recorded(tmp_path, *PIPELINE, "--steps", 3, ranks=2)
    shown = minipar("trace", "show", tmp_path)
    assert shown.code == 0
    for part in ("gpt on ranks 2, pp 2: 2 steps of", "work", "stages", "peak", "MiB", "shared", "recv", "mean"):
        assert part in shown.out, shown.out
    for part in ("bubble: ", "imbalance: the busiest rank", "The ranks work "):
        assert part in shown.out, shown.out


@pytest.mark.mpi
def test_under_mpi(tmp_path: Path) -> None:
    settings = ["--steps", 3, "--bucket-mb", 0.01, "--trace", "--out", tmp_path]
    done = process("run", "-n", 2, "train", *small(tmp_path), *settings)
    assert done.code == 0, done
    trace = read(tmp_path / "trace.json")
    assert len(set(trace.facts["process"])) == 2 and min(trace.facts["peak_memory"]) > 2**24
    starts = [min(s.start for s in spans if s.kind == "step") for spans in trace.ranks]
    assert abs(starts[0] - starts[1]) < 1.0  # one machine has one clock
    for spans in trace.ranks:
        assert {s.kind for s in spans} == LAYOUTS["data parallel"][2]
        begun, waited = (
            [(s.facts["group"], s.facts["number"]) for s in spans if s.kind == kind] for kind in ("flight", "wait")
        )
        assert len(begun) == len(set(begun)) > 3 and set(waited) == set(begun)  # several buckets
