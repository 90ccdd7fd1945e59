"""Lesson 09, grading: schedules are judged by the engine's own checker and simulator."""

from itertools import pairwise

import numpy as np

import minipar
from minipar.grading import Lesson, Run, close, shaped, wrong
from minipar.parallel.pipeline import FORMULAS, Action, build_schedule, check, simulate

lesson = Lesson(9)
COSTS = {"F": 1.0, "I": 1.5, "W": 0.75}


# What runs beside the submission ------------------------------------------------------------------------------


@lesson.probe
def make_one_f_one_b(submission, stages, microbatches):
    return submission.one_f_one_b(stages, microbatches)


@lesson.probe
def make_zero_bubble(submission, stages, microbatches):
    return submission.zero_bubble(stages, microbatches)


@lesson.probe
def count_live(submission, schedule):
    return submission.peak_live(pairs(schedule))


@lesson.probe
def take_time(submission, schedule, costs, message):
    return submission.simulate(pairs(schedule), costs, message)


@lesson.probe
def take_time_of_a_deadlock(submission, schedule, costs):
    try:
        return {"times": submission.simulate(pairs(schedule), costs)}
    except ValueError:
        return {"refused": True}


@lesson.probe
def train_stages(submission, schedule, weights, inputs, targets):
    def one_rank():
        comm = minipar.world()
        actions = pairs(schedule)[comm.rank]
        return submission.run_stage(comm, actions, weights[comm.rank], inputs, targets)

    return minipar.launch(one_rank, ranks=len(weights), timeout=5)


def pairs(schedule):
    """Return a schedule whose actions are tuples, as the exercise has them."""
    return [[(str(kind), int(i)) for kind, i in actions] for actions in schedule]


# What judges ----------------------------------------------------------------------------------------------------


def built(name, stages, microbatches):
    """Return one of minipar's schedules as pairs."""
    schedule = build_schedule(name, stages, microbatches)
    return [[(a.kind, a.microbatch) for a in actions] for actions in schedule]


def as_schedule(value, stages, microbatches, name):
    """Return a submission's schedule in minipar's words; a value of another form is wrong."""
    call = f"{name}({stages}, {microbatches})"
    if not isinstance(value, list | tuple) or len(value) != stages:
        wrong(f"{call} must return a list of {stages} lists, one a stage; it returned {value!r:.60}")
    schedule = []
    for stage, actions in enumerate(value):
        mine = []
        for action in actions if isinstance(actions, list | tuple) else [actions]:
            pair = isinstance(action, list | tuple) and len(action) == 2
            if not (pair and isinstance(action[0], str) and isinstance(action[1], int | np.integer)):
                wrong(f'{call}: stage {stage} holds {action!r:.60}; an action is a pair such as ("F", 3)')
            mine.append(Action(action[0], int(action[1]), 0, stage))
        schedule.append(mine)
    return schedule


def refuse_problems(schedule, stages, microbatches, name):
    """Say what the checker says of a schedule that cannot be carried out."""
    report = check(schedule, microbatches, 1)
    if report.ok:
        return report
    problem = report.problems[0]
    hint = ""
    if problem.kind == "missing":
        hint = "; every stage runs F and backward of every microbatch: are the last ones drained?"
    if problem.kind in ("misplaced", "missing") and microbatches < stages:
        hint = f"; {microbatches} microbatches are fewer than {stages} stages: is the warm-up cut off at that?"
    if problem.kind == "deadlock":
        hint = "; look at the order in which two neighbours take their microbatches"
    wrong(f"{name}({stages}, {microbatches}) cannot be run: {problem}{hint}")


def forwards_first(actions):
    """Return how many forwards come before the first backward."""
    kinds = [a.kind for a in actions]
    return next((n for n, kind in enumerate(kinds) if kind != "F"), len(kinds))


