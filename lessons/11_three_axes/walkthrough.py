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
# # 11 · All three axes at once
#
# **How do data, pipeline and tensor parallelism combine, and how does a checkpoint move between layouts?**
#
# Each of the three was a wrapper around one serial model. Put on the axes of a *mesh* they compose: ranks that
# differ along one axis share a batch, along another they are stages of a pipeline, along the third they hold
# slices of each layer. What every rank holds is then a set of *boxes* of the serial model's weights, and all that
# looks at weights as a whole (initial values, the gradient's norm, a checkpoint) works in boxes.
#
# The code to read: `minipar/mesh.py`, `minipar/parallel/distribute.py`, `minipar/parallel/region.py` and
# `minipar/checkpoint/`.

# %%
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Rectangle

import minipar
from minipar import Mesh, Recipe, distribute, random
from minipar.checkpoint import Reader, newest, open_checkpoint
from minipar.config import VERIFY_DEFAULTS, TrainConfig
from minipar.data import load
from minipar.errors import DataError
from minipar.mesh import factorings
from minipar.models import GPT, GPTConfig
from minipar.parallel.placement import describe
from minipar.plot import COLOURS
from minipar.resume import resume, save_job
from minipar.training import Job
from minipar.verification import verify

CONFIG = GPTConfig(vocab=94, seq_len=8, width=16, layers=4, heads=8)

# %% [markdown]
# Here is the whole lesson in one picture. Eight ranks hold a GPT of four blocks on a mesh dp 2 × pp 2 × tp 2. From
# left to right lie the model's parameters, as wide as they have elements. A row is a rank: blue is held, and a bar
# of half the height is half of a weight.


# %%
def holdings(dp, pp, tp, **recipe):
    """Return, by rank, {parameter: boxes of the serial tensor that the rank holds}."""

    def one_rank():
        mesh = Mesh(minipar.world(), dp=dp, pp=pp, tp=tp)
        strategy = distribute(GPT(CONFIG), mesh, Recipe(pipelined=pp > 1, **recipe), seed=0)
        return {h.name: [box for box, _ in h.region.boxes(h.tensor.data)] for h in strategy.parameters_held()}

    return minipar.launch(one_rank, dp * pp * tp)


model = GPT(CONFIG).materialize(seed=0)
model.assign_paths()
serial = {name: p.data for name, p in model.named_parameters()}


def draw_holdings(held, title):
    """Draw which parts of the parameters each rank holds."""
    axes = plt.subplots(figsize=(11, 0.9 + 0.38 * len(held)), layout="constrained")[1]
    left, marks = 0, []
    for name, values in serial.items():
        for rank, mine in enumerate(held):
            for box in mine.get(name, []):
                cut = next((k for k, (a, b) in enumerate(box) if b - a < values.shape[k]), None)
                low, high = (0, 1) if cut is None else (n / values.shape[cut] for n in box[cut])
                corner, height = (left, rank - 0.4 + 0.8 * low), 0.8 * (high - low)
                axes.add_patch(Rectangle(corner, values.size, height, color=COLOURS[0], linewidth=0))
        block = ".".join(name.split(".")[:2]) if name.startswith("h.") else name.removesuffix(".weight")
        marks += [(left, block)] if not marks or marks[-1][1] != block else []
        left += values.size
    axes.set(xlim=(0, left), ylim=(len(held) - 0.5, -0.5), yticks=range(len(held)), title=title, xlabel="parameters")
    axes.set_yticklabels([f"rank {r}" for r in range(len(held))])
    shown = [(x, name) for x, name in marks if name == "wte" or name.startswith("h.")]
    axes.set_xticks([x for x, _ in shown], [name for _, name in shown], ha="left")
    for x, _ in marks:
        axes.axvline(x, color="0.7", linewidth=0.5, zorder=0)
    plt.show()


held = holdings(dp=2, pp=2, tp=2)
draw_holdings(held, "dp 2 × pp 2 × tp 2")

# %% [markdown]
# Ranks 0, 1, 4 and 5 are the first stage, the others the second. The embedding `wte` is on both, since the output
# layer uses it again. A layer's large weights are halved between neighbours (queries, keys and values each by
# themselves, hence the stripes); norms and some biases are thin lines that both hold. Rows 0 and 4 are the same:
# replicas.
#
# ## The mesh
#
# A rank's place is three numbers, $\text{rank} = (d \cdot pp + p)\cdot tp + t$. Tensor-parallel neighbours exchange
# the most, so they are adjacent ranks, which usually share a machine (Narayanan et al. 2021).

