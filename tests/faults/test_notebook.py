"""Ctrl-C in a notebook, which comes as SIGINT to its kernel: the cell ends, its ranks with it, the kernel stays."""

import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.running import GONE_SECONDS, MARK, SLACK, left_of, needs_proc, with_mark

pytestmark = [needs_proc, pytest.mark.mpi]

CELL = "def f():\n    exec({loop!r})\nminipar.launch(f, ranks=2)"
LOOP = "print('ready', flush=True)\nwhile True: minipar.world().all_reduce(np.ones(3))"
SCRIPT = """
import minipar, numpy as np, pathlib, sys
comm = minipar.world()
comm.mark(step=5, phase="forward")
comm.barrier()
pathlib.Path(sys.argv[1]).touch()
while True: comm.all_reduce(np.ones(3))
"""


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, Any, str]]:
    """A notebook's kernel that has imported minipar: its manager, a client, and the mark of what it starts."""
    manager_of = pytest.importorskip("jupyter_client.manager", reason="needs jupyter_client")
    pytest.importorskip("ipykernel", reason="needs ipykernel")
    mark = uuid.uuid4().hex
    monkeypatch.setenv(MARK, mark)
    manager, client = manager_of.start_new_kernel(kernel_name="python3")
    try:
        client.execute("import minipar, numpy as np", reply=True, timeout=60)
        yield manager, client, mark
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
        left_of(mark)


def reply_to(client: Any, request: str) -> dict[str, Any]:
    """Return the reply to a cell, and see that the kernel still does what it is told."""
    while (reply := client.get_shell_msg(timeout=60))["parent_header"].get("msg_id") != request:
        continue
    after = client.execute(
        "assert minipar.launch(lambda: minipar.world().rank, ranks=3) == [0, 1, 2]", reply=True, timeout=60
    )
    assert after["content"]["status"] == "ok", after["content"]
    return reply["content"]


def test_ctrl_c_in_a_notebook_ends_the_cell_and_the_kernel_goes_on(kernel: tuple[Any, Any, str]) -> None:
    manager, client, _ = kernel
    request = client.execute(CELL.format(loop=LOOP))
    while "ready" not in client.get_iopub_msg(timeout=60)["content"].get("text", ""):
        continue
    manager.interrupt_kernel()
    assert reply_to(client, request)["ename"] == "KeyboardInterrupt"


def test_ctrl_c_in_a_notebook_ends_the_mpi_job_of_its_cell(kernel: tuple[Any, Any, str], tmp_path: Path) -> None:
    manager, client, mark = kernel
    script, ready = tmp_path / "script.py", tmp_path / "ready"
    script.write_text(SCRIPT)
    before = len(with_mark(mark))
    run = f"from minipar.comm.launcher import run_script\nrun_script({str(script)!r}, 2, {str(ready)!r})"
    request = client.execute(run)
    while not ready.exists():
        time.sleep(0.02)
    assert len(with_mark(mark)) > before
    start = time.monotonic()
    manager.interrupt_kernel()
    content = reply_to(client, request)
    assert time.monotonic() - start < SLACK
    assert content["ename"] == "CommunicationError" and "step 5, forward] interrupted" in content["evalue"], content
    deadline = time.monotonic() + GONE_SECONDS
    while len(with_mark(mark)) > before and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(with_mark(mark)) == before, "no orphans"
