"""Autocast: the precision of every operation, and of every gradient; the copies of weights."""

import gc
import inspect
import sys
import threading
from collections.abc import Callable

import numpy as np
import pytest

from minipar import ops
from minipar.amp import autocast
from minipar.errors import UsageError
from minipar.models import GPT, GPTConfig
from minipar.nn import Linear, Parameter
from minipar.recompute import recompute
from minipar.tensor import Tensor, casting

LOW, FULL, INSIDE, SAME = "low", "float32", "inside", "same"
IDS = np.array([0, 2])


def t(*shape: int, dtype: str = "float32") -> Tensor:
    values = np.random.default_rng(0).uniform(0.5, 1.5, shape)
    return Tensor(values.astype(dtype), requires_grad=True)


# (kind, inputs' shapes, operation on them): what autocast makes of floats. SAME: the dtype that came in.
TABLE: dict[str, tuple[str, list[tuple[int, ...]], Callable[..., Tensor]]] = {
    "linear": (LOW, [(2, 3), (4, 3), (4,)], ops.linear),
    "rounded": (LOW, [(2, 3), (4, 3)], ops.rounded),
    "matmul": (LOW, [(2, 3), (3, 4)], ops.matmul),
    "_einsum": (LOW, [(2, 3), (3, 4)], lambda a, b: ops.einsum("ij,jk->ik", a, b)),
    "_conv2d": (LOW, [(1, 2, 4, 4), (3, 2, 3, 3), (3,)], ops.conv2d),
    "scaled_dot_product_attention": (LOW, [(1, 3, 4)] * 3, ops.scaled_dot_product_attention),
    "self_attention": (LOW, [(1, 3, 12)], lambda x: ops.self_attention(x, 4)),
    "softmax": (FULL, [(2, 3)], ops.softmax),
    "log_softmax": (FULL, [(2, 3)], ops.log_softmax),
    "_cross_entropy": (INSIDE, [(2, 3)], lambda x: ops.cross_entropy(x, IDS)),
    "_squared_error": (FULL, [(2, 3), (2, 3)], ops.mse_loss),
    "layer_norm": (FULL, [(2, 3), (3,), (3,)], ops.layer_norm),
    "rms_norm": (FULL, [(2, 3), (3,)], ops.rms_norm),
    "group_norm": (FULL, [(2, 4), (4,), (4,)], lambda x, w, b: ops.group_norm(x, 2, w, b)),
    "batch_norm": (FULL, [(3, 2), (2,), (2,)], lambda x, w, b: ops.batch_norm(x, w, b)[0]),
    "normalise_channels": (
        FULL,
        [(3, 2), (2,), (2,)],
        lambda x, w, b: ops.normalise_channels(x, np.zeros(2, "float32"), np.ones(2, "float32"), w, b),
    ),
    "exp": (FULL, [(2, 3)], ops.exp),
    "log": (FULL, [(2, 3)], ops.log),
    "pow": (FULL, [(2, 3)], lambda x: x**3),
    "sum": (FULL, [(2, 3)], ops.sum),
    "mean": (FULL, [(2, 3)], ops.mean),
    "var": (FULL, [(2, 3)], ops.var),
    "logsumexp": (FULL, [(2, 3)], ops.logsumexp),
    "prod": (FULL, [(2, 3)], ops.prod),
    "cumsum": (FULL, [(2, 3)], lambda x: ops.cumsum(x, 0)),
    "embedding": (SAME, [(4, 3)], lambda w: ops.embedding(w, IDS)),
    "add": (SAME, [(2, 3), (2, 3)], ops.add),
    "sub": (SAME, [(2, 3), (2, 3)], ops.sub),
    "mul": (SAME, [(2, 3), (2, 3)], ops.mul),
    "div": (SAME, [(2, 3), (2, 3)], ops.div),
    "maximum": (SAME, [(2, 3), (2, 3)], ops.maximum),
    "minimum": (SAME, [(2, 3), (2, 3)], ops.minimum),
    "where": (SAME, [(2, 3), (2, 3)], lambda a, b: ops.where(a.data > 1, a, b)),
    "_concat": (SAME, [(2, 3), (2, 3)], lambda a, b: ops.concat([a, b])),
    "neg": (SAME, [(2, 3)], ops.neg),
    "square": (SAME, [(2, 3)], ops.square),
    "sqrt": (SAME, [(2, 3)], ops.sqrt),
    "abs": (SAME, [(2, 3)], ops.abs),
    "sin": (SAME, [(2, 3)], ops.sin),
    "cos": (SAME, [(2, 3)], ops.cos),
    "tanh": (SAME, [(2, 3)], ops.tanh),
    "sigmoid": (SAME, [(2, 3)], ops.sigmoid),
    "relu": (SAME, [(2, 3)], ops.relu),
    "silu": (SAME, [(2, 3)], ops.silu),
    "erf": (SAME, [(2, 3)], ops.erf),
    "gelu": (SAME, [(2, 3)], ops.gelu),
    "clamp": (SAME, [(2, 3)], lambda x: ops.clamp(x, 0.6, 1.2)),
    "dropout": (SAME, [(2, 3)], lambda x: ops.dropout(x, 0.5, 7)),
    "amax": (SAME, [(2, 3)], ops.amax),
    "amin": (SAME, [(2, 3)], ops.amin),
    "_max_pool2d": (SAME, [(1, 1, 4, 4)], lambda x: ops.max_pool2d(x, 2)),
    "_avg_pool2d": (SAME, [(1, 1, 4, 4)], lambda x: ops.avg_pool2d(x, 2)),
    "reshape": (SAME, [(2, 3)], lambda x: x.reshape(3, 2)),
    "getitem": (SAME, [(2, 3)], lambda x: x[1:]),
}
MOVING = {  # these move elements, and have no say in their precision
    "reshape", "permute", "swapaxes", "broadcast_to", "getitem", "_concat", "_split", "pad", "gather", "flip",
    "roll", "tril", "contiguous", "astype",
}  # fmt: skip


