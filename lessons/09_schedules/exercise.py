"""Exercise 9: schedules of a pipeline.

Write four functions and mend a fifth. A schedule is plain data here: `schedule[stage]` is the list of what
that stage does, in order, and an action is a pair (kind, microbatch), such as ("F", 3).

    F   forward of a microbatch
    B   its whole backward
    I   the part of backward that gives the gradient of the stage's input
    W   the part that gives the gradient of the stage's weights; I and W together are B

Stages are counted from 0, microbatches too. Stage s gets its input from stage s - 1, and the gradient of its
output from stage s + 1. Grade yourself with `minipar grade 09 --file exercise.py`.
"""

import numpy as np

Action = tuple[str, int]


def one_f_one_b(stages: int, microbatches: int) -> list[list[Action]]:
    """Return the 1F1B schedule, made of F and B.

    Every stage first runs just enough forwards that the stages behind it are fed until its first backward can
    be there; then it alternates, one forward and one backward; then it runs the backwards that are left.
    Stage s never holds more than min(microbatches, stages - s) activations, and the last stage begins with
    F0 B0. Microbatches are taken in order, forward as well as backward.

    Any number of microbatches from 1 on is legal, also fewer than there are stages.

    Returns:
        `stages` lists; each holds F and B of every microbatch once.
    """
    raise NotImplementedError("one_f_one_b: how many forwards does stage s run before its first backward?")


def peak_live(schedule: list[list[Action]]) -> list[int]:
    """Return, for each stage, the largest number of activations that it holds at once.

    A stage holds the activation of a microbatch from its F on, until the B of that microbatch has ended; where
    backward is split, until its W has ended, because the gradient of a weight is made from the stage's input.
    While B or W runs the activation still counts.

    Args:
        schedule: one that can be carried out; of F, B, I and W in any order and number.
    """
    raise NotImplementedError("peak_live: count up at F; when does the count go down?")


def simulate(
    schedule: list[list[Action]], costs: dict[str, float], message: float = 0.0
) -> list[list[tuple[float, float]]]:
    """Return when each action starts and ends, if every stage does its list as early as it can.

    An action starts when its stage has ended the action before it, and what it needs has arrived:

        F of microbatch i on stage s        needs F of i on stage s - 1 (nothing on stage 0)
        B or I of i on stage s              needs B or I of i on stage s + 1 (on the last stage: nothing more),
                                            and F of i on stage s itself
        W of i on stage s                   needs I of i on stage s itself

    What another stage made arrives `message` seconds after the end of the action that made it, and travels
    while both stages go on computing. What was made on the stage itself is there at once.

    Args:
        costs: seconds of "F", "I" and "W"; a B takes as long as I and W together. All stages cost the same.
        message: seconds that a message travels.

    Returns:
        times[stage][position] = (start, end) of schedule[stage][position], in seconds from 0.

    Raises:
        ValueError: the schedule cannot be carried out to its end, since stages wait for each other or for
            what is in no list. (Test it: it must not loop for ever.)
    """
    raise NotImplementedError("simulate: walk through the lists; an action can start when its inputs have times")


def zero_bubble(stages: int, microbatches: int) -> list[list[Action]]:
    """Return a schedule of F, I and W that beats 1F1B's bubble without holding more activations than it may.

    With F, I and W of one second each, messages that cost nothing, and microbatches ≥ stages, two bounds hold:

        bubble       at most (p - 1) / (3 m + p - 1), a third of the idle seconds of 1F1B
        activations  at most p at once on any stage, each live until its W has ended

    p is the number of stages and m of microbatches. Start from 1F1B, split each B into I and W, and put W's
    off: no other stage waits for a W, but stage s - 1 waits for every I of stage s.
    """
    raise NotImplementedError("zero_bubble: by how many steps does stage s put its W off?")


def run_stage(comm, actions, weight, inputs, targets):
    """Run one stage's list of F and B; return the gradient of this stage's weight. THERE IS ONE BUG: mend it.

    Every stage of the pipeline is one layer, y = tanh(x @ weight), and rank s of `comm` is stage s. The loss
    is half the sum of (y - target)² over all samples of all microbatches, y being the last stage's output.

    The gradient on stage 0 is right, its shapes are right on all stages, and training with it lowers the loss.
    Compare it with the serial gradient, stage by stage.

    Args:
        actions: this stage's part of a schedule, such as [("F", 0), ("F", 1), ("B", 0), ("B", 1)].
        weight: (d, d) of this stage.
        inputs: list of (n, d), one a microbatch; what the first stage reads.
        targets: list of (n, d), one a microbatch; what the last stage compares with.

    Returns:
        (d, d), the sum over all microbatches.
    """
    first, last = comm.rank == 0, comm.rank == comm.size - 1
    arrived, back = np.empty_like(inputs[0]), np.empty_like(inputs[0])  # (n, d)
    gradient = np.zeros_like(weight)
    kept, sent = {}, []
    for kind, i in actions:
        if kind == "F":
            x = inputs[i] if first else comm.recv_(arrived, comm.rank - 1, tag=i)
            y = np.tanh(x @ weight)  # (n, d)
            kept[i] = x, y
            if not last:
                sent.append(comm.isend(y, comm.rank + 1, tag=i))
        else:
            x, y = kept.pop(i)
            g = y - targets[i] if last else comm.recv_(back, comm.rank + 1, tag=i)
            g = g * (1 - y * y)  # through tanh
            gradient += x.T @ g
            if not first:
                sent.append(comm.isend(g @ weight.T, comm.rank - 1, tag=i))
    for work in sent:
        work.wait()
    return gradient
