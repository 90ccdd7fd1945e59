"""`minipar schedule`: what it prints, writes and refuses."""

from __future__ import annotations

from fractions import Fraction
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from minipar.commands.schedule import parse_costs, schedule_command
from minipar.parallel.pipeline import build_schedule, read_csv, simulate
from minipar.timeline import is_scaled, reading, timeline_text
from tests.commands.command_line import assert_one_line, process
from tests.commands.command_line import minipar as command

SCHEDULES = ("naive", "gpipe", "1f1b", "interleaved", "zb-h1")


@pytest.mark.parametrize("name", SCHEDULES)
def test_prints_bubble_live_and_formula(name: str) -> None:
    done = command("schedule", name, "-p", 4, "-m", 8)
    predicted = simulate(build_schedule(name, 4, 8))
    assert done.code == 0 and "DIFFERENT" not in done.out
    assert f"bubble    {predicted.bubble} = {100 * float(predicted.bubble):.1f} %" in done.out
    assert done.out.count(", equal") == 2, "the bubble's formula and that of live activations"
    table = [line.split() for line in done.out.splitlines() if line.strip()[:1].isdigit() and "%" in line]
    assert [int(row[5]) for row in table] == list(predicted.peak_live)
    assert [row[5] for row in table] == [row[6] for row in table]


def test_the_timeline_is_the_schedules_comment() -> None:
    out = command("schedule", "1f1b", "-p", 3, "-m", 4).out
    assert "stage 0  F0 F1 F2 ·  ·  ·  ·  B0─── F3 B1─── ·  B2─── ·  B3───" in out
    assert "stage 2  ·  ·  F0 B0─── F1 B1─── F2 B2─── F3 B3─── ·  ·  ·  ·" in out


def test_costs_change_it_and_the_formula_says_what_it_needs() -> None:
    out = " ".join(command("schedule", "zb-h1", "-p", 2, "-m", 4, "--costs", "1,1.2,0.8,0.1").out.split())
    assert "needs messages that cost nothing and F = I = W" in out
    assert parse_costs("1/3, 2,0.5").forward == Fraction(1, 3)
    predicted = schedule_command("gpipe", 2, 3, costs="1,2,3,4", screen=Console(file=StringIO()))
    assert predicted.makespan == (2 + 3 - 1) * 6 + 2 * 4, "p + m - 1 turns, and a message each way"


def test_a_file_written_is_read_back_and_shown(tmp_path: Path) -> None:
    path, picture = tmp_path / "own.csv", tmp_path / "own.png"
    assert command("schedule", "interleaved", "-p", 2, "-m", 4, "--csv", path).code == 0
    assert read_csv(path) == build_schedule("interleaved", 2, 4)
    done = command("schedule", path, "--png", picture)
    assert done.code == 0 and done.out.startswith("own.csv: 2 stages, 4 microbatches, 2 chunks\n")
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_long_timelines_are_scaled_and_say_so() -> None:
    short, long = simulate(build_schedule("gpipe", 2, 2)), simulate(build_schedule("1f1b", 16, 64))
    assert not is_scaled(short) and reading(short) == "F1: forward of microbatch 1"
    assert is_scaled(long) and "each letter is what the stage mostly does" in reading(long)
    lines = timeline_text(long, 80).plain.splitlines()
    assert len(lines) == 17 and max(map(len, lines)) <= 80
    chunks = simulate(build_schedule("interleaved", 2, 4))
    assert reading(chunks).startswith("2F1: forward of microbatch 1 on virtual stage 2")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("foo",), ("'foo' is unknown", "zb-h1", ".csv")),
        (("interleaved", "-p", 4, "-m", 6), ("divide", "4 or 8")),
        (("1f1b", "--chunks", 2), ("interleaved",)),
        (("1f1b", "-m", 0), ("0 microbatches",)),
        (("1f1b", "--costs", "1,2"), ("--costs 1,2", "F,I,W")),
        (("1f1b", "--costs", "1,0,1"), ("more than 0",)),
        (("1f1b", "--png", "/no/such/folder/x.png"), ("no directory /no/such/folder",)),
        (("1f1b", "--png", "picture.gif"), (".png, .pdf, .svg",)),
        (("1f1b", "-p", 1000, "-m", 1000), ("2,000,000 actions",)),
        (("interleaved", "-p", 500, "-m", 500), ("2 chunks are 1,000,000 actions, more than 500,000",)),
    ],
)
def test_wrong_usage(words: tuple[object, ...], said: tuple[str, ...]) -> None:
    assert_one_line(command("schedule", *words), 2, *said)


def test_a_file_with_a_mistake_is_refused_by_place(tmp_path: Path) -> None:
    path = tmp_path / "own.csv"
    path.write_text("0F0,0B0\n1F0\n")
    assert_one_line(command("schedule", path), 2, "own.csv", "row 2 (stage 1)", "1B0")
    path.write_text("0F0,0B0\n1F0,1B0\n")
    assert_one_line(command("schedule", path, "-p", 3), 2, "3 stages were asked for", "has 2")
    assert_one_line(command("schedule", tmp_path / "none.csv"), 1, "none.csv cannot be read")


@pytest.mark.mpi
def test_one_rank_of_a_job_prints() -> None:
    done = process("run", "-n", 2, "schedule", "1f1b", "-p", 2, "-m", 2)
    assert done.code == 0 and done.out.count("makespan") == 1, done
    assert_one_line(process("run", "-n", 2, "schedule", "foo"), 2, "'foo' is unknown")
