"""The tape: order, memory, hooks, accumulation, deferral, and what it refuses."""

import copy
import gc
import threading
import time
import weakref

import numpy as np
import pytest

from minipar import ops
from minipar.nn import Linear, Parameter
from minipar.nn.init import Normal
from minipar.tape import enable_grad, is_grad_enabled, next_order, no_grad, run_deferred, running_backward
from minipar.tensor import Tensor, primitive, tensor


def leaf(*shape, seed=0):
    return Tensor(np.random.default_rng(seed).standard_normal(shape), requires_grad=True)


def weight(*shape, seed=0):
    p = Parameter(shape, Normal())
    p.materialize(seed, f"w{shape}", "float64")
    return p


# ---- order and depth ----------------------------------------------------------------------------------


def test_doubling_sixty_times():
    x = leaf(3)
    h = x
    for _ in range(60):
        h = h + h
    start = time.perf_counter()
    h.sum().backward()
    assert time.perf_counter() - start < 1, "a shared node was visited more than once"
    assert x.grad.tolist() == [2.0**60] * 3


@pytest.mark.parametrize("depth", [5_000, 100_000])
def test_deep_chains_need_no_recursion(depth):
    x = leaf(2)
    h = x
    for _ in range(depth):
        h = h * 1.0
    start = time.perf_counter()
    h.sum().backward()
    assert time.perf_counter() - start < 10e-6 * depth * 10
    assert x.grad.tolist() == [1.0, 1.0]
    del h  # a chain of 100,000 nodes must also be freed without recursion


def test_a_deep_chain_that_is_never_run_backward_is_freed():
    h = leaf(2)
    for _ in range(100_000):
        h = h * 1.0
    del h


def test_a_shared_node_is_visited_once():
    visits = []

    @primitive
    def watched(x):
        return x * 2.0, lambda g: (visits.append(g.copy()), g * 2.0)[1]

    x = leaf(2)
    h = watched(x)
    (h + h * 3.0 + ops.sin(h)).sum().backward()
    assert len(visits) == 1
    np.testing.assert_allclose(visits[0], 4.0 + np.cos(2 * x.data))


def test_newest_operations_run_first():
    order = []

    @primitive
    def named(x, name):
        return x + 0.0, lambda g: (order.append(name), (g, None))[1]

    x = leaf(1)
    a, b = named(x, "a"), named(x, "b")
    c = named(b, "c") + a  # by depth `a` would come before `b`; by creation it comes last
    c.sum().backward()
    assert order == ["c", "b", "a"]
    assert next_order() < next_order()


# ---- memory -------------------------------------------------------------------------------------------


def test_saved_activations_are_freed_as_backward_goes():
    alive: list[list[bool]] = []
    saved: list[weakref.ref] = []

    @primitive
    def keeps(x):
        y = np.array(x)
        saved.append(weakref.ref(y))
        kept = y

        def vjp(g):
            alive.append([ref() is not None for ref in saved])
            return g * (kept == kept)

        return x + 0.0, vjp

    x = leaf(4)
    h = keeps(keeps(keeps(x)))
    h.sum().backward()
    assert alive == [[True, True, True], [True, True, False], [True, False, False]]
    assert [ref() for ref in saved] == [None] * 3


def test_gradients_are_freed_as_backward_goes():
    grads: list[weakref.ref] = []
    alive = []

    @primitive
    def step(x):
        def vjp(g):
            alive.append(sum(ref() is not None for ref in grads))
            made = g * 2.0
            grads.append(weakref.ref(made))
            return made

        return x + 0.0, vjp

    h = leaf(4)
    for _ in range(5):
        h = step(h)
    h.sum().backward()
    assert max(alive) <= 1  # the one that the vjp was called with


def test_graphs_are_collected_by_reference_counts_alone():
    gc.collect()
    gc.disable()
    try:
        x, w = leaf(4, 3), weight(2, 3)
        w.register_hook(lambda p: None)
        h = ops.linear(x, w)
        refs = [weakref.ref(t) for t in (h, h._maker[0], h.data)]
        loss = (ops.tanh(h) * 2.0).sum()
        refs += [weakref.ref(t) for t in (loss, loss._maker[0])]
        loss.backward()
        del loss, h
        assert [ref() for ref in refs] == [None] * 5
        y = ops.tanh(ops.linear(x, w))  # and without backward too
        ref = weakref.ref(y._maker[0])
        del y
        assert ref() is None
        assert w._leaf() is None and x._leaf() is None
    finally:
        gc.enable()


