"""Placement: every element lies somewhere exactly once; a part is the serial array's part, bitwise."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minipar import launch, random, world
from minipar.comm.interface import balanced
from minipar.errors import UsageError
from minipar.models import GPT, GPTConfig
from minipar.nn import Linear, Parameter
from minipar.nn.init import (
    Constant,
    Initialiser,
    Normal,
    Uniform,
    kaiming_normal,
    kaiming_uniform,
    xavier_uniform,
)
from minipar.parallel.placement import (
    Layout,
    Replicate,
    Shard,
    describe,
    is_sharded,
    place,
    placement_table,
)
from minipar.parallel.tensor_parallel.parallelize import parallelize
from minipar.parallel.tensor_parallel.plans import default_plan

few = settings(max_examples=40, deadline=None, derandomize=True)


@st.composite
def shards(draw: st.DrawFn) -> tuple[tuple[int, ...], Shard, int]:
    """(shape, a cut that it allows, ranks)."""
    ranks, groups, unit = draw(st.integers(1, 5)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    units = draw(st.integers(0, 7)) if unit == 1 else ranks * draw(st.integers(0, 2))
    shape = draw(st.lists(st.integers(0, 4), min_size=1, max_size=4))
    dim = draw(st.integers(0, len(shape) - 1))
    shape[dim] = groups * unit * units
    return tuple(shape), Shard(dim, groups, unit), ranks


class Seat:
    """A place on an axis of so many ranks; enough for what does not communicate."""

    def __init__(self, rank: int, size: int):
        self.rank, self.size = rank, size


def layouts(placement: Shard | Replicate, ranks: int) -> list[Layout]:
    return [Layout(placement, Seat(r, ranks)) for r in range(ranks)]  # type: ignore[arg-type]


@few
@given(shards())
def test_every_element_lies_on_exactly_one_rank(case: tuple[tuple[int, ...], Shard, int]) -> None:
    shape, shard, ranks = case
    shard.check("weight", shape, ranks)
    times = np.zeros(shape, int)
    for layout in layouts(shard, ranks):
        for index in layout.pieces(shape):
            times[index] += 1
    assert (times == 1).all()
    counts = layouts(shard, ranks)[0].counts(shape)
    assert sum(counts) == shape[shard.dim] and all(n % (shard.groups * shard.unit) == 0 for n in counts)
    assert sorted(counts, reverse=True) == counts  # the first ranks hold more
    assert max(counts) - min(counts) <= shard.groups * shard.unit


@few
@given(shards())
def test_parts_make_the_whole_again_bitwise(case: tuple[tuple[int, ...], Shard, int]) -> None:
    shape, shard, ranks = case
    serial = np.random.default_rng(0).standard_normal(shape).astype("float32")

    def run() -> np.ndarray:
        layout = Layout(shard, world())
        local = layout.local(serial)
        assert local.shape == layout.local_shape(shape)
        assert local.shape[shard.dim] == layout.counts(shape)[world().rank]
        return layout.whole(np.asfortranarray(local), shape)

    for whole in launch(run, ranks, timeout=20):
        assert whole.dtype == serial.dtype and whole.shape == shape and whole.tobytes() == serial.tobytes()


def test_groups_are_cut_one_by_one() -> None:
    """A fused query-key-value weight of 2 heads of 2 features: each rank has its head of all three."""
    serial = np.arange(12)
    parts = [layout.local(serial).tolist() for layout in layouts(Shard(0, groups=3, unit=2), 2)]
    assert parts == [[0, 1, 4, 5, 8, 9], [2, 3, 6, 7, 10, 11]]


def test_boundaries_follow_balanced() -> None:
    parts = [layout.local(np.arange(97)) for layout in layouts(Shard(0), 3)]
    assert [len(p) for p in parts] == balanced(97, 3) == [33, 32, 32]
    assert [p[0] for p in parts] == [0, 33, 65] and parts[-1][-1] == 96


INITIALISERS: dict[str, Initialiser] = {
    "constant": Constant(0.5),
    "uniform": Uniform(-1, 2),
    "normal": Normal(0.02, 1.0),
    "kaiming_uniform": kaiming_uniform(7),
    "kaiming_normal": kaiming_normal(7),
    "xavier_uniform": xavier_uniform(7, 5),
}


@pytest.mark.parametrize("name", INITIALISERS)
def test_initial_is_the_serial_initialisation_sliced_bitwise(name: str) -> None:
    key = random.stream(3, "weight")
    cuts = [((12, 5), Shard(0, groups=3, unit=2), 2), ((7, 15), Shard(1), 4), ((3, 2, 3, 3), Shard(1), 3)]
    cuts += [((5,), Shard(0), 3), ((2, 3), Shard(0), 4)]
    for shape, shard, ranks in cuts:
        serial = INITIALISERS[name].fill(key, shape)
        for layout in layouts(shard, ranks):
            part, expected = layout.initial(INITIALISERS[name], key, shape), layout.local(serial)
            assert part.shape == expected.shape and part.tobytes() == expected.tobytes()
    for layout in layouts(Replicate(), 2):
        assert layout.initial(INITIALISERS[name], key, (4, 3)).tobytes() == (
            INITIALISERS[name].fill(key, (4, 3)).tobytes()
        )


@pytest.mark.parametrize("placement", [Replicate(), Shard(0), Shard(1)])
def test_placing_before_and_after_materialising_is_the_same(placement: Shard | Replicate) -> None:
    serial = Linear(5, 7).materialize(3, "float64")

    def run() -> None:
        after = Linear(5, 7).materialize(3, "float64")
        after.weight.grad = np.ones((7, 5))
        version = after.weight.version
        place(after.weight, "weight", placement, world())
        before = Linear(5, 7)
        place(before.weight, "weight", placement, world())
        before.materialize(3, "float64")
        expected = Layout(placement, world()).local(serial.weight.data)
        for p in (before.weight, after.weight):
            assert p.data.tobytes() == expected.tobytes() and p.global_shape == (7, 5)
            assert p.data.base is None and p.data.flags.c_contiguous  # the whole is not kept alive
            assert p.grad is None and is_sharded(p) == isinstance(placement, Shard)
        assert after.weight.version > version

    launch(run, 3)


BLOCKS = (
    "w (4, 3): dimension 0 is not made of 3 equal blocks of units of 1; a size of 3 or 6 would be,"
    " and 4 of 1, 2, 4 blocks"
)
UNITS = "w (8, 3): dimension 0 is not made of 2 equal blocks of units of 3; a size of 6 or 12 would be"


def test_refusals_are_the_same_on_every_rank() -> None:
    cases = [
        (Shard(2), (4, 3), "w (4, 3) has no dimension 2 to cut"),
        (Shard(-1), (4, 3), "w (4, 3) has no dimension -1 to cut"),
        (Shard(0, 3), (4, 3), BLOCKS),
        (Shard(0, 2, 3), (8, 3), UNITS),
        (Shard(0, 3, 2), (36, 3), "w: 4 ranks do not divide 6 heads; 1, 2, 3, 6 ranks would"),
    ]

    def run() -> list[str]:
        messages = []
        for shard, shape, _ in cases:
            p = Parameter(shape, Constant(0))
            with pytest.raises(UsageError) as error:
                place(p, "w", shard, world())
            assert p.layout is None
            messages.append(str(error.value))
        p = Parameter((4, 3), Constant(0))
        place(p, "w", Shard(0), world())
        with pytest.raises(UsageError) as error:
            place(p, "w", Shard(1), world())
        return [*messages, str(error.value), world().ledger.calls()]

    twice = "w is placed twice, as Shard(0) and as Shard(1); place it once"
    expected = [*(message for _, _, message in cases), twice, 0]
    assert launch(run, 4) == [expected] * 4
    for bad in ({"groups": 0}, {"unit": 0}):
        with pytest.raises(UsageError, match="must be at least 1"):
            Shard(0, **bad)


def test_table() -> None:
    def run() -> str:
        layer = Linear(3, 5)
        place(layer.weight, "weight", Shard(0), world())
        unmaterialised = placement_table(layer.named_parameters())
        layer.materialize(0)
        assert placement_table(layer.named_parameters()) == unmaterialised == describe(layer)
        return unmaterialised

    assert launch(run, 2)[0].splitlines() == [
        "parameter  placement    global  local   bytes",
        "weight     Shard(0)     (5, 3)  (3, 3)     36",
        "bias       Replicate()  (5,)    (5,)       20",
        "total                                      56",
    ]


def test_a_distributed_model_prints_what_this_rank_holds() -> None:
    def run() -> tuple[str, int]:
        model = GPT(GPTConfig(97, 8, 12, 1, 4))
        parallelize(model, world(), default_plan(model)).materialize(0, "float64")
        return describe(model), sum(p.data.nbytes for p in model.parameters())

    for rank, (text, held) in enumerate(launch(run, 2)):
        lines = {line.split()[0]: line.split()[1:] for line in text.splitlines()}
        rows = 49 - rank  # of the tied weight, which is listed once
        assert lines["total"] == [f"{held:,}"] and "lm_head" not in text
        assert lines["wte.weight"] == f"Shard(0) (97, 12) ({rows}, 12) {rows * 96:,}".split()
        qkv = " ".join(lines["h.0.attn.c_attn.weight"])
        assert qkv == "Shard(0, groups=3) (36, 12) (18, 12) 1,728"
        assert lines["ln_f.bias"] == ["Replicate()", "(12,)", "(12,)", "96"]
