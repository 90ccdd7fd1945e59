"""The ledger's own arithmetic; that both engines count alike is in the scenarios."""

from fractions import Fraction

import numpy as np

from minipar.comm import Ledger, launch, world
from minipar.comm.collectives import ALGORITHMS
from minipar.comm.ledger import ring_factor


def test_rows_totals_and_reset() -> None:
    ledger = Ledger()
    row = ledger.row("all_reduce", "world", 3)
    row.calls, row.elements, row.bytes = 2, 10, 40
    other = ledger.row("all_gather", "world/dp0", 2)
    other.calls, other.elements, other.bytes = 1, 6, 48
    assert ledger.row("all_reduce", "world", 3) is row
    assert ledger.calls() == 3 and ledger.elements(group="world") == 10 and ledger.bytes("all_gather") == 48
    assert ledger.ring_elements() == Fraction(2 * 2 * 10, 3) + Fraction(6, 2)
    assert ledger.total("all_reduce").ring_elements == Fraction(40, 3)
    assert ledger.as_dict() == {("all_reduce", "world"): (2, 10, 40), ("all_gather", "world/dp0"): (1, 6, 48)}
    table = str(ledger).splitlines()
    assert len(table) == 3 and table[1].split() == ["all_reduce", "world", "2", "10", "40", "13.3333"]
    ledger.reset()
    assert ledger.as_dict() == {} and ledger.calls() == 0 and row.elements == 0


def test_groups_of_one_name_and_different_sizes_are_told_apart_and_added_up() -> None:
    ledger = Ledger()
    for ranks, elements in ((4, 80), (2, 20)):
        row = ledger.row("all_reduce", "world/tp0", ranks)
        row.calls, row.elements, row.bytes = 1, elements, 4 * elements
    assert ledger.ring_elements() == 80 * Fraction(6, 4) + 20
    assert ledger.as_dict() == {("all_reduce", "world/tp0"): (2, 100, 400)}
    assert ledger.table().splitlines()[1].split() == ["all_reduce", "world/tp0", "2", "100", "400", "140"]


def test_ring_factors() -> None:
    assert ring_factor("all_reduce", 4) == Fraction(6, 4)
    assert ring_factor("reduce_scatter", 4) == ring_factor("all_gather", 4) == Fraction(3, 4)
    assert ring_factor("all_reduce", 1) == 0 and ring_factor("recv", 5) == 0 and ring_factor("send", 5) == 1


def test_textbook_algorithms_are_counted_as_their_sends() -> None:
    n, ranks = 24, 4

    def program(name: str) -> tuple[int, int]:
        comm = world()
        ALGORITHMS[name](comm, np.ones(n))
        assert {operation for operation, _ in comm.ledger.as_dict()} <= {"send", "recv"}
        return comm.ledger.calls("send"), comm.ledger.elements("send")

    ring = (2 * (ranks - 1), 2 * (ranks - 1) * n // ranks)
    assert launch(program, ranks, "ring") == [ring] * ranks
    assert launch(program, ranks, "doubling") == [(2, 2 * n)] * ranks
    assert launch(program, ranks, "halving_doubling") == [(4, 2 * 3 * n // 4)] * ranks
    assert sum(sends for sends, _ in launch(program, ranks, "tree")) == 2 * (ranks - 1)


def test_refused_calls_are_not_counted() -> None:
    def program() -> dict[tuple[str, str], tuple[int, int, int]]:
        comm = world()
        for call in (lambda: comm.all_reduce(np.ones(1), "mean"), lambda: comm.send(np.ones(1), 9)):
            try:
                call()
            except ValueError:
                continue
        return comm.ledger.as_dict()

    assert launch(program, 2) == [{}, {}]
