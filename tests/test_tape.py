"""The tape: order, memory, accumulation and ownership of gradients, grad mode."""

import gc
import threading
import time
import weakref

import numpy as np
import pytest

from minipar import ops
from minipar.tape import enable_grad, is_grad_enabled, next_order, no_grad
from minipar.tensor import Tensor, primitive
from tests.op_checks import leaf, weight

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
        lambda h: h + 1.0,
        lambda h: h + x,
        lambda h: x - h,
        lambda h: h * 2.0,
        lambda h: h / 2.0,
        lambda h: h.sum(),
        lambda h: h.mean(),
        lambda h: ops.where(np.ones(64, bool), h, 0.0),
        lambda h: h[np.array([1, 1])],
        lambda h: ops.concat([h, x]),
        lambda h: ops.relu(h),
        lambda h: ops.dropout(h, 0.5, 1),
    ):
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
