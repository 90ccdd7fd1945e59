"""Faults of how ranks of an MPI job agree on what comes next."""

from tests.mutations.fault import Fault

SIGNATURES = "tests/comm/test_comm_signatures.py"
ANY_ORDER = f"{SIGNATURES}::test_each_comparison_has_its_own_result_in_whatever_order_ranks_come"

SYMMETRIC = "tests/comm/test_comm_symmetric.py"
ANOTHER_GROUP = "tests/comm/test_comm_mpi.py -k 'a_rank_may_wait_in_another_group and 2'"
TOO_EARLY = f"{SYMMETRIC}::test_nothing_is_read_too_early_or_written_too_late"

FAULTS: list[Fault] = [
    Fault(
        "comm: a symmetric array is summed before the other ranks have filled theirs",
        "minipar/comm/symmetric.py",
        "return [barrier, reduce]",
        "return [reduce]",
        TOO_EARLY,
    ),
    Fault(
        "comm: a symmetric array is given back before the other ranks have written their parts of it",
        "minipar/comm/symmetric.py",
        "(getattr(np, UFUNCS[op]))\n            return barrier()\n",
        "(getattr(np, UFUNCS[op]))\n            return 0\n",
        TOO_EARLY,
    ),
    Fault(
        "comm: a rank keeps its part of the sum to itself",
        "minipar/comm/symmetric.py",
        "                    other[span] = result\n",
        "                    other = result\n",
        TOO_EARLY,
    ),
    Fault(
        "comm: a sum of several ranks is begun over one that is still to be added",
        "minipar/comm/symmetric.py",
        "out=temporary)",
        "out=mine[span])",
        TOO_EARLY,
    ),
    Fault(
        "comm: the stages of a collective do not wait for each other",
        "minipar/comm/mpi_work.py",
        "(self._data is None or self._data.Test())",
        "(self._data is None or self._data)",
        f"{SYMMETRIC}::test_a_stage_waits_for_the_one_before_it",
    ),
    Fault(
        "comm: without checks a symmetric array goes on in stages, while a rank is inside of MPI for another group",
        "minipar/comm/mpi.py",
        "self.mpi.Ibarrier) if self.checks else None",
        "self.mpi.Ibarrier) if call else None",
        ANOTHER_GROUP,
    ),
    Fault(
        "comm: a rank that frees a group leaves alone what it has begun in others",
        "minipar/comm/mpi.py",
        "self.underway.wait(self.side.Ibarrier())",
        "self.side.Barrier()",
        ANOTHER_GROUP,
    ),
    Fault(
        "comm: on threads a rank makes symmetric memory without the others",
        "minipar/comm/threads.py",
        "        self._barrier(call)  # it is collective here, too\n",
        "",
        "tests/comm/test_comm_threads.py -k 'symmetric_is_collective and 2'",
    ),
    Fault(
        "comm: a rank that cannot map memory to share leaves the others waiting",
        "minipar/comm/shared_memory.py",
        "wrong = f\"no memory to share on {socket.gethostname()}: {error}\"\n",
        "raise\n",
        f"{SYMMETRIC}::test_a_host_without_room_is_told_once_and_sums_all_the_same",
    ),
    Fault(
        "comm: a signature is overwritten before all have read it",
        "minipar/comm/signatures.py",
        "default=turn) + SLOTS\n",
        "default=turn) + SLOTS + 1\n",
        ANY_ORDER,
    ),
    Fault(
        "comm: the signature of an earlier call is taken for that of this one",
        "minipar/comm/signatures.py",
        "if found & LAST_TURN != word & LAST_TURN:",
        "if not found:",
        ANY_ORDER,
    ),
    Fault(
        "comm: only the last of the other ranks counts",
        "minipar/comm/signatures.py",
        "                equal = False\n",
        "                equal = False\n            else:\n                equal = True\n",
        ANY_ORDER,
    ),
    Fault(
        "comm: a blocking call goes on whatever the other rank asks for",
        "minipar/comm/signatures.py",
        "while words[other + slot] != word:",
        "while not words[other + slot]:",
        f"{SIGNATURES}::test_a_rank_that_is_waited_for_is_looked_at_again_and_again",
    ),
    Fault(
        "comm: a rank that waits leaves what it has begun alone",
        "minipar/comm/progress.py",
        "                    group.progress()\n",
        "                    assert group\n",
        f"{SIGNATURES}::test_what_is_queued_in_any_group_moves_on_while_a_rank_waits",
    ),
    Fault(
        "comm: a new group reads what a freed one has left",
        "minipar/comm/shared_memory.py",
        "            self.words[word] = 0\n",
        "            self.words[word] += 0\n",
        f"{SIGNATURES}::test_a_line_is_clean_when_it_is_taken_again",
    ),
    Fault(
        "bfloat16 is no float to send and recv",
        "minipar/comm/differentiable.py",
        "floating = is_floating(value.dtype)",
        'floating = value.dtype.kind == "f"',
        "tests/parallel/test_differentiable.py::test_send_and_recv_of_every_float_and_of_scalars",
    ),
    Fault(
        "a scalar becomes an array of one axis on its way to other ranks",
        "minipar/backend.py",
        "        return np.asarray(x)\n",
        "        return np.ascontiguousarray(x)\n",
        "tests/parallel/test_differentiable.py::test_send_and_recv_of_every_float_and_of_scalars",
    ),
]
