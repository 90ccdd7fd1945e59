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
# # 02 · Messages, deadlock, and what a message costs
#
# **Why do ranks wait for each other forever, and how long does a message take?**
#
# A parallel program is the same program running several times. Each running copy is a *rank*; no rank sees
# the memory of another, and all that they can do together is made of messages. Two things go wrong with
# messages: they wait forever, and they take longer than they must. This page shows both, and the model of
# cost that the rest of the course computes with.

# %%
import json
import tempfile
from pathlib import Path

import experiment  # the script beside this page
import matplotlib.pyplot as plt
import numpy as np

import minipar
from minipar.comm import Clock
from minipar.comm.launcher import run_script
from minipar.errors import HangError, MismatchError
from minipar.plot import COLOURS

# %% [markdown]
# ## Ranks in a notebook
#
# `minipar.launch` runs a function on several ranks, here as threads of this kernel, and returns what each
# rank returned. Inside, `minipar.world()` is the *communicator*: it knows the rank's number and carries its
# messages.


# %%
def hello():
    comm = minipar.world()
    return f"rank {comm.rank} of {comm.size}"


minipar.launch(hello, ranks=3)

# %% [markdown]
# A message needs two: one rank calls `send`, the other `recv`. What arrives is a copy in fresh memory, so the
# sender may change its array afterwards, and the receiver owns what it got.


# %%
def one_message():
    comm = minipar.world()
    if comm.rank == 0:
        x = np.array([1.0, 2.0, 3.0])
        comm.send(x, 1)
        x[:] = 0
        return x
    return comm.recv(0)


for rank, array in enumerate(minipar.launch(one_message, ranks=2)):
    print(f"rank {rank} has {array}")

# %% [markdown]
# ## A picture of messages
#
# To see messages, note when each begins and when it has arrived. The notes below come from a *virtual clock*:
# every message takes $\alpha + \beta n$ seconds, $n$ in bytes, and nothing else takes any time. No real time
# enters, so the pictures come out the same on every machine. Here $\alpha = 1$ s and $\beta = 0.01$ s a byte.

# %%
CLOCK = Clock(alpha=1.0, beta=0.01)


class Noting:
    """A communicator that notes (kind, peer, time) of what this rank sends and receives, and passes all calls on.

    The time of a "send" is that of its begin, the time of a "recv" that of its end.
    """

    def __init__(self, comm):
        self.comm, self.rank, self.size, self.notes = comm, comm.rank, comm.size, []

    def send(self, x, dest):
        self.isend(x, dest).wait()

    def isend(self, x, dest):
        self.notes.append(("send", dest, self.comm.now()))
        return self.comm.isend(x, dest)

    def recv(self, source):
        x = self.comm.recv(source)
        self.notes.append(("recv", source, self.comm.now()))
        return x


def timeline(program, ranks, *args):
    """Run program(comm, *args) on ranks with the clock; return its messages and the time of the last rank."""

    def noted():
        comm = Noting(minipar.world())
        program(comm, *args)
        return comm.notes, comm.comm.now()

    results = minipar.launch(noted, ranks, clock=CLOCK)
    messages = []
    for sender, (notes, _) in enumerate(results):
        for receiver, (others, _) in enumerate(results):
            begun = [time for kind, rank, time in notes if (kind, rank) == ("send", receiver)]
            ended = [time for kind, rank, time in others if (kind, rank) == ("recv", sender)]
            messages += [(sender, receiver, *times) for times in zip(begun, ended)]
    return messages, max(time for _, time in results)


def draw(axes, messages, ranks, title):
    """Draw ranks as rows and messages as arrows in time."""
    for rank in range(ranks):
        axes.axhline(rank, color="0.8", zorder=0)
    for sender, receiver, begin, end in messages:
        style = {"arrowstyle": "-|>", "color": COLOURS[0], "shrinkA": 0, "shrinkB": 0}
        axes.annotate("", (end, receiver), (begin, sender), arrowprops=style)
    axes.set_yticks(range(ranks), [f"rank {rank}" for rank in range(ranks)])
    axes.set_ylim(ranks - 0.7, -0.3)
    axes.set_title(title, loc="left", fontsize=10)


def ping_pong(comm, x):
    for _ in range(2):
        if comm.rank == 0:
            comm.send(x, 1)
            x = comm.recv(1)
        else:
            x = comm.recv(0)
            comm.send(x, 0)


messages, seconds = timeline(ping_pong, 2, np.zeros(100, np.uint8))
axes = plt.figure(figsize=(7, 1.8), layout="constrained").subplots()
draw(axes, messages, 2, "100 bytes there and back, twice")
axes.set_xlabel("virtual time (s)")
axes.set_xlim(0, seconds)
plt.show()

# %% [markdown]
# ## Deadlock
#
# Now both ranks want the other's array. Both run the same code: receive, then send. Neither gets to its
# `send`, because each waits in `recv` for a message that the other will only send later.


# %%
def both_receive_first():
    comm = minipar.world()
    received = comm.recv(1 - comm.rank)
    comm.send(np.ones(3), 1 - comm.rank)
    return received


try:
    minipar.launch(both_receive_first, ranks=2)
