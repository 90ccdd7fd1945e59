"""Grader of lesson 3: chunks, traffic and virtual time of collectives made of sends and receives."""

import math

import numpy as np

import minipar
from minipar.comm import Clock
from minipar.errors import HangError, MismatchError
from minipar.grading import Lesson, Run, close, shaped, wrong

lesson = Lesson(3, forbidden=("minipar.comm.collectives",))
ALPHA, BETA = 1.0, 0.001  # seconds a message, seconds a byte: round numbers to reckon with

ALL_SEND = "Where all ranks send to each other, begin with isend, receive, and only then wait for the send"


# In the submission's process ---------------------------------------------------------------------------


def on_ranks(collective, arrays, *arguments):
    """Run a collective on one thread an array; per rank: value, whether x changed, calls, virtual seconds."""

    def program():
        comm = minipar.world()
        x = arrays[comm.rank].copy()
        value = collective(comm, x, *arguments)
        calls = [(c.operation, -1 if c.peer is None else c.peer) for c in comm.journal.entries]
        return {
            "value": value,
            "changed": not np.array_equal(x, arrays[comm.rank]),
            "shared": isinstance(value, np.ndarray) and np.shares_memory(value, x),
            "calls": calls,
            "sent": comm.ledger.elements("send"),
            "seconds": comm.now(),
        }

    try:
        return minipar.launch(program, len(arrays), clock=Clock(ALPHA, BETA))
    except (HangError, MismatchError) as error:
        return {type(error).__name__: str(error)}


@lesson.probe
def reduce_scatter(submission, arrays):
    return on_ranks(submission.ring_reduce_scatter, arrays)


@lesson.probe
def all_gather(submission, arrays):
    return on_ranks(submission.ring_all_gather, arrays)


@lesson.probe
def broadcast(submission, arrays, root):
    return on_ranks(submission.tree_broadcast, arrays, root)


@lesson.probe
def seconds(submission, n_bytes, ranks, alpha, beta):
    return submission.all_reduce_seconds(n_bytes, ranks, alpha, beta)


@lesson.probe
def doubling(submission, arrays):
    return on_ranks(submission.doubling_all_reduce, arrays)


# In the grader's ---------------------------------------------------------------------------------------


def arrays_of(ranks, shape, seed):
    rng = np.random.default_rng([3, seed, ranks])
    return [rng.normal(size=shape) for _ in range(ranks)]


def ended_well(found, ranks, hint=ALL_SEND):
    """Return what the ranks found; a hang or a mismatch ends the check, with a hint of what to look at."""
    if isinstance(found, dict):
        if "HangError" in found:
            wrong(f"on {ranks} ranks it hangs: {found['HangError']}. {hint}")
        wrong(f"on {ranks} ranks two sides of a message disagree: {found['MismatchError']}")
    for rank, facts in enumerate(found):
        if facts["changed"]:
            wrong(
                f"rank {rank}'s own array was changed: the caller still needs it. Sum into a copy, and remember"
                " that a slice of a NumPy array is a view of it"
            )
        if facts["shared"]:
            wrong(
                f"on {ranks} ranks rank {rank}'s result lies in the memory of its input: who changes one of them"
                " later changes the other. Return a copy"
            )
    return found


def contents(value, parts):
    """Return how often each rank's part is in `value`, if it is a sum of such parts; else None."""
    columns = np.stack([part.ravel() for part in parts], axis=1)
    if value.size != len(columns):
        return None
    times, *_ = np.linalg.lstsq(columns, value.ravel(), rcond=None)
    whole = np.round(times)
    fits = close(columns @ whole, value.ravel())
    return whole.astype(int).tolist() if fits else None


def say_contents(times):
    """Name what is missing and what is there too often."""
    missing = [str(rank) for rank, n in enumerate(times) if n == 0]
    often = [f"that of rank {rank} {n} times" for rank, n in enumerate(times) if n not in (0, 1)]
    said = [f"lacks the part of rank {', '.join(missing)}"] if missing else []
    return " and ".join(said + ([f"contains {', '.join(often)}"] if often else []))


