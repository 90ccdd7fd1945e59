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
# # 03 · All-reduce: ring, tree, halving
#
# **How can N ranks all hold the sum of their arrays, what does it cost, and which way is the best?**
#
# Each rank has an array of the same shape. Afterwards every rank has the elementwise sum of all of them.
# Nearly every step of training in parallel rests on this one operation, and it is not a primitive of the
# network: it is made of sends and receives, and there are several ways to make it.
#
# Read `minipar/comm/collectives.py` beside this page. It holds four textbook algorithms in about 20 lines
# each; nothing of them is repeated here.

# %%
import matplotlib.pyplot as plt
import numpy as np

import minipar
from minipar.comm import Clock
from minipar.comm.collectives import ALGORITHMS, cost, fastest
from minipar.plot import COLOURS

# %% [markdown]
# ## Watching the messages
#
# The algorithms only use what a communicator offers. So a communicator that notes each message before it
# passes it on shows everything they do, and the engine stays as it is.


# %%
class Watched:
    """A communicator that notes (time, from, to, bytes, values) of each message it sends."""

    def __init__(self, comm):
        self.comm, self.rank, self.size, self.notes = comm, comm.rank, comm.size, []

    def note(self, x, dest):
        self.notes.append((self.comm.now(), self.rank, dest, x.nbytes, x.copy()))

    def isend(self, x, dest):
        self.note(x, dest)
        return self.comm.isend(x, dest)

    def send(self, x, dest):
        self.note(x, dest)
        self.comm.send(x, dest)

    def recv(self, source, **kwargs):
        return self.comm.recv(source, **kwargs)

    def recv_(self, out, source):
        return self.comm.recv_(out, source)


def watch(algorithm, ranks, elements, clock):
    """Run an algorithm and return the messages of all ranks, in order of time, and the seconds it took."""

    def program():
        comm = Watched(minipar.world())
        mine = np.full(elements, 2.0**comm.rank)  # a sum of these says which ranks are in it
        total = algorithm(comm, mine)
        assert np.allclose(total, 2.0**comm.size - 1)
        return comm.notes, comm.comm.now()

    found = minipar.launch(program, ranks, clock=clock)
    messages = sorted((m for notes, _ in found for m in notes), key=lambda m: m[:2])
    return messages, max(end for _, end in found)


# %% [markdown]
# Time is virtual here, as in lesson 02: a message of $n$ bytes takes $\alpha + \beta n$ seconds. Ranks are
# threads in this notebook, so a laptop shows 64 of them without pretending to be fast.
#
# Here are all four algorithms at once, on eight ranks. A line is a message, from the rank that sends it to
# the rank that gets it; it is the thicker the more bytes it carries.

# %%
clock = Clock(alpha=10e-6, beta=1e-9)  # 10 µs a message, 1 GB/s
elements = 8 * 1024  # float64: 64 KiB

figure, panels = plt.subplots(2, 2, figsize=(10, 6.4), sharex=True, sharey=True, layout="constrained")
for axes, (name, algorithm) in zip(panels.flat, ALGORITHMS.items()):
    messages, end = watch(algorithm, 8, elements, clock)
    for start, source, dest, n_bytes, _ in messages:
        width = 0.6 + 2.4 * n_bytes / (8 * elements)
        times = [1e6 * start, 1e6 * (start + clock.message(n_bytes))]
        axes.plot(times, [source, dest], color=COLOURS[0], linewidth=width, alpha=0.8)
    axes.axvline(1e6 * end, color="0.4", linestyle=":")
    axes.set_title(f"{name}: {len(messages)} messages, {1e6 * end:.0f} µs", loc="left", fontsize=10)
for axes in panels[1]:
    axes.set_xlabel("time (µs)")
for axes in panels[:, 0]:
    axes.set_ylabel("rank")
panels[0, 0].set_yticks(range(8))
panels[0, 0].invert_yaxis()

# %% [markdown]
# Two things set them apart: how many messages follow one another (each costs $\alpha$), and how many bytes
# each rank has to send (each costs $\beta$). The rest of this page is about these two numbers.
#
# ## The obvious way
#
# Pass a running total from rank 0 to the last rank, then pass the result back along the line.


# %%
def line_all_reduce(comm, x):
    total = x.copy()
    if comm.rank > 0:
        total += comm.recv(comm.rank - 1)
    if comm.rank < comm.size - 1:
        comm.send(total, comm.rank + 1)
        total = comm.recv(comm.rank + 1)
    if comm.rank > 0:
        comm.send(total, comm.rank - 1)
    return total


