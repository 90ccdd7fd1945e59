"""Faults of tracing: spans, the traced communicator, the file, the report."""

from tests.mutations.fault import Fault

REPORT = "tests/trace/test_trace_report.py"
TRACED = "tests/trace/test_traced_communicator.py"

FAULTS: list[Fault] = [
    Fault(
        "trace: every rank-thread records into one trace",
        "minipar/trace.py",
        "    token = _current.set(trace)\n    try:\n        yield\n    finally:\n        _current.reset(token)",
        "    global _current\n    _current = type('', (), {'get': lambda self: trace})()\n    yield",
        "tests/trace/test_trace.py",
    ),
    Fault(
        "trace: the batch is timed while it is used",
        "minipar/trace.py",
        "                return\n        yield item",
        "                return\n            yield item",
        "tests/trace/test_trace.py::test_timed_measures_the_making_of_each_item_only",
    ),
    Fault(
        "trace: communication within work counts as work",
        "minipar/traces/report.py",
        "        return s, max(0.0, clipped(s) - inner)",
        "        return s, clipped(s)",
        REPORT,
    ),
    Fault(
        "trace: waiting for a slow rank counts as transfer",
        "minipar/traces/report.py",
        "                waited = min(max(last - s.start, 0.0), own)",
        "                waited = 0.0",
        f"{REPORT}::test_waiting_for_the_last_rank_is_not_transfer",
    ),
    Fault(
        "trace: collectives of different groups are taken for one",
        "minipar/traces/report.py",
        '                last = reached.get((s.facts["group"], s.facts["number"]), s.start)',
        '                last = max((t for (_, n), t in reached.items() if n == s.facts["number"]), default=s.start)',
        f"{REPORT}::test_a_collective_of_another_group_or_number_is_another_one",
    ),
    Fault(
        "trace: communication that was waited for counts as hidden",
        "minipar/traces/report.py",
        "    times.hidden = length_of([*flights, *exposed]) - length_of(exposed)",
        "    times.hidden = length_of(flights)",
        f"{REPORT}::test_hidden_is_what_no_wait_covers",
    ),
    Fault(
        "trace: the bubble counts from the start of the step",
        "minipar/traces/report.py",
        "            whole = max(b for _, b in every) - min(a for a, _ in every)",
        "            whole = end - start",
        f"{REPORT}::test_the_bubble_of_a_simulated_schedule_is_the_formula_s",
    ),
    Fault(
        "trace: clocks are corrected the wrong way",
        "minipar/traces/file.py",
        "            return t - ahead - drift * (t - begin)",
        "            return t + ahead - drift * (t - begin)",
        "tests/trace/test_trace_file.py::test_all_ranks_are_put_on_rank_0_s_clock",
    ),
    Fault(
        "trace: the answer of the ping-pong is taken as of its arrival",
        "minipar/comm/traced.py",
        "theirs - (start + end) / 2))",
        "theirs - end))",
        f"{TRACED}::test_offsets_of_clocks_are_found",
    ),
    Fault(
        "trace: groups split off are not traced",
        "minipar/comm/traced.py",
        "        return part if alone else TracedCommunicator(part, self.trace)",
        "        return part",
        TRACED,
    ),
    Fault(
        "trace: a flight ends only where it is waited for",
        "minipar/comm/traced.py",
        "        if done:\n            self._land(end)\n",
        "",
        f"{TRACED}::test_a_flight_ends_where_done_first_says_so",
    ),
    Fault(
        "trace: what a look at an operation did for it counts as the rank's own work",
        "minipar/comm/traced.py",
        "if end - start > HELP and",
        "if False and",
        f"{TRACED}::test_a_flight_ends_where_done_first_says_so",
    ),
    Fault(
        "trace: a look at a receive counts as a receive of its own",
        "minipar/comm/traced.py",
        " and self._start is not None:  # what",
        ":  # what",
        f"{TRACED}::test_a_look_at_a_receive_leaves_nothing",
    ),
    Fault(
        "trace: recording never stops",
        "minipar/traces/record.py",
        "        if self.recorded == self.steps:",
        "        if False:",
        "tests/trace/test_train_trace.py::test_only_the_first_steps_are_recorded",
    ),
    Fault(
        "trace: pipeline actions leave no spans",
        "minipar/parallel/pipeline/executor.py",
        '        add_span(ACTION, f"{action.kind}{action.microbatch}", start, end, stage=here)\n',
        "",
        "tests/trace/test_train_trace.py::test_actions_of_a_pipeline_are_those_of_its_schedule",
    ),
    Fault(
        "trace: one host's cores are held against all hosts' ranks",
        "minipar/traces/advice.py",
        "    for host, mine in zip(facts.get(\"host\", ()), facts.get(\"cores\", ())):\n",
        "    for host, mine in ((facts[\"host\"][0], cores) for cores in facts.get(\"cores\", ())):\n",
        "tests/trace/test_trace_report.py -k host_by_host",
    ),
    Fault(
        "trace: every rank's bubble is the mean",
        "minipar/traces/report.py",
        "times.bubble = statistics.fmean(its)",
        "times.bubble = statistics.fmean(itertools.chain(*bubbles))",
        "tests/trace/test_trace_report.py -k 'simulated_schedule or tables_have'",
    ),
]
