"""Make the autograder of one lesson for Gradescope: `python -m lessons.bundle 04 autograder.zip`."""

from __future__ import annotations

import argparse
import sys
import zipfile
from pathlib import Path

from minipar.errors import MiniparError
from minipar.grading.manifest import Entry, find_entry, load_grader

ROOT = Path(__file__).parents[1]
TOP = ("pyproject.toml", "README.md", "LICENSE", "lessons/lessons.toml")
SCRIPTS = ("setup.sh", "run_autograder")


def bundle(entry: Entry, target: Path) -> int:
    """Write the zip that Gradescope asks for and return how many files it has.

    It holds the two scripts, minipar, the manifest, and the lesson's grader; neither solutions nor other lessons.
    """
    load_grader(entry)
    files = [ROOT / name for name in TOP] + [entry.file("grade.py")]
    files += [
        path
        for path in sorted((ROOT / "minipar").rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    ]
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in SCRIPTS:
            script = zipfile.ZipInfo(name)
            script.external_attr = 0o755 << 16  # may be executed
            archive.writestr(script, (ROOT / "lessons" / "gradescope" / name).read_text())
        archive.writestr("lesson", f"{entry.number:02}\n")
        for path in files:
            archive.write(path, path.relative_to(ROOT))
        return len(archive.namelist())


def main() -> int:
    """Make a bundle; return the exit code."""
    parser = argparse.ArgumentParser(description="Make the autograder of a lesson for Gradescope.")
    parser.add_argument("lesson", help="the lesson's number")
    parser.add_argument("target", type=Path, help="the zip file to write")
    options = parser.parse_args()
    try:
        count = bundle(find_entry(options.lesson), options.target)
    except (MiniparError, OSError) as error:
        print(f"lessons.bundle: {error}", file=sys.stderr)
        return getattr(error, "exit_code", 1)
    print(f"{options.target}: {count} files; upload it as the autograder of the assignment")
    return 0


if __name__ == "__main__":
    sys.exit(main())
