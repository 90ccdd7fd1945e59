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
# # 12 · Choosing a strategy
#
# **Which kind of parallelism fits a model and a machine, and which claims about them hold?**
#
# All kinds compute the same gradients. What differs is what a rank holds, what it sends, and how long it waits.
# So there is no best kind, only a best one for a model, a batch and a machine. This lesson counts, measures, and
# then lets a planner choose.
#
# Read beside it, in `minipar/planner/`: `memory.py`, `traffic.py`, `step_time.py` and `plan.py`.

# %%
import io
import tempfile
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Image, display

import minipar
from minipar.comm import Clock
from minipar.comm.launcher import run_script
from minipar.config import TrainConfig
from minipar.data import Batch
from minipar.models import MLP, GPTConfig, MLPConfig
from minipar.parallel.memory import held
from minipar.parallel.pipeline import build_schedule
from minipar.parallel.pipeline.executor import Executor
from minipar.parallel.pipeline.stage import Stage
from minipar.planner.explain import advice, bytes_text, seconds_text, winner_text
from minipar.planner.layout import PRECISIONS, Layout
from minipar.planner.machine import Link
from minipar.planner.memory import memory
from minipar.planner.plan import plan
from minipar.planner.presets import BATCHES, MODELS, preset
from minipar.planner.run_layouts import config_of
from minipar.planner.shapes import shape_of
from minipar.planner.step_time import predict
from minipar.planner.traffic import traffic
from minipar.plot import COLOURS, memory_bars
from minipar.training import Job, load_data

MIXED, FLOAT32 = PRECISIONS["mixed"], PRECISIONS["float32"]  # 2 + 2 + 12 and 4 + 4 + 8 bytes a parameter

# %% [markdown]
# The lesson in one picture: a GPT of 6.7 billion parameters on 8 servers of 8 GPUs. Inside a server the links
# stay fast; the network between servers gets slower to the left. Each line is the best layout of its kind, as the
# planner predicts it.

# %%
GPT_7B, BATCH = shape_of("gpt", MODELS["gpt3-6.7b"]), BATCHES["gpt3-6.7b"]
A100 = preset("a100-80gb")


def kind_of(layout):
    if layout.pp == 1:
        return "data parallel only" if layout.tp == 1 else "tensor, with data parallel"
    return "pipeline, with data parallel" if layout.tp == 1 else "pipeline and tensor"


bandwidths = [0.05, 0.1, 0.3, 1, 3, 10, 30]  # GB/s
fastest = defaultdict(dict)
for bandwidth in bandwidths:
    machine = replace(A100, cluster=Link(A100.cluster.alpha, 1e-9 / bandwidth))
    for c in plan(GPT_7B, machine, 64, BATCH, MIXED).candidates:  # the fastest first
        fastest[kind_of(c.layout)].setdefault(bandwidth, c.step.seconds)
figure, axes = plt.subplots(figsize=(7.5, 4), layout="constrained")
for (kind, line), colour, marker in zip(fastest.items(), COLOURS, "os^D"):
    axes.plot(list(line), list(line.values()), marker + "-", color=colour, label=kind)
axes.set(xscale="log", yscale="log", xlabel="network between servers (GB/s a GPU)", ylabel="predicted step (s)")
axes.set_yticks([8, 10, 20, 40, 80], [8, 10, 20, 40, 80])
axes.minorticks_off()
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# On a fast network data parallelism alone is best, and all else is overhead. On a slow one whatever sums gradients
# between servers loses; what is left is a pipeline across servers, which sends single activations, with tensor
# parallelism inside each. Three questions decide: *does it fit, what does it send, who waits?* With them, three
# common claims can be put to the test.
#
# ## Does it fit?
#
# > **Claim 1: data parallelism cuts the parameters, so larger models can be trained.**
#
# Four ranks train a small GPT; the memory ledger counts the arrays that are alive after a step (`held`), the
# planner predicts the same from formulas.

# %%
SMALL = TrainConfig(model="gpt", width=64, layers=4, heads=4, seq_len=32, batch=16, steps=1, lr=1e-3, device="cpu")
DATA = load_data(SMALL.resolved())
SHAPE = shape_of("gpt", GPTConfig(DATA.info["vocabulary_size"], 32, 64, 4, 4))


