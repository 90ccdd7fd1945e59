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
# # 09 · Better pipeline schedules
#
# **In which order should a pipeline's stages work, and what does each order pay for a smaller bubble?**
#
# GPipe of lesson 08 runs all forwards, then all backwards. It idles while it fills and drains, and it holds the
# activations of every microbatch at once. Three schedules do better, each in one respect: 1F1B in memory,
# interleaved 1F1B in time for more messages, ZB-H1 in time for finer backward steps.
#
# The code to read is `minipar/parallel/pipeline/`, first `schedules.py`: a schedule is a list, not a program.

# %%
import io

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Image
from matplotlib.colors import to_rgb
from matplotlib.patches import Patch

import minipar
from minipar.comm import Clock
from minipar.data import Batch
from minipar.errors import UsageError
from minipar.models import GPT, MLP, GPTConfig, MLPConfig
from minipar.parallel.memory import held
from minipar.parallel.pipeline import (
    FORMULAS,
    Costs,
    Span,
    build_schedule,
    check,
    from_csv,
    must_not_block,
    simulate,
    timeline,
    to_csv,
    with_communication,
)
from minipar.parallel.pipeline.executor import Executor
from minipar.parallel.pipeline.simulator import held_after
from minipar.parallel.pipeline.stage import Stage
from minipar.plot import COLOURS, gantt
from minipar.recompute import recompute_blocks
from minipar.tape import run_deferred
from minipar.timeline import KIND_COLOURS, KIND_NAMES

# %% [markdown]
# Here are the four, on 4 stages with 8 microbatches. A row is a stage, time goes right, the number in a box is
# the microbatch. Hatched is the bubble. The forward of a microbatch through one stage takes 1, its backward 2.


# %%
def draw(timelines, width=11.0):
    """Draw timelines below each other on one time axis."""
    p = [t.sizes.stages for t in timelines.values()]
    figure, rows = plt.subplots(
        len(timelines), 1, sharex=True, figsize=(width, 0.5 + 0.33 * sum(p) + 0.3 * len(p)),
        layout="constrained", squeeze=False,
    )  # fmt: skip
    end = max(float(t.makespan) for t in timelines.values())
    for axes, (name, t) in zip(rows[:, 0], timelines.items()):
        for s, spans in enumerate(t.spans):
            axes.broken_barh([(0, float(t.makespan))], (s - 0.4, 0.8), facecolor="0.97", edgecolor="0.8", hatch="///")
            for a, start, stop in spans:
                length = float(stop - start)
                colour = np.array(to_rgb(KIND_COLOURS[a.kind]))
                colour = colour if a.chunk == 0 else 1 - 0.6 * (1 - colour)
                axes.broken_barh([(float(start), length)], (s - 0.4, 0.8), facecolor=colour, edgecolor="white")
                if length / end > 0.012:
                    ink = "white" if a.kind in "FI" and a.chunk == 0 else "black"
                    middle = float(start + stop) / 2
                    axes.text(middle, s, a.microbatch, color=ink, ha="center", va="center", fontsize=7)
        axes.set(ylim=(len(t.spans) - 0.5, -0.5), yticks=range(len(t.spans)), xlim=(0, end), ylabel="stage")
        live = max(t.peak_live) / t.sizes.chunks
        axes.set_title(
            f"{name}: time {float(t.makespan):g}, bubble {100 * float(t.bubble):.0f} %,"
            f" at most {live:g} microbatches live", loc="left", fontsize=9,
        )  # fmt: skip
        axes.spines[:].set_visible(False)
    axes.set_xlabel("time (forwards of one stage)")
    kinds = {a.kind for t in timelines.values() for spans in t.spans for a, _, _ in spans}
    key = [Patch(color=KIND_COLOURS[k], label=KIND_NAMES[k]) for k in "FBIW" if k in kinds]
    figure.legend(handles=key, loc="outside lower center", ncols=len(key), frameon=False)
    plt.show()


