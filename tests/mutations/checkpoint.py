"""Faults of checkpoints: saving, checking, resharding and resuming."""

from tests.mutations.fault import Fault

RESHARD = "tests/checkpoint/test_reshard.py"
FAULTY = "tests/checkpoint/test_faults.py"
COMMAND = "tests/checkpoint/test_checkpoint_command.py"

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
        "    lock = on_first(lambda: folder.begin(directory, step))\n",
        "    lock = on_first(lambda: folder.begin(directory, step))\n"
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
        f"{COMMAND}::test_resume_continues_the_metrics_and_ends_bitwise_equal",
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
    Fault(
        "checkpoint: a resumed run's loss scale starts anew",
        "minipar/resume.py",
        '    job.precision.scaler.load_state_dict(saved["scaler"])\n',
        "",
        f"{RESHARD}::test_through_many_layouts_and_back_bitwise -k fp16",
    ),
    Fault(
        "checkpoint: what another job is saving is taken for a killed save",
        "minipar/checkpoint/folder.py",
        "fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)",
        "fcntl.flock(lock, fcntl.LOCK_UN)",
        f"{FAULTY}::test_a_save_of_another_job_that_is_alive_is_left_alone",
    ),
    Fault(
        "checkpoint: a run that goes on from one checkpoint saves into it",
        "minipar/resume.py",
        "return save_job(job, self.place, self.keep)",
        "return save_job(job, self.directory, self.keep)",
        f"{COMMAND}::test_going_on_from_one_checkpoint_saves_beside_it",
    ),
    Fault(
        "checkpoint: a file that is written again is spoilt if that fails",
        "minipar/files.py",
        'partial = target.with_name(f"{target.stem}.partial{target.suffix}")',
        "partial = target",
        f"{COMMAND}::test_an_export_that_does_not_fit_is_one_line_and_leaves_what_was_there",
    ),
    Fault(
        "checkpoint: a run whose metrics cannot be written goes on without them",
        "minipar/runs.py",
        "            raise self.failure\n",
        "            return\n",
        f"{COMMAND}::test_a_run_whose_metrics_do_not_fit_saves_before_it_ends",
    ),
]
