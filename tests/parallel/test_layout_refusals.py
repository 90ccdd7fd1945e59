"""What does not fit the ranks or the model is refused before any communication, alike on every rank."""

import re

import pytest

from minipar import launch, world
from minipar.agreement import is_on_every_rank
from minipar.config import TrainConfig
from minipar.errors import UsageError
from minipar.parallel.distribute import Recipe
from minipar.training import Job, fitting_axes
from tests.parallel.layout_cases import data_of
from tests.parallel.refusals import all_refusals, check


def test_a_job_refuses_before_any_communication() -> None:
    check(launch(lambda: all_refusals(world()), 3))


def test_one_of_the_ranks_speaks_for_all() -> None:
    with pytest.raises(UsageError) as error:
        fitting_axes(TrainConfig(model="gpt", tp=3, heads=4).resolved(), 3)
    assert is_on_every_rank(error.value)
    with pytest.raises(UsageError, match="4 heads do not divide width 10") as error:
        fitting_axes(TrainConfig(model="gpt", width=10, heads=4).resolved(), 3)
    assert is_on_every_rank(error.value)


PIPED, CUT = {"dp": 1, "pp": 2, "tp": 1}, {"dp": 1, "pp": 1, "tp": 2}


@pytest.mark.parametrize(
    ("recipe", "sizes", "said"),
    [
        ({"aggregation": "foo"}, {}, "aggregation 'foo' is unknown: use one of all_reduce, master, local"),
        ({"average_every": 2}, {}, "--average-every is for --aggregation local"),
        ({"aggregation": "local", "overlap": True}, {}, "--overlap is for --aggregation all_reduce"),
        ({"schedule": "gpipe"}, {}, "--schedule describes a pipeline"),
        ({"microbatches": 7}, {}, "--microbatches describes a pipeline"),
        ({"chunks": 3}, CUT, "--chunks describes a pipeline"),
        ({"tiles": (2, 2)}, {}, "--tiles describes a pipeline"),
        ({"schedule": "nonsense"}, PIPED, "schedule 'nonsense' is unknown: use one of naive, gpipe"),
        ({"convolution": "output"}, {}, "--convolution says how --tp cuts a convolution"),
        ({"convolution": "output", "plan": {}}, CUT, "leave convolution out, or the plan"),
    ],
    ids=str,
)
def test_options_of_a_recipe_that_would_do_nothing(recipe: dict, sizes: dict, said: str) -> None:
    with pytest.raises(UsageError, match=re.escape(said)):
        Recipe(**recipe).check({"dp": 2, "pp": 1, "tp": 1, **sizes})


@pytest.mark.parametrize("policy", ("cost", "devices"))
def test_dp_is_refused_where_stages_take_all_ranks(policy: str) -> None:
    with pytest.raises(UsageError, match=f"--dp 7 with --partition {policy}: its stages take all ranks"):
        TrainConfig(model="mlp", partition=policy, dp=7).resolved()
    assert TrainConfig(model="mlp", partition=policy, dp=7, pp=2).resolved().dp == 7


def test_what_fits_gives_the_sizes_of_the_axes() -> None:
    def axes(ranks: int, **settings: object) -> tuple[int, ...]:
        return tuple(fitting_axes(TrainConfig(**settings).resolved(), ranks).values())  # type: ignore[arg-type]

    assert axes(8, model="gpt", tp=2) == (4, 1, 2)
    assert axes(3, model="mlp", partition="cost", dp=1) == (1, 3, 1)
    assert axes(3, model="mlp", partition="count") == (3, 1, 1)
    assert axes(8, model="gpt", pp=2, schedule="interleaved", layers=4) == (4, 2, 1)


def test_memory_alone_leaves_devices_equally_fast() -> None:
    """Blocks of 448, 224 and 96 bytes: the first device has room for one of them, not for two."""
    config = TrainConfig(
        model="mlp", width=7, partition="devices", devices="1xA,1xB", memory="A=500B", device="cpu"
    ).resolved()
    data = data_of(config)

    def run() -> tuple[list[float], list[int]]:
        assignment = Job(config, world(), data).assignment
        assert assignment is not None and assignment.stages is not None
        return [d.speed for d in assignment.devices], [len(stage) for stage in assignment.stages]

    assert launch(run, 2) == [([1.0, 1.0], [1, 2])] * 2