p, m = 4, 8
whole, half = Costs(1, 1, 1), Costs(0.5, 0.5, 0.5)  # a chunk of half a stage costs half
timelines = {
    "GPipe": simulate(build_schedule("gpipe", p, m), whole),
    "1F1B": simulate(build_schedule("1f1b", p, m), whole),
    "interleaved, 2 chunks (the second is paler)": simulate(build_schedule("interleaved", p, m, 2), half),
    "ZB-H1": simulate(build_schedule("zb-h1", p, m), whole),
}
draw(timelines)

# %% [markdown]
# ## A schedule is data
#
# One list of actions for each stage, in the order in which that stage carries them out. Nothing says *when*: an
# action runs as soon as its stage is free and its input has arrived.

# %%
schedule = build_schedule("1f1b", stages=4, microbatches=8)
for stage, actions in enumerate(schedule):
    print(f"stage {stage}:", " ".join(map(str, actions)))

# %% [markdown]
# Four readers share these lists: a *checker* that says whether it can run at all, a *simulator* that says how long
# it takes, the *picture* above, and one *executor* that runs any of them. So a new schedule is 20 lines of list
# making (`schedules.py`), and everything else comes for free.

# %%
report, t = check(schedule), simulate(schedule)
print("problems:", report.problems or "none")
print(f"time {t.makespan}, bubble {t.bubble}, live activations by stage {t.peak_live}")

# %% [markdown]
# ## 1F1B: the same bubble in less memory
#
# As soon as a backward can run it does, and its activation is freed. Stage $s$ of $p$ runs $p-s-1$ forwards to
# warm up, then alternates one forward, one backward. The bubble is GPipe's,
#
# $$\text{bubble} = \frac{p-1}{m+p-1},$$
#
# but stage $s$ holds at most $\min(m, p-s)$ activations, however many microbatches there are.

# %%
print("  m   bubble GPipe   1F1B    live on stage 0: GPipe  1F1B")
for m in (4, 8, 16, 64):
    a, b = (simulate(build_schedule(name, 4, m)) for name in ("gpipe", "1f1b"))
    print(f"{m:3}   {float(a.bubble):12.3f}  {float(b.bubble):6.3f}   {a.peak_live[0]:22}  {b.peak_live[0]:4}")

# %% [markdown]
# That is why it matters: more microbatches make the bubble smaller, and with GPipe they are paid in memory. With
# 1F1B they are free.

# %%
figure, axes = plt.subplots(figsize=(8, 2.8), layout="constrained")
for (name, style), colour in zip({"gpipe": "-", "1f1b": "--"}.items(), COLOURS):
    actions = [a for a in build_schedule(name, 4, 16)[0]]
    axes.step(range(len(actions)), held_after(actions), style, where="mid", color=colour, label=name)
axes.set(xlabel="actions done on stage 0", ylabel="activations held", title="4 stages, 16 microbatches", ylim=(0, None))
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# ## Interleaved: thinner stages
#
# The bubble is made of stages that wait for the first microbatch to come through. Let each rank hold $v$ *chunks*
# of the model, every one $v$ times thinner: rank 0 of 2 holds the first and the third quarter, rank 1 the second
# and the fourth. A microbatch then reaches the last rank $v$ times sooner:
#
# $$\text{bubble} = \frac{p-1}{vm+p-1}.$$
#
# The price is messages: an activation goes round the ranks $v$ times. (Narayanan et al. 2021)


# %%
def messages(schedule):
    """Return the number of arrays that all ranks send in one step."""
    return sum(a.kind in ("SEND_F", "SEND_B") for actions in with_communication(schedule) for a in actions)


p, m = 4, 8
print("chunks   bubble  formula   messages   held on rank 0 (stages' worth of activations)")
schedules = {1: build_schedule("1f1b", p, m), **{v: build_schedule("interleaved", p, m, v) for v in (2, 4)}}
for v, schedule in schedules.items():
    t = simulate(schedule, Costs(1 / v, 1 / v, 1 / v))
    formula = float(FORMULAS["interleaved"].bubble(p, m, v))
    print(f"{v:6} {float(t.bubble):8.3f} {formula:8.3f} {messages(schedule):10} {t.peak_live[0] / v:10.2f}")

