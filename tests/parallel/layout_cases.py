"""The layouts that the commands offer, each with what the job must have made of it; some sizes divide nothing.

`CASES[ranks]` is run on threads by `test_layouts` and under real MPI by `mpi_verify`. A comparison with serial
alone would not notice an option that is ignored, so a case also says what must be found in the job.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from minipar.comm import Communicator
from minipar.config import VERIFY_DEFAULTS, TrainConfig
from minipar.data import Data, ImageDataset, Normalisation, load, load_text
from minipar.training import Job
from minipar.verification import Report, verify


@dataclass(frozen=True)
class Case:
    """Settings, and what must be found.

    Attributes:
        strategy: the name of its class.
        layout: the job's, in words.
        places: of some parameters as rank 0 sees them: placement and, where it is not all, what it steps.
        traffic: (operation, group) that must have been used.
        extra: other facts, see `facts`.
    """

    settings: dict[str, Any]
    strategy: str
    layout: str
    places: dict[str, str]
    traffic: tuple[tuple[str, str], ...]
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> TrainConfig:
        common = {"optimizer": "sgd", "dtype": "float64", "device": "cpu"}
        return TrainConfig(**{**common, **self.settings}).resolved(VERIFY_DEFAULTS)


GPT: dict[str, Any] = {"model": "gpt", "width": 12, "heads": 4, "layers": 1, "seq_len": 6}
WIDE: dict[str, Any] = {**GPT, "width": 60}  # 60 features over 4 ranks, 97 characters over 3 or 4
MLP: dict[str, Any] = {"model": "mlp", "width": 7, "layers": 4}  # weights of 7 × 15, 7 × 7 and 3 × 7
CONVNET: dict[str, Any] = {"model": "convnet", "width": 8, "layers": 2, "tp": 3}
CUT = {
    "wte.weight": "Shard(0)",
    "h.0.attn.c_attn.weight": "Shard(0, groups=3)",
    "h.0.mlp.c_proj.weight": "Shard(1)",
    "ln_f.weight": "Replicate()",
}
SUM, GATHER, REDUCE = "all_reduce", "all_gather", "reduce_scatter"
STAGES = {"layers.0.fc.weight": "Stage(0)", "layers.3.fc.bias": "Stage(2)"}
OWNERS = ((REDUCE, "dp"), (GATHER, "dp"))


def zero(stage: int, tp: int) -> Case:
    """wpe has 6 × 12 elements, which 4 or 2 ranks share; wte, being tied, is in a unit of its own."""
    flat, whole = f"Flat(0:{72 * tp // 4})", "Replicate()"
    place = f"{whole} {flat}" if stage < 3 or tp > 1 else flat
    layout = f"dp 4, ZeRO {stage}" if tp == 1 else f"dp {4 // tp} × tp {tp}, ZeRO {stage}"
    traffic = ((REDUCE, "dp"), (GATHER, "dp/gather" if stage == 3 else "dp"), *(((SUM, "tp"),) if tp > 1 else ()))
    extra = {"zero": stage, "here": stage < 3}
    return Case({**GPT, "zero": stage, "tp": tp}, "Sharded", layout, {"wpe.weight": place}, traffic, extra)


def owners(policy: str, steps: str) -> Case:
    places = {"layers.0.fc.weight": f"Replicate() {steps}"}
    layout = f"dp 3, partition by {policy}"
    return Case({**MLP, "partition": policy}, "ByOwner", layout, places, OWNERS, {"stages": None})


def layers(policy: str, relative: list[float], **settings: Any) -> Case:
    extra = {"stages": 3, "speeds": relative}
    layout = f"pp 3, partition by {policy}"
    return Case({**MLP, "partition": policy, **settings}, "Layers", layout, STAGES, (("send", "pp"),), extra)


def convolution(cut: str, stem: str, traffic: tuple[tuple[str, str], ...]) -> Case:
    layout = f"tp 3, convolutions cut by {cut}"
    return Case({**CONVNET, "convolution": cut}, "Strategy", layout, {"stem.conv.weight": stem}, traffic)


BOTH = {**GPT, "tp": 2, "dp": 2}
CASES: dict[int, dict[str, Case]] = {
    3: {
        "gpt --tp 3": Case({**WIDE, "heads": 3, "tp": 3}, "Strategy", "tp 3", CUT, ((SUM, "tp"),)),
        "mlp --tp 3": Case(
            {**MLP, "tp": 3}, "Strategy", "tp 3",
            {"layers.0.fc.weight": "Shard(0)", "layers.1.fc.weight": "Shard(1)", "layers.1.fc.bias": "Replicate()"},
            ((SUM, "tp"),),
        ),
        "convnet --tp 3 --convolution output": convolution("output", "Shard(0)", ((GATHER, "tp"),)),
        "convnet --tp 3 --convolution input": convolution("input", "Shard(1)", ((SUM, "tp"),)),
        "convnet --tp 3 --convolution region": convolution("region", "Replicate()", (("all_to_all", "tp"),)),
        "mlp --partition kind": owners("kind", "[0:3]"),
        "mlp --partition bytes": owners("bytes", "all"),
        "mlp --partition count": owners("count", "Flat(0:83)"),  # of 248 elements
        "mlp --partition cost": layers("cost", [1.0, 1.0, 1.0]),
        "mlp --partition devices": layers("devices", [1.0, 1.0, 0.5], devices="2xA,1xB", speeds="A=1,B=0.5"),
    },
    4: {
        "gpt --tp 4": Case({**WIDE, "tp": 4}, "Strategy", "tp 4", CUT, ((SUM, "tp"),)),
        "gpt --tp 2 --dp 2": Case(BOTH, "Replicas", "dp 2 × tp 2", CUT, ((SUM, "tp"), (SUM, "dp"))),
        "gpt --tp 2 --dp 2 --sequence-parallel": Case(
            {**BOTH, "sequence_parallel": True}, "Replicas", "dp 2 × tp 2, sequence parallel", CUT,
            ((REDUCE, "tp"), (GATHER, "tp"), (SUM, "dp")),
        ),
        **{f"gpt --zero {stage}": zero(stage, 1) for stage in (1, 2, 3)},
        **{f"gpt --zero {stage} --tp 2": zero(stage, 2) for stage in (1, 2, 3)},
    },
}  # fmt: skip


def data_of(config: TrainConfig) -> Data:
    """97 characters in random order, 3 × 5 images, or the digits for a ConvNet."""
    rng = np.random.default_rng(0)
    if config.model == "gpt":
        characters = np.array([chr(32 + i) for i in range(97)])
        text = "".join([*characters, *rng.choice(characters, 900)])
        return load_text(text, "characters", config.seq_len or 0)
    if config.model == "convnet":
        return load("digits")
    images, labels = rng.integers(0, 255, (40, 1, 3, 5)).astype(np.uint8), np.arange(40) % 3
    made = ImageDataset(images, labels, 3, Normalisation.of(images, 1 / 255))
    return Data(made, made, {"name": "images", "image_shape": [1, 3, 5], "classes": 3})


def facts(job: Job) -> dict[str, Any]:
    """What this rank's job is made of, as plain values."""
    strategy, assignment, parameters = job.strategy, job.assignment, dict(job.model.named_parameters())
    return {
        "strategy": type(strategy).__name__,
        "layout": job.layout(),
        "places": {name: f"{p.place} {p.place.steps}".strip() for name, p in parameters.items()},
        "zero": strategy.zero.stage if hasattr(strategy, "zero") else 0,
        "here": all(p.is_materialized for p in parameters.values()),
        "stages": len(assignment.stages) if assignment is not None and assignment.stages is not None else None,
        "speeds": [device.speed for device in assignment.devices] if assignment is not None else [],
    }


