"""One line of the benchmark table, and how it is printed and kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class Line:
    """One measured thing beside its peer.

    Attributes:
        work: what was done.
        ours: minipar's figure, with `unit`.
        peer: the same of the peer, None where there is none.
        peer_name: who the peer is.
        ratio: how good ours is: above 1 is better than the peer; or a share of a limit.
        wanted: what the ratio should at least be; None where it is only reported.
        note: memory, limits, what else is to be known.
    """

    work: str
    ours: float
    unit: str
    peer: float | None = None
    peer_name: str = ""
    ratio: float | None = None
    wanted: float | None = None
    note: str = ""

    @property
    def verdict(self) -> str:
        """"ok", or by how much the ratio falls short; empty where nothing is wanted."""
        if self.wanted is None or self.ratio is None:
            return ""
        return "ok" if self.ratio >= self.wanted else f"{self.ratio / self.wanted - 1:.0%}"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def faster(work: str, ours: float, peer: float, peer_name: str, wanted: float | None, note: str = "") -> Line:
    """Return the line of two times in seconds: the ratio is how many times the peer's speed ours is."""
    return Line(work, ours * 1e3, "ms", peer * 1e3, peer_name, peer / ours, wanted, note)


HEADINGS = ("work", "minipar", "peer", "", "ratio", "wanted", "", "note")


def show(lines: Sequence[Line]) -> str:
    """Return the table as aligned text."""
    rows = [HEADINGS]
    for line in lines:
        peer = "" if line.peer is None else f"{line.peer:.4g} {line.unit}"
        ratio = "" if line.ratio is None else f"{line.ratio:.2f}"
        wanted = "" if line.wanted is None else f"≥ {line.wanted:.2f}"
        ours = f"{line.ours:.4g} {line.unit}"
        rows.append((line.work, ours, peer, line.peer_name, ratio, wanted, line.verdict, line.note))
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADINGS))]
    left = {0, 3, 6, 7}
    texts = [
        "  ".join(c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))) for row in rows
    ]
    return "\n".join(text.rstrip() for text in texts)