# %% [markdown]
# So whether it pays depends on what a message costs. Below, the time of a step over the time of a message, both
# in forwards of a stage: where messages are slow, more chunks are a loss.

# %%
prices = np.linspace(0, 1, 21)
figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
for (v, schedule), colour, style in zip(schedules.items(), COLOURS, ("-", "--", ":")):
    spans = [simulate(schedule, Costs(1 / v, 1 / v, 1 / v, float(price))).makespan for price in prices]
    axes.plot(prices, spans, style, color=colour, label=f"{v} chunk{'s' * (v > 1)}")
axes.set(xlabel="time of a message (forwards of a stage)", ylabel="time of a step")
axes.set_title(f"{p} stages, {m} microbatches", loc="left")
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# ## Zero bubble: backward is two things
#
# For $y = xW$ and a gradient $g$ of $y$, backward computes
#
# $$\underbrace{g\,W^\top}_{I:\ \text{the stage before waits for it}} \qquad\text{and}\qquad
#   \underbrace{x^\top g}_{W:\ \text{only the optimizer needs it}}$$
#
# In the engine a weight's gradient may be *deferred*: backward returns, and a list holds what is left to do.

# %%
model = MLP(MLPConfig(inputs=4, classes=3, width=5, layers=2)).materialize(seed=0)
x = minipar.tensor(np.ones((2, 4), "float32"), requires_grad=True)
later = []
model.loss(model(x), np.array([0, 1])).backward(deferred=later)  # I
print("after I: input gradient", x.grad.shape, "| weights with a gradient:",
      sum(p.grad is not None and p.grad.ndim == 2 for p in model.parameters()), "| deferred:", len(later))  # fmt: skip
run_deferred(later)  # W
print("after W: weights with a gradient:", sum(p.grad is not None and p.grad.ndim == 2 for p in model.parameters()))

# %% [markdown]
# Schedule ZB-H1 (Qi et al. 2023) is 1F1B with every B split. Stage $s$ puts W off by $s$ microbatches: the stages
# before get their gradients sooner, and the W's that are left fill the drain. With $F = I = W$ and $m \ge p$
#
# $$\text{bubble} = \frac{p-1}{3m+p-1},$$
#
# and no stage holds more than $p$ activations, each until its W.

# %%
for stage, actions in enumerate(build_schedule("zb-h1", 4, 6)):
    print(f"stage {stage}:", " ".join(map(str, actions)))
for name in ("1f1b", "zb-h1"):
    t = simulate(build_schedule(name, 4, 6))
    print(f"{name:6} bubble {t.bubble} = {float(t.bubble):.3f}, live by stage {t.peak_live}")

# %% [markdown]
# $F = I = W$ is a model of a transformer's blocks. In general a stage of 1F1B idles for $(p-1)(F+I+W)$, and one of
# ZB-H1 for $(p-1)(F + I - W)$, as long as W is no longer than F and I are. What a longer W has in excess fills
# nothing: the last line.

# %%
p, m = 4, 8
for costs in ((1, 1, 1), (1, 1.5, 0.5), (1, 2, 1), (1, 1, 2)):
    f, i, w = costs
    idle = {}
    for name in ("1f1b", "zb-h1"):
        t = simulate(build_schedule(name, p, m), Costs(*map(float, costs)))
        idle[name] = float(t.makespan) - m * (f + i + w)
    print(f"F, I, W = {f, i, w}: idle a stage {idle['1f1b']:5.2f} with 1F1B, {idle['zb-h1']:5.2f} with ZB-H1,"
          f" (p-1)(F+I-W) = {(p - 1) * (f + i - w):5.2f}")  # fmt: skip

# %% [markdown]
# ## The checker
#
# A schedule that is wrong does not fail politely. Ranks hang, or a gradient is made from another microbatch's
# input. So every list is checked before it runs. Three ways to spoil a good one:

# %%
good = build_schedule("1f1b", 3, 4)
missing = [list(actions) for actions in good]
del missing[1][-1]
early = [list(actions) for actions in good]
early[2][0], early[2][1] = early[2][1], early[2][0]
crossed = [list(actions) for actions in good]  # stage 0 wants B0 before it sends F1, stage 1 wants F1 before B0
crossed[0] = [good[0][0], *[a for a in good[0] if str(a) == "B0"], *[a for a in good[0][1:] if str(a) != "B0"]]
for bad in (missing, early, crossed):
    print("-", check(bad).problems[0])

# %% [markdown]
# The last one is a *deadlock*, and it is named as a ring: each stage waits for the next one.
#
# Sends and receives are no part of the lists above; a pass of its own puts them in. Where the receives go
# matters once a send blocks until it is received: with each receive straight before its use, as one writes it by
# hand, two neighbours in 1F1B's alternation send to each other at the same time.

# %%
for receives in ("early", "late"):
    complete = with_communication(build_schedule("1f1b", 3, 4), receives)
    unsafe = must_not_block(complete)
    print(f"receives {receives}: {len(unsafe)} sends must not block;", [f"{a} of stage {a.stage}" for a in unsafe[:2]])

# %% [markdown]
# And memory can be reused too early. A stage that receives into one buffer overwrites the input of a microbatch
# whose backward is still to come. The loss still falls, since stage 0 is right; every other gradient is wrong.

# %%
report = check(build_schedule("1f1b", 4, 8), receive_buffers=1)
print(report.problems[0])
print("receive buffers that are enough, by stage:", report.receive_buffers)

# %% [markdown]
# ## A schedule by hand
#
# A schedule can be written as CSV, in an editor or a spreadsheet: a line is a stage, `1F0` is the forward of
# microbatch 0 on stage 1, empty cells are idle. On 2 stages, a schedule with every backward split, in which stage 1
# leaves all its W's to the end:

# %%
text = """\
0F0,0F1,0I0,0F2,0I1,0W0,0I2,0W1,0W2
,1F0,1I0,1F1,1I1,1F2,1I2,1W0,1W1,1W2
"""
mine = from_csv(text, "mine.csv")
draw({"by hand": simulate(mine), "1F1B": simulate(build_schedule("1f1b", 2, 3))}, width=8)
print("activations by hand", simulate(mine).peak_live, "and of 1F1B", simulate(build_schedule("1f1b", 2, 3)).peak_live)

# %% [markdown]
# A mistake is refused with its row and column. From a terminal, `minipar schedule mine.csv` does the same and
# draws it.

# %%
for wrong in (text.replace("1W1,", ""), text.replace("0I0,0F2,0I1,0W0", "0W0,0F2,0I1,0I0"), text.replace("1F2", "0F2"),
              text.replace("1F1", "1X1")):  # fmt: skip
    try:
        from_csv(wrong, "mine.csv")
    except UsageError as error:
        print("-", error)

# %% [markdown]
# ## Running it
#
# The executor takes any schedule that passes the check (`executor.py`, one loop). Here it runs the one above, on
# two ranks with half of a GPT each; the gradients are compared with those of the serial model.

# %%
CONFIG = GPTConfig(vocab=32, seq_len=8, width=16, layers=2, heads=2, tied=False)


def global_batch(samples):
    """Return a batch of token ids and their successors."""
    ids = np.random.default_rng(0).integers(0, CONFIG.vocab, (samples, CONFIG.seq_len + 1))
    return Batch(ids[:, :-1], ids[:, 1:], np.arange(samples), 0, samples, samples * CONFIG.seq_len)


batch = global_batch(6)
serial = GPT(CONFIG)
serial.materialize(seed=0, dtype="float64")
(serial.loss(serial(batch.inputs), batch.targets) / batch.count).backward()
serial.assign_paths()
reference = {name: p.grad for name, p in serial.named_parameters()}


def run(schedule, cuts):
    """One step of the GPT on this rank's stage; returns the worst relative error and the most live microbatches."""
    comm, model = minipar.world(), GPT(CONFIG)
    stage = Stage(model, comm, cuts).materialize(seed=0, dtype="float64")
    executor = Executor(stage, model, comm, schedule)
    microbatches = 1 + max(a.microbatch for actions in schedule for a in actions)
    executor.run(batch.split(microbatches), batch.count)
    largest = max(np.abs(g).max() for g in reference.values())
    errors = [np.abs(p.grad - reference[name]).max() / largest for name, p in stage.named_parameters()]
    return max(errors), executor.peak_live