# %%
print(minipar.launch(lambda: str(Mesh(minipar.world(), dp=2, pp=2, tp=2)), 8)[0])

# %% [markdown]
# A mesh is nothing but three calls of `comm.split(color, key)`. All ranks call it together; those that pass the same
# colour get a communicator of their own, in which they are numbered in the order of their keys. The group along an
# axis are the ranks that share both *other* indices, so those two make the colour, and the index along the axis is
# the key. Open `minipar/mesh.py`.


# %%
def places():
    mesh = Mesh(minipar.world(), dp=2, pp=2, tp=2)
    return mesh.place, {axis: getattr(mesh, axis).members for axis in ("dp", "pp", "tp")}


for rank, (place, groups) in enumerate(minipar.launch(places, 8)):
    print(rank, place, groups)

# %% [markdown]
# ## One recipe
#
# `distribute` puts the wrappers on in a fixed order: first layers are cut, which decides what a rank's parameters
# *are*; then the model is cut into stages; then values come to be, each rank drawing only its own; last, the ranks
# that share a batch agree on how to sum gradients. What a parameter's cut is, its *placement* says:

# %%
ONE_BLOCK = replace(CONFIG, layers=1)
print(minipar.launch(lambda: describe(distribute(GPT(ONE_BLOCK), Mesh(minipar.world(), tp=2), seed=0).model), 2)[1])

# %% [markdown]
# `c_attn` is cut in three groups, queries, keys and values, so that each rank has its heads of all three. Initial
# values are a function of (seed, name, index), so a rank draws a slice without drawing the rest, and it is the
# serial model's slice bit for bit:


# %%
def wrong_values(dp, pp, tp):
    """Return how many of this rank's initial values are not the serial model's."""
    mesh = Mesh(minipar.world(), dp=dp, pp=pp, tp=tp)
    strategy = distribute(GPT(CONFIG), mesh, Recipe(pipelined=pp > 1), seed=0)
    pairs = [
        (view, serial[h.name][tuple(slice(*pair) for pair in box)])
        for h in strategy.parameters_held()
        for box, view in h.region.boxes(h.tensor.data)
    ]
    return sum(int((ours != theirs).sum()) for ours, theirs in pairs), sum(ours.size for ours, _ in pairs)


print("values that differ, of those held, by rank:", minipar.launch(wrong_values, 8, 2, 2, 2))

# %% [markdown]
# ## Equal to serial, in every factoring
#
# `verify` trains the serial model beside the parallel one, with SGD, and compares every loss, gradient and weight
# at each step. In float64 rounding is all that is left:

# %%
TEXT = load("docs", seq_len=8)
SETTINGS = dict(model="gpt", width=16, layers=8, heads=8, seq_len=8, batch=16, lr=0.01, dtype="float64", device="cpu")


def settings(**changes):
    return TrainConfig(**{**SETTINGS, **changes}).resolved(VERIFY_DEFAULTS)


proof = minipar.launch(
    lambda: verify(settings(dp=2, pp=2, tp=2, layers=4, steps=4, optimizer="sgd"), minipar.world(), TEXT), 8
)[0]
for kind, worst in proof.worst.items():
    print(f"{kind:9} {worst.compared:5} compared, largest relative error {worst.error:.1e}")
print("replicas that differ:", proof.replicas_differ)

# %% [markdown]
# Eight ranks can be arranged in ten ways. All of them train the same model: the same initial values, the same
# dropout masks (10 % here; they too are functions of position, not of a generator's state), the same losses. What
# differs is what a rank holds, and what it sends along which axis.


# %%
def train(config):
    """Train on this rank; return losses, bytes of parameters held, and bytes sent by axis (in ring form)."""
    job = Job(config, minipar.world(), TEXT)
    job.comm.ledger.reset()
    losses = [record.loss for record in job.train()]
    sent = Counter()
    for row in job.comm.ledger.rows():
        axis = row.group.split("/")[1][:2] if "/" in row.group else "all"
        if row.elements:
            sent[axis] += float(row.ring_elements) * row.bytes / row.elements / config.steps
    return losses, sum(h.tensor.data.nbytes for h in job.strategy.parameters_held()), sent


