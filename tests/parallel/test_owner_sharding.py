"""Training with owned pieces equals serial training, and an owner keeps state for what it owns alone."""

from typing import Any

import numpy as np
import pytest

from minipar import launch, optim, random, world
from minipar.data import share
from minipar.errors import UsageError
from minipar.parallel.partition.assignment import Assignment
from minipar.parallel.partition.owner_sharding import OwnedPart, ShardedByPolicy
from minipar.parallel.partition.policies import (
    KIND_RULES,
    assign,
    by_bytes,
    by_cost,
    by_count,
    by_kind,
    items_of,
)
from tests.parallel.partition_runs import MODELS, OPTIMIZERS, STEPS, errors, scale_of, serial_steps
from tests.parallel.training_runs import SEED, assert_equal_steps, batches, build, serial

TOLERANCE = 1e-10
POLICIES = ("kind", "bytes", "count")
Record = dict[str, Any]


def train(kind: str, assignment: Assignment, optimizer: str, clip: float = 0.0) -> list[Record]:
    """One rank's run, recorded after every step."""
    comm = world()
    model = MODELS[kind]().materialize(SEED, "float64")
    sharded = ShardedByPolicy(model, comm, assignment)
    update, steps = OPTIMIZERS[optimizer](sharded.optimizer_params()), []
    for number, (inputs, targets) in enumerate(batches(kind, "float64", STEPS)):
        mine = share(len(inputs), comm.rank, comm.size)
        with random.at(seed=SEED, step=number, first_sample=mine.start):
            loss = sharded.forward_backward(inputs[mine], targets[mine], targets.size)
        assert all(p.grad is None for p in model.parameters())  # only owners keep gradients
        owned = [(t.part, t.grad.copy()) for t in sharded.owned if t.grad is not None]
        norm = sharded.grad_norm()
        if clip:
            optim.clip_grad_norm_(sharded.optimizer_params(), clip, norm)
        sharded.step(update)
        arrays = [v for entry in update.state.values() for v in entry.values() if hasattr(v, "nbytes")]
        held = sum(v.nbytes for v in arrays)
        steps.append(dict(loss=loss, norm=norm, owned=owned, state=model.state_dict(), bytes=held))
    return steps


def check(kind: str, assignment: Assignment, optimizer: str = "sgd", clip: float = 0.0) -> list[list[Record]]:
    """Compare losses, norms, every owned gradient and every weight with the serial run's."""
    of_ranks = launch(lambda: train(kind, assignment, optimizer, clip), len(assignment.devices), timeout=30)
    for number, expected in enumerate(serial_steps(kind, optimizer, clip)):
        scale = scale_of(expected)
        compared = 0
        for steps in of_ranks:
            step = steps[number]
            assert abs(step["loss"] - expected.loss) <= TOLERANCE * abs(expected.loss)
            assert abs(step["norm"] - expected.norm) <= TOLERANCE * expected.norm
            assert errors(step["state"], expected.state, scale) <= TOLERANCE
            for part, g in step["owned"]:
                whole = expected.gradients[part.item.name]
                floor = max(float(np.abs(whole).max()), 1e-3 * scale)
                assert float(np.abs(g - part.of(whole)).max()) <= TOLERANCE * floor
                compared += g.size
        assert compared == sum(g.size for g in expected.gradients.values())
    for steps in zip(*of_ranks):
        bits = [{name: value.tobytes() for name, value in step["state"].items()} for step in steps]
        assert all(other == bits[0] for other in bits[1:])
    return of_ranks


@pytest.mark.parametrize("ranks", (2, 3, 4))
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", list(MODELS))
def test_equals_serial(kind: str, policy: str, ranks: int) -> None:
    check(kind, assign(policy, items_of(MODELS[kind](), "float64"), ranks))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_optimizer_state_is_the_assignments_bytes_and_clipping_is_serial(policy: str, optimizer: str) -> None:
    assignment = assign(policy, items_of(MODELS["gpt-tied"](), "float64"), 3)
    moments = {"sgd": 0, "momentum": 1, "adamw": 2}[optimizer]
    for rank, steps in enumerate(check("gpt-tied", assignment, optimizer, clip=0.5)):
        assert steps[-1]["bytes"] == moments * assignment.bytes(rank)


def test_embedding_by_vocabulary_and_stages_work_as_well() -> None:
    items = items_of(MODELS["gpt-tied"](), "float64")
    check("gpt-tied", by_kind(items, 3, {**KIND_RULES, "embedding": 0}))
    check("gpt-tied", by_cost(items, 3))  # a layer's owner is its stage


def test_a_rank_that_owns_nothing_takes_part() -> None:
    assignment = by_bytes(items_of(MODELS["mlp"](), "float64"), 9)  # of 8 parameters
    of_ranks = check("mlp", assignment, "adamw")
    assert of_ranks[8][-1]["bytes"] == 0 and of_ranks[8][-1]["owned"] == []


def test_batch_norm_sees_the_whole_batch() -> None:
    assignment = by_count(items_of(build("convnet-batch-norm")), 3)
    expected = serial("convnet-batch-norm", steps=4)

    def program() -> list[Any]:
        comm, steps = world(), []
        model = build("convnet-batch-norm")
        sharded = ShardedByPolicy(model, comm, assignment)
        update = optim.SGD(sharded.optimizer_params(), lr=0.1, momentum=0.5)
        for (inputs, targets), step in zip(batches("convnet-batch-norm", steps=4), expected):
            mine = share(len(inputs), comm.rank, comm.size)
            loss = sharded.forward_backward(inputs[mine], targets[mine], targets.size)
            sharded.step(update)
            steps.append(type(step)(loss, step.gradients, model.state_dict()))
        return steps

    for steps in launch(program, 3):
        assert_equal_steps(steps, expected, compare_gradients=False)


