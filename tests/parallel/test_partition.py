"""Partition policies cover every element once, balance what they say they balance, and refuse in one line."""

import itertools
import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minipar import launch, world
from minipar.errors import UsageError
from minipar.models import GPT, MLP, ConvNet, ConvNetConfig, GPTConfig, MLPConfig
from minipar.parallel.partition.assignment import Assignment, Device, Item, Part
from minipar.parallel.partition.devices import parse_devices, parse_memory, parse_speeds
from minipar.parallel.partition.policies import (
    KIND_RULES,
    POLICIES,
    assign,
    block_costs,
    by_bytes,
    by_cost,
    by_count,
    by_devices,
    by_kind,
    items_of,
)
from minipar.parallel.partition.profile import agreed_costs, profile_blocks
from minipar.parallel.partition.stage_split import split_stages
from minipar.plot import partition_bars
from minipar.plot.partition import partition_figure

quick = settings(max_examples=60, deadline=None, derandomize=True)
AXES = {"convolution": 4, "linear": 2, "embedding": 2, "norm": 1, "other": 0}


@st.composite
def item_lists(draw: st.DrawFn) -> list[Item]:
    """One to ten parameters of random kinds and shapes, in rising blocks, the first one sometimes tied."""
    items: list[Item] = []
    block = 0
    for i in range(draw(st.integers(1, 10))):
        kind = draw(st.sampled_from(list(AXES)))
        shape = tuple(draw(st.integers(1, 7)) for _ in range(AXES[kind]))
        block += draw(st.integers(0, 1)) if i else 0
        items.append(Item(f"p{i}", kind, shape, 4 * math.prod(shape), draw(st.integers(0, 9)), (block,)))
    if block and draw(st.booleans()):
        first = items[0]
        items[0] = Item(first.name, first.kind, first.shape, first.bytes, first.cost, (0, block))
    return items


def times_held(assignment: Assignment) -> list[np.ndarray]:
    """For every element of every parameter, how many devices hold it: counted by marking arrays."""
    marks = {item.name: np.zeros(item.shape, int) for item in assignment.items}
    for part in assignment.parts:
        piece = part.of(marks[part.item.name])
        assert piece.size == part.elements
        piece += 1
    return list(marks.values())


@quick
@given(item_lists(), st.integers(1, 12))
def test_every_policy_covers_each_element_exactly_once(items: list[Item], devices: int) -> None:
    for policy in POLICIES:
        if policy in ("cost", "devices") and devices > len(block_costs(items)):
            with pytest.raises(UsageError, match="would leave a stage empty"):
                assign(policy, items, devices)
            continue
        assignment = assign(policy, items, devices)
        assert all((held == 1).all() for held in times_held(assignment)), policy
        assert sum(map(assignment.elements, range(devices))) == sum(item.size for item in items)
        assert sum(map(assignment.bytes, range(devices))) == sum(item.bytes for item in items)


@quick
@given(item_lists(), st.integers(1, 4))
def test_stages_are_whole_blocks_in_order(items: list[Item], devices: int) -> None:
    blocks = len(block_costs(items))
    assignment = by_cost(items, min(devices, blocks))
    assert assignment.stages is not None and all(assignment.stages)
    assert [b for stage in assignment.stages for b in stage] == list(range(blocks))
    for part in assignment.parts:
        assert part.item.blocks[0] in assignment.stages[part.device]


# Balance -------------------------------------------------------------------------------------------------


@quick
@given(st.lists(st.integers(1, 40), min_size=1, max_size=7), st.integers(1, 3))
def test_bytes_never_cuts_and_keeps_grahams_bound(sizes: list[int], devices: int) -> None:
    items = [Item(f"p{i}", "linear", (n,), 4 * n, 0) for i, n in enumerate(sizes)]
    assignment = by_bytes(items, devices)
    assert all(part.is_whole for part in assignment.parts)
    best = min(
        max(sum(4 * n for n, d in zip(sizes, places) if d == k) for k in range(devices))
        for places in itertools.product(range(devices), repeat=len(sizes))
    )
    fullest = max(map(assignment.bytes, range(devices)))
    assert fullest <= (4 / 3 - 1 / (3 * devices)) * best + 1e-9


