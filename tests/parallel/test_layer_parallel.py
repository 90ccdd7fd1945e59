"""Layer parallelism equals serial training for every contiguous assignment, and holds only its own blocks."""

from typing import Any

import numpy as np
import pytest

from minipar import Tensor, launch, nn, optim, random, world
from minipar.errors import UsageError
from minipar.models import MLP, MLPConfig
from minipar.parallel.partition.assignment import Assignment
from minipar.parallel.partition.devices import parse_devices
from minipar.parallel.partition.layer_parallel import LayerParallel
from minipar.parallel.partition.policies import by_bytes, by_cost, by_devices, items_of
from minipar.tape import no_grad
from tests.parallel.partition_runs import (
    MODELS,
    OPTIMIZERS,
    STEPS,
    NormedStep,
    errors,
    scale_of,
    serial_steps,
)
from tests.parallel.training_runs import SEED, batches, loss_sum

TOLERANCE = 1e-10


def assignment_for(kind: str, policy: str, ranks: int) -> Assignment:
    """A contiguous assignment: by number of elements, by costs that rise, or for a slow last device."""
    items = items_of(MODELS[kind](), "float64")
    if policy == "cost":
        return by_cost(items, ranks)
    if policy == "measured":
        return by_cost(items, ranks, [1.0, 2.0, 3.0, 4.0])
    devices = parse_devices(f"{ranks - 1}xA,1xB", {"A": 1.0, "B": 0.25}, ranks=ranks)
    return by_devices(items, devices, [1.0] * 4)


def train(kind: str, assignment: Assignment, optimizer: str, clip: float = 0.0) -> list[NormedStep]:
    """One rank's run: its loss, gradients, weights and the global norm after every step."""
    comm = world()
    parallel = LayerParallel(MODELS[kind](), comm, assignment, seed=SEED, dtype="float64")
    update, steps = OPTIMIZERS[optimizer](parallel.optimizer_params()), []
    for number, (inputs, targets) in enumerate(batches(kind, "float64", STEPS)):
        mine: Any = inputs if parallel.is_first else None, targets if parallel.is_last else None
        with random.at(seed=SEED, step=number, first_sample=0):
            loss = parallel.forward_backward(*mine, targets.size)
        found = {name: p.grad.copy() for name, p in parallel.named_parameters() if p.grad is not None}
        norm = parallel.grad_norm()
        if clip:
            optim.clip_grad_norm_(parallel.optimizer_params(), clip, norm)
        parallel.step(update)
        weights = {name: p.data.copy() for name, p in parallel.named_parameters()}
        steps.append(NormedStep(loss, found, weights, norm))
    return steps


def check(
    kind: str, assignment: Assignment, optimizer: str = "sgd", clip: float = 0.0
) -> list[list[NormedStep]]:
    """Compare every rank's run with the serial one; together they must hold every weight."""
    of_ranks = launch(lambda: train(kind, assignment, optimizer, clip), len(assignment.devices), timeout=30)
    for number, expected in enumerate(serial_steps(kind, optimizer, clip)):
        scale, names = scale_of(expected), set()
        for steps in of_ranks:
            step = steps[number]
            assert abs(step.loss - expected.loss) <= TOLERANCE * abs(expected.loss)
            assert abs(step.norm - expected.norm) <= TOLERANCE * expected.norm
            assert step.gradients.keys() == step.state.keys()
            assert errors(step.gradients, expected.gradients, scale) <= TOLERANCE
            assert errors(step.state, expected.state, scale) <= TOLERANCE
            names |= step.state.keys()
        assert names == expected.gradients.keys()
    return of_ranks


@pytest.mark.parametrize("ranks", (2, 3, 4))
@pytest.mark.parametrize("policy", ("cost", "measured", "devices"))
@pytest.mark.parametrize("kind", list(MODELS))
def test_equals_serial(kind: str, policy: str, ranks: int) -> None:
    check(kind, assignment_for(kind, policy, ranks))


@pytest.mark.parametrize("optimizer", ("momentum", "adamw"))
def test_other_optimizers_and_clipping_equal_serial(optimizer: str) -> None:
    check("gpt-tied", assignment_for("gpt-tied", "cost", 3), optimizer, clip=0.5)


def test_one_rank_is_the_serial_run() -> None:
    check("gpt-tied", by_cost(items_of(MODELS["gpt-tied"](), "float64"), 1))


def test_copies_of_a_tied_weight_stay_bitwise_equal_and_only_the_ends_hold_them() -> None:
    of_ranks = check("gpt-tied", assignment_for("gpt-tied", "devices", 3), "adamw")
    for first, middle, last in zip(*of_ranks):
        assert first.state["wte.weight"].tobytes() == last.state["wte.weight"].tobytes()
        assert first.gradients["wte.weight"].tobytes() == last.gradients["wte.weight"].tobytes()
        assert "wte.weight" not in middle.state


def test_weights_of_other_ranks_are_freed_or_never_filled() -> None:
    assignment = assignment_for("mlp", "cost", 2)

    def held(materialized: bool) -> list[str]:
        model = MODELS["mlp"]()
        if materialized:
            model.materialize(SEED, "float64")
        seed = None if materialized else SEED
        parallel = LayerParallel(model, world(), assignment, seed=seed, dtype="float64")
        assert {id(p) for p in parallel.parameters()} == {id(p) for p in parallel.optimizer_params()}
        return [name for name, p in model.named_parameters() if p.is_materialized]

    expected = [[part.item.name for part in assignment.held(rank)] for rank in range(2)]
    assert launch(lambda: held(True), 2) == launch(lambda: held(False), 2) == expected


