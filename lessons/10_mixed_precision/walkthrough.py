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
# # 10 · Mixed precision and loss scaling
#
# **Why do small gradients vanish in float16, and what brings them back?**
#
# Half the bytes mean half the memory and half the traffic, and on a GPU several times the arithmetic. But float16
# has ten bits of fraction and few exponents, and a gradient uses all of them. Three measures make it work:
# float32 *master weights*, float32 *sums*, and a *loss scale* that all ranks agree on.
#
# The code to read is `minipar/amp/`: `scaler.py` and `autocast.py`.

# %%
import io
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Image

import minipar
from minipar import nn, ops, optim, tensor
from minipar.amp import ExponentHistogram, GradScaler, autocast
from minipar.amp.histogram import BINS
from minipar.config import TrainConfig
from minipar.models import GPT, MLP, GPTConfig, MLPConfig
from minipar.parallel.memory import held
from minipar.plot import COLOURS, precision_histograms
from minipar.training import Job, load_data

# %% [markdown]
# The problem in one picture. An MLP learns to read digits in float32; after 300 steps the sizes of all elements of
# its gradient are counted, in powers of two. Behind them: what float16 can hold.

# %%
SETTINGS = dict(model="mlp", steps=300, lr=1e-2, device="cpu")
DIGITS = load_data(TrainConfig(**SETTINGS).resolved())


def train(**changes):
    """Train on one rank; return the job and the losses, step by step."""

    def one_rank():
        job = Job(TrainConfig(**{**SETTINGS, **changes}).resolved(), minipar.world(), DIGITS)
        return job, [record.loss for record in job.train()]

    return minipar.launch(one_rank, ranks=1)[0]


def draw_histogram(axes, histogram, shift=0, title=""):
    """Draw counts by exponent, moved by `shift`, over float16's range."""
    for low, high, what, shade in ((-60, -25, "vanishes", "0.75"), (-25, -14, "subnormal", "0.9"),
                                   (-14, 16, "normal", "1"), (16, 30, "infinite", "0.75")):  # fmt: skip
        axes.axvspan(low, high, color=shade, zorder=0)
        axes.text((low + high) / 2, 0.97, what, ha="center", va="top", transform=axes.get_xaxis_transform())
    axes.bar(histogram.exponents + shift + 0.5, histogram.counts[:BINS], 0.9, color=COLOURS[0])
    axes.set(xlim=(-60, 30), ylim=(0, 1.2 * histogram.counts[:BINS].max()), ylabel="elements")
    axes.set_title(title, loc="left", fontsize=10)


job, float32_losses = train()
gradients = ExponentHistogram()
for p in job.model.parameters():
    gradients.add(p.grad)
figure, rows = plt.subplots(2, 1, figsize=(8, 4.2), sharex=True, layout="constrained")
draw_histogram(rows[0], gradients, 0, "the gradient as it is")
draw_histogram(rows[1], gradients, 16, "the gradient of 2^16 times the loss")
rows[1].set_xlabel("exponent: floor(log2 |x|)")
plt.show()
for k in (0, 8, 16, 24):
    small, large = gradients.vanishing(2.0**k), gradients.overflowing(2.0**k)
    print(f"loss scale 2^{k:<2}: {small:6.2%} vanish, {large:6.2%} overflow")

# %% [markdown]
# The gradient lies far to the left, and much of float16's range to the right is unused. That is the whole idea of
# a loss scale: move it there. The rest of this lesson is how, and what else has to change.
#
# ## float16 in a few numbers

# %%
half = np.finfo(np.float16)
print("largest", float(half.max), "| smallest normal", float(half.smallest_normal), "= 2^-14")
print("smallest at all", float(half.smallest_subnormal), "= 2^-24 | next number after 1:", 1 + float(half.eps))
with np.errstate(over="ignore"):
    print("70000 becomes", np.float16(70000), "| 2^-25 / 2 becomes", np.float16(2.0**-26))
