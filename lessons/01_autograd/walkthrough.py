# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 01 · Autograd from zero
#
# **How does a program compute the gradient of everything that it computed?**
#
# Training changes millions of parameters a little, each in the direction that lowers the loss. That direction
# is the gradient, and a program can find it for any formula, exactly, in about the time of two more forward
# passes. This page shows how, with minipar's own tape: two files, `minipar/tape.py` and `minipar/tensor.py`.
#
# Everything later (sums of gradients over ranks, pipelines that run backward in pieces, weights that are
# freed and fetched again) hooks into what is shown here.

# %%
import inspect
import time
import tracemalloc

import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits

import minipar
from minipar import Tensor, nn, ops, optim
from minipar.gradcheck import gradcheck
from minipar.plot import COLOURS
from minipar.tensor import primitive

# %% [markdown]
# ## A record of what was done
#
# Take $y = \tanh(w x + x)$. Each operation on a tensor computes its value at once, and leaves a *node* behind
# that remembers where the inputs came from. The nodes are the tape. `backward` walks it from the end to the
# beginning.

# %%
x = Tensor(np.array(0.5), requires_grad=True)
w = Tensor(np.array(0.8), requires_grad=True)
y = ops.tanh(w * x + x)
y.backward()
print(f"y = {y.item():.4f}   dy/dx = {x.grad:.4f}   dy/dw = {w.grad:.4f}")

# %% [markdown]
# The picture draws the tape of the same formula. Nodes are numbered in the order in which they were made; an
# arrow shows where a gradient goes. Two leaves, `x` and `w`, end the walk: their gradients are kept.


# %%
def nodes_of(tensor):
    """Return all nodes behind a tensor, oldest first."""
    found, todo = {}, [tensor.edge()[0]]
    while todo:
        node = todo.pop()
        if node.order not in found:
            found[node.order] = node
            todo += [edge[0] for edge in node.edges if edge is not None]
    return [found[order] for order in sorted(found)]


def draw_tape(tensor, leaves, places):
    """Draw the nodes of `tensor` at the given (x, y) places, oldest first, with arrows to their inputs."""
    nodes = nodes_of(tensor)
    where = {node.order: place for node, place in zip(nodes, places)}
    names = {leaf.edge()[0].order: name for name, leaf in leaves.items()}
    axes = plt.figure(figsize=(7.5, 2.6)).subplots()
    for number, node in enumerate(nodes):
        label = f"{number}: {names.get(node.order, node.name)}"
        colour = COLOURS[1] if node.order in names else COLOURS[0]
        box = {"boxstyle": "round,pad=0.4", "facecolor": "white", "edgecolor": colour}
        axes.text(*where[node.order], label, ha="center", va="center", color=colour, bbox=box)
        for edge in node.edges:
            axes.annotate(
                "",
                where[edge[0].order],
                where[node.order],
                arrowprops={"arrowstyle": "->", "shrinkA": 22, "shrinkB": 22, "color": "0.4"},
            )
    axes.set_xlim(-0.3, 3.3)
    axes.set_ylim(-0.6, 1.6)
    axes.axis("off")
    axes.set_title("the tape of tanh(w x + x); arrows: where gradients go", loc="left", fontsize=10)
    plt.show()


y = ops.tanh(w * x + x)
draw_tape(y, {"x": x, "w": w}, [(0, 1), (0, 0), (1, 1), (2, 0.5), (3, 0.5)])

# %% [markdown]
# ## A primitive: a value, and what to do with a gradient
#
# An operation does not need to know the formula that it is part of. It has to answer one question: *given the
# gradient of the loss by my output, what is the gradient by my input?* That answer is a function, the
# vector-Jacobian product, in short *vjp*. Here is minipar's `tanh`, whole:

# %%
print(inspect.getsource(ops.tanh))

# %% [markdown]
# It returns the value and the vjp side by side. What the vjp needs later (here `y`) is simply captured by the
# function. A primitive of your own is as short, and a tensor accepts it at once:


# %%
@primitive
def cube(x):
    return x**3, lambda g: g * 3 * x**2


x = Tensor(np.array([1.0, 2.0, 3.0]), requires_grad=True)
cube(x).sum().backward()
print("by the tape ", x.grad)
print("by hand     ", 3 * x.data**2)

