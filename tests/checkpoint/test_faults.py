"""Saves that are killed or cannot be written, and files that are not what they were."""

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from minipar import launch, world
from minipar.checkpoint import SaveFailed, checkpoints, newest, open_checkpoint
from minipar.checkpoint import folder as folder_module
from minipar.checkpoint.manifest import VERSION, Manifest, check, read_manifest
from minipar.checkpoint.shard_file import DTYPES, write_shard
from minipar.errors import DataError, MiniparError, UsageError
from minipar.resume import resume, save_job
from tests.checkpoint.jobs import assert_same, job, pass_on, saved_state, steps, train_and_save

FLIPS = 200


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of two shards."""
    directory = tmp_path_factory.mktemp("saved")
    train_and_save(2, directory, "mlp", 1, zero=1)
    return newest(directory)


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    shutil.copytree(saved, tmp_path / saved.name)
    return tmp_path / saved.name


def refused(path: Path, *said: str, ranks: int = 1) -> MiniparError:
    """Loading is refused with one line that has these parts, the same on every rank."""

    def program() -> MiniparError:
        made = job(world(), "mlp")
        before = made.model.state_dict()
        with pytest.raises((DataError, UsageError)) as caught:
            resume(made, path)
        after = made.model.state_dict()
        assert all(after[name].tobytes() == value.tobytes() for name, value in before.items()), "nothing was loaded"
        return caught.value

    errors = launch(program, ranks)
    assert len({str(error) for error in errors}) == 1 and "\n" not in str(errors[0])
    for part in said:
        assert part in str(errors[0]), errors[0]
    return errors[0]


@pytest.mark.parametrize("name", ("shard-00000.safetensors", "shard-00001.safetensors", "manifest.json"))
def test_every_kind_of_truncation_is_refused_and_names_the_file(name: str, copy: Path) -> None:
    file = copy / name
    whole = file.read_bytes()
    header = int.from_bytes(whole[:8], "little") if name.startswith("shard") else 40
    for length in (0, 4, 8, 8 + header // 2, 8 + header, (8 + header + len(whole)) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        error = refused(copy, str(file), ranks=2 if length == 4 else 1)
        assert "truncated" in str(error) or "damaged" in str(error)
    file.write_bytes(whole + b"\0")
    refused(copy, str(file))


def test_any_flipped_bit_is_refused_and_names_the_file(copy: Path) -> None:
    chosen = random.Random(0)
    files = sorted(copy.iterdir())
    assert len(files) == 3
    for i in range(FLIPS):
        file = files[i % 3]
        whole = bytearray(file.read_bytes())
        place, bit = chosen.randrange(len(whole)), chosen.randrange(8)
        whole[place] ^= 1 << bit
        file.write_bytes(whole)
        with pytest.raises(DataError) as caught:
            open_checkpoint(copy)
        assert str(file) in str(caught.value) and "\n" not in str(caught.value), (place, bit)
        whole[place] ^= 1 << bit
        file.write_bytes(whole)
    open_checkpoint(copy)


def test_missing_extra_and_foreign_shards_are_refused_on_every_rank(copy: Path, tmp_path: Path) -> None:
    shard = copy / "shard-00001.safetensors"
    whole = shard.read_bytes()
    shard.unlink()
    refused(copy, str(shard), "missing", ranks=3)
    train_and_save(2, tmp_path / "other", "mlp", 1, zero=1, seed=1)
    foreign = newest(tmp_path / "other") / shard.name
    assert foreign.stat().st_size == len(whole), "only its sum tells it apart"
    shutil.copy(foreign, shard)
    refused(copy, str(shard), "another run", ranks=3)
    shard.write_bytes(whole)
    extra = copy / "shard-00002.safetensors"
    extra.write_bytes(whole)
    refused(copy, str(extra), "not of this checkpoint", ranks=2)
    extra.unlink()
    (copy / "manifest.json").unlink()
    refused(copy, str(copy / "manifest.json"), ranks=2)


def rewritten(copy: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a manifest and make its sum right again, as a program with a fault might."""
    from minipar.checkpoint import manifest as module

    body = json.loads((copy / "manifest.json").read_text())
    body.pop("sha256")
    change(body)
    (copy / "manifest.json").write_text(module._text({**body, "sha256": module._sum(body)}))


