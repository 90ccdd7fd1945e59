"""Faults of the pipeline's executor, of its stages, and of tiles."""

from tests.mutations.fault import Fault

EXECUTOR = "minipar/parallel/pipeline/executor.py"
STAGE = "minipar/parallel/pipeline/stage.py"
STRATEGY = "minipar/parallel/strategies/pipelined.py"
EQUAL = "tests/pipeline/test_equal_to_serial.py"
MESSAGES = "tests/pipeline/test_messages.py"
TILES = "tests/pipeline/test_tiles.py"
WRITTEN = "tests/pipeline/test_written_schedules.py"

FAULTS: list[Fault] = [
    Fault(
        "a receive overwrites an input that backward still needs",
        EXECUTOR,
        "        array: Array = self.arriving.pop((kind, action.chunk, action.microbatch)).wait()\n",
        """        array: Array = self.arriving.pop((kind, action.chunk, action.microbatch)).wait()
        kept = self.__dict__.setdefault("kept", {}).setdefault((kind, array.shape), array)
        kept[...] = array
        array = kept
""",
        f"{EQUAL}::test_gpt[2-gpipe]",
    ),
    Fault(
        "gradients are as many times too large as there are microbatches",
        EXECUTOR,
        "y = loss / self.count\n",
        "y = loss * (self.microbatches / self.count)\n",
        f"{EQUAL}::test_gpt[2-1f1b]",
    ),
    Fault(
        "only the last stage knows the loss",
        STRATEGY,
        "return float(self.executor.pp.all_reduce(np.array([float(total)]))[0])",
        "return float(total)",
        f"{EQUAL}::test_gpt[2-1f1b]",
    ),
    Fault(
        "a tied weight has the gradient of its use on this stage only",
        STAGE,
        "total = group.all_reduce(g)\n",
        "total = g\n",
        f"{EQUAL}::test_gpt[2-1f1b]",
    ),
    Fault(
        "a tied weight counts on every stage in the clipping norm",
        STRATEGY,
        " if p.name in self.stage.owned]\n        norm",
        "]\n        norm",
        f"{MESSAGES}::test_the_clipping_norm_is_the_serial_one_on_every_rank",
    ),
    Fault(
        "replicas are summed after every accumulated piece",
        STRATEGY,
        "        if last:\n",
        "        if True:\n",
        f"{EQUAL}::test_replicas_of_a_pipeline_accumulate",
    ),
    Fault(
        "W is forgotten",
        EXECUTOR,
        "            run_deferred(self.live.pop((action.chunk, action.microbatch)).deferred)\n",
        "            self.live.pop((action.chunk, action.microbatch))\n",
        f"{EQUAL}::test_gpt[2-zb-h1]",
    ),
    Fault(
        "what W has used is kept",
        EXECUTOR,
        "run_deferred(self.live.pop((action.chunk, action.microbatch)).deferred)",
        "run_deferred(self.live[action.chunk, action.microbatch].deferred)",
        f"{MESSAGES}::test_live_activations_are_the_formulas",
    ),
    Fault(
        "dropout draws each microbatch's mask as that of the first samples",
        EXECUTOR,
        "with random.at(first_sample=piece.offset):",
        "with random.at(first_sample=0):",
        f"{EQUAL}::test_dropout_and_more_microbatches_than_samples",
    ),
    Fault(
        "the pipeline does not recompute",
        EXECUTOR,
        "recompute(block, y) if self.recompute else block(y)",
        "block(y)",
        f"{MESSAGES}::test_recompute_runs_each_block_forward_again",
    ),
    Fault(
        "the default schedule runs in the place of the one given",
        "minipar/parallel/distribute.py",
        "schedule = resolve_schedule(mesh.world, recipe.schedule, stages, microbatches, recipe.chunks)",
        'schedule = resolve_schedule(mesh.world, "1f1b", stages, microbatches)',
        f"{WRITTEN}::test_it_is_what_runs",
    ),
    Fault(
        "a refusal is told by every rank",
        "minipar/parallel/distribute.py",
        "agreed(mesh.world, functools.partial(_cut_layers, model, mesh, recipe))",
        "_cut_layers(model, mesh, recipe)",
        "tests/pipeline/test_mpi.py -m mpi -k a_refusal_is_one_line",
    ),
    Fault(
        "a 3 × 3 convolution is cut into tiles",
        "minipar/parallel/pipeline/tile_check.py",
        "if padding == (0, 0) and stride == (height, width) and",
        "if",
        f"{TILES}::test_what_mixes_positions_is_named",
    ),
    Fault(
        "the tiles of a row are taken from the row's start",
        "minipar/data/tiles.py",
        "slice(column * width, (column + 1) * width)",
        "slice(0, width)",
        f"{TILES}::test_tiles_cover_each_pixel_and_target_once",
    ),
    Fault(
        "the model is not tried on tiles",
        "minipar/parallel/pipeline/tile_check.py",
        "why_not_tiles(model) or _trial(model, grid)",
        "why_not_tiles(model)",
        f"{TILES}::test_what_no_module_shows_is_found_by_trying",
    ),
    Fault(
        "a schedule may have more messages than tags",
        "minipar/parallel/pipeline/resolve.py",
        "        refuse_too_many_tags(sizes(found))\n",
        "",
        "tests/pipeline/test_written_schedules.py::test_more_messages_than_tags_are_refused",
    ),
]
