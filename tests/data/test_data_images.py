"""Digits, IDX and CIFAR-10 files: read right, and refused by name when damaged anywhere."""

import gzip
import json
import re
import struct

import numpy as np
import pytest

from minipar.data import ImageDataset, Loader, Normalisation, load
from minipar.data.idx import read_idx
from minipar.errors import DataError, UsageError

CODES = {"uint8": 0x08, "int8": 0x09, "int16": 0x0B, "int32": 0x0C, "float32": 0x0D, "float64": 0x0E}


def idx_bytes(array):
    header = struct.pack(">HBB", 0, CODES[array.dtype.name], array.ndim)
    header += struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.astype(array.dtype.newbyteorder(">")).tobytes()


def write_idx(path, array):
    content = idx_bytes(array)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_mnist(folder, *, prefix="", ending="", train=12, dtype=np.uint8, test_name="t10k"):
    rng = np.random.default_rng(0)
    made = {}
    for split, samples in (("train", train), (test_name, 5)):
        images = rng.integers(0, 256, (samples, 4, 3)).astype(dtype)
        labels = (np.arange(samples) % 3).astype(np.uint8)
        write_idx(folder / f"{prefix}{split}-images-idx3-ubyte{ending}", images)
        write_idx(folder / f"{prefix}{split}-labels-idx1-ubyte{ending}", labels)
        made[split] = images, labels
    return made


# --- digits and normalisation --------------------------------------------------------------------------


def test_digits_split_is_fixed_stratified_and_whole():
    data, again = load("digits"), load("digits", kind="images")
    assert (len(data.train), len(data.valid)) == (1438, 359)
    np.testing.assert_array_equal(data.train.images, again.train.images)
    everything = np.concatenate([data.train.images, data.valid.images])
    from sklearn.datasets import load_digits
    original = load_digits().images.astype(np.uint8)[:, None]
    order = lambda images: images.reshape(1797, 64)[np.lexsort(images.reshape(1797, 64).T)]
    np.testing.assert_array_equal(order(everything), order(original))
    held_out, kept = np.bincount(data.valid.labels), np.bincount(data.train.labels)
    assert np.all(np.abs(held_out / (held_out + kept) - 0.2) < 0.01)
    assert not np.array_equal(load("digits", seed=1).valid.images, data.valid.images)
    assert data.info["image_shape"] == [1, 8, 8] and data.info["classes"] == 10 and data.vocabulary is None
    json.dumps(dict(data.info))


@pytest.mark.parametrize("dtype", [None, np.float16, np.float32, np.float64])
def test_images_come_normalised_in_the_dtype_asked_for(dtype):
    data = load("digits")
    inputs, targets = data.train.fetch(np.arange(len(data.train)), dtype)
    assert inputs.dtype == (dtype or np.float32) and inputs.shape == (1438, 1, 8, 8)
    assert targets.dtype == np.int64 and targets.shape == (1438,)
    assert abs(inputs.astype(np.float64).mean()) < 1e-3 and abs(inputs.astype(np.float64).std() - 1) < 1e-3
    exact = data.train.fetch(np.arange(5), np.float64)[0]
    np.testing.assert_array_equal(inputs[:5], exact.astype(inputs.dtype))  # rounded once


@pytest.mark.parametrize("dtype", ["int32", "longdouble", "nonsense"])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(UsageError, match="data dtype"):
        Loader(load("docs").train, 4, dtype=dtype)


def test_normalisation_per_channel_against_numpy(monkeypatch):
    monkeypatch.setattr("minipar.data.images._CHUNK", 7)  # several chunks, an odd last one
    images = np.random.default_rng(0).integers(0, 256, (40, 3, 5, 4)).astype(np.uint8)
    images[:, 2] = 9  # a constant channel
    made = Normalisation.of(images, 1 / 255)
    np.testing.assert_allclose(made.mean, images.mean(axis=(0, 2, 3)) / 255, rtol=1e-12)
    np.testing.assert_allclose(made.std[:2], images[:, :2].std(axis=(0, 2, 3)) / 255, rtol=1e-12)
    normal = made(images, np.float64)
    np.testing.assert_allclose(normal.mean(axis=(0, 2, 3)), 0, atol=1e-12)
    np.testing.assert_allclose(normal.std(axis=(0, 2, 3)), [1, 1, 0], atol=1e-12)