# %% [markdown]
# ## Why a vector-Jacobian product, and no Jacobian
#
# A layer that takes 64 × 32 numbers to 64 × 32 numbers has a Jacobian of $2048 \times 2048$ derivatives, and
# most of them are zero. Backward never makes it. It multiplies the gradient that comes in, $g$, from the
# left,
#
# $$ g^\top J = \text{vjp}(g), $$
#
# and for a linear layer that is one matrix product.

# %%
x = Tensor(np.random.default_rng(0).standard_normal((64, 32)), requires_grad=True)
weight = np.random.default_rng(1).standard_normal((32, 32))
y = x @ weight.T
g = np.random.default_rng(2).standard_normal(y.shape)
y.backward(g)
print("Jacobian, numbers to hold   ", y.size * x.size)
print("vjp, numbers to hold        ", x.grad.size)
print("largest difference to g @ W ", abs(x.grad - g @ weight).max())

# %% [markdown]
# ## A value used twice gets two gradients
#
# Where a value goes into two operations, each sends a gradient back, and they add up: a small change of the
# value changes the loss by both ways. So a node must not pass its gradient on before *all* of its uses have
# sent theirs.
#
# minipar's rule is simple. An operation can only use what exists already, so the order of creation is a right
# order, and backward always takes the **newest** node that holds a gradient. Open `minipar/tape.py` at
# `Backward.run`: it is one loop with a heap.
#
# The formula $h \leftarrow h + h$, repeated 60 times, shows what the rule is worth. There are $2^{60}$ ways
# from the end to the beginning, and 60 nodes.

# %%
x = Tensor(np.array(1.0), requires_grad=True)
h = x
for _ in range(60):
    h = h + h
start = time.perf_counter()
h.backward()
seconds = time.perf_counter() - start
print(f"gradient {x.grad:.0f} = 2^60: {x.grad == 2.0**60}, in {1e3 * seconds:.2f} ms")

# %% [markdown]
# A loop has no depth limit either. A recursive walk would end at Python's limit of about 1,000 calls; here is
# a chain of 5,000 operations.

# %%
x = Tensor(np.array(1.0), requires_grad=True)
h = x
for _ in range(5000):
    h = h * 1.0001
start = time.perf_counter()
h.backward()
print(
    f"gradient {x.grad:.6f}, 1.0001^5000 = {1.0001**5000:.6f}, in {1e3 * (time.perf_counter() - start):.0f} ms"
)

# %% [markdown]
# ## What was stretched is summed
#
# A bias of shape `(3,)` added to a batch of shape `(4, 3)` is used four times, once a row. Four gradients
# come back, and they add up: the gradient of the bias is the sum over the batch. NumPy calls the forward
# *broadcasting*; its adjoint is `unbroadcast` in `minipar/ops/elementwise.py`.

# %%
batch = Tensor(np.arange(12.0).reshape(4, 3))
bias = Tensor(np.zeros(3), requires_grad=True)
out = batch + bias
g = np.arange(12.0).reshape(4, 3)
out.backward(g)
print("gradient that came in   ", g.shape)
print("gradient of the bias    ", bias.grad.shape, bias.grad, "= the sum over rows:", g.sum(axis=0))

# %% [markdown]
# ## Gradients add up until somebody clears them
#
# A second `backward` adds to `.grad`. That is wanted when a batch is processed in pieces (lesson 04), and a
# bug when it is forgotten between two steps.

# %%
w = Tensor(np.array(3.0), requires_grad=True)
for call in (1, 2):
    (w * w).backward()
    print(f"after backward {call}: {w.grad:.0f}")
w.zero_grad()
(w * w).backward()
print(f"after zero_grad and backward: {w.grad:.0f}")

# %% [markdown]
# ## Trust, but measure
#
# A gradient can be checked against nothing but the function itself. For a random direction $v$,
#
# $$ \frac{f(x + \varepsilon v) - f(x - \varepsilon v)}{2 \varepsilon} \approx \nabla f(x) \cdot v . $$
#
# One random direction sees every element at once. How small should ε be? Too large, and the curvature of $f$
# enters; too small, and the difference drowns in rounding.


