"""Tensor parallelism equals serial training in loss, gradients and weights, with the traffic it claims."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minipar import Tensor, launch, ops, random, world
from minipar.comm import Communicator
from minipar.models import GPT, MLP, GPTConfig, MLPConfig
from minipar.nn import Dropout, Linear, Module
from minipar.parallel.placement import is_sharded
from minipar.parallel.tensor_parallel.parallelize import Plan, parallelize
from minipar.parallel.tensor_parallel.plans import default_plan
from minipar.parallel.tensor_parallel.styles import Column, CutDropout, Row
from minipar.tape import no_grad
from tests.comm.mpi_helpers import mpirun
from tests.parallel.tensor_runs import MODELS, SEED, batch, equals_serial, serial, train, whole

CASES: list[tuple[str, int, dict[str, Any]]] = [
    ("gpt-tied", 2, {}),
    ("gpt-untied", 4, {}),
    ("gpt-3-heads", 3, {}),
    ("gpt-tied", 2, {"materialize_first": True, "clip": 0.1}),
    ("gpt-tied", 4, {"recomputed": True}),
    ("gpt-tied", 2, {"pieces": 2, "clip": 0.1}),
    *[(f"mlp-{layers}", ranks, {"clip": 0.1}) for layers in (1, 2, 3, 4) for ranks in (2, 3, 4)],
    ("mlp-4", 5, {"recomputed": True, "pieces": 2}),  # width 3: empty shards
]


@pytest.mark.parametrize(("kind", "ranks", "options"), CASES)
def test_equals_serial(kind: str, ranks: int, options: dict[str, Any]) -> None:
    serial(kind, clip=options.get("clip", 0.0))  # once, before the ranks start
    launch(lambda: equals_serial(world(), kind, **options), ranks, timeout=30)


@pytest.mark.parametrize("kind", ["gpt-tied", "gpt-untied", "mlp-3", "convnet"])
def test_one_rank_is_serial_bitwise(kind: str) -> None:
    _, ours = launch(lambda: train(kind, world(), steps=3), 1)[0]
    for a, b in zip(ours, serial(kind, 3), strict=True):
        assert a.loss == b.loss
        assert all(a.gradients[n].tobytes() == b.gradients[n].tobytes() for n in b.gradients)
        assert all(a.state[n].tobytes() == b.state[n].tobytes() for n in b.state)


@pytest.mark.mpi
def test_on_mpi() -> None:
    ranks = 3
    script = Path(__file__).parent / "mpi_tensor.py"
    root = str(Path(__file__).parents[2])
    job = mpirun(ranks, script, launched=True, MINIPAR_TIMEOUT="20", PYTHONPATH=root)
    assert job.code == 0, job.out + job.err
    assert job.out.count("scenarios hold") == ranks


# --- Traffic ------------------------------------------------------------------------------------------------


def traffic(comm: Communicator) -> dict[str, tuple[int, int]]:
    found = {op: (calls, elements) for (op, _), (calls, elements, _) in comm.ledger.as_dict().items()}
    comm.ledger.reset()
    return found


def test_column_then_row_is_one_all_reduce_each_way() -> None:
    def run() -> tuple[dict, dict]:
        comm, model = world(), MLP(MLPConfig(15, 7, 8, 2))
        parallelize(model, comm, default_plan(model)).materialize(0)
        x = Tensor(np.ones((4, 15), "float32"), requires_grad=True)
        y = model(x)
        forward = traffic(comm)
        y.sum().backward()
        return forward, traffic(comm)

    for ranks in (2, 3):
        assert launch(run, ranks) == [({"all_reduce": (1, 28)}, {"all_reduce": (1, 60)})] * ranks


def test_a_gpt_block_is_two_all_reduces_each_way_and_sequence_parallel_moves_as_much() -> None:
    """4 tokens, width 8: an all-reduce of n is a reduce-scatter and an all-gather of n."""

    def run(sequence_parallel: bool) -> list[dict]:
        comm = world()
        model = GPT(GPTConfig(10, 4, 8, 1, 2))
        parallelize(model, comm, default_plan(model, sequence_parallel=sequence_parallel)).materialize(0)
        h = model.blocks[0](np.zeros((1, 4), int))
        comm.ledger.reset()
        y = model.blocks[1](h)
        found = [traffic(comm)]
        y = model.blocks[1](h.detach().requires_grad_())
        comm.ledger.reset()
        y.sum().backward()
        return [*found, traffic(comm)]

    assert launch(run, 2, False) == [[{"all_reduce": (2, 64)}, {"all_reduce": (2, 64)}]] * 2
    n = (2, 64)
    forward = {"all_gather": n, "reduce_scatter": n}
    backward = {**forward, "all_reduce": (6, 48)}  # norms and row biases see a part of the sequence each
    assert launch(run, 2, True) == [[forward, backward]] * 2


def test_parallelizing_and_initialising_send_nothing() -> None:
    def run() -> int:
        model = MODELS["gpt-tied"]()
        parallelize(model, world(), default_plan(model, sequence_parallel=True)).materialize(0)
        return world().ledger.calls()

    assert launch(run, 2) == [0, 0]


# --- Single styles ------------------------------------------------------------------------------------------


class Pair(Module):
    def __init__(self, inputs: int, hidden: int, outputs: int):
        self.first, self.second = Linear(inputs, hidden), Linear(hidden, outputs)
        self.drop = Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.drop(ops.relu(self.first(x))))


PLANS: dict[str, Plan] = {
    "column, row": {"first": Column(), "drop": CutDropout(7), "second": Row()},
    "gathered, scattered": {"first": Column(gathered=True), "second": Row(scattered=True)},
    "row, column": {"first": Row(scattered=True), "second": Column(gathered=True)},
}


@pytest.mark.parametrize("ranks", [2, 3, 5])
@pytest.mark.parametrize("name", PLANS)
def test_linear_layers_of_7_by_15_weights(name: str, ranks: int) -> None:
    rng = np.random.default_rng(0)
    x, g = rng.standard_normal((4, 15)), rng.standard_normal((4, 3))

    def run(plan: Plan | None) -> dict[str, np.ndarray]:
        model = Pair(15, 7, 3)  # more ranks than outputs
        if plan is not None:
            parallelize(model, world(), plan)
        model.materialize(SEED, "float64")
        leaf = Tensor(x, requires_grad=True)
        with random.at(seed=1, step=2):
            y = model(leaf)
        y.backward(g)
        return {"y": y.data, "x": leaf.grad, **{n: whole(p, p.grad) for n, p in model.named_parameters()}}

    expected = run(None)
    for found in launch(run, ranks, PLANS[name]):
        for key, value in expected.items():
            np.testing.assert_allclose(found[key], value, rtol=1e-12, atol=1e-13, err_msg=key)


def test_a_row_bias_is_added_once() -> None:
    def run() -> np.ndarray:
        layer = Pair(4, 4, 3)
        parallelize(layer, world(), {"second": Row(scattered=True)}).materialize(0, "float64")
        layer.second.weight.assign_(0.0)
        layer.second.bias.assign_(np.array([1.0, 2.0, 3.0]))
        return layer.eval()(Tensor(np.ones((1, 4)))).data

    assert [y.tolist() for y in launch(run, 3)] == [[[1.0, 2.0, 3.0]]] * 3


@pytest.mark.parametrize("kind", ["gpt-tied", "gpt-untied", "mlp-3", "convnet"])
def test_initialisation_is_the_serial_one_sliced(kind: str) -> None:
    expected = MODELS[kind]().materialize(SEED, "float64")

    def run() -> int:
        model = MODELS[kind]()
        parallelize(model, world(), default_plan(model)).materialize(SEED, "float64")
        cut = 0
        for (name, p), q in zip(model.named_parameters(), expected.parameters(), strict=True):
            part = p.layout.local(q.data) if p.layout is not None else q.data
            assert p.data.tobytes() == part.tobytes(), name
            cut += p.size < q.size
        return cut

    assert min(launch(run, 2)) >= 3


def test_gpt_holds_no_more_than_its_part() -> None:
    """Everything that grows with width² or the vocabulary is cut by 4; biases, norms, positions are not."""

    def run() -> tuple[int, int]:
        model = MODELS["gpt-untied"]()
        parallelize(model, world(), default_plan(model)).materialize(0)
        held = sum(p.size for p in model.parameters() if is_sharded(p))
        return held, sum(int(np.prod(p.global_shape)) for p in model.parameters() if is_sharded(p))

    for held, total in launch(run, 4):
        assert abs(held - total / 4) <= 2 * 60 and total > 90_000


# --- Dropout, evaluation ------------------------------------------------------------------------------------


def test_dropout_masks_are_the_serial_one_s_parts() -> None:
    """Recorded inside a GPT: attention probabilities are cut by heads; the rest only with the sequence."""
    x, _ = batch("gpt-tied", 0)

    def run(parallel: bool, sequence: bool = False) -> dict[str, np.ndarray]:
        model, seen = MODELS["gpt-tied"](), {}
        if parallel:
            parallelize(model, world(), default_plan(model, sequence_parallel=sequence))
        model.materialize(SEED, "float64")
        for name, module in model.named_modules():
            if isinstance(module, Dropout):

                def record(x: Tensor, name: str = name, forward: Any = module.forward) -> Tensor:
                    seen[name] = forward(Tensor(np.ones_like(x.data))).data != 0
                    return forward(x)

                module.forward = record  # type: ignore[method-assign]
        for _ in range(2):  # replayed: nothing depends on what was drawn before
            with random.at(seed=SEED, step=5, first_sample=2):
                model(x)
        return seen

    expected = run(False)
    assert 0.05 < 1 - np.mean([m.mean() for m in expected.values()]) < 0.15
    for ranks in (2, 4):
        for sequence in (False, True):
            of_ranks = launch(run, ranks, True, sequence)
            for name, mask in expected.items():
                parts = [seen[name] for seen in of_ranks]
                if "attn_drop" in name or sequence:  # the first one is recorded after its output is cut
                    assert np.concatenate(parts, axis=1).tobytes() == mask.tobytes(), name
                else:
                    assert all(p.tobytes() == mask.tobytes() for p in parts), name


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_evaluation_without_gradients(sequence_parallel: bool) -> None:
    expected = MODELS["gpt-tied"]().materialize(SEED, "float64").eval()
    x, targets = batch("gpt-tied", 0)

    def run() -> tuple[float, np.ndarray]:
        model = MODELS["gpt-tied"]()
        parallelize(model, world(), default_plan(model, sequence_parallel=sequence_parallel))
        model.materialize(SEED, "float64").eval()
        with no_grad():
            logits = model(x)
            loss = model.loss(logits, targets)
        assert not loss.requires_grad
        return loss.item(), logits.data

    results = launch(run, 4)
    serial_logits = expected(x)
    assert abs(results[0][0] - expected.loss(serial_logits, targets).item()) < 1e-10
    assert len({loss for loss, _ in results}) == 1
    together = np.concatenate([logits for _, logits in results], axis=-1)
    np.testing.assert_allclose(together, serial_logits.data, rtol=1e-10, atol=1e-12)
