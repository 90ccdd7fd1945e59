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
# # 05 · Buckets and overlap
#
# **How is the communication of gradients hidden behind the computation of others?**
#
# In lesson 04 gradients were summed one parameter at a time, after backward. Both halves of this sentence
# waste time. Many small messages each pay α; and while backward computes, the wires are idle, though the last
# layers' gradients are complete long before the first layers'.
#
# Read beside it: `minipar/parallel/buckets.py` and `DataParallel._gradient_ready` in
# `minipar/parallel/data_parallel.py`.

# %%
import matplotlib.pyplot as plt
import numpy as np

import minipar
from minipar import Tensor, nn
from minipar.comm import Clock
from minipar.models import GPT, MLP, GPTConfig, MLPConfig
from minipar.parallel import DataParallel
from minipar.parallel.buckets import make_buckets
from minipar.plot import COLOURS

LAYERS, WIDTH, RANKS = 8, 64, 8
LAYER_SECONDS = 250e-6  # what backward of one layer is declared to take
clock = Clock(alpha=10e-6, beta=1e-9)

# %% [markdown]
# ## A clock for backward
#
# Lesson 03's clock charges messages; computation has to be declared. A parameter's **hook** is called as soon
# as its gradient is complete, so a hook is the place to declare what backward of that layer took. A watched
# communicator notes when each all-reduce is asked for. With these two the engine's own `DataParallel` draws its
# own timeline.


# %%
class Watched:
    """The communicator of this rank, which notes (time, bytes) of each all-reduce that is begun."""

    def __init__(self, comm):
        self.comm, self.asked = comm, []

    def __getattr__(self, name):
        return getattr(self.comm, name)

    def all_reduce_async_(self, x):
        self.asked.append((self.comm.now(), x.nbytes))
        return self.comm.all_reduce_async_(x)


def backward_on(bucket_mb, overlap, wires, layer_seconds):
    """Run one backward on this rank; return the spans of its computation and communication, and its end."""
    comm = Watched(minipar.world())
    model = MLP(MLPConfig(inputs=WIDTH, classes=WIDTH, width=WIDTH, layers=LAYERS)).materialize(0, "float64")
    computed = []

    def declare(p):
        start = comm.now()
        comm.compute(layer_seconds)
        computed.append((start, comm.now()))

    for layer in model.layers:
        layer.fc.bias.register_hook(declare)  # of the two parameters of a layer, the first to be complete
    parallel = DataParallel(model, comm, bucket_mb=bucket_mb, overlap=overlap)
    begin = comm.now()
    x, y = np.ones((2, WIDTH)), np.zeros(2, np.int64)
    (model.loss(parallel(Tensor(x)), y) / (2 * comm.size)).backward()
    sent, free = [], 0.0
    for asked, n_bytes in comm.asked:  # one after the other: a group has one set of wires
        start = max(asked, free)
        free = start + wires.collective("all_reduce", n_bytes, comm.size)
        sent.append((start, free))
    assert np.isclose(comm.now(), max(sent[-1][1], computed[-1][1]))  # the spans are the clock's
    return [np.array(spans) - begin for spans in (computed, sent)] + [comm.now() - begin]


def measure(bucket_mb, overlap, wires=clock, layer_seconds=LAYER_SECONDS, ranks=RANKS):
    return minipar.launch(backward_on, ranks, bucket_mb, overlap, wires, layer_seconds, clock=wires)[0]


# %% [markdown]
# Eight layers of 64 × 64 in float64, on eight ranks; the upper bars compute, the lower ones communicate:

# %%
LAYER_MIB = 8 * (WIDTH * WIDTH + WIDTH) / 2**20
ONE_EACH, TWO_LAYERS, ALL = 1e-6, 2 * LAYER_MIB, 100.0  # MiB a bucket
ways = {
    "one message a parameter,\nafter backward": (ONE_EACH, False),
    "one message for all,\nafter backward": (ALL, False),
    "buckets of two layers,\nduring backward": (TWO_LAYERS, True),
}
figure, axes = plt.subplots(figsize=(10, 4), layout="constrained")
for row, way in enumerate(ways.values()):
    computed, sent, end = measure(*way)
    kinds = ((0.2, computed, COLOURS[0], "backward"), (-0.2, sent, COLOURS[1], "all-reduce"))
    for level, spans, colour, label in kinds:
        bars = [(1e3 * a, 1e3 * (b - a)) for a, b in spans]
        axes.broken_barh(bars, (-row + level - 0.17, 0.34), color=colour, edgecolor="white", label=label)
    axes.text(1e3 * end, -row, f"  {1e3 * end:.2f} ms", va="center")
