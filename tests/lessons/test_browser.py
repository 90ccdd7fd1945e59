"""JupyterLab in a real browser: two notebooks open without a question, run from top to bottom, and show pictures.

Needs the `lessons` and `browser` extras and a Chromium or Chrome of the system; skips with the reason otherwise.
MINIPAR_SCREENSHOTS names a directory to keep the screenshots in.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.lessons.lesson_files import ENTRIES, LESSONS

pytestmark = [pytest.mark.lessons, pytest.mark.timeout(400)]

NUMBERS = (1, 4)  # lessons whose notebooks are run
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
START_SECONDS, RUN_SECONDS = 90, 200
SETTINGS = {
    # otherwise JupyterLab only draws the cells that are in view
    "@jupyterlab/notebook-extension/tracker.jupyterlab-settings": {"windowingMode": "none"},
    "@jupyterlab/apputils-extension/notification.jupyterlab-settings": {"fetchNews": "false"},
}
TOKEN = "a-token-of-this-test"

FINISHED = """() => {
  const prompts = [...document.querySelectorAll('.jp-CodeCell .jp-InputArea-prompt')].map(p => p.textContent.trim());
  return prompts.length > 5 && prompts.every(p => /^\\[\\d+\\]:$/.test(p));
}"""
CLEARED = """() => document.querySelectorAll('.jp-OutputArea-output').length == 0
  && [...document.querySelectorAll('.jp-CodeCell .jp-InputArea-prompt')].every(p => p.textContent.trim() == '[ ]:')"""
PICTURES = """() => [...document.querySelectorAll('.jp-OutputArea-output img')].map(
  i => [i.naturalWidth, i.naturalHeight, i.getBoundingClientRect().width]
)"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """JupyterLab on a copy of the lessons; its address."""
    pytest.importorskip("jupyterlab", reason="pip install -e '.[lessons]'")
    folder = tmp_path_factory.mktemp("jupyter")
    shutil.copytree(LESSONS, folder / "lessons", ignore=shutil.ignore_patterns("__pycache__"))
    for name, setting in SETTINGS.items():
        path = folder / "settings" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(setting))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "JUPYTERLAB_SETTINGS_DIR": str(folder / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(folder / "workspaces"),
        "JUPYTER_CONFIG_DIR": str(folder / "config"),
        "JUPYTER_DATA_DIR": str(folder / "data"),
        "JUPYTER_RUNTIME_DIR": str(folder / "runtime"),
    }
    options = ["--no-browser", "--allow-root", f"--port={port}", "--ServerApp.port_retries=0"]
    options += [f"--IdentityProvider.token={TOKEN}"]
    with (folder / "log").open("wb") as log:
        job = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *options, f"--notebook-dir={folder / 'lessons'}"],
            env=environment, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    try:
        wait_for(f"http://127.0.0.1:{port}/api/status?token={TOKEN}", job, folder / "log")
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(job.pid, signal.SIGTERM)
        try:
            job.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(job.pid, signal.SIGKILL)
            job.wait()


def wait_for(address: str, job: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            if job.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"JupyterLab did not start:\n{log.read_text()[-3000:]}")
            time.sleep(0.2)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install -e '.[browser]'")
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"no browser is installed (looked for {', '.join(BROWSERS)})")
    with playwright.sync_playwright() as engine:
        opened = engine.chromium.launch(
            executable_path=found, args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        yield opened
        opened.close()


@pytest.mark.parametrize("number", NUMBERS)
def test_notebook_runs_in_jupyterlab(number: int, server: str, browser: Any, tmp_path: Path) -> None:
    entry = next(entry for entry in ENTRIES if entry.number == number)
    notebook = json.loads(entry.file("walkthrough.ipynb").read_text())
    expected = sum(
        "image/png" in output.get("data", {})
        for cell in notebook["cells"]
        for output in cell.get("outputs", [])
    )
    page = browser.new_page(viewport={"width": 1280, "height": 1600})
    page.goto(f"{server}/lab/workspaces/of-{number}/tree/{entry.name}/walkthrough.ipynb?token={TOKEN}")
    page.wait_for_function(FINISHED, timeout=1000 * START_SECONDS)  # with the outputs that are committed
    page.get_by_text("| Idle").wait_for(timeout=1000 * START_SECONDS)  # the kernel, in the status bar
    assert page.locator(".jp-Dialog").count() == 0, "it opens without asking for a kernel"
    choose(page, "Edit", "Clear Outputs of All Cells")
    page.wait_for_function(CLEARED)
    choose(page, "Run", "Run All Cells")
    page.wait_for_function(FINISHED, timeout=1000 * RUN_SECONDS)
    keep = Path(os.environ.get("MINIPAR_SCREENSHOTS", tmp_path))
    page.locator(".jp-OutputArea-output img").first.scroll_into_view_if_needed()
    page.screenshot(path=keep / f"{entry.name}.png")
    errors = page.locator("[data-mime-type='application/vnd.jupyter.error']")
    assert errors.count() == 0, errors.first.inner_text()
    pictures = page.evaluate(PICTURES)
    assert len(pictures) == expected > 0
    assert all(min(sizes) > 100 for sizes in pictures), pictures
    assert page.locator(".jp-Dialog").count() == 0, page.locator(".jp-Dialog").first.inner_text()
    page.close()


def choose(page: Any, menu: str, item: str) -> None:
    """Choose an item of JupyterLab's menu bar."""
    page.locator(".lm-MenuBar-itemLabel", has_text=menu).first.click()
    page.locator(".lm-Menu-itemLabel", has_text=item).first.click()
