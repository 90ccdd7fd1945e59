"""Convolutions cut by channel and by image region equal the serial one in value and every gradient."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minipar import Tensor, launch, ops, world
from minipar.comm.interface import balanced
from minipar.config import VERIFY_DEFAULTS, TrainConfig
from minipar.errors import UsageError
from minipar.models import ConvNet, ConvNetConfig, PatchNet, PatchNetConfig
from minipar.nn import AvgPool2d, Conv2d, GlobalAvgPool2d, GroupNorm, MaxPool2d, Module
from minipar.parallel.tensor_parallel.convolution import (
    ImageHeight,
    InputChannels,
    OutputChannels,
    RegionAvgPool,
    RegionConv,
    RegionGroupNorm,
    RegionMaxPool,
    RegionPool,
    RegionScatter,
    intervals,
    needed,
    overlap,
)
from minipar.parallel.tensor_parallel.parallelize import Plan, parallelize
from minipar.parallel.tensor_parallel.plans import default_plan
from minipar.verification import verify
from tests.parallel.tensor_runs import equals_serial, serial

property_test = settings(max_examples=60, deadline=None, derandomize=True)


@pytest.mark.parametrize("ranks", [2, 5])
@pytest.mark.parametrize("cut", ["output", "input", "region"])
def test_convnet_equals_serial(cut: str, ranks: int) -> None:
    """5 ranks: more than the image's 3 channels, and than the last block's rows. 3 are among `layout_cases`."""
    serial("convnet", 6)
    launch(lambda: equals_serial(world(), "convnet", steps=6, convolution=cut), ranks, timeout=30)


@pytest.mark.parametrize("cut", ["output", "input", "region"])
def test_convnet_recomputed_and_accumulated(cut: str) -> None:
    serial("convnet", 3)
    options: dict[str, Any] = {"steps": 3, "convolution": cut, "recomputed": True, "pieces": 2}
    launch(lambda: equals_serial(world(), "convnet", **options), 3, timeout=30)


@pytest.mark.parametrize("cut", ["output", "input"])
def test_patchnet_equals_serial(cut: str) -> None:
    settings = TrainConfig(model="patchnet", tp=2, steps=3, width=5, optimizer="sgd", convolution=cut)
    config = settings.resolved(VERIFY_DEFAULTS)
    assert all(launch(lambda: verify(config, world()).holds, 2, timeout=30))


def test_patchnet_has_no_regions() -> None:
    with pytest.raises(UsageError, match="use --tiles"):
        default_plan(PatchNet(PatchNetConfig()), convolution="region")


# --- By channel ---------------------------------------------------------------------------------------------


def run_layer(layer: Conv2d, x: np.ndarray, g: np.ndarray, style: Any) -> dict[str, np.ndarray]:
    if style is not None:
        parallelize(layer, world(), {"": style})
    layer.materialize(3, "float64")
    leaf = Tensor(x, requires_grad=True)
    y = layer(leaf)
    y.backward(g)
    found = {"y": y.data, "x": leaf.grad}
    for name, p in layer.named_parameters():
        found[name] = p.grad if p.layout is None else p.layout.whole(p.grad, p.global_shape)
    return found


@pytest.mark.parametrize("style", [OutputChannels(), InputChannels()], ids=["output", "input"])
@pytest.mark.parametrize("ranks", [2, 3, 5])
@pytest.mark.parametrize("bias", [True, False])
def test_channels(style: Any, ranks: int, bias: bool) -> None:
    """2 channels in, 3 out: fewer than ranks; a gradient that all ranks hold alike."""
    rng = np.random.default_rng(0)

    def make() -> Conv2d:
        return Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), bias=bias)

    x, g = rng.standard_normal((2, 2, 6, 7)), rng.standard_normal((2, 3, 3, 5))
    expected = run_layer(make(), x, g, None)
    for found in launch(lambda: run_layer(make(), x, g, style), ranks):
        for key, value in expected.items():
            np.testing.assert_allclose(found[key], value, rtol=1e-12, atol=1e-13, err_msg=key)


def test_channels_of_a_grouped_convolution_are_refused() -> None:
    def run(style: Any) -> str:
        with pytest.raises(UsageError) as error:
            parallelize(Conv2d(4, 4, 3, groups=2), world(), {"": style})
        return str(error.value)

    message = (
        ", 4 to 4 channels in 2 groups, is not offered cut by channel; groups=1 would do on any number of ranks,"
        " and so would the cut by region"
    )
    for style in (OutputChannels(), InputChannels()):
        assert launch(run, 2, style) == [message] * 2


# --- By region ----------------------------------------------------------------------------------------------


def test_needed_rows_by_hand() -> None:
    """3 × 3 with padding 1 on 9 rows over 3 ranks: one row of halo on each inner side."""
    wanted = [needed(out, 9, 3, 1, 1, 1) for out in intervals(9, 3)]
    assert wanted == [((0, 4), (1, 0)), ((2, 7), (0, 0)), ((5, 9), (0, 1))]
    assert overlap((3, 6), (2, 7)) == (0, 3) and overlap((3, 6), (5, 9)) == (2, 3)
    assert overlap((3, 6), (6, 9)) == (0, 0)
    # A 1 × 1 window with padding 2 reads nothing but padding at either end.
    assert needed((0, 1), 3, 1, 1, 2, 1) == ((0, 0), (1, 0))
    assert needed((6, 7), 3, 1, 1, 2, 1) == ((3, 3), (0, 1))
    assert needed((4, 4), 3, 1, 1, 2, 1) == ((0, 0), (0, 0))


class Regions(Module):
    """Layers with an entrance, so that the plan can cut the image there."""

    def __init__(self, *layers: Module):
        self.a = layers[0]
        self.b = layers[1] if len(layers) > 1 else None
        self.enter = Module()
        self.enter.forward = lambda x: x  # type: ignore[method-assign]

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(self.enter(x))
        return y if self.b is None else self.b(y)


def run_regions(make: Any, x: np.ndarray, plan: Plan | None) -> dict[str, np.ndarray]:
    """Value and gradients. By region, y's rows are put together again, and y's gradient is cut like y."""
    model: Module = make()
    if plan is not None:
        parallelize(model, world(), {"enter": RegionScatter(), **plan})
    model.materialize(3, "float64")
    for p in model.parameters():
        p.assign_(p.data + np.linspace(-0.3, 0.4, p.size).reshape(p.shape))  # also norms start uneven
    leaf = Tensor(x, requires_grad=True)
    y = model(leaf)
    cut = plan is not None and y.ndim == 4
    parts = world().all_gather_object(y.data) if cut else [y.data]
    whole = np.concatenate(parts, axis=2) if cut else y.data
    g = np.random.default_rng(9).standard_normal(whole.shape)
    if cut:
        counts = [part.shape[2] for part in parts]
        assert counts == balanced(sum(counts), len(counts))
        start = sum(counts[: world().rank])
        g = g[:, :, start : start + y.shape[2]]
    y.backward(g)
    return {"y": whole, "x": leaf.grad, **{name: p.grad for name, p in model.named_parameters()}}


def compare_regions(make: Any, x: np.ndarray, ranks: int, plan: Plan) -> None:
    expected = run_regions(make, x, None)
    for found in launch(run_regions, ranks, make, x, plan, timeout=20):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            scale = np.abs(value).max(initial=1e-3)
            assert found[key].shape == value.shape, key
            assert np.abs(found[key] - value).max(initial=0.0) <= 1e-11 * scale, key


@property_test
@given(
    ranks=st.integers(2, 5),
    height=st.integers(1, 11),
    kernel=st.sampled_from([1, 2, 3, 5]),
    stride=st.integers(1, 3),
    padding=st.integers(0, 2),
    dilation=st.integers(1, 2),
    groups=st.integers(1, 2),
    bias=st.booleans(),
)
def test_region_convolution(
    ranks: int, height: int, kernel: int, stride: int, padding: int, dilation: int, groups: int, bias: bool
) -> None:
    if height + 2 * padding < dilation * (kernel - 1) + 1:
        height += dilation * (kernel - 1)
    width = 3 + dilation * (kernel - 1)
    x = np.random.default_rng(height).standard_normal((2, 2, height, width))

    def make() -> Module:
        return Regions(Conv2d(2, 4, kernel, stride, padding, dilation, groups, bias))

    compare_regions(make, x, ranks, {"a": RegionConv()})


@pytest.mark.parametrize(
    ("height", "kernel", "stride", "padding", "dilation", "ranks"),
    [
        (5, 5, 1, 2, 2, 5),  # halo of 4 rows, each rank has one: it reaches beyond its neighbours
        (3, 3, 2, 1, 1, 5),  # two output rows, five ranks
        (2, 1, 1, 2, 1, 4),  # output rows that read padding only
        (9, 2, 3, 0, 1, 4),  # rows that nobody reads
        (1, 1, 1, 0, 1, 3),
    ],
)
def test_region_convolution_corners(
    height: int, kernel: int, stride: int, padding: int, dilation: int, ranks: int
) -> None:
    x = np.random.default_rng(0).standard_normal((1, 2, height, 9))

    def make() -> Module:
        return Regions(Conv2d(2, 3, (kernel, 3), (stride, 2), (padding, 1), (dilation, 1)))

    compare_regions(make, x, ranks, {"a": RegionConv()})


@pytest.mark.parametrize("ranks", [2, 3, 5])
@pytest.mark.parametrize("height", [2, 5, 8])
def test_region_group_norm(height: int, ranks: int) -> None:
    x = 3 + np.random.default_rng(1).standard_normal((2, 6, height, 3))
    compare_regions(lambda: Regions(GroupNorm(3, 6)), x, ranks, {"a": RegionGroupNorm()})


@pytest.mark.parametrize("ranks", [2, 3, 5])
@pytest.mark.parametrize("height", [1, 4, 7])
def test_region_pool(height: int, ranks: int) -> None:
    x = np.random.default_rng(2).standard_normal((2, 2, height, 3))
    plan = {"a": RegionConv(), "b": RegionPool()}
    compare_regions(lambda: Regions(Conv2d(2, 3, 3, 2, 1), GlobalAvgPool2d()), x, ranks, plan)


@property_test
@given(
    ranks=st.integers(2, 5),
    height=st.integers(1, 9),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 3),
    padding=st.integers(0, 1),
    average=st.booleans(),
)
def test_region_window_pools(
    ranks: int, height: int, kernel: int, stride: int, padding: int, average: bool
) -> None:
    padding = min(padding, kernel // 2)
    x = np.random.default_rng(height).standard_normal((2, 2, max(height, kernel), 5)) - 3  # below the zeros
    layer, style = (AvgPool2d, RegionAvgPool()) if average else (MaxPool2d, RegionMaxPool())
    compare_regions(lambda: Regions(layer(kernel, stride, padding)), x, ranks, {"a": style})


def test_a_pool_s_stride_is_its_kernel() -> None:
    x = np.random.default_rng(0).standard_normal((1, 2, 7, 6)) - 5  # so that padding must not be zeros
    compare_regions(lambda: Regions(MaxPool2d((2, 3), padding=1)), x, 3, {"a": RegionMaxPool()})


def test_region_traffic() -> None:
    """A 3 × 3 convolution: one exchange each way, whose halo is a row at each cut, and the weight's sum."""

    def run() -> list[dict]:
        comm, found = world(), []
        model = Regions(Conv2d(2, 4, 3, padding=1, bias=False))
        image = ImageHeight()
        parallelize(model, comm, {"enter": RegionScatter(image), "a": RegionConv(image)}).materialize(0)
        x = Tensor(np.ones((1, 2, 6, 5), "float32"))
        for _ in range(2):
            y = model(x)
            found.append({op: counts[:2] for (op, _), counts in comm.ledger.as_dict().items()})
            comm.ledger.reset()
        y.sum().backward()
        return [*found, {op: counts[:2] for (op, _), counts in comm.ledger.as_dict().items()}]

    for rank, (first, again, backward) in enumerate(launch(run, 3)):
        rows = 2 + (2 if rank == 1 else 1)  # its own two, and one to each neighbour
        halo = {"all_to_all": (1, 10 * rows)}
        assert first == {"all_reduce": (1, 1), **halo}  # the image's height, found once
        assert again == halo
        assert backward == {"all_reduce": (1, 72)}  # the image wants no gradient


