"""A schedule written by hand in a CSV file runs, equal to serial; one with a mistake is refused, by place."""

from __future__ import annotations

from pathlib import Path

import pytest

import minipar
from minipar.errors import UsageError
from minipar.parallel.distribute import Recipe, distribute
from minipar.parallel.pipeline import build_schedule, resolve_schedule, with_communication, write_csv
from minipar.training import Job, build_model, load_data
from tests.commands.command_line import assert_one_line
from tests.commands.command_line import minipar as command
from tests.pipeline.runs import prove, settings

# Nobody's: two forwards first on both stages, microbatch 1 backward before 0, W's where there is time for them.
BY_HAND = """\
0F0,0F1,0F2,,0I1,0I0,0W1,0B2,0W0
1F0,,1F1,1B1,1I0,1F2,1B2,1W0
"""
RUN = ("verify", "gpt", "--ranks", 2, "--pp", 2, "--layers", 2, "--width", 8, "--steps", 1)


def written(folder: Path, text: str) -> Path:
    path = folder / "mine.csv"
    path.write_text(text)
    return path


def test_it_runs_and_equals_serial(tmp_path: Path) -> None:
    prove(2, "gpt", pp=2, schedule=str(written(tmp_path, BY_HAND)))
    prove(4, "gpt", pp=2, dp=2, zero=1, accumulate=3, schedule=str(written(tmp_path, BY_HAND)))


def test_it_is_what_runs(tmp_path: Path) -> None:
    """Not the default in its place."""
    config = settings("gpt", pp=2, schedule=str(written(tmp_path, BY_HAND)), microbatches=3)

    def run() -> list[str]:
        job = Job(config, minipar.world())
        job.forward_backward(next(iter(job.loader)))
        return [str(span.action) for span in job.strategy.executor.spans]  # type: ignore[attr-defined]

    assert minipar.launch(run, 2, timeout=20) == [
        ["F0", "F1", "F2", "I1", "I0", "W1", "B2", "W0"],
        ["F0", "F1", "B1", "I0", "F2", "B2", "W0"],
    ]


def test_chunks_and_messages_may_be_written_too(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    write_csv(build_schedule("interleaved", 2, 4, 2), path)
    prove(2, "mlp", pp=2, schedule=str(path))
    prove(2, "mlp", pp=2, schedule=str(path), chunks=2, microbatches=4, partition="cost")
    write_csv(with_communication(build_schedule("zb-h1", 2, 3)), path)
    prove(2, "mlp", pp=2, schedule=str(path))


def test_the_command_runs_it(tmp_path: Path) -> None:
    done = command(*RUN, "--schedule", written(tmp_path, BY_HAND))
    assert done.code == 0 and done.out.count("equal") >= 4, done


@pytest.mark.parametrize(
    "text, said",
    [
        ("0F0,0B0,0F1,0B1\n1F0,1F1,1B1\n", ("row 2 (stage 1)", "1B0", "missing")),
        ("0F0,0F1,0B0,0B1\n1F0,1B0,1B1,1F1\n", ("row 2 (stage 1), column 3", "1B1", "before F1")),
        ("0F0,0B0,0F1,0B1\n1F0,1F1,1B0,1B1\n", ("column 2", "0B0", "wait for each other", "F1 of stage 0")),
        ("0F0,0F0,0B0\n1F0,1B0\n", ("row 1 (stage 0), column 2", "0F0", "twice")),
        ("0F0,0X0\n1F0,1B0\n", ("row 1, column 2", "'0X0' is no action", "0F1")),
        ("0F0,0B0\n0F0,1B0\n", ("row 2, column 1", "wrong row")),
        ("", ("no schedule in it",)),
        ("0F0,0F1000000000\n1F0\n", ("row 1 (stage 0), column 2", "1000000001 microbatches", "more than 2 actions")),
        ("0F0,9000000000B0\n1F0\n", ("row 1 (stage 0), column 2", "of 4500000001 chunks", "more than 2 actions")),
        ("0F0,0B0\n1F0,1B0\n2F0,2B0\n", ("3 stages", "2 were asked for")),
    ],
)
def test_a_mistake_is_refused_by_place(text: str, said: tuple[str, ...], tmp_path: Path) -> None:
    done = command(*RUN, "--schedule", written(tmp_path, text))
    assert_one_line(done, 2, "mine.csv", *said)


@pytest.mark.parametrize(
    "words, code, said",
    [
        (("--schedule", "mine"), 2, ("'mine' is unknown", "zb-h1", "ends in .csv")),
        (("--schedule", "/no/such/file.csv"), 1, ("cannot be read", "No such file")),
        (("--microbatches", 0), 2, ("--microbatches is 0",)),
        (("--microbatches", 10**9), 2, ("1000000000 microbatches are 4,000,000,000 actions",)),
        (("--chunks", 0), 2, ("--chunks is 0",)),
        (("--partition", "bytes"), 2, ("bytes with a pipeline", "cost")),
    ],
)
def test_other_wrong_usage(words: tuple[object, ...], code: int, said: tuple[str, ...]) -> None:
    assert_one_line(command(*RUN, *words), code, *said)


def test_other_sizes_are_refused(tmp_path: Path) -> None:
    done = command(*RUN, "--schedule", written(tmp_path, BY_HAND), "--microbatches", 4)
    assert_one_line(done, 2, "3 microbatches", "4 were asked for")


def test_every_rank_gets_the_file_of_the_first(tmp_path: Path) -> None:
    """On a cluster the file may be on one host only."""

    def run() -> object:
        comm = minipar.world()
        name = str(written(tmp_path, BY_HAND)) if comm.rank == 0 else "/elsewhere/mine.csv"
        return resolve_schedule(comm, name, 2)

    first, second = minipar.launch(run, 2, timeout=20)
    assert first == second


def test_more_messages_than_tags_are_refused() -> None:
    """Such a schedule may be drawn and simulated; to run it, each message between two ranks needs a tag."""
    with pytest.raises(UsageError, match=r"microbatches of 2 chunks have more messages .* use at most 8191"):
        resolve_schedule(minipar.world(), "interleaved", 2, 9000)
    assert len(resolve_schedule(minipar.world(), "1f1b", 2, 16383)) == 2


def test_lists_of_actions_in_a_recipe() -> None:
    config = settings("gpt")
    data = load_data(config)

    def run(schedule: object) -> str:
        model = build_model(config, data.info)
        mesh = minipar.Mesh(minipar.world(), pp=2)
        try:
            return type(distribute(model, mesh, Recipe(schedule=schedule))).__name__  # type: ignore[arg-type]
        except UsageError as error:
            return str(error)

    whole = build_schedule("gpipe", 2, 2)
    assert minipar.launch(run, 2, whole, timeout=20) == ["Pipelined"] * 2
    torn = [whole[0], whole[1][:-1]]
    assert minipar.launch(run, 2, torn, timeout=20) == [
        "schedule: stage 1, B1: it is missing, and so are I and W in its place"
    ] * 2
