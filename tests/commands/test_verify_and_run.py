"""`minipar verify` exits 1 when anything differs; `minipar run` starts ranks and passes on exit codes."""

import copy
import re
from pathlib import Path

import numpy as np
import pytest

from minipar.comm.interface import Work
from minipar.comm.threads import ThreadCommunicator
from minipar.parallel.buckets import Bucket
from minipar.parallel.strategies.strategy import Strategy
from minipar.verification import Report, Worst, relative_error
from tests.commands.command_line import assert_one_line, minipar, process


@pytest.mark.parametrize(
    "options",
    [
        ("mlp", "--ranks", 3),
        ("convnet", "--ranks", 2, "--data", "digits"),
        ("gpt", "--ranks", 4),
        ("gpt", "--ranks", 3, "--dtype", "float32", "--dropout", 0.1),
        ("mlp", "--ranks", 3, "--aggregation", "local", "--clip", 0),
        ("convnet", "--ranks", 3, "--norm", "batch", "--aggregation", "master"),
    ],
)
def test_verify_holds(options: tuple[object, ...]) -> None:
    done = minipar("verify", *options)
    assert done.code == 0, done
    assert f"{options[0]} on {options[2]} ranks" in done.out and "DIFFER" not in done.out
    errors = [float(e) for e in re.findall(r"\d\.\de[+-]\d\d", done.out)]
    assert len(errors) >= 2 and max(errors) <= (1e-5 if "float32" in options else 1e-10)


class Unsummed(Work):
    """An all-reduce that returns each rank's own array."""

    def wait(self) -> None:
        pass

    def done(self) -> bool:
        return True


def test_verify_finds_sums_that_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ThreadCommunicator, "all_reduce_async_", lambda self, x: Unsummed())
    done = minipar("verify", "mlp", "--ranks", 3, "--steps", 3)
    assert done.code == 1 and done.err == ""
    rows = {line.split()[1]: line for line in done.out.splitlines() if len(line.split()) > 2}
    assert "DIFFERS" in rows["gradient"] and "DIFFERS" in rows["weight"] and "DIFFER" in rows["replicas"]


@pytest.mark.parametrize("factor", (3.0, 1 + 1e-6))
def test_verify_finds_a_gradient_off_by_a_factor(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    """Even a small one, and on every rank alike, so that the replicas stay equal."""
    right = Bucket.hand_out

    def wrong(bucket: Bucket) -> None:
        right(bucket)
        bucket.params[0].grad *= factor

    monkeypatch.setattr(Bucket, "hand_out", wrong)
    done = minipar("verify", "mlp", "--ranks", 2, "--steps", 2, "--clip", 0)
    assert done.code == 1
    rows = {line.split()[1]: line for line in done.out.splitlines() if len(line.split()) > 2}
    assert "DIFFERS" in rows["gradient"] and "DIFFERS" in rows["weight"] and "DIFFER" not in rows["replicas"]


def test_verify_finds_a_parameter_that_no_rank_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not there cannot differ, so that it is missing must count."""
    held = Strategy.held

    def forgetful(strategy: Strategy, kind: str) -> dict[str, np.ndarray]:
        found = held(strategy, kind)
        if kind == "data" and strategy.batch_ranks.size > 1:
            del found["layers.1.fc.bias"]
        return found

    monkeypatch.setattr(Strategy, "held", forgetful)
    done = minipar("verify", "mlp", "--ranks", 2, "--steps", 1)
    assert done.code == 1
    rows = {line.split()[1]: line for line in done.out.splitlines() if len(line.split()) > 2}
    assert "DIFFERS" in rows["weight"] and "layers.1.fc.bias has a" in done.out and "DIFFERS" not in rows["gradient"]


def test_verify_says_what_it_has_run() -> None:
    done = minipar("verify", "convnet", "--ranks", 4, "--tp", 2, "--convolution", "input", "--steps", 1)
    assert done.code == 0, done
    assert "convnet on 4 ranks (dp 2 × tp 2, convolutions cut by input) against serial" in " ".join(done.out.split())


def test_verify_runs_on_two_ranks_by_itself() -> None:
    assert "mlp on 2 ranks" in minipar("verify", "mlp", "--steps", 1).out


def test_a_report_holds_only_if_something_was_compared() -> None:
    report = Report(1e-10)
    assert not report.holds
    for worst in report.worst.values():
        worst.see(1e-12, "somewhere")
    assert report.holds
    for spoil in ("error", "nan", "replicas"):
        bad = copy.deepcopy(report)
        if spoil == "replicas":
            bad.replicas_differ = 1
        else:
            bad.worst["weight"].see(2e-10 if spoil == "error" else float("nan"), "here")
            assert bad.worst["weight"].where == "here"
        assert not bad.holds, spoil


def test_the_measure_has_a_floor_and_sees_shapes_and_nan() -> None:
    serial = {"a": np.array([2.0, 1.0]), "zero": np.zeros(2), "nan": np.ones(1), "shape": np.ones(2)}
    parallel = {
        "a": np.array([2.0, 1.2]),
        "zero": np.full(2, 1e-9),
        "nan": np.full(1, np.nan),
        "shape": np.ones(3),
    }
    errors = {name: relative_error(parallel[name], b, b, scale=10.0) for name, b in serial.items()}
    assert errors["a"] == pytest.approx(0.1) and errors["zero"] == pytest.approx(1e-7)
    assert errors["shape"] == float("inf")
    worst = Worst()
    worst.see(errors["nan"], "nan")
    assert worst.error == float("inf")


# Run --------------------------------------------------------------------------------------------------

SCRIPT = """
import sys
from minipar import world
comm = world()
lines = comm.all_gather_object(f"{comm.rank} of {comm.size}: {' '.join(sys.argv[1:])}")
if comm.rank == 0:
    print("\\n".join(lines))
raise SystemExit(5)
"""


@pytest.mark.mpi
def test_run_starts_a_script_and_passes_on_arguments_and_exit_code(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = process("run", "-n", 2, script, "--ranks", "7", "-n", "x")
    assert done.code == 5, done
    assert done.out.split("\n") == ["0 of 2: --ranks 7 -n x", "1 of 2: --ranks 7 -n x", ""]


@pytest.mark.mpi
def test_run_kills_a_job_at_its_timeout(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import threading; threading.Event().wait()")
    done = process("run", "-n", 2, "--timeout", 1, script)
    assert done.code == 124 and "killed after 1 s" in done.err


@pytest.mark.mpi
def test_run_starts_a_minipar_command() -> None:
    done = process("run", "-n", 2, "minipar", "verify", "gpt", "--steps", 2)
    assert done.code == 0 and done.err == "", done
    assert done.out.count("gpt on 2 ranks") == 1


def test_run_refuses_what_cannot_be(tmp_path: Path) -> None:
    assert_one_line(
        minipar("run", "-n", 2, tmp_path / "none.py"), 2, "none.py' is neither a file nor a command"
    )
    assert_one_line(minipar("run", "-n", 2), 2, "neither a file nor a command")
    assert_one_line(minipar("run", "-n", 0, __file__), 2, "-n is 0")
    assert_one_line(minipar("run", "-n", 2, "--timeout", -1, __file__), 2, "--timeout is -1")
    assert_one_line(minipar("run", "verify"), 2, "-n", "--help")