def only_ring_messages(found, ranks, rows, columns):
    """Judge who sent what to whom in a ring."""
    for rank, facts in enumerate(found):
        others = sorted({operation for operation, _ in facts["calls"]} - {"send", "recv"})
        if others:
            wrong(
                f"the communicator's {', '.join(others)} was called: make it from isend and recv alone, that is"
                " what this exercise is about"
            )
        peers = [peer for operation, peer in facts["calls"] if operation == "send"]
        if len(peers) != ranks - 1:
            wrong(
                f"rank {rank} of {ranks} sent {len(peers)} messages; a ring's half has N-1 = {ranks - 1} steps"
                " with one message each"
            )
        if facts["sent"] != (ranks - 1) * rows * columns:
            wrong(
                f"rank {rank} sent {facts['sent']} elements in {ranks - 1} messages; with one chunk of"
                f" {rows * columns} a message it is {(ranks - 1) * rows * columns}: was the whole array sent?"
            )
        if set(peers) != {(rank + 1) % ranks}:
            wrong(
                f"rank {rank} sent to rank {', '.join(map(str, sorted(set(peers))))}: in a ring each rank sends"
                f" to the next only, here to rank {(rank + 1) % ranks}"
            )
    took = max(facts["seconds"] for facts in found)
    step = ALPHA + BETA * 8 * rows * columns
    if took > 1.01 * (ranks - 1) * step:
        wrong(
            f"it took {took / step:.0f} message times; {ranks - 1} steps in which all ranks send at once take"
            f" {ranks - 1}. Some ranks wait for others before they send: begin each step with isend"
        )


@lesson.check("reduce-scatter: rank r ends with chunk r of the sum", points=4)
def check_reduce_scatter(run: Run):
    for ranks in (4, 5, 3, 2, 1):
        arrays = arrays_of(ranks, (ranks * 2, 4), 1)
        chunks = [np.split(x, ranks) for x in arrays]
        sums = np.split(sum(arrays), ranks)
        found = ended_well(run(reduce_scatter, arrays), ranks)
        got = [facts["value"] for facts in found]
        if ranks > 1 and any(np.shape(value) == (ranks * 2, 4) for value in got):
            wrong(f"the whole array was returned: rank r keeps only its chunk, 2 of {2 * ranks} rows here")
        for rank, value in enumerate(got):
            shaped(value, (2, 4), np.float64, f"on {ranks} ranks, rank {rank}'s chunk")
        if close(got, sums):
            continue
        if close(got, sums[1:] + sums[:1]):
            wrong(
                f"on {ranks} ranks rank r has the finished chunk r+1, as in the walkthrough's all-reduce. Here"
                " chunk r is asked for: let the total of chunk c start on rank c+1",
                points=2,
            )
        if close(got, sums[-1:] + sums[:-1]):
            wrong(
                f"on {ranks} ranks rank r has the finished chunk r-1: let the total of chunk c start on rank c+1",
                points=2,
            )
        if close(got, [chunks[rank][rank] for rank in range(ranks)]):
            wrong(
                f"on {ranks} ranks every rank returns its own chunk with nothing added to it: the last of N-1 ="
                f" {ranks - 1} steps is the one that completes chunk r on rank r. Was there one step too few?"
            )
        for rank, value in enumerate(got):
            for c in range(ranks):
                times = contents(value, [chunks[s][c] for s in range(ranks)])
                if times is None or set(times) == {1}:
                    continue
                if sum(times) == 1:
                    wrong(
                        f"on {ranks} ranks rank {rank} ends with rank {times.index(1)}'s chunk {c} alone: what is"
                        " received must be added to the own part of that chunk, and the sum sent on"
                    )
                wrong(
                    f"on {ranks} ranks rank {rank}'s chunk {c} {say_contents(times)}: each rank adds its part"
                    f" once, and it takes N-1 = {ranks - 1} steps"
                )
        wrong(
            f"on {ranks} ranks the chunks are not sums of the ranks' chunks, 2 rows each. In step s a rank sends"
            " what it summed last and adds its own part of that very chunk to what comes: compare the indices"
        )
    found = ended_well(run(reduce_scatter, [np.zeros((0, 2))] * 3), 3)
    for rank, facts in enumerate(found):
        shaped(facts["value"], (0, 2), np.float64, f"of empty arrays, rank {rank}'s chunk")


@lesson.check("reduce-scatter: N-1 messages of a chunk to the next rank, all ranks at once", points=2)
def check_reduce_scatter_traffic(run: Run):
    found = ended_well(run(reduce_scatter, arrays_of(4, (8, 3), 2)), 4)
    only_ring_messages(found, 4, 2, 3)
    alone = ended_well(run(reduce_scatter, arrays_of(1, (2, 3), 2)), 1)
    if alone[0]["calls"]:
        wrong("a single rank sent a message: with N = 1 there are no steps")


