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
# # 04 · Data parallelism
#
# **How do ranks that each see a part of the batch train exactly the serial model?**
#
# Every rank holds the whole model and computes the gradient of its share of the batch. The ranks combine
# their gradients, all take the same step, and go on with equal models. Here is where it goes wrong: most
# mistakes leave a loss curve that looks fine. So this lesson compares gradients, never curves.
#
# Read beside it: `minipar/parallel/data_parallel.py` and `minipar/parallel/local_sgd.py`.

# %%
import subprocess
import sys
import time

import matplotlib.pyplot as plt
import numpy as np

import minipar
from minipar import Tensor, optim
from minipar.comm import Clock
from minipar.comm.launcher import find_mpirun, job_environment
from minipar.data import Loader, load, share
from minipar.models import MLP, MLPConfig
from minipar.parallel import DataParallel, LocalSGD
from minipar.plot import COLOURS

digits = load("digits")  # 8 x 8 images of handwritten digits
BATCH = 10  # samples in the global batch: not divisible by 4


def build(seed=0):
    """A serial model of three layers, in float64 so that rounding is far below any real difference."""
    return MLP(MLPConfig(inputs=64, classes=10, width=32, layers=3)).materialize(seed, "float64")


def batches(steps, rank=0, ranks=1):
    return Loader(digits.train, BATCH, rank=rank, ranks=ranks, dtype="float64", prefetch=0).steps(steps)


def flat_gradient(model):
    return np.concatenate([p.grad.ravel() for p in model.parameters()])


def flat_weights(model):
    return np.concatenate([p.data.ravel() for p in model.parameters()])


# %% [markdown]
# ## One picture first
#
# The serial loop, and the same on four ranks in two versions that differ in one line: what a rank divides
# its loss by. Nothing of it is hidden: gradients are summed by hand with one all-reduce a parameter.


# %%
def serial(steps):
    model = build()
    update, losses, grads = optim.SGD(model.parameters(), lr=0.2), [], []
    for batch in batches(steps):
        model.zero_grad()
        loss = model.loss(model(Tensor(batch.inputs)), batch.targets) / batch.count
        loss.backward()
        losses.append(loss.item())
        grads.append(flat_gradient(model))
        update.step()
    return losses, grads


def by_hand(steps, mean_of_means=False):
    comm, model = minipar.world(), build()
    update, losses, grads = optim.SGD(model.parameters(), lr=0.2), [], []
    for batch in batches(steps, comm.rank, comm.size):
        divisor = batch.local_count * comm.size if mean_of_means else batch.count
        model.zero_grad()
        loss = model.loss(model(Tensor(batch.inputs)), batch.targets) / divisor
        loss.backward()
        for p in model.parameters():
            p.grad = comm.all_reduce(p.grad)
        losses.append(float(comm.all_reduce(loss.data)))
        grads.append(flat_gradient(model))
        update.step()
    return losses, grads


STEPS = 60
whole = serial(STEPS)
right = minipar.launch(by_hand, 4, STEPS)[0]
wrong = minipar.launch(by_hand, 4, STEPS, mean_of_means=True)[0]

# %%
figure, (left, middle) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
for colour, style, name, (losses, grads) in zip(
    COLOURS,
    ("-", "--", ":"),
    ("serial", "4 ranks, divided by the global count", "4 ranks, mean of the ranks' means"),
    (whole, right, wrong),
):
    left.plot(losses, style, color=colour, label=name)
    if name != "serial":
        errors = [np.abs(a - b).max() / np.abs(b).max() for a, b in zip(grads, whole[1])]
        middle.semilogy(errors, style, color=colour, label=name)
left.set_ylabel("loss (nats)")
middle.set_ylabel("gradient: relative difference from serial")
for axes in (left, middle):
    axes.set_xlabel("step")
    axes.legend(frameon=False, fontsize=8)
    axes.grid(alpha=0.3)

