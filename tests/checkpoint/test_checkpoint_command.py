"""`minipar train --checkpoint … --resume` and `minipar checkpoint show|verify|export`."""

import json
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from minipar.checkpoint import checkpoints, newest, open_checkpoint
from minipar.models import gpt2_weights
from minipar.resume import saved_model
from tests.commands.command_line import SMALL, assert_one_line, minipar

GPT = ["train", "gpt", *SMALL["gpt"], "--steps", 6]


def metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def numbers(run: Path) -> list[tuple[float, float, float]]:
    """What a resumed run repeats exactly: all but times."""
    return [(line["step"], line["loss"], line["grad_norm"]) for line in metrics(run)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of 6 steps on 2 ranks, with checkpoints of steps 2, 4 and 6."""
    place = tmp_path_factory.mktemp("trained")
    done = minipar(*GPT, "--ranks", 2, "--out", place / "run", "--checkpoint", place / "saved", "--every", 2)
    assert done.code == 0, done
    return place


def test_every_and_keep(trained: Path, tmp_path: Path) -> None:
    assert [p.name for p in checkpoints(trained / "saved")] == [f"step-0000000{n}" for n in (2, 4, 6)]
    options = ["--out", tmp_path / "run", "--checkpoint", tmp_path / "saved", "--every", 4, "--keep", 1]
    assert minipar(*GPT, *options).code == 0
    assert [p.name for p in checkpoints(tmp_path / "saved")] == ["step-00000006"], "the last step is always saved"


def test_resume_continues_the_metrics_and_ends_bitwise_equal(trained: Path, tmp_path: Path) -> None:
    run, saved = tmp_path / "run", tmp_path / "saved"
    for name in ("step-00000002", "step-00000004"):
        (saved / name).mkdir(parents=True)
        for file in (trained / "saved" / name).iterdir():
            (saved / name / file.name).write_bytes(file.read_bytes())
    run.mkdir()
    lines = (trained / "run" / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:5]) + lines[5][:20])  # killed while step 6 was written
    done = minipar(*GPT, "--ranks", 2, "--out", run, "--checkpoint", saved, "--resume")
    assert done.code == 0, done
    assert "step-00000004, step 4 of 6" in done.out.replace("\n", "")
    assert numbers(run) == numbers(trained / "run")
    seconds = [line["seconds"] for line in metrics(run)]
    assert seconds[4] > seconds[3], "time goes on, too"
    ours, theirs = (load_file(r / "model.safetensors") for r in (run, trained / "run"))
    assert all(value.tobytes() == theirs[name].tobytes() for name, value in ours.items())
    assert newest(saved).name == "step-00000006"


def test_resume_with_nothing_left_to_do_writes_the_run_again(trained: Path, tmp_path: Path) -> None:
    done = minipar(*GPT, "--zero", 3, "--ranks", 3, "--out", tmp_path, "--checkpoint", trained / "saved", "--resume")
    assert done.code == 0, done
    assert (tmp_path / "loss.png").is_file() and metrics(tmp_path) == []
    ours, theirs = (load_file(r / "model.safetensors") for r in (tmp_path, trained / "run"))
    assert all(value.tobytes() == theirs[name].tobytes() for name, value in ours.items())


def test_going_on_from_one_checkpoint_saves_beside_it(trained: Path, tmp_path: Path) -> None:
    saved, one = tmp_path / "saved", tmp_path / "saved" / "step-00000002"
    for name in ("step-00000002", "step-00000004"):
        shutil.copytree(trained / "saved" / name, saved / name)
    words = [*GPT, "--ranks", 2, "--out", tmp_path / "run", "--checkpoint", one]
    assert_one_line(minipar(*words), 2, f"{one} names one checkpoint: go on from it with --resume, or give another")
    told = (f"{one} is of step 2, and {saved} holds step-00000004 already", f"--checkpoint {saved}, or remove")
    assert_one_line(minipar(*words, "--resume"), 2, *told)
    assert {p.name for p in one.iterdir()} == {p.name for p in (trained / "saved" / one.name).iterdir()}
    shutil.rmtree(saved / "step-00000004")
    done = minipar(*words, "--resume", "--every", 2)
    assert done.code == 0, done
    assert [p.name for p in checkpoints(saved)] == [f"step-0000000{n}" for n in (2, 4, 6)]
    assert [line[:2] for line in numbers(tmp_path / "run")] == [line[:2] for line in numbers(trained / "run")[2:]]


def test_show_and_verify(trained: Path) -> None:
    shown = minipar("checkpoint", "show", trained / "saved")
    assert shown.code == 0, shown
    for part in ("step", "6 of 6", "exp_avg_sq", "shard-00000.safetensors", "ranks 2, dp 2", "parameter"):
        assert part in shown.out
    verified = minipar("checkpoint", "verify", trained / "saved" / "step-00000002")
    assert verified.code == 0 and "all whole" in verified.out


def test_verify_says_what_is_damaged(trained: Path, tmp_path: Path) -> None:
    for file in (trained / "saved" / "step-00000002").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    shard = tmp_path / "shard-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x55")
    assert_one_line(minipar("checkpoint", "verify", tmp_path), 1, str(shard), "damaged")
    assert_one_line(minipar("checkpoint", "export", tmp_path, tmp_path / "out"), 1, str(shard))
    assert minipar("checkpoint", "show", tmp_path).code == 0, "which reads the manifest alone"


def test_export_is_gpt2s_naming(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "model.safetensors"
    done = minipar("checkpoint", "export", trained / "saved", out)
    assert done.code == 0, done
    assert out.read_bytes() == (trained / "run" / "model.safetensors").read_bytes()
    assert load_file(out)["h.0.attn.c_attn.weight"].shape == (16, 48), "(in, out), as GPT-2 has it"
    path = newest(trained / "saved")
    model = saved_model(path, open_checkpoint(path))
    for name, value in gpt2_weights.load(out, heads=2).state_dict().items():
        assert np.array_equal(value, model.state_dict()[name]), name


@contextmanager
def room(size: int) -> Iterator[None]:
    """Inside, the system allows no file above `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_an_export_that_does_not_fit_is_one_line_and_leaves_what_was_there(trained: Path, tmp_path: Path) -> None:
    out, old = tmp_path / "new.safetensors", tmp_path / "old.safetensors"
    old.write_text("what was there")
    for place in (out, old, tmp_path):
        with room(6000):  # the weights take 13 kB
            refused = minipar("checkpoint", "export", trained / "saved", place)
        reason = "it exists and is no plain file" if place is tmp_path else "File too large"
        assert_one_line(refused, 2, f"{place} cannot be written: {reason}")
    assert [p.name for p in tmp_path.iterdir()] == [old.name] and old.read_text() == "what was there"


@pytest.mark.parametrize(
    ("steps", "name"), ((2, "model.safetensors"), (60, "metrics.jsonl")), ids=("weights", "metrics")
)
def test_a_run_that_does_not_fit_is_one_line(steps: int, name: str, tmp_path: Path) -> None:
    """Settings fit; weights do not, nor do the lines of 60 steps."""
    with room(6000):
        refused = minipar("train", "gpt", *SMALL["gpt"], "--steps", steps, "--ranks", 2, "--out", tmp_path)
    assert_one_line(refused, 1, f"{tmp_path / name} cannot be written after step ", "File too large", "rank 0 of 2")
    assert {p.name for p in tmp_path.iterdir()} == {"metrics.jsonl", "config.json", "layout.txt"}
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["step"] == 1 and (len(lines) == 2 or 20 < len(lines) < 60)


def test_a_run_whose_metrics_do_not_fit_saves_before_it_ends(tmp_path: Path) -> None:
    run, saved = tmp_path / "run", tmp_path / "saved"
    words = ["train", "mlp", "--width", 4, "--layers", 1, "--batch", 6, "--steps", 200, "--ranks", 2, "--out", run]
    words += ["--checkpoint", saved, "--every", 1000]
    with room(10_000):
        refused = minipar(*words)
    assert_one_line(refused, 1, f"{run / 'metrics.jsonl'} cannot be written after step ", "File too large")
    last = int(checkpoints(saved)[-1].name[5:])
    assert refused.err.split("after step ")[1].startswith(f"{last}: ")
    done = minipar(*words, "--resume")
    assert done.code == 0, done
    assert [line["step"] for line in metrics(run)] == [n for n in range(1, 201) if n != last], "one line is lost"


@pytest.mark.parametrize(
    ("options", "said"),
    (
        (["--every", 2], "--every is about checkpoints: give --checkpoint DIR"),
        (["--resume"], "--resume is about checkpoints"),
        (["--checkpoint", "DIR", "--every", 0], "--every is 0, it must be at least 1"),
        (["--checkpoint", "DIR", "--keep", 0], "--keep is 0, it must be at least 1"),
        (["--checkpoint", "EMPTY", "--resume"], "holds no checkpoint"),
        (["--checkpoint", "DIR"], "holds step-00000006 already: go on from it with --resume"),
        (["--checkpoint", "DIR", "--resume", "--seed", 3], "--seed 0 (now 3)"),
        (["--checkpoint", "EMPTY", "--aggregation", "local", "--ranks", 2], "--aggregation local is refused"),
    ),
    ids=str,
)
def test_wrong_use_is_one_line(options: list[object], said: str, trained: Path, tmp_path: Path) -> None:
    places = {"DIR": trained / "saved", "EMPTY": tmp_path / "none"}
    words = [places.get(word, word) if isinstance(word, str) else word for word in options]
    assert_one_line(minipar(*GPT, "--out", tmp_path / "run", *words), 2, said)
    assert not (tmp_path / "none").exists()


def test_nothing_to_show_is_one_line(tmp_path: Path) -> None:
    for command in (["show"], ["verify"], ["export"]):
        more = [tmp_path / "out"] if command == ["export"] else []
        assert_one_line(minipar("checkpoint", *command, tmp_path, *more), 2, "holds no checkpoint")
