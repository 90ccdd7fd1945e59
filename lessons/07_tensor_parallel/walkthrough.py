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
# # 07 · Tensor parallelism
#
# Data parallelism and ZeRO cut the batch: every layer is still computed as a whole, by each rank for its own
# samples. **How is one layer computed by several ranks together, for the same samples, and how much must they
# tell each other?**
#
# The answer is a choice of cuts: linear layers by column and by row, attention by head, the vocabulary by
# range, convolutions by channel or by image region. The code is in `minipar/parallel/tensor_parallel/`; a
# plan names a *style* for each module, and a style is about twenty lines.

# %%
import matplotlib.pyplot as plt
import numpy as np

import minipar
from minipar import Tensor, nn, ops
from minipar.comm import Clock
from minipar.comm.differentiable import copy_to, reduce_from
from minipar.errors import UsageError
from minipar.models import GPT, MLP, ConvNet, ConvNetConfig, GPTConfig, MLPConfig
from minipar.parallel.memory import held
from minipar.parallel.placement import Shard, describe
from minipar.parallel.tensor_parallel import parallelize, vocabulary
from minipar.parallel.tensor_parallel.convolution import intervals, needed
from minipar.parallel.tensor_parallel.plans import default_plan
from minipar.parallel.tensor_parallel.styles import VocabularyEmbedding, WidthEmbedding
from minipar.plot import COLOURS

# %% [markdown]
# The pattern behind all of it, for two linear layers with an activation between them (Shoeybi et al. 2019,
# Megatron-LM, figure 3). The first weight is cut by output features, the second by input features; what a rank
# makes with its part of the first is exactly what it needs for its part of the second. Only the two ends
# communicate.

# %%
RANKS = 4
figure, axes = plt.subplots(figsize=(8, 2.7), layout="constrained")


def blocks(x, y, width, height, cut, title):
    """Draw a matrix (rows down, columns right) in one colour a rank, cut along "rows", "columns" or not."""
    for r in range(RANKS if cut else 1):
        w, h = (width / RANKS, height) if cut == "columns" else (width, height / RANKS if cut else height)
        left, top = (x + r * w, y) if cut == "columns" else (x, y + r * h)
        shade = COLOURS[r] if cut else "0.85"
        axes.add_patch(plt.Rectangle((left, top), w, h, facecolor=shade, edgecolor="white"))
        if cut:
            axes.text(left + w / 2, top + h / 2, str(r), color="white", ha="center", va="center", size=8)
    axes.text(x + width / 2, y - 0.15, title, ha="center", size=9)


blocks(0.0, 0.5, 1, 1.5, None, "x  (B, C)")
blocks(1.8, 0.5, 4, 1, "columns", "W₁ᵀ  (C, F)")
blocks(6.6, 0.5, 4, 1.5, "columns", "h = gelu(x W₁ᵀ)  (B, F)")
blocks(11.4, 0.5, 1, 4, "rows", "W₂ᵀ  (F, C)")
blocks(13.2, 0.5, 1, 1.5, None, "y  (B, C)")
axes.annotate("copy_to: backward sums", (0.5, 2.1), (0.0, 3.6), arrowprops={"arrowstyle": "->"}, size=9)
axes.annotate("reduce_from: forward sums", (13.7, 2.1), (12.9, 3.6), arrowprops={"arrowstyle": "->"}, size=9)
axes.set(xlim=(-0.2, 17), ylim=(4.7, 0))
axes.axis("off")
plt.show()

# %% [markdown]
# ## Two ways to cut a matrix product
#
# A linear layer is $y = x W^\top$ with $W$ of shape (out, in). **By output feature** (Megatron's "column
# parallel", the columns of $W^\top$): each rank has some rows of $W$ and makes some features of $y$. Joined
# side by side they are $y$.
#
# **By input feature** ("row parallel"): each rank has some columns of $W$ and the same features of $x$, and
# makes a *term* of every feature of $y$. Added up they are $y$.

# %%
rng = np.random.default_rng(0)
x, w = rng.standard_normal((5, 8)), rng.standard_normal((12, 8))

by_output = [x @ part.T for part in np.split(w, RANKS, axis=0)]
by_input = [px @ pw.T for px, pw in zip(np.split(x, RANKS, axis=1), np.split(w, RANKS, axis=1))]

print("by output: parts of shape", by_output[0].shape, "joined:", np.allclose(np.hstack(by_output), x @ w.T))
print("by input:  terms of shape", by_input[0].shape, "summed:", np.allclose(sum(by_input), x @ w.T))

