"""A hostfile run over TCP: two network namespaces of this machine, joined by a cable, are two hosts."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from minipar.comm.launcher import find_mpirun, is_open_mpi
from tests.faults.running import SLACK, Outcome, needs_proc, python_command, run

NETWORK = "10.211.77"
WRAPPER = """#!/bin/sh
# Stands for ssh: drop its options, find the namespace of the host, run the rest there, where no signal to the
# process group here arrives.
while [ "${{1#-}}" != "$1" ]; do shift; done
case $1 in {network}.1) host={one} ;; *) host={two} ;; esac
shift
exec setsid -w ip netns exec $host sh -c "$*"
"""
SCRIPT = """
import os, signal, subprocess, sys, time
import numpy as np
from minipar import world
comm = world()
addresses = subprocess.run(["ip", "-4", "-brief", "addr"], capture_output=True, text=True).stdout
here = [word for word in addresses.split() if word.startswith("{network}")]
everywhere = comm.all_gather_object(here)
big = comm.all_reduce(np.arange(200_000.0))  # more than fits a packet
assert (big == comm.size * np.arange(200_000.0)).all()
if comm.rank == 0:
    print("hosts", *sum(everywhere, []), flush=True)
comm.mark(step=7, phase="forward")
comm.barrier()
if sys.argv[1] == "killed" and comm.rank == 1:
    print("ready", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[1] == "stuck":
    if comm.rank == 1:
        print("ready", flush=True)
    comm.recv(1 - comm.rank)
if sys.argv[1] == "computes" and comm.rank == 0:
    comm.recv(1)
if sys.argv[1] == "computes" and comm.rank == 1:
    time.sleep(0.5)  # by then the other is inside MPI; were it not, it would hear the signal at once
    print("ready", flush=True)
    while True:
        time.sleep(0.01)
comm.barrier()
"""


class Hosts(NamedTuple):
    """Two namespaces, and what a job needs to run on them."""

    names: tuple[str, str]
    file: Path
    script: Path
    settings: dict[str, str]

    def run(self, what: str, number: int | None = None) -> Outcome:
        """Run the script from the first host, whence mpirun reaches both; a signal's `number` is the launcher's."""
        command = python_command("minipar", "run", "-n", 2, "--hostfile", self.file, self.script, what)
        return run(["ip", "netns", "exec", self.names[0], *command], number, limit=100, **self.settings)


def ip(*words: str) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=20)
    if done.returncode:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


def wait_for_carrier(name: str, end: str, seconds: float = 30.0) -> None:
    """Wait until an end of the cable carries: the kernel says so up to a second after both are up.

    Until then UCX finds no network there, and the other host unreachable.
    """
    deadline = time.monotonic() + seconds
    while "state UP" not in ip("-n", name, "link", "show", "dev", end):
        assert time.monotonic() < deadline, f"no carrier on {end} after {seconds:.0f} s"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2's ip")
    if is_open_mpi(find_mpirun()):
        pytest.skip("the wrapper stands for ssh as MPICH's mpirun calls it")
    place, number = tmp_path_factory.mktemp("hosts"), os.getpid()
    one, two, cable, plug = f"mini{number}a", f"mini{number}b", f"ma{number}", f"mb{number}"
    made = []
    try:
        try:
            for name in (one, two):
                ip("netns", "add", name)
                made.append(name)
            ip("link", "add", cable, "netns", one, "type", "veth", "peer", "name", plug, "netns", two)
            for name, end, address in ((one, cable, 1), (two, plug, 2)):
                ip("-n", name, "addr", "add", f"{NETWORK}.{address}/24", "dev", end)
                ip("-n", name, "link", "set", end, "up")
                ip("-n", name, "link", "set", "lo", "up")
            for name, end in ((one, cable), (two, plug)):
                wait_for_carrier(name, end)
        except OSError as error:
            pytest.skip(f"no network namespaces: {error}")
        wrapper, file, script = place / "wrapper", place / "hosts", place / "script.py"
        wrapper.write_text(WRAPPER.format(network=NETWORK, one=one, two=two))
        wrapper.chmod(0o755)
        file.write_text(f"{NETWORK}.1:1\n{NETWORK}.2:1\n")
        script.write_text(SCRIPT.format(network=NETWORK))
        launcher = {"HYDRA_LAUNCHER": "ssh", "HYDRA_LAUNCHER_EXEC": str(wrapper), "UCX_TLS": "tcp,self"}
        yield Hosts((one, two), file, script, launcher)
    finally:
        for name in made:
            ip("netns", "del", name)


pytestmark = [needs_proc, pytest.mark.mpi]


def test_a_job_runs_on_two_hosts_over_tcp(hosts: Hosts) -> None:
    job = hosts.run("well")
    assert job.code == 0 and not job.lines() and not job.orphans, job
    assert job.out.split() == ["hosts", f"{NETWORK}.1/24", f"{NETWORK}.2/24"]


def test_a_rank_killed_on_the_other_host_is_named(hosts: Hosts) -> None:
    job = hosts.run("killed")
    assert job.code != 0 and not job.orphans, job
    named = [line for line in job.err.splitlines() if " died " in line]
    assert named and named[0].startswith("minipar: rank 1 died in step 7, forward (killed by a signal"), job.err
    assert job.seconds < SLACK


@pytest.mark.parametrize(("number", "code"), ((signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)))
def test_signals_to_the_launcher_end_the_ranks_on_both_hosts(number: int, code: int, hosts: Hosts) -> None:
    job = hosts.run("stuck", number)
    assert job.code == code and job.seconds < SLACK and not job.orphans, job
    how = "interrupted" if number == signal.SIGINT else "ended by SIGTERM"  # which comes of a killed launcher, too
    assert job.lines() == [f"[rank 0, step 7, forward] {how}"], job.err


def test_ranks_that_compute_wait_for_one_that_is_stuck_to_end_alike(hosts: Hosts) -> None:
    """The one acts on a signal at once, the other a second later; each host would say so for itself."""
    job = hosts.run("computes", signal.SIGTERM)
    assert job.code == 143 and job.seconds < SLACK and not job.orphans, job
    assert job.lines() == ["[rank 0, step 7, forward] ended by SIGTERM"], job.err
