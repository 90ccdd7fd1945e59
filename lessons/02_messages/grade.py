"""Grader of exercise 2. Times are virtual: α = 1 s a message, β = 1/64 s a byte."""

import math

import numpy as np

import minipar
from minipar.comm import Clock
from minipar.grading import Lesson, Run, close, shaped, wrong

lesson = Lesson(2)

ALPHA, BETA = 1.0, 1 / 64


def on_ranks(ranks, work):
    """Return for each rank what `work(comm)` returned, its virtual time, and the messages and bytes it sent."""

    def program():
        comm = minipar.world()
        value = work(comm)
        return {
            "value": value,
            "time": comm.now(),
            "messages": comm.ledger.calls("send"),
            "bytes": comm.ledger.bytes("send"),
        }

    return minipar.launch(program, ranks, clock=Clock(ALPHA, BETA))


def message(n_bytes):
    return ALPHA + BETA * n_bytes


def part(rank, shape=(16,), seed=0):
    """Return the array of one rank: no two ranks' are alike."""
    return np.random.default_rng([seed, rank]).standard_normal(shape)


def values(got):
    return [one["value"] for one in got]


def latest(got):
    return max(one["time"] for one in got)


def or_hung(run, probe, *args, hint):
    """Call a probe; if its ranks hang, add what is the usual reason."""
    try:
        return run(probe, *args, seconds=5)
    except Exception as failure:
        if "wait for each other without end" in str(failure):
            wrong(f"{hint}\n{failure}")
        raise


# exchange -----------------------------------------------------------------------------------------------


@lesson.probe
def exchanged(submission, parts, partners):
    return on_ranks(len(parts), lambda comm: submission.exchange(comm, parts[comm.rank], partners[comm.rank]))


@lesson.check("exchange: both get what the other sent", points=2)
def check_exchange(run: Run):
    for partners in ([1, 0], [2, 3, 0, 1], [0, 2, 1]):
        parts = [part(r, (3 + r, 2), seed=1) for r in range(len(partners))]
        got = or_hung(
            run,
            exchanged,
            parts,
            partners,
            hint="both ranks wait: `send` returns when the other rank receives, and that one sends as well, so it"
            " never gets to its recv (nor does a rank that exchanges with itself). Begin to send with isend,"
            " receive, then wait",
        )
        right = [parts[p] for p in partners]
        if close(values(got), right):
            continue
        if close(values(got), parts):
            wrong("each rank returned its own array: return what was received")
        if any(value is None for value in values(got)):
            wrong("exchange returned None: was `return` forgotten?")
        wrong(f"with the partners {partners}, rank 0 should return rank {partners[0]}'s array, and does not")


@lesson.check("exchange: both messages travel at the same time", points=2)
def check_exchange_time(run: Run):
    parts = [part(r, (16,), seed=2) for r in range(2)]
    got = or_hung(run, exchanged, parts, [1, 0], hint="both ranks wait: see the check before")
    once = message(parts[0].nbytes)
    if close(latest(got), once):
        return
    if close(latest(got), 2 * once):
        wrong(
            f"right, but it takes 2 (α + β n) = {2 * once:g} s: first one message, then the other. isend lets a rank"
            " receive while its own message is on its way",
            points=1,
        )
    wrong(f"it takes {latest(got):g} s where one message takes {once:g} s: are there further messages?")


# shift --------------------------------------------------------------------------------------------------


@lesson.probe
def shifted(submission, parts, distance):
    return on_ranks(len(parts), lambda comm: submission.shift(comm, parts[comm.rank], distance))


@lesson.check("shift: the right array arrives, for any N and distance", points=2)
def check_shift(run: Run):
    for ranks, distance in ((4, 1), (5, 2), (4, -1), (3, 7), (3, 0), (1, 1), (5, -13)):
        parts = [part(r, (4,), seed=3) for r in range(ranks)]
        got = or_hung(
            run,
            shifted,
            parts,
            distance,
            hint=f"on {ranks} ranks, distance {distance}: all ranks wait in a circle, each for its neighbour. With send"
            " before recv nobody gets to its recv: use isend. If a rank has itself as neighbour, that counts, too",
        )
        right = [parts[(r - distance) % ranks] for r in range(ranks)]
        if close(values(got), right):
            continue
        if close(values(got), [parts[(r + distance) % ranks] for r in range(ranks)]):
            wrong(
                f"with distance {distance} the arrays went the wrong way: rank r sends to r + distance, so it receives"
                " from r - distance"
            )
        if close(values(got), parts):
            wrong("each rank returned its own array: return what was received")
        wrong(
            f"on {ranks} ranks with distance {distance}, rank 0 should return the array of rank"
            f" {-distance % ranks}, and does not"
        )