reference = minipar.launch(train, 1, settings(steps=2, dropout=0.1))[0]
table = {}
for dp, pp, tp in factorings(8):
    microbatches = 4 if pp > 1 else None
    found = minipar.launch(
        train, 8, settings(steps=2, dropout=0.1, dp=dp, pp=pp, tp=tp, microbatches=microbatches)
    )
    table[dp, pp, tp] = found
    error = max(abs(a - b) for losses, _, _ in found for a, b in zip(losses, reference[0]))
    most = max(size for _, size, _ in found)
    print(f"dp {dp} × pp {pp} × tp {tp}: losses off by {error:.0e} from serial, at most {most / 1024:4.0f} KiB a rank")

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True, layout="constrained")
names = [f"{d}×{p}×{t}" for d, p, t in table]
left.barh(names, [max(size for _, size, _ in found) / 1024 for found in table.values()], color="0.5")
left.axvline(reference[1] / 1024, color="black", linestyle=":", label="serial")
left.set(xlabel="parameters of the fullest rank (KiB)", ylabel="dp × pp × tp")
left.legend(frameon=False)
start = np.zeros(len(table))
for axis, colour, hatch in zip(("dp", "pp", "tp"), COLOURS, ("", "//", "..")):
    sent = np.array([max(s[axis] for _, _, s in found) / 1024 for found in table.values()])
    right.barh(names, sent, left=start, color=colour, hatch=hatch, edgecolor="white", label=axis)
    start += sent
right.set(xlabel="sent by a rank in a step (KiB)")
right.legend(frameon=False)
right.invert_yaxis()
plt.show()

# %% [markdown]
# Tensor parallelism sends activations, in every layer, forward and backward: it grows with the batch. Data
# parallelism sends gradients, once a step: it grows with the model. The pipeline sends the activations between two
# blocks only (and, in a group of its own, the gradient of the tied embedding). Which is least depends on batch and
# model, and the bytes of this small model on 16 samples are no guide for a large one; lesson 12 is about that.
#
# ## One norm
#
# Clipping needs the norm of the whole gradient, the same on every rank. On a mesh a rank can get it wrong in two
# ways: by knowing too little (its own part), or by counting too much (what others hold as well).


# %%
def norms():
    """One backward on this rank; return the norm by itself, over all ranks, and as minipar has it; and the parts."""
    job = Job(settings(dp=2, pp=2, tp=2, layers=4, optimizer="sgd"), minipar.world(), TEXT)
    job.forward_backward(next(iter(job.loader)))
    first_box = {h.name: h.region.boxes(h.tensor.data)[0][0] for h in job.strategy.parameters_held()}
    mine = [(p.name, first_box[p.name], float((t.grad**2).sum())) for p, t in job.strategy.optimizer_tensors()]
    squares = sum(square for _, _, square in mine)
    everyone = float(job.comm.all_reduce(np.array([squares]))[0])
    return squares**0.5, everyone**0.5, job.strategy.grad_norm(), mine


found = minipar.launch(norms, 8)
print("each rank by itself:     ", [round(own, 4) for own, _, _, _ in found])
print("added up over all ranks: ", round(found[0][1], 4))
print("each element counted once:", round(found[0][2], 4), "on all ranks:", len({norm for _, _, norm, _ in found}) == 1)


def serial_norm():
    job = Job(settings(layers=4, optimizer="sgd"), minipar.world(), TEXT)
    job.forward_backward(next(iter(job.loader)))
    return job.strategy.grad_norm()


print("serial:                   ", round(minipar.launch(serial_norm, 1)[0], 4))

# %% [markdown]
# The rule: each of the $c$ ranks that hold an element contributes its square over $c$. So count the copies of every
# part, and the sum over all ranks is right:

# %%
copies = Counter((name, box) for _, _, _, mine in found for name, box, _ in mine)
total = sum(square / copies[name, box] for _, _, _, mine in found for name, box, square in mine)
print("by copies:", round(total**0.5, 4))
for name in ("wte.weight", "h.0.mlp.c_fc.weight", "h.0.ln_1.weight", "h.3.attn.c_attn.weight"):
    print(f"{name:24} held by", sorted({n for (other, _), n in copies.items() if other == name}), "ranks")

# %% [markdown]
# `minipar/parallel/norms.py` comes to the same without counting: what is whole on all tensor-parallel ranks enters
# on the first of them only, and a tied weight on the first stage that uses it.
#
# ## Checkpoints
#
# A checkpoint that only the same number of ranks can load is of little use: machines come and go. So minipar saves
# boxes under *serial* names. Each element is written by one rank, a manifest says where it lies, and whoever loads
# intersects the boxes that are stored with those it holds.

# %%
FOLDER = Path(tempfile.mkdtemp())
A = dict(dp=2, pp=2, tp=2, zero=1, layers=4, dropout=0.1, optimizer="adamw", steps=8)