for ranks in (2, 4, 8, 16):
    _, seconds = watch(line_all_reduce, ranks, elements, clock)
    formula = 2 * (ranks - 1) * clock.message(8 * elements)
    print(f"{ranks:3} ranks: {1e6 * seconds:7.1f} µs, 2 (N-1)(α + nβ) = {1e6 * formula:7.1f} µs")

# %% [markdown]
# It is right, and twice the ranks take twice the time. At any moment one rank sends, one receives, and all
# others wait. Each algorithm below is a way to let them work.
#
# ## The ring: nobody waits
#
# Cut the array into N chunks and start a running total of a *different chunk* at each rank. All of them
# travel around the ring at once. Below, what rank 0 sends in each step on four ranks: since rank $r$ puts in
# $2^r$, the sum tells which ranks are already in it.


# %%
def ranks_in(value):
    return [rank for rank in range(64) if int(value) >> rank & 1]


messages, _ = watch(ALGORITHMS["ring"], 4, 8, clock)
for step, (_, _, dest, n_bytes, values) in enumerate(m for m in messages if m[1] == 0):
    half = "reduce" if step < 3 else "gather"
    print(f"step {step}, {half}: rank 0 -> rank {dest}, {n_bytes} bytes, sum of ranks {ranks_in(values[0])}")

# %% [markdown]
# After $N-1$ steps each rank holds one finished chunk. That is a **reduce-scatter**. In $N-1$ further steps
# the finished chunks travel around: an **all-gather**. Each step sends $n/N$ bytes:
#
# $$T_\text{ring} = 2(N-1)\,\alpha + 2\,\frac{N-1}{N}\,n\beta$$
#
# Open `ring_all_reduce` and compare the table in its docstring with the lines above.

# %%
for ranks in (2, 4, 8, 16, 64):
    messages, seconds = watch(ALGORITHMS["ring"], ranks, elements, clock)
    sent = sum(n_bytes for _, source, _, n_bytes, _ in messages if source == 0)
    formula = cost("ring", 8 * elements, ranks, clock.alpha, clock.beta)
    print(
        f"{ranks:3} ranks: rank 0 sends {sent / (8 * elements):.3f} n bytes,"
        f" {1e6 * seconds:7.1f} µs, formula {1e6 * formula:7.1f} µs"
    )

# %% [markdown]
# The bytes a rank sends stay below $2n$, however many ranks there are: that is why a data-parallel step does
# not become slower with each rank that joins. No algorithm can send less: of every element, a rank must
# give its part away and, unless it finishes that element itself, get the sum back (Patarasuk and Yuan 2009).
#
# What does grow is the number of steps. For 8 bytes on 64 ranks:

# %%
for name in ALGORITHMS:
    print(f"{name:17} {1e6 * cost(name, 8, 64, clock.alpha, clock.beta):7.1f} µs")

# %% [markdown]
# ## The tree: few steps
#
# Half of the ranks hand their array to a neighbour and leave; half of the rest hand on what they have to a
# neighbour at distance two; and so on. After $\lceil\lg N\rceil$ rounds rank 0 has the sum, and it goes down
# the same tree again.
#
# $$T_\text{tree} = 2\lceil\lg N\rceil\,(\alpha + n\beta)$$

# %%
messages, _ = watch(ALGORITHMS["tree"], 8, 8, clock)
for time in sorted({m[0] for m in messages}):
    pairs = [f"{source}→{dest}" for start, source, dest, _, _ in messages if start == time]
    print(f"{1e6 * time:6.2f} µs: {', '.join(pairs)}")

# %% [markdown]
# ## Recursive doubling: as few steps as possible
#
# In the tree half of the ranks are idle after the first round. Let them *exchange* instead: in round $k$,
# each rank swaps everything it has with the rank whose number differs in bit $k$, `rank ^ 2**k`.
#
# $$T_\text{doubling} = \lg N\,(\alpha + n\beta)$$

# %%
messages, _ = watch(ALGORITHMS["doubling"], 8, 8, clock)
for rank in (0, 5):
    rounds = [(dest, ranks_in(values[0])) for _, source, dest, _, values in messages if source == rank]
    for dest, inside in rounds:
        print(f"rank {rank} with rank {dest} ({rank:03b} ^ {dest:03b} = {rank ^ dest:03b}), has {inside}")

# %% [markdown]
# Nobody can know the sum of $N$ numbers in fewer than $\lg N$ rounds, since what a rank knows at most doubles
# in each. The price: all $n$ bytes move in every round.
#
# ## Halving and doubling: few steps and few bytes
#
# Rabenseifner's algorithm takes both ideas. First **recursive halving**: partners at distance $N/2$ share
# the work, each sends one half of the array and sums the other; then at distance $N/4$ the same with what it
# kept; and so on. Each rank ends with one finished piece. Then **recursive doubling** backwards collects the
# pieces.
#
# $$T_\text{halving-doubling} = 2\lg N\,\alpha + 2\,\frac{N-1}{N}\,n\beta$$