@lesson.check("shift: all messages at the same time", points=2)
def check_shift_time(run: Run):
    for ranks, distance in ((6, 1), (5, 2)):
        parts = [part(r, (16,), seed=4) for r in range(ranks)]
        got = or_hung(run, shifted, parts, distance, hint="all ranks wait: see the check before")
        once = message(parts[0].nbytes)
        sent = max(one["messages"] for one in got)
        if sent > 1:
            wrong(
                f"a rank sent {sent} messages: any distance is one message, straight to the rank it is for, and not one"
                " hop after another"
            )
        if latest(got) > 2.5 * once:
            wrong(
                f"on {ranks} ranks it takes {latest(got):g} s, {latest(got) / once:.0f} messages one after the other:"
                " each rank waits for its neighbour before it sends. Begin with isend",
            )
        if latest(got) > 1.01 * once:
            wrong(
                f"on {ranks} ranks it takes {latest(got):g} s, two messages after one another: odd and even ranks take"
                " turns. That cures the deadlock, but isend lets all go at once",
                points=1,
            )


# relay --------------------------------------------------------------------------------------------------


@lesson.probe
def relayed(submission, ranks, x, pieces):
    def work(comm):
        mine = x.copy() if comm.rank == 0 else np.full_like(x, -1)
        value = submission.relay(comm, mine, pieces)
        return {"array": value, "shared": isinstance(value, np.ndarray) and np.shares_memory(value, mine)}

    return on_ranks(ranks, work)


@lesson.check("relay: every rank has rank 0's array", points=2)
def check_relay(run: Run):
    for ranks, pieces in ((4, 1), (4, 3), (2, 6), (1, 2)):
        x = part(0, (12,), seed=5)
        got = or_hung(
            run,
            relayed,
            ranks,
            x,
            pieces,
            hint=f"on {ranks} ranks in {pieces} pieces: rank 0 has nobody to receive from, and the last rank nobody to"
            " send to; and each rank receives as many pieces as the one before it sends",
        )
        for rank, one in enumerate(values(got)):
            array = shaped(one["array"], x.shape, x.dtype, f"what rank {rank} of {ranks} returned")
            if close(array, x):
                continue
            if (array == -1).any():
                first = int(np.argmax(array == -1))
                wrong(
                    f"on {ranks} ranks in {pieces} pieces, rank {rank} still has its own values from element {first}"
                    " on: is every piece written to its place?"
                )
            if close(np.sort(array), np.sort(x)):
                wrong(
                    f"on {ranks} ranks in {pieces} pieces, rank {rank} has the values of rank 0 in another order"
                )
            first = int(np.argmax(~np.isclose(array, x)))
            wrong(
                f"on {ranks} ranks in {pieces} pieces, rank {rank} has {array[first]:.4g} as element {first}, rank 0"
                f" has {x[first]:.4g}: is every piece stored and handed on just as it came?"
            )
        if any(one["shared"] for one in values(got)):
            wrong(
                "a rank returned `x` itself, or a view of it: the result is promised to be fresh memory",
                points=1,
            )


@lesson.check("relay: pieces follow each other along the chain", points=3)
def check_relay_time(run: Run):
    ranks, pieces = 5, 4
    x = part(0, (32,), seed=6)
    got = run(relayed, ranks, x, pieces, seconds=5)
    once = message(x.nbytes / pieces)
    right, time = (ranks - 2 + pieces) * once, got[-1]["time"]
    if got[0]["messages"] == 1:
        wrong("rank 0 sends the whole array in one message: cut it into `pieces`")
    if any(one["messages"] != pieces for one in got[:-1]):
        sent = [one["messages"] for one in got]
        wrong(
            f"the ranks send {sent} messages; on the chain each sends {pieces} to the next, and the last sends none",
            points=1,
        )
    if close(time, right):
        return
    if close(time, (ranks - 1) * pieces * once):
        wrong(
            f"it takes {time:g} s, (N-1) k messages one after the other: every rank waits for all pieces before it"
            " hands on the first. Send each piece on as soon as it is there",
            points=1,
        )
    if time < right:
        wrong(
            f"it takes {time:g} s, less than a wire allows: several pieces were put on one wire at once with isend. Use"
            " send, one after the other",
            points=1,
        )
    wrong(f"the last rank is done after {time:g} s; (N - 2 + k)(α + β n/k) is {right:g} s", points=1)


# best_pieces --------------------------------------------------------------------------------------------


@lesson.probe
def best(submission, cases):
    return [submission.best_pieces(*case) for case in cases]


def relay_seconds(k, ranks, n_bytes, alpha, beta):
    return (ranks - 2 + k) * (alpha + beta * n_bytes / k)