# %% [markdown]
# On the left nobody could tell the three apart; each of them learns. On the right one of them is the serial
# run up to rounding, and the other is not. The rest of this page takes the steps apart.
#
# ## Shards
#
# A global batch is cut into contiguous shares. Where it does not divide, the first ranks get one sample more.
# `share` does it, and the loader uses it, so rank r of any N holds a slice of the very batch that a serial
# run has.

# %%
for parts in (3, 4):
    print(f"10 samples on {parts} ranks:", [list(range(10))[share(10, part, parts)] for part in range(parts)])

batch = next(iter(batches(1)))
pieces = [next(iter(batches(1, rank, 4))) for rank in range(4)]
print("sizes:", [p.local_samples for p in pieces], "- global count on each:", [p.count for p in pieces])
print(
    "together the serial batch:", np.array_equal(np.concatenate([p.indices for p in pieces]), batch.indices)
)

# %% [markdown]
# With more ranks than samples some shares are empty. That is legal: such a rank has nothing to add, but it
# must still take part in every all-reduce, or the others wait for it forever.

# %%
print("3 samples on 5 ranks:", [list(range(3))[share(3, part, 5)] for part in range(5)])

# %% [markdown]
# ## The gradient of a sum is the sum of the gradients
#
# The loss of a step is the mean over all $M$ samples of the batch. Let rank $r$ hold the samples $S_r$:
#
# $$L = \frac1M \sum_{i=1}^{M} \ell_i = \sum_r \frac1M \sum_{i\in S_r} \ell_i
# \qquad\Rightarrow\qquad \nabla L = \sum_r \nabla\Big(\frac1M\sum_{i\in S_r} \ell_i\Big)$$
#
# So each rank divides its *sum* of losses by the *global* count, and gradients are summed. Nothing has to be
# weighted afterwards, whatever the shares are.


# %%
def gradient_of(batch, divisor):
    model = build()
    (model.loss(model(Tensor(batch.inputs)), batch.targets) / divisor).backward()
    return flat_gradient(model)


def difference(a, b):
    return f"{np.abs(a - b).max() / np.abs(b).max():.1e}"


full = gradient_of(batch, batch.count)
summed = sum(gradient_of(piece, piece.count) for piece in pieces)
print("sum of four, each divided by the global count:", difference(summed, full))

# %% [markdown]
# The mean of the ranks' means weighs a sample on a rank with three samples less than one on a rank with two:

# %%
means = [gradient_of(piece, piece.local_count) for piece in pieces]
print("mean of the means:                            ", difference(sum(means) / 4, full))
weighted = sum(piece.local_count / piece.count * mean for piece, mean in zip(pieces, means))
print("means, weighted by their counts:              ", difference(weighted, full))
print("sum of the means, no division by N:           ", difference(sum(means), full))

# %% [markdown]
# With equal shares the mean of means is right too. This is why the mistake lives long: it shows only in the
# last batch of an epoch, which is shorter, or when somebody takes another number of ranks.
#
# ## Count targets, not samples
#
# Text is padded, and padding has the target `-100`, which does not count. Then even equal shares have unequal
# counts. What a rank divides by is the number of *valid targets* in the global batch; `Batch.count` has it.
# Here two samples of the batch are declared padding:

# %%
padded = batch.targets.copy()
padded[:2] = -100
valid = int((padded != -100).sum())


def gradient_of_half(half, divisor):
    model = build()
    model.loss(model(Tensor(batch.inputs[half])), padded[half]).backward()
    return flat_gradient(model) / divisor


first, second = slice(0, 5), slice(5, 10)
full_padded = gradient_of_half(slice(0, 10), valid)
by_targets = gradient_of_half(first, valid) + gradient_of_half(second, valid)
by_samples = gradient_of_half(first, 10) + gradient_of_half(second, 10)
by_own = (gradient_of_half(first, 3) + gradient_of_half(second, 5)) / 2
print(f"{valid} of 10 targets are valid")
print("two halves, divided by valid targets:", difference(by_targets, full_padded))
print("two halves, divided by samples:      ", difference(by_samples, full_padded))
print("mean of the two means:               ", difference(by_own, full_padded))