def run(config, until, source=None, target=None, spoil=None):
    """Train on this rank, from a checkpoint or from scratch, and save; return losses by step."""
    job = Job(config, minipar.world(), TEXT)
    if source is not None:
        resume(job, source)
    if spoil is not None:
        spoil(job)
    losses = {}
    for record in job.train():
        losses[record.step] = record.loss
        if record.step == until:
            break
    if target is not None:
        save_job(job, target)
    return losses


whole = minipar.launch(run, 8, settings(**A), 8)[0]  # without a break
minipar.launch(run, 8, settings(**A), 4, target=FOLDER)
path = newest(FOLDER)
manifest = open_checkpoint(path)
print(path.name, "written on", manifest.layout)
for name, facts in manifest.files.items():
    print(f"  {name}  {facts['bytes']:7,} bytes  sha256 {facts['sha256'][:12]}…")
entry = max(manifest.kinds()["exp_avg"].values(), key=lambda e: len(e.blocks))
print(f"\n{entry.kind} of {entry.name}, {tuple(entry.shape)}, lies in {len(entry.blocks)} blocks, for example")
for block in entry.blocks[:3]:
    print(f"  from {block.start}, {block.shape}, in {block.file}")

# %% [markdown]
# ZeRO 1 cuts Adam's moments into flat ranges, on top of what tensor parallelism has made of this weight; hence the
# odd boxes. Another layout reads other boxes. Left, who wrote what of this one array; right, who reads what on four
# ranks with tensor parallelism only.

# %%
figure, axes = plt.subplots(1, 2, figsize=(8, 4.2), sharey=True, layout="constrained")
writers = [(block.box, int(block.file[6:11])) for block in entry.blocks]
readers = [(box, rank) for rank, mine in enumerate(holdings(1, 1, 4)) for box in mine[entry.name]]
for panel, boxes, title in zip(axes, (writers, readers), ("written by 8 ranks, ZeRO 1", "read by 4 ranks, tp 4")):
    ranks = sorted({rank for _, rank in boxes})
    for ((a, b), (c, d)), rank in boxes:
        colour = COLOURS[ranks.index(rank) % len(COLOURS)]
        panel.add_patch(Rectangle((c, a), d - c, b - a, facecolor=colour, edgecolor="white", linewidth=1))
        if (b - a) * (d - c) > 8:
            panel.text((c + d) / 2, (a + b) / 2, f"rank {rank}", ha="center", va="center", color="white", fontsize=8)
    panel.set(xlim=(0, entry.shape[1]), ylim=(entry.shape[0], 0), title=title, xlabel="column")
axes[0].set_ylabel("row")
figure.suptitle(f"{entry.kind} of {entry.name}")
plt.show()

# %% [markdown]
# Through several layouts and back, nothing may change, not a bit, neither in weights nor in Adam's moments:

# %%
LAYOUTS = {
    "B": (4, dict(dp=1, pp=1, tp=4, zero=0)),
    "C": (3, dict(dp=3, pp=1, tp=1, zero=3)),
    "D": (2, dict(dp=1, pp=2, tp=1, zero=0, schedule="zb-h1")),
    "A again": (8, {}),
}


def contents(folder):
    """Return {kind and name: array} of the newest checkpoint in a folder, in the serial model's shapes."""
    path = newest(folder)
    with Reader(path) as reader:
        return {f"{e.kind} {e.name}": reader.tensor(e) for e in open_checkpoint(path).tensors}


def pass_on(config, source, target):
    """Load a checkpoint on this layout and save it again."""
    job = Job(config, minipar.world(), TEXT)
    resume(job, source)
    save_job(job, target)


first, source = contents(FOLDER), FOLDER
for name, (ranks, layout) in LAYOUTS.items():
    target = Path(tempfile.mkdtemp())
    minipar.launch(pass_on, ranks, settings(**{**A, **layout}), source, target)
    now, source = contents(target), target
    same = sum(first[key].tobytes() == now[key].tobytes() for key in first)
    print(f"{name:8} {ranks} ranks, {layout or 'as at first'}: {same} of {len(first)} arrays equal")

# %% [markdown]
# Going on from step 4 gives what the unbroken run gave: bitwise on the same layout, to rounding on another, since
# sums are made in another order there.

# %%
for name, (ranks, layout) in {"A": (8, {}), **{k: v for k, v in LAYOUTS.items() if k in "BCD"}}.items():
    losses = minipar.launch(run, ranks, settings(**{**A, **layout}), 8, source=FOLDER)[0]
    print(f"{name}: steps {min(losses)} to {max(losses)}, losses differ by",
          f"{max(abs(losses[s] - whole[s]) for s in losses):.1e}")  # fmt: skip

