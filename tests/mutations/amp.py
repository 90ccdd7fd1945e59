"""Faults of mixed precision: autocast, the gradient scaler, the precision policy."""

from tests.mutations.fault import Fault

AUTOCAST = "tests/amp/test_autocast.py"
SCALER = "tests/amp/test_scaler.py"
RANKS = "tests/amp/test_on_ranks.py"
POLICY = "tests/amp/test_policy.py"

FAULTS: list[Fault] = [
    Fault(
        "gradients keep the loss scale",
        "minipar/amp/scaler.py",
        "g *= g.dtype.type(inverse)",
        "g *= g.dtype.type(1)",
        f"{SCALER}::test_unscaling_comes_before_clipping_and_happens_once",
    ),
    Fault(
        "an overflow on one rank is that rank's own business",
        "minipar/amp/scaler.py",
        'return bool(self.comm.all_reduce(np.array([found], np.uint8), op="max")[0])',
        "return found",
        f"{RANKS}::test_the_scaler_agrees_over_its_communicator",
    ),
    Fault(
        "good steps before an overflow still count towards growth",
        "minipar/amp/scaler.py",
        "            self._growth_tracker = 0\n            self._hysteresis_left -= 1\n",
        "            self._hysteresis_left -= 1\n",
        f"{SCALER}::test_a_scripted_sequence_gives_the_state_machines_trace",
    ),
    Fault(
        "the step is taken although a gradient overflowed",
        "minipar/amp/scaler.py",
        "return None if self._found[id(optimizer)] else take()",
        "return take()",
        f"{SCALER}::test_a_skipped_step_leaves_weights_moments_and_step_count",
    ),
    Fault(
        "the cast copy of a weight outlives the optimizer's step",
        "minipar/amp/autocast.py",
        " and version == t.version",
        "",
        f"{AUTOCAST}::test_a_weight_is_cast_once_a_step_and_anew_after_it",
    ),
    Fault(
        "the cast copy of a freed weight stays in memory",
        "minipar/amp/autocast.py",
        "weakref.ref(data, lambda _: copies.pop(key, None))",
        "weakref.ref(data)",
        f"{AUTOCAST}::test_a_copy_goes_when_its_array_goes",
    ),
    Fault(
        "softmax runs in float16",
        "minipar/ops/normalisation.py",
        '@primitive(fresh=True, precision="float32")\ndef softmax(',
        "@primitive(fresh=True)\ndef softmax(",
        f"{AUTOCAST}::test_the_dtype_of_an_operation_and_of_its_gradients -k softmax",
    ),
    Fault(
        "a recomputed forward runs in float32",
        "minipar/recompute.py",
        "output, again = context.copy().run(replay)",
        "output, again = replay()",
        f"{AUTOCAST}::test_recompute_replays_in_the_precision_of_the_forward",
    ),
    Fault(
        "a row layer's terms are rounded on each rank before they are summed",
        "minipar/ops/linalg.py",
        "return k.linear(widen(x) if unrounded else x, w, bias), vjp",
        "return k.linear(x, w, bias), vjp",
        f"{RANKS}::test_terms_of_a_row_layer_are_summed_before_they_are_rounded",
    ),
    Fault(
        "each rank decides on precision from its own statistics",
        "minipar/amp/policy.py",
        "total = self.comm.all_reduce(mine)",
        "total = mine",
        f"{POLICY}::test_every_rank_decides_the_same_and_as_the_serial_run -k layout1",
    ),
    Fault(
        "gradients of half float16's smallest number count as kept",
        "minipar/amp/histogram.py",
        "return self.share(high=SMALLEST - 1, scale=scale)",
        "return self.share(high=SMALLEST - 2, scale=scale)",
        f"{POLICY}::test_what_vanishes_and_overflows_is_what_float16_makes_of_it",
    ),
    Fault(
        "a loss scale that is no power of two is taken for one",
        "minipar/amp/histogram.py",
        "start = self.exponents + math.log2(scale)",
        "start = self.exponents + round(math.log2(scale))",
        f"{POLICY}::test_a_bin_across_a_limit_counts_in_proportion",
    ),
    Fault(
        "amp: float16 gradients of one weight add up in float16 where they land in a bucket",
        "minipar/tape.py",
        "            self.grads, self.owned = [kernels.of(g).cast(g, self.dtypes[0])], 1\n",
        "            pass\n",
        "tests/amp/test_autocast.py::test_gradients_of_low_products_land_in_a_buffer_as_their_float32_sum",
    ),
    Fault(
        "amp: cross-entropy of float16 logits is rounded to float16 under autocast",
        "minipar/ops/loss.py",
        "    if casting.get() is None and losses.dtype",
        "    if losses.dtype",
        "tests/amp/test_autocast.py::test_cross_entropy_of_low_logits_is_that_of_their_float32_copy",
    ),
]