@lesson.check("1F1B: right, with GPipe's bubble and no more activations than p - s", points=4)
def check_one_f_one_b(run: Run):
    for p, m in ((4, 8), (3, 3), (4, 2), (2, 5), (1, 3)):
        schedule = as_schedule(run(make_one_f_one_b, p, m), p, m, "one_f_one_b")
        call = f"one_f_one_b({p}, {m})"
        split = next((a for actions in schedule for a in actions if a.kind not in ("F", "B")), None)
        if split is not None:
            wrong(f"{call}: there is {split} on stage {split.stage}; 1F1B is made of whole backwards, F and B only")
        report = refuse_problems(schedule, p, m, "one_f_one_b")
        bounds = [min(m, p - s) for s in range(p)]
        live = list(report.peak_live)
        if m > p > 1 and all(forwards_first(actions) == m for actions in schedule):
            wrong(
                f"{call} is GPipe's order: all {m} forwards come before the first backward, so {m} activations are"
                " held; begin with backwards as soon as one can be there"
            )
        if p > 1 and live == [min(m, p)] * p and live != bounds:
            wrong(
                f"{call}: every stage warms up like stage 0 and holds {live[0]} activations; stage s is nearer to the"
                " end by s stages, so it needs p - s - 1 forwards before it alternates"
            )
        if any(n > bound for n, bound in zip(live, bounds)):
            s = next(s for s in range(p) if live[s] > bounds[s])
            wrong(
                f"{call}: stage {s} holds {live[s]} activations, 1F1B at most min(m, p - s) = {bounds[s]}: its warm-up"
                " is too long; the F before its first B belongs to the alternation, it is no part of the warm-up",
                points=2,
            )
        bubble = FORMULAS["1f1b"].bubble(p, m, 1)
        if report.bubble > bubble:
            s = next((s for s in range(p) if forwards_first(schedule[s]) < bounds[s]), 0)
            wrong(
                f"{call} leaves a bubble of {report.bubble}, 1F1B's is {bubble}: before its first backward stage {s}"
                f" runs {forwards_first(schedule[s])} of the {bounds[s]} forwards that fit, and then it idles, as do"
                " the stages behind it",
                points=1,
            )


LIVE = {
    "a 1F1B schedule": built("1f1b", 4, 7),
    "a GPipe schedule": built("gpipe", 3, 5),
    "a ZB-H1 schedule": built("zb-h1", 4, 6),
    "one stage with late W's": [[(k, i) for k, i in zip("FIFIFIWWW", (0, 0, 1, 1, 2, 2, 0, 1, 2))]],
}


def live_counts(schedule, freed_by, at_end=False):
    """Return peak live activations if the kinds in `freed_by` free one; or the count left at the end."""
    peaks = []
    for actions in schedule:
        live, peak = 0, 0
        for kind, _ in actions:
            live += (kind == "F") - (kind in freed_by)
            peak = max(peak, live)
        peaks.append(live if at_end else peak)
    return peaks


@lesson.check("the most activations that each stage holds", points=3)
def check_peak_live(run: Run):
    for name, schedule in LIVE.items():
        right = live_counts(schedule, "BW")
        got = run(count_live, schedule)
        if isinstance(got, list | tuple | np.ndarray) and np.array_equal(got, right):
            continue
        if not isinstance(got, list | tuple | np.ndarray) or len(got) != len(schedule):
            wrong(
                f"peak_live of {name} must be a list of {len(schedule)} numbers, one a stage; it returned {got!r:.60}:"
                " stages have memories of their own, so neither their sum nor the largest of them is the answer"
            )
        got = [int(n) for n in got]
        if got == live_counts(schedule, "BW", at_end=True):
            wrong("peak_live returns what is left at the end; keep the largest count seen on the way")
        if got == live_counts(schedule, "BI"):
            wrong(
                f"peak_live of {name}: an activation was let go after I. W still needs the stage's input, for the"
                " gradient of a weight is input times gradient: count down at W (and at B)",
                points=1,
            )
        if got == live_counts(schedule, "BIW"):
            wrong(f"peak_live of {name}: I and W both counted down; together they are one backward, one activation", 1)
        if got == live_counts(schedule, "B"):
            wrong(f"peak_live of {name}: with a split backward nothing was ever let go; W ends it as B does", 1)
        if got == [n - 1 for n in right]:
            wrong(
                f"peak_live of {name} is one too small on every stage: the activation counts as soon as its F runs,"
                " and still counts while its backward runs",
                points=1,
            )
        wrong(f"peak_live of {name}: expected {right}, got {got}; go through one list by hand, up at F, down at B or W")


