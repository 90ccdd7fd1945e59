"""Faults of checkpoints: saving, checking, resharding and resuming."""

from tests.mutations.fault import Fault

RESHARD = "tests/checkpoint/test_reshard.py"
FAULTY = "tests/checkpoint/test_faults.py"

FAULTS: list[Fault] = [
    Fault(
        "checkpoint: a flipped data bit is loaded",
        "minipar/checkpoint/shard_file.py",
        'if digest.hexdigest() != facts["sha256"]:',
        'if len(digest.hexdigest()) != len(facts["sha256"]):',
        f"{FAULTY}::test_any_flipped_bit_is_refused_and_names_the_file",
    ),
    Fault(
        "checkpoint: files get their final name before they are written",
        "minipar/checkpoint/folder.py",
        'PARTIAL = ".partial"',
        'PARTIAL = ""',
        f"{FAULTY}::test_a_killed_save_is_cleaned_up_by_the_next_one"
        f" {FAULTY}::test_old_checkpoints_go_only_when_the_new_one_is_complete",
    ),
    Fault(
        "checkpoint: old ones are removed before the new one is complete",
        "minipar/checkpoint/write.py",
        "    on_first(lambda: folder.begin(directory, step))\n",
        "    on_first(lambda: folder.begin(directory, step))\n"
        "    on_first(lambda: folder.remove_old(directory, 1))\n",
        f"{FAULTY}::test_old_checkpoints_go_only_when_the_new_one_is_complete",
    ),
    Fault(
        "checkpoint: the groups of a fused weight are stored one place off",
        "minipar/parallel/region.py",
        "            at += length\n",
        "            at += length - 1\n",
        f"{RESHARD}::test_a_flat_range_of_a_slice_with_groups_lies_where_it_should",
    ),
    Fault(
        "checkpoint: a resumed run begins its metrics anew",
        "minipar/runs.py",
        "        lines.append(line)\n",
        "        lines = [line]\n",
        "tests/checkpoint/test_checkpoint_command.py::test_resume_continues_the_metrics_and_ends_bitwise_equal",
    ),
    Fault(
        "checkpoint: the pieces' new values do not reach the parameters",
        "minipar/checkpoint/read.py",
        "    strategy.reload()\n",
        "    assert strategy\n",
        f"{RESHARD}::test_resumed_on_the_same_layout_it_goes_on_bitwise",
    ),
    Fault(
        "checkpoint: the optimizer's step counts start anew",
        "minipar/checkpoint/read.py",
        "                mine[kind] = values[held.name]\n",
        "                mine[kind] = 0 * values[held.name]\n",
        f"{RESHARD}::test_resumed_on_the_same_layout_it_goes_on_bitwise",
    ),
    Fault(
        "checkpoint: the data position is forgotten",
        "minipar/resume.py",
        '    job.loader.load_state_dict(saved["loader"])\n',
        "    job.loader.rewind()\n",
        f"{RESHARD}::test_resumed_on_the_same_layout_it_goes_on_bitwise",
    ),
]
