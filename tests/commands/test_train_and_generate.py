"""`minipar train` leaves a whole run behind, and `minipar generate` writes text from it."""

import json
import re
import struct
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from minipar.runs import load_run
from tests.commands.command_line import SMALL, assert_one_line, idx_folder, minipar, process

KEYS = ["step", "loss", "grad_norm", "samples_per_s", "seconds"]


def metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def gpt_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "gpt"
    done = minipar("train", "gpt", *SMALL["gpt"], "--steps", 3, "--ranks", 2, "--out", run)
    assert done.code == 0, done
    assert "ranks  2, " in done.out
    assert "validation  loss" in done.out and str(run / "loss.png") in done.out.replace("\n", "")
    assert "sample of what it writes:" in done.out
    return run


@pytest.mark.parametrize("model", ("mlp", "convnet"))
def test_train_leaves_a_run(model: str, tmp_path: Path) -> None:
    done = minipar("train", model, *SMALL[model], "--steps", 2, "--out", tmp_path)
    assert done.code == 0, done
    assert_whole(tmp_path, steps=2, ranks=1)


def test_speed_counts_the_samples_there_are(tmp_path: Path) -> None:
    """A batch of 8 of 12 samples has 4 in every second step."""
    data = idx_folder(tmp_path / "data", samples=12)
    run = tmp_path / "run"
    done = minipar("train", "mlp", "--data", data, "--width", 8, "--batch", 8, "--steps", 4, "--out", run)
    assert done.code == 0, done
    told = re.search(r"time .* s, ([\d,]+) samples/s", done.out)
    assert told is not None
    assert float(told[1].replace(",", "")) * metrics(run)[-1]["seconds"] == pytest.approx(24, rel=0.01)


def test_train_on_ranks_leaves_a_run(gpt_run: Path) -> None:
    assert_whole(gpt_run, steps=3, ranks=2)
    assert {"wte.weight", "h.0.attn.c_attn.weight"} <= load_file(gpt_run / "model.safetensors").keys()


def test_train_on_ranks_says_how_the_model_lies(gpt_run: Path, tmp_path: Path) -> None:
    text = (gpt_run / "layout.txt").read_text()
    assert text.startswith("mesh of 2 ranks: dp 2 × pp 1 × tp 1") and text.count("ranks 0-1\n") == 1
    assert "wte.weight" in text and "Replicate()" in text
    words = ["--ranks", 3, "--partition", "bytes", "--steps", 1, "--out", tmp_path]
    done = minipar("train", "mlp", *SMALL["mlp"], *words)
    assert done.code == 0, done
    shown = [line.strip() for line in done.out.splitlines()]
    assert "ranks  3, dp 3, partition by bytes" in shown
    assert [s for s in shown if s[:2] in ("tp", "dp")] == ["tp 0", "dp 0  rank 0", "dp 1  rank 1", "dp 2  rank 2"]
    assert "6 parameters by bytes" in done.out and "share of cost" in done.out
    # 682 parameters of 4 bytes on each rank, and a copy of what it owns: 512, 80 + 8, 64 + 10 + 8 elements.
    assert "held  4,776 bytes of parameters on rank 0, 3,080 bytes of parameters on rank 1," in " ".join(shown)
    assert (tmp_path / "partition.png").read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "layout.txt").read_text().count("stepped here") == 3


def assert_whole(run: Path, steps: int, ranks: int) -> None:
    facts = json.loads((run / "config.json").read_text())
    assert facts["ranks"] == ranks and facts["config"]["steps"] == steps
    assert 0 < facts["validation"]["loss"] < 10 and 0 <= facts["validation"]["accuracy"] <= 1
    rows = metrics(run)
    assert [list(row) for row in rows] == [KEYS] * steps
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    assert all(row["loss"] > 0 and row["grad_norm"] > 0 and row["samples_per_s"] > 0 for row in rows)
    picture = (run / "loss.png").read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n" and len(picture) > 10_000
    assert struct.unpack(">II", picture[16:24]) == (1050, 600)  # 7 × 4 inches of 150 dots
    model, config, _ = load_run(run)
    assert config.steps == steps
    assert all(np.isfinite(p.data).all() for p in model.parameters())


@pytest.mark.parametrize("aggregation", ("master", "local"))
def test_other_aggregations_train(aggregation: str, tmp_path: Path) -> None:
    done = minipar(
        "train",
        "mlp",
        *SMALL["mlp"],
        "--steps",
        3,
        "--ranks",
        2,
        "--aggregation",
        aggregation,
        "--out",
        tmp_path,
    )
    assert done.code == 0, done
    assert [row["grad_norm"] is None for row in metrics(tmp_path)] == [aggregation == "local"] * 3