for x in (0.01, 1, 100, 2048, 30000):
    print(f"gap between float16 numbers at {x:7g}: {float(np.spacing(np.float16(x))):g}")

# %% [markdown]
# ## First measure: master weights
#
# A step changes a weight by much less than the weight itself. Below half the gap to the next number, the change is
# rounded away: 1 + 0.0002 is 1. A thousand steps of 0.0002 from a weight of 1:

# %%
steps, step = 1000, 2e-4
low, master = np.float16(1), np.float32(1)
path = []
for _ in range(steps):
    low = np.float16(low + np.float16(step))
    master = np.float32(master + np.float32(step))
    path.append((low, master, np.float16(master)))
figure, axes = plt.subplots(figsize=(7, 2.8), layout="constrained")
for values, name, style, colour in zip(zip(*path), ("float16 weight", "float32 master", "its float16 copy"),
                                       ("-", "-", ":"), COLOURS):  # fmt: skip
    axes.plot(values, style, color=colour, label=name)
axes.set(xlabel="step", ylabel="weight")
axes.legend(frameon=False)
plt.show()
print(f"after {steps} steps: float16 {low}, float32 {master:.4f}, its float16 copy {np.float16(master)}")

# %% [markdown]
# So parameters stay float32 (the *master weights*, Micikevicius et al. 2018), and are rounded to float16 where an
# operation uses them. That is `autocast`: each operation chooses the precision that suits it.

# %%
layer = nn.Linear(4, 3).materialize(seed=0, dtype="float32")
x = tensor(np.ones((2, 4), "float32"), requires_grad=True)
with autocast("float16"):
    y = layer(x)  # multiplies: where the time goes
    p = ops.softmax(y)  # exponentials overflow early: exp(12) > 65504
    total = ops.sum(y)  # sums
    mixed = y + p  # the widest of what it is given
for name, t in {"the weight": layer.weight, "linear": y, "softmax": p, "sum": total, "linear + softmax": mixed}.items():
    print(f"{name:17} {t.dtype}")
total.backward()
print("the gradient of the weight", layer.weight.grad.dtype)

# %% [markdown]
# ## Second measure: sums in float32
#
# Adding up is where float16 is worst. A running sum of ones stops at 2048, since 2049 is no float16 number:

# %%
ones = np.ones(10_000, np.float16)
running = np.add.accumulate(ones)  # rounded after each addition
print("float16 sum of 10,000 ones, one after the other:", int(running[-1]))
print("float32 sum, rounded once at the end:", int(np.float16(ones.sum(dtype=np.float32))))

# %% [markdown]
# A matrix product is nothing but sums. So a tensor core multiplies float16 numbers and adds them up in float32;
# here the same is done by NumPy. Compare with a product that rounds its running sum:

# %%
rng = np.random.default_rng(0)
for n in (64, 1024, 16384):
    a, b = (rng.random(n).astype(np.float16) for _ in range(2))
    exact = a.astype(np.float64) @ b.astype(np.float64)
    with autocast("float16"):
        ours = ops.linear(tensor(a[None]), tensor(b[None])).data[0, 0]
    low = np.add.accumulate(a * b)[-1]
    ours_error, low_error = (abs(found - exact) / exact for found in (ours, low))
    print(f"{n:6} terms: error {ours_error:.1e} with float32 sums, {low_error:.1e} without")

# %% [markdown]
# The sum over ranks is a sum, too. Gradients in minipar are float32 by then, at twice the traffic. This is what a
# float16 all-reduce would make of four ranks' gradients:

# %%
parts = {"40000 each": [40000.0] * 4, "2048 and three ones": [2048.0, 1, 1, 1], "1e-8 each, times 2^8": [2.56e-6] * 4}


def reduced(values, dtype):
    comm = minipar.world()
    with np.errstate(over="ignore"):
        return float(comm.all_reduce(np.array(values[comm.rank : comm.rank + 1], dtype))[0]), comm.ledger.bytes()