def test_group_norm_traffic() -> None:
    def run() -> list[dict]:
        comm, model = world(), Regions(GroupNorm(3, 6))
        image = ImageHeight()
        parallelize(model, comm, {"enter": RegionScatter(image), "a": RegionGroupNorm(image)}).materialize(0)
        x = Tensor(np.ones((2, 6, 4, 3), "float32"), requires_grad=True)
        model(x)
        comm.ledger.reset()
        y = model(x)
        forward = comm.ledger.elements("all_reduce"), comm.ledger.calls()
        comm.ledger.reset()
        y.sum().backward()
        return [forward, (comm.ledger.elements("all_reduce"), comm.ledger.calls())]

    # Sums and squares of 2 × 3 groups; back both at once, weight, bias, and the image's gradient gathered.
    assert launch(run, 2) == [[(12, 2), (12 + 6 + 6, 4)]] * 2


def test_group_norm_of_half_precision_images() -> None:
    """Squares of 300 add up beyond float16's 65,504."""
    x = (300 * np.random.default_rng(0).standard_normal((1, 4, 8, 8))).astype("float16")
    expected = ops.group_norm(Tensor(x), 2, Tensor(np.ones(4, "float16")), Tensor(np.zeros(4, "float16")))

    def run() -> np.ndarray:
        model = Regions(GroupNorm(2, 4))
        parallelize(model, world(), {"enter": RegionScatter(), "a": RegionGroupNorm()})
        return model.materialize(0, "float16")(Tensor(x)).data

    parts = launch(run, 2)
    assert parts[0].dtype == "float16"
    np.testing.assert_allclose(np.concatenate(parts, axis=2), expected.data, atol=4e-3)


