"""Faults of what a job makes of its settings, of what it refuses, and of what it says of itself."""

from tests.mutations.fault import Fault

LAYOUTS, TRAINING = "minipar/layouts.py", "minipar/training.py"
PLACEMENT = "minipar/parallel/placement.py"
CASES = "tests/parallel/test_layouts.py"
PLACES = "tests/parallel/test_places.py"
REFUSED = "tests/parallel/test_layout_refusals.py::test_a_job_refuses_before_any_communication"

FAULTS: list[Fault] = [
    Fault(
        "a job ignores its partition policy",
        TRAINING,
        "        self.assignment = self._assignment()\n",
        "        self.assignment = None\n",
        f"{CASES} -k count",
    ),
    Fault(
        "every convolution is cut by output channel",
        LAYOUTS,
        "convolution=c.convolution, zero=c.zero",
        "convolution=None, zero=c.zero",
        f"{CASES} -k region",
    ),
    Fault(
        "a job ignores its ZeRO stage",
        LAYOUTS,
        "zero=c.zero,",
        "zero=min(c.zero, 1),",
        f"{CASES} -k 'zero and 3'",
    ),
    Fault(
        "a job ignores sequence parallelism",
        LAYOUTS,
        "sequence_parallel=c.sequence_parallel, convolution",
        "sequence_parallel=False, convolution",
        f"{CASES} -k sequence",
    ),
    Fault(
        "a plan forgets sequence parallelism that its recipe asks for",
        "minipar/parallel/distribute.py",
        "model, sequence_parallel=recipe.sequence_parallel, convolution",
        "model, sequence_parallel=False, convolution",
        f"{CASES} -k sequence",
    ),
    Fault(
        "devices are all equally fast",
        LAYOUTS,
        "return parse_devices(c.devices, speeds, memory, ranks=ranks)",
        "return parse_devices(c.devices, None, memory, ranks=ranks)",
        f"{CASES} -k devices",
    ),
    Fault(
        "ranks talk before a layout is refused",
        TRAINING,
        "        sizes = fitting_axes(config, comm.size)\n",
        "        comm.barrier()\n        sizes = fitting_axes(config, comm.size)\n",
        REFUSED,
    ),
    Fault(
        "heads are looked at after the mesh is made",
        LAYOUTS,
        '            check_plan(model, sizes["tp"], plan)\n',
        "            assert plan\n",
        REFUSED,
    ),
    Fault(
        "verify talks before a layout is refused",
        "minipar/verification.py",
        "    fitting_axes(config, comm.size)\n",
        "    comm.barrier()\n",
        REFUSED,
    ),
    Fault(
        "--dp is ignored where stages take all ranks",
        "minipar/config.py",
        "self.pp == 1 and self.dp not in (None, 1):",
        "self.pp == 1 and self.dp == 0:",
        "tests/parallel/test_layout_refusals.py::test_dp_is_refused_where_stages_take_all_ranks",
    ),
    Fault(
        "a refused plan leaves the model half cut",
        "minipar/parallel/tensor_parallel/parallelize.py",
        "    chosen = check_plan(model, comm.size, plan)\n",
        "    chosen = _resolve(dict(model.named_modules()), plan)\n",
        "tests/parallel/test_plan_refusals.py::test_a_refused_plan_leaves_the_model_as_it_was",
    ),
    Fault(
        "ZeRO 3 prints whole parameters",
        PLACEMENT,
        "        return (last.stop - last.start,)\n",
        "        return p.global_shape\n",
        f"{PLACES}::test_zero_3_in_float64",
    ),
    Fault(
        "other ranks' layers are printed as held",
        PLACEMENT,
        "    if not place.here:\n",
        "    if place is None:\n",
        f"{PLACES}::test_layers",
    ),
    Fault(
        "the printed bytes are those of float32",
        PLACEMENT,
        "itemsize = p.dtype.itemsize if p.is_materialized or p.sharded is not None else 4",
        "itemsize = p.dtype.itemsize if p.is_materialized else 4",
        f"{PLACES}::test_zero_3_in_float64",
    ),
    Fault(
        "ZeRO's ranges of a sharded parameter start at its serial ones",
        "minipar/parallel/zero/flat_shards.py",
        "reshape(-1)[start : start + len(out)]",
        "reshape(-1)[: len(out)]",
        f"{PLACES}::test_the_first_values_are_the_serial_ones_bitwise",
    ),
    Fault(
        "verify does not miss a weight that no rank holds",
        "minipar/verification.py",
        "    for name in set().union(*comm.all_gather_object(list(ours))) ^ theirs.keys():\n",
        "    for name in set().union(*comm.all_gather_object(list(ours))) - theirs.keys():\n",
        "tests/commands/test_verify_and_run.py::test_verify_finds_a_parameter_that_no_rank_holds",
    ),
    Fault(
        "a model goes by the height of another's images",
        "minipar/parallel/tensor_parallel/convolution.py",
        "        return rows if whose is self else 0\n",
        "        return rows\n",
        "tests/parallel/test_conv_parallel.py::test_a_model_does_not_go_by_the_image_of_another",
    ),
    Fault(
        "a device's bars lie on top of each other",
        "minipar/plot/partition.py",
        "held.barh(rows, widths, left=left,",
        "held.barh(rows, widths,",
        "tests/parallel/test_partition.py::test_the_bars_are_bytes_by_kind_and_shares_of_the_cost",
    ),
    Fault(
        "an aggregation is ignored where no ranks share the batch",
        "minipar/parallel/distribute.py",
        'if sizes["dp"] > 1 or sizes["tp"] * sizes["pp"] == 1:',
        "if True:",
        REFUSED,
    ),
]