def test_image_dataset_checks_its_arrays():
    plain = Normalisation(1.0, (0.0,), (1.0,))
    images, labels = np.zeros((6, 1, 2, 2)), np.zeros(6, int)
    assert len(ImageDataset(images, labels, 2, plain)) == 6
    for bad in (np.nan, np.inf, -np.inf):
        spoiled = images.copy()
        spoiled[[4, 5], 0, 1, 1] = bad
        with pytest.raises(DataError, match=rf"mine: sample 4 holds {bad} \(2 of 6"):
            ImageDataset(spoiled, labels, 2, plain, "mine")
    with pytest.raises(DataError, match="sample 3 has label 2, expected 0 to 1"):
        ImageDataset(images, np.array([0, 1, 0, 2, 5, 0]), 2, plain)
    with pytest.raises(DataError, match="sample 0 has label -1"):
        ImageDataset(images, labels - 1, 2, plain)
    with pytest.raises(DataError, match="6 images but 5 labels"):
        ImageDataset(images, labels[:5], 2, plain)
    with pytest.raises(DataError, match=r"expected \(N, C, H, W\)"):
        ImageDataset(images[0], labels, 2, plain)
    with pytest.raises(DataError, match="hold nothing"):
        ImageDataset(images[:0], labels[:0], 2, plain)
    with pytest.raises(DataError, match="int16 are not supported"):
        ImageDataset(images.astype(np.int16), labels, 2, plain)
    with pytest.raises(DataError, match="labels are float64"):
        ImageDataset(images, labels * 1.0, 2, plain)
    with pytest.raises(UsageError, match="1 channels, but the normalisation is for 3"):
        ImageDataset(images, labels, 2, Normalisation(1.0, (0.0,) * 3, (1.0,) * 3))


# --- IDX -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize("prefix, test_name", [("", "t10k"), ("balanced-", "test")])
def test_idx_folder_prefix_or_file(tmp_path, ending, prefix, test_name):
    made = write_mnist(tmp_path, prefix=prefix, ending=ending, test_name=test_name)
    for source in (tmp_path / prefix, tmp_path / f"{prefix}train-images-idx3-ubyte{ending}"):
        data = load(source)
        assert data.info["classes"] == 3 and data.info["image_shape"] == [1, 4, 3]
        assert (data.info["train_samples"], data.info["valid_samples"]) == (12, 5)
        for dataset, (images, labels) in ((data.train, made["train"]), (data.valid, made[test_name])):
            inputs, targets = dataset.fetch(np.arange(len(dataset)), np.float64)
            raw = (inputs * data.info["std"][0] + data.info["mean"][0]) * 255
            np.testing.assert_allclose(raw[:, 0], images, atol=1e-9)
            np.testing.assert_array_equal(targets, labels)


@pytest.mark.parametrize("name", list(CODES))
def test_idx_element_types(tmp_path, name):
    array = np.array([[1, 2, 3], [100, 5, 6]]).astype(name)
    (tmp_path / "file").write_bytes(idx_bytes(array))
    found = read_idx(tmp_path / "file", 2)
    assert found.dtype == array.dtype and found.dtype.isnative
    np.testing.assert_array_equal(found, array)


@pytest.mark.parametrize("size", range(0, 16 + 24))
def test_idx_truncated_anywhere(tmp_path, size):
    path = tmp_path / "images"
    whole = idx_bytes(np.ones((2, 4, 3), np.uint8))
    assert len(whole) == 40
    path.write_bytes(whole[:size])
    expected = 16 if size < 16 else 40
    with pytest.raises(DataError, match=rf"images is truncated.* {expected} bytes, found {size}$"):
        read_idx(path, 3)


def test_idx_gzip_truncated_anywhere_or_flipped(tmp_path):
    path = tmp_path / "images.gz"
    pixels = np.random.default_rng(0).integers(0, 256, (3, 5, 7)).astype(np.uint8)
    whole = gzip.compress(idx_bytes(pixels))
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(DataError, match=re.escape(str(path))):
            read_idx(path, 3)
    path.write_bytes(whole[:60])
    with pytest.raises(DataError, match=r"121 bytes, found \d+ \(the gzip stream is broken"):
        read_idx(path, 3)
    path.write_bytes(whole[:-8] + bytes([whole[-8] ^ 1]) + whole[-7:])  # in the checksum
    with pytest.raises(DataError, match=r"damaged.*CRC"):
        read_idx(path, 3)
    path.write_bytes(b"not gzip at all")
    with pytest.raises(DataError, match="gzip"):
        read_idx(path, 3)


