"""Faults of data parallelism, the training job, its data and the command."""

from tests.mutations.fault import Fault

REPLICAS, TRAFFIC = "tests/parallel/test_data_parallel.py", "tests/parallel/test_communication.py"
JOB = "tests/parallel/test_training_job.py"
VERIFY, ERRORS = "tests/commands/test_verify_and_run.py", "tests/commands/test_bad_input.py"
EQUAL = f"{REPLICAS}::test_equals_the_full_batch_and_replicas_are_bitwise_equal"
WRAPPER, BUCKETS = "minipar/parallel/data_parallel.py", "minipar/parallel/buckets.py"

FAULTS: list[Fault] = [
    Fault(
        "a bucket is sent but not reduced",
        WRAPPER,
        "self.comm.all_reduce_async_(bucket.flat)",
        "self.comm.all_reduce_async_(bucket.flat.copy())",
        f"{EQUAL}[mlp-2]",
    ),
    Fault(
        "gradients are averaged instead of summed",
        WRAPPER,
        "            work.wait()\n            bucket.hand_out()",
        "            work.wait()\n            bucket.flat /= self.comm.size\n            bucket.hand_out()",
        f"{EQUAL}[mlp-2]",
    ),
    Fault(
        "a rank divides by its own number of targets",
        "minipar/training.py",
        "if self.strategy.own_mean else batch.count",
        "if self.strategy.own_mean else max(batch.local_count, 1)",
        f"{VERIFY}::test_verify_holds[options0]",
    ),
    Fault(
        "flags of used parameters are not looked at",
        BUCKETS,
        "if self.all_used_here else self.used.tolist()",
        "if True else self.used.tolist()",
        f"{TRAFFIC}::test_a_parameter_that_is_unused_on",
    ),
    Fault(
        "an unused parameter's place keeps what was there",
        BUCKETS,
        "                view[...] = 0\n",
        "                pass\n",
        f"{TRAFFIC}::test_a_parameter_that_is_unused_on",
    ),
    Fault(
        "a bucket leaves before its last gradient",
        WRAPPER,
        "self._missing[len(self._sent)] == 0:",
        "self._missing[len(self._sent)] <= 1:",
        f"{EQUAL}[mlp-2]",
    ),
    Fault(
        "buckets leave in the order in which they fill up",
        WRAPPER,
        "        while len(self._sent) < len(self.buckets) and self._missing[len(self._sent)] == 0:\n",
        "        at = len(self._sent)\n"
        "        waiting = sorted(self.buckets[at:], key=lambda b: any(p.grad is None for p in b.params))\n"
        "        self.buckets[at:] = waiting\n"
        "        while len(self._sent) < len(self.buckets) and all(\n"
        "            p.grad is not None for p in self.buckets[len(self._sent)].params\n"
        "        ):\n",
        f"{TRAFFIC}::test_buckets_leave_in_one_order_on_every_rank",
    ),
    Fault(
        "buckets are in the order of the forward pass",
        BUCKETS,
        "for p in reversed(params):",
        "for p in params:",
        f"{REPLICAS}::test_buckets_hold_every_parameter_once_in_reverse_order",
    ),
    Fault(
        "overlap waits for the end of backward",
        WRAPPER,
        "        if self.overlap:\n            self._send_full_buckets()",
        "        if False:\n            self._send_full_buckets()",
        f"{TRAFFIC}::test_the_first_bucket_is_sent_before_backward_has_finished",
    ),
    Fault(
        "the master does not send its parameters",
        WRAPPER,
        "        for bucket in self.buckets:\n            self._broadcast(bucket)\n\n    def detach",
        "\n    def detach",
        f"{REPLICAS}::test_reduce_to_the_master_and_broadcast_equals_all_reduce",
    ),
    Fault(
        "ranks keep their own initial values",
        WRAPPER,
        "        self._share_values()\n        for",
        "        for",
        f"{EQUAL}[mlp-2]",
    ),
    Fault(
        "frozen parameters are not shared at the start",
        WRAPPER,
        "[*frozen, *(buffer",
        "[*(buffer",
        f"{REPLICAS}::test_the_master_s_values_are_everywhere_at_the_start_frozen_ones_included",
    ),
    Fault(
        "batch norm sees the rank's own samples only",
        "minipar/parallel/batch_norm.py",
        "norm.reduce = group.all_reduce",
        "pass",
        f"{EQUAL}[convnet-batch-norm-2]",
    ),
    Fault(
        "no_sync is ignored",
        WRAPPER,
        "self._synchronising, False",
        "self._synchronising, True",
        f"{TRAFFIC}::test_microbatches_are_synchronised_once",
    ),
    Fault(
        "ranks clip before they sum",
        WRAPPER,
        "        bucket.mark_used()\n        self._sent",
        "        optim.clip_grad_norm_(bucket.params, 0.01)\n        bucket.mark_used()\n        self._sent",
        f"{EQUAL}[mlp-2]",
    ),
    Fault(
        "a gradient may be summed twice",
        BUCKETS,
        "            if p.grad is total:",
        "            if False:",
        f"{REPLICAS}::test_a_gradient_that_would_be_summed_twice_is_refused",
    ),
    Fault(
        "detach leaves the batch statistics shared",
        WRAPPER,
        "            norm.reduce = alone",
        "            pass",
        f"{REPLICAS}::test_detach_leaves_a_plain_serial_model",
    ),
    Fault(
        "local SGD gives every rank the same weight",
        "minipar/parallel/local_sgd.py",
        "share = self._seen / total if total else 1 / self.comm.size",
        "share = 1 / self.comm.size",
        "tests/parallel/test_local_sgd.py::test_averaging_after_each_sgd_step_is_averaging_gradients",
    ),
    Fault(
        "local SGD is judged between averages",
        "minipar/parallel/local_sgd.py",
        "        if self._since:",
        "        if False:",
        "tests/parallel/test_local_sgd.py::test_what_is_judged_and_saved_is_one_model_between_averages_too",
    ),
    Fault(
        "microbatches forget their place in the batch",
        "minipar/data/batch.py",
        "offset=self.offset + cut.start)",
        "offset=self.offset)",
        "tests/data/test_data_loader.py::test_split_into_microbatches",
    ),
    Fault(
        "the last batch of an epoch is dropped",
        "minipar/data/loader.py",
        "else -(-self.length // self.batch)",
        "else self.length // self.batch",
        f"{JOB}::test_the_data_of_a_step_does_not_depend_on_the_number_of_ranks",
    ),
    Fault(
        "each rank shuffles for itself",
        "minipar/data/loader.py",
        "return np.random.default_rng([self.seed, epoch]).permutation",
        "return np.random.default_rng().permutation",
        f"{JOB}::test_the_data_of_a_step_does_not_depend_on_the_number_of_ranks",
    ),
    Fault(
        "evaluation reports the rank's own share",
        "minipar/training.py",
        "self.strategy.batch_ranks.all_reduce(sums).tolist()",
        "sums.tolist()",
        f"{JOB}::test_sharded_evaluation_and_metrics_are_the_serial_ones",
    ),
    Fault(
        "verify holds though nothing was compared",
        "minipar/verification.py",
        "all(w.compared and w.error <= self.tolerance",
        "all(w.error <= self.tolerance",
        f"{VERIFY}::test_a_report_holds_only_if_something_was_compared",
    ),
    Fault(
        "an error of one rank leaves the others waiting",
        "minipar/agreement.py",
        "        mine = error\n",
        "        mine = error\n        if comm.rank != 0:\n            raise\n",
        f"{ERRORS}::test_an_error_of_one_rank_is_told_too",
    ),
    Fault(
        "every rank prints the error that all have",
        "minipar/commands/program.py",
        "        first = world().rank == 0\n",
        "        first = world().rank >= 0\n",
        f"{ERRORS}::test_the_ranks_of_an_mpi_job_tell_it_once",
    ),
    Fault(
        "the ledger takes groups of one name for one group",
        "minipar/comm/ledger.py",
        "key = (operation, group, ranks)",
        "key = (operation, group, 0)",
        "tests/comm/test_comm_threads.py -k two_grids",
    ),
]
