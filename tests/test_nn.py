"""Modules and layers: the tree, names, initialisation and its slices, state, modes, refusals."""

import copy
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats

from minipar import nn, ops, random
from minipar.errors import UsageError
from minipar.nn import init
from minipar.tensor import Tensor

RNG = np.random.default_rng(0)


class Tied(nn.Module):
    def __init__(self):
        self.embed = nn.Embedding(6, 4)
        self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Sequential(nn.LayerNorm(4), nn.Dropout(0.5))])
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight
        self.aside = [nn.Linear(9, 9)]  # a plain list owns nothing

    def forward(self, ids):
        h = self.embed(ids)
        for block in self.blocks:
            h = block(h)
        return self.head(h)


# ---- the tree -----------------------------------------------------------------------------------------


def test_names_paths_and_shared_parameters_once():
    model = Tied().materialize(0)
    names = ["embed.weight", "blocks.0.weight", "blocks.0.bias", "blocks.1.0.weight", "blocks.1.0.bias"]
    assert [n for n, _ in model.named_parameters()] == names
    assert [p.name for p in model.parameters()] == names
    assert model.blocks[1][1].path == "blocks.1.1" and model.path == ""
    assert list(model.state_dict()) == names
    assert [n for n, _ in model.named_modules()] == [
        "",
        "embed",
        "blocks",
        "blocks.0",
        "blocks.1",
        "blocks.1.0",
        "blocks.1.1",
        "head",
    ]
    assert len(model.blocks) == 2 and model.blocks[-1] is model.blocks[1]


def test_a_shared_module_has_its_first_path():
    shared = nn.Dropout(0.5)
    model = nn.Sequential(shared, nn.Linear(2, 2), shared).materialize(0)
    assert shared.path == "0" and [n for n, _ in model.named_modules()] == ["", "0", "1"]


def test_tied_weights_get_the_gradient_of_both_uses():
    model = Tied().materialize(1, "float64").eval()
    ids = np.array([[0, 1, 5]])
    fired = []
    model.embed.weight.register_hook(lambda p: fired.append(p.name))
    model(ids).sum().backward()
    both = model.embed.weight.grad
    assert fired == ["embed.weight"]
    model.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    untied = copy.deepcopy(model)
    untied.head = nn.Linear(4, 6, bias=False).materialize(0, "float64")
    untied.head.weight.assign_(model.embed.weight)
    untied(ids).sum().backward()
    np.testing.assert_allclose(both, untied.embed.weight.grad + untied.head.weight.grad, rtol=1e-12)


def test_train_and_eval_reach_every_module():
    model = Tied().materialize(0)
    x = np.array([[1, 2, 3]])
    assert (model(x).data != model(x).data).sum() == 0  # one step, one mask
    with random.at(step=1):
        other = model(x).data
    assert (other != model(x).data).any()
    assert model.eval() is model and not any(m.training for _, m in model.named_modules())
    with random.at(step=1):
        np.testing.assert_array_equal(model(x).data, model(x).data)
    assert model.train().blocks[1][1].training


def test_repr():
    assert repr(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Conv2d(1, 2, 3, padding=1))) == (
        "Sequential(\n  (0): Linear(2, 3, bias=True)\n  (1): ReLU()\n"
        "  (2): Conv2d(1, 2, (3, 3), stride=(1, 1), padding=(1, 1))\n)"
    )
    nested = nn.Sequential(nn.Sequential(nn.Dropout(0.1)))
    assert repr(nested) == "Sequential(\n  (0): Sequential(\n    (0): Dropout(p=0.1)\n  )\n)"
    p = nn.Linear(2, 3).weight
    assert repr(p) == "Parameter('', (3, 2), not materialised)"
    for layer in (
        nn.Embedding(3, 4),
        nn.LayerNorm(3),
        nn.RMSNorm(3),
        nn.GroupNorm(1, 3),
        nn.BatchNorm2d(3),
        nn.GELU(),
        nn.CrossEntropyLoss(),
    ):
        assert repr(layer).startswith(type(layer).__name__ + "(")