# %% [markdown]
# The order, output then input, is not free. An activation function acts on single features, so it works on
# parts. On terms it would be wrong: gelu of a sum is not the sum of gelus.

# %%
gelu = lambda a: ops.gelu(Tensor(a)).data
print("gelu of parts: ", np.abs(np.hstack([gelu(p) for p in by_output]) - gelu(x @ w.T)).max())
print("gelu of terms: ", np.abs(sum(gelu(t) for t in by_input) - gelu(x @ w.T)).max())

# %% [markdown]
# ## What backward needs
#
# Every rank reads the whole x, so the gradient of x has a term from each rank. The pair that makes this right
# is one function at each end (open `minipar/comm/differentiable.py`):
#
# | | forward | backward |
# |---|---|---|
# | `copy_to` | x itself | all-reduce |
# | `reduce_from` | all-reduce | the gradient itself |
#
# Each is the transpose of the other. With both, the two-layer pattern is a few lines of ordinary autograd:

# %%
w1, w2 = rng.standard_normal((16, 8)), rng.standard_normal((8, 16))
b2 = rng.standard_normal(8)


def two_layers(enter=copy_to, bias_per_rank=False):
    """Return y, the gradient of x, and the ledgers of forward and backward."""
    comm = minipar.world()
    a = Tensor(np.split(w1, comm.size, axis=0)[comm.rank].copy(), requires_grad=True)  # (16/ranks, 8)
    b = Tensor(np.split(w2, comm.size, axis=1)[comm.rank].copy(), requires_grad=True)  # (8, 16/ranks)
    start = Tensor(x, requires_grad=True)
    h = ops.gelu(ops.linear(enter(start, comm), a))  # (5, 16/ranks)
    term = ops.linear(h, b)  # (5, 8), to be summed
    y = reduce_from(term + b2, comm) if bias_per_rank else reduce_from(term, comm) + b2
    forward = comm.ledger.table()
    comm.ledger.reset()
    y.square().sum().backward()
    return y.data, start.grad, forward, comm.ledger.table()


serial = minipar.launch(two_layers, 1)[0]
cut = minipar.launch(two_layers, RANKS)[0]
print(
    "y differs by",
    np.abs(cut[0] - serial[0]).max(),
    "and the gradient of x by",
    np.abs(cut[1] - serial[1]).max(),
)
print(f"\nforward\n{cut[2]}\n\nbackward\n{cut[3]}")

# %% [markdown]
# One all-reduce each way, of as many elements as x has; nothing in between. Two classic mistakes, and what
# they do. Without `copy_to` the loss is right and each rank has only its own term of the gradient, so the
# layers below train on a wrong gradient, a different one on every rank:

# %%
mistaken = minipar.launch(two_layers, RANKS, lambda tensor, comm: tensor)
print("y differs by", np.abs(mistaken[0][0] - serial[0]).max())
print("gradient of x differs by", [f"{np.abs(r[1] - serial[1]).max():.2f}" for r in mistaken])
print("the ranks' terms add up:", np.allclose(sum(r[1] for r in mistaken), serial[1]))

# %% [markdown]
# And a bias that each rank adds to its own term is added as often as there are ranks:

# %%
mistaken = minipar.launch(two_layers, RANKS, bias_per_rank=True)[0]
print("(y - right y) / bias =", np.unique(np.round((mistaken[0] - serial[0]) / b2, 9)))

# %% [markdown]
# ## The same from outside
#
# A model needs no rewriting for this. `parallelize` walks a plan: it places each parameter (`Shard(dim)`) and
# wraps the forward of the modules named. The model stays the serial one.

# %%
model = MLP(MLPConfig(inputs=8, classes=4, width=16, layers=4))
for name, style in default_plan(model).items():
    print(f"{name:<14} {type(style).__name__}")

# %% [markdown]
# ## Attention: by heads
#
# Heads do not talk to each other, so each rank takes some. The query-key-value projection is cut by output,
# the projection after attention by input: the same pattern again.
#
# The fused projection has the features of all queries, then of all keys, then of all values. A rank needs
# *its heads of all three*, so the cut is made within each of the three groups:

# %%
HEADS, HEAD = 4, 2
for rank, spans in enumerate(Shard(0, groups=3, unit=HEAD).intervals((3 * HEADS * HEAD, 8), 2)):
    print(f"rank {rank} holds rows {spans} of q, k, v at 0, 8, 16")
print("cut straight through, rank 0 would hold rows (0, 12): all queries, half of the keys, no value")

# %% [markdown]
# The head count is never written down in the attention module; it is read off the array's shape
# (`minipar/models/gpt.py`), so the same code runs on a part. Heads stay whole: a number of ranks that does not
# divide them is refused before anything is sent.

