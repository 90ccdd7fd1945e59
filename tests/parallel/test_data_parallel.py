"""Data parallelism equals full-batch training, whatever the ranks, buckets, microbatches and aggregation."""

import functools
from collections.abc import Callable

import numpy as np
import pytest

from minipar import Tensor, launch, nn, ops, optim, world
from minipar.errors import UsageError
from minipar.parallel import DataParallel
from minipar.parallel.buckets import make_buckets
from tests.parallel.training_runs import (
    MODELS,
    Step,
    assert_equal_steps,
    assert_replicas_bitwise,
    batches,
    build,
    gradients,
    loss_sum,
    on_threads,
    serial,
)

full_batch = functools.cache(serial)
ONE_EACH = 1e-9  # MiB: no two parameters fit one bucket


@pytest.mark.parametrize("ranks", (1, 2, 3, 4, 5))
@pytest.mark.parametrize("kind", MODELS)
def test_equals_the_full_batch_and_replicas_are_bitwise_equal(kind: str, ranks: int) -> None:
    """Five ranks share batches of 7 and of 4, so shares are unequal and one of them is empty."""
    of_ranks = on_threads(ranks, kind)
    for steps in of_ranks:
        assert_equal_steps(steps, full_batch(kind))
    assert_replicas_bitwise(of_ranks)


@pytest.mark.parametrize("kind", ("convnet", "gpt-tied"))
def test_equals_the_full_batch_in_float32(kind: str) -> None:
    for steps in on_threads(3, kind, "float32"):
        assert_equal_steps(steps, full_batch(kind, "float32"), tolerance=1e-5)


@pytest.mark.parametrize("overlap", (True, False))
@pytest.mark.parametrize("bucket_mb", (ONE_EACH, 0.0005, 0.003, 100.0))
def test_buckets_of_any_size_are_bitwise_the_same(bucket_mb: float, overlap: bool) -> None:
    """Sums are taken in the order of ranks, so how they are bundled changes no bit."""
    found = on_threads(3, "gpt-tied", bucket_mb=bucket_mb, overlap=overlap, steps=4)
    reference = default_buckets()
    for steps in found:
        for a, b in zip(steps, reference):
            assert {n: g.tobytes() for n, g in a.gradients.items()} == {
                n: g.tobytes() for n, g in b.gradients.items()
            }
            assert {n: w.tobytes() for n, w in a.state.items()} == {
                n: w.tobytes() for n, w in b.state.items()
            }


@functools.cache
def default_buckets() -> list[Step]:
    return on_threads(3, "gpt-tied", steps=4)[0]


@pytest.mark.parametrize("kind", ("mlp", "convnet", "gpt-tied"))
@pytest.mark.parametrize("microbatches", (2, 3))
def test_accumulating_microbatches_equals_the_full_batch(kind: str, microbatches: int) -> None:
    of_ranks = on_threads(2, kind, microbatches=microbatches)
    for steps in of_ranks:
        assert_equal_steps(steps, full_batch(kind))
    assert_replicas_bitwise(of_ranks)


@pytest.mark.parametrize("ranks", (2, 3, 5))
@pytest.mark.parametrize("kind", ("mlp", "convnet-batch-norm", "gpt-untied"))
def test_reduce_to_the_master_and_broadcast_equals_all_reduce(kind: str, ranks: int) -> None:
    of_ranks = on_threads(ranks, kind, aggregation="master")
    assert_equal_steps(of_ranks[0], full_batch(kind))
    for steps in of_ranks[1:]:
        assert not any(step.gradients for step in steps), "only the master holds the sum"
        assert_equal_steps(steps, full_batch(kind), compare_gradients=False)
    assert_replicas_bitwise(of_ranks)


def adamw(model: nn.Module) -> optim.Optimizer:
    return optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)


@pytest.mark.parametrize("aggregation", ("all_reduce", "master"))
def test_adamw_after_the_same_gradients(aggregation: str) -> None:
    """Adam divides by its own history: equal gradients make it equal, but for rounding in the first steps."""
    of_ranks = on_threads(3, "gpt-tied", optimizer=adamw, aggregation=aggregation, steps=5)
    assert_equal_steps(of_ranks[0], serial("gpt-tied", optimizer=adamw, steps=5), tolerance=1e-6)
    assert_replicas_bitwise(of_ranks)


# Frozen parameters, and leaving ----------------------------------------------------------------------


def test_the_master_s_values_are_everywhere_at_the_start_frozen_ones_included() -> None:
    def program() -> dict[str, np.ndarray]:
        model = build("convnet-batch-norm", seed=world().rank)
        model.stem.conv.weight.requires_grad = False
        model.stem.norm.running_mean.data += world().rank
        DataParallel(model, world())
        return model.state_dict()

    expected = {
        name: value.tobytes() for name, value in build("convnet-batch-norm", seed=0).state_dict().items()
    }
    for state in launch(program, 3):
        assert {name: value.tobytes() for name, value in state.items()} == expected


def test_frozen_parameters_are_neither_sent_nor_changed() -> None:
    def program() -> tuple[int, bool]:
        comm, model = world(), build("mlp")
        frozen = model.layers[0].fc.weight
        frozen.requires_grad = False
        parallel, before = DataParallel(model, comm), frozen.data.copy()
        comm.ledger.reset()
        inputs, targets = batches("mlp", steps=1)[0]
        loss_sum(model, inputs, targets).backward()
        parallel.step(optim.SGD(parallel.params, lr=1.0))
        return comm.ledger.elements("all_reduce"), np.array_equal(frozen.data, before) and frozen.grad is None

    model = build("mlp")
    trained = [p for p in model.parameters() if p is not model.layers[0].fc.weight]
    assert launch(program, 2) == [(sum(p.size for p in trained) + len(trained), True)] * 2


