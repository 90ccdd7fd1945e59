"""One line of the benchmark table, and how it is printed and kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

NOT_MEASURED = "not measured"


@dataclass
class Line:
    """One measured thing beside its peer.

    Attributes:
        work: what was done.
        ours: minipar's figure, with `unit`; None where nothing could be measured, and the note says why.
        peer: the same of the peer, None where there is none.
        peer_name: who the peer is.
        ratio: how good ours is: above 1 is better than the peer; or a share of a limit.
        wanted: what the ratio should at least be; None where it is only reported.
        note: memory, limits, what else is to be known.
    """

    work: str
    ours: float | None
    unit: str = ""
    peer: float | None = None
    peer_name: str = ""
    ratio: float | None = None
    wanted: float | None = None
    note: str = ""

    @property
    def verdict(self) -> str:
        """"ok", by how much the ratio falls short, or "not measured"; empty where nothing is wanted."""
        if self.wanted is None:
            return "" if self.ours is not None else NOT_MEASURED
        if self.ratio is None:
            return NOT_MEASURED
        return "ok" if self.ratio >= self.wanted else f"{self.ratio / self.wanted - 1:.0%}"

    def cells(self) -> tuple[str, ...]:
        """Return the line as the texts under HEADINGS."""
        figures = ["" if x is None else f"{x:.4g} {self.unit}".strip() for x in (self.ours, self.peer)]
        ratio = "" if self.ratio is None else f"{self.ratio:.2f}"
        wanted = "" if self.wanted is None else f"≥ {self.wanted:.2f}"
        return self.work, *figures, self.peer_name, ratio, wanted, self.verdict, self.note

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"verdict": self.verdict}


def faster(work: str, ours: float, peer: float, peer_name: str, wanted: float | None, note: str = "") -> Line:
    """Return the line of two times in seconds: the ratio is how many times the peer's speed ours is."""
    return Line(work, ours * 1e3, "ms", peer * 1e3, peer_name, peer / ours, wanted, note)


def close(work: str, ours: float, expected: float, unit: str, name: str, within: float, note: str = "") -> Line:
    """Return the line of a figure that should be near another, on either side.

    The ratio is 1 less the deviation as a share of what was expected, so `within` 0.1 wants 0.9 of it.
    """
    deviation = ours / expected - 1
    told = f"{deviation:+.1%}, allowed ±{within:.0%}" + (f"; {note}" if note else "")
    return Line(work, ours, unit, expected, name, 1 - abs(deviation), 1 - within, told)


HEADINGS = ("work", "minipar", "peer", "", "ratio", "wanted", "", "note")
LEFT = {0, 3, 6, 7}


def show(lines: Sequence[Line]) -> str:
    """Return the table as aligned text."""
    rows = [HEADINGS, *(line.cells() for line in lines)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADINGS))]
    texts = [
        "  ".join(c.ljust(w) if i in LEFT else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))) for row in rows
    ]
    return "\n".join(text.rstrip() for text in texts)


def markdown(lines: Sequence[Line]) -> str:
    """Return the table in Markdown."""
    bars = ["---" if i in LEFT else "---:" for i in range(len(HEADINGS))]
    rows = [HEADINGS, bars, *(line.cells() for line in lines)]
    return "\n".join("| " + " | ".join(cell.replace("|", "/") for cell in row) + " |" for row in rows)