def walk(schedule, costs, message, mistake=""):
    """Return the times of every action, right or with one well-known mistake; None if it is stuck."""
    price = {**costs, "B": costs["I"] + (costs["W"] if mistake != "B is I" else 0.0)}
    last, made = len(schedule) - 1, {}
    times, free, moved = [[] for _ in schedule], [0.0] * len(schedule), True
    while moved:
        moved = False
        for s, actions in enumerate(schedule):
            while len(times[s]) < len(actions):
                kind, i = actions[len(times[s])]
                needs = []
                if kind == "F":
                    needs = [("F", s - 1, i)] if s and mistake != "no forward wait" else []
                elif kind == "W":
                    needs = [("own", s, i)]
                else:
                    needs = [("F", s, i)]
                    if s < last and mistake != "no backward wait":
                        needs.append(("back", s + 1, i))
                if any(n not in made for n in needs):
                    break
                arrivals = [made[n] + (message if n[1] != s and mistake != "free messages" else 0.0) for n in needs]
                start = max([0.0 if mistake == "overlap" else free[s], *arrivals])
                if mistake == "sum of waits":
                    start = free[s] + (message if any(n[1] != s for n in needs) else 0.0)
                    start = max([start, *(made[n] for n in needs)])
                end = start + price[kind]
                times[s].append((start, end))
                sends = (kind == "F" and s < last) or (kind in "BI" and s > 0)
                free[s] = end + (message if mistake == "blocking sends" and sends else 0.0)
                if kind == "F":
                    made["F", s, i] = end
                if kind in "BI":
                    made["own", s, i] = end
                if kind == "B" or kind == ("W" if mistake == "gradient after W" else "I"):
                    made["back", s, i] = end
                moved = True
    return times if all(len(t) == len(a) for t, a in zip(times, schedule)) else None


MISTAKES = {
    "free messages": "messages arrive at once; what another stage made is here `message` seconds after its end",
    "B is I": "a B takes only as long as I; a whole backward is I and W together",
    "blocking sends": "a stage stands still while its message travels; messages travel while the stages compute",
    "sum of waits": "the message's time is added after both stages are free; it begins when the action that made it"
    " ends, so take the later of (stage free) and (made + message)",
    "no backward wait": "a backward starts without the gradient of the stage behind; only the last stage has its own",
    "no forward wait": "a forward starts before the stage before has made its input",
    "gradient after W": "the stage before waits for W; what it needs, the gradient of the input, is there after I",
    "overlap": "a stage does several actions at once; an action also waits for the one before it in its list",
}


def same_form(got, right):
    """Return whether there is a pair of numbers for every action of every stage."""
    try:
        return [np.shape(np.asarray(stage, float)) for stage in got] == [(len(stage), 2) for stage in right]
    except (TypeError, ValueError):
        return False


def judge_times(run, name, p, m, message):
    schedule = built(name, p, m)
    right = walk(schedule, COSTS, message)
    got = run(take_time, schedule, COSTS, message)
    if close(got, right, 1e-9):
        return
    what = f"{name}, {p} stages, {m} microbatches, costs {COSTS}, message {message:g}"
    if not same_form(got, right):
        wrong(f"simulate must return, for each stage, one (start, end) for each of its actions ({what})")
    for mistake, message_text in MISTAKES.items():
        if close(got, walk(schedule, COSTS, message, mistake), 1e-9):
            wrong(f"simulate: {message_text} ({what})")
    s, k = next(
        (s, k) for s in range(p) for k in range(len(right[s])) if not close(list(got[s][k]), list(right[s][k]), 1e-9)
    )
    kind, i = schedule[s][k]
    wrong(
        f"simulate: {kind}{i} on stage {s} should take place from {right[s][k][0]:g} to {right[s][k][1]:g}, not"
        f" {float(got[s][k][0]):g} to {float(got[s][k][1]):g}; what does it wait for? ({what})"
    )


@lesson.check("when every action starts and ends, messages costing nothing", points=3)
def check_times(run: Run):
    for name, p, m in (("gpipe", 3, 4), ("1f1b", 4, 6), ("zb-h1", 3, 4)):
        judge_times(run, name, p, m, 0.0)


@lesson.check("messages travel while stages compute", points=2)
def check_messages(run: Run):
    for name, p, m, message in (("1f1b", 3, 5, 0.5), ("zb-h1", 4, 4, 2.25)):
        judge_times(run, name, p, m, message)


DEADLOCK = [
    [("F", 0), ("B", 0), ("F", 1), ("B", 1)],
    [("F", 1), ("F", 0), ("B", 0), ("B", 1)],
]
NEVER_MADE = [[("F", 0), ("F", 1), ("B", 0), ("B", 1)], [("F", 0), ("F", 1), ("B", 0)]]


@lesson.check("a schedule that stands still is refused", points=1)
def check_deadlock(run: Run):
    for name, schedule in (("two stages that wait for each other", DEADLOCK), ("a B1 that is in no list", NEVER_MADE)):
        got = run(take_time_of_a_deadlock, schedule, COSTS, seconds=2)
        if not got.get("refused"):
            wrong(
                f"simulate returned times for {name}; when a pass over all stages moves none of them, and actions are"
                " left, raise ValueError"
            )


