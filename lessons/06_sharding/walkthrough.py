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
# # 06 · Parameter sharding and ZeRO
#
# In data parallelism every rank keeps all parameters, all gradients and the whole optimizer state, and all
# ranks keep the *same* ones. **How can ranks that share a batch also share what they hold, and what does each
# byte saved cost in traffic?**
#
# First, partition policies: plain rules that say which rank owns which parameter. Then ZeRO, the rule that
# cuts everything into equal ranges, in its three stages. The code to read is `minipar/parallel/partition/`
# and `minipar/parallel/zero/`.

# %%
import contextlib
import copy
import io

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Image

import minipar
from minipar import Tensor, nn, ops, optim, plot
from minipar.comm import Clock, balanced
from minipar.errors import UsageError
from minipar.models import GPT, GPTConfig, Model
from minipar.parallel.data_parallel import DataParallel
from minipar.parallel.memory import held, zero_formula
from minipar.parallel.partition.assignment import Assignment
from minipar.parallel.partition.devices import parse_devices
from minipar.parallel.partition.owner_sharding import ShardedByPolicy
from minipar.parallel.partition.policies import by_bytes, by_cost, by_count, by_devices, by_kind, items_of
from minipar.parallel.partition.profile import profile_blocks
from minipar.parallel.zero import Zero


def show(draw, *what, **options):
    """Return the picture that one of `minipar.plot`'s functions draws."""
    file = io.BytesIO()
    draw(*what, file, **options)
    return Image(file.getvalue(), width=800)


# %% [markdown]
# The lesson in one picture. A small GPT trains for one step with AdamW on four ranks: as plain data
# parallelism (stage 0) and under ZeRO's stages 1, 2 and 3. `held` looks at the arrays that a rank really has:
# parameters, gradients at their largest during backward, and Adam's two moments.

# %%
CONFIG = GPTConfig(vocab=96, seq_len=16, width=64, layers=4, heads=4)
STAGES = (0, 1, 2, 3)


