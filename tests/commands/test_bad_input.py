"""What a user gets wrong is one line that names it, with exit code 2 for usage and 1 for a failure."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from tests.commands.command_line import SMALL, assert_one_line, idx_folder, minipar, process, write_idx

TRUNCATE = -7


@pytest.mark.parametrize(
    ("words", "said"),
    [
        # the command line itself
        (("frobnicate",), ("No such command", "frobnicate")),
        (("train",), ("Missing argument", "minipar train --help")),
        (("train", "mlp", "--width"), ("--width", "requires an argument")),
        (("train", "mlp", "--frob", 3), ("No such option", "--frob")),
        (("train", "mlp", "--steps", "many"), ("--steps", "integer", "; see minipar train --help")),
        # settings that are unknown or have no meaning
        (("train", "resnet"), ("model 'resnet' is unknown", "mlp, convnet, gpt")),
        (("train", "mlp", "--heads", 2), ("--heads has no meaning for mlp", "gpt")),
        (("train", "gpt", "--norm", "batch"), ("--norm has no meaning for gpt", "convnet")),
        (("train", "mlp", "--dtype", "float8"), ("--dtype 'float8'", "float32, float64")),
        (("train", "mlp", "--dtype", "float16"), ("--dtype 'float16'", "float32, float64")),
        (("train", "mlp", "--device", "tpu"), ("--device 'tpu'", "auto, cpu, cuda")),
        (("train", "mlp", "--optimizer", "lion"), ("--optimizer 'lion'", "adamw")),
        (("train", "mlp", "--aggregation", "gossip"), ("--aggregation 'gossip'", "local")),
        (("train", "convnet", "--norm", "layer"), ("--norm 'layer'", "group, batch")),
        # values out of range
        (("train", "mlp", "--steps", 0), ("--steps is 0", "at least 1")),
        (("train", "mlp", "--batch", -4), ("--batch is -4",)),
        (("train", "gpt", "--seq-len", 0), ("--seq-len is 0",)),
        (("train", "mlp", "--lr", 0), ("--lr is 0", "positive")),
        (("train", "mlp", "--lr", "nan"), ("--lr is nan", "finite")),
        (("train", "mlp", "--clip", "inf"), ("--clip is inf", "finite")),
        (("train", "mlp", "--seed", -1), ("--seed is -1",)),
        (("train", "mlp", "--dropout", 1), ("--dropout is 1", "[0, 1)")),
        (("train", "mlp", "--bucket-mb", 0), ("--bucket-mb is 0",)),
        (("train", "mlp", "--ranks", 0), ("--ranks is 0", "at least 1")),
        # combinations that cannot be
        (("train", "mlp", "--momentum", 0.9), ("--momentum is for --optimizer sgd",)),
        (("train", "mlp", "--average-every", 2), ("--average-every is for --aggregation local",)),
        (("train", "mlp", "--overlap", "--aggregation", "master"), ("--overlap is for",)),
        (("train", "convnet", "--norm", "batch", "--accumulate", 2), ("--norm batch", "use group")),
        (("train", "convnet", "--norm", "batch", "--aggregation", "local"), ("--norm batch", "group")),
        (("verify", "mlp", "--optimizer", "adamw"), ("--optimizer sgd", "adamw hides")),
        (("verify", "mlp", "--aggregation", "local"), ("use --clip 0",)),
        (("verify", "mlp", "--aggregation", "local", "--average-every", 2), ("use --average-every 1",)),
        (("verify", "mlp", "--aggregation", "local", "--clip", 0, "--momentum", 0.5), ("use --momentum 0",)),
        # sizes that do not divide or fit
        (("train", "gpt", "--width", 10, "--heads", 4), ("4 heads do not divide width 10", "[1, 2, 5]")),
        (("train", "mlp", "--dp", 2), ("dp 2", "does not fit 1 ranks", "--dp 1")),
        (("train", "mlp", "--dp", 3, "--ranks", 2), ("dp 3", "does not fit 2 ranks", "--dp 2")),
        # layouts that do not fit the model, the ranks or each other
        (("train", "gpt", "--tp", 3, "--ranks", 3), ("h.0.attn.c_attn.weight", "do not divide 4 heads", "1, 2, 4")),
        (("verify", "gpt", "--tp", 3, "--ranks", 3), ("h.0.attn.c_attn.weight", "3 ranks", "1, 2, 4 ranks would")),
        (("verify", "mlp", "--ranks", 3, "--dp", 7, "--partition", "cost"), ("--dp 7 with --partition cost",)),
        (("train", "mlp", "--ranks", 2, "--dp", 2, "--partition", "devices"), ("--dp 2 with --partition devices",)),
        (("train", "mlp", "--ranks", 3, "--partition", "bytes", "--tp", 3), ("partition by bytes", "not with tensor")),
        (("train", "mlp", "--ranks", 3, "--partition", "cost", "--zero", 1), ("partition by cost", "ZeRO")),
        (("train", "mlp", "--ranks", 4, "--partition", "cost"), ("4 devices for 3 blocks", "at most 3 devices")),
        (("train", "gpt", "--ranks", 2, "--sequence-parallel"), ("sequence parallelism", "--tp above 1")),
        (("train", "convnet", "--ranks", 2, "--convolution", "region"), ("--convolution", "--tp above 1")),
        (("train", "gpt", "--ranks", 2, "--zero", 4), ("--zero is 4", "1, 2 and 3")),
        (("train", "mlp", "--ranks", 2, "--speeds", "A=1"), ("--speeds and --memory", "--devices")),
        (
            ("train", "mlp", "--ranks", 2, "--partition", "devices", "--devices", "3xA", "--speeds", "A=1"),
            ("devices '3xA' are 3, there are 2 ranks",),
        ),
        (
            ("train", "mlp", "--ranks", 2, "--partition", "devices", "--devices", "1xA,1xB"),
            ("type A has no speed", "A=0.5"),
        ),
        # data of the wrong kind
        (("train", "mlp", "--data", "docs"), ("docs is text, and images is wanted",)),
        (("train", "gpt", "--data", "digits"), ("digits is images, and text is wanted",)),
        (("train", "gpt", "--data", "/no/such/file"), ("unknown data '/no/such/file'", "docs, digits")),
    ],
)  # fmt: skip
def test_wrong_usage(words: tuple[object, ...], said: tuple[str, ...], tmp_path: Path) -> None:
    if words[0] == "train" and len(words) > 1:
        words = (*words, *(() if words[-1] == "--width" else ("--out", tmp_path / "run")))
    assert_one_line(minipar(*words), 2, *said)
    assert not (tmp_path / "run").exists(), "nothing is written"


@pytest.mark.skipif(find_spec("cupy") is not None, reason="there may be a GPU here")
def test_a_gpu_that_is_not_there(tmp_path: Path) -> None:
    done = minipar("train", "mlp", "--device", "cuda", "--out", tmp_path)
    assert_one_line(done, 2, "cuda")


# Data --------------------------------------------------------------------------------------------------


def text_file(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("ranks", (1, 3))
def test_unusable_text(ranks: int, tmp_path: Path) -> None:
    def train(content: bytes) -> object:
        data = text_file(tmp_path / "text", content)
        return minipar("train", "gpt", "--data", data, "--ranks", ranks, "--out", tmp_path / "run")

    assert_one_line(train(b""), 1, "text is empty")
    assert_one_line(train(b"abc\xff" * 100), 1, "not UTF-8", "0xff at offset 3")
    assert_one_line(train(b"short"), 2, "has 5 characters", "smaller seq_len")


@pytest.mark.parametrize("ranks", (1, 3))
def test_unusable_images(ranks: int, tmp_path: Path) -> None:
    folder = idx_folder(tmp_path / "idx")
    images, labels = folder / "train-images-idx3-ubyte", folder / "train-labels-idx1-ubyte"

    def train() -> object:
        return minipar("train", "convnet", "--data", folder, "--ranks", ranks, "--out", tmp_path / "run")

    whole = images.read_bytes()
    images.write_bytes(whole[:TRUNCATE])
    assert_one_line(train(), 1, images.name, "is truncated", f"found {len(whole) + TRUNCATE}")
    images.write_bytes(whole[:9])
    assert_one_line(train(), 1, images.name, "truncated in its header")
    images.write_bytes(b"\x89PNG" + whole[4:])
    assert_one_line(train(), 1, images.name, "magic 0x89504e47")

    values = np.random.default_rng(0).standard_normal((12, 4, 4)).astype(np.float32)
    values[5, 2, 1] = np.nan
    write_idx(images, values)
    test_images = folder / "t10k-images-idx3-ubyte"
    write_idx(test_images, values[:5])
    assert_one_line(train(), 1, images.name, "sample 5 holds nan", "clean or drop")

    write_idx(images, values[:4])
    assert_one_line(train(), 1, "4 images but 12 labels")
    labels.unlink()
    assert_one_line(train(), 1, "not train-labels-idx1-ubyte")
    assert not (tmp_path / "run").exists()


def test_a_truncated_cifar_batch(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        (folder / name).write_bytes(b"\x80\x04\x95")
    done = minipar("train", "convnet", "--data", folder, "--out", tmp_path / "run")
    assert_one_line(done, 1, "data_batch_1")


def test_an_out_that_cannot_be_written(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    for out in (blocked, blocked / "run"):
        done = minipar("train", "mlp", *SMALL["mlp"], "--steps", 1, "--ranks", 2, "--out", out)
        assert_one_line(done, 2, f"--out {out} cannot be written")


# Training that goes astray -----------------------------------------------------------------------------


@pytest.mark.parametrize("aggregation", ("all_reduce", "master", "local"))
def test_a_loss_that_is_no_number_ends_the_training(aggregation: str, tmp_path: Path) -> None:
    done = minipar(
        "train", "mlp", *SMALL["mlp"], "--steps", 9, "--lr", 1e30, "--optimizer", "sgd", "--warmup", 0,
        "--ranks", 2, "--aggregation", aggregation, "--out", tmp_path,
    )  # fmt: skip
    assert_one_line(done, 1, "step ", "lower --lr (now 1e+30)")


# Under MPI ---------------------------------------------------------------------------------------------


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("verify", "mlp", "--frob"), 2, "No such option: --frob"),
        (
            ("verify", "mlp", "--ranks", 3),
            2,
            "--ranks 3 inside an MPI job of 2: leave it out, or start 3 ranks",
        ),
        (
            ("train", "mlp", "--data", "DATA", "--lr", "1e30", "--optimizer", "sgd", "--out", "OUT"),
            1,
            "lower --lr",
        ),
        (("verify", "gpt", "--tp", 2, "--heads", 3, "--width", 12), 2, "2 ranks do not divide 3 heads; 1, 3 ranks"),
    ],
)
def test_the_ranks_of_an_mpi_job_tell_it_once(
    words: tuple[object, ...], code: int, said: str, tmp_path: Path
) -> None:
    folder = idx_folder(tmp_path / "idx")  # quicker to load than the digits
    words = tuple({"OUT": tmp_path / "run", "DATA": folder}.get(word, word) for word in words)
    assert_one_line(process("run", "-n", 2, *words), code, said)


ONE_RANK_FAILS = """
import sys
from minipar import world
from minipar.cli import app
from minipar.errors import DataError
import minipar.training

