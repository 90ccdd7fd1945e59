"""Exercise 12: a small planner.

Write the four functions, then find the bug in the one at the end. A model of equal blocks, a machine and a layout
are dicts. Numbers may be ints or floats.

    model = {
        "layers": 8,            blocks, all alike
        "heads": 8,             attention heads in each block
        "parameters": 1000,     elements of one block
        "activations": 500,     bytes that one whole block keeps for backward, for one sample
        "boundary": 40,         bytes of what a block hands to the next, for one sample
        "work": 6000,           floating-point operations of one block, forward and backward, for one sample
        "batch": 32,            samples of the global batch
    }
    machine = {
        "speed": 1e6,           operations a second of one rank
        "node": 8,              ranks of a node: 0 to 7 are in the first one, 8 to 15 in the second, and so on
        "near": (1e-5, 1e-9),   α in seconds and β in seconds a byte, between two ranks of one node
        "far": (1e-4, 1e-8),    the same between two nodes
    }
    layout = {"dp": 2, "pp": 2, "tp": 2, "zero": 1, "microbatches": 4}

A layout is dp × pp × tp ranks, numbered with tp innermost and dp outermost (lesson 11). A rank has
batch / dp samples a step, in so many microbatches; with pp = 1 they are accumulated one after the other. Weights
and gradients are float32, and Adam keeps two float32 moments. Every block, its parameters, its activations, and its
work are cut evenly over tp ranks; blocks are cut evenly over pp stages; the pipeline runs 1F1B (lesson 09).

Grade yourself with `minipar grade 12 --file exercise.py`.
"""


def memory(model, layout):
    """Return the bytes that a rank of the first stage, the fullest one, holds.

    Returns:
        dict of "parameters", "gradients", "optimizer" and "activations". ZeRO divides over the dp ranks: the
        optimizer's state from stage 1 on, gradients from stage 2 on, parameters in stage 3. Activations are
        those of all microbatches that are live at once at the fullest moment: a pipeline's first stage holds
        min(microbatches, pp), a rank without a pipeline one.
    """
    raise NotImplementedError("memory: what does a rank hold of the blocks, and which axis divides what?")


def step_seconds(model, machine, layout):
    """Return the seconds of a step, by what they go into. Nothing is hidden behind anything else.

    Returns:
        dict of four numbers, the step being their sum:
        "compute"   the work of this rank's blocks on all its microbatches
        "tensor"    sums within blocks: in each block 4 all-reduces of `boundary` bytes a sample (two forward, two
                    backward), for each microbatch, over the tp ranks
        "bubble"    filling and draining: the pipeline waits for (pp - 1) microbatches' compute and tensor time; its
                    messages, single activations, are left out
        "data"      gradients (and with ZeRO parameters) over the dp ranks, after the last backward

        A ring over N ranks: a reduce-scatter or an all-gather of n bytes in all takes (N - 1) α + β n (N - 1) / N,
        an all-reduce two of these. With g the bytes of this rank's gradients before ZeRO, "data" is that many ring
        passes of g bytes: 2 for ZeRO 0 and 1, microbatches + 1 for ZeRO 2, 3 × microbatches for ZeRO 3 (lesson 06).

        α and β are "near" where a group lies inside one node, else "far". Neighbours in a group are 1 rank apart for
        tp, and pp × tp ranks for dp; a group of N lies inside a node if N times that distance is at most "node". Over
        a group of one rank nothing takes any time.
    """
    raise NotImplementedError("step_seconds: four parts, each with the number of times that it happens")


def layouts(model, ranks):
    """Return every layout of `ranks` ranks that is possible for this model.

    - dp × pp × tp = ranks; tp divides the heads, pp divides the layers, dp divides the batch.
    - microbatches divide batch / dp.
    - zero is 0 to 3 where dp > 1, else 0; 2 and 3 only without a pipeline.

    Returns:
        list of layouts, in any order, each once.
    """
    raise NotImplementedError("layouts: go through the divisors, and leave out what cannot be")


def choose(candidates, limit):
    """Return the best of some candidates, and for each why it was or was not chosen.

    Args:
        candidates: list of dicts {"memory": as memory() returns, "seconds": as step_seconds() returns}.
        limit: bytes that a rank may hold; just so many is legal.

    Returns:
        (best, reasons). best is the index of the candidate with the shortest step of those that fit; of several
        equally short ones that which holds less. reasons is a list of one string for each candidate: "best" for the
        best one; "memory" for one that does not fit; else the part of the step in which it loses most seconds
        against the best, such as "bubble" ("memory" also for one that is as fast as the best and holds more).

    Raises:
        ValueError: none fits; the message contains, as digits, the fewest bytes that any candidate needs.
    """
    raise NotImplementedError("choose: first what fits, then the shortest step, then compare part by part")


def microbatches_for(stages, batch, work, speed, overhead):
    """BUG HUNT. Return the best number of microbatches for a pipeline, and the predicted seconds of its step.

    Few microbatches leave a long bubble, many have a price: each costs every stage `overhead` seconds, for starting
    its operations. Tried are all divisors of the batch.

    Users report that pipelines take longer than was predicted, the more so the fewer the microbatches are. With a
    single one, 4 stages are predicted to be 2.3 times as fast as one rank; on a virtual clock they are exactly as
    fast as one rank.

    Args:
        work: operations of the whole model for one sample; every stage has an equal part.
        speed: operations a second of a rank. overhead: seconds a microbatch and stage.

    Returns:
        (microbatches, seconds); the fewest microbatches where several are equally fast.
    """
    best = None
    for m in range(1, batch + 1):
        if batch % m:
            continue
        useful = batch * work / (stages * speed) + m * overhead
        bubble = (stages - 1) / (m + stages - 1)
        seconds = useful * (1 + bubble)
        if best is None or seconds < best[1]:
            best = m, seconds
    return best
