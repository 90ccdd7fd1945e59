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
# # 08 · Pipelines
#
# **What does it gain to put the layers of a model on different ranks, one after the other, and what is lost
# while they wait for each other?**
#
# A model is a list of blocks. Cut it into contiguous *stages*, one a rank: each rank holds the weights,
# gradients and optimizer state of its own blocks only, and sends activations to the next. Far less is sent than
# in any other kind of parallelism. The price is the *bubble*.
#
# The code to read is `minipar/parallel/partition/stage_split.py`, `minipar/parallel/partition/layer_parallel.py`
# and, in `minipar/parallel/pipeline/`, `schedules.py`, `simulator.py` and `executor.py`.

# %%
import io
import sys
from fractions import Fraction

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Image
from rich.console import Console

import minipar
from minipar.comm import Clock
from minipar.commands.schedule import schedule_command
from minipar.data import Batch
from minipar.errors import UsageError
from minipar.models import GPT, MLP, ConvNet, ConvNetConfig, GPTConfig, MLPConfig
from minipar.parallel.partition.layer_parallel import LayerParallel
from minipar.parallel.partition.policies import by_cost, items_of
from minipar.parallel.partition.profile import profile_blocks
from minipar.parallel.partition.stage_split import split_stages
from minipar.parallel.pipeline import FORMULAS, Costs, Span, build_schedule, simulate, timeline
from minipar.parallel.pipeline.executor import Executor
from minipar.parallel.pipeline.stage import Stage
from minipar.plot import COLOURS, gantt


def show(found, title):
    """Return the picture of a timeline."""
    file = io.BytesIO()
    gantt(found, file, title=f"{title}: bubble {float(found.bubble):.0%}", unit="forwards of one microbatch")
    return Image(file.getvalue(), width=850)


# %% [markdown]
# The lesson in two pictures. Four stages, a batch in four pieces (*microbatches*), a backward as long as two
# forwards. First one microbatch after the other: at any time a single stage works.

# %%
show(simulate(build_schedule("naive", stages=4, microbatches=4)), "one microbatch at a time")

# %% [markdown]
# Then GPipe (Huang et al. 2019): all forwards, then all backwards, each stage handing a microbatch on and
# taking up the next at once. The hatched rest is the bubble: stages that wait for the pipeline to fill and to
# drain.

# %%
show(simulate(build_schedule("gpipe", stages=4, microbatches=4)), "GPipe")

# %% [markdown]
# ## Stages
#
# Start with the cut alone. `LayerParallel` places a GPT's blocks on three ranks and trains it, the whole batch
# at once. The losses and the weights are the serial ones.

# %%
CONFIG = GPTConfig(vocab=64, seq_len=16, width=32, layers=4, heads=4, tied=False)
ids = np.random.default_rng(0).integers(0, CONFIG.vocab, (8, CONFIG.seq_len + 1))
x, t = ids[:, :-1], ids[:, 1:]


def by_layers(steps=3):
    """Train on this rank's stage; returns losses, the ledger of a step, and the elements held."""
    comm, model = minipar.world(), GPT(CONFIG)
    parallel = LayerParallel(model, comm, by_cost(items_of(model), comm.size), seed=0, dtype="float64")
    optimizer = minipar.optim.SGD(parallel.optimizer_params(), lr=0.5)
    losses = []
    for _ in range(steps):
        comm.ledger.reset()
        losses.append(parallel.forward_backward(x, t, count=t.size))
        parallel.step(optimizer)
    return losses, comm.ledger, sum(p.size for p in parallel.parameters()), len(parallel.blocks)


alone, *_ = minipar.launch(by_layers, 1)
staged = minipar.launch(by_layers, 3)
print("losses on one rank:   ", [f"{loss:.12f}" for loss in alone[0]])
print("losses on three ranks:", [f"{loss:.12f}" for loss in staged[0][0]])
for rank, (_, _, held, blocks) in enumerate(staged):
    print(f"rank {rank}: {blocks} blocks, {held:,} of {alone[2]:,} parameters")