def test_bytes_places_the_largest_first() -> None:
    items = [Item(f"p{n}", "linear", (n,), 4 * n, 0) for n in (1, 2, 3, 4, 5, 9)]  # in order: 13 against 11
    assert sorted(map(by_bytes(items, 2).bytes, range(2))) == [48, 48]


@quick
@given(item_lists(), st.integers(1, 12))
def test_count_gives_every_device_the_same_number_of_elements(items: list[Item], devices: int) -> None:
    held = [by_count(items, devices).elements(d) for d in range(devices)]
    assert max(held) - min(held) <= 1


def test_kind_cuts_linears_by_row_embeddings_by_width_and_leaves_convolutions_whole() -> None:
    items = [
        Item("conv", "convolution", (8, 3, 3, 3), 864, 0),
        Item("fc.weight", "linear", (7, 15), 420, 0),
        Item("fc.bias", "linear", (7,), 28, 0),
        Item("table", "embedding", (97, 60), 23280, 0),
        Item("norm", "norm", (8,), 32, 0),
    ]
    held = by_kind(items, 4).parts
    parts = {item.name: [p for p in held if p.item is item] for item in items}
    assert [(p.axis, p.stop - p.start) for p in parts["fc.weight"]] == [(0, 2), (0, 2), (0, 2), (0, 1)]
    assert [(p.axis, p.stop - p.start) for p in parts["fc.bias"]] == [(0, 2), (0, 2), (0, 2), (0, 1)]
    assert [(p.axis, p.stop - p.start) for p in parts["table"]] == [(1, 15)] * 4
    assert [p.device for p in parts["conv"]] == [3]  # which holds fewest bytes of what is cut
    assert all(p.is_whole for p in parts["conv"] + parts["norm"])
    by_vocabulary = by_kind(items, 3, {**KIND_RULES, "embedding": 0})
    assert [p.stop - p.start for p in by_vocabulary.parts if p.item.name == "table"] == [33, 32, 32]


def brute_force(costs: list[float], speeds: list[float], limits: list[float], bytes_: list[int]) -> float:
    """The least slowest stage over all splits into non-empty stages that fit; infinite if none does."""
    best = math.inf
    for cuts in itertools.combinations(range(1, len(costs)), len(speeds) - 1):
        bounds = [0, *cuts, len(costs)]
        pieces = list(itertools.pairwise(bounds))
        if all(sum(bytes_[a:b]) <= limit for (a, b), limit in zip(pieces, limits)):
            best = min(best, max(sum(costs[a:b]) / speed for (a, b), speed in zip(pieces, speeds)))
    return best


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data())
def test_stage_split_equals_brute_force_up_to_twelve_blocks(data: st.DataObject) -> None:
    costs = data.draw(st.lists(st.floats(0, 100), min_size=1, max_size=12))
    stages = data.draw(st.integers(1, len(costs)))
    speeds = data.draw(st.lists(st.sampled_from([0.25, 0.5, 1.0, 3.0]), min_size=stages, max_size=stages))
    sizes = data.draw(st.lists(st.integers(1, 9), min_size=len(costs), max_size=len(costs)))
    limits = data.draw(st.lists(st.sampled_from([8.0, 20.0, math.inf]), min_size=stages, max_size=stages))
    best = brute_force(costs, speeds, limits, sizes)
    found = split_stages(costs, speeds, lambda k, a, b: sum(sizes[a:b]) <= limits[k])
    if found is None:
        assert math.isinf(best)
        return
    assert [b for stage in found for b in stage] == list(range(len(costs)))
    assert all(sum(sizes[s.start : s.stop]) <= limit for s, limit in zip(found, limits))
    slowest = max(sum(costs[s.start : s.stop]) / speed for s, speed in zip(found, speeds))
    assert slowest == pytest.approx(best, rel=1e-12, abs=1e-12)


def test_stage_split_example_of_its_docstring() -> None:
    assert split_stages([3, 1, 4, 1, 5, 9, 2, 6], [1, 1, 0.5]) == [range(5), range(5, 7), range(7, 8)]
    assert split_stages([1, 1], [1, 1, 1]) is None