@lesson.check("all-gather: every rank has all chunks, in the order of ranks", points=2)
def check_all_gather(run: Run):
    for ranks in (3, 5, 2, 1):
        arrays = arrays_of(ranks, (2, 3), 3)
        found = ended_well(run(all_gather, arrays), ranks)
        right = np.concatenate(arrays)
        for rank, facts in enumerate(found):
            value = shaped(
                facts["value"], (2 * ranks, 3), np.float64, f"on {ranks} ranks, rank {rank}'s result"
            )
            if close(value, right):
                continue
            order = [
                next((s for s in range(ranks) if close(part, arrays[s])), -1)
                for part in np.split(value, ranks)
            ]
            if sorted(order) == list(range(ranks)):
                wrong(
                    f"on {ranks} ranks rank {rank} has the chunks of ranks {order}: joined as they came. In step s"
                    " comes the chunk of rank (rank - 1 - s) % N; put it in that place",
                    points=1,
                )
            if -1 not in order:
                wrong(
                    f"on {ranks} ranks rank {rank} has the chunks of ranks {order}: pass on what came in the step"
                    " before, not the own chunk again"
                )
            wrong(f"on {ranks} ranks place {order.index(-1)} of rank {rank}'s result is no rank's chunk")


@lesson.check("all-gather: N-1 messages of a chunk to the next rank, all ranks at once", points=1)
def check_all_gather_traffic(run: Run):
    only_ring_messages(ended_well(run(all_gather, arrays_of(5, (2, 3), 4)), 5), 5, 2, 3)


@lesson.check("broadcast: every rank has the root's values, for every root", points=3)
def check_broadcast(run: Run):
    for ranks, root in ((1, 0), (2, 0), (2, 1), (4, 0), (8, 3), (3, 2), (5, 0), (6, 4), (7, 6)):
        arrays = arrays_of(ranks, (2, 3), 5 + root)
        found = ended_well(run(broadcast, arrays, root), ranks)
        where = f"on {ranks} ranks with root {root}"
        lacking = []
        for rank, facts in enumerate(found):
            value = shaped(facts["value"], (2, 3), np.float64, f"{where}, rank {rank}'s result")
            if 0 not in (root, rank) and close(value, arrays[0]):
                wrong(
                    f"{where}, rank {rank} has rank 0's values: count ranks from the root, (rank - root) % N"
                )
            if not close(value, arrays[root]):
                lacking.append(rank)
        if lacking:
            wrong(
                f"{where}, rank {', '.join(map(str, lacking))} never got the root's values. Which rank hands them"
                " to it? Draw the rounds: in round k the ranks below 2^k (counted from the root) hand them on to"
                " the rank 2^k further, if there is one"
            )


@lesson.check("broadcast: N-1 messages in ceil(lg N) rounds", points=2)
def check_broadcast_rounds(run: Run):
    for ranks in (8, 6):
        found = ended_well(run(broadcast, arrays_of(ranks, (2, 3), 6), 0), ranks)
        others = sorted({operation for facts in found for operation, _ in facts["calls"]} - {"send", "recv"})
        if others:
            wrong(f"the communicator's {', '.join(others)} was called: make it from send and recv alone")
        sent = sum(operation == "send" for facts in found for operation, _ in facts["calls"])
        if sent != ranks - 1:
            wrong(
                f"on {ranks} ranks {sent} messages were sent; each rank but the root receives once,"
                f" which makes N-1 = {ranks - 1}"
            )
        took = max(facts["seconds"] for facts in found)
        step, rounds = ALPHA + BETA * 48, math.ceil(math.log2(ranks))
        if took > 1.01 * rounds * step:
            most = max(sum(operation == "send" for operation, _ in facts["calls"]) for facts in found)
            if most == ranks - 1:
                wrong(
                    f"the root sends all {ranks - 1} messages itself, one after the other: let the ranks that have"
                    " the array already hand it on too",
                )
            wrong(
                f"on {ranks} ranks it took {took / step:.0f} message times instead of ceil(lg N) = {rounds}: in each"
                " round, every rank that has the array must hand it on"
            )