def test_ranks_that_start_with_unequal_values_agree_on_tied_weights() -> None:
    assignment = assignment_for("gpt-tied", "cost", 2)

    def table() -> bytes:
        model = MODELS["gpt-tied"]().materialize(world().rank, "float64")
        LayerParallel(model, world(), assignment)
        return model.wte.weight.data.tobytes()  # type: ignore[attr-defined]

    expected = MODELS["gpt-tied"]().materialize(0, "float64").wte.weight.data.tobytes()  # type: ignore[attr-defined]
    assert launch(table, 2) == [expected] * 2


def test_evaluation_output_and_state_are_the_serial_ones() -> None:
    for kind in ("gpt-tied", "convnet"):
        serial = MODELS[kind]().materialize(SEED, "float64").eval()
        inputs, targets = batches(kind, "float64", 1)[0]
        loss = loss_sum(serial, inputs, targets).item()
        output = serial(inputs if kind == "gpt-tied" else Tensor(inputs)).data
        assignment = assignment_for(kind, "cost", 3)

        def program(kind=kind, inputs=inputs, targets=targets, assignment=assignment) -> Any:
            parallel = LayerParallel(MODELS[kind](), world(), assignment, seed=SEED, dtype="float64")
            parallel.model.eval()
            with no_grad():
                y = parallel(inputs if parallel.is_first else None)
            mine = inputs if parallel.is_first else None, targets if parallel.is_last else None
            return y, parallel.evaluate(*mine), parallel.state_dict(root=1)

        outputs, losses, states = zip(*launch(program, 3))
        assert outputs[0] is outputs[1] is None
        np.testing.assert_allclose(outputs[2].data, output, rtol=1e-12)
        assert losses == pytest.approx([loss] * 3, rel=1e-12)
        assert states[0] is states[2] is None and list(states[1]) == list(serial.state_dict())
        assert all((states[1][name] == value).all() for name, value in serial.state_dict().items())


def test_a_step_sends_one_activation_and_one_gradient_over_each_boundary() -> None:
    assignment = assignment_for("mlp", "cost", 3)  # width 7, 7 samples: 49 elements a message

    def traffic() -> tuple[int, int]:
        comm = world()
        parallel = LayerParallel(MODELS["mlp"](), comm, assignment, seed=SEED, dtype="float64")
        inputs, targets = batches("mlp", "float64", 1)[0]
        before = comm.ledger.total("send")
        with random.at(seed=SEED, step=0, first_sample=0):
            parallel.forward_backward(inputs, targets, targets.size)
        after = comm.ledger.total("send")
        return after.calls - before.calls, after.elements - before.elements

    assert launch(traffic, 3) == [(1, 49), (2, 98), (1, 49)]


def test_a_stage_without_weights_takes_part() -> None:
    def program() -> float:
        model = MLP(MLPConfig(inputs=12, classes=5, width=7, layers=2))
        model.blocks = [nn.Flatten(), *model.blocks]  # no weights on rank 0
        assignment = by_cost(items_of(model), 2, [2.0, 1.0, 1.0])
        parallel = LayerParallel(model, world(), assignment, seed=1, dtype="float64")
        update = optim.SGD(parallel.optimizer_params(), lr=0.1)
        inputs, targets = batches("mlp", "float64", 1)[0]
        first = parallel.forward_backward(inputs, targets, targets.size)
        parallel.step(update)
        return first - parallel.forward_backward(inputs, targets, targets.size)

    gains = launch(program, 2)
    assert gains[0] == gains[1] > 0


# Bad input -----------------------------------------------------------------------------------------------


def _refusal(make: Any, ranks: int) -> str:
    """The one message that every rank raises."""

    def program() -> str:
        with pytest.raises(UsageError) as caught:
            make()
        return str(caught.value)

    messages = launch(program, ranks)
    assert len(set(messages)) == 1 and "\n" not in messages[0]
    return messages[0]


def test_refusals_are_the_same_line_on_every_rank() -> None:
    items = items_of(MODELS["mlp"]())

    def make(assignment: Assignment, **options: Any) -> Any:
        return lambda: LayerParallel(MODELS["mlp"](), world(), assignment, **options)

    assert "by bytes scatters parameters" in _refusal(make(by_bytes(items, 2), seed=0), 2)
    assert "is for 2 devices, there are 3 ranks" in _refusal(make(by_cost(items, 2), seed=0), 3)
    assert "layers.0.fc.weight has no values: give" in _refusal(make(by_cost(items, 2)), 2)
    assert "is for another model: " in _refusal(make(by_cost(items_of(MODELS["gpt-tied"]()), 2), seed=0), 2)
    assert "places 5 blocks, the model has 4" in _refusal(make(by_cost(items, 2, [1.0] * 5), seed=0), 2)


def test_an_assignment_that_differs_between_ranks_is_refused() -> None:
    items = items_of(MODELS["mlp"]())

    def make() -> None:
        costs = [[1.0, 1, 1, 1], [9.0, 1, 1, 1]][world().rank]  # as clocks that disagree would measure
        LayerParallel(MODELS["mlp"](), world(), by_cost(items, 2, costs), seed=0)

    assert "differs between ranks" in _refusal(make, 2)


def test_rank_zero_must_be_given_the_inputs() -> None:
    def make() -> None:
        model = MODELS["mlp"]()
        LayerParallel(model, world(), by_cost(items_of(model), 1), seed=0)(None)

    assert "rank 0 runs the first block" in _refusal(make, 1)