# %% [markdown]
# What the middle rank sent in a step: one activation (B, T, C) forward and its gradient back. Data parallelism
# would have sent 2 (N − 1)/N times the number of parameters, 4/3 on these three ranks (lesson 03).

# %%
ledger = staged[1][1]
print(ledger)
print(
    f"\nB T C = {x.size * CONFIG.width} elements each way; all-reducing gradients: {2 * alone[2] * 2 // 3:,} elements"
)

# %% [markdown]
# ## Only one works at a time
#
# But it is no faster. Stage 1 cannot begin before stage 0 has ended, and backward goes the same way back. To see
# it, let the real executor run a stage for each rank on the **virtual clock**: each action declares one second
# for a forward and two for a backward, and messages cost α seconds.

# %%
SECONDS = {"F": 1.0, "B": 2.0}


def on_the_clock(name, p, m, alpha=0.0):
    """Run one step of a tiny model on p ranks, with all its messages; return the measured timeline."""
    schedule = build_schedule(name, p, m)
    data = Batch(np.ones((m, 2)), np.zeros(m, int), np.arange(m), 0, m, m)

    def one_rank():
        comm, model = minipar.world(), MLP(MLPConfig(inputs=2, classes=2, width=2, layers=p))
        stage = Stage(model, comm, [range(k, k + 1) for k in range(p)]).materialize(seed=0)
        executor = Executor(stage, model, comm, schedule, declare=lambda action: SECONDS[action.kind])
        executor.run(data.split(m), data.count)
        return executor.spans

    spans = minipar.launch(one_rank, p, clock=Clock(alpha))
    return timeline([[Span(s.action, s.start, s.end) for s in stage] for stage in spans])


for p in (1, 2, 4, 8):
    took = on_the_clock("naive", p, 1)
    print(
        f"{p} stages: {p * 3} s of work took {took.makespan:.0f} s; each stage is busy {took.utilisation[0]:.1%}"
    )

# %% [markdown]
# ## Microbatches
#
# Cut the batch into m microbatches and let them follow each other. With p stages the last microbatch enters
# stage 0 after m − 1 others and needs p turns to get through: m + p − 1 turns of forward, as many of backward.
# Of these each stage works m, so the idle part is
#
# $$\text{bubble} = \frac{p-1}{m+p-1}$$
#
# As data a schedule is a list of actions for each stage. Here are the first of them, what `minipar schedule`
# prints of a schedule, and the same measures in Python.

# %%
for stage, actions in enumerate(build_schedule("gpipe", 3, 4)):
    print(f"stage {stage}:", *actions)
print()
screen = Console(file=sys.stdout, width=96, force_jupyter=False, color_system=None)
predicted = schedule_command("gpipe", stages=3, microbatches=4, screen=screen)
print("bubble in Python:", predicted.bubble, "and the formula:", FORMULAS["gpipe"].bubble(3, 4, 1))

# %% [markdown]
# ## Up to 32 stages
#
# The virtual clock does not care how many cores the laptop has. Lines are the formula, points are runs of the
# executor on p threads, with every message and every gradient.

# %%
runs = {(p, m): on_the_clock("gpipe", p, m) for p in (2, 8, 32) for m in (1, 4, 16, 32)}
figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
many = np.arange(1, 65)
for colour, marker, p in zip(COLOURS, "os^", (2, 8, 32)):
    axes.plot(many, [float(FORMULAS["gpipe"].bubble(p, int(m), 1)) for m in many], color=colour, linewidth=1)
    points = [(m, float(runs[p, m].bubble)) for m in (1, 4, 16, 32)]
    axes.plot(*zip(*points), marker, color=colour, label=f"{p} stages")
