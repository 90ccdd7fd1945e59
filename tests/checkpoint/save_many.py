"""Kill processes that save, many times: `python -m tests.checkpoint.save_many DIR KILLS`.

This process imports everything once and starts no thread; each of its children saves again and again until
it is killed at a random moment. After each kill the newest checkpoint is loaded. Prints as JSON how many
kills left a save half done, and the step that each loaded.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from minipar import launch, world
from minipar.checkpoint import newest
from minipar.checkpoint.folder import PARTIAL
from minipar.resume import resume, save_job
from tests.checkpoint.jobs import data, job

MOST_STEPS = 10**6


def save_until_killed(directory: Path, step: int, say: int) -> None:
    made = job(world(), "gpt", zero=1, steps=MOST_STEPS)
    while True:
        step += 1
        made.steps_done = step  # the state is that of the start: only saving is looked at
        if world().rank == 0:
            os.write(say, b".")
        save_job(made, directory, keep=2)


def kill_one(directory: Path, step: int, seconds: float) -> None:
    """Let a child save from `step` on, and kill it that long after its third save has begun."""
    hear, say = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            launch(save_until_killed, 2, directory, step, say)
        finally:
            os._exit(1)
    os.close(say)
    for _ in range(3):
        assert os.read(hear, 1), "the child has failed"
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(hear)


def main(directory: Path, kills: int) -> None:
    data("gpt")
    chosen, half_done, loaded, step = random.Random(1), 0, [], 0
    for _ in range(kills):
        kill_one(directory, step, chosen.random() * 0.03)
        half_done += any(path.name.endswith(PARTIAL) for path in directory.iterdir())
        made = job(world(), "gpt", steps=MOST_STEPS)
        assert resume(made, directory) == newest(directory)
        step = made.steps_done
        loaded.append(step)
    print(json.dumps({"half_done": half_done, "loaded": loaded}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
