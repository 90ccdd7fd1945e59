"""Pipeline schedules: who computes what, in which order. Each is a pure function that returns plain lists.

    one_f_one_b(stages=4, microbatches=8)[0][:6]   # F0 F1 F2 F3 B0 F4 on stage 0

Sends and receives are no part of it: `communication` inserts them. `simulator` tells how long a schedule
takes, `checker` whether it can run at all, and `minipar schedule NAME` draws it. The grids below are its
drawings at costs F = I = W = 1 (so B = 2): time goes right, a line is a stage, dots are the bubble.
"""

from __future__ import annotations

from collections.abc import Callable

from minipar.errors import UsageError
from minipar.parallel.pipeline.action import Action, B, F, I, Sizes, W, refuse_too_many


def naive(stages: int, microbatches: int, chunks: int = 1) -> list[list[Action]]:
    """One microbatch at a time: what stages of a model do without any pipelining. Only one ever works.

    Returns the actions of each stage. Raises UsageError for sizes below 1, and for more than one chunk.
    """
    # stage 0  F0 ·  ·  ·  ·  ·  ·  B0─── F1 ·  ·  ·  ·  ·  ·  B1───
    # stage 1  ·  F0 ·  ·  ·  B0─── ·  ·  ·  F1 ·  ·  ·  B1─── ·  ·
    # stage 2  ·  ·  F0 B0─── ·  ·  ·  ·  ·  ·  F1 B1─── ·  ·  ·  ·
    _refuse_bad_sizes("naive", stages, microbatches, chunks)
    return [
        [Action(kind, i, 0, stage) for i in range(microbatches) for kind in (F, B)]
        for stage in range(stages)
    ]  # fmt: skip


def gpipe(stages: int, microbatches: int, chunks: int = 1) -> list[list[Action]]:
    """All forwards, then all backwards (Huang et al. 2019, "GPipe"). Every activation is held at once.

    Returns the actions of each stage. Raises UsageError for sizes below 1, and for more than one chunk.
    """
    # stage 0  F0 F1 F2 F3 ·  ·  ·  ·  ·  ·  B0─── B1─── B2─── B3───
    # stage 1  ·  F0 F1 F2 F3 ·  ·  ·  B0─── B1─── B2─── B3─── ·  ·
    # stage 2  ·  ·  F0 F1 F2 F3 B0─── B1─── B2─── B3─── ·  ·  ·  ·
    _refuse_bad_sizes("gpipe", stages, microbatches, chunks)
    return [
        [Action(kind, i, 0, stage) for kind in (F, B) for i in range(microbatches)]
        for stage in range(stages)
    ]  # fmt: skip


def one_f_one_b(stages: int, microbatches: int, chunks: int = 1) -> list[list[Action]]:
    """1F1B: as soon as a backward can run it does, so that its activation is freed.

    The bubble is GPipe's, but stage s holds at most stages - s activations, however many microbatches there
    are. PipeDream-flush in Narayanan et al. 2021, "Memory-efficient pipeline-parallel DNN training".

    Returns the actions of each stage. Raises UsageError for sizes below 1, and for more than one chunk.
    """
    # stage 0  F0 F1 F2 ·  ·  ·  ·  B0─── F3 B1─── ·  B2─── ·  B3───
    # stage 1  ·  F0 F1 ·  ·  B0─── F2 B1─── F3 B2─── ·  B3─── ·  ·
    # stage 2  ·  ·  F0 B0─── F1 B1─── F2 B2─── F3 B3─── ·  ·  ·  ·
    _refuse_bad_sizes("1f1b", stages, microbatches, chunks)
    schedule = []
    for stage in range(stages):
        warm_up = min(stages - stage - 1, microbatches)  # forwards before the first backward can be there
        actions = [Action(F, i, 0, stage) for i in range(warm_up)]
        for i in range(microbatches - warm_up):
            actions += [Action(F, warm_up + i, 0, stage), Action(B, i, 0, stage)]
        actions += [Action(B, i, 0, stage) for i in range(microbatches - warm_up, microbatches)]
        schedule.append(actions)
    return schedule


