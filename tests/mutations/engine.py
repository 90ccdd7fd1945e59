"""Faults of the engine: tape, primitives, modules, optimizers, models, recomputation."""

from tests.mutations.fault import Fault

FAULTS: list[Fault] = [
    Fault(
        "a broadcast gradient is not summed back",
        "minipar/ops/elementwise.py",
        "return g.sum(axis=stretched, keepdims=True) if stretched else g",
        "return g",
        "tests/test_ops_elementwise.py::test_unbroadcast_sums_what_was_repeated",
    ),
    Fault(
        "the gradient of a mean is that of a sum",
        "minipar/ops/reduce.py",
        "xp.broadcast_to(_spread(g / n, len(shape), axis, keepdims), shape)",
        "xp.broadcast_to(_spread(g, len(shape), axis, keepdims), shape)",
        "tests/test_ops_reduce.py::test_gradient[mean-0]",
    ),
    Fault(
        "softmax's backward sums over the wrong axis",
        "minipar/ops/normalisation.py",
        "(k.softmax_backward(g, y, axis), None)",
        "(k.softmax_backward(g, y, 0), None)",
        "tests/test_ops_nn.py::test_gradient[softmax-0]",
    ),
    Fault(
        "repeated indices overwrite instead of adding up",
        "minipar/ops/shape.py",
        "xp.add.at(dx, index, g)  # an index may repeat, so add; do not assign",
        "dx[index] = g",
        "tests/test_ops_shape.py::test_repeated_indices_add_up",
    ),
    Fault(
        "a gradient that others see is added to in place",
        "minipar/tape.py",
        "        if self.owned >> index & 1:\n            present += g",
        "        if True:\n            present += g",
        "tests/test_tape.py::test_a_gradient_that_others_see_is_never_added_to_in_place",
    ),
    Fault(
        "saved activations live until the end of backward",
        "minipar/tape.py",
        "node.vjp, node.edges, node.grads = None, (), None",
        "node.edges, node.grads = (), None",
        "tests/test_tape.py::test_saved_activations_are_freed_as_backward_goes",
    ),
    Fault(
        "oldest operations run first",
        "minipar/tape.py",
        "heapq.heappush(self.heap, (-node.order, node))",
        "heapq.heappush(self.heap, (node.order, node))",
        "tests/test_tape.py::test_newest_operations_run_first",
    ),
    Fault(
        "the gradient of a stage's input is put off like a weight's",
        "minipar/tape.py",
        "type(edge[0]) is Leaf and edge[0].tensor.is_weight:",
        "type(edge[0]) is Leaf:",
        "tests/test_tape_hooks.py::test_deferred_weight_gradients_equal_ordinary_ones",
    ),
    Fault(
        "hooks fire before the last deferred thunk",
        "minipar/tape.py",
        "            if not leaf.deferred:\n                leaf.finish()",
        "            leaf.finish()",
        "tests/test_tape_hooks.py::test_hooks_fire_after_the_last_deferred_thunk_of_several_microbatches",
    ),
    Fault(
        "a weight changed between forward and backward goes unnoticed",
        "minipar/tape.py",
        "        if self.tensor.version != self.version:\n            raise RuntimeError(\n"
        '                f"backward: a leaf',
        '        if False:\n            raise RuntimeError(\n                f"backward: a leaf',
        "tests/test_tensor.py -k changed_between",
    ),
    Fault(
        "recomputation draws other dropout masks",
        "minipar/recompute.py",
        "output, again = context.copy().run(replay)",
        "output, again = replay()",
        "tests/test_recompute.py::test_bitwise_equal_with_dropout",
    ),
    Fault(
        "a recomputed forward counts twice in running statistics",
        "minipar/nn/layers.py",
        "if not is_replaying():",
        "if True:",
        "tests/test_recompute.py::test_running_statistics_count_each_batch_once",
    ),
    Fault(
        "dropout's mask ignores where the samples lie in the global batch",
        "minipar/nn/layers.py",
        "return ops.dropout(x, self.p, key, now.first_sample * math.prod(x.shape[1:]))",
        "return ops.dropout(x, self.p, key)",
        "tests/test_models.py::test_dropout_of_a_split_batch_is_the_whole_batch_s",
    ),
    Fault(
        "a slice of an initialisation starts at the wrong element",
        "minipar/nn/init.py",
        "first = bounds[cut][0] * strides[cut] if shape else 0",
        "first = bounds[cut][0] if shape else 0",
        "tests/test_nn.py::test_a_slice_is_the_serial_initialisation_sliced_bitwise",
    ),
    Fault(
        "the clipped norm adds norms instead of squares",
        "minipar/optim.py",
        "return sum(map(float, squares), 0.0)",
        "return sum(float(s) ** 0.5 for s in squares)",
        "tests/test_optim.py::test_clipping",
    ),
    Fault(
        "GPT-2's weights are loaded as they lie",
        "minipar/models/gpt2_weights.py",
        "return value.T if name.endswith(TRANSPOSED) else value",
        "return value",
        "tests/test_models.py::test_gpt2_layout_round_trip",
    ),
]