def test_a_newer_format_is_refused(copy: Path) -> None:
    rewritten(copy, lambda body: body.update(version=VERSION + 1))
    assert isinstance(refused(copy, "manifest.json", f"version {VERSION + 1}", "newer"), UsageError)


def test_a_version_that_a_flipped_bit_raised_is_no_newer_format(copy: Path) -> None:
    file = copy / "manifest.json"
    text = file.read_text()
    assert f'"version": {VERSION},' in text
    file.write_text(text.replace(f'"version": {VERSION},', f'"version": {VERSION ^ 2},'))
    assert isinstance(refused(copy, str(file), "damaged"), DataError)


def test_elements_stored_twice_or_not_at_all_are_refused(copy: Path) -> None:
    whole = (copy / "manifest.json").read_bytes()

    def longest(body: dict[str, Any]) -> list[Any]:
        return max((t["blocks"] for t in body["tensors"]), key=len)

    rewritten(copy, lambda body: longest(body).pop())
    refused(copy, "manifest.json", "elements are stored")
    (copy / "manifest.json").write_bytes(whole)
    rewritten(copy, lambda body: longest(body).append(longest(body)[0]))
    refused(copy, "manifest.json", "stored twice")
    (copy / "manifest.json").write_bytes(whole)
    rewritten(copy, lambda body: body["tensors"].append(body["tensors"][0]))
    refused(copy, "manifest.json", "listed 2 times")
    manifest = read_manifest_of(whole, copy)
    check(manifest)


def read_manifest_of(whole: bytes, copy: Path) -> Manifest:
    (copy / "manifest.json").write_bytes(whole)
    return read_manifest(copy)


