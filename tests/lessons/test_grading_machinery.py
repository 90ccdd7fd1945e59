"""Hostile submissions end in a graded message, leave nothing behind, and do not spoil the next check.

The trial lesson has two checks, `double` (2 points) and `total` over three ranks (4 points). Each submission
here is right but for one function, so the other check's points show that grading went on in good order.
"""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import numpy as np
import pytest

from minipar.grading.manifest import read_manifest
from minipar.grading.result import Result, grade
from minipar.grading.sandbox import Nursery

TRIAL = Path(__file__).parent / "trial"
GOOD = """
import ctypes, os, sys, threading, time
import numpy as np
import minipar
def double(x): return 2 * x
def total(comm, x): return comm.all_reduce(x)
"""


def graded(nursery: Nursery, source: str) -> Result:
    (entry,) = read_manifest(TRIAL)
    return grade(entry, [("/somewhere/exercise.py", GOOD + source)], nursery)


def test_a_right_submission_gets_all_points(nursery: Nursery) -> None:
    result = graded(nursery, "")
    assert result.passed and result.points == 6
    assert [verdict.message for verdict in result.verdicts] == ["", ""]


# Each: the source that replaces `double`, and what the message of its check must say.
HOSTILE = {
    "endless loop": ("def double(x):\n while True: pass", "still running after 1.5 s"),
    "loop in the interpreter's core": ("def double(x): return 9 ** 9 ** 9", "still running after 1.5 s"),
    "sleeps": ("def double(x): time.sleep(1000)", "still running"),
    "waits for input": ("def double(x): return input()", "raised EOFError"),
    "sys.exit": ("def double(x): sys.exit(0)", "sys.exit was called"),
    "os._exit": ("def double(x): os._exit(0)", "exit code 0 and no answer: was os._exit called"),
    "kills itself": ("def double(x): os.kill(os.getpid(), 9)", "its process was killed"),
    "prints without end": ("def double(x):\n while True: print('x' * 500)", "printed more than 1 MiB"),
    "prints to the descriptor": ("def double(x):\n while True: os.write(1, b'x' * 500)", "printed more than 1 MiB"),
    "huge array": ("def double(x): return np.ones(2**31)", "more memory was asked for than the 2 GiB"),
    "growing list": ("def double(x): return 2 * x * len([np.empty(10**8) for _ in range(99)]) / 99", "more memory"),
    "recursion": ("def double(x): return double(x)", "calls itself without end"),
    "crash": ("def double(x): return ctypes.string_at(0)", "ended by SIGSEGV"),
    "fork bomb": ("def double(x):\n while True: os.fork()", "started processes without end"),
    "closes all files": ("def double(x): os.closerange(0, 4000); return 2 * x", "no answer"),
    "huge answer": ("def double(x): return np.ones(2**24)", "returned more than 64 MiB"),
    "returns a tensor": ("def double(x): return minipar.tensor(x)", "is a Tensor; a number, an array"),
    "returns an object": ("def double(x): return np.array([object()])", "an array of object"),
    "returns nothing": ("def double(x): pass", "not 2 x"),
    "raises": ("def double(x): raise KeyError('k')", "raised KeyError: 'k'\nat exercise.py line 7, in double"),
    "is not written": ("def double(x): raise NotImplementedError('double x')", "not written yet: double x"),
    "is not there": ("del double", "has no 'double'"),
    "takes other arguments": ("def double(): pass", "takes 0 positional arguments but 1 was given"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_function(name: str, nursery: Nursery) -> None:
    source, message = HOSTILE[name]
    result = graded(nursery, source)
    double, total = result.verdicts
    assert double.points == 0 and message in double.message, double.message
    assert total.passed, total.message


RANKS = {
    "deadlock": ("return comm.recv((comm.rank + 1) % 3)", "deadlock, no rank can go on: rank 0 waits in recv"),
    "one rank does not join": ("return comm.all_reduce(x) if comm.rank else x", "rank 0 has finished"),
    "other operations": (
        "return comm.all_reduce(x) if comm.rank else comm.barrier()",
        "the ranks do not call the same operations: rank 0 called barrier",
    ),
    "one rank raises": (
        "if comm.rank == 2: raise ValueError('boo')\n return comm.all_reduce(x)",
        "raised ValueError: boo (on rank 2",
    ),
    "one rank loops": (
        "while comm.rank == 1: pass\n return comm.all_reduce(x)",
        "rank 1: exercise.py line 8, in total",
    ),
    "partial credit": ("return x", "each rank has its own"),
}  # fmt: skip


@pytest.mark.parametrize("name", RANKS)
def test_hostile_ranks(name: str, nursery: Nursery) -> None:
    body, message = RANKS[name]
    result = graded(nursery, f"def total(comm, x):\n {body}\n")
    double, total = result.verdicts
    assert double.passed, double.message
    assert total.points == (1 if name == "partial credit" else 0)
    assert message in total.message, total.message


CHEATS = {
    "patches numpy": "np.allclose = np.array_equal = lambda *a, **k: True\ndef double(x): return x\n",
    "patches the engine": "minipar.launch = lambda fn, ranks: [0] * ranks\ndef double(x): return x\n",
    "patches the grader": (
        "import minipar.grading, minipar.grading.lesson as l, minipar.grading.result as r\n"
        "l.close = minipar.grading.close = lambda *a, **k: True\nl.wrong = lambda *a: None\n"
        "sys.modules['grade_01_trial'].close = lambda *a: True\nr.judged = None\ndef double(x): return x\n"
    ),
    "prints a result": "def double(x): print('{\"score\": 6}'); return x\n",
    "answers in its place": (
        "from minipar.grading.values import pack\n"
        "def double(x):\n"
        " for fd in range(3, 20):\n"
        "  try:\n"
        "   data = pack({'value': 'all right', 'score': 6}); os.write(fd, len(data).to_bytes(8, 'big') + data)\n"
        "  except OSError: pass\n"
        " return x\n"
    ),
}


@pytest.mark.parametrize("name", CHEATS)
def test_cheating_gains_nothing(name: str, nursery: Nursery) -> None:
    double = graded(nursery, CHEATS[name]).verdicts[0]
    assert double.points == 0
    assert double.message == "not 2 x" or "answer could not be read" in double.message
    assert graded(nursery, "").points == 6  # and the grader is as it was


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def f(:\n", "does not load: invalid syntax, exercise.py line 7"),
        ("import nothing_of_that_name\n", "raised ModuleNotFoundError"),
        ("sys.exit(3)\n", "sys.exit was called"),
        ("1 / 0\n", "raised ZeroDivisionError: division by zero\nat exercise.py line 7: 1 / 0"),
    ],
)
def test_submission_that_does_not_load(source: str, message: str, nursery: Nursery) -> None:
    result = graded(nursery, source)
    assert result.points == 0
    assert all(message in verdict.message for verdict in result.verdicts), result.verdicts


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("import minipar.parallel", "minipar.parallel"),
        ("from minipar import parallel as p", "minipar.parallel"),
        ("from minipar.parallel import DataParallel", "minipar.parallel.DataParallel"),
        ("from minipar.parallel.buckets import *", "minipar.parallel.buckets.*"),
        ("def double(x):\n import minipar as m; return m.Mesh(m.world())", "minipar.Mesh"),
        ("import minipar.nn\ndef double(x): return minipar.parallel.Zero", "minipar.parallel.Zero"),
    ],
)
def test_what_an_exercise_forbids_is_refused_by_name(source: str, name: str, nursery: Nursery) -> None:
    result = graded(nursery, f"print('it runs')\n{source}\n")
    assert result.points == 0 and not result.printed
    told = f"{name} is not to be used in this exercise: write it yourself\nat exercise.py line "
    last = source.splitlines()[-1].strip()
    assert all(v.message.startswith(told) and v.message.endswith(last) for v in result.verdicts), result.verdicts


