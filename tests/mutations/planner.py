"""Faults of the planner: formulas, memory, traffic, schedules, choices, and the network that is imitated."""

from tests.mutations.fault import Fault

PUBLISHED = "tests/planner/test_published.py"
RUNS = "tests/planner/test_against_runs.py"
TIMES = "tests/planner/test_step_time.py"
MACHINE = "tests/planner/test_machine.py"
PLAN = "tests/planner/test_plan.py"
SLOW = "tests/planner/test_slow.py"

FAULTS: list[Fault] = [
    Fault(
        "planner: ZeRO 1 shards gradients as well",
        "minipar/parallel/memory.py",
        '"gradients": 2, "optimizer": 1}',
        '"gradients": 1, "optimizer": 1}',
        f"{PUBLISHED}::test_zero_table",
    ),
    Fault(
        "planner: backward of attention counts one product too few",
        "minipar/planner/work.py",
        "input=(Matmul(t, d, t, h), Matmul(t, t, d, 3 * h)),",
        "input=(Matmul(t, d, t, h), Matmul(t, t, d, 2 * h)),",
        f"{PUBLISHED}::test_flops_of_all_products_are_the_papers_formula",
    ),
    Fault(
        "planner: tensor parallelism sums in forward only",
        "minipar/planner/op_time.py",
        "sums = ahead * (2 if layout.recompute else 1) + back",
        "sums = ahead",
        f"{TIMES}::test_sums_within_layers_are_part_of_every_pass",
    ),
    Fault(
        "planner: recomputation is free",
        "minipar/planner/op_time.py",
        "again = f + ahead if layout.recompute else 0.0",
        "again = 0.0",
        f"{PUBLISHED}::test_recomputation_costs_a_third_more",
    ),
    Fault(
        "planner: a group across nodes is as fast as one inside",
        "minipar/comm/levels.py",
        "    if nodes == 1:\n",
        "    if nodes >= 1:\n",
        f"{TIMES}::test_across_nodes_one_part_of_each_rank_goes_over_the_network",
    ),
    Fault(
        "planner: the sums of a block behind sequence parallelism are counted once",
        "minipar/planner/shapes.py",
        'sums = tuple(Message(op, n, when) for when in ("forward", "backward") for op in pair * 2)',
        'sums = tuple(Message(op, n, when) for when in ("forward", "backward") for op in pair)',
        f"{RUNS}::test_traffic_is_what_the_ledger_counts",
    ),
    Fault(
        "planner: a norm's input is not kept for backward",
        "minipar/planner/work.py",
        "moved=(2.0 * n, 3.0 * n, float(n)), saved=n + 2.0 * rows,",
        "moved=(2.0 * n, 3.0 * n, float(n)), saved=2.0 * rows,",
        f"{RUNS}::test_memory_is_what_a_run_holds",
    ),
    Fault(
        "planner: a stage's copy of a tied weight takes no memory",
        "minipar/planner/memory.py",
        "return own + sum(0 if lender_is_here else block.borrowed for block in borrows)",
        "return own",
        f"{RUNS}::test_pipeline_stages_hold_what_is_predicted",
    ),
    Fault(
        "planner: sums of gradients overtake each other",
        "minipar/planner/gradient_time.py",
        "        end = max(end, start) + duration\n",
        "        end = max(end, start + duration)\n",
        f"{TIMES}::test_sums_hide_behind_backward_in_order",
    ),
    Fault(
        "planner: filling an interleaved pipeline takes as long as a plain one",
        "minipar/planner/step_time.py",
        "        fill = mean / v\n",
        "        fill = mean\n",
        f"{TIMES}::test_simulated_and_closed_pipelines_agree_on_equal_stages",
    ),
    Fault(
        "planner: tiles are not rounded up",
        "minipar/planner/op_time.py",
        "whole = [-(-size // rate.tile) * rate.tile for size in (m, k, n)]",
        "whole = [m, k, n]",
        f"{TIMES}::test_sizes_are_rounded_up_to_tiles_and_tiles_have_to_be_started",
    ),
    Fault(
        "planner: layouts that do not fit are ranked all the same",
        "minipar/planner/plan.py",
        "            if held.total > p.limit:\n",
        "            if held.total > p.limit * 1e9:\n",
        f"{PLAN}::test_when_nothing_fits_the_smallest_change_is_named_and_helps",
    ),
    Fault(
        "planner: the command leaves the number of microbatches out",
        "minipar/planner/layout.py",
        'words += ["--schedule", self.schedule, "--microbatches", str(self.microbatches)]',
        'words += ["--schedule", self.schedule, "--microbatches", "1"]',
        f"{PLAN}::test_the_command_is_the_layout",
    ),
    Fault(
        "planner: only the first missing key of a machine file is named",
        "minipar/planner/machine.py",
        '        keys = ", ".join(missing)\n',
        "        keys = missing[0]\n",
        f"{MACHINE}::test_every_missing_key_is_named",
    ),
    Fault(
        "planner: a fit has no slope",
        "minipar/planner/calibrate.py",
        "nnls(np.stack([1 / seconds, n / seconds], axis=1), np.ones_like(seconds))",
        "nnls(np.stack([np.ones_like(n), 0 * n], axis=1), seconds)",
        f"{MACHINE}::test_the_fit_finds_alpha_and_beta_and_says_how_far_off_it_is",
    ),
    Fault(
        "planner: an imitated network delays collectives by nothing",
        "minipar/comm/slow.py",
        "        sleep_until(self.ends(call, largest, latest))\n",
        "        self.ends(call, largest, latest)\n",
        f"{SLOW}::test_nothing_arrives_before_its_time",
    ),
    Fault(
        "planner: collectives behind an imitated network share its wire without waiting",
        "minipar/comm/slow.py",
        "        self.busy_until = max(latest, self.busy_until) + ",
        "        self.busy_until = latest + ",
        f"{SLOW}::test_collectives_follow_each_other_and_start_with_the_last_rank",
    ),
    Fault(
        "planner: time stamps of an imitated network are counted as traffic",
        "minipar/comm/slow.py",
        "        stamps.ledger = Ledger()\n",
        "",
        f"{SLOW}::test_the_ledger_counts_what_the_program_asked_for",
    ),
    Fault(
        "planner: a pipeline stage hands back what it hands on",
        "minipar/planner/traffic.py",
        "sum(outputs[k - 1] for k in mine if k)",
        "sum(outputs[k] for k in mine if k < p * v - 1)",
        f"{RUNS}::test_traffic_is_what_the_ledger_counts",
    ),
    Fault(
        "planner: the sum of a tied weight's gradient costs nothing",
        "minipar/planner/traffic.py",
        "return borrowed if len(stages) > 1 and stage in (0, len(stages) - 1) else 0",
        "return 0",
        f"{RUNS}::test_traffic_is_what_the_ledger_counts",
    ),
    Fault(
        "planner: ZeRO 1 keeps a part of the gradients only",
        "minipar/parallel/memory.py",
        '"gradients": 2, "optimizer": 1}',
        '"gradients": 1, "optimizer": 1}',
        f"{RUNS}::test_memory_is_what_a_run_holds",
    ),
    Fault(
        "planner: a recomputed block's activations take no memory",
        "minipar/planner/memory.py",
        "held + block.replayed_bytes(precision) for held",
        "held for held",
        f"{RUNS}::test_memory_is_what_a_run_holds",
    ),
    Fault(
        "planner: all activations of mixed precision are in float16",
        "minipar/planner/layout.py",
        '"fp16": Precision("fp16", 4, 4, 8, 2, 4, 2, 2, 2, "float16"),',
        '"fp16": Precision("fp16", 4, 4, 8, 2, 2, 2, 2, 2, "float16"),',
        f"{RUNS}::test_memory_is_what_a_run_holds",
    ),
    Fault(
        "planner: the command leaves the vocabulary to the data",
        "minipar/commands/plan.py",
        'names = ("data", "vocab", "layers",',
        'names = ("data", "layers",',
        f"{PLAN}::test_the_command_trains_the_very_model",
    ),
    Fault(
        "planner: a machine file of any format is read",
        "minipar/planner/machine.py",
        'if found.get("format", FORMAT) != FORMAT:',
        "if False:",
        f"{MACHINE}::test_another_format_is_refused_by_name",
    ),
    Fault(
        "planner: tables of measured times may hold zeros",
        "minipar/planner/machine_checks.py",
        "            elif not (seconds > 0).all():\n",
        "            elif not (seconds >= 0).all():\n",
        f"{MACHINE}::test_measurements_that_cannot_be_are_named",
    ),
    Fault(
        "planner: links between nodes are as fast as those inside",
        "minipar/comm/levels.py",
        "(self.node if alike else self.cluster).message(n_bytes)",
        "self.node.message(n_bytes)",
        f"{SLOW} -k 'inside_a_node or near_each_other'",
    ),
    Fault(
        "pictures: what has no colour of its own is left out",
        "minipar/plot/curves.py",
        "    for number, (name, losses) in enumerate(curves.items()):\n",
        "    for number, (name, losses) in zip(range(7), curves.items()):\n",
        "tests/planner/test_pictures.py",
    ),
]
