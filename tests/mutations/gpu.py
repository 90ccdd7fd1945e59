"""Faults of what runs on a GPU, as far as they show without one: products, graphs, flat parameters, messages."""

from tests.mutations.fault import Fault

BLAS, GRAPH = "minipar/kernels/gpu_blas.py", "minipar/kernels/gpu_graph.py"
FLAT, WIRE = "minipar/flat.py", "minipar/comm/wire.py"
PRODUCTS = "tests/gpu/test_gpu_blas.py::test_products_are_numpy_s"

FAULTS: list[Fault] = [
    Fault(
        "gpu: a product's operands in the order of rows",
        BLAS,
        "        int(right.transposed), int(left.transposed), m, n, k,",
        "        int(left.transposed), int(right.transposed), m, n, k,",
        PRODUCTS,
    ),
    Fault(
        "gpu: a stack of heads is walked by its last stride alone",
        BLAS,
        "        if outer != n * inner:\n            return None",
        "        if outer != n * inner:\n            continue",
        PRODUCTS,
    ),
    Fault(
        "gpu: what fills up a product's operands is whatever the memory held",
        BLAS,
        "    copy[len(lines) :] = 0\n",
        "",
        "tests/gpu/test_gpu_blas.py::test_for_tensor_cores_all_that_lies_along_rows_is_a_multiple_of_16_bytes",
    ),
    Fault(
        "gpu: a float16 product of odd sides goes to slow kernels",
        BLAS,
        "    whole_m = _up(m, unit)\n",
        "    whole_m = m\n",
        "tests/gpu/test_gpu_blas.py::test_for_tensor_cores_all_that_lies_along_rows_is_a_multiple_of_16_bytes",
    ),
    Fault(
        "gpu: a function is launched with an argument too few",
        "minipar/kernels/gpu.py",
        'run_rows("softmax", {"T": x}, x, y, queries)',
        'run_rows("softmax", {"T": x}, x, y)',
        "tests/gpu/test_gpu_launch.py",
    ),
    Fault(
        "gpu: a function is compiled for another dtype than it is given",
        "minipar/kernels/gpu.py",
        'run_rows("layer_norm_backward", {"T": x, "G": g, "S": weight}',
        'run_rows("layer_norm_backward", {"T": x, "G": mean, "S": weight}',
        "tests/gpu/test_gpu_launch.py",
    ),
    Fault(
        "gpu: halves add up in halves",
        BLAS,
        'else COMPUTE_32F\n\n\ndef arguments',
        'else 64\n\n\ndef arguments',
        "tests/gpu/test_gpu_blas.py::test_halves_add_up_in_float32",
    ),
    Fault(
        "gpu: a replay does not wait for the batch that is still being copied",
        GRAPH,
        "        self.stream.wait_event(caller.record())\n",
        "",
        "tests/gpu/test_gpu_graph.py",
    ),
    Fault(
        "gpu: what follows a replay does not wait for it",
        GRAPH,
        "        caller.wait_event(self.stream.record())\n",
        "",
        "tests/gpu/test_gpu_graph.py",
    ),
    Fault(
        "gpu: a captured graph reads the casts of the weights as they were before it",
        "minipar/amp/autocast.py",
        " and part_of is graph:",
        ":",
        "tests/test_flat.py::test_a_captured_graph_has_its_own_copies_of_weights",
    ),
    Fault(
        "gpu: a replayed optimizer step changes weights and not their versions",
        "minipar/optim.py",
        "            graph.at_replay.append(lambda: _count_change(updated))",
        "            pass",
        "tests/test_flat.py::test_in_a_captured_graph_versions_are_counted_at_each_replay",
    ),
    Fault(
        "gpu: a step of the flat tensor leaves its members' versions",
        FLAT,
        "            m.version += value - self._version",
        "            pass",
        "tests/test_flat.py::test_a_step_changes_every_member_s_version",
    ),
    Fault(
        "gpu: a missing gradient is taken to be what it was",
        FLAT,
        "        if missing:\n",
        "        if False:\n",
        "tests/test_flat.py::test_what_cannot_be_laid_flat_is_refused",
    ),
    Fault(
        "gpu: MPI reads joined parts before they are joined",
        WIRE,
        "    synchronize(flat)\n",
        "",
        "tests/comm/test_comm_wire.py::test_parts_are_joined_before_mpi_reads_them",
    ),
    Fault(
        "gpu: MPI writes into GPU memory that queued work still uses",
        WIRE,
        "    synchronize(target)  # work that is still queued may use this memory, also as what it was before\n",
        "",
        "tests/comm/test_comm_wire.py::test_a_gpu_message_is_received_where_it_belongs",
    ),
    Fault(
        "gpu: Python is to reduce memory of the GPU",
        WIRE,
        "    if cuda_aware() and not reduced_by_python(op, x.dtype):",
        "    if cuda_aware():",
        "tests/comm/test_comm_wire.py::test_what_python_reduces_is_staged_even_where_mpi_reads_gpu_memory",
    ),
    Fault(
        "gpu: a norm waits for the GPU at every tensor",
        "minipar/optim.py",
        "        return (wide * wide).sum()",
        "        return float((wide * wide).sum())",
        "tests/gpu/test_waits.py::test_a_norm_over_many_tensors_waits_once",
    ),
    Fault(
        "gpu: a convolution's weights see the batch in another order",
        "minipar/kernels/gpu_conv.py",
        "    return g.swapaxes(0, 1).reshape(groups",
        "    return g.reshape(groups",
        "tests/gpu/test_gpu_conv.py",
    ),
    Fault(
        "gpu: a pipeline waits for the GPU after every action",
        "minipar/parallel/pipeline/executor.py",
        "        if is_recording():",
        "        if True:",
        "tests/gpu/test_waits.py::test_a_pipeline_waits_after_its_actions_only_where_they_are_traced",
    ),
]
