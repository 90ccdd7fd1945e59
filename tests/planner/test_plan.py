"""The planner: what it tries and refuses, what it says, and that its command is one that `minipar train` takes."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from minipar import Mesh, launch, world
from minipar.cli import app
from minipar.commands.plan import command_of, data_remark, machine_of, parse_bytes, plan_command, subject_of
from minipar.commands.plan_run import draw_plan, run_best
from minipar.config import TrainConfig
from minipar.errors import DataError, UsageError
from minipar.mesh import factorings
from minipar.models import ConvNetConfig, GPTConfig, MLPConfig
from minipar.planner.explain import advice, bytes_text, placement_text, seconds_text, step_parts, winner_text
from minipar.planner.layout import PRECISIONS, Layout
from minipar.planner.machine import Link, write_machine
from minipar.planner.plan import plan
from minipar.planner.presets import preset
from minipar.planner.reference import undisturbed
from minipar.planner.run_layouts import Ran, Runs, config_of, measure
from minipar.planner.shapes import shape_of
from minipar.training import Job, build_model, load_data
from tests.planner.machines import MEASURED, PLAIN

GPT = shape_of("gpt", GPTConfig(96, 64, 128, 4, 4))
FP16 = PRECISIONS["fp16"]


def grids(found: Any) -> set[tuple[int, int, int]]:
    return {(c.layout.dp, c.layout.pp, c.layout.tp) for c in found.candidates}


def test_every_grid_is_possible_or_refused_with_a_reason() -> None:
    found = plan(GPT, PLAIN, 8, 32)
    refused = {words for layouts in found.refused.values() for words in layouts}
    for dp, pp, tp in factorings(8):
        assert (dp, pp, tp) in grids(found) or f"dp {dp} × pp {pp} × tp {tp}" in refused
    assert any("4 attention heads" in reason for reason in found.refused)
    assert any("6 blocks" in reason for reason in found.refused)


def test_candidates_are_sorted_and_fit() -> None:
    found = plan(GPT, PLAIN, 4, 32)
    times = [c.step.seconds for c in found.candidates]
    assert times == sorted(times)
    assert all(c.memory.total <= found.limit for c in found.candidates)
    assert all(c.layout.ranks == 4 for c in found.candidates)


@pytest.mark.parametrize("model", ["gpt", "mlp", "convnet"])
def test_what_is_offered_runs(model: str) -> None:
    """Every layout on 2 ranks takes a step in the engine: nothing is offered that `distribute` refuses."""
    sizes: dict[str, Any] = {"gpt": dict(width=16, layers=2, seq_len=8), "mlp": dict(width=8), "convnet": dict(width=4)}
    config = TrainConfig(model=model, batch=8, steps=4, device="cpu", **sizes[model]).resolved()
    subject = subject_of(model, {**sizes[model], "batch": 8})
    found = plan(subject.shape, PLAIN, 2, 8)
    configs = [config_of(config, c.layout) for c in found.candidates]
    runs = launch(lambda: measure(world(), configs, turns=1, turn=0), 2)[0]
    assert len(runs.layouts) == len(found.candidates) and all(run.seconds > 0 for run in runs.layouts)
    assert runs.reference > 0
    for c, run in zip(found.candidates, runs.layouts):  # a pipeline's timeline has the actions that were planned
        assert c.memory.total == pytest.approx(run.held, rel=0.10), c.layout
        assert (run.timeline is None) == (c.layout.pp == 1)
        if run.timeline is not None:
            assert run.timeline.sizes.stages == 2 and run.timeline.sizes.microbatches == c.layout.microbatches


def test_disturbed_steps_are_left_out_and_if_all_are_it_is_said() -> None:
    assert undisturbed([1.0, 1.1, 9.0, 1.2], [0.0, 0.0, 8.0, 0.0]) == (1.1, 0.0)
    assert undisturbed([2.0, 4.0, 8.0, 3.0, 9.0], [1.0, 3.0, 7.0, 2.5, 8.0]) == pytest.approx((3.0, 0.625))


def test_batch_norm_has_no_pipeline() -> None:
    shape = shape_of("convnet", ConvNetConfig(1, 8, 10, 8, 3, norm="batch"))
    found = plan(shape, PLAIN, 2, 32)
    assert grids(found) == {(2, 1, 1), (1, 1, 2)}
    assert all(c.layout.microbatches == 1 for c in found.candidates)
    assert any("batch norm" in reason for reason in found.refused)


def test_a_batch_too_small_for_the_ranks() -> None:
    found = plan(GPT, PLAIN, 8, 2)
    assert max(dp for dp, _, _ in grids(found)) == 2
    assert any("the batch has no sample for each rank" in reason for reason in found.refused)


def test_memory_asks_for_recomputation_and_sharding() -> None:
    roomy = plan(GPT, PLAIN, 2, 32)
    assert not any(c.layout.recompute for c in roomy.candidates)
    plain = next(c for c in roomy.candidates if c.layout == Layout(dp=2))
    tight = plan(GPT, PLAIN, 2, 32, limit=0.6 * plain.memory.total)
    assert tight.candidates and not any(c.layout == Layout(dp=2) for c in tight.candidates)
    assert any(c.layout.recompute or c.layout.microbatches > 1 for c in tight.candidates if c.layout.dp == 2)


def test_when_nothing_fits_the_smallest_change_is_named_and_helps() -> None:
    shape = shape_of("gpt", GPTConfig(50257, 2048, 12288, 96, 96))
    machine = preset("a100-80gb")
    found = plan(shape, machine, 8, 64, FP16)
    with pytest.raises(UsageError) as error:
        _ = found.best
    text = str(error.value)
    memory = text.split("--memory ")[1].split(",")[0]
    ranks = int(text.split("--ranks ")[1].split()[0])
    assert plan(shape, machine, 8, 64, FP16, parse_bytes(memory)).candidates
    assert plan(shape, machine, ranks, 64, FP16).candidates
    assert not plan(shape, machine, ranks // 2, 64, FP16).candidates


@pytest.mark.parametrize(("ranks", "near"), [(97, {96, 99}), (10_007, {768})])
def test_when_no_layout_is_possible_the_nearest_ranks_and_batch_are_named_and_help(ranks: int, near: set[int]) -> None:
    found = plan(GPT, PLAIN, ranks, 32)
    with pytest.raises(UsageError, match=r"is possible: .*dp above 32") as error:
        _ = found.best
    named = [int(words.split()[0].strip(",")) for words in str(error.value).split("--ranks ")[1:]]
    assert set(named) == near and all(plan(GPT, PLAIN, n, 32).candidates for n in named)
    between = range(max(n for n in near if n < ranks) + 1, min(ranks, 768))
    assert not any(plan(GPT, PLAIN, n, 32).candidates for n in between)
    batch = int(str(error.value).split("--batch ")[1])
    assert batch == ranks and plan(GPT, PLAIN, ranks, batch).candidates


def test_slow_links_between_nodes_keep_tensor_parallelism_inside() -> None:
    shape = shape_of("gpt", GPTConfig(51200, 2048, 4096, 32, 32))
    slow = replace(PLAIN, memory=80 * 2**30, cluster=Link(1e-4, 1e-9), node=Link(1e-6, 1e-12))
    found = plan(shape, slow, 64, 64, FP16)
    assert found.best.layout.tp <= slow.node_ranks
    assert "stays inside a node" in placement_text(slow, found.candidates[0]) or found.best.layout.tp == 1


def test_the_winner_is_explained_in_two_sentences() -> None:
    found = plan(GPT, PLAIN, 8, 32)
    text = winner_text(found)
    best, second = found.candidates[:2]
    assert text.startswith(f"{best.layout} takes {seconds_text(best.step.seconds)} a step")
    assert str(second.layout) in text
    assert text.count(". ") == 1 and text.endswith(".")
    for c in found.candidates:
        assert sum(step_parts(c).values()) == pytest.approx(c.step.seconds)


def test_advice_weighs_data_against_model_parallelism() -> None:
    small = advice(plan(GPT, PLAIN, 2, 32))
    assert [line.split(":")[0] for line in small[1:]] == [
        "Data parallelism", "Pipeline parallelism", "Tensor parallelism", "Here",
    ]  # fmt: skip
    assert "the model fits one rank" in small[-1]
    large = advice(plan(GPT, PLAIN, 4, 32, limit=0.5 * plan(GPT, PLAIN, 1, 32).best.memory.total / 8))
    assert "does not fit one rank" in large[-1]
    assert advice(plan(GPT, PLAIN, 1, 32)) == ["One rank: there is nothing to divide."]
    far = replace(PLAIN, node=Link(1.0, 1e-6), cluster=Link(1.0, 1e-6))
    assert "do not divide it" in advice(plan(GPT, far, 2, 32))[-1]


def test_the_command_is_the_layout() -> None:
    subject = subject_of("gpt", {"batch": 16, "layers": 4})
    found = plan(subject.shape, PLAIN, 8, 16)
    for c in found.candidates:
        words = command_of(subject, c, 8, PRECISIONS["float32"]).split()
        assert words[:6] == ["minipar", "run", "-n", "8", "train", "gpt"]
        following = [*words[1:], "--"]
        options = {
            word[2:].replace("-", "_"): True if after.startswith("--") else after
            for word, after in zip(words, following)
            if word.startswith("--")
        }
        config = config_of(subject.config, c.layout)
        for name, value in options.items():
            assert str(getattr(config, name)) == str(value), name
        assert config.resolved().to_dict()


def test_a_chosen_layout_on_eight_ranks_is_built_by_the_engine() -> None:
    subject = subject_of("gpt", {"batch": 16, "layers": 6, "width": 16, "seq_len": 8})
    layout = Layout(2, 2, 2, 1, "zb-h1", 4, sequence_parallel=True)

    def work() -> float:
        config = replace(config_of(subject.config, layout, FP16), steps=1, loss_scale=1.0)
        job = Job(config.resolved(), world())
        assert isinstance(job.mesh, Mesh) and job.mesh.shape == {"dp": 2, "pp": 2, "tp": 2}
        return next(iter(job.train())).loss

    assert all(loss > 0 for loss in launch(work, 8))


@pytest.mark.parametrize(
    ("text", "expected"), [("80GiB", 80 * 2**30), ("1.5MiB", 1.5 * 2**20), ("1000", 1000.0), ("10B", 10.0)]
)
def test_bytes(text: str, expected: float) -> None:
    assert parse_bytes(text) == expected


def test_texts_of_numbers() -> None:
    assert [seconds_text(x) for x in (12.345, 0.0123, 4e-6)] == ["12.3 s", "12.3 ms", "4 µs"]
    assert [bytes_text(x) for x in (5.0, 2048.0, 3 * 2**30, 2000 * 2**30)] == ["5 B", "2 KiB", "3 GiB", "2,000 GiB"]


# The command --------------------------------------------------------------------------------------------


def ask(*words: str) -> tuple[str, int]:
    result = CliRunner().invoke(app, ["plan", *words])
    return result.output, result.exit_code


def test_the_command_prints_table_reasons_and_command(tmp_path: Path) -> None:
    write_machine(PLAIN, tmp_path / "m.json")
    out, code = ask(
        "--model", "gpt", "--machine", str(tmp_path / "m.json"), "--ranks", "4", "--precision", "float32",
        "--png", str(tmp_path / "plan.png"),
    )  # fmt: skip
    assert code == 0, out
    for words in ("bubble", "Data parallelism:", "minipar run -n 4 train gpt", "longer: the winner"):
        assert words in out
    assert (tmp_path / "plan.png").stat().st_size > 1000
    assert (tmp_path / "plan-memory.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--model", "foo", "--machine", "a100-80gb"], "gpt-175b"),
        (["--model", "gpt", "--machine", "abacus"], "a100-80gb"),
        (["--model", "gpt", "--machine", "a100-80gb", "--network", "pigeons"], "infiniband-hdr"),
        (["--model", "gpt", "--machine", "a100-80gb", "--memory", "much"], "GiB"),
        (["--model", "gpt", "--machine", "a100-80gb", "--memory", "1KiB", "--ranks", "2"], "smallest need"),
        (["--model", "gpt", "--machine", "a100-80gb", "--ranks", "0"], "at least 1"),
        (["--model", "gpt", "--machine", "a100-80gb", "--run-top", "2"], "minipar calibrate"),
        (["--model", "gpt", "--machine", "a100-80gb", "--precision", "int8"], "fp16"),
        (["--model", "mlp", "--machine", "a100-80gb", "--vocab", "9"], "--vocab has no meaning"),
        (["--model", "mlp", "--machine", "a100-80gb", "--heads", "9"], "--heads has no meaning"),
        (["--model", "gpt", "--machine", "a100-80gb", "--png", "x.txt"], ".png"),
    ],
    ids=lambda x: x[-1] if isinstance(x, list) else "",
)
def test_wrong_use_says_what_would_be_right(words: list[str], told: str) -> None:
    with pytest.raises((UsageError, DataError), match=told.replace("-", "[-]").replace(".", "[.]")):
        arguments = dict(zip(words[::2], words[1::2]))
        sizes = {k: None for k in ("batch", "layers", "width", "heads", "seq_len", "vocab", "data")}
        for name in ("heads", "vocab"):
            if f"--{name}" in arguments:
                sizes[name] = int(arguments[f"--{name}"])  # type: ignore[assignment]
        number = {name: int(arguments[name]) if name in arguments else None for name in ("--ranks", "--run-top")}
        png = Path(arguments["--png"]) if "--png" in arguments else None
        plan_command(
            arguments["--model"], arguments["--machine"], arguments.get("--network"), number["--ranks"],
            arguments.get("--memory"), arguments.get("--precision"), sizes, number["--run-top"], None, None, png,
        )  # fmt: skip


def test_without_a_machine_it_says_how_to_get_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="minipar calibrate"):
        machine_of(None, None)
    write_machine(MEASURED, tmp_path / "machine.json")
    assert machine_of(None, None) == MEASURED
    with pytest.raises(UsageError, match="presets"):
        machine_of("machine.json", "ethernet-100")


def test_more_ranks_than_were_measured_are_said_to_be_more_machines(tmp_path: Path) -> None:
    write_machine(MEASURED, tmp_path / "m.json")
    words = ("--model", "mlp", "--machine", str(tmp_path / "m.json"), "--ranks")
    assert "measured with 2 ranks: 4 are taken for 2 such machines" in ask(*words, "4")[0]
    assert "such machines" not in ask(*words, "2")[0]


def test_what_the_table_leaves_out_is_said_and_shown_with_all() -> None:
    words = ("--model", "gpt", "--machine", "a100-80gb", "--ranks", "96", "--vocab", "200")
    (short, _), (whole, _) = ask(*words), ask(*words, "--all")
    left = int(short.split(" more: --all shows them")[0].split()[-1])
    assert len(whole.splitlines()) >= len(short.splitlines()) + left - 2
    for words_of_less in (" more: --all", "more reasons", ", and 1", " more: "):
        assert words_of_less not in whole.split(" takes ")[0]


@pytest.mark.parametrize("model", ["gpt2", "gpt"])
def test_the_command_trains_the_very_model(model: str) -> None:
    subject = subject_of(model, {"vocab": 300, "batch": 500} if model == "gpt" else {})
    found = plan(subject.shape, preset("a100-80gb"), 8, subject.config.batch or 0, FP16)
    words = command_of(subject, found.best, 8, FP16).split()
    words = words[words.index("train") + 2 :]
    given = dict(itertools.pairwise(words))
    names = ("vocab", "layers", "width", "heads", "seq_len")
    sizes = {name: int(given[f"--{name.replace('_', '-')}"]) for name in names}
    config = TrainConfig(model="gpt", data=given["--data"], **sizes).resolved()  # type: ignore[arg-type]
    built = build_model(config, load_data(config).info)
    assert sum(math.prod(p.global_shape) for p in built.parameters()) == found.shape.parameters
    remark = data_remark(subject.config)
    assert (remark is None) == (model == "gpt") and (remark is None or "to train, give --data" in remark)
    with pytest.raises(UsageError, match="different characters"):
        build_model(replace(config, vocab=9), load_data(config).info)


def test_a_measured_machine_plans_in_the_precision_it_was_measured_in(tmp_path: Path) -> None:
    write_machine(MEASURED, tmp_path / "m.json")
    with pytest.raises(UsageError, match="--dtype float64"):
        plan_command("mlp", str(tmp_path / "m.json"), None, 2, None, "float64", {}, None, None, None, None)


def test_shapes_refuse_what_they_do_not_know() -> None:
    with pytest.raises(UsageError, match="gpt, mlp, convnet"):
        shape_of("tree", MLPConfig())


def test_what_was_run_stands_beside_its_prediction_and_a_pipeline_below_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert MEASURED.measured is not None
    machine = replace(MEASURED, measured=replace(MEASURED.measured, reference={"gpt": 1.0}))
    found = plan(GPT, machine, 2, 32)
    piped = next(c for c in found.candidates if c.layout.pp == 2)

    def ran(configs: list[TrainConfig], *_: object) -> Runs:
        """Everything takes twice as long as it did, and holds what was predicted."""
        pairs = zip(found.candidates, configs)
        return Runs([Ran(2 * c.step.seconds, c.memory.total, c.step.timeline) for c, _ in pairs], 2.0, 0.0)

    monkeypatch.setattr("minipar.commands.plan_run.run_layouts", ran)
    config = subject_of("gpt", {}).config
    held = run_best(config, found, len(found.candidates), 2, None, None)
    told = capsys.readouterr().out
    assert list(held.measured.values()) == [2 * c.step.seconds for c in found.candidates]
    assert "2.00 times as long a step" in told and "the layout chosen is the fastest" in told
    assert told.count("+0 %") + told.count("-0 %") == 2 * len(found.candidates)
    assert held.pipeline is not None and held.pipeline[0] == piped.layout
    draw_plan(found, tmp_path / "plan.png", held)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"plan.png", "plan-memory.png", "plan-timeline.png"}