def test_a_model_does_not_go_by_the_image_of_another() -> None:
    """The second model's rows come cut already: 4 and 3 of 7, then 2 and 1 of 3, while the first had 9."""

    def run() -> list[int]:
        first = ConvNet(ConvNetConfig(1, 9, 3, 4, 1, groups=2))
        parallelize(first, world(), default_plan(first, convolution="region")).materialize(0)
        first(Tensor(np.ones((1, 1, 9, 5), "float32")))
        image, pool = ImageHeight(), GlobalAvgPool2d()
        parallelize(pool, world(), {"": RegionPool(image)})
        rows = [(4, 3), (2, 1)]
        return [pool(Tensor(np.full((1, 1, r[world().rank], 1), 6.0 / sum(r)))).data.item() for r in rows]

    for means in launch(run, 2):
        assert means == pytest.approx([6 / 7, 2.0])


def test_a_region_that_is_not_the_rank_s_own_is_refused() -> None:
    def run() -> str:
        layer = Conv2d(1, 1, 3, padding=1)
        parallelize(layer, world(), {"": RegionConv()}).materialize(0)
        with pytest.raises(UsageError) as error:
            layer(Tensor(np.zeros((1, 1, 1 + 3 * world().rank, 3), "float32")))
        return str(error.value)

    assert launch(run, 2) == [
        ": rank 0 has 1 rows, not 3 of the image's 5",
        ": rank 1 has 4 rows, not 2 of the image's 5",
    ]


def test_a_window_larger_than_the_image_is_refused_as_in_serial() -> None:
    def run() -> None:
        model = ConvNet(ConvNetConfig(1, 4, 3, 4, 1, groups=2))
        model.stem.conv = Conv2d(1, 4, 9, padding=1, bias=False)
        if world().size > 1:
            parallelize(model, world(), default_plan(model, convolution="region"))
        model.materialize(0)
        with pytest.raises(ValueError, match="does not fit an image of"):
            model(Tensor(np.zeros((1, 1, 4, 4), "float32")))

    for ranks in (1, 2):
        launch(run, ranks)