@pytest.mark.parametrize(
    ("changes", "said"),
    (
        ({"seed": 1}, "--seed 0 (now 1)"),
        ({"width": 16}, "--width 8 (now 16)"),
        ({"optimizer": "sgd"}, "--optimizer adamw (now sgd)"),
        ({"lr": 0.5}, "--lr 0.01 (now 0.5)"),
        ({"batch": 11}, "--batch 10 (now 11)"),
        ({"dtype": "float64"}, "--dtype float32 (now float64)"),
    ),
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_a_checkpoint_of_another_run_is_refused_and_what_differs_is_named(
    changes: dict[str, Any], said: str, saved: Path
) -> None:
    def program() -> str:
        with pytest.raises(UsageError) as caught:
            resume(job(world(), "mlp", **changes), saved)
        return str(caught.value)

    messages = launch(program, 2)
    assert messages[0] == messages[1] and said in messages[0] and str(saved) in messages[0]
    assert messages[0].count("(now") == 1


def test_more_steps_are_allowed_and_fewer_than_done_are_not(saved: Path, tmp_path: Path) -> None:
    made = job(world(), "mlp", steps=9)
    resume(made, saved)
    assert len(steps(made, 20)) == 8
    save_job(made, tmp_path)
    with pytest.raises(UsageError, match="beyond --steps 8"):
        resume(job(world(), "mlp", steps=8), tmp_path)


def test_what_a_checkpoint_cannot_hold_is_refused_by_name(tmp_path: Path) -> None:
    def program() -> None:
        with pytest.raises(UsageError, match="aggregation local"):
            save_job(job(world(), "mlp", aggregation="local"), tmp_path / "none")
        with pytest.raises(UsageError, match=r"keep is 0: .* at least 1"):
            save_job(job(world(), "mlp"), tmp_path / "none", keep=0)
        assert not (tmp_path / "none").exists()

    launch(program, 2)
    assert not (tmp_path / "none").exists()


def test_a_killed_save_is_cleaned_up_by_the_next_one(saved: Path, tmp_path: Path) -> None:
    stale = tmp_path / "step-00000009.partial"
    shutil.copytree(saved, stale)
    other = tmp_path / "notes.partial"
    other.mkdir()
    with pytest.raises(UsageError, match="no checkpoint"):
        newest(tmp_path)
    train_and_save(1, tmp_path, "mlp", 1)
    assert not stale.exists() and other.exists(), "and nothing that is not a save's"
    assert [p.name for p in checkpoints(tmp_path)] == ["step-00000001"]


def test_a_save_of_another_job_that_is_alive_is_left_alone(tmp_path: Path) -> None:
    made = job(world(), "mlp")
    lock = folder_module.begin(tmp_path, 7)
    for step in (7, 8):
        made.steps_done = step
        with pytest.raises(UsageError, match=f"another job is saving into {tmp_path}: end it, or give each"):
            save_job(made, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000007.partial"]
    os.close(lock)
    save_job(made, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000008"], "now it was one that has ended"
    made.steps_done = 9
    save_job(made, tmp_path)


def test_old_checkpoints_that_cannot_be_removed_do_not_discredit_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(5, "Input/output error")

    def program() -> str:
        made = job(world(), "mlp")
        with pytest.raises(SaveFailed) as caught:
            for made.steps_done in (1, 2):
                save_job(made, tmp_path, keep=1)
        return str(caught.value)

    monkeypatch.setattr(folder_module, "remove_old", full)
    messages = launch(program, 2)
    assert messages[0] == messages[1] and "untouched" not in messages[0]
    assert f"{tmp_path / 'step-00000001'} is complete, but older ones" in messages[0]
    assert "Input/output error; remove them" in messages[0]
    open_checkpoint(newest(tmp_path))


def test_an_array_that_the_format_does_not_know_is_named(tmp_path: Path) -> None:
    arrays = {dtype: np.ones((2, 3), dtype) for dtype in DTYPES}
    write_shard(tmp_path / "known", arrays, {})
    read = load_file(tmp_path / "known")
    assert all(read[dtype].dtype == dtype and np.array_equal(read[dtype], arrays[dtype]) for dtype in DTYPES)
    with pytest.raises(UsageError, match="wte is complex64, which cannot be stored; what can: bool, int8"):
        write_shard(tmp_path / "unknown", {"wte": np.ones(2, "complex64")}, {})
    assert not (tmp_path / "unknown").exists()


def test_old_checkpoints_go_only_when_the_new_one_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = job(world(), "mlp")
    for _ in made.train():
        if made.steps_done <= 3:
            save_job(made, tmp_path, keep=2)
            continue
        assert [p.name for p in checkpoints(tmp_path)] == ["step-00000002", "step-00000003"]
        whole = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(folder_module, "flush_directory", full)
            with pytest.raises(SaveFailed, match="No space left on device"):
                save_job(made, tmp_path, keep=2)
        assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == whole
        break
    with pytest.raises(UsageError, match="exists already"):
        made.steps_done = 3
        save_job(made, tmp_path)


FULL_DISK = """
import resource, sys
from pathlib import Path
from minipar import launch, world
from minipar.checkpoint import SaveFailed, checkpoints, open_checkpoint
from minipar.resume import save_job
from tests.checkpoint.jobs import job, data
directory = Path(sys.argv[1])
data("gpt")
def program(fits):
    made = job(world(), "gpt", zero=1)
    made.steps_done = 1 if fits else 2
    try:
        save_job(made, directory, keep=1)
    except SaveFailed as error:
        return str(error)
assert launch(program, 2, True) == [None, None]
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
first, second = launch(program, 2, False)
assert first == second and "of step 2 cannot be written" in first and str(directory) in first, first
assert [p.name for p in directory.iterdir()] == ["step-00000001"]
open_checkpoint(checkpoints(directory)[0])
"""


def test_a_file_that_does_not_fit_on_the_disk_fails_on_every_rank_and_harms_nothing(tmp_path: Path) -> None:
    """The largest file the system allows is set below a shard's size: a write really fails half way."""
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_a_directory_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    read_only = tmp_path / "read-only"
    read_only.mkdir()
    read_only.chmod(0o500)
    places = [tmp_path / "file" / "checkpoints"] + ([] if os.geteuid() == 0 else [read_only])

    def program(place: Path) -> str:
        with pytest.raises(SaveFailed) as caught:
            save_job(job(world(), "mlp"), place)
        return str(caught.value)

    for place in places:
        messages = launch(program, 2, place)
        assert messages[0] == messages[1] and str(place) in messages[0] and "cannot be written" in messages[0]


def test_a_good_checkpoint_loads_in_all_these_tests(copy: Path, tmp_path: Path) -> None:
    pass_on(3, copy, tmp_path / "again", "mlp", zero=3)
    assert_same(saved_state(copy), saved_state(tmp_path / "again"))