# %%
messages, _ = watch(ALGORITHMS["halving_doubling"], 8, 8, clock)
for _, _, dest, n_bytes, values in (m for m in messages if m[1] == 0):
    print(f"rank 0 -> rank {dest}: {n_bytes // 8} of 8 elements, sums of ranks {ranks_in(values[0])}")

# %% [markdown]
# ## Formulas against the clock
#
# The virtual clock knows nothing of these formulas. It charges single messages, and a receive ends at the
# later of both ranks' times. Here is the worst relative difference over a range of ranks and sizes.

# %%
for name, algorithm in ALGORITHMS.items():
    errors = []
    for ranks in (2, 4, 8, 16, 32):
        for elements_each in (32, 3200):
            _, seconds = watch(algorithm, ranks, elements_each, clock)
            formula = cost(name, 8 * elements_each, ranks, clock.alpha, clock.beta)
            errors.append(abs(seconds - formula) / formula)
    print(f"{name:17} worst relative difference {max(errors):.1e}")

# %% [markdown]
# ## Which one, then?
#
# Short arrays are all about $\alpha$, long ones all about $\beta$. Lines are formulas, dots are runs.

# %%
ranks = 32
figure, axes = plt.subplots(figsize=(7.5, 4.4), layout="constrained")
sizes = np.logspace(1, 8, 60)
for colour, marker, (name, algorithm) in zip(COLOURS, "os^D", ALGORITHMS.items()):
    seconds = [cost(name, n, ranks, clock.alpha, clock.beta) for n in sizes]
    axes.loglog(sizes, 1e6 * np.array(seconds), color=colour, label=name)
    for elements_each in (32, 512, 8192, 131072):
        _, measured = watch(algorithm, ranks, elements_each, clock)
        axes.plot(8 * elements_each, 1e6 * measured, marker, color=colour, markersize=5)
axes.set_xlabel("array (bytes)")
axes.set_ylabel(f"all-reduce on {ranks} ranks (µs)")
axes.legend(frameon=False)
axes.grid(alpha=0.3)

# %% [markdown]
# A library chooses by size and number of ranks. `fastest` does so by the formulas:

# %%
shown = (8, 1024, 32 * 1024, 1024**2, 32 * 1024**2)
print("ranks  " + "".join(f"{n:>18,} B" for n in shown))
for ranks in (2, 4, 7, 8, 63, 64):
    print(f"{ranks:5}  " + "".join(f"{fastest(n, ranks, clock.alpha, clock.beta):>20}" for n in shown))

# %% [markdown]
# Where do doubling and halving-doubling cross? Setting their formulas equal gives
#
# $$n^\star = \frac{\alpha}{\beta}\cdot\frac{\lg N}{\lg N - 2(N-1)/N}$$
#
# For many ranks that is little more than $\alpha/\beta$, the message whose bytes take as long as its start.

# %%
for levels in (2, 3, 4, 6, 10):
    ranks = 2**levels
    crossing = clock.alpha / clock.beta * levels / (levels - 2 * (ranks - 1) / ranks)
    below, above = (fastest(f * crossing, ranks, clock.alpha, clock.beta) for f in (0.99, 1.01))
    print(f"{ranks:5} ranks: {crossing:9,.0f} bytes; just below {below}, just above {above}")

# %% [markdown]
# ## Numbers of ranks that are not powers of two
#
# `rank ^ 2**k` may name a rank that does not exist. To skip such a partner is a well-known mistake: the ranks
# then end with *different* sums, and nothing crashes (the bug hunt in this lesson's exercise is about it).
#
# `fold` lets some ranks hand their array to a neighbour first, so that a power of two is left. It costs two
# more messages, and the ring needs no such thing:

# %%
for ranks in (7, 8, 9):
    times = {name: watch(ALGORITHMS[name], ranks, 63 * 64, clock)[1] for name in ("ring", "halving_doubling")}
    print(f"{ranks} ranks: " + ", ".join(f"{name} {1e6 * seconds:.0f} µs" for name, seconds in times.items()))

# %% [markdown]
# ## The two halves are worth having
#
# An all-reduce is a reduce-scatter followed by an all-gather. Communicators offer both by themselves, and
# together they cost exactly the same. Lesson 06 makes use of what lies between them.