@lesson.check("zero bubble: a third of 1F1B's idle time in no more memory", points=4)
def check_zero_bubble(run: Run):
    for p, m in ((4, 8), (3, 3), (2, 6), (5, 7)):
        schedule = as_schedule(run(make_zero_bubble, p, m), p, m, "zero_bubble")
        call = f"zero_bubble({p}, {m})"
        whole = next((a for actions in schedule for a in actions if a.kind == "B"), None)
        if whole is not None:
            wrong(f"{call}: {whole} on stage {whole.stage} is a whole backward; split every B into I and W")
        report = refuse_problems(schedule, p, m, "zero_bubble")
        live = max(report.peak_live)
        bubble, target = simulate(schedule).bubble, FORMULAS["zb-h1"].bubble(p, m, 1)
        if live > p:
            s = report.peak_live.index(live)
            kinds = [a.kind for a in schedule[s]]
            if "I" not in kinds[kinds.index("W") :]:
                wrong(
                    f"{call}: all W's come after the last I, so stage {s} holds {live} activations and the bound is"
                    f" {p}: a W that is put off for ever keeps its activation; let each one follow after some I's",
                    points=1,
                )
            wrong(
                f"{call}: stage {s} holds {live} activations and the bound is {p}: its W's are put off too far."
                " Stage s already holds p - s of 1F1B, so there is room to put W off by s microbatches, no more",
                points=1,
            )
        if bubble > target:
            at_once = all(
                b.kind == "W" and b.microbatch == a.microbatch
                for actions in schedule
                for a, b in pairwise(actions)
                if a.kind == "I"
            )
            if at_once:
                wrong(
                    f"{call}: each W directly follows its I, on every stage: a bubble of {bubble}, and {target} is"
                    " possible. Stages near the end have memory to spare: let stage s put its W's off",
                    points=2,
                )
            wrong(
                f"{call}: a bubble of {bubble} ({float(bubble):.3f}), and {target} ({float(target):.3f}) is possible"
                f" with {p} activations; this holds {live}. Draw it, and see which stage idles at the end",
                points=2,
            )


def serial_gradients(weights, inputs, targets, schedule=None, buffers=None):
    """Return the gradient of every stage's weight; with `buffers`, as if receives shared so many of them."""
    xs, ys, gradients = [], [], [np.zeros_like(w) for w in weights]
    for x in inputs:
        row = [x]
        for w in weights:
            row.append(np.tanh(row[-1] @ w))
        xs.append(row[:-1])
        ys.append(row[1:])
    for i, t in enumerate(targets):
        g = ys[i][-1] - t
        for s in reversed(range(len(weights))):
            g = g * (1 - ys[i][s] ** 2)
            x = xs[i][s]
            if buffers and s:
                x = xs[_last_received(schedule[s], i, buffers)][s]
            gradients[s] += x.T @ g
            g = g @ weights[s].T
    return gradients


def _last_received(actions, i, buffers):
    """Return whose input lies in the buffer of microbatch i when its B runs."""
    before = actions[: actions.index(("B", i))]
    return [j for kind, j in before if kind == "F" and j % buffers == i % buffers][-1]


@lesson.check("the bug hunt: every stage's gradient is the serial one", points=3)
def check_hunt(run: Run):
    rng = np.random.default_rng(9)
    for name, p, m in (("1f1b", 4, 6), ("gpipe", 3, 4)):
        weights = [rng.standard_normal((3, 3)) for _ in range(p)]
        inputs, targets = ([rng.standard_normal((2, 3)) for _ in range(m)] for _ in range(2))
        schedule = built(name, p, m)
        got = run(train_stages, schedule, weights, inputs, targets)
        right = serial_gradients(weights, inputs, targets)
        if close(got, right):
            continue
        for s in range(p):
            shaped(got[s], right[s].shape, "float64", f"run_stage on stage {s}")
        stages = [s for s in range(p) if not close(got[s], right[s])]
        where = f"{name}, {p} stages, {m} microbatches: the gradient is wrong on stage {' and '.join(map(str, stages))}"
        if close(got, serial_gradients(weights, inputs, targets, schedule, 1)):
            wrong(
                f"{where}, and right on stage 0, which receives no activation. A stage with several microbatches in"
                " flight uses the input of a later one: which array does backward read, and who wrote into it last?"
            )
        for n in (2, 3):
            if close(got, serial_gradients(weights, inputs, targets, schedule, n)):
                wrong(
                    f"{where}: {n} receive buffers in turn are too few, more than {n} microbatches are in flight there;"
                    " let every receive have memory of its own",
                    points=1,
                )
        for factor, why in ((1 / m, "divided by the number of microbatches"), (m, "multiplied by it")):
            if close(got, [factor * g for g in right]):
                wrong(f"{where}: it was {why}; the loss is a sum over microbatches, so their gradients add up", 1)
        wrong(f"{where}; compare x at F and at B of the same microbatch, on a stage that receives it")

