"""Every schedule, run by the one executor, equals serial training: each gradient and weight at each step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

import minipar
from minipar.errors import UsageError
from minipar.training import Job
from tests.pipeline.runs import prove, settings

SCHEDULES = ("naive", "gpipe", "1f1b", "zb-h1", "interleaved")


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("p", [2, 3, 4])
def test_gpt(schedule: str, p: int) -> None:
    for i, m in enumerate((p, 2 * p, 8, 7)):
        if schedule == "interleaved" and m % p:
            continue
        kind, accumulate, recompute = ("gpt", "untied")[i % 2], (1, 3)[i // 2], bool(i % 2)
        prove(p, kind, pp=p, schedule=schedule, microbatches=m, accumulate=accumulate, recompute=recompute)


@pytest.mark.parametrize("kind", ["mlp", "convnet"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_other_models(kind: str, schedule: str) -> None:
    prove(3, kind, pp=3, schedule=schedule, microbatches=6 if schedule == "interleaved" else 4)


def test_dropout_and_more_microbatches_than_samples() -> None:
    prove(2, "gpt", pp=2, microbatches=12, dropout=0.2, recompute=True)


def test_replicas_of_a_pipeline_accumulate() -> None:
    prove(4, "gpt", dp=2, pp=2, accumulate=3)


LAYOUTS = [
    (2, 2, 2, 0, "1f1b"), (2, 2, 2, 1, "zb-h1"), (1, 4, 2, 0, "gpipe"), (4, 2, 1, 1, "interleaved"),
    (1, 8, 1, 0, "1f1b"), (8, 1, 1, 1, None), (1, 1, 8, 0, None), (2, 1, 4, 1, None), (1, 2, 4, 0, "interleaved"),
    (4, 1, 2, 0, None), (2, 4, 1, 1, "naive"),
]  # fmt: skip


@pytest.mark.parametrize("dp, pp, tp, zero, schedule", LAYOUTS)
def test_layouts_of_eight_ranks(dp: int, pp: int, tp: int, zero: int, schedule: str | None) -> None:
    sizes = dict(layers=16 if pp > 2 else 4, heads=8, width=16, batch=6, seq_len=4, steps=1)
    options = dict(schedule=schedule, microbatches=pp * 2) if schedule else {}
    prove(8, "gpt", dp=dp, pp=pp, tp=tp, zero=zero, sequence_parallel=tp == 2, **sizes, **options)


def test_a_stage_that_raises_is_named() -> None:
    config = settings("gpt", pp=2, microbatches=4)

    def run() -> None:
        job = Job(config, minipar.world())
        if minipar.world().rank == 1:

            def fail(*inputs: Any) -> None:
                raise ArithmeticError("planted")

            job.model.loss.forward = fail  # type: ignore[method-assign]
        job.forward_backward(next(iter(job.loader)))

    with pytest.raises(ArithmeticError) as caught:
        minipar.launch(run, 2, timeout=20)
    note = " ".join(caught.value.__notes__)
    assert "rank 1" in note and "F0 on stage 1" in note


@pytest.mark.parametrize(
    "options, says",
    [
        (dict(pp=2, zero=2), "ZeRO 2 with a pipeline is refused"),
        (dict(pp=2, zero=3), "ZeRO 3 with a pipeline is refused"),
        (dict(pp=2, schedule="interleaved", microbatches=3), "divide"),
        (dict(pp=4, layers=1), "stage"),
        (dict(pp=2, aggregation="master"), "master"),
    ],
)
def test_what_is_not_offered_is_refused_on_every_rank(options: dict[str, Any], says: str) -> None:
    config = settings("gpt", **options)
    messages: list[str] = []

    def run() -> None:
        try:
            Job(config, minipar.world())
        except UsageError as error:
            messages.append(str(error))

    minipar.launch(run, options["pp"], timeout=20)
    assert len(messages) == options["pp"] and len(set(messages)) == 1
    assert says in messages[0]


def test_batch_norm_is_refused_with_the_reason() -> None:
    with pytest.raises(UsageError, match="mixes the samples"):
        settings("convnet", pp=2, norm="batch")
    assert replace(settings("convnet"), pp=2).norm == "group"