def one_step(config):
    """Train a step on this rank; return the bytes held after it and the bytes sent, in ring form."""
    comm = minipar.world()
    job = Job(config, comm, DATA)
    comm.ledger.reset()
    for _ in job.train():
        rows = [r for r in comm.ledger.rows() if r.bytes > 1000]  # not the sums of losses and norms
        sent = sum(float(r.ring_elements) * r.bytes / r.elements for r in rows)
    zero = getattr(job.strategy, "zero", None)
    counted = held(zero or job.strategy.model, job.optimizer)
    return counted.parameters, counted.optimizer, sent


def on_four(layout):
    found = minipar.launch(one_step, layout.ranks, config_of(SMALL, layout).resolved())
    return [max(numbers) for numbers in zip(*found)]


KINDS = [Layout(), Layout(dp=4), Layout(dp=4, zero=1), Layout(dp=4, zero=3), Layout(tp=4),
         Layout(pp=4, schedule="1f1b", microbatches=8)]  # fmt: skip
counted = {layout: on_four(layout) for layout in KINDS}
print(f"{'KiB on the fullest rank':24} parameters   predicted   Adam's moments   predicted")
for layout, (parameters, moments, _) in counted.items():
    rows = memory(SHAPE, layout, 16, FLOAT32)
    expected = max(m.parameters for m in rows), max(m.optimizer for m in rows)
    print(f"{layout!s:24} {parameters / 1024:10.0f} {expected[0] / 1024:11.0f}"
          f" {moments / 1024:16.0f} {expected[1] / 1024:11.0f}")  # fmt: skip

# %% [markdown]
# The claim is wrong: with data parallelism every rank holds all parameters, gradients and moments. It cuts the
# *batch*, and with it activations. ZeRO on top cuts the state (lesson 06); tensor and pipeline parallelism cut the
# model. A pipeline's share is never quite a quarter, since blocks differ, and the tied embedding lies on both ends.
#
# For the model of the first picture, on one server. What is right of the line cannot be run:

# %%
STATES = {str(x): x for x in [
    Layout(dp=8, microbatches=128), Layout(dp=8, zero=1, microbatches=128), Layout(dp=8, zero=2, microbatches=128),
    Layout(dp=8, zero=3, microbatches=128), Layout(tp=8, microbatches=1024),
    Layout(pp=8, schedule="1f1b", microbatches=1024), Layout(pp=8, schedule="gpipe", microbatches=1024),
]}  # fmt: skip


def fullest(layout):
    return max(memory(GPT_7B, layout, BATCH, MIXED), key=lambda m: m.total)


picture = io.BytesIO()
shown = {name: vars(fullest(layout)) for name, layout in STATES.items() if layout.schedule != "gpipe"}
memory_bars(shown, picture, limit=A100.memory, title="gpt3-6.7b, batch 1024 in pieces of one sample, 8 × A100-80GB")
gpipe = next(layout for layout in STATES.values() if layout.schedule == "gpipe")
print(f"not shown: {gpipe} needs {bytes_text(fullest(gpipe).total)}, as it keeps all activations (lesson 09)")
Image(picture.getvalue(), width=850)

# %% [markdown]
# ## What does it send?
#
# The bytes that a rank sends in a step, with $\Psi$ bytes of parameters, $A$ bytes of an activation of the rank's
# part of the batch, $L$ blocks and $N$ ranks:
#
# | | bytes a rank and step | grows with | hidden behind computation |
# |---|---|---|---|
# | data | $2\Psi\,\frac{N-1}{N}$ | the model | partly, beside backward |
# | tensor | $4L \cdot 2A\,\frac{N-1}{N}$ | the batch | no |
# | pipeline | $2A$ at most | the batch | GPipe: yes, but for filling and draining |
#
# (1F1B has so few microbatches under way that stages wait for messages in between, too: on $p$ equal stages for the
# time of $2\,\frac{p-1}{p}$ messages with each microbatch.)
#
# Counted by the ledger on four ranks, and predicted by the planner. (What data parallelism sends more are flags: which
# gradients exist, lesson 05.)

