"""The vocabulary over ranks: embedding, logits and cross-entropy equal the serial operations."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minipar import Tensor, launch, ops, world
from minipar.comm.interface import balanced
from minipar.errors import UsageError
from minipar.nn import CrossEntropyLoss, Embedding, Module
from minipar.parallel.tensor_parallel import vocabulary
from minipar.parallel.tensor_parallel.parallelize import parallelize
from minipar.parallel.tensor_parallel.styles import VocabularyEmbedding, VocabularyLoss, WidthEmbedding

few = settings(max_examples=40, deadline=None, derandomize=True)


class Table(Module):
    def __init__(self, rows: int, width: int):
        self.table = Embedding(rows, width)

    def forward(self, ids: Any) -> Tensor:
        return self.table(ids)


STYLES = {"vocabulary": VocabularyEmbedding(), "width": WidthEmbedding()}


def embedded(style: str | None, rows: int, width: int, ids: np.ndarray, g: np.ndarray) -> tuple[Any, ...]:
    model = Table(rows, width)
    if style is not None:
        parallelize(model, world(), {"table": STYLES[style]})
    weight = model.materialize(3, "float64").table.weight
    y = model(ids)
    y.backward(g)
    layout = weight.layout
    return y.data, weight.grad if layout is None else layout.whole(weight.grad, (rows, width))


@pytest.mark.parametrize("ranks", [2, 3, 4, 5])
@pytest.mark.parametrize("style", STYLES)
def test_embedding_with_ids_on_the_boundaries(style: str, ranks: int) -> None:
    """97 rows and width 3: uneven, and for the width more ranks than columns."""
    counts = balanced(97, ranks)
    firsts = np.cumsum([0, *counts])[:-1]
    ids = np.concatenate([[0, 0, 96, 50], firsts, firsts[1:] - 1]).reshape(-1, 1)  # some twice
    g = np.random.default_rng(0).standard_normal((*ids.shape, 3))
    y, dw = embedded(None, 97, 3, ids, g)
    for found_y, found_dw in launch(embedded, ranks, style, 97, 3, ids, g):
        assert found_y.tobytes() == y.tobytes()  # the sum of one row and zeros is exact
        np.testing.assert_allclose(found_dw, dw, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("style", STYLES)
def test_more_ranks_than_rows_and_no_ids(style: str) -> None:
    for ids in (np.array([1, 0, 1]), np.zeros((2, 0), int)):
        g = np.ones((*ids.shape, 2))
        y, dw = embedded(None, 2, 2, ids, g)
        for found_y, found_dw in launch(embedded, 4, style, 2, 2, ids, g):
            np.testing.assert_array_equal(found_y, y)
            np.testing.assert_array_equal(found_dw, dw)


@pytest.mark.parametrize("ids", [[[0, 11]], [[-1, 3]]])
@pytest.mark.parametrize("style", STYLES)
def test_ids_outside_are_refused_on_every_rank(style: str, ids: list) -> None:
    def run() -> tuple[bool, int]:
        model = Table(11, 4)
        parallelize(model, world(), {"table": STYLES[style]}).materialize(0)
        with pytest.raises(ValueError, match="ids"):
            model(np.array(ids))
        return True, world().ledger.calls()

    assert launch(run, 3) == [(True, 0)] * 3


def loss_and_gradient(
    logits: np.ndarray, targets: np.ndarray, options: dict[str, Any], weight: float = 1.0
) -> tuple[float, np.ndarray, list[int]]:
    comm, v = world(), logits.shape[-1]
    start = vocabulary.first_row(v, comm)
    mine = logits[..., start : start + balanced(v, comm.size)[comm.rank]]
    leaf = Tensor(mine.copy(), requires_grad=True)
    loss = vocabulary.cross_entropy(leaf, targets, comm, v, start, **options)
    calls = [comm.ledger.calls()]
    (loss * weight).backward()
    return loss.item(), leaf.grad, [*calls, comm.ledger.calls()]


@few
@given(
    ranks=st.integers(1, 5),
    rows=st.integers(0, 6),
    words=st.integers(1, 12),
    smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    scale=st.sampled_from([1.0, 1e4]),
    seed=st.integers(0, 99),
)
def test_cross_entropy_is_the_serial_one(
    ranks: int, rows: int, words: int, smoothing: float, scale: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.uniform(-scale, scale, (rows, 2, words))
    targets = rng.integers(0, words, (rows, 2))
    targets[rng.random(targets.shape) < 0.3] = -1
    options = {"ignore_index": -1, "label_smoothing": smoothing}
    leaf = Tensor(logits, requires_grad=True)
    expected = ops.cross_entropy(leaf, targets, reduction="sum", **options)
    (expected * 0.25).backward()
    results = launch(loss_and_gradient, ranks, logits, targets, options, 0.25)
    assert len({loss for loss, _, _ in results}) == 1
    assert abs(results[0][0] - expected.item()) <= 1e-13 * max(abs(expected.item()), 1e-3)
    gradient = np.concatenate([g for _, g, _ in results], axis=-1)
    np.testing.assert_allclose(gradient, leaf.grad, rtol=0, atol=1e-14)


def test_cross_entropy_is_two_collectives_forward_and_none_backward() -> None:
    rng = np.random.default_rng(0)
    logits, targets = rng.standard_normal((4, 7)), rng.integers(0, 7, 4)

    def run(smoothing: float) -> dict:
        loss_and_gradient(logits, targets, {"label_smoothing": smoothing})
        return world().ledger.as_dict()

    # 4 maxima, then for each row Z and the target's logit, with smoothing the sum too.
    assert launch(run, 3, 0.0) == [{("all_reduce", "world"): (2, 12, 96)}] * 3
    assert launch(run, 3, 0.1) == [{("all_reduce", "world"): (2, 16, 128)}] * 3


def test_logits_of_ten_thousand_are_exact() -> None:
    """By hand: a target as large as the largest logit costs log 2, one 20,000 below it costs 20,000."""
    logits = np.array([[1e4, -1e4, 1e4, 0.0]] * 2)
    results = launch(loss_and_gradient, 4, logits, np.array([2, 1]), {})
    assert [loss for loss, _, _ in results] == [np.log(2) + (2e4 + np.log(2))] * 4
    whole = np.concatenate([g for _, g, _ in results], axis=1)
    np.testing.assert_array_equal(whole, [[0.5, 0, -0.5, 0], [0.5, -1, 0.5, 0]])


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_cross_entropy_keeps_its_dtype(dtype: str) -> None:
    rng = np.random.default_rng(1)
    logits, targets = rng.uniform(-9, 9, (3, 50)).astype(dtype), rng.integers(0, 50, 3)
    leaf = Tensor(logits, requires_grad=True)
    expected = ops.cross_entropy(leaf, targets, label_smoothing=0.1, reduction="sum")
    expected.backward()
    results = launch(loss_and_gradient, 3, logits, targets, {"label_smoothing": 0.1})
    tolerance = 1e-6 if dtype == "float32" else 2e-3
    for loss, g, _ in results:
        assert g.dtype == dtype and abs(loss - expected.item()) <= tolerance * expected.item()
    np.testing.assert_allclose(np.concatenate([g for _, g, _ in results], axis=1), leaf.grad, atol=tolerance)


@pytest.mark.parity
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_cross_entropy_is_torch_s(smoothing: float) -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(2)
    logits, targets = rng.uniform(-1e4, 1e4, (6, 97)), rng.integers(0, 97, 6)
    targets[2] = -100
    z = torch.tensor(logits, requires_grad=True)
    expected = torch.nn.functional.cross_entropy(
        z, torch.tensor(targets), label_smoothing=smoothing, reduction="sum"
    )
    expected.backward()
    results = launch(loss_and_gradient, 3, logits, targets, {"label_smoothing": smoothing})
    assert abs(results[0][0] - expected.item()) <= 1e-13 * abs(expected.item())
    gradient = np.concatenate([g for _, g, _ in results], axis=1)
    np.testing.assert_allclose(gradient, z.grad.numpy(), rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("shape", "targets", "options", "message"),
    [
        ((2, 7), [0, 7], {}, "cross_entropy: targets from 0 to 7, expected 0 to 6"),
        ((2, 7), [-1, 3], {}, "cross_entropy: targets from -1 to 3, expected 0 to 6"),
        ((2, 7), [1, 2, 3], {}, r"cross_entropy: logits \(2, .\) need targets \(2,\), got \(3,\)"),
        ((2, 7), [1, 2], {"label_smoothing": 1.5}, r"label_smoothing 1.5 must lie in \[0, 1\]"),
    ],
)
def test_refusals(shape: tuple, targets: list, options: dict, message: str) -> None:
    def run() -> int:
        with pytest.raises(UsageError, match=message):
            loss_and_gradient(np.zeros(shape), np.array(targets), options)
        return world().ledger.calls()

    assert launch(run, 3) == [0] * 3


def test_the_loss_module_keeps_its_settings() -> None:
    rng = np.random.default_rng(3)
    logits, targets = rng.standard_normal((5, 10)), rng.integers(0, 10, 5)
    targets[0] = 4
    loss = CrossEntropyLoss(ignore_index=4, label_smoothing=0.1, reduction="sum")
    expected = loss(Tensor(logits), targets).item()

    def run() -> float:
        cut = CrossEntropyLoss(ignore_index=4, label_smoothing=0.1, reduction="sum")
        parallelize(cut, world(), {"": VocabularyLoss(10)})
        start = vocabulary.first_row(10, world())
        mine = logits[:, start : start + balanced(10, 3)[world().rank]]
        return cut(Tensor(mine), Tensor(targets)).item()

    assert all(abs(found - expected) < 1e-13 for found in launch(run, 3))