# %%
def difference_error(eps, dtype):
    """Return the relative error of a central difference of sum(tanh(x)^2), against the tape."""
    rng = np.random.default_rng(3)
    x = Tensor(rng.standard_normal(100).astype(dtype), requires_grad=True)
    v = rng.standard_normal(100).astype(dtype)

    def f(array):
        return (ops.tanh(array) * ops.tanh(array)).sum()

    f(x).backward()
    exact = float((x.grad * v).sum())
    step = (v * dtype(eps)).astype(dtype)
    plus, minus = f(Tensor(x.data + step)).item(), f(Tensor(x.data - step)).item()
    return abs((plus - minus) / (2 * eps) - exact) / abs(exact)


sizes = np.logspace(-12, 0, 49)
errors = {dtype: [difference_error(eps, dtype) for eps in sizes] for dtype in (np.float64, np.float32)}
figure, axes = plt.subplots(figsize=(7, 3.6))
for dtype, colour, style in ((np.float64, COLOURS[0], "-"), (np.float32, COLOURS[1], "--")):
    axes.loglog(sizes, np.maximum(errors[dtype], 1e-14), style, color=colour, label=np.dtype(dtype).name)
axes.set_xlabel("ε")
axes.set_ylabel("relative error of the difference")
axes.grid(alpha=0.3)
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# Two slopes meet: rounding, which falls like $1/\varepsilon$, and curvature, which rises like
# $\varepsilon^2$. In float32 the best that a difference can do is worse by many orders, so gradients are
# checked in float64. `minipar/gradcheck.py` does it for every primitive of minipar, in three directions each:

# %%
rng = np.random.default_rng(4)
worst = gradcheck(cube, [rng.standard_normal((3, 4))])
print(f"cube: worst relative error {worst:.1e}")


# %%
@primitive
def wrong_cube(x):
    return x**3, lambda g: g * 2 * x**2  # should be 3


try:
    gradcheck(wrong_cube, [rng.standard_normal((3, 4))])
except AssertionError as error:
    print("wrong_cube is refused:", error)

# %% [markdown]
# ## What the tape holds in memory
#
# The vjps hold what they captured until backward has used them. That is what training needs more memory for
# than inference, and lessons 08 and 09 are about little else. `no_grad` records nothing.

# %%
layers = [nn.Linear(256, 256).materialize(seed=i, dtype="float64") for i in range(8)]
batch = Tensor(rng.standard_normal((512, 256)))


def forward():
    h = batch
    for layer in layers:
        h = ops.tanh(layer(h))
    return h.sum()


def held(after):
    """Return the MiB that are held once `after` has run, beyond what was there before."""
    tracemalloc.start()
    result = after()
    now = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    del result
    return now / 2**20


def without_tape():
    with minipar.no_grad():
        return forward()


def after_backward():
    loss = forward()
    loss.backward()
    for layer in layers:
        layer.zero_grad()
    return loss


held_by = {
    "forward, recorded": held(forward),
    "forward, no_grad": held(without_tape),
    "after backward": held(after_backward),
}
figure, axes = plt.subplots(figsize=(7, 1.9))
axes.barh(list(held_by), list(held_by.values()), color=COLOURS[0], height=0.55)
for row, value in enumerate(held_by.values()):
    axes.text(value, row, f" {value:.2f}", va="center")
axes.invert_yaxis()
axes.set_xlabel("memory held (MiB)")
axes.set_xlim(0, 1.15 * max(held_by.values()))
plt.show()

# %% [markdown]
# ## Training, at last
#
# Put together: a model, a loss, `backward`, and a step against the gradient. The data are 8 × 8 pictures of
# digits. The second run forgets `zero_grad`, so each step follows the sum of all gradients so far: a good
# start, and then it runs past every minimum that it comes to.

# %%
digits = load_digits()
pictures, labels = (digits.data / 16).astype(np.float32), digits.target


def train(optimizer, lr, steps=150, clear=True, scale=1.0):
    """Train a small MLP from the same start and return its losses; gradients are multiplied by `scale`."""
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)).materialize(seed=0)
    opt, rng, losses = optimizer(model.parameters(), lr=lr), np.random.default_rng(0), []
    for _ in range(steps):
        chosen = rng.integers(0, len(pictures), 64)
        loss = nn.CrossEntropyLoss()(model(Tensor(pictures[chosen])), labels[chosen])
        if clear:
            opt.zero_grad()
        loss.backward(np.float32(scale))
        opt.step()
        losses.append(loss.item())
    return losses