def test_a_slow_device_gets_less() -> None:
    items = [Item(f"p{i}", "linear", (4,), 16, 1, (i,)) for i in range(10)]
    devices = parse_devices("2xA,1xB", {"A": 1.0, "B": 0.5}, ranks=3)
    assignment = by_devices(items, devices)
    assert assignment.stages == (range(4), range(4, 8), range(8, 10))
    assert [len(stage) for stage in by_devices(items, 3).stages or ()] == [3, 3, 4]  # their number alone
    first = by_devices(items, parse_devices("1xB,2xA", {"A": 1.0, "B": 0.5}))
    assert first.stages == (range(2), range(2, 6), range(6, 10))


def test_memory_limits_hold_and_a_tied_copy_counts() -> None:
    tied = [Item("table", "embedding", (10, 1), 40, 0, (0, 3))]
    tied += [Item(f"p{i}", "linear", (5,), 20, 1, (i,)) for i in range(4)]
    small = Device("small", 1.0, 60)
    assert by_devices(tied, [Device("big"), small]).stages == (range(3), range(3, 4))
    assert by_devices(tied[1:], [Device("big"), small]).stages == (range(2), range(2, 4))
    assert [item.name for item in by_devices(tied, 2).copies(1)] == ["table"]
    with pytest.raises(UsageError, match=r"no split .* every device could hold 60 bytes"):
        by_devices(tied, [Device("big"), Device("small", 1.0, 59)])


@quick
@given(item_lists(), st.integers(1, 4), st.data())
def test_the_smallest_memory_named_would_do_and_less_would_not(
    items: list[Item], devices: int, data: st.DataObject
) -> None:
    devices = min(devices, len(block_costs(items)))
    limits = data.draw(st.lists(st.integers(1, 3), min_size=devices, max_size=devices))
    chosen = [Device(str(d), 1.0, limit) for d, limit in enumerate(limits)]
    with pytest.raises(UsageError) as caught:  # the smallest element is 4 bytes
        by_devices(items, chosen)
    found = re.search(r"hold ([\d,]+) bytes", str(caught.value))
    assert found is not None
    named = int(found[1].replace(",", ""))
    by_devices(items, [Device(str(d), 1.0, named) for d in range(devices)])
    with pytest.raises(UsageError, match=f"hold {named:,} bytes"):
        by_devices(items, [Device(str(d), 1.0, named - 1) for d in range(devices)])


# Models, measured costs ----------------------------------------------------------------------------------


def test_items_of_names_kinds_blocks_and_bytes() -> None:
    items = {i.name: i for i in items_of(GPT(GPTConfig(11, 6, 8, 2, 2)), "float64")}
    table = items["wte.weight"]
    assert (table.kind, table.blocks, table.bytes, table.cost) == ("embedding", (0, 3), 11 * 8 * 8, 2 * 88.0)
    assert items["h.1.attn.c_attn.weight"].kind == "linear" and items["h.1.attn.c_attn.weight"].blocks == (2,)
    assert items["ln_f.bias"].kind == "norm"
    net = ConvNet(ConvNetConfig(channels=1, size=6, width=4, layers=1, groups=2)).materialize(0, "float16")
    assert {item.kind for item in items_of(net)} == {"convolution", "norm", "linear"}
    assert all(item.bytes == 2 * item.size for item in items_of(net))


def test_profile_finds_the_heavy_block_and_leaves_no_trace() -> None:
    model = MLP(MLPConfig(inputs=8, classes=400, width=400, layers=3)).materialize(0)
    costs = profile_blocks(model, np.ones((64, 8), np.float32), repeats=5)  # 8·400, 400·400, 400·400
    assert len(costs) == 3 and min(costs) > 0 and costs[1] > 2 * costs[0]
    assert all(p.grad is None for p in model.parameters())
    assert by_cost(items_of(model), 2, [1.0, 5.0, 4.0]).stages == (range(2), range(2, 3))


