"""Images in tiles that flow through the stages: equal to serial where the model allows it, refused elsewhere."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import minipar
from minipar import nn
from minipar.data import Batch
from minipar.data.tiles import parse_tiles, tiles
from minipar.errors import UsageError
from minipar.models import PatchNet, PatchNetConfig
from minipar.models.patchnet import PatchBlock
from minipar.parallel.pipeline.tile_check import check_tiles
from minipar.tensor import Tensor
from minipar.training import Job
from tests.commands.command_line import assert_one_line
from tests.commands.command_line import minipar as command
from tests.pipeline.runs import prove, settings


@pytest.mark.parametrize(
    "ranks, options",
    [
        (2, dict(pp=2, tiles="2x2")),
        (2, dict(pp=2, tiles="2x1", schedule="zb-h1", recompute=True)),
        (2, dict(pp=2, tiles="2x2", schedule="interleaved", chunks=2)),
        (4, dict(pp=2, dp=2, tiles="4x2", schedule="gpipe", zero=1)),
        (3, dict(pp=3, tiles="1x4", accumulate=2)),
    ],
)
def test_equals_serial(ranks: int, options: dict[str, Any]) -> None:
    prove(ranks, "patchnet", **options)


def test_microbatches_are_tiles() -> None:
    """Every stage but the first gets a quarter of the positions of every image at once, not whole images."""
    config = settings("patchnet", pp=2, tiles="2x2")

    def run() -> list[tuple[int, ...]]:
        job = Job(config, minipar.world())
        pieces = job.strategy.cut(next(iter(job.loader)))  # type: ignore[attr-defined]
        return [piece.inputs.shape for piece in pieces]

    assert minipar.launch(run, 2, timeout=20) == [[(5, 1, 4, 4)] * 4] * 2


def batch(height: int, width: int, patch: int = 1) -> Batch:
    x = np.arange(2 * 3 * height * width, dtype=float).reshape(2, 3, height, width)
    t = np.arange(2 * height * width // patch**2).reshape(2, height // patch, width // patch)
    return Batch(x, t, np.arange(2), offset=0, samples=2, count=t.size)


def test_tiles_cover_each_pixel_and_target_once() -> None:
    whole = batch(4, 6, patch=2)
    pieces = tiles(whole, 2, 3)
    assert [p.inputs.shape for p in pieces] == [(2, 3, 2, 2)] * 6
    rows = [np.concatenate([p.inputs for p in pieces[row : row + 3]], axis=3) for row in (0, 3)]
    np.testing.assert_array_equal(np.concatenate(rows, axis=2), whole.inputs)
    assert sorted(int(t) for p in pieces for t in p.targets.ravel()) == list(range(12))
    assert {p.count for p in pieces} == {whole.count}, "of the whole batch: pieces are summed over it"


@pytest.mark.parametrize(
    "layer, said",
    [
        (nn.Conv2d(4, 4, 3, padding=1), "reads 3 × 3 pixels"),
        (nn.Conv2d(4, 4, 2, stride=1), "reads 2 × 2 pixels"),
        (nn.Conv2d(4, 4, 2, stride=2, dilation=2), "reads 2 × 2 pixels"),
        (nn.GroupNorm(2, 4), "normalises over all positions"),
        (nn.BatchNorm2d(4), "normalises over all positions"),
        (nn.MaxPool2d(3, 1, 1), "reach into another tile"),
        (nn.GlobalAvgPool2d(), "pools over the whole image"),
        (nn.Linear(4, 4), "takes all positions"),
        (nn.Dropout(0.5), "mask"),
        (nn.LayerNorm(4), "is not known to treat every position alone"),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, nn.Module) else "",
)
def test_what_mixes_positions_is_named(layer: nn.Module, said: str) -> None:
    model = PatchNet(PatchNetConfig(width=4))
    check_tiles(model, (2, 2))
    model.layers[1].extra = layer  # type: ignore[attr-defined]
    with pytest.raises(UsageError, match=f"layers.1.extra.*{said}.*--microbatches"):
        check_tiles(model, (2, 2))


def test_what_no_module_shows_is_found_by_trying() -> None:
    class Centred(PatchBlock):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x - x.mean((2, 3), keepdims=True))

    model = PatchNet(PatchNetConfig(width=4))
    model.blocks[2] = Centred(4)
    with pytest.raises(UsageError, match=r"block 2 \(Centred\) computes something else on tiles"):
        check_tiles(model, (2, 2))
    assert not any(p.is_materialized for p in model.parameters()), "the trial leaves no values behind"


VERIFY = ("--ranks", 2, "--pp", 2, "--steps", 1)


@pytest.mark.parametrize(
    "words, said",
    [
        (("convnet", *VERIFY, "--tiles", "2x2"), ("stem.conv reads 3 × 3 pixels", "patchnet")),
        (("mlp", *VERIFY, "--tiles", "2x2"), ("layers.0.fc takes all positions",)),
        (("gpt", *VERIFY, "--tiles", "2x2"), ("--tiles has no meaning for gpt",)),
        (("patchnet", *VERIFY, "--tiles", "2"), ("--tiles 2", "such as 2x2")),
        (("patchnet", *VERIFY, "--tiles", "3x2"), ("3 rows of tiles do not divide 4 rows of patches",)),
        (("patchnet", *VERIFY, "--tiles", "2x2", "--microbatches", 3), ("3 microbatches", "leave --microbatches out")),
        (("patchnet", "--ranks", 2, "--tiles", "2x2"), ("give --pp above 1",)),
        (("patchnet", "--ranks", 4, "--pp", 2, "--tp", 2, "--tiles", "2x2"), ("tensor parallelism",)),
        (("patchnet", *VERIFY, "--patch", 3), ("--patch 3 does not divide images of 8 × 8",)),
    ],
)  # fmt: skip
def test_wrong_usage(words: tuple[object, ...], said: tuple[str, ...]) -> None:
    assert_one_line(command("verify", *words), 2, *said)


def test_each_patch_is_seen_alone() -> None:
    """Other pixels in one patch change the logits there and nowhere else."""
    model = PatchNet(PatchNetConfig(channels=2, classes=3, width=4, patch=2)).materialize(0, "float64")
    x = np.random.default_rng(0).standard_normal((1, 2, 6, 4))
    before = model(Tensor(x)).data
    assert before.shape == (1, 3, 2, 3)  # (N, h, w, classes)
    x[0, :, 2:4, 0:2] += 1.0
    changed = (model(Tensor(x)).data != before).any(-1)
    np.testing.assert_array_equal(changed, [[[False, False], [True, False], [False, False]]])


def test_the_command_runs_it() -> None:
    done = command("verify", "patchnet", *VERIFY, "--tiles", "2x2")
    assert done.code == 0, done


def test_parse() -> None:
    assert parse_tiles("2X3") == (2, 3)
    for text in ("0x2", "2x", "ax2", "2x2x2", "-1x2"):
        with pytest.raises(UsageError):
            parse_tiles(text)