for name, values in parts.items():
    (low, less), (full, more) = (minipar.launch(reduced, 4, values, dtype)[0] for dtype in ("float16", "float32"))
    print(f"{name:22} float16 {low:<12g} float32 {full:<12g} exact {sum(values):<12g} bytes {less} and {more}")

# %% [markdown]
# ## Third measure: the loss scale
#
# The loss of a step is the mean over the global batch: its gradient by the logits of one sample is
#
# $$\frac{\partial L}{\partial z} = \frac{p - y}{\text{count}},$$
#
# so every activation's gradient has $1/\text{count}$ in it. With a batch of a million tokens on a thousand ranks
# that is $10^{-6}$ before anything else is multiplied to it. Here one rank holds 64 samples of a batch that is
# that large; the relative error of its float16 gradient, against float32:


# %%
def gradient_error(count, scale, dtype="float16"):
    """Return the relative error of a gradient of 64 samples of a batch of `count`."""
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((64, 64)).astype("float32"), rng.integers(0, 10, 64)
    found = []
    for enabled in (True, False):
        model = MLP(MLPConfig(inputs=64, classes=10, width=64, layers=3)).materialize(seed=0)
        with autocast(dtype, enabled=enabled):
            loss = model.loss(model(tensor(x)), y) / count
        (loss * (scale if enabled else 1.0)).backward()
        found.append(np.concatenate([p.grad.ravel() for p in model.parameters()]) / (scale if enabled else 1.0))
    low, full = found
    return np.linalg.norm(low - full) / np.linalg.norm(full)


counts = 2.0 ** np.arange(6, 31, 2)
figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
for scale, colour, style in zip((1.0, 2.0**8, 2.0**16), COLOURS, ("-", "--", ":")):
    name = "no scale" if scale == 1 else f"loss scale 2^{round(np.log2(scale))}"
    axes.loglog(counts, [gradient_error(c, scale) for c in counts], style, color=colour, label=name, base=2)
axes.set_yscale("log", base=10)
axes.set(xlabel="targets in the global batch", ylabel="relative error of the gradient")
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# Multiplying the loss by $S$ multiplies every gradient by $S$, since differentiation is linear: the curve moves to
# the right by exactly $S$. After backward the gradients are divided by $S$, in float32. (The 1 % that is left
# comes from forward: a ReLU opens or closes for a value that was rounded.)
#
# A scale too large is noticed at once: something is infinite. So the scale is found by trial. It doubles after
# many good steps; an overflow halves it, and that step is *skipped*. `GradScaler` is this small state machine:
#
# | overflow | count of good steps | scale |
# |---|---|---|
# | no | + 1 | the same |
# | no, and the count reaches the interval | 0 | × 2 |
# | yes | 0 | × ½ |

# %%
w = tensor(np.ones(1, "float32"), requires_grad=True)
sgd = optim.SGD([w], lr=0.0)
scaler = GradScaler(init_scale=2.0**10, growth_interval=6)
scales, overflows = [], []
for _ in range(40):
    w.grad = np.array([np.inf if scaler.get_scale() > 2.0**12 else 1.0], "float32")  # this model bears 2^12
    overflows.append(not np.isfinite(w.grad).all())
    scales.append(np.log2(scaler.get_scale()))
    scaler.step(sgd)
    scaler.update()
figure, axes = plt.subplots(figsize=(7, 2.6), layout="constrained")
axes.step(range(40), scales, where="mid", color=COLOURS[0])
axes.plot([i for i in range(40) if overflows[i]], [s for s, o in zip(scales, overflows) if o], "x", color=COLOURS[1],
          label="overflow, step skipped")  # fmt: skip
axes.set(xlabel="step", ylabel="log2 of the scale", yticks=range(10, 14))
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# The order within a step matters: scale the loss, backward, *unscale*, clip, step or skip, update the scale. Clipping
# before unscaling compares a norm that is $S$ times too large with its limit.
#
# Now for real: the digits again, in float16 from a scale of $2^{24}$, which is too high.