def broken(config, load=minipar.training.load_data):
    if world().rank == 1:
        raise DataError("the disk of this host is gone")
    return load(config)

minipar.training.load_data = broken
app(["train", "mlp", "--steps", "1", "--data", sys.argv[1], "--out", sys.argv[1] + "/run"])
"""


@pytest.mark.mpi
def test_an_error_of_one_rank_is_told_too(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(ONE_RANK_FAILS)
    done = process("run", "-n", 2, script, idx_folder(tmp_path / "idx"))
    assert_one_line(done, 1, "the disk of this host is gone (on rank 1 of 2)")


@pytest.mark.mpi
def test_the_mpirun_of_another_mpi() -> None:
    """It starts processes that are each alone, and its variables tell."""
    done = process("verify", "mlp", OMPI_COMM_WORLD_SIZE="4")
    assert_one_line(done, 2, "this mpirun is Open MPI's, but mpi4py uses MPICH", "minipar run -n")


@pytest.mark.parametrize("command", (("doctor",), ("run", "-n", 2, __file__)))
def test_a_job_inside_a_job_is_refused(command: tuple[object, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    from minipar.commands import program

    monkeypatch.setattr(program, "ranks_in_environment", lambda: (4, "MINIPAR_WORLD_SIZE"))
    assert_one_line(minipar(*command), 2, f"{command[0]} starts ranks itself", "an MPI job of 4")