def test_a_submission_may_give_such_names_to_its_own(nursery: Nursery) -> None:
    source = "class parallel: Mesh = 2\ndef double(x): return parallel.Mesh * x\n"
    assert graded(nursery, source).points == 6


def test_what_is_printed_is_shown_and_cut(nursery: Nursery) -> None:
    result = graded(
        nursery, "print('loaded')\ndef double(x): print('[bold]' * 2000, file=sys.stderr); return 2 * x\n"
    )
    assert result.passed
    assert result.printed.startswith("loaded\n[bold]") and result.printed.endswith("(cut)")
    assert len(result.printed) < 5000


def test_files_go_to_an_empty_directory_that_is_removed(nursery: Nursery) -> None:
    source = (
        "def double(x):\n"
        " print(os.getcwd(), os.listdir())\n"
        " open('big', 'wb').write(b'x' * 2**27)\n"  # 128 MiB: over the limit
        " return 2 * x\n"
    )
    result = graded(nursery, source)
    folder, listing = result.printed.split(maxsplit=1)
    assert "minipar-grade-" in folder and listing.strip() == "[]"
    assert "raised OSError" in result.verdicts[0].message
    assert not Path(folder).exists()


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="orphans are found through /proc: Linux")
def test_no_process_is_left(nursery: Nursery) -> None:
    source = (
        "def double(x):\n"
        " end, other = os.pipe()\n"
        " if os.fork() == 0:\n"
        "  os.setsid()\n"
        "  if os.fork() == 0:\n"
        "   os.write(1, str(os.getpid()).encode())\n"
        "   os.write(other, b'.')\n"
        "   time.sleep(60)\n"
        "  os._exit(0)\n"
        " os.wait()\n"
        " os.read(end, 1)\n"
        " return 2 * x\n"
    )
    result = graded(nursery, source)
    assert result.passed
    with pytest.raises(ProcessLookupError):
        os.kill(int(result.printed), 0)