def test_modules_can_be_copied_and_pickled():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)).materialize(0)
    model[0].weight.register_hook(print)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for (n, a), (_, b) in zip(model.named_parameters(), twin.named_parameters()):
            assert a.name == b.name == n and a.data is not b.data
            assert b.requires_grad and b.is_leaf and b.hooks == ()
            np.testing.assert_array_equal(a.data, b.data)
    empty = pickle.loads(pickle.dumps(nn.Linear(2, 3)))
    assert not empty.weight.is_materialized and empty.materialize(0).weight.is_materialized
    with pytest.raises(RuntimeError, match="only leaves can be copied"):
        copy.deepcopy(model[0].weight * 1.0)


# ---- initialisation -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layer, bound",
    [
        (nn.Linear(50, 200), 50**-0.5),
        (nn.Conv2d(4, 100, (3, 5)), 60**-0.5),
        (nn.Conv2d(8, 100, 3, groups=2), 36**-0.5),
    ],
)
def test_linear_and_conv_follow_pytorch_s_law(layer, bound):
    layer.materialize(0)
    for p in layer.parameters():
        assert np.abs(p.data).max() <= bound
        assert stats.kstest(p.data.reshape(-1) / bound, stats.uniform(-1, 2).cdf).pvalue > 1e-3
    assert np.abs(layer.weight.data).max() > 0.99 * bound


def test_other_laws():
    assert stats.kstest(nn.Embedding(100, 50).materialize(0).weight.data.reshape(-1), "norm").pvalue > 1e-3
    for layer in (nn.LayerNorm(5), nn.GroupNorm(1, 5), nn.BatchNorm2d(5)):
        layer.materialize(0)
        assert layer.weight.data.tolist() == [1.0] * 5 and layer.bias.data.tolist() == [0.0] * 5
    assert nn.RMSNorm(5).materialize(0).weight.data.tolist() == [1.0] * 5
    draw = lambda law: law.draw(1, 0, 50_000)
    assert abs(draw(init.kaiming_normal(50)).std() - (2 / 50) ** 0.5) < 0.003
    assert np.abs(draw(init.xavier_uniform(20, 30))).max() == pytest.approx((6 / 50) ** 0.5, rel=1e-3)
    assert set(draw(init.Constant(2.5))) == {2.5}
    assert abs(draw(init.Normal(2.0, 3.0)).mean() - 3) < 0.05
    with pytest.raises(TypeError, match="does not say how to draw"):
        init.Initialiser().draw(0, 0, 1)


def test_values_depend_on_seed_and_name_only():
    a, b = Tied().materialize(3), Tied()
    list(b.parameters())[2].materialize(3, "blocks.0.bias")  # alone, out of order
    np.testing.assert_array_equal(b.blocks[0].bias.data, a.blocks[0].bias.data)
    assert (Tied().materialize(4).embed.weight.data != a.embed.weight.data).all()
    same = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).materialize(0)
    assert (same[0].weight.data != same[1].weight.data).all()
    double = Tied().materialize(3, "float64")
    np.testing.assert_array_equal(double.embed.weight.data.astype(np.float32), a.embed.weight.data)
    assert Tied().materialize(3, "float16").embed.weight.dtype == np.float16


@st.composite
def shape_and_part(draw):
    shape = tuple(draw(st.lists(st.sampled_from([0, 1, 2, 3, 4, 5, 6]), max_size=4)))
    part = []
    for n in shape:
        a, b = sorted(draw(st.tuples(st.integers(0, n), st.integers(0, n))))
        part.append(draw(st.sampled_from([slice(a, b), slice(None), slice(a, None), slice(-n, b)])))
    return shape, tuple(part)