def test_profile_fills_blocks_for_their_turn_and_restores_statistics() -> None:
    gpt = GPT(GPTConfig(11, 6, 8, 1, 2))
    assert len(profile_blocks(gpt, np.zeros((2, 6), int), 1)) == 3
    assert not any(p.is_materialized for p in gpt.parameters())
    net = ConvNet(ConvNetConfig(1, 6, 5, width=4, layers=1, norm="batch")).materialize(0)
    before = {name: b.data.copy() for name, b in net.named_buffers()}
    profile_blocks(net, np.random.default_rng(0).random((3, 1, 6, 6), np.float32), 1)
    assert all((b.data == before[name]).all() for name, b in net.named_buffers())


def test_profile_refusals_and_agreement_of_ranks() -> None:
    model = MLP(MLPConfig(inputs=4, width=4)).materialize(0)
    x = np.ones((2, 4), np.float32)
    with pytest.raises(UsageError, match="repeats = 0"):
        profile_blocks(model, x, 0)
    model.layers[0].fc.weight.register_hook(lambda p: None)  # type: ignore[attr-defined]
    with pytest.raises(UsageError, match="hooks"):
        profile_blocks(model, x)
    told = launch(lambda: agreed_costs(MLP(MLPConfig(inputs=4, width=4)), x, world(), 1), 3)
    assert told[0] == told[1] == told[2] and len(told[0]) == 3


# Assignments, tables, pictures ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bounds, fault",
    [
        ([(0, 5), (4, 9)], "4 … 5 is held twice"),
        ([(0, 4), (5, 9)], "4 … 5 is held by no device"),
        ([(0, 8)], "8 … 9 is held by no device"),
        ([], "0 … 9 is held by no device"),
        ([(0, 9), (0, 9)], "0 … 9 is held twice"),
    ],
)
def test_no_assignment_with_a_hole_or_an_overlap(bounds: list[tuple[int, int]], fault: str) -> None:
    item = Item("p", "linear", (9,), 36, 1)
    parts = tuple(Part(item, d, start, stop) for d, (start, stop) in enumerate(bounds))
    with pytest.raises(UsageError, match=fault):
        Assignment("hand", (item,), (Device("0"), Device("1")), parts)


def test_no_assignment_to_a_missing_device_or_along_two_axes() -> None:
    item = Item("p", "linear", (2, 2), 16, 1)
    with pytest.raises(UsageError, match="device 2"):
        Assignment("hand", (item,), (Device("0"), Device("1")), (Part(item, 2, 0, 4),))
    with pytest.raises(UsageError, match="more than one axis"):
        Assignment("hand", (item,), (Device("0"),), (Part(item, 0, 0, 1, 0), Part(item, 0, 1, 2, 1)))


def test_table_and_picture(tmp_path) -> None:
    items = items_of(GPT(GPTConfig(11, 6, 8, 2, 2)))
    staged = by_devices(items, parse_devices("1xA,1xB", {"A": 1.0, "B": 0.5}), [1, 1, 1, 1])
    name, what, elements, size, share = staged.rows()[1]
    assert (name, share) == ("B-0, speed 0.5", "25.0%")
    assert what == "block 3, 2 whole, copy of wte.weight"
    assert (elements, size) == ("16", "64 + 352 copied")
    printed = str(by_count(items, 3))
    assert "by count" in printed and "share of cost" in printed and "in part" in printed
    assert by_count(items[:1], 99).rows()[98][1:] == ("nothing", "0", "0", "0.0%")
    bars = by_bytes(items, 3).bars()
    assert sum(sum(bar.values()) for bar in bars) == sum(item.bytes for item in items)
    for policy in POLICIES:
        path = tmp_path / f"{policy}.png"
        partition_bars(assign(policy, items, 3), path)
        assert path.read_bytes()[:4] == b"\x89PNG"