axes.set_xscale("log", base=2)
axes.set_xticks([1, 2, 4, 8, 16, 32, 64], [1, 2, 4, 8, 16, 32, 64])
axes.set(xlabel="microbatches", ylabel="bubble (share of all stages' time)", ylim=(0, 1))
axes.legend(frameon=False)
axes.grid(alpha=0.3)
plt.show()
worst = max(
    abs(float(found.bubble) - float(FORMULAS["gpipe"].bubble(p, m, 1))) for (p, m), found in runs.items()
)
print(f"largest difference between a run and the formula: {worst:.1e}")

# %% [markdown]
# So "a pipeline of p stages is p times as fast" needs many microbatches. The speed-up is p times the busy part:

# %%
print("speed-up   " + "".join(f"  m = {m:<4}" for m in (1, 4, 16, 32)))
for p in (2, 8, 32):
    cells = [f"{p * float(runs[p, m].utilisation[0]):8.2f}" for m in (1, 4, 16, 32)]
    print(f"{p:>2} stages  " + " ".join(cells))

# %% [markdown]
# ## Why not a thousand microbatches
#
# Three things set a limit. **Messages**: each of the p − 1 boundaries is waited for once while the
# pipeline fills and once while it drains. In between messages travel while stages compute, and cost nothing:

# %%
for alpha in (0.0, 0.1, 0.5):
    took = [on_the_clock("gpipe", 8, m, alpha).makespan for m in (8, 32)]
    free = [simulate(build_schedule("gpipe", 8, m)).makespan for m in (8, 32)]
    print(f"α = {alpha:.1f} s: step {took[0]:.1f} s with 8, {took[1]:.1f} s with 32 microbatches,", end=" ")
    print(f"{took[0] - free[0]:.1f} and {took[1] - free[1]:.1f} s more than without")

# %% [markdown]
# **Efficiency**: a matrix product of few rows does not fill the machine. The time of a sample in an MLP,
# on this machine, by the size of the microbatch:

# %%
layers = MLP(MLPConfig(inputs=512, classes=512, width=512, layers=4))


def per_sample(size):
    return sum(profile_blocks(layers, np.ones((size, 512), "float32"), repeats=10)) / size


for size in (1, 4, 16, 64, 256):
    print(f"{size:>3} samples: {1e6 * minipar.launch(per_sample, 1, size)[0]:7.1f} µs a sample")

# %% [markdown]
# **Memory**: under GPipe a stage holds the activations of all m microbatches when the first backward begins.
# 1F1B and ZB-H1 of lesson 09 hold p at most.

# %%
for m in (4, 8, 16):
    found = simulate(build_schedule("gpipe", 4, m))
    print(
        f"{m:>2} microbatches: live at once {found.peak_live}, by the formula {FORMULAS['gpipe'].live_text} = {m}"
    )

# %% [markdown]
# ## Balance: the slowest stage sets the pace
#
# All this supposed equal stages. If one takes longer, the others wait for it at *every* microbatch, and more
# microbatches do not help. Stage 2 here takes twice as long:

# %%
show(simulate(build_schedule("gpipe", 4, 6), Costs(forward=[1, 1, 2, 1], input=[1, 1, 2, 1], weight=[1, 1, 2, 1])),
     "stage 2 twice as slow")  # fmt: skip

# %% [markdown]
# With forward times $f_s$ and backward times $b_s$ the step takes
#
# $$\sum_s f_s + (m-1)\max_s f_s + \sum_s b_s + (m-1)\max_s b_s$$
#
# so what must be small is the *largest* stage. Blocks differ: in this MLP the first layer reads an input three times
# as wide as the others', and the head is small. A profile run measures them.

# %%
uneven = MLP(MLPConfig(inputs=1536, classes=10, width=512, layers=8))
costs = minipar.launch(profile_blocks, 1, uneven, np.ones((256, 1536), "float32"), repeats=12)[0]
for block, seconds in zip(uneven.blocks, costs):
    print(f"{type(block).__name__:<8} {1e3 * seconds:6.2f} ms")

# %% [markdown]
# Cutting a row of numbers so that the largest sum is smallest is the *linear partition problem*. `split_stages`
# solves it exactly, by dynamic programming over (stages used, blocks placed). Compared with the same number of
# blocks for each:

# %%
STAGES = 4
cuts = {
    "equal count": [range(a[0], a[-1] + 1) for a in np.array_split(np.arange(len(costs)), STAGES)],
    "smallest maximum": split_stages(costs, [1.0] * STAGES),
}
figure, axes = plt.subplots(figsize=(7, 2.2), layout="constrained")
for row, cut in enumerate(cuts.values()):
    for k, stage in enumerate(cut):
        for i in stage:
            axes.barh(row, 1e3 * costs[i], left=1e3 * sum(costs[:i]), color=COLOURS[k], edgecolor="white")
axes.set_yticks(range(len(cuts)), cuts)
axes.invert_yaxis()
axes.set_xlabel("blocks in order, as wide as they take (ms); a colour is a stage")
plt.show()
for name, cut in cuts.items():
    sums = [sum(costs[stage.start : stage.stop]) for stage in cut]
    step = simulate(build_schedule("gpipe", STAGES, 16), Costs(sums, sums, sums)).makespan
    print(f"{name:<17} stages of {', '.join(f'{1e3 * s:.1f}' for s in sums)} ms;", end=" ")
    print(f"speed-up with 16 microbatches {3 * 16 * sum(costs) / step:.2f}")

# %% [markdown]
# ## Gradients: the sum over microbatches
#
# Each microbatch's loss is its sum over the count of the *whole* batch, so that gradients simply add up. Two
# mistakes are common, and both train. Here is what they do to the gradient of the serial model, with seven
# samples in microbatches of 2, 2, 2 and 1:

# %%
rng = np.random.default_rng(2)
samples, labels = rng.standard_normal((7, 6)), rng.integers(0, 4, 7)
model = MLP(MLPConfig(inputs=6, classes=4, width=8, layers=4)).materialize(seed=0, dtype="float64")


def gradient(pieces, count):
    """Return the summed gradient of the first weight, each piece's loss divided by count(piece)."""
    model.zero_grad()
    for piece in pieces:
        loss = model.loss(model(minipar.Tensor(samples[piece])), labels[piece])
        (loss / count(piece)).backward()
    return next(iter(model.parameters())).grad


serial = gradient([np.arange(7)], lambda piece: 7)
pieces = np.array_split(np.arange(7), 4)
for name, count in (
    ("the whole batch's count", lambda piece: 7),
    ("each piece's own count", len),
    ("own count, then / m", lambda piece: 4 * len(piece)),
):
    g = gradient(pieces, count)
    error = np.abs(g - serial).max() / np.abs(serial).max()
    print(
        f"{name:<24} error {error:.1e}, length {np.linalg.norm(g) / np.linalg.norm(serial):.2f} of the right one"
    )

# %% [markdown]
# The second is about m times too large, the third weights the sample of the short microbatch twice. Adam hides
# the one and a loss curve hides both, which is why this project compares gradients.
#
# The executor gets it right for every stage. (At the command line: `minipar verify gpt --ranks 4 --pp 4
# --schedule gpipe`.)

# %%
batch = Batch(samples, labels, np.arange(7), 0, 7, 7)
reference = {}
gradient([np.arange(7)], lambda piece: 7)
for name, p in model.named_parameters():
    reference[name] = p.grad


def pipelined():
    comm, mlp = minipar.world(), MLP(MLPConfig(inputs=6, classes=4, width=8, layers=4))
    stage = Stage(mlp, comm, [range(k, k + 1) for k in range(4)]).materialize(seed=0, dtype="float64")
    Executor(stage, mlp, comm, build_schedule("gpipe", 4, 4)).run(batch.split(4), batch.count)
    return {name: float(np.abs(p.grad - reference[name]).max()) for name, p in stage.named_parameters()}


for rank, errors in enumerate(minipar.launch(pipelined, 4)):
    print(f"stage {rank}:", ", ".join(f"{name} {error:.0e}" for name, error in errors.items()))