@settings(max_examples=200, deadline=None)
@example(((4, 3), (slice(1, 3), slice(None))), init.Normal(0.02))
@example(((4, 5, 3), (slice(1, 3), slice(2, 4), slice(None))), init.Normal(0.02))
@example(((4, 3), (slice(None), slice(1, 2))), init.Uniform(-1, 1))
@given(shape_and_part(), st.sampled_from([init.Normal(0.02), init.Uniform(-1, 1), init.Constant(3.0)]))
def test_a_slice_is_the_serial_initialisation_sliced_bitwise(shaped, law):
    shape, part = shaped
    whole = law.fill(7, shape)
    assert whole.shape == shape
    np.testing.assert_array_equal(law.fill(7, shape, part), whole[part])


def test_a_slice_costs_only_itself():
    drawn = []

    class Counting(init.Normal):
        def draw(self, key, start, count):
            drawn.append(count)
            return super().draw(key, start, count)

    Counting().fill(0, (1000, 64), (slice(10, 20), slice(None)))
    Counting().fill(0, (1000, 64), (slice(0, 3), slice(8, 16)))
    assert sum(drawn) == 10 * 64 + 3 * 8
    with pytest.raises(ValueError, match="slices with step 1"):
        init.Normal().fill(0, (4,), (slice(0, 4, 2),))


def test_a_materialised_part_keeps_the_global_shape():
    p, part = nn.Linear(6, 4).weight, (slice(0, 2), slice(None))
    p.layout = SimpleNamespace(initial=lambda law, key, shape: law.fill(key, shape, part))
    p.materialize(0, "w")
    assert p.shape == (2, 6) and p.global_shape == (4, 6) and p.is_materialized


def test_use_before_values_raises_one_clear_line():
    layer = nn.Linear(3, 2)
    assert layer.weight.shape == (2, 3) and not layer.weight.is_materialized
    with pytest.raises(
        UsageError, match=r"parameter \(unnamed\) \(2, 3\) has no values yet: call materialize"
    ):
        layer(Tensor(np.ones((1, 3))))
    layer.assign_paths()
    with pytest.raises(UsageError, match="parameter weight "):
        _ = layer.weight.data
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = layer.weight.nonsense
    with pytest.raises(UsageError, match="dtype 'int32' is not a floating type here"):
        layer.materialize(0, "int32")


# ---- state --------------------------------------------------------------------------------------------


def test_state_round_trip():
    a, b = (nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)).materialize(s) for s in (0, 1))
    a(Tensor(RNG.standard_normal((4, 1, 5, 5)).astype(np.float32)))  # moves the running statistics
    state = a.state_dict()
    assert list(state) == ["0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var"]
    assert not any(np.shares_memory(v, p.data) for v, p in zip(state.values(), a.parameters()))
    b.load_state_dict(state)
    for k, v in b.state_dict().items():
        np.testing.assert_array_equal(v, state[k])
    fresh = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    fresh.load_state_dict(state)  # an unmaterialised model takes the values without drawing its own
    np.testing.assert_array_equal(fresh[0].weight.data, state["0.weight"])
    fresh[0].weight.data = np.asfortranarray(fresh[0].weight.data)
    assert all(v.flags.c_contiguous for v in fresh.state_dict().values())
    half = nn.Linear(2, 2).materialize(0, "float16")
    half.load_state_dict({"weight": np.ones((2, 2)), "bias": np.ones(2)})
    assert half.weight.dtype == np.float16


def test_load_refusals_change_nothing():
    model = nn.Linear(2, 3).materialize(0)
    before = model.state_dict()
    good = {"weight": np.zeros((3, 2), np.float32), "bias": np.zeros(3, np.float32)}
    for change, message in (
        ({"bias": None}, r"missing \['bias'\], unexpected none"),
        ({"extra": np.zeros(1)}, r"missing none, unexpected \['extra'\]"),
        ({"bias": np.zeros(4)}, r"bias is \(4,\), expected \(3,\)"),
        ({"bias": np.zeros(3, int)}, "dtype .*int64.* is not a floating type"),
    ):
        state = {k: v for k, v in {**good, **change}.items() if v is not None}
        with pytest.raises(UsageError, match=message):
            model.load_state_dict(state)
    for k, v in model.state_dict().items():
        np.testing.assert_array_equal(v, before[k])


