"""The flight recorder: after a hang, a mismatch or an abort, where did the ranks part?

Each rank's journal keeps its last 100 communications, with step and phase; to keep one costs nothing beyond the
`Call` that is made anyway, and its words are made only when they are wanted. Collectives are numbered within
their group, so those of all ranks can be laid side by side: `parting` shows the last ones on which the ranks
agree and the first on which they do not. Of a group whose collectives have all dropped out of a record, the last
number is known still.

    where the ranks part, by their last communications in world:
      rank 0                                              ranks 1-2
      all_reduce #6 of (4,) float32 (step 2, backward)    the same
      all_reduce #7 of (4,) float32 (step 2, backward)    broadcast #7(root=0) of (4,) float32 (step 2, backward)
      not called                                          all_reduce #8 of (2,) float32 (step 2, optimizer)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from minipar.comm.guard import Call, Journal, numbered

BEFORE, AFTER = 2, 2  # rows shown of what agrees, and of what does not
COLUMNS = 4  # groups of ranks shown; with more, all but the first are in one
LAST = 3  # messages shown of each rank where no collective differs

Entry = tuple[str, int, str]  # group, number (0: a message), text with step and phase ("": forgotten)


def entries(journal: Journal) -> list[Entry]:
    """Return a rank's record, oldest first, in plain values that can be sent to another rank."""
    record = [(call.group, call.number, _text(call)) for call in list(journal.entries)]
    remembered = {group for group, number, _ in record if number}
    forgotten = [(group, n, "") for group, n in journal.numbers.copy().items() if group not in remembered]
    return forgotten + record


def _text(call: Call) -> str:
    where = ([f"step {call.step}"] if call.step is not None else []) + ([call.phase] if call.phase else [])
    return f"{call} ({', '.join(where)})" if where else str(call)


def parting(records: Mapping[int, Iterable[Sequence[object]]]) -> str:
    """Return what the ranks' records show, as a table for each group that differs; "" for nothing.

    Args:
        records: each rank's `entries`, by its number in the world.
    """
    numbers: dict[str, dict[int, dict[int, str]]] = {}  # group: rank: number: text
    for rank, record in records.items():
        numbers.setdefault("world", {})[rank] = {}
        for group, number, text in record:
            if number:
                numbers.setdefault(str(group), {}).setdefault(rank, {})[int(str(number))] = str(text)
    tables = [_table(group, by_rank) for group, by_rank in numbers.items()]
    if not any(tables):
        tables = [_last_messages(records)]
    return "\n".join(table for table in tables if table)


def _table(group: str, by_rank: dict[int, dict[int, str]]) -> str:
    """Return one group's rows around the first number on which its ranks differ."""
    known = [calls for calls in by_rank.values() if calls]
    if not known or len(by_rank) < 2:
        return ""
    # From here on no record has been overwritten.
    first = max(number if text else number + 1 for number, text in map(_oldest, known))
    last = max(max(calls) for calls in known)
    differ = (n for n in range(first, last + 1) if len({calls.get(n) for calls in by_rank.values()}) > 1)
    parted = next(differ, None)
    if parted is None:
        return ""
    rows = range(max(first, parted - BEFORE), min(parted + AFTER, last + 1))
    alike: dict[tuple[str, ...], list[int]] = {}
    for rank in sorted(by_rank):
        alike.setdefault(tuple(by_rank[rank].get(n, "not called") for n in rows), []).append(rank)
    columns = [[numbered(ranks), *cells] for cells, ranks in alike.items()]
    if len(columns) > COLUMNS:
        columns = [*columns[: COLUMNS - 1], [f"and {len(columns) - COLUMNS + 1} others that differ", *[""] * len(rows)]]
    for column in columns[1:]:
        column[1:] = ["the same" if a == b and a else b for a, b in zip(columns[0][1:], column[1:])]
    return f"where the ranks part, by their last communications in {group}:\n" + _side_by_side(columns)


def _oldest(calls: dict[int, str]) -> tuple[int, str]:
    """Return the lowest number in a record, with its text."""
    return min(calls.items())


def _last_messages(records: Mapping[int, Iterable[Sequence[object]]]) -> str:
    """Return each rank's last messages, where these are all that can differ."""
    columns = []
    for rank in sorted(records)[:COLUMNS]:
        messages = [str(text) for _, number, text in records[rank] if not number][-LAST:]
        columns.append([numbered([rank]), *messages, *[""] * (LAST - len(messages))])
    if len(columns) < 2 or not any(any(column[1:]) for column in columns):
        return ""
    return "the ranks' last messages:\n" + _side_by_side(columns)


def _side_by_side(columns: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in columns]
    lines = ["    ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in zip(*columns)]
    return "\n".join(f"  {line}" for line in lines if line)