except HangError as error:
    print(f"HangError: {error}")

# %% [markdown]
# Under most MPI libraries such a program stands still until somebody kills it. minipar knows that no rank can
# go on, ends all of them, and says who waits for what. `minipar/comm/fabric.py` counts the ranks that can
# still act; when there are none, the deadlock is proven.
#
# Sending first is no cure.


# %%
def both_send_first():
    comm = minipar.world()
    comm.send(np.ones(3), 1 - comm.rank)
    return comm.recv(1 - comm.rank)


try:
    minipar.launch(both_send_first, ranks=2)
except HangError as error:
    print(f"HangError: {error}")

# %% [markdown]
# This one is treacherous. An MPI library may copy a *short* message into a buffer of its own, and `send`
# returns at once: the program works in every test, and hangs the first time an array is long. minipar's
# `send` waits for the receive to begin (as long as its checks are on), so that a deadlock that may happen does
# happen, in the first test. That is about the order of calls alone: on the virtual clock a send takes
# $\alpha + \beta n$ from when it was called, however late its receiver comes.
#
# ## Three ways around a ring
#
# Every rank passes its array to its right neighbour. Three programs do it, and none of them hangs; they are
# in `experiment.py` beside this page. In the first, rank 0 sends and all others receive first. In the second,
# even ranks send first and odd ranks receive first. In the third, every rank *begins* to send (`isend`),
# receives, and then waits for its own message to be gone.

# %%
RANKS = 6
figure, panels = plt.subplots(3, 1, figsize=(7, 6.4), sharex=True, layout="constrained")
ring_seconds = {}
for axes, (name, program) in zip(panels, experiment.RINGS.items()):
    messages, ring_seconds[name] = timeline(program, RANKS, np.zeros(100, np.uint8))
    draw(axes, messages, RANKS, f"{name}: {ring_seconds[name]:g} s")
panels[-1].set_xlabel("virtual time (s)")
panels[-1].set_xlim(0, max(ring_seconds.values()))
plt.show()

# %% [markdown]
# The same six messages take six times as long, twice as long, or once. The order of sends and receives
# decides it, and the result is the same. The first order is what many programs do by accident.
#
# ## Ranks that do not agree
#
# Some operations are called by all ranks together: *collectives*, the subject of lesson 03. If one rank calls
# another operation, or the same one with an array of another shape, an MPI library may hang, or hand out
# wrong numbers. Here it is an error on every rank, before anything moves.


# %%
def one_differs():
    comm = minipar.world()
    return comm.all_reduce(np.ones(4 if comm.rank == 2 else 3))


try:
    minipar.launch(one_differs, ranks=4)
except MismatchError as error:
    print(f"MismatchError: {error}")

# %% [markdown]
# ## Messages between the same two ranks
#
# They arrive in the order in which they were sent. Where that is not enough to tell them apart, a *tag* does:
# a `recv` takes the next message with its tag, and leaves the others.


# %%
def two_tags():
    comm = minipar.world()
    if comm.rank == 0:
        first, second = comm.isend(np.array([1.0]), 1, tag=7), comm.isend(np.array([2.0]), 1, tag=9)
        first.wait()
        second.wait()
        return None
    return [comm.recv(0, tag=tag) for tag in (9, 7)]


print("received with tag 9, then with tag 7:", minipar.launch(two_tags, ranks=2)[1])

# %% [markdown]
# ## What a message really costs
#
# The model has two numbers. α is the time that a message takes however short it is: calls, checks, waking up
# the other side. β is the time a byte takes, the inverse of the bandwidth.
#
# $$ T(n) = \alpha + \beta n $$
#
# Are real messages like that? The next cell runs `experiment.py` with real MPI: two processes, started by
# `mpirun`, which send arrays back and forth. It is the same code as above on another engine. `run_script`
# returns what the script printed, and raises if the job fails, which `!mpirun` in a cell would not.

# %%
with tempfile.TemporaryDirectory() as folder:
    measured = Path(folder) / "measured.json"
    picture = Path(folder) / "picture.png"
    print(run_script("experiment.py", 2, "--data", measured, "--out", picture))
    mpi = json.loads(measured.read_text())


# %% [markdown]
# And the same measurement on threads, with the same functions:


# %%
def on_threads():
    return experiment.measure(minipar.world(), repeats=20)


threads = minipar.launch(on_threads, ranks=2)[0]
axes = plt.figure(figsize=(7, 4), layout="constrained").subplots()
line = np.logspace(np.log10(experiment.SIZES[0]), np.log10(experiment.SIZES[-1]), 60)
for (name, found), colour, mark in zip({"MPI": mpi, "threads": threads}.items(), COLOURS, "os"):
    axes.loglog(found["sizes"], [1e6 * t for t in found["messages"]], mark, color=colour, label=name)
    model = 1e6 * (found["alpha"] + found["beta"] * line)
    label = f"α = {1e6 * found['alpha']:.0f} µs, 1/β = {1e-9 / found['beta']:.1f} GB/s"
    axes.loglog(line, model, color=colour, alpha=0.6, label=label)