# %%
for layout in KINDS[1:]:
    planned = sum(traffic(SHAPE, layout, 16, FLOAT32).values())
    print(f"{layout!s:24} sent {counted[layout][2] / 1024:8.1f} KiB, predicted {planned / 1024:8.1f} KiB")

# %% [markdown]
# This is why tensor parallelism stays inside a server, and why the batch matters: data parallelism sends the same
# for a large batch as for a small one, the others send in proportion to it.
#
# ## Who waits?
#
# > **Claim 2: a pipeline makes training tens or hundreds of times faster.**
#
# The executor runs for real on p ranks, with every message and gradient, on the virtual clock: a forward of the
# whole model takes 1 second for a microbatch, a backward 2, and a stage a p-th of these. So the work is the same
# for every p, and the speed-up over one rank is honest.


# %%
def speed_up(name, p, m, alpha=0.0):
    """Run one step of m microbatches on p stages; return how many times faster than one rank it is."""
    seconds = {"F": 1 / p, "B": 2 / p, "I": 1 / p, "W": 1 / p}
    data = Batch(np.ones((m, 2)), np.zeros(m, int), np.arange(m), 0, m, m)

    def one_rank():
        comm, model = minipar.world(), MLP(MLPConfig(inputs=2, classes=2, width=2, layers=p))
        stage = Stage(model, comm, [range(k, k + 1) for k in range(p)]).materialize(seed=0)
        executor = Executor(stage, model, comm, build_schedule(name, p, m), declare=lambda a: seconds[a.kind])
        executor.run(data.split(m), m)
        return comm.now()

    return 3 * m / max(minipar.launch(one_rank, p, clock=Clock(alpha)))


figure, axes = plt.subplots(figsize=(7.5, 4), layout="constrained")
stages = np.arange(1, 65)
axes.plot(stages, stages, color="0.7", label="the claim at its most modest: p stages, p times")
for m, colour, marker in zip((1, 4, 16), COLOURS, "os^"):
    axes.plot(stages, [p * m / (m + p - 1) for p in stages], color=colour, linewidth=1)
    points = [(p, speed_up("1f1b", p, m)) for p in (2, 8, 24)]
    axes.plot(*zip(*points), marker, color=colour, label=f"{m} microbatch{'es' * (m > 1)}, measured")
axes.set(xlabel="stages", ylabel="speed-up over one rank", xlim=(0, 40), ylim=(0, 40))
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# The speed-up is $\frac{pm}{m+p-1}$: below the number of stages *and* below the number of microbatches. One
# microbatch gives exactly none. A hundred times would take more than a hundred ranks and hundreds of microbatches;
# no schedule does more work than its ranks can do.
#
# So where do such figures come from? Mostly from the baseline. The microbatches that a pipeline brings along are
# compared with a run of single samples, or with a model that had to be fetched from disk as it did not fit. A step
# of one sample reads all weights, and updates them all, for that sample. Timed on one rank here, with no parallelism
# at all:

# %%
def per_sample(batch):
    """Return the seconds a sample of training steps on this rank."""
    model = MLP(MLPConfig(inputs=256, classes=256, width=256, layers=4)).materialize(seed=0)
    optimizer = minipar.optim.AdamW(model.parameters())
    x, y = minipar.tensor(np.ones((batch, 256), np.float32)), np.zeros(batch, int)
    found = []
    for _ in range(10):
        start = time.thread_time()
        model.zero_grad()
        (model.loss(model(x), y) / batch).backward()
        optimizer.step()
        found.append((time.thread_time() - start) / batch)
    return min(found)


times = {batch: minipar.launch(per_sample, 1, batch)[0] for batch in (1, 4, 16, 64, 256)}
for batch, seconds in times.items():
    print(f"batch {batch:3}: {1e6 * seconds:7.1f} µs a sample, {times[1] / seconds:6.1f} times as fast as single ones")

# %% [markdown]
# Whoever compares a pipeline of many microbatches with single samples claims *this* gain as well, which any rank
# has by itself. Compare with the best that one rank can do.
#
# > **Claim 3: layer parallelism is always faster.**
#
# Placing layers on different ranks makes one microbatch no faster, it adds messages. Cutting *within* layers does
# divide the work, but the sums between the parts cost α each, however small. The first on the virtual clock, where
# messages take α seconds:

# %%
for alpha in (0.0, 0.1, 0.5):
    found = {p: speed_up("naive", p, 1, alpha) for p in (1, 2, 4, 8)}
    print(f"α = {alpha:.1f} s, speed-up:", ", ".join(f"{x:.2f} on {p} rank{'s' * (p > 1)}" for p, x in found.items()))

# %% [markdown]
# The second as the planner predicts it: an MLP of 8 layers, cut over 8 GPUs, over the time of one GPU. Small
# layers get *slower*; where the line is crossed depends on α, on β, and on the batch.

# %%
widths = [64, 256, 512, 1024, 2048, 4096, 8192, 16384]
figure, axes = plt.subplots(figsize=(7.5, 3.6), layout="constrained")
places = {"inside a server (NVLink)": A100, "between servers (InfiniBand)": replace(A100, node=A100.cluster),
          "between servers (10 Gbit/s)": replace(A100, node=preset("a100-80gb", "ethernet-10").cluster)}  # fmt: skip
for (place, machine), colour, marker in zip(places.items(), COLOURS, "os^"):
    gain = []
    for width in widths:
        shape = shape_of("mlp", MLPConfig(inputs=width, classes=width, width=width, layers=8))
        alone, cut = (predict(shape, machine, layout, 512, MIXED).seconds for layout in (Layout(), Layout(tp=8)))
        gain.append(alone / cut)
    axes.plot(widths, gain, marker + "-", color=colour, label=place)
axes.axhline(1, color="black", linestyle="--", linewidth=1)
axes.set(xscale="log", yscale="log", xlabel="width of the layers", ylabel="speed-up of 8 ranks", ylim=(0.001, 12))
axes.set_xticks(widths, widths)
axes.set_yticks([0.01, 0.1, 1, 8], ["0.01", "0.1", "1", "8"])
axes.minorticks_off()
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# ## A machine in numbers
#
# The planner knows a machine as a few numbers. Presets are data sheets times the part of them that programs
# reach; `minipar calibrate` measures yours into `machine.json`, with a table for each kind of operation.

# %%
for name, network in (("a100-80gb", None), ("a100-80gb", "ethernet-10"), ("h100-80gb", None)):
    m = preset(name, network)
    rate = m.matmul["float16"]
    print(f"{m.name:26} {rate.peak * rate.efficiency / 1e12:4.0f} TFLOP/s, {bytes_text(m.memory)},"
          f" in a node {1e-9 / m.node.beta:4.0f} GB/s, between nodes {1e-9 / m.cluster.beta:5.2f} GB/s,"
          f" α {1e6 * m.cluster.alpha:.0f} µs")  # fmt: skip

# %% [markdown]
# ## The planner
#
# `plan` goes through every grid of ranks, drops what cannot be, with its reason, sums up the rest, and sorts by time:
#
# $$T = \underbrace{m\,(F + I + W + \text{sums of tp})}_{\text{the slowest stage}}
#   + \underbrace{(p-1)\,(\ldots)}_{\text{filling, draining}}
#   + \underbrace{\text{gradients that nothing hides}}_{\text{dp}} + \text{update}$$
#
# GPT-3 on 1024 GPUs, with what was chosen and why (in a terminal: `minipar plan --model gpt-175b --machine
# a100-80gb --ranks 1024`):

# %%
GPT_175B = shape_of("gpt", MODELS["gpt-175b"])
big = plan(GPT_175B, A100, 1024, BATCHES["gpt-175b"], MIXED)
for c in big.candidates[:5]:
    print(f"{c.layout!s:66} {seconds_text(c.step.seconds):>7}  {bytes_text(c.memory.total):>8}"
          f"  bubble {100 * c.step.bubble:4.1f} %")  # fmt: skip
print(f"\n{winner_text(big)}\n")
print(*advice(big)[1:], sep="\n")

# %% [markdown]
# The axes lie as Narayanan et al. (2021) found best: tensor parallelism inside a server, the pipeline across
# servers, data parallelism outermost. The choice turns with the model *and* with the network:

# %%
names, networks = ["gpt2", "gpt3-6.7b", "gpt3-13b"], ["infiniband-hdr", "ethernet-100", "ethernet-10"]
for name in names:
    shape = shape_of("gpt", MODELS[name])
    for network in networks:
        best = plan(shape, preset("a100-80gb", network), 64, BATCHES[name], MIXED).best
        print(f"{name:10} 64 × A100, {network:15} {seconds_text(best.step.seconds):>7}  {best.layout}")

# %% [markdown]
# ## Against measurement
#
# A prediction is worth what measurement leaves of it. `experiment.py` of this lesson measures three numbers on two
# real MPI ranks, predicts each layout of a small MLP from them, and runs it. The numbers are those of the machine
# that this notebook was executed on, with whatever else it was doing then.

# %%
with tempfile.TemporaryDirectory() as folder:
    target = Path(folder) / "picture.png"
    printed = run_script(Path("experiment.py").resolve(), 2, "--out", target)
    print(printed.partition("picture:")[0])
    display(Image(target.read_bytes(), width=850))

# %% [markdown]
# The bytes in this table are predicted exactly: counting is arithmetic. Seconds are not: three numbers know nothing of
# caches, of small products that run slower than large ones, of other programs. What a plan has to get right is
# the *order*, and the line below the table says what its choice would have cost. The last row is claim 3 again, on
# real ranks: layers on two ranks, one after the other. Where the first few layouts are close, run them:
# `minipar plan --model mlp --machine machine.json --ranks 2 --run-top 5`.
#
# ## In which order to decide
#
# 1. Does the model fit one rank, with recomputation and small microbatches? Then data parallelism, as long as the
#    batch has work for every rank and the network carries $2\Psi$ in about the time of a backward.
# 2. Does only the state not fit? ZeRO 1 costs nothing, ZeRO 2 and 3 cost traffic that grows with the microbatches.
# 3. Else cut the model: within layers only where links are fast, that is inside a server; by a pipeline across
#    servers, with many more microbatches than stages.
# 4. Data parallelism takes the ranks that are left. Then measure.
#
# ## Check yourself
#
# 1. How many ranks does plain data parallelism need to train 175 billion parameters, with 80 GiB a rank?

# %%
parameters = GPT_175B.parameters
for ranks in (1, 64, 1024):
    least = 16 * parameters
    print(f"{ranks:4} ranks: each holds {least / 2**30:,.0f} GiB of state; fits: {least <= A100.memory}")
print(f"no number is enough; with ZeRO 3, {-(-least // int(A100.memory))} ranks are, before activations")

# %% [markdown]
# 2. A pipeline of 16 stages is to be 12 times as fast as one rank. How many microbatches does it need, and how many
#    for 15.9 times?

# %%
for target in (12, 15.9):
    need = next(m for m in range(1, 10**5) if 16 * m / (m + 15) >= target)
    print(f"{target} times: {need} microbatches")

# %% [markdown]
# 3. From which batch on does a tensor-parallel block send more than data parallelism does for its parameters? Take a
#    block of `gpt3-6.7b` on 8 ranks.

# %%
block = GPT_7B.blocks(1)[1]
tokens, width = MODELS["gpt3-6.7b"].seq_len, MODELS["gpt3-6.7b"].width
sums, gradients = 4 * 2 * tokens * width, 2 * block.parameters  # elements, times 7/8 each
print(f"{sums:,} elements a sample against {gradients:,} a step: from {gradients / sums:.1f} samples on")

# %% [markdown]
# 4. In the first picture, at which bandwidth does data parallelism alone stop being the best?

# %%
order = {b: min(fastest, key=lambda kind: fastest[kind].get(b, np.inf)) for b in bandwidths}
print(*(f"{b:5} GB/s: {kind}" for b, kind in order.items()), sep="\n")

# %% [markdown]
# Now write your own small planner: `minipar start 12 DIR` copies the exercise out, `minipar grade 12 --file
# DIR/exercise.py` grades it. The same on four ranks: `mpirun -n 4 python lessons/12_choosing/experiment.py`.
