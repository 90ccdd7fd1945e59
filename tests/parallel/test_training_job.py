"""The training job on ranks: evaluation, clipping and metrics are those of the serial job."""

import functools
from collections import deque
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from minipar import launch, world
from minipar.comm import Communicator
from minipar.config import VERIFY_DEFAULTS, TrainConfig
from minipar.data import Data, load
from minipar.errors import UsageError
from minipar.models.gpt2_weights import to_gpt2
from minipar.parallel.batch_norm import batch_norms
from minipar.parallel.strategies.strategy import Strategy
from minipar.runs import WEIGHTS
from minipar.training import Job, StepRecord
from minipar.verification import Fewer
from minipar.weights import write_weights, written_model


@functools.cache
def data(kind: str) -> Data:
    """Few samples, a number that neither the batch nor the ranks divide."""
    whole = load("docs", seq_len=16) if kind == "gpt" else load("digits")
    return Data(Fewer(whole.train, 23), Fewer(whole.valid, 17), whole.info, whole.vocabulary)


def job(comm: Communicator, kind: str, **changes: object) -> Job:
    settings = {"model": kind, "optimizer": "sgd", "dtype": "float64", "steps": 4, **changes}
    return Job(TrainConfig(**settings).resolved(VERIFY_DEFAULTS), comm, data(kind))  # type: ignore[arg-type]


def run(kind: str, **changes: object) -> tuple[list[StepRecord], dict[str, float]]:
    made = job(world(), kind, **changes)
    return list(made.train()), made.evaluate()


@pytest.mark.parametrize("ranks", (2, 3, 5))
@pytest.mark.parametrize("kind", ("mlp", "gpt"))
def test_sharded_evaluation_and_metrics_are_the_serial_ones(kind: str, ranks: int) -> None:
    data(kind)  # loaded once, before the ranks start
    serial, expected = run(kind)
    assert [record.step for record in serial] == [1, 2, 3, 4]
    for records, validation in launch(run, ranks, kind):
        assert validation == pytest.approx(expected, rel=1e-12)
        for ours, theirs in zip(records, serial, strict=True):
            assert ours.loss == pytest.approx(theirs.loss, rel=1e-12)
            assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-10)
            assert ours.samples_per_s > 0


def test_clipping_limits_the_norm_of_the_whole_gradient() -> None:
    """The norm is taken of the sum, and is the same number on every rank."""

    def program(clip: float) -> tuple[list[float | None], dict[str, np.ndarray]]:
        made = job(world(), "mlp", clip=clip)
        return [record.grad_norm for record in made.train()], made.model.state_dict()

    assert launch(program, 1, 0.05)[0][0] != launch(program, 1, 0.0)[0][0], "the limit is felt"
    alone = launch(program, 1, 0.05)[0]
    together = launch(program, 3, 0.05)
    assert all(norms == together[0][0] for norms, _ in together)
    assert together[0][0] == pytest.approx(alone[0], rel=1e-10)
    for _, state in together:
        assert all(np.allclose(state[name], value, rtol=1e-10) for name, value in alone[1].items())


def test_costs_are_measured_where_the_model_will_run(monkeypatch: pytest.MonkeyPatch) -> None:
    class Moved(np.ndarray):
        pass

    def agreed_costs(model: object, inputs: np.ndarray, comm: Communicator, dtype: str) -> list[float]:
        assert type(inputs) is Moved and inputs.dtype == dtype
        return [1.0] * len(model.blocks)  # type: ignore[attr-defined]

    monkeypatch.setattr("minipar.training.to_device", lambda x, device: np.array(x).view(Moved))
    monkeypatch.setattr("minipar.training.agreed_costs", agreed_costs)
    assert all(launch(lambda: job(world(), "mlp", partition="cost").assignment is not None, 2))


@pytest.mark.parametrize(
    ("ranks", "layout"), [(1, {}), (2, {}), (2, {"zero": 1}), (2, {"partition": "bytes"}), (2, {"partition": "cost"})]
)
def test_batch_norm_is_refused_under_microbatches(ranks: int, layout: dict[str, object]) -> None:
    """In every strategy, whoever cuts the batch: settings are refused before."""

    def program() -> bool:
        made = job(world(), "convnet", norm="batch", **layout)
        (batch,) = made.loader.steps(1)
        first, last = batch.split(2)
        with pytest.raises(UsageError, match=r"batch norm.* use group norm"):
            made.strategy.add_gradients(first, batch.count, last=False)
        made.strategy.add_gradients(last, batch.count, last=True)
        return bool(batch_norms(made.model))

    assert all(launch(program, ranks))


def test_one_rank_trains_the_plain_model() -> None:
    made = job(world(), "mlp")
    assert type(made.strategy) is Strategy
    assert all(p.grad_buffer is None and not p.hooks for p in made.model.parameters())
    assert all(record.grad_norm is not None for record in made.train())


def test_the_data_of_a_step_does_not_depend_on_the_number_of_ranks() -> None:
    def program() -> list[np.ndarray]:
        made = job(world(), "mlp")
        return [batch.indices for batch in made.loader.steps(5)]

    alone = launch(program, 1)[0]
    for pieces, whole in zip(zip(*launch(program, 3)), alone, strict=True):
        assert np.array_equal(np.concatenate(pieces), whole)
    assert sorted(np.concatenate(alone[:3])) == list(range(23)), "an epoch, its last batch of three included"


LAYOUTS = (
    ("gpt", {"zero": 3}),
    ("gpt", {"zero": 2, "tp": 2}),
    ("gpt", {"zero": 1, "pp": 2}),
    ("gpt", {"pp": 2, "tp": 2, "tied": False}),
    ("mlp", {"partition": "cost", "layers": 4}),
    ("mlp", {"partition": "bytes"}),
    ("convnet", {"zero": 3, "norm": "batch"}),
)


@pytest.mark.parametrize(("kind", "layout"), LAYOUTS)
def test_weights_are_written_tensor_by_tensor_as_the_serial_model_writes_them(
    kind: str, layout: dict[str, object], tmp_path: Path
) -> None:
    plain = job(world(), kind, **{k: v for k, v in layout.items() if k in ("tied", "norm", "layers")})
    state = plain.model.state_dict()
    expected = to_gpt2(state) if kind == "gpt" else state

    def program() -> None:
        made = job(world(), kind, **layout)
        if world().rank:
            deque(made.strategy.tensors(), maxlen=0)
            return
        write_weights(made.model, "float64", made.strategy.tensors(), tmp_path / WEIGHTS)
        mapped = written_model(made, tmp_path / WEIGHTS)
        for name, value in mapped.state_dict().items():
            assert np.array_equal(value, state[name]), name

    launch(program, 4)
    found = load_file(tmp_path / WEIGHTS)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and np.array_equal(found[name], value), name
    assert [path.name for path in tmp_path.iterdir()] == [WEIGHTS]


def test_options_of_buckets_are_refused_where_there_are_none() -> None:
    for layout, reason in (
        ({"zero": 1}, "of which ZeRO 1 has none"),
        ({"partition": "bytes"}, "of which a partition policy has none"),
    ):
        for option in ({"bucket_mb": 4.0}, {"overlap": False}, {"overlap": True}):
            with pytest.raises(UsageError, match=f"--{next(iter(option)).replace('_', '-')} is about.*{reason}"):
                launch(lambda settings={**layout, **option}: job(world(), "mlp", **settings), 2)