axes.set_yticks([0, -1, -2], list(ways))
axes.set_xlim(0, 5.5)
axes.set_xlabel("time since backward began (ms)")
handles, names = axes.get_legend_handles_labels()
axes.legend(handles[:2], names[:2], frameon=False, loc="lower right")
axes.spines[["top", "right"]].set_visible(False)

# %% [markdown]
# The first step, from one message a parameter to one for all, saves α. The second, from after to during, hides
# what is left behind the computation. What sticks out behind the end of backward is **exposed**: only that
# makes a step longer.
#
# ## What has to be sent
#
# A GPT has a dozen tensors a block, most of them tiny. These are the shapes of a model of 3.2 million
# parameters; it is not materialised, so nothing is allocated here.

# %%
gpt = GPT(GPTConfig(vocab=96, seq_len=128, width=256, layers=4, heads=4))
sizes = np.array([4 * int(np.prod(p.global_shape)) for p in gpt.parameters()])  # float32
separate = sum(clock.collective("all_reduce", n, RANKS) for n in sizes)
together = clock.collective("all_reduce", sizes.sum(), RANKS)
print(
    f"{len(sizes)} tensors, {sizes.sum() / 2**20:.1f} MiB; {np.sum(sizes <= 4096)} of them are 4 KiB or less"
)
print(f"{RANKS} ranks, one all-reduce each: {1e3 * separate:.2f} ms; one for all: {1e3 * together:.2f} ms")
print(
    f"the difference is {len(sizes) - 1} times 2 (N-1) α = {1e3 * (len(sizes) - 1) * 14 * clock.alpha:.2f} ms"
)

# %% [markdown]
# ## A bucket is one array, gradients are views of it
#
# To send many arrays as one they have to lie in one. Copying them there and back would cost time and memory.
# So the bucket comes first: one flat array, and each parameter's gradient is a *view* into it. Backward writes
# a gradient straight into its place (`grad_buffer`).


# %%
def where_gradients_lie():
    model = MLP(MLPConfig(inputs=4, classes=3, width=5, layers=2)).materialize(0, "float64")
    parallel = DataParallel(model, minipar.world())
    model.loss(parallel(Tensor(np.ones((2, 4)))), np.array([0, 1])).backward()
    bucket = parallel.buckets[0]
    for p in bucket.params:
        print(f"{p.name:19} {p.shape!s:7} lies in the bucket: {np.shares_memory(p.grad, bucket.flat)}")
    print(f"{bucket.flat.size} elements = {bucket.numel} gradients + {len(bucket.params)} flags")


where_gradients_lie()

# %% [markdown]
# ## Backwards order
#
# The listing began with the *last* layer. Buckets are filled from the end of the model, since backward gets
# there first: the first bucket is full, and can go, while most of backward is still to come. Here is the order
# in which gradients really arrive, noted by hooks.

# %%
model = MLP(MLPConfig(inputs=4, classes=3, width=5, layers=4)).materialize(0, "float64")
arrived = []
for p in model.parameters():
    p.register_hook(lambda p: arrived.append(p.name))
model.loss(model(Tensor(np.ones((2, 4)))), np.array([0, 1])).backward()
buckets = make_buckets(list(model.parameters()), 0.0005)
print("arrived:", " ".join(name.removeprefix("layers.") for name in arrived))
for i, bucket in enumerate(buckets):
    print(f"bucket {i}:", " ".join(p.name.removeprefix("layers.") for p in bucket.params))

# %% [markdown]
# ## A gradient is complete after its last use
#
# In a GPT with tied embeddings one matrix is used at both ends: by the output layer, whose backward comes
# first, and by the embedding, whose backward comes last. If its gradient were sent after the first of these,
# the second would be missing. The tape calls a hook once, when *all* uses have contributed (lesson 01).

# %%
tied = GPT(GPTConfig(vocab=11, seq_len=6, width=8, layers=2, heads=2)).materialize(0, "float64")
arrived = []
for p in tied.parameters():
    p.register_hook(lambda p: arrived.append(p.name))
tokens = np.arange(6)[None] % 11
tied.loss(tied(tokens), tokens).backward()
wte = next(name for name in arrived if "wte" in name)
print(
    f"{len(arrived)} gradients; {wte}: called {arrived.count(wte)} time, as number {arrived.index(wte) + 1}"
)

# %% [markdown]
# It arrives at the very end, so the bucket that it is in can only go when backward is over. This is a reason why
# large embeddings are hard to hide.
#
# ## Overlap
#
# `all_reduce_async_` begins a sum and returns at once; `wait()` returns when it is done. What is computed between
# the two costs nothing extra, up to the time that the sum takes:


# %%
def begin_compute_wait(compute):
    comm = minipar.world()
    flat = np.zeros(100_000)
    work = comm.all_reduce_async_(flat)
    comm.compute(compute)
    work.wait()
    return comm.now()