schedules = {"by hand": mine, **{name: build_schedule(name, 2, 6) for name in ("gpipe", "1f1b", "zb-h1")}}
for name, schedule in schedules.items():
    found = minipar.launch(run, 2, schedule, [range(0, 2), range(2, 4)])
    print(f"{name:8} worst error of a gradient {max(e for e, _ in found):.1e}, live by stage {[n for _, n in found]}")

# %% [markdown]
# ## To 32 stages, on the virtual clock
#
# No laptop has 32 ranks to spare, and timing 32 threads on two cores would measure the laptop. So the executor
# runs for real, every message and every gradient, but on the threads engine's *virtual clock*: each action
# declares its time, and a receive ends at the later of its own time and the message's arrival.


# %%
def step_on_the_clock(name, p, m, v=1, alpha=0.0):
    """Run one step of a tiny model on p ranks; return its measured timeline."""
    schedule = build_schedule(name, p, m, v)
    seconds = {"F": 1 / v, "B": 2 / v, "I": 1 / v, "W": 1 / v}
    data = Batch(np.ones((m, 2)), np.zeros(m, int), np.arange(m), 0, m, m)

    def one_rank():
        comm, model = minipar.world(), MLP(MLPConfig(inputs=2, classes=2, width=2, layers=p * v))
        stage = Stage(model, comm, [range(k, k + 1) for k in range(p * v)]).materialize(seed=0)
        executor = Executor(stage, model, comm, schedule, declare=lambda action: seconds[action.kind])
        executor.run(data.split(m), data.count)
        return executor.spans

    spans = minipar.launch(one_rank, p, clock=Clock(alpha))
    return timeline([[Span(s.action, s.start, s.end) for s in stage] for stage in spans])


m = 32
measured = {}
for name, v, stages in (("1f1b", 1, (4, 8, 16, 32)), ("interleaved", 2, (4, 8, 16)), ("zb-h1", 1, (4, 8, 16, 32))):
    measured[name, v] = {p: step_on_the_clock(name, p, m, v) for p in stages}

# %% [markdown]
# Points are what the executor took, lines are the papers' formulas.

# %%
figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
for ((name, v), found), colour, mark in zip(measured.items(), COLOURS, "os^"):
    line = range(2, 33)
    axes.plot(line, [float(FORMULAS[name].bubble(p, m, v)) for p in line], color=colour, linewidth=1)
    label = name if v == 1 else f"{name}, {v} chunks"
    axes.plot(list(found), [float(t.bubble) for t in found.values()], mark, color=colour, label=label)
    assert all(abs(float(t.bubble) - FORMULAS[name].bubble(p, m, v)) < 1e-9 for p, t in found.items())
axes.set(xlabel="stages", ylabel="bubble (share of all stages' time)", title=f"{m} microbatches", ylim=(0, None))
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# The measured run can be drawn like a predicted one: ZB-H1 on 16 stages, from the spans that the ranks reported.

# %%
picture = io.BytesIO()
gantt(measured["zb-h1", 1][16], picture, title="ZB-H1 on 16 stages, measured on the virtual clock", unit="s")
Image(picture.getvalue(), width=900)

# %% [markdown]
# ## Recompute: memory for time
#
# What a stage holds is (microbatches live) × (bytes of one). The schedule settles the first. The second can be cut
# by keeping only the input of each block and running its forward again in backward (Chen et al. 2016,
# `minipar/recompute.py`). The ledger counts what one microbatch of a small GPT keeps:

# %%
SIZES = GPTConfig(vocab=64, seq_len=64, width=64, layers=4, heads=4)
ids = np.random.default_rng(0).integers(0, 64, (2, 65))
kept = {}
for again in (False, True):
    model = GPT(SIZES).materialize(seed=0)
    if again:
        recompute_blocks(model)
    loss = model.loss(model(ids[:, :-1]), ids[:, 1:])
    kept[again] = held(model, output=loss).activations
    loss.backward()
    print(f"recompute {again!s:5}: {kept[again]:9,} bytes of activations for a microbatch")
