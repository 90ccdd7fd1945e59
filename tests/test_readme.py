"""Every command and program in README.md runs.

Commands are the lines of ```sh blocks (# begins a comment) and whatever stands as `minipar …` in the text.
They run in order in one empty directory, so that one may use what another has left there. To keep this quick,
trainings and verifications take few steps (`shortened`), and `minipar` itself runs in this process unless it
starts MPI ranks. Of `make` commands it is checked that the Makefile has the target: what it does is run
elsewhere. `uv run` commands need uv.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands.command_line import minipar, process

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
STEPS = {"train": "3", "verify": "2"}
ELSEWHERE = {
    ("make",),
    ("pytest",),
    ("python", "-m", "pytest"),
    ("python", "benchmarks/gpt_step.py"),
    ("python", "benchmarks/run.py"),
}  # run by .ci


def commands() -> list[str]:
    """Return all commands in order, each once."""
    found = []
    for part in re.split(r"(```sh\n.*?```)", README, flags=re.DOTALL):
        if part.startswith("```sh"):
            lines = [re.sub(r"(^|\s)#.*", "", line).strip() for line in part.splitlines()[1:-1]]
            found += [line.removeprefix("$ ") for line in lines if line]
        else:
            found += re.findall(r"`((?:minipar|python) [a-z][^`\n]*)`", part)
    return list(dict.fromkeys(found))


def shortened(words: list[str]) -> list[str]:
    """Let `train` and `verify` take few steps: the first --steps if there is one, else one at the end."""
    steps = next((STEPS[word] for word in words if word in STEPS), None)
    if steps is None:
        return words
    if "--steps" in words:
        at = words.index("--steps") + 1
        return [*words[:at], steps, *words[at + 1 :]]
    return [*words, "--steps", steps]


def test_the_rule_for_steps() -> None:
    assert shortened(["minipar", "train", "mlp"]) == ["minipar", "train", "mlp", "--steps", "3"]
    assert shortened(["minipar", "verify", "gpt", "--steps", "9", "-h"])[3:] == ["--steps", "2", "-h"]
    assert shortened(["minipar", "doctor"]) == ["minipar", "doctor"]


def test_there_are_commands() -> None:
    assert len(commands()) >= 8 and any(command.startswith("make train") for command in commands())


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("readme")


def case(command: str) -> object:
    """What measures the machine takes most of a minute, and runs with the benchmarks."""
    return pytest.param(command, marks=pytest.mark.benchmarks) if command == "minipar calibrate" else command


@pytest.mark.mpi
@pytest.mark.parametrize("command", [case(command) for command in commands()])
def test_command(command: str, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(directory)
    monkeypatch.setenv("XDG_STATE_HOME", str(directory))  # where points are kept
    words = shlex.split(command)
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        assert set(words[1:]) <= set(targets)
    elif words[0] == "source":
        assert words[1:] == [".venv/bin/activate"]
    elif words[:2] == ["uv", "run"]:
        run_with_uv(words[2:])
    elif is_run_elsewhere(words):
        assert all((ROOT / word).is_file() for word in words[1:] if word.endswith(".py"))
    else:
        assert words[0] == "minipar", f"the README shows {words[0]!r}, which this test cannot run"
        words = shortened(words)[1:]
        done = process(*words) if words[0] == "run" else minipar(*words)
        assert done.code == (1 if words[0] == "grade" else 0), done  # an exercise just copied out has no points


def is_run_elsewhere(words: list[str]) -> bool:
    return any(tuple(words[: len(start)]) == start for start in ELSEWHERE)


def run_with_uv(words: list[str]) -> None:
    """Run `uv run` in this very environment; uv would otherwise build another."""
    extras = [words[at + 1] for at, word in enumerate(words) if word == "--extra"]
    known = re.search(
        r"\[project.optional-dependencies\]\n(.*?)\n\n", (ROOT / "pyproject.toml").read_text(), re.DOTALL
    )
    assert known and all(re.search(rf"^{extra} =", known[1], re.MULTILINE) for extra in extras)
    program = words[2 * len(extras) :]
    assert program[0] == "minipar" or is_run_elsewhere(program)
    uv = shutil.which("uv")
    if uv is None:
        pytest.skip("uv is not installed")
    if is_run_elsewhere(program):
        return
    environment = {**os.environ, "UV_PROJECT_ENVIRONMENT": sys.prefix, "UV_NO_SYNC": "1"}
    job = subprocess.run(
        [uv, "run", "--project", str(ROOT), *shortened(program)], env=environment, timeout=100
    )
    assert job.returncode == 0


@pytest.mark.parametrize("program", re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL))
def test_program(program: str) -> None:
    exec(compile(program, "README.md", "exec"), {})


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`([\w/]+(?:\.\w+|/))`", README))))
def test_path_exists(path: str) -> None:
    if "/" in path:
        assert (ROOT / path).exists()


@pytest.mark.parametrize("path", re.findall(r"\]\(([^)#:]+)\)", README))
def test_link_leads_to_a_file(path: str) -> None:
    assert (ROOT / path).exists()