def test_training_is_repeatable_and_its_loss_that_of_one_rank(tmp_path: Path) -> None:
    losses = []
    for name, ranks in (("a", 1), ("b", 1), ("c", 3)):
        done = minipar(
            "train", "convnet", *SMALL["convnet"], "--steps", 3, "--dtype", "float64", "--optimizer", "sgd",
            "--ranks", ranks, "--out", tmp_path / name,
        )  # fmt: skip
        assert done.code == 0, done
        losses.append([row["loss"] for row in metrics(tmp_path / name)])
    assert losses[0] == losses[1]
    assert np.allclose(losses[0], losses[2], rtol=1e-12)


def test_ranks_beyond_the_samples_stay_idle(tmp_path: Path) -> None:
    """Four samples on six ranks: legal, said, and equal to serial."""
    data = idx_folder(tmp_path / "data", samples=4)
    options = ["mlp", "--data", data, "--batch", 3, "--width", 8, "--ranks", 6]
    done = minipar("train", *options, "--steps", 3, "--out", tmp_path / "run")
    assert done.code == 0, done
    assert "more ranks (6) than training samples (4): some stay idle" in done.out
    assert minipar("verify", *options, "--steps", 4).code == 0


def test_a_text_without_the_usual_prompt_gets_another(tmp_path: Path) -> None:
    text = tmp_path / "digits.txt"
    text.write_text("0123456789" * 40)
    done = minipar("train", "gpt", *SMALL["gpt"], "--data", text, "--steps", 1, "--out", tmp_path / "run")
    assert done.code == 0, done
    assert "sample of what it writes:" in done.out


# Generate ---------------------------------------------------------------------------------------------


def test_generate_continues_the_prompt_the_same_for_a_seed(gpt_run: Path) -> None:
    texts = [
        minipar("generate", gpt_run, "--prompt", "def ", "--tokens", 40, "--seed", seed) for seed in (1, 1, 2)
    ]
    assert [done.code for done in texts] == [0, 0, 0]
    assert texts[0].out == texts[1].out != texts[2].out
    assert all(done.out.startswith("def ") and len(done.out) == 4 + 40 + 1 for done in texts)


def test_generate_at_temperature_zero_takes_the_likeliest(gpt_run: Path) -> None:
    cold = [
        minipar("generate", gpt_run, "--tokens", 20, "--temperature", 0, "--seed", seed).out
        for seed in (1, 2)
    ]
    greedy = minipar("generate", gpt_run, "--tokens", 20, "--top-k", 1, "--seed", 3).out
    assert cold[0] == cold[1] == greedy


def test_generate_refuses_what_cannot_be(gpt_run: Path, tmp_path: Path) -> None:
    assert_one_line(minipar("generate", tmp_path / "no"), 2, "holds no run", "minipar train --out")
    assert_one_line(minipar("generate", gpt_run, "--prompt", ""), 2, "prompt is empty")
    assert_one_line(minipar("generate", gpt_run, "--prompt", "ж"), 2, "character 'ж' at position 0")
    assert_one_line(minipar("generate", gpt_run, "--tokens", -1), 2, "--tokens is -1")
    assert_one_line(minipar("generate", gpt_run, "--top-k", 0), 2, "top_k 0")
    assert_one_line(minipar("generate", gpt_run, "--temperature", -1), 2, "temperature -1")


def test_generate_refuses_a_damaged_run(gpt_run: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((gpt_run / name).read_bytes())
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[:-100])
    assert_one_line(minipar("generate", tmp_path), 1, "model.safetensors cannot be read")
    (tmp_path / "model.safetensors").unlink()
    assert_one_line(minipar("generate", tmp_path), 2, "model.safetensors do not exist")
    (tmp_path / "config.json").write_text("{")
    assert_one_line(minipar("generate", tmp_path), 1, "config.json is damaged")


def test_generate_refuses_a_model_that_is_no_gpt(tmp_path: Path) -> None:
    assert minipar("train", "mlp", *SMALL["mlp"], "--steps", 1, "--out", tmp_path).code == 0
    assert_one_line(minipar("generate", tmp_path), 2, "no GPT on text")


# Under MPI --------------------------------------------------------------------------------------------


@pytest.mark.mpi
def test_train_on_mpi_ranks(tmp_path: Path) -> None:
    run, data = tmp_path / "run", idx_folder(tmp_path / "idx")
    done = process("run", "-n", 2, "train", "mlp", *SMALL["mlp"], "--data", data, "--steps", 2, "--out", run)
    assert done.code == 0 and done.err == "", done
    assert done.out.count("validation  loss") == 1, "only rank 0 prints"
    assert_whole(run, steps=2, ranks=2)
