"""Machines for tests: round numbers, so that expected times can be worked out by hand."""

from __future__ import annotations

from minipar.planner.machine import Link, Machine, Measured, Rate, Table

PLAIN = Machine(
    name="round", source="made up", memory=1e12, bandwidth=1e12, overhead=0.0,
    matmul={"float32": Rate(1e12), "float16": Rate(4e12)}, node_ranks=4, node=Link(1e-6, 1e-11),
    cluster=Link(1e-5, 1e-10),
)  # fmt: skip

FLAT = Table(((1.0, 100.0),), [1e-3, 1e-1], [2e-3, 2e-1])
MEASURED = Machine(
    name="measured", source="made up", memory=1e12, bandwidth=1e12, overhead=0.0, matmul={"float32": Rate(1e12)},
    node_ranks=2, node=Link(1e-6, 1e-9, 0.0), cluster=Link(1e-6, 1e-9, 0.0),
    measured=Measured(
        2, "float32", {"gelu": FLAT, "adamw": FLAT}, {"all_reduce": {2: (1e-6, 1e-9)}, "send": {2: (1e-6, 1e-9)}},
        {"all_reduce": {2: 0.0}, "send": {2: 0.0}},
        {"all_reduce": {2: [(1.0, 1e-3), (100.0, 1e-2)]}, "send": {2: [(1.0, 1e-3), (100.0, 1e-2)]}},
        step=0.5, context={"gpt": 2.0},
    ),
)  # fmt: skip