def test_what_only_a_shape_is_needed_of_is_not_kept():
    x = leaf(64)
    for build in (
        lambda h: h + 1.0, lambda h: h + x, lambda h: x - h, lambda h: h * 2.0, lambda h: h / 2.0, lambda h: h.sum(),
        lambda h: h.mean(), lambda h: ops.where(np.ones(64, bool), h, 0.0), lambda h: h[np.array([1, 1])],
        lambda h: ops.concat([h, x]), lambda h: ops.relu(h), lambda h: ops.dropout(h, 0.5, 1),
    ):  # fmt: skip
        h = ops.exp(x) * 3.0
        ref, y = weakref.ref(h.data), build(h)
        del h
        assert ref() is None
        y.sum().backward()


# ---- accumulation, ownership --------------------------------------------------------------------------


def test_gradients_add_up_over_backwards():
    x = leaf(3)
    (x * 2.0).sum().backward()
    first = x.grad
    (x * 3.0).sum().backward()
    assert x.grad.tolist() == [5.0] * 3 and x.grad is first
    x.zero_grad()
    assert x.grad is None


def test_grad_buffer_is_written_in_place():
    bucket = np.full(10, np.nan)
    x = leaf(2, 3)
    x.grad_buffer = bucket[2:8].reshape(2, 3)
    for factor, total in ((2.0, 2.0), (3.0, 5.0)):
        (x * factor).sum().backward()
        assert x.grad is x.grad_buffer
        assert bucket[2:8].tolist() == [total] * 6 and np.isnan(bucket[[0, 1, 8, 9]]).all()
    x.zero_grad()
    (x * 7.0).sum().backward()
    assert bucket[2:8].tolist() == [7.0] * 6


def test_gradients_are_memory_of_their_own():
    a, b = leaf(3), leaf(3, seed=1)
    seed = np.ones(3)
    (a + b).backward(seed)
    assert not np.shares_memory(a.grad, b.grad) and not np.shares_memory(a.grad, seed)
    a.grad += 5
    assert b.grad.tolist() == seed.tolist() == [1.0] * 3
    c, d = leaf(3), leaf(6)
    (c.reshape(3, 1).T + c + d[:3] + d.reshape(2, 3)[1]).sum().backward()
    assert c.grad.tolist() == [2.0] * 3 and d.grad.tolist() == [1.0] * 6
    e = leaf(3)
    e.backward(seed)
    assert e.grad.tolist() == [1.0] * 3 and e.grad is not seed


def test_a_gradient_that_others_see_is_never_added_to_in_place():
    seen = []

    @primitive
    def spy(x):
        return x + 0.0, lambda g: (seen.append((g, g.copy())), g)[1]

    x = leaf(3)
    h = ops.exp(x)
    (spy(h) + spy(h * 2.0) + h).sum().backward()
    for g, at_the_time in seen:
        np.testing.assert_array_equal(g, at_the_time)
    np.testing.assert_allclose(x.grad, 4 * np.exp(x.data))


def test_only_wanted_thunks_run():
    ran = []

    @primitive
    def product(a, b):
        return a * b, lambda g: (lambda: (ran.append("a"), g * b)[1], lambda: (ran.append("b"), g * a)[1])

    w = leaf(3)
    product(Tensor(np.ones(3)), w).sum().backward()
    assert ran == ["b"]
    ran.clear()
    with no_grad():
        y = product(w, w)
    assert not y.requires_grad and y.is_leaf and not ran


def test_several_outputs():
    @primitive
    def both(x):
        return (x * 2.0, x.argmax(), x * 3.0), lambda gs: sum(
            f * g for f, g in zip((2.0, 0.0, 3.0), gs) if g is not None
        )

    x = leaf(3)
    double, top, triple = both(x)
    assert not top.requires_grad
    triple.sum().backward()
    assert x.grad.tolist() == [3.0] * 3
    x.grad = None
    double, _, triple = both(x)
    (double + triple).sum().backward()
    assert x.grad.tolist() == [5.0] * 3


# ---- hooks --------------------------------------------------------------------------------------------


def test_hooks_fire_once_after_the_last_use():
    w, fired = leaf(3, 3), []
    remove = w.register_hook(lambda p: fired.append(p.grad.copy()))
    x = Tensor(np.ones((2, 3)))
    ops.linear(ops.linear(x, w), w).sum().backward()
    assert len(fired) == 1
    np.testing.assert_array_equal(fired[0], w.grad)
    (w * 1.0).sum().backward()
    assert len(fired) == 2
    remove()
    (w * 1.0).sum().backward()
    assert len(fired) == 2