def test_a_parameter_that_no_rank_uses_is_not_stepped_and_one_that_some_use_is() -> None:
    assignment = by_count(items_of(MODELS["mlp"](), "float64"), 2)

    def program() -> list[bool]:
        model = MODELS["mlp"]().materialize(SEED, "float64")
        sharded = ShardedByPolicy(model, world(), assignment)
        before = model.state_dict()
        update = optim.SGD(sharded.optimizer_params(), lr=0.1, weight_decay=0.5)  # decays whatever is stepped
        named = dict(model.named_parameters())
        if world().rank == 1:
            named["layers.0.fc.bias"].grad = np.ones(7)
        sharded.synchronize()
        sharded.step(update)
        return [name for name, value in model.state_dict().items() if (value != before[name]).any()]

    assert launch(program, 2) == [["layers.0.fc.bias"]] * 2


def test_owners_values_win_at_the_start() -> None:
    items = items_of(MODELS["mlp"](), "float64")
    assignment = by_bytes(items, 2)

    def program() -> dict[str, np.ndarray]:
        model = MODELS["mlp"]().materialize(world().rank, "float64")
        ShardedByPolicy(model, world(), assignment)
        return model.state_dict()

    alone = [MODELS["mlp"]().materialize(rank, "float64").state_dict() for rank in range(2)]
    for state in launch(program, 2):
        for part in assignment.parts:
            name = part.item.name
            assert (state[name] == alone[part.device][name]).all()


def test_a_step_is_one_reduce_scatter_and_one_all_gather() -> None:
    items = items_of(MODELS["mlp"](), "float64")
    elements = sum(item.size for item in items)

    def program() -> tuple[int, ...]:
        comm = world()
        sharded = ShardedByPolicy(MODELS["mlp"]().materialize(SEED, "float64"), comm, by_bytes(items, 3))
        update = optim.SGD(sharded.optimizer_params(), lr=0.1)
        comm.ledger.reset()
        inputs, targets = batches("mlp", "float64", 1)[0]
        with random.at(seed=SEED, step=0):
            sharded.forward_backward(inputs, targets, targets.size)
        sharded.step(update)
        ledger = comm.ledger
        found = [f(op) for op in ("reduce_scatter", "all_gather") for f in (ledger.calls, ledger.elements)]
        return (*found, ledger.calls())

    # One flag per parameter travels with the gradients; the third call is the loss.
    assert launch(program, 3) == [(1, elements + len(items), 1, elements, 3)] * 3


def test_gradients_in_float16_are_summed_in_float32() -> None:
    """40,000 twice is beyond float16's 65,504, the ranks' sum is not."""
    assignment = by_bytes(items_of(MODELS["mlp"](), "float16"), 3)

    def program() -> None:
        model = MODELS["mlp"]().materialize(SEED, "float16")
        sharded = ShardedByPolicy(model, world(), assignment)
        for p in model.parameters():
            p.grad = np.full(p.shape, (40_000, 40_000, -40_000)[world().rank], np.float16)
        sharded.synchronize()
        for t in sharded.owned:
            assert t.grad.dtype == np.float16 and (t.grad == 40_000).all()

    launch(program, 3)


# Bad input -----------------------------------------------------------------------------------------------


def test_refusals_are_the_same_line_on_every_rank() -> None:
    items = items_of(MODELS["mlp"]())

    def refusal(assignment: Assignment, ranks: int, prepare: Any = None) -> str:
        def program() -> str:
            model = MODELS["mlp"]().materialize(0)
            if prepare:
                prepare(model.layers[1].fc.weight)  # type: ignore[attr-defined]
            with pytest.raises(UsageError) as caught:
                ShardedByPolicy(model, world(), assignment)
            return str(caught.value)

        messages = launch(program, ranks)
        assert len(set(messages)) == 1 and "\n" not in messages[0]
        return messages[0]

    def widen(p: Any) -> None:
        p.data = p.data.astype(np.float64)

    def turn(p: Any) -> None:
        p.data = p.data.T

    def forget(p: Any) -> None:
        del p.data

    assert "is for 2 devices, there are 3 ranks" in refusal(by_bytes(items, 2), 3)
    assert "is for another model: " in refusal(by_bytes(items_of(MODELS["convnet"]()), 2), 2)
    assert "layers.1.fc.weight is float64, others float32" in refusal(by_bytes(items, 2), 2, widen)
    assert "layers.1.fc.weight is not contiguous" in refusal(by_bytes(items, 2), 2, turn)
    assert "layers.1.fc.weight (7, 7) has no values yet" in refusal(by_bytes(items, 2), 2, forget)


def test_the_placeholder_of_a_rank_that_owns_nothing_is_empty() -> None:
    items = items_of(MODELS["mlp"]())

    def program() -> int:
        sharded = ShardedByPolicy(MODELS["mlp"]().materialize(0), world(), by_bytes(items, 9))
        params = sharded.optimizer_params()
        assert all(isinstance(t, OwnedPart) for t in params)
        return sum(t.size for t in params)

    assert launch(program, 9)[8] == 0