axes.set_xlabel("message (bytes)")
axes.set_ylabel("time (µs)")
axes.grid(alpha=0.3)
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# Short messages lie on a level: they cost α, whatever they carry. Long ones lie on a slope: β decides. Around
# $n = \alpha / \beta$ both weigh the same. The line is a model, and real machines bend it (caches, another
# protocol for long messages), but it is right about what matters.
#
# ## Few long messages beat many short ones
#
# A megabyte in $k$ messages, one after the other, costs $k\alpha + \beta n$. The numbers below take α and β
# as they were just measured between MPI ranks, and let the virtual clock do the sums.

# %%
machine = Clock(alpha=mpi["alpha"], beta=mpi["beta"])
MEGABYTE = np.zeros(2**20, np.uint8)


def in_pieces(pieces):
    comm = minipar.world()
    for piece in np.split(MEGABYTE, pieces):
        if comm.rank == 0:
            comm.send(piece, 1)
        else:
            comm.recv(0)
    return comm.now()


counts = [4**k for k in range(7)]
times = [minipar.launch(in_pieces, 2, pieces, clock=machine)[1] for pieces in counts]
axes = plt.figure(figsize=(7, 3), layout="constrained").subplots()
axes.loglog(counts, [1e3 * t for t in times], "o-", color=COLOURS[0])
axes.set_xlabel("messages")
axes.set_ylabel("time for 1 MiB (ms)")
axes.grid(alpha=0.3)
plt.show()

# %% [markdown]
# That is why gradients travel in buckets (lesson 05) and not one parameter at a time.
#
# ## And yet: pieces, where ranks form a chain
#
# Rank 0's array shall reach rank 7 by way of all others. Handed on whole, it crosses seven wires one after
# the other, and six of them are idle at any time. In $k$ pieces the wires work at the same time, like the
# stages of a pipeline:
#
# $$ T(k) = (N - 2 + k)\,\Big(\alpha + \frac{\beta n}{k}\Big) . $$
#
# A few pieces are better than one, and too many cost α each. You will write this program in the exercise;
# here is the formula.

# %%
N = 8
pieces = 2.0 ** np.arange(0, 13)


def chain_seconds(k, ranks, clock, n_bytes):
    return (ranks - 2 + k) * (clock.alpha + clock.beta * n_bytes / k)


axes = plt.figure(figsize=(7, 3), layout="constrained").subplots()
for n_bytes, colour, style in ((2**24, COLOURS[0], "-"), (2**20, COLOURS[1], "--"), (2**16, COLOURS[2], ":")):
    seconds = [1e3 * chain_seconds(k, N, machine, n_bytes) for k in pieces]
    axes.loglog(pieces, seconds, style, color=colour, label=f"{n_bytes // 1024:,} KiB")
axes.set_xlabel("pieces")
axes.set_ylabel("until rank 7 has it all (ms)")
axes.grid(alpha=0.3)
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# ## The ledger
#
# Every communicator counts what it sends. Tests in minipar compare these counts with formulas, so a message
# too many is found out.


# %%
def counted():
    comm = minipar.world()
    experiment.all_at_once(comm, np.zeros(100, np.float32))
    return comm.ledger


print(minipar.launch(counted, ranks=4)[0])

# %% [markdown]
# ## Where to read on
#
# - `minipar/comm/interface.py`: everything that a communicator can do, and what it promises.
# - `minipar/comm/threads.py`: ranks as threads. A message is a meeting of two; the later one copies.
# - `minipar/comm/mpi.py`: the same over mpi4py.
# - `minipar/comm/clock.py`: the virtual clock.
#
# Then the exercise: `minipar start 02 my/02`.
#
# ## Check yourself
#
# **1.** Six ranks pass 100 bytes to the right, α = 1 s, β = 0.01 s a byte. How long does each of the three
# orders take, and why is the second not as fast as the third?

# %%
once = CLOCK.message(100)
for name, seconds in ring_seconds.items():
    print(f"{name:<20} {seconds:4.0f} s = {seconds / once:.0f} messages one after the other")

# %% [markdown]
# In the second, the even ranks' messages must have arrived before the odd ranks' begin.
#
# **2.** And on 64 ranks?

# %%
for name, program in experiment.RINGS.items():
    _, seconds = timeline(program, 64, np.zeros(100, np.uint8))
    print(f"{name:<20} {seconds:4.0f} s = {seconds / once:.0f} messages one after the other")

# %% [markdown]
# **3.** From how many bytes on does β weigh more than α, between the MPI ranks measured above?

# %%
print(f"α/β = {mpi['alpha'] / mpi['beta']:,.0f} bytes")

# %% [markdown]
# **4.** A chain of 8 ranks hands on 16 MiB on that machine. In how many pieces, and how many times faster
# than whole?

# %%
best = min(range(1, 2**16), key=lambda k: chain_seconds(k, N, machine, 2**24))
root = np.sqrt((N - 2) * machine.beta * 2**24 / machine.alpha)
faster = chain_seconds(1, N, machine, 2**24) / chain_seconds(best, N, machine, 2**24)
print(f"{best} pieces, {faster:.1f} times faster (the root of (N-2) β n/α is {root:.1f})")