print(f"ratio {kept[False] / kept[True]:.1f}")

# %% [markdown]
# The price is one more forward in each backward, so I costs 2 where it cost 1. All choices of this lesson in one
# picture, for 8 stages and 16 microbatches: time of a step against the memory of the fullest stage. Lower left is
# better. ZB-H1 wins at these costs; what the picture leaves out is that *every* stage of it holds $p$ activations,
# where 1F1B's later stages hold fewer, that its gain needs W as long as F and I, and that messages cost nothing here.

# %%
p, m = 8, 16
figure, axes = plt.subplots(figsize=(7.5, 4.2), layout="constrained")
table = {}
for again, fill in ((False, "full"), (True, "none")):
    for (name, v), colour, mark in zip((("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("zb-h1", 1)), COLOURS, "Dos^"):
        costs = Costs(1 / v, (1 + again) / v, 1 / v)
        t = simulate(build_schedule(name, p, m, v), costs, activation_bytes=kept[again] / v)
        table[name, again] = float(t.makespan), max(map(float, t.peak_bytes)) / 2**20
        label = name + (", recompute" if again else "")
        axes.plot(*table[name, again], mark, color=colour, fillstyle=fill, markersize=9, label=label)
axes.set(xlabel="time of a step (forwards of a stage)", ylabel="activations of the fullest stage (MiB)", yscale="log")
axes.set_yticks([1, 2, 4, 8, 16, 32, 64], ["1", "2", "4", "8", "16", "32", "64"])
axes.minorticks_off()
axes.set_title(f"{p} stages, {m} microbatches", loc="left")
axes.legend(frameon=False, fontsize=8, ncols=2)
plt.show()

# %% [markdown]
# ## Check yourself
#
# 1. A pipeline of 8 stages is to idle at most a tenth of the time. How many microbatches does 1F1B need, and how
#    many ZB-H1?

# %%
for name in ("1f1b", "zb-h1"):
    need = next(m for m in range(8, 500) if simulate(build_schedule(name, 8, m)).bubble <= 0.1)
    print(f"{name}: {need} microbatches")

# %% [markdown]
# 2. On stage 2 of 4, how many activations does 1F1B hold with 100 microbatches, and how many ZB-H1?

# %%
for name in ("1f1b", "zb-h1"):
    print(f"{name}: {simulate(build_schedule(name, 4, 100)).peak_live[2]}")

# %% [markdown]
# 3. On 4 ranks with 8 microbatches, from which price of a message (in forwards of a stage) is the interleaved
#    schedule of 4 chunks slower than plain 1F1B?

# %%
plain, thin = build_schedule("1f1b", 4, 8), build_schedule("interleaved", 4, 8, 4)
for price in np.arange(0, 2, 0.01):
    a, b = simulate(thin, Costs(0.25, 0.25, 0.25, float(price))), simulate(plain, Costs(1, 1, 1, float(price)))
    if a.makespan > b.makespan:
        print(f"from {price:.2f} on")
        break

# %% [markdown]
# 4. Recompute makes backward longer by a forward. By what factor does a step of 1F1B get longer, and does that
#    depend on the number of stages?

# %%
for stages in (2, 8, 32):
    a, b = (simulate(build_schedule("1f1b", stages, 32), Costs(1, i, 1)).makespan for i in (1, 2))
    print(f"{stages:2} stages: {float(b) / float(a):.3f} times as long")

# %% [markdown]
# 5. Which lines does the CSV of 1F1B on 2 stages with 2 microbatches have?

# %%
print(to_csv(build_schedule("1f1b", 2, 2)))

# %% [markdown]
# Now write your own: `minipar start 09 DIR` copies the exercise out, `minipar grade 09 --file DIR/exercise.py`
# grades it. The same schedules on real MPI ranks: `mpirun -n 4 python lessons/09_schedules/experiment.py`.