def primitives() -> dict[str, object]:
    found = {}
    for module in (ops.elementwise, ops.shape, ops.reduce, ops.linalg, ops.normalisation, ops.attention,
                   ops.conv, ops.loss):  # fmt: skip
        for name, value in vars(module).items():
            if inspect.isfunction(value) and hasattr(value, "precision"):
                found[name] = value
    return found


def test_every_primitive_is_in_the_table_with_the_kind_it_states():
    for name, operation in primitives().items():
        assert name in TABLE or name in MOVING, f"{name} is not in the table of precisions"
        kind = TABLE[name][0] if name in TABLE else SAME
        assert operation.precision == (None if kind == SAME else kind), name


# What is left out: on bfloat16 inputs NumPy promotes beside a Python number, where autocast has no say.
@pytest.mark.parametrize(
    ("name", "given", "low"),
    [
        (name, given, low)
        for name in TABLE for given in ("float32", "low") for low in ("float16", "bfloat16")
        if (given, low) != ("low", "bfloat16") or TABLE[name][0] != SAME
    ],
)  # fmt: skip
def test_the_dtype_of_an_operation_and_of_its_gradients(name: str, given: str, low: str):
    kind, shapes, operation = TABLE[name]
    dtype = low if given == "low" else "float32"
    inputs = [t(*shape, dtype=dtype) for shape in shapes]
    with autocast(low):
        y = operation(*inputs)
    assert y.dtype.name == {LOW: low, FULL: "float32", INSIDE: "float32", SAME: dtype}[kind]
    y.backward(np.ones(y.shape, y.dtype))
    for x in inputs:
        if x.grad is None:  # `rounded` takes its weight for the dtype alone
            continue
        assert x.grad.dtype == x.dtype and x.grad.shape == x.shape
        assert np.isfinite(x.grad.astype("float32")).all()