def one_step(stage, microbatches=2, batch=16, watch=True):
    """One training step on this rank. Returns bytes held, the ledger with what was sent, time and weights."""
    comm = minipar.world()
    ids = np.random.default_rng(0).integers(0, CONFIG.vocab, (batch, CONFIG.seq_len + 1))
    mine = ids[comm.rank * batch // comm.size : (comm.rank + 1) * batch // comm.size]
    model = GPT(CONFIG)
    if stage == 0:
        wrapper = DataParallel(model.materialize(seed=0), comm)
        optimizer = optim.AdamW(model.parameters())
    else:
        wrapper = Zero(model, comm, stage).materialize(seed=0)
        optimizer = optim.AdamW([piece for _, piece in wrapper.shards()])
    peak = [0]
    for p in model.parameters() if watch else ():  # a hook runs whenever a gradient is complete
        p.register_hook(lambda _: peak.append(held(model if stage == 0 else wrapper).gradients))
    comm.ledger.reset()  # the broadcast of the first values is not part of a step
    begin = comm.now()
    for i, piece in enumerate(np.array_split(mine, microbatches)):
        waiting = contextlib.nullcontext() if i == microbatches - 1 else wrapper.no_sync()
        with waiting:
            loss = model.loss(wrapper(piece[:, :-1]), piece[:, 1:]) / (batch * CONFIG.seq_len)
            loss.backward()
    peak.append(held(model if stage == 0 else wrapper).gradients)
    wrapper.step(optimizer)
    seconds, sent = comm.now() - begin, copy.deepcopy(comm.ledger)
    after = held(model if stage == 0 else wrapper, optimizer)
    if stage == 0:
        weights = model.state_dict()
    else:
        weights = {name: w.copy() for name, w in wrapper.full().items()}
    return {
        "bytes": {"parameters": after.parameters, "gradients": max(peak), "optimizer": after.optimizer},
        "after": after.total,
        "sent": sent,
        "seconds": seconds,
        "weights": weights,
    }


RANKS = 4
NUMEL = sum(int(np.prod(p.global_shape)) for p in GPT(CONFIG).parameters())
results = {stage: minipar.launch(one_step, RANKS, stage)[0] for stage in STAGES}

figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
left = np.zeros(len(STAGES))
for colour, kind in zip(plot.COLOURS, ("parameters", "gradients", "optimizer")):
    size = np.array([results[stage]["bytes"][kind] / NUMEL for stage in STAGES])
    axes.barh([f"stage {stage}" for stage in STAGES], size, left=left, color=colour, label=kind)
    left += size
axes.invert_yaxis()
axes.set_xlabel(f"bytes a parameter, on one of {RANKS} ranks (float32, AdamW)")
axes.legend(frameon=False, loc="lower right")
plt.show()

# %% [markdown]
# ## What a step keeps
#
# In float32 with Adam a parameter costs 16 bytes: 4 for its value, 4 for its gradient, 8 for the two moments.
# Only the first is needed to compute with. The other twelve are needed by the optimizer alone, and it does
# not matter on which rank the optimizer updates which parameter. That is the opening for sharding.

# %%
plain = results[0]["bytes"]
for kind, size in plain.items():
    print(f"{kind:<11} {size:>9,} bytes = {size / NUMEL:5.2f} a parameter")
print(f"{'together':<11} {sum(plain.values()):>9,} bytes = {sum(plain.values()) / NUMEL:5.2f} a parameter")

# %% [markdown]
# ## Partition policies: who owns what
#
# A policy takes a list of parameters and returns an `Assignment`: every element on exactly one device. To see
# how policies differ, take a model whose layers differ: two-dimensional convolutions below, linear layers on
# top, as in AlexNet.


# %%
class Features(nn.Module):
    """Convolution, ReLU, pooling: (N, C, H, W) → (N, O, H/2, W/2)."""

    def __init__(self, inputs, outputs):
        self.conv, self.pool = nn.Conv2d(inputs, outputs, 3, padding=1), nn.MaxPool2d(2)

    def forward(self, x):
        return self.pool(ops.relu(self.conv(x)))


class Dense(nn.Module):
    """Flatten and multiply: (N, ...) → (N, O)."""

    def __init__(self, inputs, outputs):
        self.fc = nn.Linear(inputs, outputs)

    def forward(self, x):
        return ops.relu(self.fc(ops.flatten(x, 1)))


class SmallAlexNet(Model):
    """Images (N, 3, 16, 16) → logits (N, 10)."""

    def __init__(self):
        self.layers = nn.ModuleList(
            [Features(3, 16), Features(16, 32), Features(32, 32), Dense(128, 1024), Dense(1024, 10)]
        )
        self.blocks = list(self.layers)
        self.loss = nn.CrossEntropyLoss(reduction="sum")


items = items_of(SmallAlexNet())
for item in items:
    print(f"{item.name:<21} {item.kind:<12} {item.shape!s:<16} {item.bytes:>8,} bytes")

# %% [markdown]
# A profile run says where the time goes. The convolutions hold a small part of the bytes and do nearly all of
# the work; for the linear layers it is the other way round (Krizhevsky 2014).

# %%
images = np.random.default_rng(1).standard_normal((64, 3, 16, 16)).astype("float32")
seconds = minipar.launch(profile_blocks, 1, SmallAlexNet(), images)[0]  # launch: BLAS with one thread
conv_bytes = sum(item.bytes for item in items if item.kind == "convolution")
print("milliseconds by block:", ", ".join(f"{1e3 * s:.2f}" for s in seconds))
print(f"convolutions: {conv_bytes / sum(item.bytes for item in items):.0%} of the bytes,", end=" ")
print(f"{sum(seconds[:3]) / sum(seconds):.0%} of the time")

# %% [markdown]
# **By kind.** One rule for each kind of layer: convolutions stay whole, linear layers are cut by output
# feature. Cutting the former would gain no memory.

# %%
print(by_kind(items, 3))

# %% [markdown]
# **By bytes.** Whole parameters, the largest first, each onto the device that holds least so far. Simple, and
# never worse than 4/3 of the best placement (Graham 1969). But a parameter is never cut, so the largest one
# is a floor under the fullest device.

# %%
print(by_bytes(items, 3))

# %% [markdown]
# **By count.** All elements laid end to end, the line cut into equal runs. Perfect balance within one
# element, at the price of pieces that are no tensor's natural part. This is what ZeRO does.

# %%
print(by_count(items, 3))

# %% [markdown]
# **By cost.** Whole blocks in order, cut so that the slowest stage is as fast as possible. This one makes
# *stages* for layer parallelism, which lesson 8 turns into a pipeline. It balances time, here the seconds just
# measured, and lets memory fall where it may: compare the two halves of the picture.

# %%
show(plot.partition_bars, by_cost(items, 3, seconds))

# %% [markdown]
# **By devices.** The same for unequal devices: a stage's time is its cost by its device's speed, and what it
# holds must fit its device's memory. Here the third device works at half the speed.

# %%
devices = parse_devices("2xA,1xB", speeds={"A": 1.0, "B": 0.5})
print(by_devices(items, devices, costs=[6, 4, 2, 3, 3]))

# %% [markdown]
# Whatever the policy, no element may be lost and none may be held twice. An assignment that breaks this
# cannot be made: the check is in the constructor (`minipar/parallel/partition/assignment.py`).

# %%
whole = by_bytes(items, 3)
try:
    Assignment("mistake", whole.items, whole.devices, whole.parts[1:])
except UsageError as error:
    print(error)

# %% [markdown]
# ## Training by owner
#
# `ShardedByPolicy` trains with any of these. After backward the sum of each piece's gradients goes to its
# owner and to nobody else; the owner takes the optimizer's step; then it sends the new values to all.
#
# With pieces laid end to end in the order of their owners, the first is one **reduce-scatter** and the last
# one **all-gather**, both with unequal counts.

# %%
labels = np.random.default_rng(2).integers(0, 10, 64)


def train_by(policy, steps=3):
    comm = minipar.world()
    model = SmallAlexNet().materialize(seed=0, dtype="float64")
    sharded = ShardedByPolicy(model, comm, policy(items_of(model), comm.size))
    optimizer = optim.Adam(sharded.optimizer_params(), lr=1e-3)
    mine = np.array_split(np.arange(64), comm.size)[comm.rank]
    comm.ledger.reset()
    for _ in range(steps):
        sharded.forward_backward(images[mine].astype("float64"), labels[mine], count=64)
        sharded.step(optimizer)
    moments = sum(value.nbytes for entry in optimizer.state.values() for value in entry.values()
                  if hasattr(value, "nbytes"))  # fmt: skip
    return model.state_dict(), comm.ledger, moments


def train_serially(steps=3):
    model = SmallAlexNet().materialize(seed=0, dtype="float64")
    optimizer = optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(steps):
        model.zero_grad()
        (model.loss(model(Tensor(images.astype("float64"))), labels) / 64).backward()
        optimizer.step()
    return model.state_dict()


serial = minipar.launch(train_serially, 1)[0]
for policy in (by_kind, by_bytes, by_count):
    ranks = minipar.launch(train_by, 3, policy)
    error = max(np.abs(ranks[0][0][name] - serial[name]).max() for name in serial)
    moments = ", ".join(f"{moments:,}" for _, _, moments in ranks)
    print(f"{policy.__name__:<9} largest difference from serial {error:.1e}; bytes of moments {moments}")
print(f"\n{ranks[0][1]}")

# %% [markdown]
# The result does not depend on the policy; who keeps how much does. Under `by_bytes` one rank keeps most of
# Adam's state, since one weight is larger than all others together.

# %% [markdown]
# ## The identity behind ZeRO
#
# Lesson 3: a ring all-reduce *is* a reduce-scatter followed by an all-gather. In between, each rank holds the
# finished sum of one range. If it takes the optimizer's step there and then, and the all-gather carries new
# parameters instead of summed gradients, nothing more is sent than before, and the optimizer's state need
# exist for one range only. That is ZeRO stage 1, in a few lines:


# %%
def momentum_step_by_range(weights, gradient, momentum, lr=0.1, beta=0.9):
    """weights (n,) whole; gradient (n,) this rank's own; momentum (n / ranks,) of this rank's range."""
    comm = minipar.world()
    counts = balanced(len(weights), comm.size)
    start = sum(counts[: comm.rank])
    total = comm.reduce_scatter(gradient, counts)  # (n / ranks,) the sum over ranks, of this range
    momentum = beta * momentum + total
    own = weights[start : start + counts[comm.rank]] - lr * momentum
    return comm.all_gather(own, counts), momentum


N = 10
gradients = np.random.default_rng(3).standard_normal((RANKS, N))


def two_steps():
    comm = minipar.world()
    weights, momentum = np.zeros(N), np.zeros(balanced(N, comm.size)[comm.rank])
    for _ in range(2):
        weights, momentum = momentum_step_by_range(weights, gradients[comm.rank], momentum)
    return weights, comm.ledger


g = gradients.sum(axis=0)
expected = -0.1 * g - 0.1 * (0.9 * g + g)
weights, ledger = minipar.launch(two_steps, RANKS)[0]
print("largest difference from whole momentum:", np.abs(weights - expected).max())
print(ledger)

# %% [markdown]
# ## Units: what is cut, gathered and freed together
#
# `Zero` does the same for a model, block by block: the parameters of a block are one flat array, padded to a
# multiple of the number of ranks, and rank r owns the r-th range. The tied embedding belongs to two blocks
# and makes up a unit of its own. Open `minipar/parallel/zero/flat_shards.py`.

# %%
print(minipar.launch(lambda: Zero(GPT(CONFIG), minipar.world(), 1).materialize(seed=0).table(), RANKS)[0])

# %% [markdown]
# ## Bytes held
#
# Write Ψ for the number of parameters, N for the ranks, and take Adam in float32. Rajbhandari et al. 2020
# give for the bytes on a rank:
#
# | stage | parameters | gradients | optimizer state |
# |---|---|---|---|
# | 0 | 4Ψ | 4Ψ | 8Ψ |
# | 1 | 4Ψ | 4Ψ | 8Ψ/N |
# | 2 | 4Ψ | 4Ψ/N | 8Ψ/N |
# | 3 | 4Ψ/N | 4Ψ/N | 8Ψ/N |
#
# Measured, beside the formula. In stages 2 and 3 the measured gradients are above 4Ψ/N: at the peak there are
# also the whole gradients of the one unit that backward is in, and of the shared one.

# %%
print("stage    parameters   formula    gradients   formula    optimizer   formula")
for stage in STAGES:
    formula, found = zero_formula(NUMEL, RANKS, stage, itemsize=4, state=2), results[stage]["bytes"]
    cells = [f"{found[kind]:>10,} {int(formula[kind]):>10,}" for kind in found]
    print(f"{stage:>5}   {'  '.join(cells)}")

# %% [markdown]
# With more ranks stages 1 and 2 approach floors, 8Ψ and 4Ψ; only stage 3 goes on falling. Lines are the
# formula, circles were measured after the step (when no unit is whole).

# %%
figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
many = np.arange(1, 17)
for colour, stage, line in zip(plot.COLOURS, STAGES, ("-", "--", "-.", ":")):
    formula = [float(sum(zero_formula(1, n, stage, 4, 2).values())) for n in many]
    axes.plot(many, formula, line, color=colour, label=f"stage {stage}")
for ranks in (2, 4, 8, 16):
    axes.plot(
        ranks, minipar.launch(one_step, ranks, 3, 1, watch=False)[0]["after"] / NUMEL, "ko", markersize=5
    )
axes.set(xlabel="ranks", ylabel="bytes a parameter on each rank", xlim=(1, 16), ylim=(0, 17))
axes.grid(alpha=0.3)
axes.legend(frameon=False, loc="upper right", bbox_to_anchor=(1, 0.93))
plt.show()

# %% [markdown]
# ## Elements moved
#
# What a rank sends in a step, as a ring would, in multiples of Ψ(N−1)/N and with k microbatches:
#
# - stage 0: an all-reduce of gradients, **2**;
# - stage 1: a reduce-scatter of gradients and an all-gather of parameters, **2**;
# - stage 2: no rank keeps whole gradients, so each microbatch is reduce-scattered: **k + 1**;
# - stage 3: parameters are gathered for forward and again for backward of each microbatch: **3k**.
#
# The ledger counts every call; `ring_elements` is what it would send as a ring.


# %%
def moved(stage, microbatches, ranks=RANKS):
    """Return the elements of gradients and parameters sent by a rank, in multiples of Ψ(N-1)/N."""
    ledger = minipar.launch(one_step, ranks, stage, microbatches, watch=False)[0]["sent"]
    flags = [row for row in ledger.rows("all_reduce") if row.bytes == row.elements]  # one byte a tensor
    elements = ledger.total().ring_elements - sum(row.ring_elements for row in flags)
    return float(elements / NUMEL * ranks / (ranks - 1))


FORMULAS = {0: lambda k: 2, 1: lambda k: 2, 2: lambda k: k + 1, 3: lambda k: 3 * k}
traffic = {(stage, k): moved(stage, k) for stage in STAGES for k in (1, 2, 4)}
print("stage   k = 1  formula   k = 2  formula   k = 4  formula")
for stage in STAGES:
    print(f"{stage:>5}" + "".join(f"  {traffic[stage, k]:6.3f}  {FORMULAS[stage](k):>7}" for k in (1, 2, 4)))

# %% [markdown]
# So stages 1 and 2 are free for one microbatch, and stage 3 costs half as much again. The remainder above the
# formula in stage 0 is one flag a tensor (did anybody use it), sent along with the buckets; the other stages
# send their flags as bytes in a call of their own, left out here.
#
# Many microbatches change the picture: they are how a small rank reaches a large batch, and stages 2 and 3
# pay for each of them.

# %%
figure, axes = plt.subplots(figsize=(7, 3), layout="constrained")
ks = np.arange(1, 9)
for colour, stage, line in zip(plot.COLOURS, STAGES, ("-", "--", "-.", ":")):
    axes.plot(ks, [FORMULAS[stage](k) for k in ks], line, color=colour, label=f"stage {stage}")
    axes.plot([1, 2, 4], [traffic[stage, k] for k in (1, 2, 4)], "o", color=colour, markersize=5)
axes.set(xlabel="microbatches k", ylabel="elements sent / (Ψ (N−1)/N)")
axes.grid(alpha=0.3)
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# ## Nothing else changes
#
# The weights after the step are the same in all stages, up to the order in which floats were added. Compare
# with the data-parallel run at the top. (Over more steps and in float64: `minipar verify gpt --ranks 4
# --zero 3`.)

# %%
for stage in (1, 2, 3):
    weights = results[stage]["weights"]
    worst = max(np.abs(weights[name] - w).max() for name, w in results[0]["weights"].items())
    print(f"stage {stage}: largest difference of any weight from data parallelism {worst:.1e}")

# %% [markdown]
# In stage 3 a parameter has no values outside its block's forward and backward. Reading one says so instead of
# giving a wrong number. `full()` gathers, for whoever needs the whole.


# %%
def peek():
    zero = Zero(GPT(CONFIG), minipar.world(), 3).materialize(seed=0)
    try:
        return zero.model.h[0].mlp.c_fc.weight.data
    except UsageError as error:
        return str(error), zero.full()["h.0.mlp.c_fc.weight"].shape


print(*minipar.launch(peek, 2)[0], sep="\n")

# %% [markdown]
# ## What sharding makes harder
#
# Whatever looks at *all* gradients has to communicate now. Clipping is the usual trap: a rank that clips by
# the norm of its own range scales it by another factor than its neighbours do. The norm of the whole is the
# root of the *sum of squares* over ranks:
#
# $$\lVert g \rVert = \sqrt{\textstyle\sum_r \lVert g_r \rVert^2}$$


# %%
def norms():
    comm = minipar.world()
    own = comm.reduce_scatter(gradients[comm.rank], balanced(N, comm.size))
    square = comm.all_reduce(np.array([own @ own]))[0]
    return float(np.linalg.norm(own)), float(np.sqrt(square))


print("each rank's own norm:", ", ".join(f"{own:.3f}" for own, _ in minipar.launch(norms, RANKS)))
print("from the squares:    ", ", ".join(f"{whole:.3f}" for _, whole in minipar.launch(norms, RANKS)))
print(f"serial:               {np.linalg.norm(g):.3f}")

# %% [markdown]
# ## When the wire is slow
#
# Bytes are not the only cost: every unit's collective has its N − 1 messages of latency α. On the virtual
# clock a step of pure communication takes, for 8 ranks, 20 µs a message and 1 GB/s:

# %%
slow = Clock(alpha=20e-6, beta=1e-9)
for stage in STAGES:
    took = max(result["seconds"] for result in minipar.launch(one_step, 8, stage, 1, watch=False, clock=slow))
    print(f"stage {stage}: {1e3 * took:.2f} ms")

# %% [markdown]
# A model this small is all latency: stage 3 makes three collectives a unit where data parallelism makes one
# for everything. `Zero` hides much of that behind computation, by gathering the next block while one
# computes (`minipar/parallel/zero/gather.py`).
#
# Now `exercise.py`: place parameters by bytes, cut them into flat ranges, write a step of ZeRO 1 and a linear
# layer of ZeRO 3, and find the fault in a training step that clips. `experiment.py` measures on real MPI
# ranks: `mpirun -n 4 python lessons/06_sharding/experiment.py`.

# %% [markdown]
# ## Check yourself
#
# **1.** A rank has 1 GiB for parameters, gradients and Adam's state in float32. How many parameters fit, for
# each stage, on 8 ranks? By how much more than stage 0 does stage 3 hold?

# %%
fits = {stage: int(2**30 / sum(zero_formula(1, 8, stage, 4, 2).values())) for stage in STAGES}
for stage, numel in fits.items():
    print(f"stage {stage}: {numel / 1e6:6.1f} million parameters, {numel / fits[0]:.2f} times stage 0")

# %% [markdown]
# **2.** How many times the traffic of stage 1 does stage 3 need with four microbatches?

# %%
print(f"formula {FORMULAS[3](4) / FORMULAS[1](4):.1f}, measured {traffic[3, 4] / traffic[1, 4]:.1f}")

# %% [markdown]
# **3.** From which number of ranks on does stage 3 hold less than a tenth of what stage 0 holds?

# %%
whole = sum(zero_formula(1, 1, 0, 4, 2).values())
print(next(n for n in range(1, 100) if sum(zero_formula(1, n, 3, 4, 2).values()) < whole / 10), "ranks")

# %% [markdown]
# **4.** Under `by_bytes`, how much more does the fullest of three devices hold than a perfect third?

# %%
full = max(by_bytes(items, 3).bytes(device) for device in range(3))
print(f"{full / (sum(item.bytes for item in items) / 3):.2f} times a third")
