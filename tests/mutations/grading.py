"""Faults of the grading machinery: what must not survive, not hang, and not be believed."""

from tests.mutations.fault import Fault

MACHINERY = "tests/lessons/test_grading_machinery.py"
HOSTILE = f"{MACHINERY}::test_hostile_function"

FAULTS: list[Fault] = [
    Fault(
        "grading: processes that lost their parent survive",
        "minipar/grading/nursery.py",
        "        ctypes.CDLL(None).prctl(set_child_subreaper, 1, 0, 0, 0)\n",
        "        ctypes.CDLL(None).prctl(set_child_subreaper, 0, 0, 0, 0)\n",
        f"{MACHINERY}::test_no_process_is_left",
    ),
    Fault(
        "grading: nobody counts processes",
        "minipar/grading/nursery.py",
        "                self._crowded = True\n",
        "                pass\n",
        f"'{HOSTILE}[fork bomb]'",
    ),
    Fault(
        "grading: no limit of memory",
        "minipar/grading/child.py",
        "        resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, taken + MEMORY))\n",
        "        assert taken\n",
        f"'{HOSTILE}[growing list]'",
    ),
    Fault(
        "grading: no limit of files",
        "minipar/grading/child.py",
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_BYTES, FILE_BYTES))\n",
        "",
        f"{MACHINERY}::test_files_go_to_an_empty_directory_that_is_removed",
    ),
    Fault(
        "grading: printing has no end",
        "minipar/grading/sandbox.py",
        "                    if self._printed_bytes > PRINTED_BYTES:\n                        self._end()",
        "                    if self._printed_bytes < 0:\n                        self._end()",
        f"'{HOSTILE}[prints without end]'",
    ),
    Fault(
        "grading: where an endless loop was is not told",
        "minipar/grading/child.py",
        'self._answer({"late": self._whereabouts()})',
        'self._answer({"late": ""})',
        f"'{MACHINERY}::test_hostile_ranks[one rank loops]'",
    ),
    Fault(
        "grading: a submission is a rank of the job that grades",
        "minipar/grading/sandbox.py",
        'job_variables = ("MINIPAR", "PMI"',
        'job_variables = ("PMI"',
        f"{MACHINERY}::test_the_environment_of_a_job_does_not_reach_a_submission",
    ),
    Fault(
        "grading: random numbers differ from grading to grading",
        "minipar/grading/child.py",
        "        np.random.seed(0)\n",
        "",
        f"{MACHINERY}::test_grading_is_repeatable_and_by_the_sources_in_order",
    ),
    Fault(
        "grading: only imports of what is forbidden are seen",
        "minipar/grading/names.py",
        "            if first in meaning:\n",
        "            if False:\n",
        f"{MACHINERY}::test_what_an_exercise_forbids_is_refused_by_name",
    ),
    Fault(
        "grading: partial credit is forgotten",
        "minipar/grading/result.py",
        "        points = min(max(verdict.points, 0.0), check.points)\n",
        "        points = 0.0\n",
        f"'{MACHINERY}::test_hostile_ranks[partial credit]'",
    ),
]
