"""Fused primitives of networks: norms, softmax, losses, attention, convolution, pooling, dropout."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from minipar import ops, random
from minipar.tensor import Tensor
from tests.op_cases import listed, nn
from tests.op_checks import check_dtypes, check_gradient

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("name, case", listed(nn.CASES))
def test_gradient(name, case):
    check_gradient(case)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("name, case", listed(nn.CASES))
def test_dtype(name, case, dtype):
    check_dtypes(case, dtype)


def test_softmax_is_exact_for_extreme_rows():
    x = Tensor(np.array([[1e4, 0.0, -1e4], [-np.inf, 0.0, 0.0], [-np.inf] * 3]), requires_grad=True)
    with np.errstate(over="raise", invalid="raise"):
        y = ops.softmax(x)
        y.sum().backward()
    np.testing.assert_array_equal(y.data, [[1, 0, 0], [0, 0.5, 0.5], [0, 0, 0]])
    assert np.isfinite(x.grad).all()


def test_cross_entropy_of_extreme_logits():
    x = Tensor(np.array([[1e4, -1e4], [1e4, -1e4]]), requires_grad=True)
    losses = ops.cross_entropy(x, np.array([0, 1]), reduction="none")
    losses.sum().backward()
    np.testing.assert_allclose(losses.data, [0, 2e4])
    np.testing.assert_allclose(x.grad, [[0, 0], [1, -1]])


def test_ignored_targets_count_nothing():
    x = RNG.standard_normal((6, 4))
    targets = np.array([1, -100, 2, -100, 0, 3])
    whole, kept = Tensor(x, requires_grad=True), Tensor(x[targets >= 0], requires_grad=True)
    a, b = ops.cross_entropy(whole, targets), ops.cross_entropy(kept, targets[targets >= 0])
    a.backward(), b.backward()
    assert a.item() == pytest.approx(b.item(), rel=1e-15)
    np.testing.assert_allclose(whole.grad[targets >= 0], kept.grad, rtol=1e-14)
    assert not whole.grad[targets < 0].any()


def test_fully_masked_queries_give_zeros():
    q, k, v = (Tensor(RNG.standard_normal((1, 2, 3, 4)), requires_grad=True) for _ in range(3))
    mask = np.array([[True, True, False], [False] * 3, [True] * 3])
    y = ops.scaled_dot_product_attention(q, k, v, mask)
    assert not y.data[:, :, 1].any() and y.data[:, :, 0].any()
    y.sum().backward()
    assert np.isfinite(q.grad).all() and not q.grad[:, :, 1].any()


def test_self_attention_equals_the_steps_it_fuses():
    qkv = Tensor(RNG.standard_normal((2, 5, 24)), requires_grad=True)
    g = RNG.standard_normal((2, 5, 8))
    y = ops.self_attention(qkv, 4)
    y.backward(g)
    fused, qkv.grad = qkv.grad, None
    q, k, v = (p.reshape(2, 5, 2, 4).swapaxes(1, 2) for p in qkv.split(8, axis=2))
    steps = ops.scaled_dot_product_attention(q, k, v, causal=True).swapaxes(1, 2).reshape(2, 5, 8)
    steps.backward(g)
    np.testing.assert_allclose(y.data, steps.data, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(fused, qkv.grad, rtol=1e-12, atol=1e-14)


def test_causal_attention_sees_no_future():
    x = RNG.standard_normal((1, 6, 12))
    changed = x.copy()
    changed[:, 4:] += 1
    a, b = ops.self_attention(Tensor(x), 2), ops.self_attention(Tensor(changed), 2)
    np.testing.assert_array_equal(a.data[:, :4], b.data[:, :4])
    assert (a.data[:, 4:] != b.data[:, 4:]).any()


def test_batch_norm_over_two_ranks_is_the_whole_batch_s():
    x, g = RNG.standard_normal((6, 3, 2)), RNG.standard_normal((6, 3, 2))
    w, b = RNG.standard_normal(3), RNG.standard_normal(3)
    whole = [Tensor(a, requires_grad=True) for a in (x, w, b)]
    y, mean, variance = ops.batch_norm(*whole)
    y.backward(g)
    np.testing.assert_allclose(mean.data, x.mean(axis=(0, 2)))
    np.testing.assert_allclose(variance.data, x.var(axis=(0, 2), ddof=1))

    meeting, boxes = threading.Barrier(2), [x, x]

    def rank(i, part):
        def reduce(local):
            boxes[i] = local
            meeting.wait(10)
            total = boxes[0] + boxes[1]
            meeting.wait(10)
            return total

        mine = [Tensor(a, requires_grad=True) for a in (x[part], w, b)]
        out = ops.batch_norm(*mine, reduce=reduce)[0]
        out.backward(g[part])
        return out.data, [t.grad for t in mine]

    with ThreadPoolExecutor(2) as pool:
        ranks = list(pool.map(rank, (0, 1), (slice(0, 4), slice(4, 6))))
    np.testing.assert_allclose(np.concatenate([r[0] for r in ranks]), y.data, rtol=1e-12)
    np.testing.assert_allclose(
        np.concatenate([r[1][0] for r in ranks]), whole[0].grad, rtol=1e-10, atol=1e-13
    )
    for i in (1, 2):  # weight and bias: each rank has its share, and gradients are summed over ranks
        np.testing.assert_allclose(ranks[0][1][i] + ranks[1][1][i], whole[i].grad, rtol=1e-12)


def test_batch_norm_of_float16_does_not_overflow():
    x = Tensor(
        np.full((64, 2, 8, 8), 100, np.float16) + RNG.standard_normal((64, 2, 8, 8)).astype(np.float16)
    )
    y, mean, variance = ops.batch_norm(x)
    assert np.isfinite(y.data).all() and np.allclose(mean.data, 100, atol=0.2) and (variance.data > 0.5).all()


def test_dropout_is_a_function_of_the_global_index():
    key, x = random.stream(1, 2, "drop"), np.ones((8, 50))
    whole = ops.dropout(Tensor(x), 0.25, key).data
    halves = [ops.dropout(Tensor(x[i : i + 4]), 0.25, key, i * 50).data for i in (0, 4)]
    np.testing.assert_array_equal(np.concatenate(halves), whole)
    assert set(np.unique(whole)) == {0, 4 / 3}
    assert (ops.dropout(Tensor(x), 0.25, random.stream(1, 3, "drop")).data != whole).any()
    many = ops.dropout(Tensor(np.ones(100_000)), 0.25, key).data
    assert abs((many == 0).mean() - 0.25) < 0.01
    transposed = ops.dropout(Tensor(np.ones((50, 8)).T), 0.25, key).data
    np.testing.assert_array_equal(transposed, whole)


def test_max_pool_sends_the_gradient_of_equals_to_the_first():
    x = Tensor(np.ones((1, 1, 2, 2)), requires_grad=True)
    ops.max_pool2d(x, 2).sum().backward()
    assert x.grad.tolist() == [[[[1, 0], [0, 0]]]]


IMAGE = Tensor(np.ones((2, 4, 5, 5)))
ROWS = Tensor(np.ones((5, 6)))
ONE = Tensor(np.ones(1))


@pytest.mark.parametrize(
    "wrong, message",
    [
        (
            lambda: ops.layer_norm(ROWS, ONE, ONE),
            r"^layer_norm: weight must be \(6,\), one per channel, got \(1,\)",
        ),
        (lambda: ops.layer_norm(ROWS, bias=ONE), r"^layer_norm: bias must be \(6,\)"),
        (lambda: ops.rms_norm(ROWS, ONE), r"^rms_norm: weight must be \(6,\)"),
        (lambda: ops.group_norm(IMAGE, 3), "^group_norm: 3 groups do not divide 4 channels"),
        (lambda: ops.group_norm(IMAGE, 2, ONE), r"^group_norm: weight must be \(4,\)"),
        (lambda: ops.batch_norm(IMAGE, ONE), r"^batch_norm: weight must be \(4,\)"),
        (lambda: ops.batch_norm(Tensor(np.ones((1, 4)))), "^batch_norm: 1 value per channel has no variance"),
        (
            lambda: ops.normalise_channels(IMAGE, np.ones(1), np.ones(4)),
            r"^normalise_channels: mean must be \(4,\)",
        ),
        (lambda: ops.softmax(ROWS, 2), "^softmax: .*axis 2"),
        (
            lambda: ops.cross_entropy(ROWS, np.zeros((4,), int)),
            r"^cross_entropy: logits \(5, 6\) need targets \(5,\), got \(4,\)",
        ),
        (lambda: ops.cross_entropy(ROWS, np.full(5, 6)), r"^cross_entropy: .*6.*0\.\.5"),
        (lambda: ops.cross_entropy(ROWS, np.full(5, -1)), "^cross_entropy: .*-1"),
        (lambda: ops.cross_entropy(ROWS, np.full(5, -100)), "^cross_entropy: none of 5 targets is valid"),
        (lambda: ops.cross_entropy(ROWS, np.zeros(5)), "^cross_entropy: .*integers"),
        (
            lambda: ops.cross_entropy(ROWS, np.zeros(5, int), reduction="avg"),
            "^cross_entropy: reduction 'avg' is unknown",
        ),
        (
            lambda: ops.cross_entropy(ROWS, np.zeros(5, int), label_smoothing=2),
            "^cross_entropy: label_smoothing 2",
        ),
        (lambda: ops.mse_loss(ROWS, Tensor(np.ones(6))), r"^mse_loss: prediction \(5, 6\) and target \(6,\)"),
        (lambda: ops.mse_loss(ROWS, ROWS, "avg"), "^mse_loss: reduction 'avg'"),
        (
            lambda: ops.self_attention(Tensor(np.ones((2, 3, 10))), 2),
            r"^self_attention: .*6 divides, got \(2, 3, 10\)",
        ),
        (
            lambda: ops.scaled_dot_product_attention(ROWS, ROWS, Tensor(np.ones((4, 6)))),
            r"^scaled_dot_product_attention: .*\(4, 6\)",
        ),
        (
            lambda: ops.conv2d(IMAGE, Tensor(np.ones((3, 3, 3, 3)))),
            r"^conv2d: input must be \(N, 3, H, W\).*got \(2, 4, 5, 5\)",
        ),
        (
            lambda: ops.conv2d(ROWS, Tensor(np.ones((3, 4, 3, 3)))),
            r"^conv2d: input must be \(N, 4, H, W\).*got \(5, 6\)",
        ),
        (lambda: ops.conv2d(IMAGE, ROWS), r"^conv2d: weight must be"),
        (
            lambda: ops.conv2d(IMAGE, Tensor(np.ones((3, 2, 3, 3))), groups=2),
            "^conv2d: .*3 output channels must divide",
        ),
        (
            lambda: ops.conv2d(IMAGE, Tensor(np.ones((3, 4, 7, 7)))),
            r"^conv2d: a window of \(7, 7\).*does not fit.*\(5, 5\)",
        ),
        (lambda: ops.conv2d(IMAGE, Tensor(np.ones((3, 4, 3, 3))), ONE), r"^conv2d: bias must be \(3,\)"),
        (lambda: ops.conv2d(IMAGE, Tensor(np.ones((3, 4, 3, 3))), stride=0), "^conv2d: .*stride"),
        (lambda: ops.max_pool2d(IMAGE, 6), "^max_pool2d: a window"),
        (lambda: ops.max_pool2d(IMAGE, 2, padding=2), "^max_pool2d: .*padding"),
        (lambda: ops.avg_pool2d(ROWS, 2), r"^avg_pool2d: input must be \(N, C, H, W\)"),
        (lambda: ops.dropout(ROWS, 1.0, 0), r"^dropout: p = 1.0 must lie in \[0, 1\)"),
    ],
)
def test_refusals(wrong, message):
    with pytest.raises(ValueError, match=message) as caught:
        wrong()
    assert "\n" not in str(caught.value)