def run(case: Case, comm: Communicator, data: Data) -> dict[str, Any]:
    """Verify a case on the ranks of `comm`; return what was found, as plain values."""
    comm.ledger.reset()
    report = verify(case.config, comm, data)
    traffic = [[operation, axis(group)] for operation, group in comm.ledger.as_dict()]
    return {**outcome(report, comm), "title": report.layout, "traffic": traffic,
            "facts": facts(Job(case.config, comm, data))}  # fmt: skip


def axis(group: str) -> str:
    """The groups that a group was split from, without their numbers: "world/dp1/gather0" is "dp/gather"."""
    return "/".join(part.rstrip("0123456789") for part in group.split("/")[1:])


def outcome(report: Report, comm: Communicator) -> dict[str, Any]:
    """What a verification found, as plain values."""
    return {
        "ranks": comm.size,
        "holds": report.holds,
        "replicas_differ": report.replicas_differ,
        "errors": {kind: worst.error for kind, worst in report.worst.items()},
        "compared": {kind: worst.compared for kind, worst in report.worst.items()},
    }


def check(case: Case, found: dict[str, Any]) -> None:
    """Assert that a case was equal to serial, by what it asked for and by nothing less."""
    assert case.config.steps == 10
    assert found["holds"] and found["replicas_differ"] == 0 and found["errors"].keys() == found["compared"].keys()
    for kind in ("loss", "gradient", "weight"):
        assert found["errors"][kind] <= 1e-10 and found["compared"][kind] > 0, kind
    made = found["facts"]
    assert (made["strategy"], made["layout"], found["title"]) == (case.strategy, case.layout, case.layout)
    assert {name: made["places"][name] for name in case.places} == case.places
    assert {key: made[key] for key in case.extra} == case.extra
    assert {tuple(key) for key in found["traffic"]} >= set(case.traffic)
