"""Faults of what ends a job: monitors, signals, stopping, the flight recorder, the policy's saved state."""

from tests.mutations.fault import Fault

MONITOR = "tests/comm/test_comm_monitor.py"
FLIGHT = "tests/comm/test_comm_flight.py"
LINES = "tests/comm/test_comm_lines.py"
SIGNALS = "tests/faults/test_signals.py"
RANKS = "tests/faults/test_ranks.py"
POLICY = "tests/amp/test_policy_resume.py"

FAULTS: list[Fault] = [
    Fault(
        "faults: a killed rank's monitor says nothing",
        "minipar/comm/monitor.py",
        '[ "$said" = finished ] && exit\n',
        "exit\n",
        f"{MONITOR}::test_the_first_to_die_is_named_and_those_that_follow_are_not",
    ),
    Fault(
        "faults: every killed rank is named, not only the first",
        "minipar/comm/monitor.py",
        'mv "$1" "$1.$2" 2>/dev/null || { rm -rf "$1.taken"; exit; }\n',
        'cp -r "$1" "$1.$2"\n',
        f"{MONITOR}::test_the_first_to_die_is_named_and_those_that_follow_are_not",
    ),
    Fault(
        "faults: the place noted for a killed rank is its first, not its last",
        "minipar/comm/monitor.py",
        ".ljust(PLACE_BYTES - 1) + b\"\\n\", 0)",
        ".ljust(PLACE_BYTES - 1) + b\"\\n\", PLACE_BYTES * (\"step\" in rest))",
        f"{MONITOR}::test_the_first_to_die_is_named_and_those_that_follow_are_not",
    ),
    Fault(
        "faults: each rank stops when it was asked itself",
        "minipar/stopping.py",
        "mine if comm.size == 1 else",
        "mine if comm.size else",
        f"{SIGNALS}::test_ranks_agree_on_the_step_even_if_only_one_was_asked",
    ),
    Fault(
        "faults: SIGTERM's handler stays behind",
        "minipar/stopping.py",
        "            signal.signal(signal.SIGTERM, self._before)\n",
        "            assert self._before\n",
        f"{SIGNALS}::test_a_stop_request_gives_the_handler_back",
    ),
    Fault(
        "faults: Ctrl-C leaves ranks computing",
        "minipar/comm/launch.py",
        "            interrupt(threads, fabric)\n            raise\n",
        "            raise\n",
        f"{SIGNALS}::test_ctrl_c_ends_ranks_in_this_process_and_leaves_it_usable",
    ),
    Fault(
        "faults: Ctrl-C does not wake ranks that wait",
        "minipar/comm/launch.py",
        '            fabric.end(f"{type(error).__name__} in the thread that launched the ranks")\n',
        "",
        f"'{SIGNALS}::test_ctrl_c_ends_ranks_in_this_process_and_leaves_it_usable[waits]'",
    ),
    Fault(
        "faults: the rows are laid beside each other one off",
        "minipar/comm/flight.py",
        "rows = range(max(first, parted - BEFORE), ",
        "rows = range(max(first, parted + 1), ",
        f"{FLIGHT}::test_the_last_agreement_and_the_first_difference_are_shown",
    ),
    Fault(
        "faults: what a rank has forgotten counts as not called",
        "minipar/comm/flight.py",
        "first = max(number if text",
        "first = min(number if text",
        f"{FLIGHT}::test_what_one_rank_has_forgotten_is_no_difference",
    ),
    Fault(
        "faults: a group that has dropped out of a record counts as never called",
        "minipar/comm/flight.py",
        "return forgotten + record",
        "return record",
        f"{FLIGHT}::test_the_last_number_of_a_forgotten_group_is_kept",
    ),
    Fault(
        "faults: the last number of a forgotten group counts as remembered",
        "minipar/comm/flight.py",
        "number if text else number + 1 for",
        "number for",
        f"{FLIGHT}::test_what_has_dropped_out_of_a_record_is_not_taken_for_never_called",
    ),
    Fault(
        "faults: whoever answers at rank 0's port is taken for it",
        "minipar/comm/lines.py",
        "if secrets.compare_digest(answer, words[1].encode()):",
        "if answer:",
        f"{LINES}::test_a_stranger_at_rank_0s_port_is_not_taken_for_it",
    ),
    Fault(
        "faults: a rank waits for ever for a rank 0 that does not react",
        "minipar/comm/watchdog.py",
        "        if self._overdue is None or self._overdue[0] is not call:\n",
        "        if self._overdue is None or self._overdue[0] is call:\n",
        f"{LINES}::test_a_hang_ends_even_if_rank_0_does_not_react",
    ),
    Fault(
        "faults: a rank that has finished is named without its step",
        "minipar/comm/guard.py",
        'return f"has finished{where}{last}"',
        'return f"has finished{last}"',
        f"'{RANKS}::test_a_fault_ends_the_job_and_is_named[threads-exits_well-0]'",
    ),
    Fault(
        "faults: a killed launcher's job goes on",
        "minipar/comm/launcher.py",
        '[ "$said" = over ] && exit\n',
        "exit\n",
        f"'{SIGNALS}::test_ranks_that_react_to_nothing_end_with_their_launcher'",
    ),
    Fault(
        "faults: a closed terminal leaves the job behind",
        "minipar/comm/launcher.py",
        "    signal.SIGHUP: signal.SIGTERM,\n",
        "    signal.SIGHUP: signal.SIGCONT,\n",
        f"'{SIGNALS}::test_sigterm_finishes_the_step_saves_and_exits_well[terminal closed]'",
    ),
    Fault(
        "faults: a mismatch goes without its record",
        "minipar/comm/threads.py",
        "step.error = fabric.with_parting(MismatchError(mismatch(calls)))",
        "step.error = MismatchError(mismatch(calls))",
        f"{FLIGHT}::test_mismatches_hangs_and_aborts_carry_it_as_a_note",
    ),
    Fault(
        "faults: a policy's counts are loaded on every rank",
        "minipar/amp/policy.py",
        "alone = self.comm is None or self.comm.rank == 0",
        "alone = self.comm is None or self.comm.rank >= 0",
        f"{POLICY}::test_a_resumed_run_decides_as_the_uncut_one",
    ),
    Fault(
        "faults: autocast is not told what a loaded policy has decided",
        "minipar/amp/mixed.py",
        "        self._autocast.float32_parameters, met = self.policy.load_state_dict(state)\n",
        "        _, met = self.policy.load_state_dict(state)\n",
        f"{POLICY}::test_a_resumed_run_decides_as_the_uncut_one",
    ),
]