def test_a_killed_nursery_is_replaced(nursery: Nursery) -> None:
    source = "def double(x): print(os.getcwd()); os.kill(os.getppid(), 9); time.sleep(0.2); os._exit(1)\n"
    result = graded(nursery, source)
    assert "ended the process that grades it" in result.verdicts[0].message
    assert result.verdicts[1].passed
    assert not Path(result.printed.strip()).exists()
    assert graded(nursery, "").points == 6


def test_grading_is_repeatable_and_by_the_sources_in_order(nursery: Nursery) -> None:
    (entry,) = read_manifest(TRIAL)
    twice = [("/a/one.py", GOOD), ("/a/two.py", "def double(x): return 3 * x\n")]
    assert grade(entry, twice, nursery).points == 4
    printed = graded(
        nursery, "import random\ndef double(x): print(np.random.rand(), random.random()); return 2 * x\n"
    ).printed
    assert printed == f"{np.random.RandomState(0).rand()} {random.Random(0).random()}\n"


def test_gradescope_form(nursery: Nursery) -> None:
    result = graded(nursery, "def total(comm, x): print('hello'); return x\n")
    form = json.loads(json.dumps(result.as_gradescope()))
    assert form["score"] == 3 and form["execution_time"] >= 0
    assert "3 of 6 points" in form["output"] and "hello" in form["output"]
    assert form["tests"] == [
        {"name": "double", "score": 2, "max_score": 2, "output": "", "status": "passed"},
        {
            "name": "total over ranks",
            "score": 1,
            "max_score": 4,
            "output": "each rank has its own",
            "status": "failed",
        },
    ]


def test_the_environment_of_a_job_does_not_reach_a_submission(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINIPAR_WORLD_SIZE", "2")
    with Nursery() as fresh:
        result = graded(fresh, "print(minipar.world().size, os.environ['HOME'] == os.getcwd())\n")
    assert result.passed and result.printed == "1 True\n"


def test_closing_the_nursery_ends_its_process() -> None:
    with Nursery() as fresh:
        assert graded(fresh, "").passed
        pid = fresh._process.pid
        assert Path(f"/proc/{pid}").exists() or not Path("/proc").exists()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_probe_is_given_arrays_of_its_own(nursery: Nursery) -> None:
    result = graded(
        nursery, "def double(x): assert x.flags.writeable and x.dtype == float; x *= 2; return x\n"
    )
    assert result.passed, result.verdicts
