"""Faults of partition policies, layer parallelism and training with owned pieces."""

from tests.mutations.fault import Fault

PARTITION = "tests/parallel/test_partition.py"
LAYER = "tests/parallel/test_layer_parallel.py"
OWNER = "tests/parallel/test_owner_sharding.py"

FAULTS: list[Fault] = [
    Fault(
        "a shard's boundaries are off by one",
        "minipar/parallel/partition/assignment.py",
        "return array.reshape(-1)[self.start : self.stop]",
        "return array.reshape(-1)[max(self.start - 1, 0) : self.stop - (self.start > 0)]",
        f"{PARTITION}::test_every_policy_covers_each_element_exactly_once",
    ),
    Fault(
        "an element held twice passes as covered",
        "minipar/parallel/partition/assignment.py",
        "        if start != at:\n",
        "        if start > at:\n",
        f"{PARTITION}::test_no_assignment_with_a_hole_or_an_overlap",
    ),
    Fault(
        "the stage split takes the last split it looks at instead of the best",
        "minipar/parallel/partition/stage_split.py",
        "if slowest < best[k + 1][stop] and",
        "if not math.isinf(slowest) and",
        f"{PARTITION}::test_stage_split_equals_brute_force_up_to_twelve_blocks",
    ),
    Fault(
        "the stage split ignores the devices' speeds",
        "minipar/parallel/partition/stage_split.py",
        "(before[stop] - before[start]) / speed)",
        "before[stop] - before[start])",
        f"{PARTITION}::test_a_slow_device_gets_less",
    ),
    Fault(
        "the copy of a tied weight takes no memory",
        "minipar/parallel/partition/policies.py",
        "first = next((b for b in item.blocks if b >= start), None)",
        "first = item.blocks[0] if item.blocks[0] >= start else None",
        f"{PARTITION}::test_memory_limits_hold_and_a_tied_copy_counts",
    ),
    Fault(
        "bytes places the smallest parameters first",
        "minipar/parallel/partition/policies.py",
        "key=lambda item: -item.bytes)",
        "key=lambda item: item.bytes)",
        f"{PARTITION}::test_bytes_places_the_largest_first",
    ),
    Fault(
        "a tied weight is counted twice in the norm",
        "minipar/parallel/partition/layer_parallel.py",
        "optim.squared_norm(p.grad for p in self._owned)",
        "optim.squared_norm(p.grad for p in self._held.values())",
        f"{LAYER}::test_other_optimizers_and_clipping_equal_serial",
    ),
    Fault(
        "each copy of a tied weight steps with its own gradient alone",
        "minipar/parallel/partition/layer_parallel.py",
        "p.grad = group.all_reduce(g)",
        "p.grad = g",
        f"{LAYER}::test_copies_of_a_tied_weight_stay_bitwise_equal_and_only_the_ends_hold_them",
    ),
    Fault(
        "weights of other ranks' blocks are kept",
        "minipar/parallel/partition/layer_parallel.py",
        "                del p.data  # unmaterialised again: its memory is another rank's business\n",
        "                p.grad = None\n",
        f"{LAYER}::test_weights_of_other_ranks_are_freed_or_never_filled",
    ),
    Fault(
        "ranks with unequal assignments go on",
        "minipar/parallel/partition/assignment.py",
        "if len(set(comm.all_gather_object(digest))) > 1:",
        "if not comm.all_gather_object(digest):",
        f"{LAYER}::test_an_assignment_that_differs_between_ranks_is_refused",
    ),
    Fault(
        "the owner steps with its own rank's gradient alone",
        "minipar/parallel/partition/owner_sharding.py",
        "mine = self.comm.reduce_scatter(flat, self.counts)",
        "self.comm.reduce_scatter(flat, self.counts)\n"
        "        start = sum(self.counts[: self.comm.rank])\n"
        "        mine = flat[start : start + self.counts[self.comm.rank]]",
        f"{OWNER}::test_a_parameter_that_no_rank_uses_is_not_stepped_and_one_that_some_use_is",
    ),
    Fault(
        "a parameter that no rank uses is stepped with zeros",
        "minipar/parallel/partition/owner_sharding.py",
        "reshape(t.shape) if flag else None",
        "reshape(t.shape)",
        f"{OWNER}::test_a_parameter_that_no_rank_uses_is_not_stepped_and_one_that_some_use_is",
    ),
    Fault(
        "owners keep their new values to themselves",
        "minipar/parallel/partition/owner_sharding.py",
        "        optimizer.step()\n        self._broadcast()\n",
        "        optimizer.step()\n",
        f"{OWNER}::test_embedding_by_vocabulary_and_stages_work_as_well",
    ),
    Fault(
        "batch norm sees this rank's share only",
        "minipar/parallel/partition/owner_sharding.py",
        "module.reduce = comm.all_reduce  # its statistics are the whole batch's",
        "comm.barrier()",
        f"{OWNER}::test_batch_norm_sees_the_whole_batch",
    ),
]
