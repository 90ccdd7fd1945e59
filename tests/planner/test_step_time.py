"""Step times worked out by hand, and what must hold between layouts."""

from __future__ import annotations

from dataclasses import replace

import pytest

from minipar.models import GPTConfig, MLPConfig
from minipar.parallel.pipeline.formulas import FORMULAS
from minipar.planner import step_time
from minipar.planner.collectives import SYMMETRIC, Group, axis_groups, collective, message, on_link
from minipar.planner.gradient_time import hidden_behind
from minipar.planner.layout import PRECISIONS, Layout
from minipar.planner.machine import Link, Rate
from minipar.planner.op_time import Passes, matmul_seconds
from minipar.planner.shapes import shape_of
from minipar.planner.step_time import long_pipeline, predict
from minipar.planner.work import Matmul, linear
from tests.planner.machines import MEASURED, PLAIN

FLOAT32 = PRECISIONS["float32"]
GPT = shape_of("gpt", GPTConfig(96, 64, 256, 14, 4))


def test_a_product_takes_the_longer_of_computing_and_moving() -> None:
    large, thin = Matmul(1000, 1000, 1000), Matmul(1000, 1, 1000)
    assert matmul_seconds(large, Rate(1e12, 0.5), 1e12, 4) == pytest.approx(2e9 / 5e11)
    assert matmul_seconds(thin, Rate(1e15), 1e12, 4) == pytest.approx(4 * (1000 + 1000 + 10**6) / 1e12)


def test_sizes_are_rounded_up_to_tiles_and_tiles_have_to_be_started() -> None:
    assert matmul_seconds(Matmul(65, 65, 65), Rate(1e9, tile=64), 1e15, 4) == pytest.approx(2 * 128**3 / 1e9)
    assert matmul_seconds(Matmul(64, 64, 64), Rate(1e9, ramp=64), 1e15, 4) == pytest.approx(2 * 2 * 64**3 / 1e9)


def test_a_linear_layer_has_three_equal_products() -> None:
    op = linear(10, 20, 30)
    assert [op.flops(work) for work in ("forward", "input", "weight")] == [2 * 10 * 20 * 30] * 3
    assert linear(10, 20, 30, first=True).flops("input") == 0


@pytest.mark.parametrize(("ranks", "stride"), [(2, 1), (4, 1)])
def test_inside_a_node_the_node_is_what_counts(ranks: int, stride: int) -> None:
    found = collective(PLAIN, "all_reduce", 1e6, Group(ranks, stride)).total
    assert found == pytest.approx(2 * (ranks - 1) * 1e-6 + 2 * (ranks - 1) / ranks * 1e6 * 1e-11)


def test_across_nodes_one_part_of_each_rank_goes_over_the_network() -> None:
    # 8 ranks on 2 nodes of 4: a quarter each between the nodes, reduce-scatter and all-gather inside.
    found = collective(PLAIN, "all_reduce", 1e6, Group(8, 1)).total
    inside = 2 * (3 * 1e-6 + 3 / 4 * 1e6 * 1e-11)
    between = 2 * 1e-5 + 2 / 2 * 2.5e5 * 1e-10
    assert found == pytest.approx(inside + between)
    alone = collective(PLAIN, "all_reduce", 1e6, Group(2, 4)).total
    assert alone == pytest.approx(on_link("all_reduce", 1e6, 2, PLAIN.cluster))


def test_axes_lie_as_the_mesh_numbers_its_ranks() -> None:
    groups = axis_groups(dp=2, pp=3, tp=4)
    assert groups == {"tp": Group(4, 1), "pp": Group(3, 4), "dp": Group(2, 12)}


def test_an_all_reduce_in_symmetric_memory_is_as_measured_and_its_ranks_copy_by_themselves() -> None:
    group, samples = Group(2, 1), MEASURED.measured.samples
    times = replace(MEASURED.measured, samples={**samples, SYMMETRIC: {2: [(1.0, 1e-3), (100.0, 5e-3)]}})
    machine = replace(MEASURED, measured=times, node=replace(MEASURED.node, overlap=0.25))
    plain, found = (collective(machine, operation, 100.0, group) for operation in ("all_reduce", SYMMETRIC))
    assert (plain.busy, plain.wire) == (pytest.approx(7.5e-3), pytest.approx(2.5e-3))
    assert (found.busy, found.wire) == (pytest.approx(5e-3), 0.0)
    behind = collective(machine.slowed(1.0, 0.0), SYMMETRIC, 100.0, group)
    assert behind.total == pytest.approx(2.0)
    for unmeasured in (MEASURED, PLAIN):  # it is an all-reduce like any other
        assert collective(unmeasured, SYMMETRIC, 100.0, group) == collective(unmeasured, "all_reduce", 100.0, group)


def test_data_parallel_sums_in_symmetric_memory_and_sharding_does_not() -> None:
    samples = {**MEASURED.measured.samples, SYMMETRIC: {2: [(1.0, 1e3), (1e9, 1e3)]}}
    machine = replace(MEASURED, measured=replace(MEASURED.measured, samples=samples))
    shape = shape_of("mlp", MLPConfig())
    before, after = (
        [predict(shape, m, Layout(dp=2, zero=zero), 8).exposed for zero in (0, 1, 2, 3)] for m in (MEASURED, machine)
    )
    assert before[0] < after[0] == pytest.approx(1e3)
    assert after[1:] == before[1:]