@pytest.mark.parametrize("spoil, message", [
    (lambda good: b"\1" + good[1:], r"magic 0x01000803, expected 0x00000803"),
    (lambda good: good[:2] + b"\x0a" + good[3:], r"magic 0x00000a03"),
    (lambda good: good[:3] + b"\1" + good[4:], r"magic 0x00000801"),
    (lambda good: good + b"\0", r"too long.*40 bytes, found 41"),
    (lambda good: good[:4] + b"\xff" * 12 + good[16:], r"truncated"),
    (lambda good: good[:4] + bytes(12), r"hold nothing"),
], ids=["zero bytes", "type", "dimensions", "too long", "huge sizes", "no images"])
def test_idx_spoiled(tmp_path, spoil, message):
    write_mnist(tmp_path, train=2)
    path = tmp_path / "train-images-idx3-ubyte"
    if spoil(b"\0" * 40)[4:] == bytes(12):
        write_idx(tmp_path / "train-labels-idx1-ubyte", np.zeros(0, np.uint8))
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(DataError, match=rf"train-images-idx3-ubyte.*{message}"):
        load(tmp_path)


def test_idx_sets_that_do_not_fit_together(tmp_path):
    write_mnist(tmp_path)
    labels = tmp_path / "train-labels-idx1-ubyte"
    good = labels.read_bytes()
    write_idx(labels, np.zeros(11, np.uint8))
    with pytest.raises(DataError, match="train-labels-idx1-ubyte: 12 images but 11 labels"):
        load(tmp_path)
    write_idx(labels, np.full(12, -3, np.int8))
    with pytest.raises(DataError, match="sample 0 has label -3, expected at least 0"):
        load(tmp_path)
    labels.write_bytes(good)
    write_idx(tmp_path / "t10k-labels-idx1-ubyte", np.array([0, 1, 2, 9, 0], np.uint8))
    with pytest.raises(DataError, match="t10k-labels-idx1-ubyte: sample 3 has label 9, expected 0 to 2"):
        load(tmp_path)
    write_mnist(tmp_path)
    write_idx(tmp_path / "t10k-images-idx3-ubyte", np.zeros((5, 3, 3), np.uint8))
    with pytest.raises(DataError, match=r"\(1, 4, 3\), test images \(1, 3, 3\)"):
        load(tmp_path)
    write_idx(tmp_path / "t10k-images-idx3-ubyte", np.zeros((5, 4, 3), np.float32))
    with pytest.raises(DataError, match=r"uint8.*float32"):
        load(tmp_path)
    (tmp_path / "t10k-images-idx3-ubyte").unlink()
    with pytest.raises(DataError, match="but not t10k-images-idx3-ubyte"):
        load(tmp_path)


def test_idx_of_floats_is_checked_for_nan(tmp_path):
    made = write_mnist(tmp_path, dtype=np.float32)
    assert load(tmp_path).train.fetch(np.array([0]))[0].dtype == np.float32
    images = made["train"][0]
    images[7, 2, 1] = np.nan
    write_idx(tmp_path / "train-images-idx3-ubyte", images)
    with pytest.raises(DataError, match="train-images-idx3-ubyte: sample 7 holds nan"):
        load(tmp_path)


def test_paths_without_images(tmp_path):
    with pytest.raises(UsageError, match="holds no images that are known here"):
        load(tmp_path)
    text = tmp_path / "text.txt"
    text.write_text("some text " * 40)
    with pytest.raises(UsageError, match="holds no images that are known here"):
        load(text, kind="images")
    lone = tmp_path / "lone"
    write_idx(lone, np.zeros((2, 2, 2), np.uint8))
    with pytest.raises(UsageError, match=r"holds no images.*train-images-idx3-ubyte"):
        load(lone)  # known by its magic, and not taken for text
    with pytest.raises(UsageError, match="unknown data"):
        load(tmp_path / "nowhere")
