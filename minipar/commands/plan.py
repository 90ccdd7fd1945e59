"""`minipar plan`: which layout for this model on this machine, why, and the command that runs it.

Prints the best layouts with their step, memory, bubble and traffic, what is not possible and why, the winner
explained against the runner-up, and data parallelism against model parallelism in plain words. With --run-top
the best layouts are run here, and what was predicted stands beside what was measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from minipar.comm.slow import parse_bandwidth, parse_latency
from minipar.commands.plan_run import SHOWN, draw_plan, run_best
from minipar.commands.report import console
from minipar.config import TrainConfig
from minipar.errors import UsageError
from minipar.planner.explain import advice, seconds_text, winner_text
from minipar.planner.layout import PRECISIONS, Precision
from minipar.planner.machine import Machine, read_machine
from minipar.planner.plan import Candidate, Plan, plan
from minipar.planner.presets import BATCHES, GPUS, MODELS, preset
from minipar.planner.shapes import Shape, shape_of
from minipar.training import build_model, load_data
from minipar.units import BYTES, bytes_text, quantity

MACHINE_FILE = Path("machine.json")
REASONS = 8
WIDTH = 130  # of what is no terminal
PICTURES = (".png", ".pdf", ".svg")
KINDS = ("mlp", "convnet", "gpt")


@dataclass(frozen=True)
class Subject:
    """What is planned for: settings of `minipar train`, the model's shape, and the preset's name if it is one."""

    config: TrainConfig
    shape: Shape
    preset: str | None = None


def subject_of(model: str, given: dict[str, Any]) -> Subject:
    """Return what a model's name and sizes mean.

    Args:
        model: mlp, convnet or gpt, as `minipar train` makes them; or a preset, a GPT of the sizes of a paper.
        given: settings of `TrainConfig` that were given, None for those that were not.

    Raises:
        UsageError: an unknown model, or sizes it does not have.
    """
    sizes = {name: value for name, value in given.items() if value is not None}
    kind, preset_name = model, None
    if model in MODELS:
        known = {**vars(MODELS[model]), "batch": BATCHES[model]}
        kept = ("vocab", "seq_len", "width", "layers", "heads", "batch")
        sizes = {name: known[name] for name in kept} | sizes
        kind, preset_name = "gpt", model
    elif model not in KINDS:
        raise UsageError(f"plan: model {model!r} is unknown: use {', '.join(KINDS)}, or a preset: {', '.join(MODELS)}")
    config = TrainConfig(model=kind, device="cpu", **sizes).resolved()
    info = {"vocabulary_size": config.vocab} if config.vocab is not None else load_data(config).info
    built: Any = build_model(config, info)
    return Subject(config, shape_of(kind, built.config), preset_name)


def data_remark(config: TrainConfig) -> str | None:
    """Return what the data lacks for training with these settings, None if nothing."""
    try:
        data = load_data(config)
        build_model(config, data.info)
    except UsageError as error:
        return f"the data of this command will not do: {error}"
    if len(data.train) < (config.batch or 0):
        return (
            f"{config.data} has {len(data.train)} samples, less than a batch of {config.batch}: to train, give --data"
            " a larger file"
        )
    return None


def machine_of(name: str | None, network: str | None) -> Machine:
    """Return the machine of a file or a preset; without a name that of machine.json here.

    Raises:
        UsageError: neither; says how to come by one.
    """
    if name is None:
        if not MACHINE_FILE.exists():
            raise UsageError(
                "plan: give --machine: a file that minipar calibrate wrote, or a preset:"
                f" {', '.join(GPUS)}; there is no {MACHINE_FILE} here"
            )
        name = str(MACHINE_FILE)
    if name in GPUS or not (name.endswith(".json") or Path(name).exists()):
        return preset(name, network)
    if network is not None:
        raise UsageError("plan: --network is for presets; a machine file says what its network is")
    return read_machine(Path(name))


def parse_bytes(text: str) -> float:
    """Return the bytes of "80GiB"."""
    value = quantity(text, BYTES)
    if not value:
        known = ", ".join(unit for unit in BYTES if unit)
        raise UsageError(f"--memory {text} must be a number above zero with a unit ({known})")
    return value


def precision_of(name: str | None, machine: Machine) -> Precision:
    """Return the precision by name; by default what the machine was measured in, float16 on a preset."""
    if machine.measured is not None:
        if name is not None and name != machine.measured.dtype:
            raise UsageError(
                f"plan: this machine was measured in {machine.measured.dtype}; for {name} run minipar calibrate"
                f" --dtype {name}"
            )
        return PRECISIONS[machine.measured.dtype]
    name = name or ("fp16" if "float16" in machine.matmul else next(iter(machine.matmul)))
    if name not in PRECISIONS or name == "mixed":
        known = ", ".join(p for p in PRECISIONS if p != "mixed")
        raise UsageError(f"plan: precision {name!r} is unknown: use one of {known}")
    machine.rate(PRECISIONS[name].compute)
    return PRECISIONS[name]


def plan_command(
    model: str, machine: str | None, network: str | None, ranks: int | None, memory: str | None,
    precision: str | None, sizes: dict[str, Any], run_top: int | None, latency: str | None, bandwidth: str | None,
    png: Path | None, everything: bool = False,
) -> Plan:  # fmt: skip
    """Print the plan; return it.

    Args:
        everything: all layouts and all reasons instead of the best few.

    Raises:
        UsageError: unknown names, a machine file that lacks something, nothing that fits; each says what would.
    """
    where = machine_of(machine, network)
    subject = subject_of(model, sizes)
    chosen = precision_of(precision, where)
    count = ranks if ranks is not None else where.node_ranks
    if png is not None and (png.suffix.lower() not in PICTURES or not png.parent.is_dir()):
        raise UsageError(f"plan: --png {png}: give a name that ends in {', '.join(PICTURES)}, in a directory there is")
    if run_top is not None and run_top < 1:
        raise UsageError(f"plan: --run-top is {run_top}, it must be at least 1")
    if run_top is not None and (where.measured is None or subject.preset is not None):
        raise UsageError(
            "plan: --run-top runs layouts on this machine: give the --machine file that minipar calibrate wrote"
            " here, and a model that minipar train makes (mlp, convnet, gpt)"
        )
    if latency is not None or bandwidth is not None:
        alpha = parse_latency(latency) if latency is not None else 0.0
        where = where.slowed(alpha, 1 / parse_bandwidth(bandwidth) if bandwidth is not None else 0.0)
    limit = None if memory is None else parse_bytes(memory)
    batch = subject.config.batch
    assert batch is not None
    found = plan(subject.shape, where, count, batch, chosen, limit)
    best = found.best
    screen = console()
    if not screen.is_terminal:
        screen.width = WIDTH
    screen.print(
        f"{subject.preset or subject.config.model}, {found.shape.parameters:,} parameters, batch {batch},"
        f" {chosen.name}, on {count} ranks of {where.name}, {bytes_text(found.limit)} each\n",
        markup=False, soft_wrap=True,
    )  # fmt: skip
    if where.measured is not None and count > (here := where.node_ranks):
        screen.print(
            f"{where.name} was measured with {here} ranks: {count} are taken for {-(-count // here)} such machines,"
            " whose ranks reach each other as fast as those of one. For more ranks on this one: minipar calibrate"
            f" --ranks {count}\n",
            markup=False, soft_wrap=True,
        )  # fmt: skip
    screen.print(plan_table(found, None if everything else SHOWN))
    if (left := len(found.candidates) - SHOWN) > 0 and not everything:
        screen.print(f"and {left} more: --all shows them", markup=False)
    screen.print()
    reasons = list(found.refused.items())
    for reason, layouts in reasons if everything else reasons[:REASONS]:
        named = layouts if everything else layouts[:2]
        more = f", and {len(layouts) - len(named)} more" if len(layouts) > len(named) else ""
        screen.print(f"not possible: {'; '.join(named)}{more}: {reason}", markup=False, soft_wrap=True)
    if (left := len(reasons) - REASONS) > 0 and not everything:
        screen.print(f"and for {left} more reasons: --all shows them", markup=False)
    screen.print(f"\n{winner_text(found)}\n", markup=False, soft_wrap=True)
    for line in advice(found):
        screen.print(line, markup=False, soft_wrap=True)
    screen.print(f"\n{command_of(subject, best, count, chosen)}", markup=False, soft_wrap=True)
    if chosen.sent != chosen.high and best.layout.tp * best.layout.pp > 1:
        screen.print(
            "the plan counts float16 messages, as Megatron-LM sends them; this command sends float32 between"
            " tensor-parallel ranks and stages, twice the bytes",
            markup=False, soft_wrap=True,
        )  # fmt: skip
    if (remark := data_remark(subject.config)) is not None:
        screen.print(remark, markup=False, soft_wrap=True)
    ran = None
    if run_top is not None:
        ran = run_best(subject.config, found, run_top, count, latency, bandwidth)
    if png is not None:
        draw_plan(found, png, ran)
    return found


def plan_table(found: Plan, shown: int | None = SHOWN) -> Table:
    """Return the best layouts as a table, all of them for None."""
    table = Table(box=None, pad_edge=False)
    table.add_column("layout", overflow="fold")
    for heading in ("step", "memory", "bubble", "sent by dp", "pp", "tp"):
        table.add_column(heading, justify="right", no_wrap=True)
    for c in found.candidates[:shown]:
        sent = [bytes_text(c.traffic[axis]) if c.traffic[axis] else "–" for axis in ("dp", "pp", "tp")]
        bubble = f"{100 * c.step.bubble:.1f} %" if c.layout.pp > 1 else "–"
        table.add_row(str(c.layout), seconds_text(c.step.seconds), bytes_text(c.memory.total), bubble, *sent)
    return table


def command_of(subject: Subject, best: Candidate, ranks: int, precision: Precision) -> str:
    """Return the very command that trains in this layout."""
    c = subject.config
    words = ["minipar", "run", "-n", str(ranks), "train", c.model]
    names = ("data", "vocab", "layers", "width", "heads", "seq_len", "batch", "norm")
    for name in names:
        value = getattr(c, name)
        if value is not None:
            words += ["--" + name.replace("_", "-"), str(value)]
    if precision.name == "fp16":
        words += ["--amp", "fp16"]
    elif precision.name != "float32":
        words += ["--dtype", precision.name]
    words += best.layout.options()
    return " ".join(words)