def test_an_imitated_network_comes_on_top_and_is_hidden_wholly() -> None:
    slow = MEASURED.slowed(1e-3, 1e-8)
    here, there = (collective(m, "all_reduce", 100.0, Group(2, 1)) for m in (MEASURED, slow))
    assert here.wire == 0 and here.busy == pytest.approx(1e-2)
    assert there.busy == pytest.approx(1e-2)
    wire = 2 * 1e-3 + 100 * 1e-8
    assert there.total == pytest.approx(max(1e-2, wire))
    longer = MEASURED.slowed(1.0, 0.0)
    assert collective(longer, "all_reduce", 100.0, Group(2, 1)).total == pytest.approx(2.0)
    assert message(longer, 100.0, Group(2, 1)).total == pytest.approx(1.0)


def test_sums_hide_behind_backward_in_order() -> None:
    assert hidden_behind([1.0, 1.0], [0.0, 5.0], 10.0) == 0.0
    assert hidden_behind([1.0, 4.0], [0.0, 9.0], 10.0) == 3.0
    assert hidden_behind([8.0, 4.0], [0.0, 1.0], 10.0) == 2.0  # the second waits for the first


def test_what_the_core_copies_cannot_be_hidden() -> None:
    layout = Layout(dp=2)
    hidden = predict(GPT, replace(PLAIN, node=Link(0.0, 1e-9, 1.0)), layout, 8).exposed
    shown = predict(GPT, replace(PLAIN, node=Link(0.0, 1e-9, 0.0)), layout, 8).exposed
    every = GPT.parameters * 4 * 1e-9
    assert shown == pytest.approx(every)
    assert hidden < shown


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved", "zb-h1", "naive"])
@pytest.mark.parametrize("m", [4, 8])
def test_simulated_and_closed_pipelines_agree_on_equal_stages(schedule: str, m: int) -> None:
    p, v = 4, 2 if schedule == "interleaved" else 1
    layout = Layout(pp=p, schedule=schedule, microbatches=m, chunks=v)
    stages = [Passes(1.0 / v, 1.0 / v, 1.0 / v) for _ in range(p * v)]
    seconds, bubble = long_pipeline(layout, stages, [])
    assert bubble == pytest.approx(float(FORMULAS[schedule].bubble(p, m, v)))
    assert seconds == pytest.approx(3 * m / (1 - bubble))


def test_long_and_simulated_pipelines_take_about_as_long(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = Layout(pp=4, schedule="1f1b", microbatches=16)
    exact = predict(GPT, PLAIN, layout, 64)
    assert exact.timeline is not None
    monkeypatch.setattr(step_time, "SIMULATED", 0)
    closed = predict(GPT, PLAIN, layout, 64)
    assert closed.timeline is None
    assert closed.seconds == pytest.approx(exact.seconds, rel=0.05)
    assert closed.bubble == pytest.approx(exact.bubble, abs=0.05)


def test_sums_within_layers_are_part_of_every_pass() -> None:
    # A block sums twice forward and twice backward (Shoeybi et al. 2019); recomputation repeats the forward's.
    shape = shape_of("gpt", GPTConfig(96, 64, 256, 1, 4))
    machine = replace(PLAIN, node=Link(1.0, 0.0))  # a second a message, two messages an all-reduce of two ranks
    plain = predict(shape, machine, Layout(tp=2), 1).tensor_messages
    again = predict(shape, machine, Layout(tp=2, recompute=True), 1).tensor_messages
    embedding, block, head, loss = 1, 4, 1, 1
    assert plain == pytest.approx(2 * (embedding + block + head + loss))
    assert again == pytest.approx(2 * (2 * (embedding + 2 + loss) + 2 + head))


def test_more_microbatches_shrink_the_bubble() -> None:
    bubbles = [predict(GPT, PLAIN, Layout(pp=4, schedule="1f1b", microbatches=m), 64).bubble for m in (4, 8, 16)]
    assert bubbles == sorted(bubbles, reverse=True)


def test_zero_stages_cost_what_they_send() -> None:
    # Stage 3 gathers twice and stage 1 once: with nothing hidden, half again as much as plain data parallelism.
    machine = replace(PLAIN, node=Link(0.0, 1e-9, 0.0))
    shown = [predict(GPT, machine, Layout(dp=2, zero=zero), 8).exposed for zero in range(4)]
    assert shown[1] == pytest.approx(shown[0]) == pytest.approx(shown[2])
    assert shown[3] == pytest.approx(1.5 * shown[0])
    twice = predict(GPT, machine, Layout(dp=2, zero=2, microbatches=2), 8).exposed
    assert twice == pytest.approx(1.5 * shown[0])


def test_stage_1_sums_after_backward_and_stage_2_during_it() -> None:
    machine = replace(PLAIN, node=Link(0.0, 1e-9))  # nothing is copied by a core, so all of it could be hidden
    first, second = (predict(GPT, machine, Layout(dp=2, zero=zero), 8).exposed for zero in (1, 2))
    summed = spread = GPT.parameters * 4 * 1e-9 / 2  # a reduce-scatter, an all-gather
    assert first == pytest.approx(summed + spread)
    assert spread <= second < first


def test_a_measured_machine_counts_its_own_times() -> None:
    shape = shape_of("gpt", GPTConfig(96, 64, 256, 1, 4))
    plain = predict(shape, replace(MEASURED, measured=None), Layout(), 1)
    found = predict(shape, MEASURED, Layout(), 1)
    assert found.fixed == pytest.approx(0.5)
    gelu = 64 * 4 * 256
    assert found.compute > 2 * (gelu / 1000)  # the table's 1 ms an element, forward alone, in its context
    assert found.seconds > plain.seconds


def test_images_and_vectors_are_predicted_too() -> None:
    shape = shape_of("mlp", MLPConfig(64, 10, 128, 4))
    one, two = (predict(shape, PLAIN, Layout(dp=dp), 1024).compute for dp in (1, 2))
    assert two == pytest.approx(one / 2, rel=0.2)