alone = minipar.launch(begin_compute_wait, RANKS, 0.0, clock=clock)[0]
for compute in (0.0, 0.0005, 0.001, 0.002, 0.004):
    end = minipar.launch(begin_compute_wait, RANKS, compute, clock=clock)[0]
    exposed = end - compute
    print(
        f"computing {1e3 * compute:.1f} ms: {1e3 * end:.2f} ms, {1e3 * exposed:.2f} of {1e3 * alone:.2f} ms exposed"
    )

# %% [markdown]
# Meanwhile the array belongs to the operation: whoever writes into it before `wait()` has returned changes what
# is summed. In `DataParallel` nobody does, because a bucket is sent when its last gradient is in it, and backward
# waits for all buckets before it returns.
#
# ## Exposed and hidden
#
# For a step with backward time $T_b$ and communication $T_c$, the end lies between
#
# $$\max(T_b, T_c) \;\le\; T \;\le\; T_b + T_c, \qquad T_\text{exposed} = T - T_b.$$

# %%
print("bucket (MiB)  buckets  wires busy   exposed: after   during   hidden")
for bucket_mb in (ONE_EACH, LAYER_MIB, TWO_LAYERS, 4 * LAYER_MIB, ALL):
    computed, sent, after = measure(bucket_mb, False)
    _, _, during = measure(bucket_mb, True)
    backward = computed[-1][1]
    busy = sum(b - a for a, b in sent)
    hidden = 1 - (during - backward) / busy
    print(
        f"{bucket_mb:12.4g} {len(sent):8} {1e3 * busy:8.2f} ms {1e3 * (after - backward):12.2f} ms"
        f" {1e3 * (during - backward):5.2f} ms {100 * hidden:6.0f} %"
    )

# %% [markdown]
# One bucket for all hides nothing: it is full when backward is over. One bucket a parameter could begin at
# once, but pays so many α that the wires are busy for longer than backward. The best lies between, and depends
# on α. (The dips below are where the last bucket is left small: eight layers by six leave one of two.)

# %%
figure, axes = plt.subplots(figsize=(7.5, 4.2), layout="constrained")
layers_each = range(1, LAYERS + 1)
for colour, marker, alpha in zip(COLOURS, "os^", (1e-6, 10e-6, 20e-6)):
    exposed = []
    for layers in layers_each:
        computed, _, end = measure(layers * LAYER_MIB, True, wires=Clock(alpha, clock.beta))
        exposed.append(1e3 * (end - computed[-1][1]))
    axes.plot(layers_each, exposed, marker + "-", color=colour, label=f"α = {1e6 * alpha:.0f} µs")
axes.set_xlabel("layers in a bucket")
axes.set_ylabel("exposed communication (ms)")
axes.set_ylim(0)
axes.legend(frameon=False)
axes.grid(alpha=0.3)

# %% [markdown]
# ## What cannot be hidden
#
# The last bucket holds the first layers. It is full when backward is over, so its sum is always exposed, and
# nothing else needs to be, if the wires keep up:

# %%
computed, sent, end = measure(TWO_LAYERS, True)
last = sent[-1][1] - sent[-1][0]
print(f"exposed {1e3 * (end - computed[-1][1]):.3f} ms, the last bucket alone takes {1e3 * last:.3f} ms")

# %% [markdown]
# If they do not keep up, communication decides: buckets queue, and backward could as well be infinitely fast.
# Let the same model run on slower and slower wires:

# %%
print("  GB/s   backward   wires busy      step   hidden")
for beta in (0.5e-9, 1e-9, 4e-9, 16e-9, 64e-9):
    computed, sent, end = measure(TWO_LAYERS, True, wires=Clock(clock.alpha, beta))
    backward, busy = computed[-1][1], sum(b - a for a, b in sent)
    hidden = 1 - (end - backward) / busy
    print(
        f"{1e-9 / beta:6.3f} {1e3 * backward:7.2f} ms {1e3 * busy:9.2f} ms {1e3 * end:6.2f} ms {100 * hidden:6.0f} %"
    )

# %% [markdown]
# ## One order on all ranks
#
# A collective has no name. The first one that rank 0 begins is summed with the first one that rank 1 begins,
# whatever the two meant. If ranks send buckets as they become full, and that is not the same order everywhere,
# equal shapes mean *silent wrong numbers*, and nothing is reported:


# %%
def by_readiness():
    comm = minipar.world()
    buckets = {"a": np.full(2, 1.0), "b": np.full(2, 100.0)}  # sums on two ranks: 2 and 200
    order = "ab" if comm.rank == 0 else "ba"
    works = [comm.all_reduce_async_(buckets[name]) for name in order]
    for work in works:
        work.wait()
    return {name: values.tolist() for name, values in buckets.items()}


