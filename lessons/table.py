"""Write the table of lessons in README.md anew from lessons.toml: `python -m lessons.table`."""

from __future__ import annotations

from pathlib import Path

from minipar.grading.manifest import read_manifest

README = Path(__file__).with_name("README.md")
BEGIN, END = "<!-- table of lessons: python -m lessons.table -->\n", "<!-- end -->\n"


def table() -> str:
    """Return the table in Markdown."""
    lines = ["| | lesson | what you can answer afterwards | builds on | points |", "|---|---|---|---|---|"]
    for entry in read_manifest(README.parent):
        title = f"[{entry.title}]({entry.name}/walkthrough.ipynb)" if entry.folder.is_dir() else entry.title
        before = " ".join(f"{number:02}" for number in entry.prerequisites)
        lines.append(f"| {entry.number:02} | {title} | {entry.question} | {before} | {entry.points:g} |")
    return "\n".join(lines) + "\n"


def with_table(text: str) -> str:
    """Return the README's text with the table as it should be."""
    head, _, rest = text.partition(BEGIN)
    return head + BEGIN + table() + END + rest.partition(END)[2]


if __name__ == "__main__":
    README.write_text(with_table(README.read_text()))
