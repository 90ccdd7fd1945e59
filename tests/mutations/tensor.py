"""Faults of what cuts a layer: differentiable collectives, placement, tensor parallelism, halos, norms."""

from tests.mutations.fault import Fault

DIFFERENTIABLE = "minipar/comm/differentiable.py"
PLACEMENT = "minipar/parallel/placement.py"
STYLES = "minipar/parallel/tensor_parallel/styles.py"
PARALLELIZE = "minipar/parallel/tensor_parallel/parallelize.py"
VOCABULARY = "minipar/parallel/tensor_parallel/vocabulary.py"
CONVOLUTION = "minipar/parallel/tensor_parallel/convolution.py"
NORMS = "minipar/parallel/norms.py"
TESTS = "tests/parallel"
SERIAL = f"{TESTS}/test_tensor_parallel.py::test_equals_serial"
MASKS = f"{TESTS}/test_tensor_parallel.py::test_dropout_masks_are_the_serial_one_s_parts"

FAULTS: list[Fault] = [
    Fault(
        "no all-reduce in a column layer's backward",
        DIFFERENTIABLE,
        "return x, lambda g: (lambda: summed(comm, g), None)",
        "return x, lambda g: (g, None)",
        f"{TESTS}/test_tensor_parallel.py::test_linear_layers_of_7_by_15_weights",
    ),
    Fault(
        "the gradient of a sum is summed again",
        DIFFERENTIABLE,
        "return summed(comm, x), lambda g: (g, None)",
        "return summed(comm, x), lambda g: (lambda: summed(comm, g), None)",
        f"{TESTS}/test_differentiable.py::test_backward_is_the_transpose -k reduce_from",
    ),
    Fault(
        "an element given to several ranks keeps the last one's gradient",
        DIFFERENTIABLE,
        "dx[start:stop] += part",
        "dx[start:stop] = part",
        f"{TESTS}/test_differentiable.py::test_backward_is_the_transpose -k exchange",
    ),
    Fault(
        "the gradient of a sent tensor that needs none is left waiting",
        DIFFERENTIABLE,
        "        x = x.detach().requires_grad_()\n    return record",
        "        pass\n    return record",
        f"{TESTS}/test_differentiable.py::test_send_of_what_wants_no_gradient_still_takes_it_back",
    ),
    Fault(
        "a row layer's bias is added on each rank",
        STYLES,
        "            part = ops.linear(x, module.weight, unrounded=True)  # (..., out), this rank's share of the sum\n",
        "            part = ops.linear(x, module.weight, module.bias, unrounded=True)\n",
        f"{TESTS}/test_tensor_parallel.py::test_a_row_bias_is_added_once",
    ),
    Fault(
        "a row layer's bias gradient is of its part of the sequence",
        STYLES,
        "ops.rounded(copy_to(module.bias, comm), module.weight)",
        "ops.rounded(module.bias, module.weight)",
        f"{TESTS}/test_sequence_parallel.py::test_equals_serial -k tied-2",
    ),
    Fault(
        "layer norm's gradients are not summed under sequence parallelism",
        STYLES,
        "vars(module).update({key: copy_to(p, comm) for key, p in whole.items()})",
        "vars(module).update(whole)",
        f"{TESTS}/test_sequence_parallel.py::test_layer_norm_gradients_are_summed_over_the_sequence",
    ),
    Fault(
        "all ranks share one sequence length, and a replay sees the newest",
        PARALLELIZE,
        "        return _length.get()\n\n    @total.setter\n    def total(self, length: int) -> None:\n"
        "        _length.set(length)",
        "        return getattr(self, 'kept', 0)\n\n    @total.setter\n"
        "    def total(self, length: int) -> None:\n"
        "        self.kept = length",
        f"{TESTS}/test_sequence_parallel.py::test_ranks_at_different_steps_do_not_see_each_other_s_length",
    ),
    Fault(
        "the heads' part of a dropout mask is ignored",
        STYLES,
        "            return sum(balanced(total, comm.size)[: comm.rank]), total",
        "            return 0, total",
        MASKS,
    ),
    Fault(
        "dropout ignores its window",
        "minipar/nn/layers.py",
        "if self.window is None:",
        "if True:",
        MASKS,
    ),
    Fault(
        "a module may be cut by two lines of the plan",
        PARALLELIZE,
        "            if name in chosen:",
        "            if False:",
        f"{TESTS}/test_plan_refusals.py::test_refusals -k match",
    ),
    Fault(
        "one rank's words start one too late",
        VOCABULARY,
        "return sum(balanced(vocabulary, comm.size)[: comm.rank])",
        "return sum(balanced(vocabulary, comm.size)[: comm.rank]) + (comm.rank > 0)",
        f"{TESTS}/test_vocabulary.py::test_embedding_with_ids_on_the_boundaries",
    ),
    Fault(
        "the largest logit is this rank's",
        VOCABULARY,
        '    comm.all_reduce_(top, op="max")  # (N,)\n',
        "",
        f"{TESTS}/test_vocabulary.py::test_logits_of_ten_thousand_are_exact",
    ),
    Fault(
        "ignored targets cost as much as log Z",
        VOCABULARY,
        "return xp.where(valid, losses, 0).astype",
        "return losses.astype",
        f"{TESTS}/test_vocabulary.py::test_the_loss_module_keeps_its_settings",
    ),
    Fault(
        "label smoothing divides by this rank's words",
        VOCABULARY,
        "            dlogits -= smoothing / vocabulary",
        "            dlogits -= smoothing / dlogits.shape[1]",
        f"{TESTS}/test_vocabulary.py::test_cross_entropy_keeps_its_dtype",
    ),
    Fault(
        "shard boundaries are off by one",
        PLACEMENT,
        "bounds = [(sum(counts[:r]), sum(counts[: r + 1])) for r in range(ranks)]",
        "bounds = [(max(sum(counts[:r]) - 1, 0), max(sum(counts[: r + 1]) - 1, 0)) for r in range(ranks)]",
        f"{TESTS}/test_placement.py::test_every_element_lies_on_exactly_one_rank",
    ),
    Fault(
        "a fused query-key-value weight is cut as one block",
        STYLES,
        "cut = Shard(0, self.groups, self.unit)",
        "cut = Shard(0)",
        f"{SERIAL} -k tied-2",
    ),
    Fault(
        "the groups of a shard are not put back in their places",
        PLACEMENT,
        'order = xp.asarray([i for mine in spans for span in mine for i in range(*span)], dtype="int64")',
        "order = xp.arange(shape[dim])",
        f"{TESTS}/test_placement.py::test_parts_make_the_whole_again_bitwise",
    ),
    Fault(
        "each rank initialises its part as if it were the first",
        PLACEMENT,
        "parts = [initialiser.fill(key, shape, index) for index in self.pieces(shape)]",
        "parts = [initialiser.fill(key, self.local_shape(shape))]",
        f"{TESTS}/test_placement.py::test_initial_is_the_serial_initialisation_sliced_bitwise",
    ),
    Fault(
        "heads that the ranks do not divide are cut anyway",
        PLACEMENT,
        "if self.unit > 1 and units % ranks:",
        "if False:",
        f"{TESTS}/test_plan_refusals.py::test_refusals -k divide",
    ),
    Fault(
        "the halo is one pixel short",
        CONVOLUTION,
        "stop = (out[1] - 1) * stride - padding + dilation * (kernel - 1) + 1",
        "stop = (out[1] - 1) * stride - padding + dilation * (kernel - 1) + (out[0] > 0)",
        f"{TESTS}/test_conv_parallel.py::test_needed_rows_by_hand",
    ),
    Fault(
        "rows of padding beyond the window are kept",
        CONVOLUTION,
        "(max(min(stop, 0) - start, 0), max(stop - max(start, length), 0))",
        "(max(-start, 0), max(stop - length, 0))",
        f"{TESTS}/test_conv_parallel.py::test_region_convolution_corners",
    ),
    Fault(
        "a convolution's weight gradient is of this rank's rows",
        CONVOLUTION,
        "            weight = copy_to(module.weight, comm)\n            bias = None",
        "            weight = module.weight\n            bias = None",
        f"{TESTS}/test_conv_parallel.py::test_convnet_equals_serial -k region",
    ),
    Fault(
        "the image's height is remembered from another image",
        CONVOLUTION,
        "rows = self.known.get(entered)",
        "rows = next(iter(self.known.values()), None)",
        f"{TESTS}/test_conv_parallel.py::test_convnet_equals_serial -k region",
    ),
    Fault(
        "group norm's statistics are local",
        CONVOLUTION,
        "variance = comm.all_reduce((normal * normal).sum(axis=2, keepdims=True)) / elements",
        "variance = (normal * normal).mean(axis=2, keepdims=True)",
        f"{TESTS}/test_conv_parallel.py::test_region_group_norm",
    ),
    Fault(
        "group norm's backward forgets the other ranks' rows",
        CONVOLUTION,
        "sums = comm.all_reduce(xp.stack([dy.sum(axis=2), (dy * normal).sum(axis=2)])) / elements",
        "sums = xp.stack([dy.sum(axis=2), (dy * normal).sum(axis=2)]) / elements",
        f"{TESTS}/test_conv_parallel.py::test_region_group_norm",
    ),
    Fault(
        "the mean over positions divides by this rank's",
        CONVOLUTION,
        "positions = rows(x) * x.shape[3]",
        "positions = max(x.shape[2] * x.shape[3] * comm.size, 1)",
        f"{TESTS}/test_conv_parallel.py::test_region_pool",
    ),
    Fault(
        "max pooling pads with zeros",
        CONVOLUTION,
        "kind, pool, fill = MaxPool2d, ops.max_pool2d, -np.inf",
        "kind, pool = MaxPool2d, ops.max_pool2d",
        f"{TESTS}/test_conv_parallel.py::test_a_pool_s_stride_is_its_kernel",
    ),
    Fault(
        "the norm counts whole parameters on every rank",
        NORMS,
        "for p, t in pairs if tp is None or tp.rank == 0 or is_sharded(p))",
        "for p, t in pairs)",
        f"{TESTS}/test_norms.py::test_norm_counts_each_element_once",
    ),
    Fault(
        "a mesh hands out its ranks in another order",
        "minipar/mesh.py",
        'AXES = ("dp", "pp", "tp")',
        'AXES = ("tp", "pp", "dp")',
        f"{TESTS}/test_mesh.py::test_every_layout_groups_the_right_ranks",
    ),
]