@lesson.check("what an all-reduce costs", points=2)
def check_seconds(run: Run):
    for n_bytes, ranks, alpha, beta in (
        (8, 64, 1e-5, 1e-9),
        (3e7, 8, 2e-5, 4e-10),
        (1000, 2, 3.0, 7.0),
        (5, 1, 1.0, 1.0),
    ):
        got = run(seconds, n_bytes, ranks, alpha, beta)
        levels, share = ranks.bit_length() - 1, 2 * (ranks - 1) / ranks
        right = {
            "ring": 2 * (ranks - 1) * alpha + share * n_bytes * beta,
            "doubling": levels * (alpha + n_bytes * beta),
            "halving_doubling": 2 * levels * alpha + share * n_bytes * beta,
        }
        if not isinstance(got, dict) or set(got) != set(right):
            wrong(f"a dict with the keys {', '.join(right)} was expected, this came: {got!r:.80}")
        where = f"for {n_bytes:g} bytes on {ranks} ranks with α = {alpha:g} s and β = {beta:g} s"
        for name, expected in right.items():
            value = float(shaped(got[name], (), None, f"the seconds of {name}"))
            if abs(value - expected) <= 1e-9 * max(expected, 1e-12):
                continue
            if ranks > 1 and math.isclose(value, expected / 2):
                wrong(
                    f"{where} {name} is half of what it should be: an all-reduce has two halves, reduce and gather"
                )
            if math.isclose(value, expected - (share * n_bytes * beta) + 2 * (ranks - 1) * n_bytes * beta):
                wrong(
                    f"{where} {name} sends the whole array in each step: a message of the ring is n/N bytes"
                )
            if levels and name != "ring" and math.isclose(value, expected * math.log(2)):
                wrong(
                    f"{where} {name} has {value / alpha:.2f} α: the logarithm counts doublings, so it is to base 2"
                )
            if name == "halving_doubling" and math.isclose(value, expected - levels * alpha):
                wrong(f"{where} halving_doubling has lg N rounds on the way there and lg N on the way back")
            wrong(
                f"{where} {name} takes {expected:.6g} s, not {value:.6g}: count its rounds (times α), then the bytes"
                " that one rank sends in all of them (times β)"
            )


@lesson.check("bug hunt: recursive doubling on any number of ranks", points=4)
def check_doubling(run: Run):
    for ranks in (2, 4, 8, 3, 5, 6, 7):
        arrays = arrays_of(ranks, (3, 3), 8)
        found = ended_well(
            run(doubling, arrays),
            ranks,
            "In each round the two partners must name each other, and every rank that sends needs one who receives",
        )
        got = [facts["value"] for facts in found]
        for rank, value in enumerate(got):
            shaped(value, (3, 3), np.float64, f"on {ranks} ranks, rank {rank}'s sum")
        if not close(got, [sum(arrays)] * ranks):
            rank = next(r for r in range(ranks) if not close(got[r], sum(arrays)))
            times = contents(got[rank], arrays)
            holds = "is no sum of the ranks' arrays" if times is None else say_contents(times)
            if times is not None and sum(times) == 1 and ranks not in (2, 4, 8):
                wrong(
                    f"on {ranks} ranks rank {rank} still holds the array of rank {times.index(1)} alone: whoever"
                    " hands in its part and stays out of the rounds must get the sum back at the end"
                )
            if ranks in (2, 4, 8):
                wrong(f"it was right on {ranks} ranks before; now rank {rank}'s sum {holds}")
            wrong(
                f"on {ranks} ranks rank {rank}'s sum {holds}. `rank ^ distance` names ranks that do not exist, and"
                " skipping them loses what they would have brought along. Which ranks have a partner in every"
                " round, and how can the others hand in their part first?"
            )
        if len({value.tobytes() for value in got}) > 1:
            wrong(
                f"on {ranks} ranks the sums differ in their last bits: the ranks added in different orders. Let all"
                " get the sum from the same additions, or copies of a model drift apart",
                points=2,
            )
        operations = {operation for facts in found for operation, _ in facts["calls"]} - {"send", "recv"}
        if operations:
            wrong(
                f"the communicator's {', '.join(sorted(operations))} was called: mend the rounds themselves"
            )
        levels = ranks.bit_length() - 1
        rounds = levels + (0 if ranks == 1 << levels else 2)
        took = max(facts["seconds"] for facts in found) / (ALPHA + BETA * 72)
        if took > 1.01 * rounds:
            wrong(
                f"right, but on {ranks} ranks it takes {took:.0f} message times instead of {rounds}: only the ranks"
                " above the largest power of two need a round before and one after",
                points=2,
            )