# %%


def train_by_hand(init_scale, steps=300):
    """Train the MLP with autocast and a scaler; return losses and scales."""
    job = Job(TrainConfig(**SETTINGS, amp="fp16").resolved(), minipar.world(), DIGITS)
    job.precision.scaler = GradScaler(init_scale=init_scale, growth_interval=60)
    losses, scales = [], []
    for record in job.train():
        losses.append(record.loss)
        scales.append(job.precision.scaler.get_scale())
    return losses, scales, job.precision.skipped, job.evaluate()["accuracy"]


losses, scales, skipped, accuracy = minipar.launch(train_by_hand, 1, 2.0**24)[0]
figure, (top, bottom) = plt.subplots(2, 1, figsize=(7, 4.4), sharex=True, layout="constrained")
top.semilogy(float32_losses, color=COLOURS[0], label="float32")
top.semilogy(losses, "--", color=COLOURS[1], label="float16", linewidth=1)
top.set_ylabel("loss (nats)")
top.legend(frameon=False)
bottom.step(range(len(scales)), np.log2(scales), color=COLOURS[1])
bottom.set(xlabel="step", ylabel="log2 of the scale")
plt.show()
print(f"{skipped} of {len(losses)} steps skipped; accuracy {accuracy:.3f}, float32 {job.evaluate()['accuracy']:.3f}")

# %% [markdown]
# ## On several ranks: one decision
#
# An overflow happens where the large numbers are, and under ZeRO, tensor or pipeline parallelism that is one rank:
# each holds another part of the gradient. If that rank skips and the others step, the model falls apart without
# an error. So the scaler asks all ranks: one all-reduce of one byte.


# %%
def planted_overflow(agree):
    """Three steps on this rank, with an infinity in rank 2's part of the gradient; returns what came of it."""
    comm = minipar.world()
    mine = tensor(np.ones(2, "float32"), requires_grad=True)  # this rank's part of the model
    adam = optim.AdamW([mine], lr=0.1)
    scaler = GradScaler(init_scale=2.0**10, comm=comm if agree else None)
    for step in range(3):
        g = np.full(2, scaler.get_scale(), "float32")
        mine.grad = np.where(step == 1 and comm.rank == 2, np.inf, g).astype("float32")
        scaler.step(adam)
        scaler.update()
    return adam.state[0]["step"], scaler.get_scale(), comm.ledger.bytes()


for agree in (False, True):
    found = minipar.launch(planted_overflow, 4, agree)
    print(f"{'agreed' if agree else 'each for itself':16} steps taken {[n for n, _, _ in found]},",
          f"scales {[f'{s:g}' for _, s, _ in found]}, bytes sent for it {[b for _, _, b in found]}")  # fmt: skip

# %% [markdown]
# Left to themselves, rank 2 is a step behind for good, and its scale is another one, so that its gradients no
# longer add up with the others'. (In plain data parallelism the sum is infinite on all ranks, so they would agree
# by luck; `scaler.py` does not rely on it.)
#
# ## What it saves
#
# Weights, gradients and Adam's moments stay float32. What halves is what a forward keeps for backward, as far as
# it is float16; the ledger counts it, for a small GPT:

# %%
config = GPTConfig(vocab=64, seq_len=64, width=64, layers=4, heads=4)
ids = rng.integers(0, 64, (4, 65))
for name in ("float32", "float16"):
    model = GPT(config).materialize(seed=0)
    adam = optim.AdamW(model.parameters())
    with autocast("float16", enabled=name == "float16"):
        loss = model.loss(model(ids[:, :-1]), ids[:, 1:])
    activations = held(model, output=loss).activations
    loss.backward()
    adam.step()
    found = held(model, adam)
    print(f"{name}: activations {activations:,} bytes, parameters {found.parameters:,}, gradients {found.gradients:,},"
          f" moments {found.optimizer:,}")  # fmt: skip

