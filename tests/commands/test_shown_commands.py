"""Every `minipar …` command that lessons, notebooks, pages and help texts show is one that the command line takes.

Commands are what stands as `minipar …` in the text, also over a line's end, lines of ```sh blocks, and the
examples of help texts. They are parsed and not run. A name alone (`minipar verify`) only has to be there.
"""

from __future__ import annotations

import inspect
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from minipar.cli import app
from minipar.commands.program import CommandLineError

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "docs/*.md", "lessons/README.md", "lessons/*/exercise.py", "lessons/*/walkthrough.*")
COMMAND: Any = get_command(app)


def text_of(path: Path) -> str:
    """Return a page's text: of programs with the comment signs taken off, of notebooks what is prose."""
    text = path.read_text()
    if path.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    return re.sub(r"(?m)^\s*# ?", "", text) if path.suffix == ".py" else text


def commands_in(text: str) -> list[str]:
    """Return the commands that a text shows."""
    lines = "\n".join(re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL))
    found = [re.sub(r"\s#.*", "", line) for line in re.findall(r"(?m)^(?:\$ )?(minipar .*)", lines)]
    found += re.findall(r"(?<!`)`(minipar [a-z][^`]*)`", text)
    return [" ".join(command.split()) for command in found]


def examples(command: Any = COMMAND) -> Iterator[str]:
    """Yield the examples of a command's help, and of all below it."""
    yield from re.findall(r"Example: (minipar .*)", inspect.cleandoc(command.help or ""))
    for below in getattr(command, "commands", {}).values():
        yield from examples(below)


def shown() -> dict[str, str]:
    """Return each command with the first place that shows it."""
    found = {command: "help" for command in examples()}
    for pattern in PAGES:
        for path in sorted(ROOT.glob(pattern)):
            for command in commands_in(text_of(path)):
                found.setdefault(command, str(path.relative_to(ROOT)))
    return found


def parse(words: list[str]) -> None:
    """Parse a command line as `minipar` does, what `run` starts included; run nothing."""
    command, context = COMMAND, COMMAND.make_context("minipar", list(words))
    while hasattr(command, "commands"):
        name, command, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        if not rest and not hasattr(command, "commands"):
            return  # a name alone
        context = command.make_context(name, rest, parent=context)
    program = context.params.get("program")
    if program and not program.endswith(".py"):
        parse([program, *context.args])


SHOWN = shown()


def test_commands_are_found_in_every_kind_of_place() -> None:
    assert {Path(place).suffix for place in SHOWN.values()} >= {"", ".md", ".py"} and len(SHOWN) > 50
    assert commands_in("as `minipar plan gpt\n--ranks 2` does\n```sh\n$ minipar doctor  # looks\nls\n```") == [
        "minipar doctor", "minipar plan gpt --ranks 2",
    ]  # fmt: skip


@pytest.mark.parametrize("command", [c for c in SHOWN if "…" not in c])
def test_the_command_line_takes_it(command: str) -> None:
    try:
        parse(shlex.split(command)[1:])
    except CommandLineError as error:
        pytest.fail(f"{SHOWN[command]} shows `{command}`: {error.format_message()}")


@pytest.mark.parametrize("wrong", ["plan gpt-175b", "run -n 2 train gpt --zer 1", "tran gpt", "schedule zb-h1 -p two"])
def test_a_wrong_command_is_noticed(wrong: str) -> None:
    with pytest.raises(CommandLineError):
        parse(shlex.split(wrong))
