"""Mixed precision from the command line: what it prints and writes, and what it refuses."""

import json
from pathlib import Path

from tests.commands.command_line import SMALL, assert_one_line, minipar


def test_train_with_a_policy_prints_the_decisions_and_draws_them(tmp_path: Path) -> None:
    policy, run = tmp_path / "policy.toml", tmp_path / "run"
    policy.write_text('observe = 2\nfloat32 = ["wte.*"]\n')
    done = minipar(
        "train", "gpt", *SMALL["gpt"], "--steps", 4, "--ranks", 2, "--amp", "fp16",
        "--precision-policy", policy, "--out", run,
    )  # fmt: skip
    assert done.code == 0, done
    assert "fp16 with float32 master weights" in done.out
    assert "loss scale  65536, 0 steps skipped" in done.out
    rows = {line.split()[0]: line.split()[1] for line in done.out.splitlines() if ".weight" in line}
    assert (rows["wte.weight"], rows["h.0.mlp.c_fc.weight"]) == ("float32", "float16")
    assert "the policy file says so: wte.*" in done.out
    assert (run / "precision.png").read_bytes().startswith(b"\x89PNG")
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in metrics] == [1, 2, 3, 4]


def test_a_policy_that_saw_too_little_says_so(tmp_path: Path) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text("observe = 9\n")
    words = ("--steps", 2, "--amp", "fp16", "--precision-policy", policy, "--out", tmp_path / "run")
    done = minipar("train", "mlp", *SMALL["mlp"], *words)
    assert done.code == 0 and "undecided, it needs 9 steps without overflow" in done.out


def test_verify_takes_float32_master_weights_by_itself() -> None:
    done = minipar("verify", "gpt", "--amp", "fp16", "--ranks", 4, "--tp", 2, "--dp", 2, "--steps", 2)
    assert done.code == 0 and "fp16 with float32 master weights" in " ".join(done.out.split()), done


def test_wrong_settings_are_one_line(tmp_path: Path) -> None:
    policy = tmp_path / "policy.json"
    policy.write_text('{"underflow": 0.1}')
    words = ("train", "gpt", "--ranks", 2, "--steps", 1, "--out", tmp_path / "run")
    refused = minipar(*words, "--amp", "fp16", "--precision-policy", policy)
    assert_one_line(refused, 2, "policy.json", "key 'underflow' is unknown")
    assert_one_line(minipar(*words, "--amp", "fp8"), 2, "--amp 'fp8' is unknown: use one of off, fp16, bf16")
    refused = minipar("verify", "convnet", "--amp", "fp16", "--tp", 2, "--convolution", "input")
    assert_one_line(refused, 2, "--convolution input round differently in fp16")