def interleaved(stages: int, microbatches: int, chunks: int = 2) -> list[list[Action]]:
    """Interleaved 1F1B: each rank holds several thin chunks of the model, so the pipeline fills sooner.

    The bubble is `chunks` times smaller, for as many times the messages and somewhat more activations held.
    Microbatches go in groups of `stages`: a group runs through chunk 0 of every rank, then through chunk 1
    and so on; backward in the reverse order of chunks. Narayanan et al. 2021, "Efficient large-scale
    language model training on GPU clusters using Megatron-LM".

    Returns the actions of each stage. Raises UsageError for sizes below 1, and for a number of microbatches
    that the number of stages does not divide.
    """
    # Two stages of two chunks: 0F1 is forward of microbatch 1 on virtual stage 0. Stage 0 holds 0 and 2.
    # stage 0  0F0 0F1 2F0 2F1 ·   ·   2B0──── ·   2B1──── 0B0──── 0B1────
    # stage 1  ·   1F0 1F1 3F0 3B0──── 3F1 3B1──── 1B0──── 1B1──── ·   ·
    _refuse_bad_sizes("interleaved", stages, microbatches, chunks, any_chunks=True)
    if microbatches % stages:
        below, above = microbatches // stages * stages, -(-microbatches // stages) * stages
        fitting = f"{below} or {above}" if below else f"{above}"
        raise UsageError(
            f"interleaved: {stages} stages do not divide {microbatches} microbatches;"
            f" use {fitting} microbatches, or schedule 1f1b, which takes any number"
        )

    def nth(kind: str, n: int, stage: int) -> Action:
        group, n_in_group = divmod(n, stages * chunks)
        chunk, i = divmod(n_in_group, stages)
        if kind == F:
            return Action(F, group * stages + i, chunk, stage)
        return Action(B, group * stages + i, chunks - 1 - chunk, stage)

    total = microbatches * chunks
    schedule = []
    for stage in range(stages):
        warm_up = min(2 * (stages - stage - 1) + (chunks - 1) * stages, total)
        actions = [nth(F, n, stage) for n in range(warm_up)]
        for n in range(total - warm_up):
            actions += [nth(F, warm_up + n, stage), nth(B, n, stage)]
        actions += [nth(B, n, stage) for n in range(total - warm_up, total)]
        schedule.append(actions)
    return schedule


def zero_bubble_h1(stages: int, microbatches: int, chunks: int = 1) -> list[list[Action]]:
    """ZB-H1: 1F1B with backward split in two, for W can wait: nobody needs it before the optimizer does.

    Stage s runs W of a microbatch s steps after its I, so the stages before get their gradients sooner, and
    W's that were put off fill what would be the bubble at the end. An activation is held until its W, at
    most `stages` on any stage. Qi et al. 2023, "Zero bubble pipeline parallelism".

    Returns the actions of each stage. Raises UsageError for sizes below 1, and for more than one chunk.
    """
    # stage 0  F0 F1 F2 ·  ·  I0 W0 F3 I1 W1 I2 W2 I3 W3
    # stage 1  ·  F0 F1 ·  I0 F2 I1 W0 F3 I2 W1 I3 W2 W3
    # stage 2  ·  ·  F0 I0 F1 I1 F2 I2 W0 F3 I3 W1 W2 W3
    _refuse_bad_sizes("zb-h1", stages, microbatches, chunks)
    schedule = []
    for stage in range(stages):
        warm_up = min(stages - stage - 1, microbatches)
        actions = [Action(F, i, 0, stage) for i in range(warm_up)]
        for i in range(microbatches):
            if warm_up + i < microbatches:
                actions.append(Action(F, warm_up + i, 0, stage))
            actions.append(Action(I, i, 0, stage))
            if i >= stage:
                actions.append(Action(W, i - stage, 0, stage))
        actions += [Action(W, i, 0, stage) for i in range(max(microbatches - stage, 0), microbatches)]
        schedule.append(actions)
    return schedule


SCHEDULES: dict[str, Callable[..., list[list[Action]]]] = {
    "naive": naive,
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
    "interleaved": interleaved,
    "zb-h1": zero_bubble_h1,
}
"""The schedules by the names they have on the command line."""


def build_schedule(
    name: str, stages: int, microbatches: int, chunks: int | None = None
) -> list[list[Action]]:
    """Return the named schedule; `chunks` of None is 2 for interleaved and 1 for all others.

    Raises UsageError for an unknown name, and for sizes that the schedule cannot have.
    """
    if name not in SCHEDULES:
        raise UsageError(f"schedule {name!r} is unknown: use one of {', '.join(SCHEDULES)}")
    if chunks is None:
        return SCHEDULES[name](stages, microbatches)
    return SCHEDULES[name](stages, microbatches, chunks)


def _refuse_bad_sizes(
    name: str, stages: int, microbatches: int, chunks: int, any_chunks: bool = False
) -> None:
    for what, n in (("stages", stages), ("microbatches", microbatches), ("chunks", chunks)):
        if n < 1:
            raise UsageError(f"{name}: {n} {what} make no schedule; give at least 1")
    refuse_too_many(Sizes(stages, microbatches, chunks))
    if chunks > 1 and not any_chunks:
        raise UsageError(
            f"{name}: {chunks} chunks a stage were asked for, and this schedule has one;"
            " leave chunks at 1, or use schedule interleaved"
        )