for rank, values in enumerate(minipar.launch(by_readiness, 2)):
    print(f"rank {rank}: {values}")

# %% [markdown]
# Therefore `DataParallel` sends buckets in one fixed order. A bucket that is full too early waits for those
# before it. Ranks may even run different parts of the model: here rank 1 does not use the layer `extra` at all.
# It still sends the bucket, with zeros, and the flags tell everyone that somebody used it.


# %%
class Branching(nn.Module):
    def __init__(self):
        self.always, self.extra, self.never = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x, use_extra):
        x = self.always(x)
        return self.extra(x) if use_extra else x


def unused_on_some():
    comm = minipar.world()
    model = Branching().materialize(0, "float64")
    parallel = DataParallel(model, comm, bucket_mb=ONE_EACH)
    parallel(Tensor(np.ones((1, 2))), comm.rank == 0).sum().backward()
    return {name: p.grad is not None for name, p in model.named_parameters() if name.endswith("weight")}


for rank, found in enumerate(minipar.launch(unused_on_some, 2)):
    print(f"rank {rank} has a gradient: {found}")

# %% [markdown]
# What nobody used has no gradient, as in a serial run: an optimizer with weight decay would move it otherwise.
#
# ## Equal, whatever the buckets
#
# Sums are taken in the order of ranks, so how they are bundled, and when they are sent, changes no bit:


# %%
def gradient_bits(bucket_mb, overlap):
    comm = minipar.world()
    model = GPT(GPTConfig(vocab=11, seq_len=6, width=8, layers=2, heads=2)).materialize(0)
    parallel = DataParallel(model, comm, bucket_mb=bucket_mb, overlap=overlap)
    ids = np.random.default_rng(comm.rank).integers(0, 11, (2, 6))
    (model.loss(parallel(ids), ids) / (12 * comm.size)).backward()
    return len(parallel.buckets), b"".join(p.grad.tobytes() for p in model.parameters())


found = [
    minipar.launch(gradient_bits, 3, bucket_mb, overlap)[0]
    for bucket_mb in (ONE_EACH, 0.002, ALL)
    for overlap in (True, False)
]
print(
    "buckets:", [count for count, _ in found], "- all bitwise equal:", len({bits for _, bits in found}) == 1
)

# %% [markdown]
# ## On real ranks
#
# There, hiding has a price: somebody has to move the messages. Some networks do it by themselves. On one
# machine a core does, and MPI gets on with it only while the program is inside MPI; `_send_full_buckets` looks
# in whenever a gradient arrives. `experiment.py` measures how much of the communication is hidden in the end:
#
#     mpirun -n 2 python lessons/05_buckets_and_overlap/experiment.py
#
# ## Check yourself
#
# **1.** How many seconds does one bucket for everything save, against one message a tensor, for the GPT above on
# 64 ranks?

# %%
separate = sum(clock.collective("all_reduce", n, 64) for n in sizes)
together = clock.collective("all_reduce", sizes.sum(), 64)
print(f"{1e3 * (separate - together):.1f} ms of {1e3 * separate:.1f} ms")

# %% [markdown]
# **2.** Backward becomes twice as fast (a better kernel), the wires stay. What happens to the step with buckets of
# two layers, and to the exposed part?

# %%
for seconds in (LAYER_SECONDS, LAYER_SECONDS / 2, LAYER_SECONDS / 4):
    computed, _, end = measure(TWO_LAYERS, True, layer_seconds=seconds)
    exposed = end - computed[-1][1]
    print(
        f"step {1e3 * end:.2f} ms = backward {1e3 * computed[-1][1]:.2f} ms + exposed {1e3 * exposed:.2f} ms"
    )

# %% [markdown]
# **3.** At which number of ranks do the wires become busier than backward, with one bucket a layer?

# %%
for ranks in (4, 8, 16, 32):
    computed, sent, end = measure(LAYER_MIB, True, ranks=ranks)
    busy, backward = sum(b - a for a, b in sent), computed[-1][1]
    print(
        f"{ranks:2} ranks: wires {1e3 * busy:.2f} ms, backward {1e3 * backward:.2f} ms, step {1e3 * end:.2f} ms"
    )

# %% [markdown]
# **4.** Which fraction of the elements sent are flags, in the GPT above?

# %%
print(
    f"{len(sizes)} of {sizes.sum() // 4 + len(sizes):,} elements: {100 * len(sizes) / (sizes.sum() / 4):.4f} %"
)

# %% [markdown]
# Now write your own: `minipar start 05 my_05`, then `minipar grade 05 --file my_05/exercise.py`.
