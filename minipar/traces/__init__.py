"""What to make of spans: a run's trace as a file, as shares of the step, as advice in words, as a picture.

In reading order: file (Chrome-trace JSON, all ranks on one clock), report (where the time of a step goes),
advice (what holds the run back), picture (one step of all ranks), record (what `minipar train --trace` does).
The spans themselves are recorded by `minipar/trace.py`.
"""