# %% [markdown]
# ## Aggregation by all-reduce
#
# `DataParallel` does by itself what `by_hand` did: wrap the model once, and at the end of each backward the
# gradients are the sums. It sends them in buckets, while backward is still running; lesson 05 is about that.


# %%
def wrapped(steps, aggregation="all_reduce"):
    comm, model = minipar.world(), build(seed=minipar.world().rank)  # every rank starts elsewhere
    parallel = DataParallel(model, comm, aggregation=aggregation)
    update = optim.SGD(model.parameters(), lr=0.2)
    comm.ledger.reset()
    grads = []
    for batch in batches(steps, comm.rank, comm.size):
        model.zero_grad()
        (model.loss(parallel(Tensor(batch.inputs)), batch.targets) / batch.count).backward()
        grads.append(flat_gradient(model) if model.layers[0].fc.weight.grad is not None else None)
        parallel.step(update)
    return grads, flat_weights(model), comm.ledger.table()


of_ranks = minipar.launch(wrapped, 4, STEPS)
worst = max(np.abs(a - b).max() / np.abs(b).max() for a, b in zip(of_ranks[0][0], whole[1]))
print(f"worst relative difference of any gradient in {STEPS} steps: {worst:.1e}")
same = all(np.array_equal(weights, of_ranks[0][1]) for _, weights, _ in of_ranks)
print("weights on all ranks the same, bit by bit:", same)

# %% [markdown]
# ## Equal at the start, equal for ever
#
# The ranks never compare their models again. They stay equal because they start equal and add the same
# gradient bits. So the start matters: above, every rank had a seed of its own, and `DataParallel` sent
# rank 0's parameters to all when it was made. Without that first broadcast:


# %%
def no_broadcast(steps):
    comm, model = minipar.world(), build(seed=minipar.world().rank)
    update, apart = optim.SGD(model.parameters(), lr=0.2), []
    for batch in batches(steps, comm.rank, comm.size):
        model.zero_grad()
        (model.loss(model(Tensor(batch.inputs)), batch.targets) / batch.count).backward()
        for p in model.parameters():
            p.grad = comm.all_reduce(p.grad)
        update.step()
        mine = flat_weights(model)
        apart.append(float(np.abs(mine - comm.broadcast(mine)).max()))
    return apart


apart = minipar.launch(no_broadcast, 4, STEPS)[1]
print("largest difference of a weight between rank 1 and rank 0:")
print(f"{apart[0]:.3f} after the first step, {apart[-1]:.3f} after {STEPS}")

# %% [markdown]
# The difference of the starts stays, to the last digit: every rank adds the same sum to its own weights. And
# that sum is the gradient of no model at all, since each part was taken at other weights.
#
# ## Aggregation at a master
#
# The other classic: gradients go to rank 0, which alone takes the step and sends the new *parameters* to
# everyone. It is a parameter server with one server. The result is the same.

# %%
master = minipar.launch(wrapped, 4, STEPS, aggregation="master")
print("weights equal to the all-reduce's, bit by bit:", np.array_equal(master[3][1], of_ranks[0][1]))
print("rank 3 ever sees a summed gradient:", master[3][0][0] is not None)
print("\nall-reduce, one rank:\n" + of_ranks[0][2])
print("\nmaster, one rank:\n" + master[0][2])

# %% [markdown]
# Per step the ledger has one all-reduce of all gradients against one reduce and one broadcast. (The few extra
# elements are flags: one per parameter, so that all learn whether any rank used it.)
#
# The master alone needs the optimizer's state, and for Adam that is twice the parameters. What it costs is
# time. Let us look at the clock of lesson 03, for 1 MiB of gradients. The third line is a master that is
# written naively: every rank sends its whole gradient to it, and it adds.

# %%
clock = Clock(alpha=10e-6, beta=1e-9)
MIB = 2**20


