"""The manifest, the commands that a learner types, the README of the lessons, and the autograder for Gradescope."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from minipar.errors import DataError, UsageError
from minipar.grading import Lesson, close, shaped, wrong
from minipar.grading.lesson import Wrong
from minipar.grading.manifest import find_entry, load_grader, read_manifest
from minipar.grading.values import NotPlain, Unreadable, pack, unpack
from tests.commands.command_line import assert_one_line, minipar
from tests.lessons.lesson_files import ENTRIES, LESSONS, ROOT, SOLUTIONS, is_written

NAMES = [
    "01_autograd", "02_messages", "03_all_reduce", "04_data_parallel", "05_buckets_and_overlap", "06_sharding",
    "07_tensor_parallel", "08_pipelines", "09_schedules", "10_mixed_precision", "11_three_axes", "12_choosing",
]  # fmt: skip
STUB = LESSONS / "01_autograd" / "exercise.py"


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A state directory of its own, and an empty current directory."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "state" / "minipar" / "lessons.json"


# The manifest -------------------------------------------------------------------------------------------


def test_the_lessons_are_these() -> None:
    assert [entry.name for entry in ENTRIES] == NAMES
    folders = {path.name for path in LESSONS.iterdir() if re.match(r"\d\d_", path.name)}
    assert folders <= set(NAMES)
    assert all(entry.question.endswith("?") and entry.title for entry in ENTRIES)


@pytest.mark.parametrize(
    "entry", [e for e in ENTRIES if is_written(e) and (e.folder / "grade.py").exists()], ids=lambda e: e.name
)
def test_points_are_those_of_the_checks(entry) -> None:
    assert load_grader(entry).points == entry.points


def test_a_lesson_is_found_by_number_or_name() -> None:
    assert find_entry("4").name == find_entry("04").name == find_entry("04_data_parallel").name == NAMES[3]
    with pytest.raises(UsageError, match=r"no lesson '13'; the lessons are 01_autograd, "):
        find_entry("13")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("number = 1\n", "number = 2\n"), "listed as 2"),
        (('title = "Trial"\n', ""), "without title"),
        (("points = 6", "points = 6\nlevel = 3"), "unknown key level"),
        (("prerequisites = []", "prerequisites = [1]"), "only build on earlier lessons"),
        (("[[lesson]]", "[[lesson"), "lessons.toml"),
    ],
)
def test_a_malformed_manifest_is_refused_by_name(change: tuple[str, str], said: str, tmp_path: Path) -> None:
    text = (Path(__file__).parent / "trial" / "lessons.toml").read_text()
    assert change[0] in text
    (tmp_path / "lessons.toml").write_text(text.replace(*change))
    with pytest.raises(DataError, match=re.escape(said)):
        read_manifest(tmp_path)


def test_points_that_differ_from_the_manifest_are_refused(tmp_path: Path) -> None:
    trial = Path(__file__).parent / "trial"
    (tmp_path / "01_trial").symlink_to(trial / "01_trial")
    (tmp_path / "lessons.toml").write_text(
        (trial / "lessons.toml").read_text().replace("points = 6", "points = 7")
    )
    with pytest.raises(DataError, match="lesson 1 with 6 points in all, but"):
        load_grader(read_manifest(tmp_path)[0])


# The words of a grader ----------------------------------------------------------------------------------


def test_close() -> None:
    import numpy as np

    x = np.arange(3.0)
    assert close(x, x + 1e-9) and close([x, {"a": (1, None)}], [x, {"a": [1, None]}]) and close([0, 1, 2], x)
    assert close(np.array([np.inf, np.nan]), np.array([np.inf, np.nan])) and close(x.astype("float32"), x)
    for a, b in (
        (x, x + 1e-6),
        (x, x[:2]),
        (None, x),
        (x, None),
        ([x], [x, x]),
        ({"a": x}, {"b": x}),
        ("a", x),
    ):
        assert not close(a, b)
    assert not close(np.array([np.nan]), np.array([1.0])) and not close(np.array([1e-3]), np.array([0.0]))
    assert close(x, x + 1e-6, tol=1e-5)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "y is None; an array of shape (2,) and dtype float64 was expected: was `return` forgotten?"),
        ([1.0, 2.0], "y is a list"),
        ("text", "y is a str"),
    ],
)
def test_shaped(value, said: str) -> None:
    with pytest.raises(Wrong, match=re.escape(said)):
        shaped(value, (2,), "float64", "y")


def test_shaped_looks_at_shape_and_dtype() -> None:
    import numpy as np

    assert shaped(np.ones(2), (2,)).sum() == 2
    with pytest.raises(Wrong, match=r"y has shape \(3,\)"):
        shaped(np.ones(3), (2,), name="y")
    with pytest.raises(Wrong, match="y has dtype float32; an array of shape"):
        shaped(np.ones(2, "float32"), (2,), "float64", "y")


def test_names_are_used_once_and_points_add_up() -> None:
    lesson = Lesson(1)
    lesson.check("a", points=2)(lambda run: None)
    lesson.check("b", points=3)(lambda run: wrong("no"))
    assert lesson.points == 5
    with pytest.raises(ValueError, match="two checks named 'a'"):
        lesson.check("a", points=1)


def test_values_travel_as_they_are() -> None:
    import ml_dtypes
    import numpy as np

    value = {
        "x": [np.arange(6.0).reshape(2, 3), np.float16(1.5), (1, None, True, "é", float("inf"))],
        3: np.array([1.0, 2.0], dtype=ml_dtypes.bfloat16),
        "empty": np.zeros((0, 4), np.int32),
    }
    back = unpack(pack(value))
    assert list(back) == ["x", 3, "empty"] and back["x"][2] == value["x"][2]
    for a, b in ((back["x"][0], value["x"][0]), (back[3], value[3]), (back["empty"], value["empty"])):
        assert a.dtype == b.dtype and a.shape == b.shape and np.array_equal(a, b) and a.flags.writeable
    assert type(back["x"][1]) is np.float16


def test_what_is_not_plain_is_refused_by_place() -> None:
    with pytest.raises(NotPlain, match=r"the result\['a'\]\[1\] is a set"):
        pack({"a": [1, {2}]})


@pytest.mark.parametrize("data", [b"", b"x" * 7, b"\0" * 8, (2).to_bytes(8, "big") + b"[]", pack(1) + b"x"])
def test_bytes_that_are_no_value_are_refused(data: bytes) -> None:
    with pytest.raises(Unreadable):
        unpack(data)


# The commands -------------------------------------------------------------------------------------------


def test_from_the_list_to_full_points(tmp_path: Path) -> None:
    listed = minipar("lessons")
    assert listed.code == 0 and "Autograd from zero" in listed.out and "– / 22" in listed.out
    started = minipar("start", "01", "my")
    assert started.code == 0 and "minipar grade 01 --file my/exercise.py" in started.out.replace("\n", " ")
    assert Path("my/exercise.py").read_text() == STUB.read_text()
    stub = minipar("grade", "01")  # finds what `start` made
    assert stub.code == 1 and "not written yet" in stub.out and "0 / 22" in stub.out
    Path("my/exercise.py").write_text((SOLUTIONS / "01_autograd.py").read_text())
    done = minipar("grade", "1", "--json", "results.json")
    assert done.code == 0 and "22 / 22" in done.out
    results = json.loads(Path("results.json").read_text())
    assert results["score"] == 22 and all(test["status"] == "passed" for test in results["tests"])
    assert "22 / 22" in minipar("lessons").out


def test_the_best_points_stay(state: Path) -> None:
    Path("exercise.py").write_text((SOLUTIONS / "01_autograd.py").read_text())
    assert minipar("grade", "1").code == 0
    Path("exercise.py").write_text("print('nothing yet')\n")
    again = minipar("grade", "1")
    assert again.code == 1 and "the submission printed" in again.out and "nothing yet" in again.out
    assert json.loads(state.read_text())["01_autograd"]["points"] == 22


def test_start_does_not_overwrite() -> None:
    assert minipar("start", "1", ".").code == 0
    Path("exercise.py").write_text("mine")
    assert_one_line(minipar("start", "1", "."), 2, "exercise.py exists already: it stays as it is")
    assert Path("exercise.py").read_text() == "mine"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("grade", "1"), "no exercise.py here: name one with --file, or begin with `minipar start 01 DIR`"),
        (("grade", "1", "--file", "none.py"), "--file none.py is not a file"),
        (("grade", "1", "--file", str(STUB), "--json", "no/where.json"), "there is no directory no"),
        (("grade", "77"), "there is no lesson '77'"),
        (("start", "77", "x"), "there is no lesson '77'"),
    ],
)
def test_wrong_usage(words: tuple[str, ...], said: str) -> None:
    assert_one_line(minipar(*words), 2, said)


def test_a_state_that_is_damaged_is_named(state: Path) -> None:
    state.parent.mkdir(parents=True)
    state.write_text("{")
    assert_one_line(minipar("lessons"), 1, "lessons.json is not what minipar wrote there: delete it")


def test_graders_are_refused_inside_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PMI_SIZE", "2")
    monkeypatch.setenv("PMI_RANK", "0")
    from minipar.commands.program import refuse_inside_job

    with pytest.raises(UsageError, match="grade starts ranks itself"):
        refuse_inside_job("grade")


# The README and Gradescope ------------------------------------------------------------------------------


def test_the_table_in_the_readme_is_the_manifest() -> None:
    from lessons.table import README, with_table

    assert README.read_text() == with_table(README.read_text()), "python -m lessons.table"


def test_commands_and_paths_in_the_readme_exist() -> None:
    text = (LESSONS / "README.md").read_text()
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert set(re.findall(r"make ([\w-]+)", text)) - {"and"} <= {*targets, "its"}
    modules = set(re.findall(r"python -m lessons\.(\w+)", text))
    assert modules == {"build", "bundle", "table"} and all((LESSONS / f"{m}.py").is_file() for m in modules)
    for path in re.findall(r"`((?:tests|minipar|gradescope|lessons)/[\w/.]+)`", text):
        assert (ROOT / path).exists() or (LESSONS / path).exists(), path
    for link in re.findall(r"\]\((\d\d_[^)]+)\)", text):
        assert (LESSONS / link).is_file(), link


def test_the_bundle_for_gradescope(tmp_path: Path) -> None:
    """The scripts run as Gradescope runs them, on the bundle's own copy of minipar and of the grader."""
    made = subprocess.run(
        [sys.executable, "-m", "lessons.bundle", "01", str(tmp_path / "a.zip")],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    root = tmp_path / "autograder"
    for name in ("source", "submission", "results"):
        (root / name).mkdir(parents=True)
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        archive.extractall(root / "source")
        assert {"setup.sh", "run_autograder", "pyproject.toml"} <= set(archive.namelist())
        assert not any("solution" in name or "__pycache__" in name for name in archive.namelist())
        assert all(
            archive.getinfo(name).external_attr >> 16 & 0o111 for name in ("setup.sh", "run_autograder")
        )
    (root / "venv").symlink_to(sys.prefix)  # what setup.sh would make
    environment = {**os.environ, "AUTOGRADER": str(root), "PYTHONPATH": str(root / "source")}

    def handed_in(source: str | None) -> dict:
        (root / "results" / "results.json").unlink(missing_ok=True)
        if source is not None:
            (root / "submission" / "exercise.py").write_text(source)
        job = subprocess.run(
            ["bash", str(root / "source" / "run_autograder")],
            cwd=root, env=environment, capture_output=True, text=True, timeout=100,
        )  # fmt: skip
        assert job.returncode == 0, job.stderr
        return json.loads((root / "results" / "results.json").read_text())

    assert handed_in(None)["score"] == 0
    full = handed_in((SOLUTIONS / "01_autograd.py").read_text())
    assert full["score"] == 22 and len(full["tests"]) == 8
    assert handed_in("import os\nos._exit(0)\n")["score"] == 0


def test_the_extras_of_the_readme_exist() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {"lessons", "browser"} <= set(project["optional-dependencies"])