def test_detach_leaves_a_plain_serial_model() -> None:
    def program() -> tuple[int, dict[str, np.ndarray]]:
        comm, model = world(), build("convnet-batch-norm")
        DataParallel(model, comm).detach()
        comm.ledger.reset()
        inputs, targets = batches("convnet", steps=1)[0]
        (loss_sum(model, inputs, targets) / len(targets)).backward()
        return comm.ledger.calls(), gradients(model)

    expected = full_batch("convnet-batch-norm")[0].gradients
    for calls, found in launch(program, 2):
        assert calls == 0, "neither gradients nor batch statistics are shared any more"
        assert all(np.array_equal(found[name], expected[name]) for name in expected)


# Wrong use -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"aggregation": "gossip"}, "aggregation 'gossip' is unknown: use one of all_reduce, master"),
        ({"aggregation": "master", "overlap": True}, "it cannot overlap"),
        ({"bucket_mb": 0}, "bucket_mb = 0 must be positive"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        DataParallel(build("mlp"), world(), **options)


def test_a_model_without_values_is_refused() -> None:
    with pytest.raises(UsageError, match=r"layers\.0\.fc\.weight has no values yet"):
        DataParallel(MODELS["mlp"](), world())


def test_microbatches_with_batch_norm_are_refused() -> None:
    parallel = DataParallel(build("convnet-batch-norm"), world())
    with pytest.raises(UsageError, match="is batch norm, which mixes the samples"), parallel.no_sync():
        pass


def test_models_that_differ_are_refused_before_anything_is_sent() -> None:
    def program() -> None:
        DataParallel(nn.Linear(3, 2 + world().rank).materialize(0), world())

    with pytest.raises(
        Exception, match=r"rank 0 called symmetric #1.*rank 1 called symmetric #1.*differ in shape"
    ):
        launch(program, 2)


@pytest.mark.parametrize("aggregation", ("all_reduce", "master"))
def test_a_gradient_that_would_be_summed_twice_is_refused(aggregation: str) -> None:
    """Two backwards without no_sync or zero_grad would count the first one once for every rank."""

    def program() -> None:
        model = build("mlp")
        DataParallel(model, world(), aggregation=aggregation)
        for inputs, targets in batches("mlp", steps=2):
            loss_sum(model, inputs, targets).backward()

    with pytest.raises(UsageError, match="is summed over the ranks already: call zero_grad"):
        launch(program, 2)


def test_a_backward_that_raised_does_not_stop_the_next_one_from_synchronising() -> None:
    def program() -> np.ndarray:
        model, backward = interrupted(at_layer=1)  # the bucket is not full yet
        backward()
        return model[0].weight.grad.copy()

    alone = launch(program, 1)[0]
    for found in launch(program, 3):
        assert np.allclose(found, 3 * alone)


def test_a_backward_that_raised_while_sums_are_under_way_is_not_built_upon() -> None:
    def program() -> None:
        _, backward = interrupted(at_layer=0)  # after the last gradient: the bucket is under way
        backward()

    with pytest.raises(UsageError, match=r"broken off while its buckets were summed.* detach\(\)"):
        launch(program, 2)


def interrupted(at_layer: int) -> tuple[nn.Module, Callable[[], None]]:
    """A data-parallel model of two layers whose backward raised once, and what runs the next backward."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).materialize(0, "float64")
    DataParallel(model, world(), bucket_mb=100)

    def interrupt(p: Tensor) -> None:
        remove()
        raise ZeroDivisionError

    def backward() -> None:
        model.zero_grad()
        model(Tensor(np.ones((1, 2)))).sum().backward()

    remove = model[at_layer].weight.register_hook(interrupt)
    with pytest.raises(ZeroDivisionError):
        backward()
    return model, backward


def test_buckets_hold_every_parameter_once_in_reverse_order() -> None:
    params = list(build("gpt-untied").parameters())
    for megabytes in (ONE_EACH, 0.0005, 0.002, 100.0):
        buckets = make_buckets(params, megabytes)
        order = [id(p) for bucket in buckets for p in bucket.params]
        assert order == [id(p) for p in reversed(params)]
        for bucket in buckets:
            assert len(bucket.params) == 1 or bucket.numel * 8 <= megabytes * 2**20
            assert all(np.shares_memory(view, bucket.flat) for view in bucket.views)
    assert len(make_buckets(params, ONE_EACH)) == len(params) and len(make_buckets(params, 100.0)) == 1


def test_a_bucket_is_as_large_as_its_sums() -> None:
    """Which are float32 where parameters are of two bytes."""
    for dtype in ("float16", "float32"):
        params = [p for _ in range(4) for p in nn.Linear(256, 256, bias=False).materialize(0, dtype).parameters()]
        buckets = make_buckets(params, 0.5)
        assert [len(bucket.params) for bucket in buckets] == [2, 2], dtype
        assert all(bucket.views[0].nbytes == 2**18 for bucket in buckets)


def test_buckets_do_not_mix_dtypes() -> None:
    layers = [nn.Linear(2, 2).materialize(0, dtype) for dtype in ("float32", "float64", "float32")]
    buckets = make_buckets([p for layer in layers for p in layer.parameters()], 1.0)
    assert [bucket.flat.dtype.name for bucket in buckets] == ["float32", "float64", "float32"]


def test_no_sync_may_be_nested() -> None:
    parallel = DataParallel(nn.Linear(2, 1).materialize(0, "float64"), world())
    with parallel.no_sync():
        with parallel.no_sync():
            pass
        world().ledger.reset()
        ops.sum(parallel(Tensor(np.ones((1, 2))))).backward()
        assert world().ledger.calls("all_reduce") == 0
