"""Pipeline parallelism: a schedule is data, one list of actions a stage, and all else reads it.

Order within the package:

    action         the words: F, B, I, W, sends and receives
    simulator      when each action would take place, with the bubble and the memory that follow
    communication  sends and receives, inserted
    checker        what is wrong with a schedule, before it runs
    schedules      naive, GPipe, 1F1B, interleaved 1F1B, ZB-H1
    formulas       what the papers say of these
    text           schedules as CSV, to be written by hand
    resolve        which of all these a pipeline runs
    tile_check     whether images may be cut into tiles
    stage          what one rank holds of the model
    executor       the one loop that runs any schedule
"""

from minipar.parallel.pipeline.action import Action, Schedule
from minipar.parallel.pipeline.checker import Problem, Report, check, checked
from minipar.parallel.pipeline.communication import must_not_block, with_communication
from minipar.parallel.pipeline.formulas import FORMULAS
from minipar.parallel.pipeline.resolve import resolve_schedule
from minipar.parallel.pipeline.schedules import SCHEDULES, build_schedule
from minipar.parallel.pipeline.simulator import Costs, Span, Timeline, simulate, timeline
from minipar.parallel.pipeline.text import from_csv, read_csv, to_csv, write_csv

__all__ = [
    "FORMULAS",
    "SCHEDULES",
    "Action",
    "Costs",
    "Problem",
    "Report",
    "Schedule",
    "Span",
    "Timeline",
    "build_schedule",
    "check",
    "checked",
    "from_csv",
    "must_not_block",
    "read_csv",
    "resolve_schedule",
    "simulate",
    "timeline",
    "to_csv",
    "with_communication",
    "write_csv",
]
