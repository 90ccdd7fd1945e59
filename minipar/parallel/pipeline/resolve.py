"""Which schedule a pipeline runs: one built in by its name, a CSV file written by hand, or lists of actions.

    resolve_schedule(world, "zb-h1", stages=4, microbatches=8)
    resolve_schedule(world, "mine.csv", stages=2)         # the file says how many microbatches and chunks

Whatever it is, it is checked before anything runs, and every rank gets the same one.
"""

from __future__ import annotations

from pathlib import Path

from minipar.agreement import agreed
from minipar.comm.interface import Communicator
from minipar.errors import UsageError
from minipar.parallel.pipeline.action import Action, Schedule, refuse_too_many_tags, sizes
from minipar.parallel.pipeline.checker import checked
from minipar.parallel.pipeline.schedules import SCHEDULES, build_schedule
from minipar.parallel.pipeline.text import from_csv, read_text

SUFFIX = ".csv"
DEFAULT_SCHEDULE = "1f1b"


def is_file(schedule: object) -> bool:
    """Whether this is the name of a CSV file, not of a built-in schedule."""
    return isinstance(schedule, str) and schedule.lower().endswith(SUFFIX)


def known_schedule(schedule: str) -> None:
    """Raise UsageError for what is neither a built-in schedule's name nor a CSV file's."""
    if schedule not in SCHEDULES and not is_file(schedule):
        raise UsageError(
            f"schedule {schedule!r} is unknown: use one of {', '.join(SCHEDULES)}, or a file whose name ends in"
            f" {SUFFIX}"
        )


def resolve_schedule(
    world: Communicator,
    schedule: str | Schedule | None,
    stages: int,
    microbatches: int | None = None,
    chunks: int | None = None,
) -> list[list[Action]]:
    """Return the actions of each stage, checked to be those of this pipeline. Collective.

    Args:
        world: the ranks that are to agree. Only the first of them reads a file.
        schedule: a name in `SCHEDULES`, a path that ends in .csv, or lists of actions; None for `DEFAULT_SCHEDULE`.
        microbatches: of a named schedule twice the stages, of any other what it says, if not given.
        chunks: of a named schedule its own default, of any other what it says, if not given.

    Raises:
        UsageError: an unknown name, a mistake in the schedule, other sizes than these, or too many messages; on every
            rank.
        DataError: a file that cannot be read; on every rank.
    """
    schedule, text = DEFAULT_SCHEDULE if schedule is None else schedule, ""
    if isinstance(schedule, str) and is_file(schedule):
        path = Path(schedule)
        text = world.broadcast_object(agreed(world, lambda: read_text(path) if world.rank == 0 else ""))

    def resolve() -> list[list[Action]]:
        if not isinstance(schedule, str):
            checked(schedule)
            found, name = [list(actions) for actions in schedule], "schedule"
        elif is_file(schedule):
            found, name = from_csv(text, schedule), schedule
        else:
            known_schedule(schedule)
            m = 2 * stages if microbatches is None else microbatches
            found, name = build_schedule(schedule, stages, m, chunks), schedule
        refuse_too_many_tags(sizes(found))
        for what, wanted, there in zip(
            ("stages", "microbatches", "chunks"), (stages, microbatches, chunks), sizes(found)
        ):
            if wanted not in (None, there):
                raise UsageError(f"{name}: it is for {there} {what}, and {wanted} were asked for; {HOW[what]}")
        return found

    return agreed(world, resolve)


HOW = {
    "stages": "a schedule has one line a stage",
    "microbatches": "leave their number out, the schedule says it",
    "chunks": "leave their number out, the schedule says it",
}