def aggregate(kind):
    comm = minipar.world()
    gradient = np.zeros(MIB // 8)
    if kind == "all-reduce":
        comm.all_reduce(gradient)
    elif kind == "reduce, broadcast":
        comm.reduce(gradient)
        comm.broadcast(gradient)
    else:
        comm.gather(gradient)
        comm.broadcast(gradient)
    return comm.now()


kinds = ("all-reduce", "reduce, broadcast", "gather, broadcast")
ranks = (2, 4, 8, 16, 32, 64)
seconds = {kind: [max(minipar.launch(aggregate, n, kind, clock=clock)) for n in ranks] for kind in kinds}

# %% [markdown]
# A training step also computes: each rank 1/N of the batch. So there are two times that matter, and their
# ratio decides how far more ranks help. The right-hand picture declares the serial computation of a step and
# lets the clock do the rest.


# %%
def step_seconds(compute):
    comm = minipar.world()
    comm.compute(compute / comm.size)
    comm.all_reduce(np.zeros(MIB // 8))
    return comm.now()


speedups = {
    compute: [compute / max(minipar.launch(step_seconds, n, compute, clock=clock)) for n in ranks]
    for compute in (0.01, 0.1, 1.0)
}

figure, (left, middle) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
for colour, marker, (kind, times) in zip(COLOURS, "os^", seconds.items()):
    left.loglog(ranks, [1e3 * t for t in times], marker + "-", color=colour, label=kind)
left.set_ylabel("aggregation of 1 MiB (ms)")
for colour, marker, (compute, gains) in zip(COLOURS, "os^", speedups.items()):
    middle.loglog(
        ranks, gains, marker + "-", color=colour, label=f"{1e3 * compute:g} ms of computation a step"
    )
middle.loglog(ranks, ranks, ":", color="0.5", label="as many times as ranks")
middle.set_ylabel("speed-up of a step")
for axes in (left, middle):
    axes.set_xlabel("ranks")
    axes.set_xticks(ranks, [str(n) for n in ranks])
    axes.set_yticks(ranks, [str(n) for n in ranks])
    axes.minorticks_off()
    axes.legend(frameon=False, fontsize=8)
    axes.grid(alpha=0.3)

# %% [markdown]
# On the left: the bytes of an all-reduce approach a constant, and only its α grows. Reduce and broadcast take
# nearly twice as long. A gather grows with every rank, because all gradients squeeze through one wire. On the
# right: communication is what more ranks do not speed up. With 10 ms of work a step, 64 ranks are slower than
# 16.
#
# What data parallelism does *not* do is make the model smaller. Every rank holds all of it:


# %%
def parameter_bytes():
    return sum(p.data.nbytes for p in build().parameters())


print(
    "bytes of parameters on each of 4 ranks:",
    minipar.launch(parameter_bytes, 4),
    "- serial:",
    parameter_bytes(),
)

# %% [markdown]
# ## Averaging parameters instead
#
# Let each rank take its own step with its own gradient, and average the *parameters*, weighted by the targets
# that each rank has seen. For one step of plain SGD with shares $m_r$ of $M$ targets that is the same thing:
#
# $$\sum_r \frac{m_r}{M}\,(w - \eta\, g_r) = w - \eta \sum_r \frac{m_r}{M}\, g_r = w - \eta\, g$$
#
# It needs no gradient traffic, and it may be done every $k$ steps only. But then the ranks' gradients are
# taken at different weights; and Adam's step is not linear in the gradient. Both are *other methods*. In
# `LocalSGD`, each rank divides by its own count.


# %%
def local(steps, every, rule, lr):
    comm, model = minipar.world(), build()
    wrapper, update = LocalSGD(model, comm, every), rule(model.parameters(), lr=lr)
    comm.ledger.reset()
    for batch in batches(steps, comm.rank, comm.size):
        model.zero_grad()
        (model.loss(model(Tensor(batch.inputs)), batch.targets) / batch.local_count).backward()
        wrapper.step(update, batch.local_count)
    return flat_weights(model), comm.ledger.bytes("all_reduce")


def serial_weights(steps, rule, lr):
    model = build()
    update = rule(model.parameters(), lr=lr)
    for batch in batches(steps):
        model.zero_grad()
        (model.loss(model(Tensor(batch.inputs)), batch.targets) / batch.count).backward()
        update.step()
    return flat_weights(model)


STEPS_LOCAL = 48
print("rule  average every   bytes a step   weights: difference from serial")
for rule, lr, intervals in ((optim.SGD, 0.2, (1, 2, 4, 16)), (optim.Adam, 0.002, (1,))):
    reference = serial_weights(STEPS_LOCAL, rule, lr)
    for every in intervals:
        weights, n_bytes = minipar.launch(local, 4, STEPS_LOCAL, every, rule, lr)[0]
        print(
            f"{rule.__name__:4} {every:10} {n_bytes / STEPS_LOCAL:16,.0f}   {difference(weights, reference)}"
        )

# %% [markdown]
# SGD, averaged every step: the serial run, up to rounding. Everything else trades equality for fewer messages.
#
# ## Microbatches
#
# When a share does not fit into memory it is cut again, and backward runs once for each microbatch. Gradients
# add up in `p.grad` by themselves (lesson 01). Three rules make it exact: zero them once, before the first;
# divide each piece by the *global* count; sum over the ranks **once, after the last**.
#
# `no_sync()` keeps all but the last backward from summing. The number of all-reduces is that of steps, not of
# microbatches:


# %%
def accumulated(microbatches):
    comm, model = minipar.world(), build()
    parallel = DataParallel(model, comm)
    comm.ledger.reset()
    whole_share = next(iter(batches(1, comm.rank, comm.size)))
    *first, last = whole_share.split(microbatches)
    with parallel.no_sync():
        for piece in first:
            (model.loss(parallel(Tensor(piece.inputs)), piece.targets) / piece.count).backward()
    (model.loss(parallel(Tensor(last.inputs)), last.targets) / last.count).backward()
    return flat_gradient(model), comm.ledger.calls("all_reduce")


for microbatches in (1, 2, 3):
    gradient, calls = minipar.launch(accumulated, 2, microbatches)[0]
    print(
        f"{microbatches} microbatches: {calls} all-reduce, gradient differs by {difference(gradient, full)}"
    )

# %% [markdown]
# What if the gradients are summed after each microbatch? The first one is then in `p.grad` on every rank
# already as a sum, and is summed again. `DataParallel` notices:


# %%
def summed_twice():
    model = build()
    parallel = DataParallel(model, minipar.world())
    for piece in next(iter(batches(1))).split(2):
        (model.loss(parallel(Tensor(piece.inputs)), piece.targets) / piece.count).backward()


try:
    minipar.launch(summed_twice, 2)
except minipar.errors.UsageError as error:
    print(error)

# %% [markdown]
# ## The proof, in one command
#
# `minipar verify` trains serially and in parallel side by side, and compares every loss, gradient and weight
# at every step, with SGD: Adam divides by the gradient's size and would hide a wrong factor. Try it with
# `--aggregation master` or `local` and other models, too.

# %%
command = [sys.executable, "-m", "minipar", "verify", "mlp", "--ranks", "4", "--batch", "10"]
print(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

# %% [markdown]
# ## The same code on MPI processes
#
# Threads are good for looking inside. Real jobs run one process a rank. `experiment.py` in this folder is for
# `mpirun`; from a notebook, **ipyparallel** can start engines under MPI and send them a function. The function
# below is self-contained, since it runs where nothing of this notebook exists.


# %%
def train_share(x, y, steps):
    """Train on this rank's shares of batches of 10; return where that was, and the weights."""
    import minipar
    from minipar import Tensor, optim
    from minipar.data import share
    from minipar.models import MLP, MLPConfig
    from minipar.parallel import DataParallel

    comm = minipar.world()  # a thread's, or the MPI job's
    model = MLP(MLPConfig(inputs=64, classes=10, width=32, layers=3)).materialize(0, "float64")
    parallel, update = DataParallel(model, comm), optim.SGD(model.parameters(), lr=0.2)
    mine = share(10, comm.rank, comm.size)
    for step in range(steps):
        inputs, targets = x[10 * step :][mine], y[10 * step :][mine]
        model.zero_grad()
        (model.loss(parallel(Tensor(inputs)), targets) / 10).backward()
        parallel.step(update)
    return repr(comm), {name: p.data for name, p in model.named_parameters()}


x, y = digits.train.fetch(np.arange(200), "float64")
on_threads = minipar.launch(train_share, 2, x, y, 20)
print("\n".join(place for place, _ in on_threads))

# %% [markdown]
# Starting the engines takes many times longer than this training: count on ten seconds or so, once. That is
# why these lessons use threads. Without ipyparallel the cell says so and goes on.


# %%
def on_mpi_engines(ranks, function, *arguments):
    """Run a function on MPI processes by ipyparallel; return what they return, and print where time went."""
    import ipyparallel
    from traitlets.config import Config

    begin = time.monotonic()
    config = Config()
    config.MPIEngineSetLauncher.mpi_cmd = [find_mpirun()]  # the mpirun beside this Python, no other
    config.MPIEngineSetLauncher.environment = job_environment(ranks, open_mpi=False, base={})
    with ipyparallel.Cluster(engines="mpi", n=ranks, config=config, log_level=40) as clients:
        started = time.monotonic()
        found = clients[:].apply_sync(function, *arguments)
        print(
            f"start of {ranks} engines: {started - begin:.1f} s; training: {time.monotonic() - started:.1f} s"
        )
    return found


try:
    on_mpi = on_mpi_engines(2, train_share, x, y, 20)
except ModuleNotFoundError as error:
    on_mpi = None
    print(f"skipped: {error.name} is not installed (pip install ipyparallel)")

if on_mpi is not None:
    print("\n".join(place for place, _ in on_mpi))
    ours, theirs = on_mpi[0][1], on_threads[0][1]
    apart = max(np.abs(ours[name] - w).max() / np.abs(w).max() for name, w in theirs.items())
    print(f"weights on MPI and on threads differ by {apart:.1e}")

# %% [markdown]
# Not one line of the training changed. The rounding may: MPI is free to add in another order than threads.
#
# ## Check yourself
#
# **1.** A batch of 10 samples on 4 ranks, each rank takes the mean of its own losses, and gradients are
# averaged. By which factor does a sample on rank 0 count too little, and one on rank 3 too much?

# %%
for rank in (0, 3):
    size = len(range(10)[share(10, rank, 4)])
    print(f"rank {rank}: weight {1 / (4 * size):.4f} instead of {1 / 10:.4f}, factor {10 / (4 * size):.3f}")

# %% [markdown]
# **2.** Somebody forgets to divide by N after an all-reduce of the ranks' means. How many times too large is
# the gradient on 4 ranks with equal shares? Would a run with Adam show it?

# %%
even = batch.split(2)
summed_means = sum(gradient_of(piece, piece.local_count) for piece in even)
print(
    f"two equal halves: {np.linalg.norm(summed_means) / np.linalg.norm(full):.3f} times too large; N in general"
)
ones = [np.array([1.0, -2.0]), 4 * np.array([1.0, -2.0])]
steps_of_adam = []
for g in ones:
    w = Tensor(np.zeros(2), requires_grad=True)
    w.grad = g
    optim.Adam([w], lr=0.1).step()
    steps_of_adam.append(w.data)
print(f"Adam's step with the gradient {steps_of_adam[0]}, with four times the gradient {steps_of_adam[1]}")

# %% [markdown]
# **3.** On 16 ranks and this clock, how much longer does aggregation at a master take than an all-reduce of
# 1 MiB? And if the master gathers?

# %%
at = ranks.index(16)
for kind in kinds[1:]:
    print(f"{kind}: {seconds[kind][at] / seconds['all-reduce'][at]:.2f} times")

# %% [markdown]
# **4.** How many bytes of all-reduce does a step of this model need, in 4 microbatches with `no_sync`?

# %%
elements = sum(p.size for p in build().parameters()) + len(list(build().parameters()))
print(f"{8 * elements:,} bytes, as with one: gradients and one flag a parameter, once a step")

# %% [markdown]
# Now write it: `minipar start 04 my_04` copies the exercise into `my_04/`; when you have written something,
# `minipar grade 04 --file my_04/exercise.py` judges it.