# %%
CONFIG = GPTConfig(vocab=97, seq_len=16, width=32, layers=2, heads=4)


def cut_gpt(config=CONFIG, sequence=False):
    comm = minipar.world()
    gpt = GPT(config)
    parallelize(gpt, comm, default_plan(gpt, sequence_parallel=sequence))
    return gpt.materialize(seed=0, dtype="float64"), comm


try:
    minipar.launch(cut_gpt, 3)
except UsageError as error:
    print(error)

# %% [markdown]
# ## A whole GPT
#
# Here is what one of four ranks holds. Norms and positions are whole on every rank; everything large is cut.
# `materialize` comes after the cut and draws only this rank's slices, which are bitwise those of the serial
# initialisation.

# %%
print(minipar.launch(lambda: describe(cut_gpt()[0]), RANKS)[0])

# %% [markdown]
# Equal to serial means: the same loss and, parameter by parameter, the same gradient. Each rank compares its
# part with the serial gradient's part.

# %%
tokens = np.random.default_rng(1).integers(0, CONFIG.vocab, (4, CONFIG.seq_len + 1))


def train_once(config=CONFIG, sequence=False):
    gpt, comm = cut_gpt(config, sequence)
    loss = gpt.loss(gpt(tokens[:, :-1]), tokens[:, 1:]) / tokens[:, 1:].size
    activations = held(gpt, output=loss).activations
    forward = comm.ledger.table(), comm.ledger.total()
    comm.ledger.reset()
    loss.backward()
    local = {name: (p.grad, p.layout) for name, p in gpt.named_parameters()}
    return {
        "loss": loss.item(),
        "grads": local,
        "forward": forward,
        "backward": (comm.ledger.table(), comm.ledger.total()),
        "activations": activations,
    }


alone = minipar.launch(train_once, 1)[0]
four = minipar.launch(train_once, RANKS)
worst = 0.0
for rank in four:
    for name, (grad, layout) in rank["grads"].items():
        whole = alone["grads"][name][0]
        worst = max(worst, np.abs(grad - (whole if layout is None else layout.local(whole))).max())
print(
    f"loss {alone['loss']:.12f} alone, {four[0]['loss']:.12f} on four; largest difference of a gradient {worst:.1e}"
)

# %% [markdown]
# The ledger of the step. With L blocks: one all-reduce for the embedding, two for each block (attention and
# MLP), two small ones for the loss; backward two a block and one before the head.

# %%
print(f"forward\n{four[0]['forward'][0]}\n\nbackward\n{four[0]['backward'][0]}")
size = tokens[:, :-1].size
print(f"\nforward:  (2L + 1) B T C + 3 B T = {(2 * 2 + 1) * size * 32 + 3 * size}")
print(f"backward: (2L + 1) B T C         = {(2 * 2 + 1) * size * 32}")

# %% [markdown]
# ## Embeddings: by word or by width
#
# A table (V, C) can be cut by rows: each rank looks up the words of its range and gives zeros for the others,
# and the sum over ranks is the embedding. Or by columns: each rank has a piece of every word's vector, and the
# pieces are joined. An all-gather sends half of what an all-reduce sends.

# %%
ids = np.random.default_rng(2).integers(0, 97, (4, 16))


def embedded(style):
    comm = minipar.world()
    table = nn.ModuleList([nn.Embedding(97, 32)])
    parallelize(table, comm, {"0": style})
    table.materialize(seed=0, dtype="float64")
    return table[0](ids).data, comm.ledger.table()


right = minipar.launch(embedded, 1, WidthEmbedding())[0][0]
for style in (VocabularyEmbedding(), WidthEmbedding()):
    value, ledger = minipar.launch(embedded, RANKS, style)[0]
    print(f"{type(style).__name__}: equal to serial {np.array_equal(value, right)}\n{ledger}\n")

# %% [markdown]
# Why does GPT cut by rows, then? Because the same table is the head (tied weights), and there the rows are
# the *outputs*: cut by rows, each rank makes the logits of its own words, and these need not be joined at all.

# %% [markdown]
# ## Cross-entropy without the logits
#
# The logits (B, T, V) are often the largest activation of the model. The loss needs three numbers a token,
# each a small reduction over ranks, with $m = \max_v z_v$:
#
# $$\text{loss} = \log \sum_v e^{z_v - m} - (z_t - m)$$
#
# First the maximum, then in one call the sum of exponentials and the target's logit, which one rank has and
# the others count as zero. Open `minipar/parallel/tensor_parallel/vocabulary.py`.

