"""Train, save after every step, be killed in the middle of saves, and go on until it is done.

    python -m tests.checkpoint.killed_runs DIR KILLS                        # ranks are threads of a process
    mpirun -n 2 python -m tests.checkpoint.killed_runs DIR UNTIL [RANK MS]  # one run; RANK kills itself

On threads, this process imports everything once and starts no thread; each of its children goes on from the newest
checkpoint and is killed, at a random moment from the beginning of a save to the usual end of one. When KILLS kills
have left a save unfinished, a last child trains some steps more, and another one the whole run without a cut. Prints
as JSON the steps trained and how many kills came in the middle of a save, and how many did not.

Under mpirun one run goes on from the newest checkpoint to step UNTIL; rank RANK kills itself MS milliseconds after
the save of the second step from there has begun.

Every loss is appended to DIR/losses as "STEP LOSS", the loss as hexadecimal digits.
"""

import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from minipar import launch, world
from minipar.checkpoint import checkpoints, newest
from minipar.checkpoint.folder import PARTIAL, checkpoint_path, step_of
from minipar.comm.launch import ranks_in_environment
from minipar.resume import Saving
from tests.checkpoint.jobs import data, job

PLANNED = 1000  # steps that the learning rate is planned for: more than are taken
FEWER_KILLS_THAN = 10  # kills for each that is to come in the middle of a save
MORE_STEPS = 3  # after the last kill


def train(place: Path, until: int, begins: Callable[[int], None], ends: Callable[[], None]) -> None:
    """Go on from the newest checkpoint, if there is one, to step `until`; tell where saves begin and end."""
    made = job(world(), "gpt", zero=1, steps=PLANNED)
    saving = Saving(place / "saved", every=1, keep=2)
    if checkpoints(saving.directory):
        saving.resume(made)
    for record in made.train() if made.steps_done < until else ():
        if made.comm.rank == 0:
            with (place / "losses").open("a") as file:
                file.write(f"{record.step} {record.loss.hex()}\n")
        begins(record.step)
        saving.after(made)
        ends()
        if record.step == until:
            break


class Child:
    """A process that trains, and tells through a pipe where its saves begin and end."""

    def __init__(self, place: Path, until: int):
        self._heard, say = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:

                def tell(text: str) -> None:
                    if world().rank == 0:
                        os.write(say, text.encode())

                launch(train, 2, place, until, lambda step: tell(f"{step}\n"), lambda: tell("saved\n"))
                code = 0
            finally:
                os._exit(code)
        os.close(say)
        self._lines = os.fdopen(self._heard)

    def hears(self) -> str:
        """Return the next thing that it tells: a step whose save begins, or that the save is through."""
        line = self._lines.readline().strip()
        assert line, "the child has failed"
        return line

    def ended(self) -> int:
        """Wait for its end; return its code, negative for a signal."""
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        self._lines.close()
        return code


def seconds_of_a_save(place: Path) -> float:
    """Train some steps; return how long the longest of their saves took."""
    child, found = Child(place, MORE_STEPS), []
    for _ in range(MORE_STEPS):
        child.hears()
        start = time.perf_counter()
        child.hears()
        found.append(time.perf_counter() - start)
    assert child.ended() == 0
    return max(found)


def in_the_middle(directory: Path, step: int) -> bool:
    """Whether a kill during the save of `step` left it unfinished, or the removal of an old checkpoint."""
    partial = any(path.name.endswith(PARTIAL) for path in directory.iterdir())
    return partial or not checkpoint_path(directory, step).exists()


def kill_many(place: Path, kills: int) -> None:
    data("gpt")
    chosen, directory = random.Random(1), place / "saved"
    longest = seconds_of_a_save(place)
    struck = missed = 0
    while struck < kills:
        assert struck + missed < kills * FEWER_KILLS_THAN, f"only {struck} of {struck + missed} kills struck a save"
        child = Child(place, PLANNED)
        for _ in range(chosen.randrange(2)):  # of the first save, or the second
            child.hears()
            assert child.hears() == "saved"
        step = int(child.hears())
        time.sleep(chosen.random() * longest)
        os.kill(child.pid, signal.SIGKILL)
        assert child.ended() == -signal.SIGKILL
        if in_the_middle(directory, step):
            struck += 1
        else:
            missed += 1
    last = step_of(newest(directory)) + MORE_STEPS
    assert Child(place, last).ended() == 0
    (place / "uncut").mkdir()
    assert Child(place / "uncut", last).ended() == 0
    print(json.dumps({"steps": last, "struck": struck, "missed": missed}))


def train_under_mpi(place: Path, until: int, guilty: int = -1, milliseconds: float = 0.0) -> None:
    saves = []

    def begins(step: int) -> None:
        saves.append(step)
        if world().rank == guilty and len(saves) == 2:
            threading.Timer(milliseconds / 1000, os.kill, (os.getpid(), signal.SIGKILL)).start()

    train(place, until, begins, lambda: None)


if __name__ == "__main__":
    place, *numbers = sys.argv[1:]
    if ranks_in_environment():
        train_under_mpi(Path(place), *map(int, numbers))
    else:
        kill_many(Path(place), int(numbers[0]))