def test_the_bars_are_bytes_by_kind_and_shares_of_the_cost() -> None:
    items = [Item("table", "embedding", (6, 4), 96, 1, (0,)), Item("w", "linear", (5,), 20, 3, (1,))]
    items += [Item("b", "linear", (2,), 8, 0, (1,)), Item("n", "norm", (3,), 12, 1, (2,))]
    devices = parse_devices("1xfast,1xslow", {"fast": 1.0, "slow": 0.5})
    held, work = partition_figure(by_devices(items, devices, [1.0, 3.0, 1.0])).axes
    assert [label.get_text() for label in held.get_yticklabels()] == ["fast-0", "slow-0"]
    bars = {c.get_label(): [(bar.get_x(), bar.get_width()) for bar in c.patches] for c in held.containers}
    assert bars == {"linear": [(0, 28), (0, 0)], "embedding": [(28, 96), (0, 0)], "norm": [(124, 0), (0, 12)]}
    assert [bar.get_width() for bar in work.patches] == pytest.approx([80, 20])
    assert [text.get_text() for text in held.figure.legends[0].get_texts()] == ["linear", "embedding", "norm"]
    assert held.figure.get_suptitle() == "4 parameters by devices"
    assert held.get_xlabel() == "parameters (bytes)" and work.get_xlabel() == "share of cost (%)"
    assert held.yaxis_inverted()


# Bad input -----------------------------------------------------------------------------------------------

ONE = [Item("p", "linear", (4,), 16, 1)]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: assign("size", ONE, 1), "'size' is unknown: use one of kind, bytes, count, cost, devices"),
        (lambda: by_bytes(ONE, 0), "0 devices cannot hold a model"),
        (lambda: by_devices(ONE, []), "0 devices cannot hold a model"),
        (lambda: by_count([], 2), "no parameters"),
        (lambda: by_bytes(ONE * 2, 2), "two items have the name 'p'"),
        (lambda: by_cost(ONE, 2), "2 devices for 1 blocks would leave a stage empty; use at most 1"),
        (lambda: by_cost(ONE, 1, []), "0 costs for 1 blocks"),
        (lambda: by_cost(ONE, 1, [math.nan]), "cost is nan"),
        (lambda: by_cost(ONE, 1, [-1.0]), "cost is -1.0"),
        (lambda: by_kind(ONE, 2, {}), "of kind 'linear', for which there is no rule"),
        (lambda: by_kind(ONE, 2, {"linear": 1}), r"p \(4,\) has no axis 1"),
        (lambda: assign("bytes", ONE, [Device("0")]), "unequal ones need policy devices"),
        (lambda: assign("count", ONE, 1, [1.0]), "does not look at costs"),
        (lambda: parse_devices("2xA,1xB", {"A": 1, "B": 1}, ranks=4), "are 3, there are 4 ranks"),
        (lambda: parse_devices("2xA,1xB", {"A": 1}), r"type B has no speed \(given: A\)"),
        (lambda: parse_devices("0xA", {"A": 1}), "'0xA' must be a count of at least 1"),
        (lambda: parse_devices("A", {"A": 1}), "'A' must be a count"),
        (lambda: parse_devices("", {}), "must be a count"),
        (lambda: parse_devices("1xA", {"A": 0}), "speed 0 of type A"),
        (lambda: parse_devices("1xA", {"A": math.nan}), "speed nan of type A"),
        (lambda: parse_devices("1xA", {"A": 1, "C": 1}), "speed for type C, which is not among them"),
        (lambda: parse_devices("1xA", {"A": 1}, {"C": 1}), "memory for type C, which is not among them"),
        (lambda: parse_speeds("A"), "write TYPE=VALUE"),
        (lambda: parse_speeds("A=1,A=2"), "a type is given twice"),
        (lambda: parse_speeds("A=fast"), "'fast' must be a number"),
        (lambda: parse_memory("A=3XB"), "must be a number with a unit of B, KiB, MiB, GiB"),
    ],
)
def test_bad_input_is_one_clear_line(call, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_speeds_and_memory_are_read_from_text() -> None:
    assert parse_speeds("A=1, B=0.5") == {"A": 1.0, "B": 0.5}
    assert parse_memory("A=64MiB,B=512") == {"A": 64 * 2**20, "B": 512}
    names = [d.name for d in parse_devices("1xA,1xB,2xA", {"A": 1, "B": 2}, {"A": 10})]
    assert names == ["A-0", "B-0", "A-1", "A-2"]