def test_the_last_layer_s_hook_fires_before_the_first_layer_s_backward():
    events = []

    @primitive
    def layer(x, w, name):
        return x * w, lambda g: (events.append(f"backward {name}"), (g * w, g * x, None))[1]

    weights = [leaf(3, seed=i) for i in range(3)]
    h = Tensor(np.ones(3))
    for i, w in enumerate(weights):
        w.register_hook(lambda p, i=i: events.append(f"hook {i}"))
        h = layer(h, w, i)
    h.sum().backward()
    assert events == ["backward 2", "hook 2", "backward 1", "hook 1", "backward 0", "hook 0"]


def test_at_end_runs_after_all_hooks_and_inside_the_run():
    a, b, events = leaf(2), leaf(2), []

    def hook(p):
        if not events:
            running_backward().at_end.append(lambda: events.append(("end", running_backward() is not None)))
        events.append("hook")

    a.register_hook(hook), b.register_hook(hook)
    (a * b).sum().backward()
    assert events == ["hook", "hook", ("end", True)]
    with pytest.raises(RuntimeError, match="no backward is running"):
        running_backward()


def test_hooks_belong_to_leaves():
    with pytest.raises(RuntimeError, match="hooks belong to leaves"):
        (leaf(2) * 1.0).register_hook(print)


# ---- deferred weight gradients ------------------------------------------------------------------------


def network(weights, x):
    h = ops.linear(x, weights[0])  # the first operation on x is itself a linear layer
    return ops.linear(ops.tanh(h) * weights[2], weights[1]).sum()


def test_deferred_weight_gradients_equal_ordinary_ones():
    weights = [weight(4, 3), weight(3, 4), weight(4)]
    x = leaf(5, 3)
    network(weights, x).backward()
    expected = [w.grad for w in (*weights, x)]
    for t in (*weights, x):
        t.grad = None
    deferred = []
    network(weights, x).backward(deferred=deferred)
    np.testing.assert_array_equal(x.grad, expected[3])  # the input's gradient is never put off
    assert [w.grad for w in weights] == [None] * 3 and len(deferred) == 3
    run_deferred(deferred)
    assert deferred == []
    for w, g in zip(weights, expected):
        np.testing.assert_array_equal(w.grad, g)


def test_hooks_fire_after_the_last_deferred_thunk_of_several_microbatches():
    w, x, fired = weight(3, 3), leaf(2, 3), []
    w.register_hook(lambda p: fired.append(p.grad.copy()))
    losses = [ops.linear(ops.linear(x, w), w).sum() * float(i) for i in (1, 2)]
    lists = [[], []]
    for loss, deferred in zip(losses, lists):
        loss.backward(deferred=deferred)
    run_deferred(lists[0])
    assert fired == [] and w.grad is None
    run_deferred(lists[1])
    assert len(fired) == 1
    expected = tensor(w, requires_grad=True)
    (ops.linear(ops.linear(x, expected), expected).sum() * 3.0).backward()
    np.testing.assert_allclose(fired[0], expected.grad, rtol=1e-12)


def test_hooks_can_reach_the_run_when_weights_are_deferred():
    w, events, deferred = weight(3, 3), [], []
    w.register_hook(lambda p: running_backward().at_end.append(lambda: events.append("end")))
    ops.linear(Tensor(np.ones((2, 3))), w).sum().backward(deferred=deferred)
    assert events == []
    run_deferred(deferred)
    assert events == ["end"]


def test_microbatches_in_flight_share_one_leaf_and_fire_once_each():
    w, fired = weight(2, 2), []
    w.register_hook(lambda p: fired.append(1))
    x = Tensor(np.ones((1, 2)))
    first, second = ops.linear(x, w).sum(), ops.linear(x, w).sum()
    first.backward()
    late = ops.linear(ops.linear(x, w), w).sum()
    second.backward(), late.backward()
    assert fired == [1, 1, 1]


# ---- grad mode ----------------------------------------------------------------------------------------


def test_grad_modes_nest():
    x = leaf(2)
    with no_grad():
        assert not is_grad_enabled() and not (x * 2.0).requires_grad
        with enable_grad():
            assert (x * 2.0).requires_grad
            with no_grad():
                assert not (x * 2.0).requires_grad
        assert not (x * 2.0).requires_grad
    with pytest.raises(KeyError), no_grad():
        raise KeyError
    assert is_grad_enabled()


def test_grad_mode_belongs_to_the_thread():
    inside, done = threading.Event(), threading.Event()
    seen = []

    def other():
        inside.wait(10)
        seen.append(is_grad_enabled())
        done.set()

    thread = threading.Thread(target=other)
    thread.start()
    with no_grad():
        inside.set()
        assert done.wait(10)
    thread.join()
    assert seen == [True]