@lesson.check("best_pieces: the least time", points=3)
def check_best(run: Run):
    cases = [
        (8, 1e6, 1e-5, 1e-9),
        (64, 4e6, 2e-6, 1e-9),
        (5, 1000, 1.0, 1 / 64),
        (2, 1e9, 1e-6, 1e-9),
        (3, 8, 1e-3, 1e-9),
    ]
    rng = np.random.default_rng(7)
    cases += [(int(rng.integers(3, 200)), float(10 ** rng.uniform(3, 8)), 1e-5, 1e-9) for _ in range(20)]
    got = run(best, cases)
    if not isinstance(got, list) or any(k is None for k in got):
        wrong("best_pieces returned None: was `return` forgotten?")
    exact = [math.sqrt((case[0] - 2) * case[3] * case[1] / case[2]) for case in cases]
    right = [
        min((max(1, math.floor(e)), math.floor(e) + 1), key=lambda k, c=c: relay_seconds(k, *c))
        for e, c in zip(exact, cases)
    ]
    if any(k < 1 for k in got):
        case = cases[[k < 1 for k in got].index(True)]
        wrong(
            f"for {case[0]} ranks and {case[1]:g} bytes k is below 1: an array is at least one piece",
            points=1,
        )
    if any(k != int(k) for k in got):
        if close(got, exact, tol=1e-6) or close(got, [max(1.0, e) for e in exact], tol=1e-6):
            wrong("the formula is right, but k is a whole number: compare the two next to it", points=2)
        wrong("k must be a whole number", points=0)
    if [int(k) for k in got] == right:
        return
    rounded = [[max(1, f(e)) for e in exact] for f in (math.floor, round, math.ceil)]
    if [int(k) for k in got] in rounded:
        at = [int(k) == r for k, r in zip(got, right)].index(False)
        wrong(
            f"rounded the wrong way for {cases[at][0]} ranks and {cases[at][1]:g} bytes: {int(got[at])} pieces take"
            f" longer than {right[at]}. The curve is not symmetric: compare both neighbours of the square root",
            points=2,
        )
    off = [math.sqrt((case[0] - 1) * case[3] * case[1] / case[2]) for case in cases]
    if all(abs(k - e) <= 1 for k, e in zip(got, off)):
        wrong(
            "k follows √((N-1) β n/α): the first piece of N-1 hops is in the formula as N - 2 + k", points=1
        )
    inverse = [
        math.sqrt(case[2] / ((case[0] - 2) * case[3] * case[1])) if case[0] > 2 else 1 for case in cases
    ]
    if all(abs(k - max(1, e)) <= 1 for k, e in zip(got, inverse)):
        wrong("the fraction is upside down: more bytes want more pieces, dearer messages want fewer")
    at = [int(k) == r for k, r in zip(got, right)].index(False)
    wrong(
        f"for {cases[at][0]} ranks, {cases[at][1]:g} bytes, α = {cases[at][2]:g} and β = {cases[at][3]:g}, {got[at]}"
        f" pieces take {relay_seconds(max(got[at], 1), *cases[at]):.4g} s and {right[at]} take"
        f" {relay_seconds(right[at], *cases[at]):.4g} s"
    )


# The bug hunt -------------------------------------------------------------------------------------------


@lesson.probe
def smoothed(submission, parts, steps):
    return on_ranks(len(parts), lambda comm: submission.smooth(comm, parts[comm.rank], steps))


def smooth_serial(u, steps):
    for _ in range(steps):
        u = (np.roll(u, 1) + 2 * u + np.roll(u, -1)) / 4
    return u


@lesson.check("the bug hunt: smooth", points=4)
def check_smooth(run: Run):
    for ranks in (3, 4, 2, 1):
        sizes = [4, 3, 1, 5][:ranks]
        u = part(0, (sum(sizes),), seed=8)
        cuts = np.cumsum(sizes)[:-1]
        got = or_hung(
            run,
            smoothed,
            np.split(u, cuts),
            3,
            hint=f"on {ranks} ranks each waits for a message that nobody sends: a tag that is sent must be the one that"
            " is received, seen from the other side",
        )
        if close(values(got), np.split(smooth_serial(u, 3), cuts)):
            continue
        if ranks > 2:
            wrong(
                f"on {ranks} ranks the numbers were right, and are not any longer: which neighbour's cell goes where?"
            )
        wrong(
            f"on {ranks} rank{'s' * (ranks > 1)} the two outer cells are swapped still: left and right are the same"
            " rank then, its two messages arrive in the order in which they were sent, and nothing says which is which."
            " What tells messages between the same two ranks apart?",
        )