# %% [markdown]
# ## Weights that live on two stages
#
# GPT's token embedding is also its head: the first and the last stage use the same weight. Each holds a copy,
# and each finds the gradient of its own use. The gradient of the weight is the *sum* of both; if each stage
# stepped with its own, the copies would drift apart. `Stage.sum_tied` adds them, in the same order on both, so
# the copies stay bitwise equal.

# %%
TIED = GPTConfig(vocab=64, seq_len=16, width=32, layers=4, heads=4)
tokens = Batch(x, t, np.arange(8), 0, 8, t.size)


def tied_gradients():
    comm, gpt = minipar.world(), GPT(TIED)
    cuts = by_cost(items_of(gpt), comm.size).stages
    stage = Stage(gpt, comm, cuts).materialize(seed=0, dtype="float64")
    Executor(stage, gpt, comm, build_schedule("gpipe", comm.size, 4)).run(tokens.split(4), tokens.count)
    own = stage.held["wte.weight"].grad.copy() if "wte.weight" in stage.held else None
    stage.sum_tied()
    return own, stage.held["wte.weight"].grad if own is not None else None


(whole, _), *_ = minipar.launch(tied_gradients, 1)
found = minipar.launch(tied_gradients, 3)
for rank, (own, summed) in enumerate(found):
    if own is not None:
        print(f"stage {rank}: own use differs from serial by {np.abs(own - whole).max():.1e},", end=" ")
        print(f"the sum by {np.abs(summed - whole).max():.1e}")
print("copies bitwise equal:", np.array_equal(found[0][1], found[2][1]))

# %% [markdown]
# ## What a pipeline cannot cut
#
# Batch norm takes mean and variance over the batch. In microbatches these would be other numbers, and so another
# model: it is refused, with the reason.

# %%
try:
    minipar.launch(
        lambda: Stage(ConvNet(ConvNetConfig(norm="batch")), minipar.world(), [range(0, 3), range(3, 5)]), 2
    )
except UsageError as error:
    print(error)

# %% [markdown]
# Now `exercise.py`: split blocks into stages, write GPipe's schedule and its time, run one stage of it, and mend
# a pipeline with a tied weight. `experiment.py` measures the bubble on real MPI ranks:
# `mpirun -n 4 python lessons/08_pipelines/experiment.py`.

# %% [markdown]
# ## Check yourself
#
# **1.** Eight stages: how many microbatches are needed for a bubble of at most 10 %, and at most 5 %?

# %%
for limit in (Fraction(1, 10), Fraction(1, 20)):
    need = next(m for m in range(1, 1000) if FORMULAS["gpipe"].bubble(8, m, 1) <= limit)
    bubble = simulate(build_schedule("gpipe", 8, need)).bubble
    print(f"at most {float(limit):.0%}: {need} microbatches; the simulated bubble is {float(bubble):.2%}")

# %% [markdown]
# **2.** How much faster than one rank are 32 stages with 32 microbatches, in the run above?

# %%
print(f"{32 * float(runs[32, 32].utilisation[0]):.1f} times")

# %% [markdown]
# **3.** Four equal stages with many microbatches. One of them becomes half as fast. What is the speed-up over one
# rank with the four stages' work, before and after, for 64 microbatches?

# %%
for name, slow in (("equal", 1), ("one at half speed", 2)):
    c = [1, 1, slow, 1]
    took = simulate(build_schedule("gpipe", 4, 64), Costs(c, c, c)).makespan
    print(f"{name:<18} {float(3 * 64 * 4 / took):.2f}")

# %% [markdown]
# **4.** A GPT of width 4096 with 2048 tokens a sample in float16: how many bytes cross a boundary for each sample
# and direction, and what does an all-reduce of the gradients of one of its blocks (12 C² parameters) come to?

# %%
width, length = 4096, 2048
print(f"{2 * length * width / 2**20:.0f} MiB across the boundary,", end=" ")
print(f"{2 * 12 * width**2 / 2**20:.0f} MiB of gradients a block")