def test_backward_runs_in_several_threads_at_once():
    def work(i, out):
        x = leaf(8, seed=i)
        h = x
        for _ in range(300):
            h = ops.sin(h) + h
        h.sum().backward()
        out[i] = x.grad

    alone, together = {}, {}
    for i in range(3):
        work(i, alone)
    threads = [threading.Thread(target=work, args=(i, together)) for i in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for i in range(3):
        np.testing.assert_array_equal(alone[i], together[i])


# ---- refusals -----------------------------------------------------------------------------------------


def test_a_second_backward_raises_and_changes_nothing():
    x = leaf(2)
    h = ops.exp(x)
    y = h.sum()
    y.backward()
    before = x.grad.copy()
    with pytest.raises(RuntimeError, match="graph of 'sum' was already used and freed; run forward again"):
        y.backward()
    with pytest.raises(RuntimeError, match="graph of 'exp' was already used"):
        (h * x).sum().backward()
    np.testing.assert_array_equal(x.grad, before)


@pytest.mark.parametrize(
    "use",
    [
        lambda w: ops.linear(Tensor(np.ones((2, 3))), w),
        lambda w: ops.layer_norm(Tensor(np.ones((2, 3))), w[0]),
        lambda w: w * 2.0,
        lambda w: ops.embedding(w, np.array([1])),
    ],
)
def test_a_weight_changed_between_forward_and_backward_raises(use):
    w = leaf(3, 3)
    loss = use(w).sum()
    w.assign_(np.zeros((3, 3)))
    with pytest.raises(RuntimeError, match=r"shape \(3, 3\) was changed in place .*before the optimizer's step"):
        loss.backward()
    assert w.grad is None
    use(w).sum().backward()  # a forward after the change is as good as any, although the old graph still lives
    assert w.grad is not None


def test_a_frozen_weight_changed_between_forward_and_backward_raises():
    x, w = leaf(2, 3), Tensor(np.ones((3, 3)))
    y = ops.linear(x, w).sum()
    w.assign_(0.0)
    with pytest.raises(RuntimeError, match="changed in place"):
        y.backward()


def test_an_exception_in_a_vjp_leaves_no_half_filled_gradients():
    fail = [True]

    @primitive
    def moody(x):
        def vjp(g):
            if fail[0]:
                raise FloatingPointError("moody")
            return g

        return x + 0.0, vjp

    x = leaf(3)
    h = ops.exp(x)
    left, right = moody(h), h * 2.0
    with pytest.raises(FloatingPointError, match="moody"):
        (left + right).sum().backward()
    assert x.grad is None
    with pytest.raises(RuntimeError, match="no backward is running"):
        running_backward()
    fail[0] = False
    (h * 1.0).sum().backward()  # h's node had half of its gradient when the error came
    np.testing.assert_allclose(x.grad, np.exp(x.data))


def test_backward_refusals():
    x = leaf(2, 3)
    with pytest.raises(RuntimeError, match=r"tensor of shape \(2, 3\) needs a gradient"):
        (x * 1.0).backward()
    with pytest.raises(RuntimeError, match=r"gradient of shape \(3,\) for a tensor of shape \(2, 3\)"):
        (x * 1.0).backward(np.ones(3))
    with pytest.raises(RuntimeError, match="depends on nothing that requires a gradient"):
        Tensor(np.ones(1)).backward()
    with pytest.raises(TypeError, match="only floating tensors can require a gradient, this one is int64"):
        Tensor([1, 2], requires_grad=True)
    with pytest.raises(RuntimeError, match="assign_ is for leaves"):
        (x * 1.0).assign_(0.0)
    (x * 1.0).sum().backward(2.0)
    assert (x.grad == 2).all()


# ---- tensors ------------------------------------------------------------------------------------------


def test_detach_cuts_and_shares():
    x = leaf(3)
    d = (x * 2.0).detach()
    assert d.is_leaf and not d.requires_grad
    (x * d).sum().backward()
    np.testing.assert_allclose(x.grad, 2 * x.data)
    assert x.detach().data is x.data and tensor(x.data).data is not x.data


def test_deep_copies_get_their_own_gradients():
    layer = Linear(3, 2).materialize(0)
    y = layer(Tensor(np.ones((1, 3), np.float32)))  # a live graph: its leaves must not be shared with the copy
    twin = copy.deepcopy(layer)
    twin(Tensor(np.ones((1, 3), np.float32))).sum().backward()
    assert layer.weight.grad is None and twin.weight.grad is not None
    y.sum().backward()
    assert layer.weight.grad is not None


def test_repr():
    assert repr(Tensor([1.0, 2.0], requires_grad=True)) == "Tensor([1., 2.], float32, requires_grad=True)"
