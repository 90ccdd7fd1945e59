"""Faults of pipeline schedules: how they are made, simulated, checked, written and chosen."""

from tests.mutations.fault import Fault

PIPELINE = "minipar/parallel/pipeline"
FORMULAS = "tests/pipeline/test_formulas.py::test_bubble_and_live_activations"
CORRUPTIONS = "tests/pipeline/test_corruptions.py"
CLOCK = "tests/pipeline/test_virtual_clock.py"
WRITTEN = "tests/pipeline/test_written_schedules.py"

FAULTS: list[Fault] = [
    Fault(
        "1F1B warms up with a forward too many",
        f"{PIPELINE}/schedules.py",
        "warm_up = min(stages - stage - 1, microbatches)  # forwards",
        "warm_up = min(stages - stage, microbatches)  # forwards",
        f"{FORMULAS}[1f1b]",
    ),
    Fault(
        "interleaved takes the chunks of backward in the order of forward",
        f"{PIPELINE}/schedules.py",
        "return Action(B, group * stages + i, chunks - 1 - chunk, stage)",
        "return Action(B, group * stages + i, chunk, stage)",
        f"{FORMULAS}[interleaved]",
    ),
    Fault(
        "ZB-H1 runs each W straight after its I",
        f"{PIPELINE}/schedules.py",
        """            if i >= stage:
                actions.append(Action(W, i - stage, 0, stage))
        actions += [Action(W, i, 0, stage) for i in range(max(microbatches - stage, 0), microbatches)]
""",
        """            actions.append(Action(W, i, 0, stage))
""",
        f"{FORMULAS}[zb-h1]",
    ),
    Fault(
        "interleaved takes any number of microbatches",
        f"{PIPELINE}/schedules.py",
        "    if microbatches % stages:\n",
        "    if False:\n",
        "tests/pipeline/test_formulas.py::test_sizes_that_cannot_be_are_refused",
    ),
    Fault(
        "gradients travel for nothing in the simulator",
        f"{PIPELINE}/simulator.py",
        "arrival += wire[k]\n",
        "arrival += 0\n",
        f"{CLOCK}::test_messages_take_alpha_and_beta[1f1b-4-8-None]",
    ),
    Fault(
        "an activation is let go before its W",
        f"{PIPELINE}/simulator.py",
        "elif action.kind in (B, W):\n            out.append(held)",
        'elif action.kind in (B, "I"):\n            out.append(held)',
        f"{FORMULAS}[zb-h1]",
    ),
    Fault(
        "the checker passes an action that is there twice",
        f"{PIPELINE}/checker.py",
        "elif (kind, i, chunk) in at:",
        "elif False:",
        f"{CORRUPTIONS}::test_a_corrupted_schedule_is_named[double_a_backward]",
    ),
    Fault(
        "the checker does not see a buffer reused",
        f"{PIPELINE}/checker.py",
        "if (i - a.microbatch) % buffers == 0:",
        "if i == a.microbatch:",
        f"{CORRUPTIONS}::test_too_few_buffers_and_too_many_live_are_named",
    ),
    Fault(
        "the checker lets W come before I",
        f"{PIPELINE}/checker.py",
        "if gi is not None and gw is not None and gw < gi:",
        "if False:",
        f"{CORRUPTIONS}::test_weights_before_input_gradient_is_named",
    ),
    Fault(
        "a message that nobody sends is waited for",
        f"{PIPELINE}/checker.py",
        "elif sent is None and received is not None:",
        "elif False:",
        f"{CORRUPTIONS}::test_a_corrupted_message_is_named[lose_a_send]",
    ),
    Fault(
        "ZB-H1's formula counts two parts of the work",
        f"{PIPELINE}/formulas.py",
        "Fraction(p - 1, 3 * m + p - 1)",
        "Fraction(p - 1, 2 * m + p - 1)",
        "tests/pipeline/test_formulas.py::test_the_formulas_are_the_papers",
    ),
    Fault(
        "an action in another stage's row is read as that row's",
        f"{PIPELINE}/text.py",
        "            if action.stage != stage:\n",
        "            if False:\n",
        f"{WRITTEN}::test_a_mistake_is_refused_by_place",
    ),
    Fault(
        "a mistake in a file is placed one row too high",
        f"{PIPELINE}/text.py",
        'f"row {problem.stage + 1} (stage',
        'f"row {problem.stage} (stage',
        f"{WRITTEN}::test_a_mistake_is_refused_by_place",
    ),
    Fault(
        "a written schedule of other sizes is run",
        f"{PIPELINE}/resolve.py",
        "if wanted not in (None, there):",
        "if False:",
        f"{WRITTEN}::test_other_sizes_are_refused",
    ),
    Fault(
        "every rank reads the file for itself",
        f"{PIPELINE}/resolve.py",
        "text = world.broadcast_object(agreed(world, lambda: read_text(path) if world.rank == 0 else \"\"))",
        "text = read_text(path)",
        f"{WRITTEN}::test_every_rank_gets_the_file_of_the_first",
    ),
]
