"""Tensor parallelism equals serial training in loss, gradients and weights, with the traffic it claims."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minipar import Tensor, launch, ops, optim, random, world
from minipar.comm import Communicator
from minipar.errors import UsageError
from minipar.models import GPT, MLP, ConvNet, ConvNetConfig, GPTConfig, MLPConfig
from minipar.nn import Dropout, Linear, Module
from minipar.parallel.conv_parallel import OutputChannels
from minipar.parallel.norms import global_norm
from minipar.parallel.placement import is_sharded
from minipar.parallel.plans import default_plan
from minipar.parallel.tensor_parallel import (
    Column,
    CutDropout,
    Plan,
    Row,
    VocabularyEmbedding,
    VocabularyLoss,
    parallelize,
)
from minipar.tape import no_grad
from tests.comm.mpi_helpers import mpirun
from tests.parallel.tensor_runs import MODELS, SEED, batch, equals_serial, loss_of, serial, train, whole

CASES: list[tuple[str, int, dict[str, Any]]] = [
    ("gpt-tied", 2, {}),
    ("gpt-tied", 4, {}),
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
@pytest.mark.parametrize("ranks", [2, 3])
def test_on_mpi(ranks: int) -> None:
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


# --- The gradient norm --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gpt-tied", "gpt-untied", "mlp-3", "convnet"])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_norm_counts_each_element_once(kind: str, ranks: int) -> None:
    kind = "gpt-3-heads" if kind.startswith("gpt") and ranks == 3 else kind
    model = MODELS[kind]().materialize(SEED, "float64")
    x, targets = batch(kind, 0)
    loss_of(model, x, targets).backward()
    expected = np.sqrt(sum((p.grad**2).sum() for p in model.parameters()))

    def run() -> tuple[float, int]:
        model = MODELS[kind]()
        parallelize(model, world(), default_plan(model)).materialize(SEED, "float64")
        loss_of(model, x, targets).backward()
        world().ledger.reset()
        norm = global_norm([(p, p) for p in model.parameters()], shard_comm=None, tp=world())
        return norm, traffic(world())

    results = launch(run, ranks)
    assert len({norm for norm, _ in results}) == 1
    assert abs(results[0][0] - expected) <= 1e-12 * expected
    assert all(found == {"all_reduce": (1, 1)} for _, found in results)


def test_norm_of_shards_and_of_missing_gradients() -> None:
    """ZeRO's flat shards over 2 ranks, each of a parameter cut over 2 others; squares add in float64."""
    serial_gradient = np.full(10, 1e-3, "float32")
    serial_gradient[0] = 1e4

    def run() -> float:
        comm = world()
        shards, tp = comm.split(comm.rank // 2), comm.split(comm.rank % 2)
        layer = Linear(5, 2)
        parallelize(layer, tp, {"": Column()}).materialize(0)  # weight (1, 5) a rank, bias (1,)
        local = serial_gradient[5 * tp.rank : 5 * tp.rank + 5]
        shard = Tensor(np.zeros(0, "float32"))
        shard.grad = np.array_split(local, 2)[shards.rank]
        return global_norm([(layer.weight, shard), (layer.bias, layer.bias)], shard_comm=shards, tp=tp)

    results = launch(run, 4)
    assert len(set(results)) == 1
    wide = serial_gradient.astype("float64")
    assert abs(results[0] - np.sqrt(wide @ wide)) < 1e-9 * results[0]
    assert global_norm([(Linear(2, 2).weight, Tensor(np.ones(2)))], shard_comm=None, tp=None) == 0.0


def test_norm_of_an_overflow_is_seen_by_all() -> None:
    def run() -> None:
        p = Linear(2, 2).materialize(0).weight
        p.grad = np.full((2, 2), np.inf if world().rank == 1 else 1.0, "float32")
        norm = global_norm([(p, p)], shard_comm=world(), tp=None)
        with pytest.raises(FloatingPointError):
            optim.clip_grad_norm_([p], 1.0, norm)

    launch(run, 3)


# --- Bad input ----------------------------------------------------------------------------------------------


def refusal(make: Any, plan: Any) -> list[tuple[str, int]]:
    def run() -> tuple[str, int]:
        model = make()
        with pytest.raises(UsageError) as error:
            parallelize(model, world(), plan(model))
        return str(error.value), world().ledger.calls()

    return launch(run, 3)


def tiny_gpt() -> GPT:
    return GPT(GPTConfig(11, 4, 8, 2, 4))


def tiny_mlp() -> MLP:
    return MLP(MLPConfig(4, 3, 6, 2))


def tiny_convnet() -> ConvNet:
    return ConvNet(ConvNetConfig(1, 4, 3, 4, 1, norm="batch"))


@pytest.mark.parametrize(
    ("make", "plan", "message"),
    [
        (
            tiny_gpt,
            default_plan,
            "h.0.attn.c_attn.weight: 3 ranks do not divide 4 heads; 1, 2, 4 ranks would",
        ),
        (
            tiny_mlp,
            lambda m: {"layer.*.fc": Column()},
            "plan: 'layer.*.fc' matches no module; the model has layers, layers.0, layers.0.fc,",
        ),
        (
            tiny_mlp,
            lambda m: {"layers.*.fc": Column(), "layers.1.*": Row()},
            "plan: both 'layers.*.fc' and 'layers.1.*' match layers.1.fc; a module is cut once",
        ),
        (
            tiny_mlp,
            lambda m: {"layers.0.fc": (Column(), Row())},
            "layers.0.fc.weight is placed twice, as Shard(0) and as Shard(1); place it once",
        ),
        (
            tiny_gpt,
            lambda m: {"wte": Column()},
            "plan: 'wte' puts Column on wte, a Embedding; it is for Linear",
        ),
        (
            tiny_mlp,
            lambda m: {"layers.0.fc": VocabularyEmbedding()},
            "plan: 'layers.0.fc' puts VocabularyEmbedding on layers.0.fc, a Linear; it is for Embedding",
        ),
        (
            tiny_mlp,
            lambda m: {"layers.0.fc": OutputChannels()},
            "plan: 'layers.0.fc' puts OutputChannels on layers.0.fc, a Linear; it is for Conv2d",
        ),
        (
            tiny_mlp,
            lambda m: default_plan(m, sequence_parallel=True),
            "sequence parallelism cuts a sequence; MLP has none",
        ),
        (
            tiny_convnet,
            lambda m: default_plan(m, convolution="channels"),
            "convolution cut 'channels' is unknown: use one of output, input, region",
        ),
        (
            tiny_convnet,
            lambda m: default_plan(m, convolution="region"),
            "convolution cut region: batch norm is not offered over regions; use --norm group",
        ),
        (lambda: Linear(2, 2), default_plan, "Linear has no default plan; pass one to parallelize"),
    ],
)
def test_refusals(make: Any, plan: Any, message: str) -> None:
    found = refusal(make, plan)
    assert found[0][0].startswith(message)
    assert found == [(found[0][0], 0)] * 3


def test_a_model_is_cut_once() -> None:
    def run() -> str:
        model = tiny_mlp()
        plan = {"layers.0.fc": Column(), "layers.1.fc": Row()}
        parallelize(model, world(), plan)
        with pytest.raises(UsageError) as error:
            parallelize(model, world(), plan)
        return str(error.value)

    message = "layers.0.fc.weight is placed twice, as Shard(0) and as Shard(0); place it once"
    assert launch(run, 2) == [message] * 2


def test_a_mean_over_a_cut_vocabulary_is_refused() -> None:
    def make() -> GPT:
        model = tiny_gpt()
        model.loss.reduction = "mean"
        return model

    found = refusal(make, lambda m: {"loss": VocabularyLoss(11)})
    assert found == [("loss: reduction 'mean' is not offered over a cut vocabulary; use sum", 0)] * 3
