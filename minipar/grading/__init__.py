"""Floor 5: grading. What `grade.py` of a lesson is written with, and what runs a submission without harm.

Order of imports: values (what travels between the processes), lesson (checks and probes), manifest (the
list of lessons), names (what a submission imports), child (the process that runs submissions), nursery (the process
that children are forked from), sandbox (their other end), result, progress.

A lesson's `grade.py` has two sides. *Probes* run beside the submission, in a process of its own, and return
plain values; *checks* run in the grader's process, make the right answer themselves, and judge what the
probes returned. The grader never imports a submission.
"""

from minipar.grading.lesson import Lesson, Run, close, shaped, wrong

__all__ = ["Lesson", "Run", "close", "shaped", "wrong"]