# %% [markdown]
# ## What else is state
#
# A checkpoint of weights alone does not resume a run. Adam has moments and a step count, the loader a position in
# the data, the scaler its scale, the schedule its learning rate. Leave one out, and nothing fails; the run is only
# another one. Generators need no state: masks and shuffles are functions of seed and step.

# %%
print({k: v for k, v in manifest.scalars.items() if k in ("loader", "lr", "skipped")})


def forget_step(job):
    for state in job.optimizer.state.values():
        state["step"] = 0


def forget_moments(job):
    job.optimizer.state = {i: {} for i in job.optimizer.state}


def forget_position(job):
    job.loader.load_state_dict({**job.loader.state_dict(), "epoch": 0, "index": 0})


figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
forgotten = {"nothing": None, "Adam's step count": forget_step, "Adam's moments": forget_moments,
             "the data's position": forget_position}  # fmt: skip
for (what, spoil), colour, mark in zip(forgotten.items(), COLOURS, "osD^"):
    losses = minipar.launch(run, 2, settings(**{**A, "pp": 1, "tp": 1}), 8, source=FOLDER, spoil=spoil)[0]
    differences = [abs(losses[s] - whole[s]) for s in losses]
    axes.plot(list(losses), differences, color=colour, marker=mark, label=f"forgotten: {what}")
axes.set(xlabel="step", ylabel="|loss − loss of the unbroken run|", xticks=range(5, 9))
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# ## A checkpoint that is damaged
#
# Disks flip bits, and jobs are killed while they write. Files are written into a directory with another name, the
# manifest last, and then the directory is renamed: a save that was cut off is never taken for a checkpoint. Every
# file's sum is checked before anything is loaded, by all ranks together:

# %%
victim = path / "shard-00001.safetensors"
data = bytearray(victim.read_bytes())
data[-5] ^= 1  # one bit
victim.write_bytes(data)
try:
    minipar.launch(run, 8, settings(**A), 8, source=FOLDER)
except DataError as error:
    print(str(error).replace(str(FOLDER), "…"))

# %% [markdown]
# ## Check yourself
#
# 1. On a mesh dp 4 × pp 2 × tp 8, which ranks sum gradients with rank 21, and which ones share its layers?

# %%
d, p, t = 21 // 16, 21 // 8 % 2, 21 % 8
print("rank 21 stands at", (d, p, t))
print("its data-parallel group  ", [(i * 2 + p) * 8 + t for i in range(4)])
print("its tensor-parallel group", [(d * 2 + p) * 8 + i for i in range(8)])

# %% [markdown]
# 2. In the picture at the top, how many ranks hold an element of `h.0.mlp.c_fc.weight`, of `h.0.ln_1.weight`, and
#    of `wte.weight`?

# %%
for name in ("h.0.mlp.c_fc.weight", "h.0.ln_1.weight", "wte.weight"):
    counts = np.zeros(serial[name].shape, int)
    for mine in held:
        for box in mine.get(name, []):
            counts[tuple(slice(*pair) for pair in box)] += 1
    print(f"{name:22} {np.unique(counts)}")

# %% [markdown]
# 3. By what factor is the norm too large if every rank adds up the squares of all it holds, on dp 2 × pp 2 × tp 2?
#    It is neither 1 nor √8: why?

# %%
weight = Counter()
for _, _, _, mine in found:
    for name, box, square in mine:
        weight[copies[name, box]] += square / copies[name, box] / found[0][2] ** 2
print(f"factor {found[0][1] / found[0][2]:.3f}; share of the squared norm by number of copies:",
      {n: f"{share:.0%}" for n, share in sorted(weight.items())})  # fmt: skip
print(f"√({' + '.join(f'{n} × {share:.2f}' for n, share in sorted(weight.items()))}) =",
      f"{sum(n * share for n, share in weight.items()) ** 0.5:.3f}")  # fmt: skip

# %% [markdown]
# 4. Dropout's mask is a function of (seed, step, layer, place in the global batch). What does a rank draw that holds
#    samples 8 to 15 of the batch, compared with the serial run?


# %%
def mask(first, samples):
    with random.at(seed=0, step=3, first_sample=first):
        layer = minipar.nn.Dropout(0.5)
        layer.train()
        return layer(minipar.tensor(np.ones((samples, 4)))).data


print("rows 8 to 15 of the serial mask, bit for bit:", np.array_equal(mask(0, 16)[8:], mask(8, 8)))

# %% [markdown]
# Now write it yourself: `minipar start 11 DIR` copies the exercise out, `minipar grade 11 --file DIR/exercise.py`
# grades it. On real ranks: `mpirun -n 4 python lessons/11_three_axes/experiment.py`.