# %%
logits = np.random.default_rng(3).uniform(-1e4, 1e4, (64, 96))
targets = np.random.default_rng(4).integers(0, 96, 64)


def cut_loss():
    comm = minipar.world()
    start = vocabulary.first_row(96, comm)
    mine = Tensor(logits[:, start : start + 96 // comm.size].copy(), requires_grad=True)
    loss = vocabulary.cross_entropy(mine, targets, comm, 96, start)
    forward = comm.ledger.table()
    comm.ledger.reset()
    loss.backward()
    return loss.item(), mine.grad, forward, comm.ledger.calls()


whole = Tensor(logits, requires_grad=True)
reference = ops.cross_entropy(whole, targets, reduction="sum")
reference.backward()
found = minipar.launch(cut_loss, RANKS)
print("loss differs by", abs(found[0][0] - reference.item()), "for logits up to ±10,000")
print("gradient differs by", np.abs(np.hstack([r[1] for r in found]) - whole.grad).max())
print(f"{found[0][2]}\ncollectives in backward: {found[0][3]}")
print(f"gathering the logits instead: {logits.size} elements")

# %% [markdown]
# ## Convolutions: by channel or by region
#
# The two cuts of a matrix product work for channels: by output channel (parts, joined) and by input channel
# (terms, summed). A third cut leaves the weights whole and cuts the *image*: each rank holds some rows. At the
# seams a 3 × 3 convolution reads rows of the neighbour, the **halo**, which are exchanged before it.

# %%
HEIGHT = 16
figure, axes = plt.subplots(figsize=(7, 2.4), layout="constrained")
for rank, (start, stop) in enumerate(intervals(HEIGHT, RANKS)):
    (first, last), _ = needed((start, stop), HEIGHT, kernel=3, stride=1, padding=1, dilation=1)
    axes.barh(rank, last - first, left=first, color=COLOURS[rank], alpha=0.35, hatch="///", edgecolor="white")
    axes.barh(rank, stop - start, left=start, color=COLOURS[rank])
axes.set_yticks(range(RANKS), [f"rank {r}" for r in range(RANKS)])
axes.invert_yaxis()
axes.set_xticks(range(0, HEIGHT + 1, 2))
axes.set_xlabel("image row: full colour held, pale and hatched fetched for a 3 × 3 convolution")
plt.show()

# %% [markdown]
# All three give the serial result. They differ in what is sent and in what shrinks: weights under the channel
# cuts, activations under the region cut.

# %%
images = np.random.default_rng(5).standard_normal((2, 3, 16, 16))
labels = np.array([1, 3])


def cut_convnet(how):
    comm = minipar.world()
    net = ConvNet(ConvNetConfig(channels=3, size=16, classes=5, width=16, layers=2, groups=4))
    parallelize(net, comm, default_plan(net, convolution=how))
    net.materialize(seed=0, dtype="float64")
    loss = net.loss(net(Tensor(images)), labels)
    now = held(net, output=loss)
    loss.backward()
    return loss.item(), now, comm.ledger.total()


print("cut by     loss              weights   activations   ring elements sent")
for how, ranks in (("output", 1), ("output", RANKS), ("input", RANKS), ("region", RANKS)):
    loss, now, sent = minipar.launch(cut_convnet, ranks, how)[0]
    name = how if ranks > 1 else "(serial)"
    print(
        f"{name:<9}  {loss:.12f}  {now.parameters:>7,} B  {now.activations:>9,} B  {float(sent.ring_elements):>12,.0f}"
    )

# %% [markdown]
# ## Sequence parallelism
#
# Between the cut regions, norms and residuals still work on whole activations, the same on every rank. An
# all-reduce is a reduce-scatter and an all-gather, so one can stop halfway: keep a part of the sequence each,
# do norm and residual on that, and gather before the next region (Korthikanti et al. 2022). The traffic stays,
# the activations shrink.

# %%
spread = minipar.launch(train_once, RANKS, sequence=True)[0]
for name, result in (("serial", alone), ("tensor parallel", four[0]), ("with sequence parallel", spread)):
    sent = float(result["forward"][1].ring_elements + result["backward"][1].ring_elements)
    print(
        f"{name:<23} loss {result['loss']:.12f}  activations {result['activations']:>7,} B  sent {sent:>7,.0f}"
    )

# %% [markdown]
# What is sent beyond that: one gathering more, before the head, since the embedding is still all-reduced; and the
# gradients of the norms' parameters, which now see parts of the sequence and must be summed. These are small, and
# easily forgotten.

# %% [markdown]
# ## When it pays
#
# Computation shrinks with N, communication does not: each all-reduce moves 2(N−1)/N of the whole activation,
# and it cannot be hidden, since the next layer waits for it. The virtual clock's cost of a collective is a
# formula; a run shows that it is what a program experiences.

# %%
clock = Clock(alpha=5e-6, beta=1 / 10e9)


def reduce_once():
    comm = minipar.world()
    comm.all_reduce(np.zeros(10_000, "float32"))
    return comm.now()


print(f"run {minipar.launch(reduce_once, 8, clock=clock)[0]:.3e} s,", end=" ")
print(f"formula {clock.collective('all_reduce', 40_000, 8):.3e} s")

# %% [markdown]
# Now a block of a GPT of width 4096 on 4096 tokens in float16: $24 B T C^2$ operations forward and twice that
# backward, at 100 TFLOP/s a rank, with four all-reduces of $B T C$. On links of 300 GB/s, as within a node, and
# of 12 GB/s, as between nodes:

# %%
C, TOKENS = 4096, 4096
compute = 3 * 24 * TOKENS * C**2 / 100e12
figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
ranks = [1, 2, 4, 8, 16, 32]
speedups = {}
for colour, (name, rate), marker in zip(COLOURS, (("300 GB/s", 300e9), ("12 GB/s", 12e9)), "os"):
    wire = Clock(alpha=5e-6, beta=1 / rate)
    times = [compute / n + 4 * wire.collective("all_reduce", 2 * TOKENS * C, n) for n in ranks]
    speedups[name] = [times[0] / t for t in times]
    axes.plot(ranks, speedups[name], marker + "-", color=colour, label=name)
axes.plot(ranks, ranks, "k:", label="ideal")
axes.set_xscale("log", base=2)
axes.set_yscale("log", base=2)
axes.set_xticks(ranks, ranks)
axes.set_yticks(ranks, ranks)
axes.set(xlabel="ranks", ylabel="speed-up of a block")
axes.legend(frameon=False)
axes.grid(alpha=0.3)
plt.show()

# %% [markdown]
# That is why tensor parallelism stays within a node, and why its ranks are neighbours on the mesh
# (`minipar/mesh.py`).
#
# Now `exercise.py`: a two-layer MLP, an embedding and a cross-entropy over a cut vocabulary, a convolution with
# a halo, and a faulty attention. `experiment.py` counts and times on MPI ranks:
# `mpirun -n 4 python lessons/07_tensor_parallel/experiment.py`.

# %% [markdown]
# ## Check yourself
#
# **1.** How many all-reduces does one more GPT block add to a training step, and how many elements does each
# of 4 ranks send for it, per token and unit of width?

# %%
deeper = GPTConfig(vocab=97, seq_len=16, width=32, layers=3, heads=4)
three = minipar.launch(train_once, RANKS, deeper)[0]
calls = sum(three[way][1].calls - four[0][way][1].calls for way in ("forward", "backward"))
sent = sum(three[way][1].ring_elements - four[0][way][1].ring_elements for way in ("forward", "backward"))
print(f"{calls} all-reduces; {float(sent) / size / 32:g} elements for each token and channel")

# %% [markdown]
# **2.** A vocabulary of 50,257, 8 × 1024 tokens, float32, 8 ranks. How large are the logits on a rank, whole
# and cut? How many times less does the cut cross-entropy send than gathering the logits would?

# %%
n_tokens, words, n = 8 * 1024, 50257, 8
print(
    f"logits {4 * n_tokens * words / 2**30:.2f} GiB whole, {4 * n_tokens * -(-words // n) / 2**30:.2f} GiB cut"
)
cut_sent = 2 * (n - 1) / n * 3 * n_tokens  # the maximum, the sum, the target: all-reduced
print(f"{(n - 1) / n * n_tokens * words / cut_sent:,.0f} times less")

# %% [markdown]
# **3.** An image of 16 rows on 4 ranks, a 5 × 5 convolution with padding 2: how many rows does an inner rank
# fetch, and what part is that of the rows it holds?

# %%
start, stop = intervals(16, 4)[1]
(first, last), _ = needed((start, stop), 16, kernel=5, stride=1, padding=2, dilation=1)
fetched = (last - first) - (stop - start)
print(f"{fetched} rows, {fetched / (stop - start):.0%} of what it holds")

# %% [markdown]
# **4.** In the last picture, how fast is a block on 8 ranks over each link, compared with one rank?

# %%
for name, values in speedups.items():
    print(f"{name}: {values[ranks.index(8)]:.1f} times")
