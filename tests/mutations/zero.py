"""Faults of ZeRO: flat ranges, gathering on use, summed gradients, memory."""

from tests.mutations.fault import Fault

EQUAL = "tests/parallel/test_zero.py"
MEMORY = "tests/parallel/test_zero_memory.py"

FAULTS: list[Fault] = [
    Fault(
        "a shard's initialisation is off by one element",
        "minipar/parallel/zero/flat_shards.py",
        "_draw(p, seed, low - start, flat",
        "_draw(p, seed, low - start + 1, flat",
        f"{EQUAL}::test_initialisation_is_bitwise_the_serial_one_and_sends_nothing",
    ),
    Fault(
        "the last element of a rank's range belongs to nobody",
        "minipar/parallel/zero/flat_shards.py",
        "a, b = max(start, low), min(start + size, high)",
        "a, b = max(start, low), min(start + size, high - 1)",
        f"{EQUAL}::test_each_element_belongs_to_exactly_one_rank",
    ),
    Fault(
        "a microbatch's sum replaces that of the one before",
        "minipar/parallel/zero/flat_shards.py",
        "piece.tensor.grad += chunk[piece.place]",
        "piece.tensor.grad = chunk[piece.place]",
        f"{EQUAL}::test_optimizers_accumulation_and_clipping[sgd-2]",
    ),
    Fault(
        "a unit stays gathered after forward",
        "minipar/parallel/zero/gather.py",
        "if not is_replaying():  # else its backward comes next",
        "if is_replaying():",
        f"{EQUAL}::test_at_most_two_units_and_the_shared_one_are_there_at_once",
    ),
    Fault(
        "a recomputed unit is freed between its replay and its backward",
        "minipar/parallel/zero/gather.py",
        "if not is_replaying():  # else its backward comes next",
        "if True:",
        f"{EQUAL}::test_recomputed_units_are_gathered_as_often_as_others[3-True]",
    ),
    Fault(
        "a rank does not take part in gathering what it has skipped",
        "minipar/parallel/zero/gather.py",
        "while self._under_way or self._issued < len(self._order):",
        "while self._under_way:",
        f"{EQUAL}::test_units_and_parameters_that_some_ranks_do_not_use[3-False]",
    ),
    Fault(
        "layer norm saves its weight's array, and with it the whole gathered unit",
        "minipar/ops/normalisation.py",
        "    return y, lambda g: k.layer_norm_backward(g, x, mean, rstd, _values(weight))",
        "    w = _values(weight)\n    return y, lambda g: k.layer_norm_backward(g, x, mean, rstd, w)",
        f"{EQUAL}::test_nothing_keeps_a_freed_unit_alive",
    ),
    Fault(
        "each rank clips by the norm of its own shard",
        "minipar/parallel/zero/zero.py",
        "shard_comm=self.comm,",
        "shard_comm=None,",
        f"{EQUAL}::test_optimizers_accumulation_and_clipping[sgd-1]",
    ),
    Fault(
        "a parameter counts as unused if one rank did not use it",
        "minipar/parallel/zero/scatter_gradients.py",
        'comm.all_reduce(flags, op="max")',
        'comm.all_reduce(flags, op="min")',
        f"{EQUAL}::test_units_and_parameters_that_some_ranks_do_not_use[2-True]",
    ),
    Fault(
        "a gradient that was sent stays with its parameter, and is sent again with the next microbatch",
        "minipar/parallel/zero/flat_shards.py",
        "        self.arrived.add(i)\n        p.grad = None",
        "        self.arrived.add(i)",
        f"{EQUAL}::test_optimizers_accumulation_and_clipping[sgd-2]",
    ),
    Fault(
        "whole gradients wait for the end of backward",
        "minipar/parallel/zero/scatter_gradients.py",
        "        unit.take_gradient(p)\n        if unit is self._shared:",
        "        unit.take_gradient(p)\n        if True:",
        f"{MEMORY}::test_backward_holds_one_unit_of_gradients_that_is_not_on_its_way",
    ),
    Fault(
        "a step leaves the parameters' versions as they were",
        "minipar/parallel/zero/zero.py",
        "            p.version += 1",
        "            p.version += 0",
        f"{EQUAL}::test_gathering_changes_no_version_and_a_step_does",
    ),
    Fault(
        "the new parameters are not gathered after the step",
        "minipar/parallel/zero/zero.py",
        "                unit.attach(work.wait())",
        "                work.wait()",
        f"{EQUAL}::test_equals_serial[uneven-2-2]",
    ),
    Fault(
        "the next unit's gather is left alone while one computes, so with checks on its data is not begun",
        "minipar/parallel/zero/gather.py",
        "        for work in self._under_way.values():\n            work.done()",
        "        pass",
        f"{EQUAL}::test_equals_serial_on_mpi",
    ),
    Fault(
        "a norm under sequence parallelism saves its weight's array, and with it the whole gathered unit",
        "minipar/comm/differentiable.py",
        "return Lent(x, copy) if x.is_weight else copy",
        "return copy",
        f"{EQUAL}::test_nothing_keeps_a_freed_unit_alive",
    ),
    Fault(
        "group norm of an image region saves its weight's array",
        "minipar/parallel/tensor_parallel/convolution.py",
        "    def vjp(g: Array) -> Any:\n        dy = (g * channels(weight.data))",
        "    scale = channels(weight.data)\n\n    def vjp(g: Array) -> Any:\n        dy = (g * scale)",
        f"{EQUAL}::test_nothing_keeps_a_freed_unit_alive",
    ),
    Fault(
        "the norm of a cut model leaves out the other tensor-parallel ranks",
        "minipar/parallel/zero/zero.py",
        "tp=next(iter(axes.values()), None)",
        "tp=None",
        f"{EQUAL}::test_over_a_tensor_parallel_model",
    ),
    Fault(
        "gradients in float16 are summed in float16",
        "minipar/parallel/zero/flat_shards.py",
        "zeros(n, work_dtype(self.own.dtype))",
        "zeros(n, self.own.dtype)",
        f"{EQUAL}::test_gradients_in_float16_are_summed_in_float32",
    ),
]