@pytest.mark.parametrize("operation", (ops.add, ops.mul, ops.div, ops.maximum))
def test_two_dtypes_meet_in_the_widest_and_each_gradient_goes_back_in_its_own(operation):
    a, b = t(2, 3), t(3, dtype="float16")
    with autocast():
        y = operation(a, b)
    y.sum().backward()
    assert (y.dtype, a.grad.dtype, b.grad.dtype) == (np.float32, np.float32, np.float16)


def test_float64_and_plain_arrays_are_left_alone():
    with autocast():
        assert ops.matmul(t(2, 3, dtype="float64"), t(3, 2, dtype="float64")).dtype == np.float64
        mask = np.full((3, 3), -1e9, "float32")  # would be -inf in float16
        q = t(1, 3, 4)
        assert ops.scaled_dot_product_attention(q, q, q, mask).dtype == np.float16


def test_float16_products_are_added_up_in_float32_and_rounded_once():
    x, w = np.full((1, 4096), 1.0, "float32"), np.full((1, 4096), 1.0, "float32")
    x[0, 0] = 2048  # beside 2048 float16 has no place for 1: adding in it would stay there
    with autocast():
        y = ops.linear(Tensor(x), Tensor(w))
    assert y.dtype == np.float16 and y.item() == 2048 + 4096  # 6143 rounded once


def test_off_inside_on_and_on_inside_off():
    x, w = t(2, 3), t(3, 2)
    assert casting.get() is None
    with autocast():
        with autocast(enabled=False):
            assert (x @ w).dtype == np.float32
            with autocast("bfloat16"):
                assert (x @ w).dtype.name == "bfloat16"
        assert (x @ w).dtype == np.float16
        with pytest.raises(ValueError, match="stop"), autocast("bfloat16"):
            raise ValueError("stop")
        assert (x @ w).dtype == np.float16
    assert (x @ w).dtype == np.float32


def test_it_holds_for_one_thread_only():
    seen = []
    with autocast():
        thread = threading.Thread(target=lambda: seen.append((t(2, 3) @ t(3, 2)).dtype))
        thread.start()
        thread.join()
    assert seen == [np.float32]


def test_unknown_dtypes_are_refused_by_name():
    with pytest.raises(UsageError, match="dtype 'int8' is unknown: use float16 or bfloat16"):
        autocast("int8")


# ---- the copies of weights ----------------------------------------------------------------------------


