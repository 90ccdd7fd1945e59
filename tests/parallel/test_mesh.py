"""The mesh: who is whose neighbour, for every layout of up to eight ranks; printing; refusals."""

import numpy as np
import pytest

from minipar import launch, world
from minipar.errors import UsageError
from minipar.mesh import Mesh, factorings, resolve


def test_factorings_are_complete() -> None:
    assert sorted(factorings(4)) == sorted([(1, 1, 4), (1, 4, 1), (4, 1, 1), (1, 2, 2), (2, 1, 2), (2, 2, 1)])
    for n in range(1, 9):
        every = {(a, b, c) for a in range(1, 9) for b in range(1, 9) for c in range(1, 9) if a * b * c == n}
        assert set(factorings(n)) == every and len(factorings(n)) == len(every)


@pytest.mark.parametrize("ranks", range(1, 9))
def test_every_layout_groups_the_right_ranks(ranks: int) -> None:
    def run() -> None:
        comm = world()
        for dp, pp, tp in factorings(ranks):
            mesh = Mesh(comm, dp, pp, tp)
            d, p, t = comm.rank // (pp * tp), comm.rank // tp % pp, comm.rank % tp
            assert mesh.shape == {"dp": dp, "pp": pp, "tp": tp}
            assert mesh.place == {"dp": d, "pp": p, "tp": t}
            assert mesh.tp.members == tuple((d * pp + p) * tp + i for i in range(tp))
            assert mesh.pp.members == tuple((d * pp + i) * tp + t for i in range(pp))
            assert mesh.dp.members == tuple((i * pp + p) * tp + t for i in range(dp))
            assert (mesh.dp.rank, mesh.pp.rank, mesh.tp.rank) == (d, p, t)
            names = [axis.name for axis in (mesh.dp, mesh.pp, mesh.tp)]
            assert [name.split("/")[-1].rstrip("0123456789") for name in names] == ["dp", "pp", "tp"]
            # Ranks of one name are one group, ranks of different groups have different names.
            for name, members in {(a.name, a.members) for a in (mesh.dp, mesh.pp, mesh.tp)}:
                others = comm.all_gather_object([(a.name, a.members) for a in (mesh.dp, mesh.pp, mesh.tp)])
                assert {m for pairs in others for n, m in pairs if n == name} == {members}

    launch(run, ranks, timeout=20)


def test_one_axis_may_be_left_open() -> None:
    assert resolve(8, None, 2, 2) == {"dp": 2, "pp": 2, "tp": 2}
    assert resolve(6, 3, 1, None) == {"dp": 3, "pp": 1, "tp": 2}
    assert launch(lambda: Mesh(world()).shape, 3) == [{"dp": 3, "pp": 1, "tp": 1}] * 3


def test_grid() -> None:
    assert launch(lambda: str(Mesh(world(), 2, 1, 2)), 4)[3].splitlines() == [
        "mesh of 4 ranks: dp 2 × pp 1 × tp 2",
        "      tp 0    tp 1",
        "dp 0  rank 0  rank 1",
        "dp 1  rank 2  rank 3",
    ]
    assert launch(lambda: str(Mesh(world(), 2, 2, 2)), 8)[0].splitlines() == [
        "mesh of 8 ranks: dp 2 × pp 2 × tp 2",
        "pp 0  tp 0    tp 1",
        "dp 0  rank 0  rank 1",
        "dp 1  rank 4  rank 5",
        "pp 1  tp 0    tp 1",
        "dp 0  rank 2  rank 3",
        "dp 1  rank 6  rank 7",
    ]


@pytest.mark.parametrize(
    ("ranks", "sizes", "message"),
    [
        (4, (3, 1, 1), "dp 3 × pp 1 × tp 1 = 3 does not fit 4 ranks; for example --dp 4 --pp 1 --tp 1 would"),
        (8, (2, 2, 4), "tp 4 = 16 does not fit 8 ranks; for example --dp 2 --pp 1 --tp 4 would"),
        (6, (None, 1, 4), "pp 1 × tp 4 = 4 does not fit 6 ranks; for example --dp 6 --pp 1 --tp 1 would"),
        (4, (0, 1, 1), "dp = 0 must be at least 1"),
        (4, (None, None, 2), "only one of dp, pp, tp can be left open, not dp and pp"),
    ],
)
def test_refusals_name_what_would_fit_on_every_rank(ranks: int, sizes: tuple, message: str) -> None:
    def run() -> tuple[str, int]:
        with pytest.raises(UsageError) as error:
            Mesh(world(), *sizes)
        assert isinstance(error.value, ValueError)
        return str(error.value), world().ledger.calls()

    found = launch(run, ranks)
    assert found == [found[0]] * ranks and found[0][1] == 0
    assert found[0][0].startswith("mesh: ") and found[0][0].endswith(message)


def test_what_is_offered_as_an_example_fits() -> None:
    refused = 0
    for ranks in range(1, 9):
        for sizes in [(a, b, c) for a in (None, 3, 5) for b in (1, 2, 7) for c in (1, 4)]:
            try:
                assert np.prod(list(resolve(ranks, *sizes).values())) == ranks
            except UsageError as error:
                words = str(error).split(" for example ")[1].split()
                assert int(words[1]) * int(words[3]) * int(words[5]) == ranks
                refused += 1
    assert refused > 50