runs = {"cleared each step": train(optim.SGD, 0.3), "zero_grad forgotten": train(optim.SGD, 0.3, clear=False)}
figure, axes = plt.subplots(figsize=(7, 3.2))
for (name, losses), colour, style in zip(runs.items(), COLOURS, ("-", "--")):
    axes.plot(losses, style, color=colour, label=name)
axes.set_xlabel("step")
axes.set_ylabel("loss (nats)")
axes.set_ylim(0)
axes.grid(alpha=0.3)
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# ## A loss curve proves nothing
#
# Now a bug that no loss curve shows: every gradient is four times too large, as happens when a loss is summed
# over four ranks or microbatches and never divided. SGD takes steps four times as long, and here that even
# looks better. Adam divides each gradient by its own size, so the factor cancels, and nothing shows at all.

# %%
figure, panels = plt.subplots(1, 2, figsize=(8.5, 3.2), sharey=True)
curves = {}
for axes, (name, optimizer, lr) in zip(panels, (("SGD", optim.SGD, 0.1), ("Adam", optim.Adam, 0.003))):
    for scale, colour, style in ((1, COLOURS[0], "-"), (4, COLOURS[1], "--")):
        curves[name, scale] = train(optimizer, lr, scale=scale)
        axes.plot(curves[name, scale], style, color=colour, label=f"gradient × {scale}")
    axes.set_title(name, loc="left", fontsize=10)
    axes.set_xlabel("step")
    axes.grid(alpha=0.3)
panels[0].set_ylabel("loss (nats)")
panels[0].legend(frameon=False)
plt.show()
for name in ("SGD", "Adam"):
    apart = max(abs(a - b) for a, b in zip(curves[name, 1], curves[name, 4]))
    print(f"{name:<5} largest difference between the two loss curves: {apart:.1e}")

# %% [markdown]
# So everything parallel in minipar is judged by its **gradients and weights under SGD**, against the serial
# run, and never by a loss curve alone. `minipar verify` is that comparison.
#
# ## Where to read on
#
# - `minipar/tape.py`: `Node`, `Leaf`, and `Backward.run`, the loop.
# - `minipar/tensor.py`: `primitive` and `record`, which turn a function on arrays into an operation.
# - `minipar/ops/`: the primitives, each with its gradient beside it.
#
# Then the exercise: `minipar start 01 my/01`.
#
# ## Check yourself
#
# **1.** $y = a^2 (a + b)$ at $a = 2$, $b = 3$. How many nodes has the tape, leaves included, and what are the
# gradients?

# %%
a, b = (Tensor(np.array(value), requires_grad=True) for value in (2.0, 3.0))
y = a * a * (a + b)
nodes = nodes_of(y)
y.backward()
print(len(nodes), "nodes:", ", ".join(node.name for node in nodes))
print(f"dy/da = 3a² + 2ab = {a.grad:.0f}, dy/db = a² = {b.grad:.0f}")

# %% [markdown]
# **2.** How often does backward call a vjp in the chain $h \leftarrow h + h$ of 60 steps?

# %%
calls = []


@primitive
def doubled(h, same):
    def vjp(g):
        calls.append(1)
        return g, g

    return h + same, vjp


h = Tensor(np.array(1.0), requires_grad=True)
for _ in range(60):
    h = doubled(h, h)
h.backward()
print(len(calls), "calls, one a node")

# %% [markdown]
# **3.** At which ε is the central difference above best, in each dtype?

# %%
for dtype, values in errors.items():
    best = int(np.argmin(values))
    print(f"{np.dtype(dtype).name}: ε = {sizes[best]:.0e}, relative error {values[best]:.0e}")

# %% [markdown]
# **4.** Of what the tape held above, how much is explained by one activation of shape (512, 256) a layer in
# float64?

# %%
activations = len(layers) * 512 * 256 * 8 / 2**20
print(f"{activations:.2f} MiB of {held_by['forward, recorded']:.2f} MiB: the output of each tanh is saved")
