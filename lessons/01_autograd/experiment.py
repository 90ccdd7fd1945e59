"""Check the gradient of every kind of primitive, and see how exact a check can be.

    python lessons/01_autograd/experiment.py
    mpirun -n 4 python lessons/01_autograd/experiment.py

For each primitive, central differences along random directions are compared with backward, over a range of
half widths ε. The table has each primitive's best ε and its error there; the picture has all curves. The
primitives are dealt out to the ranks, and rank 0 collects what they found; one rank alone does them all.
"""

import argparse

import numpy as np
from rich.console import Console
from rich.table import Table

import minipar
from minipar import Tensor, nn, ops
from minipar.plot import COLOURS, new_figure

LABELS = np.array([3, 0, 7, 1, 2, 5])
NORMAL = (6, 8)  # shape of the input

PROGRAMS = {
    "tanh": ops.tanh,
    "gelu": nn.GELU(),
    "exp": ops.exp,
    "softmax": ops.softmax,
    "layer_norm": lambda x: ops.layer_norm(x, Tensor(np.linspace(0.5, 1.5, 8)), Tensor(np.zeros(8))),
    "x @ x.T": lambda x: x @ x.T,
    "broadcast x * mean": lambda x: x * x.mean(axis=0),
    "cross-entropy": lambda x: nn.CrossEntropyLoss()(x, LABELS),
}


def error_at(program, eps, directions, seed):
    """Return the worst relative error of central differences of half width `eps`, against backward."""
    rng = np.random.default_rng(seed)
    x = Tensor(rng.standard_normal(NORMAL), requires_grad=True)
    y = program(x)
    weights = rng.standard_normal(y.shape)  # one number of the output: its product with these
    y.backward(weights)
    errors = []
    for _ in range(directions):
        v = rng.standard_normal(NORMAL)
        with minipar.no_grad():
            ahead, behind = (
                float((program(Tensor(x.data + s * v)).data * weights).sum()) for s in (eps, -eps)
            )
        exact = float((x.grad * v).sum())
        errors.append(abs((ahead - behind) / (2 * eps) - exact) / max(abs(exact), 1e-3))
    return max(errors)


def draw(sizes, found, path):
    """Draw error over ε, a line a primitive; save the picture."""
    figure = new_figure(7.5, 4.6)
    axes = figure.subplots()
    styles = ("-", "--")
    for i, (name, errors) in enumerate(found.items()):
        axes.loglog(sizes, errors, styles[i // len(COLOURS)], color=COLOURS[i % len(COLOURS)], label=name)
    axes.set_xlabel("half width ε of the difference")
    axes.set_ylabel("worst relative error")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--directions", type=int, default=3, help="random directions of each check (default 3)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of inputs and directions (default 0)")
    parser.add_argument("--out", default="01_autograd.png", help="picture (default 01_autograd.png)")
    options = parser.parse_args()
    comm = minipar.world()
    sizes = np.logspace(-11, -1, 41)
    mine = list(PROGRAMS)[comm.rank :: comm.size]  # dealt out like cards
    curves = {
        name: [error_at(PROGRAMS[name], eps, options.directions, options.seed) for eps in sizes]
        for name in mine
    }
    collected = comm.all_gather_object(curves)
    if comm.rank != 0:
        return
    found = {name: next(part[name] for part in collected if name in part) for name in PROGRAMS}
    title = f"central differences against backward, float64 (on {comm.size} rank{'s' * (comm.size > 1)})"
    table = Table(title=title, title_justify="left")
    for heading in ("primitive", "best ε", "error there", "error at ε = 0.1"):
        table.add_column(heading, justify="left" if heading == "primitive" else "right")
    for name, errors in found.items():
        best = int(np.argmin(errors))
        table.add_row(name, f"{sizes[best]:.0e}", f"{errors[best]:.0e}", f"{errors[-1]:.0e}")
    Console().print(table)
    draw(sizes, found, options.out)
    print(f"picture: {options.out}")


if __name__ == "__main__":
    main()