# ---- layers -------------------------------------------------------------------------------------------


def test_batch_norm_layer_keeps_running_statistics():
    layer = nn.BatchNorm2d(3, momentum=0.25).materialize(0, "float64")
    x = RNG.standard_normal((4, 3, 2, 2)) * 2 + 1
    layer(Tensor(x))
    np.testing.assert_allclose(layer.running_mean.data, 0.25 * x.mean(axis=(0, 2, 3)))
    np.testing.assert_allclose(layer.running_var.data, 0.75 + 0.25 * x.var(axis=(0, 2, 3), ddof=1))
    before = layer.running_mean.data.copy()
    y = layer.eval()(Tensor(x[:1]))  # one sample is fine now
    expected = (x[:1] - before[:, None, None]) / np.sqrt(layer.running_var.data + 1e-5)[:, None, None]
    np.testing.assert_allclose(y.data, expected)
    np.testing.assert_array_equal(layer.running_mean.data, before)


def test_dropout_layer_draws_by_seed_step_path_and_sample():
    model = nn.Sequential(nn.Dropout(0.5), nn.Dropout(0.5)).materialize(0)
    x = Tensor(np.ones((4, 100)))
    masks = {}
    for seed in (0, 1):
        for step in (0, 1):
            with random.at(seed=seed, step=step):
                for i in (0, 1):
                    masks[seed, step, i] = model[i](x).data
    assert len({m.tobytes() for m in masks.values()}) == 8
    with random.at(first_sample=2):
        np.testing.assert_array_equal(model[0](x[2:]).data, masks[0, 0, 0][2:])
    model[0].window = lambda: (30, 100)  # this rank holds columns 30 to 50 of 100
    with random.at(first_sample=1):
        np.testing.assert_array_equal(model[0](x[1:, 30:50]).data, masks[0, 0, 0][1:, 30:50])
    assert nn.Dropout(0.0)(x) is x and model.eval()(x) is x


def test_layers_are_their_operations():
    x = Tensor(RNG.standard_normal((2, 4, 6, 6)))
    for layer, op in (
        (nn.ReLU(), ops.relu),
        (nn.Tanh(), ops.tanh),
        (nn.SiLU(), ops.silu),
        (nn.GELU(), lambda t: ops.gelu(t, "none")),
        (nn.GELU("tanh"), ops.gelu),
        (nn.MaxPool2d(2), lambda t: ops.max_pool2d(t, 2)),
        (nn.Flatten(), lambda t: t.flatten(1)),
        (nn.AvgPool2d(3, 2, 1), lambda t: ops.avg_pool2d(t, 3, 2, 1)),
    ):
        np.testing.assert_array_equal(layer(x).data, op(x).data)


@pytest.mark.parametrize(
    "wrong, message",
    [
        (lambda: nn.GroupNorm(3, 4), "GroupNorm: 3 groups do not divide 4 channels"),
        (lambda: nn.Conv2d(4, 6, 3, groups=4), "Conv2d: 4 groups must divide 4 input and 6 output"),
        (lambda: nn.Dropout(1.0), r"Dropout: p = 1.0 must lie in \[0, 1\)"),
        (lambda: nn.GELU("fast"), "GELU: approximate 'fast' is unknown: use none or tanh"),
    ],
)
def test_layer_refusals(wrong, message):
    with pytest.raises(UsageError, match=message):
        wrong()


def test_modules_without_forward_say_so():
    with pytest.raises(TypeError, match="Module defines no forward"):
        nn.Module()(1)
    with pytest.raises(TypeError, match="loop over its modules"):
        nn.ModuleList([])(1)