# %%
def two_halves():
    comm = minipar.world()
    x = np.random.default_rng(comm.rank).standard_normal(elements)
    begin = comm.now()
    whole = comm.all_reduce(x)
    middle = comm.now()
    mine = comm.reduce_scatter(x)  # this rank's chunk of the sum
    joined = comm.all_gather(mine)
    end = comm.now()
    return np.array_equal(whole, joined), mine.size, 1e6 * (middle - begin), 1e6 * (end - middle)


equal, held, whole, halves = minipar.launch(two_halves, 8, clock=clock)[0]
print(f"equal bit by bit: {equal}; between the halves a rank holds {held} of {elements} elements")
print(f"all_reduce {whole:.1f} µs, reduce_scatter + all_gather {halves:.1f} µs")

# %% [markdown]
# ## The same bits on every rank, other bits for another algorithm
#
# Floating-point addition is not associative: $(a+b)+c$ and $a+(b+c)$ differ in the last bit. What training
# needs is that *all ranks* get the same bits, or their copies of the model drift apart. All four see to
# that: each sum is either formed once and copied, or formed by both partners from the same two numbers.
# Another algorithm adds in another order, so it may end in other bits.


# %%
def bits(name):
    def program():
        comm = minipar.world()
        return ALGORITHMS[name](comm, np.random.default_rng(comm.rank).standard_normal(1000, np.float32))

    return minipar.launch(program, 8)


sums = {name: bits(name) for name in ALGORITHMS}
for name, of_ranks in sums.items():
    same = all(np.array_equal(x, of_ranks[0]) for x in of_ranks)
    other = np.count_nonzero(of_ranks[0] != sums["ring"][0])
    largest = np.abs(of_ranks[0] - sums["ring"][0]).max()
    print(
        f"{name:17} same on all ranks: {same}; {other:3} of 1000 differ from the ring's, by {largest:.0e} at most"
    )

# %% [markdown]
# ## Why `isend`
#
# In every step of the ring each rank sends *and* receives. If all of them first send and wait until that is
# done, nobody ever receives (lesson 02). The algorithms therefore begin the send, receive, and then wait.
# What happens otherwise:


# %%
class Waiting(Watched):
    """The same communicator, but a send that was begun is waited for at once."""

    def isend(self, x, dest):
        sending = self.comm.isend(x, dest)
        sending.wait()
        return sending


try:
    minipar.launch(lambda: ALGORITHMS["ring"](Waiting(minipar.world()), np.ones(8)), 4)
except minipar.errors.HangError as error:
    print(str(error).replace("; ", "\n"))

# %% [markdown]
# ## On real ranks
#
# The clock's α and β are declared. `experiment.py` measures them: it runs the same four functions and the MPI
# library's own all-reduce on real processes, reads α and β off a short and a long message, and draws both.
#
#     mpirun -n 4 python lessons/03_all_reduce/experiment.py
#
# ## Check yourself
#
# **1.** On 16 ranks, how many messages does rank 0 send in a ring all-reduce, and how many in halving and
# doubling?

# %%
for name in ("ring", "halving_doubling"):
    messages, _ = watch(ALGORITHMS[name], 16, 64, clock)
    print(f"{name}: {sum(source == 0 for _, source, *_ in messages)}")

# %% [markdown]
# **2.** A gradient of 12.8 MB (3.2 million float32) is summed over 8 ranks by a ring. How many bytes does each
# rank send? What if 64 ranks do it?

# %%
for ranks in (8, 64):
    print(f"{ranks} ranks: {2 * (ranks - 1) / ranks * 12.8:.2f} MB")

# %% [markdown]
# **3.** The network gets ten times more bandwidth, and α stays. For which arrays does that hardly help? Time
# of the best algorithm on 64 ranks, before and after:

# %%
for n in (8, 1024, 1024**2, 32 * 1024**2):
    before, after = (
        min(cost(name, n, 64, clock.alpha, beta) for name in ALGORITHMS)
        for beta in (clock.beta, clock.beta / 10)
    )
    print(f"{n:>12,} bytes: {before / after:5.2f} times faster")

# %% [markdown]
# **4.** Somebody sums 100 arrays of 1 KiB over 64 ranks, one all-reduce each. How much faster is one all-reduce
# of all of them together? (Lesson 05 builds on this.)

# %%
one, many = (
    min(cost(name, n, 64, clock.alpha, clock.beta) for name in ALGORITHMS) for n in (100 * 1024, 1024)
)
print(f"{100 * many / one:.1f} times")

# %% [markdown]
# Now write your own: `minipar start 03 my_03` copies the exercise, `minipar grade 03 --file my_03/exercise.py`
# judges it.