# %% [markdown]
# Norms and the softmax of the loss compute in float32, so activations do not halve completely. No time is saved
# here: NumPy has no float16 arithmetic, it casts forth and back. On a GPU the products run on tensor cores.
#
# ## Which layers bear it
#
# Some layers need float32, and which ones can be seen: `PrecisionPolicy` counts the exponents of every parameter's
# values and gradients for some steps, then decides. Its counts are summed over all ranks, so that all decide the
# same. Here with a strict limit, one in a thousand elements, on a model that has trained already:

# %%
with tempfile.TemporaryDirectory() as folder:
    rules = Path(folder, "policy.toml")
    rules.write_text('observe = 200\ngradient_underflow = 0.001\nfloat32 = ["layers.2.*"]\n')
    job16, _ = train(amp="fp16", precision_policy=str(rules))
print(job16.precision.policy)

# %%
picture = io.BytesIO()
precision_histograms(job16.precision.policy, picture)
Image(picture.getvalue(), width=700)

# %% [markdown]
# ## bfloat16
#
# bfloat16 keeps float32's eight bits of exponent and has seven of fraction: nothing vanishes, so it needs no loss
# scale, but it rounds eight times more coarsely. Master weights and float32 sums matter all the more.

# %%
for dtype in ("float16", "bfloat16"):
    errors = [gradient_error(count, 1.0, dtype) for count in (2.0**6, 2.0**20, 2.0**30)]
    print(f"{dtype:8} unscaled, global batch of 2^6, 2^20, 2^30: errors", *[f"{e:.1e}" for e in errors])

# %% [markdown]
# ## Check yourself
#
# 1. A weight is 0.5 and a step changes it by 0.0001. What does a float16 weight become, and from which weight on
#    is this step lost?

# %%
print("0.5 + 0.0001 =", np.float16(0.5) + np.float16(0.0001), "in float16")
sizes = 2.0 ** np.arange(-12, 2)
print("lost from", next(w for w in sizes if np.float16(w) + np.float16(1e-4) == np.float16(w)), "on (powers of two)")

# %% [markdown]
# 2. The largest element of a gradient is 0.003. What is the largest power of two that can be its loss scale?

# %%
with np.errstate(over="ignore"):
    print("2^", max(k for k in range(40) if np.isfinite(np.float16(0.003 * 2.0**k))), sep="")

# %% [markdown]
# 3. The scale starts at $2^{16}$, the model bears $2^{10}$, and the interval is 2000. How many steps are skipped
#    before the first one is taken, and how many of the next 10,000 are?

# %%
scaler, taken = GradScaler(), []
w.grad = np.ones(1, "float32")
for _ in range(10_006):
    overflowed = scaler.get_scale() > 2.0**10
    w.grad[...] = np.inf if overflowed else 1.0
    taken.append(scaler.step(sgd, lambda: True) is True)
    scaler.update()
first = taken.index(True)
print(f"{first} steps skipped at first, {(~np.array(taken[first : first + 10_000])).sum()} of the next 10,000")

# %% [markdown]
# 4. Eight ranks hold float16 gradients of at most 10,000. Can their float16 sum overflow? And with what loss scale
#    could it not, if the scale is lowered by powers of two?

# %%
with np.errstate(over="ignore"):
    total = np.float16(0)
    for _ in range(8):
        total += np.float16(10_000)
    lower = next(k for k in range(9) if 8 * 10_000 / 2**k < 65504)
    print(f"float16 sum {total}; with a loss scale 2^{lower} times smaller it is {float(8 * 10_000 / 2**lower):g}")

# %% [markdown]
# Now write it yourself: `minipar start 10 DIR` copies the exercise out, `minipar grade 10 --file DIR/exercise.py`
# grades it. On real ranks: `mpirun -n 4 python lessons/10_mixed_precision/experiment.py`.
