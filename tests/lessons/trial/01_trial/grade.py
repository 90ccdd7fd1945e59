"""Two checks: a function of one array, and one that three ranks run."""

import numpy as np

import minipar
from minipar.grading import Lesson, Run, close, wrong

lesson = Lesson(1, forbidden=("minipar.parallel", "minipar.Mesh"))
X = np.arange(5.0)


@lesson.probe
def doubled(submission, x):
    return {"value": submission.double(x), "kept": [3, None, "text", (True,)]}


@lesson.probe
def summed(submission, x):
    return minipar.launch(lambda: submission.total(minipar.world(), x), ranks=3)


@lesson.check("double", points=2)
def check_double(run: Run):
    got = run(doubled, X, seconds=1.5)
    if not close(got, {"value": 2 * X, "kept": [3, None, "text", (True,)]}):
        wrong("not 2 x")


@lesson.check("total over ranks", points=4)
def check_total(run: Run):
    got = run(summed, X, seconds=1.5)
    if close(got, [X] * 3):
        wrong("each rank has its own", points=1)
    if not close(got, [3 * X] * 3):
        wrong("not the sum")