def copies_made(context: autocast, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Record how many copies the context holds after each look."""
    made: list[int] = []
    plain = autocast.copy_of

    def counted(self, tensor, dtype):
        before = {k: v[2] for k, v in self._copies.items()}
        copy = plain(self, tensor, dtype)
        if tensor.is_weight and not any(copy is c for c in before.values()):
            made.append(1)
        return copy

    monkeypatch.setattr(autocast, "copy_of", counted)
    return made


def weight() -> Parameter:
    return Linear(3, 4, bias=False).materialize(0).weight


def test_a_weight_is_cast_once_a_step_and_anew_after_it(monkeypatch):
    w, context = weight(), autocast()
    made = copies_made(context, monkeypatch)
    for step in range(2):
        with context:
            (ops.linear(t(2, 3), w).sum() + ops.linear(t(2, 3), w).sum()).backward()
        assert len(made) == step + 1, "two uses and two backwards, one copy"
        w.assign_(w.data * 2)
    with context:
        y = ops.linear(Tensor(np.ones((1, 3), "float32")), w)
    np.testing.assert_array_equal(y.data, (w.data.sum(1)[None]).astype("float16"))


def test_a_copy_goes_when_its_array_goes():
    """ZeRO stage 3 frees a weight after use: its float16 copy must not stay in its place."""
    w, context = weight(), autocast()
    w.data = w.data.copy()  # an array that nobody else holds
    with context:
        ops.linear(Tensor(np.ones((1, 3), "float32")), w)
    assert len(context._copies) == 1
    del w.data
    gc.collect()
    assert not context._copies


def test_a_weight_changed_between_forward_and_backward_raises_under_autocast_as_well():
    w = weight()
    with autocast():
        y = ops.linear(t(2, 3), w).sum()
    w.assign_(w.data * 2)
    with pytest.raises(RuntimeError, match="changed in place between forward and backward"):
        y.backward()


def test_recompute_replays_in_the_precision_of_the_forward():
    gradients = []
    for use in (lambda m, x: m(x), recompute):
        layer, x = Linear(3, 4).materialize(0), t(2, 3)
        with autocast():
            y = use(layer, x)
            assert y.dtype == np.float16
        (y * y).sum().backward()  # outside
        gradients.append((x.grad, layer.weight.grad, layer.bias.grad))
    for direct, replayed in zip(*gradients):
        assert direct.dtype == np.float32
        np.testing.assert_array_equal(direct, replayed)


def test_bfloat16_is_refused_where_the_arrays_library_has_none(monkeypatch):
    monkeypatch.setattr(sys.modules[autocast.__module__], "is_gpu_array", lambda x: True)
    layer, x = Linear(3, 4).materialize(0), t(2, 3)
    refused = pytest.raises(UsageError, match="CuPy has no bfloat16; use float16 on a GPU, or --device cpu")
    with refused, autocast("bfloat16"):
        layer(x)
    with autocast("float16"):
        assert layer(x).dtype == np.float16


def test_a_model_keeps_float32_weights_gradients_and_residuals():
    model = GPT(GPTConfig(vocab=11, seq_len=6, width=8, layers=2, heads=2)).materialize(0)
    seen = []
    block = model.h[0]
    plain = block.forward
    block.forward = lambda x: seen.append(x.dtype) or plain(x)
    with autocast():
        logits = model(np.arange(6)[None])
        loss = model.loss(logits, np.arange(6)[None])
    loss.backward()
    assert (logits.dtype, loss.dtype, seen) == (np.float16, np.float32, [np.dtype("float32")])
    assert all(p.dtype == p.grad.dtype == np.float32 for p in model.parameters())


@pytest.mark.parametrize("low", ("float16", "bfloat16"))
def test_cross_entropy_of_low_logits_is_that_of_their_float32_copy(low: str):
    logits = t(4, 7, dtype=low)
    wide = Tensor(logits.data.astype("float32"), requires_grad=True)
    targets = np.array([0, 6, 3, 3])
    with autocast(low):
        losses, expected = (ops.cross_entropy(x, targets, reduction="none") for x in (logits, wide))
    assert losses.dtype == np.float32 and np.array_equal(losses.data, expected.data)
    losses.sum().backward()
    expected.sum().backward()
    assert np.array_equal(logits.grad, wide.grad.astype(low))
    outside = ops.cross_entropy(t(4, 7, dtype=low), targets)
    assert outside.dtype.name == low, "without autocast the dtype is the input's"


@pytest.mark.parametrize("uses", (1, 2, 3))
def test_gradients_of_low_products_land_in_a_buffer_as_their_float32_sum(uses: int):
    """The first waits as it is for the buffer, which casts it; the sum of several is a float32 one."""
    x, w = t(5, 4), t(3, 4)
    gradients = [np.full((5, 3), 0.1 + i, "float16") for i in range(uses)]

    def backward(which: list[int]) -> np.ndarray:
        with autocast("float16"):
            outs = [ops.linear(x * (i + 1.0), w) for i in which]
        sum(((y * gradients[i]).sum() for i, y in zip(which, outs)), start=Tensor(0.0)).backward()
        assert w.grad is not None and w.grad.dtype == np.float32
        return w.grad

    want = np.zeros(w.shape, np.float32)
    for i in reversed(range(uses)):  # backward runs from the newest use to the oldest
        w.grad = None
        want += backward([i])
    w.grad = None
    assert np.array_equal(backward(list(range(uses))), want), "without a buffer"
    w.grad, w.grad_buffer = None, np.full(w.shape, np.nan, "float32")
    assert backward(list(range(uses))) is w.grad_buffer and np.array_equal(w.grad, want)
