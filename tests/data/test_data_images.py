"""Digits, IDX and CIFAR-10 files: read right, and refused by name when damaged anywhere."""

import gzip
import json
import os
import pickle
import re
import struct

import numpy as np
import pytest

from minipar.data import ImageDataset, Loader, Normalisation, load
from minipar.data.cifar import read_batch
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


# --- CIFAR-10 ----------------------------------------------------------------------------------------------


def cifar_entry(samples, seed):
    rng = np.random.default_rng(seed)
    return {b"batch_label": b"one", b"labels": rng.integers(0, 10, samples).tolist(),
            b"data": rng.integers(0, 256, (samples, 3072)).astype(np.uint8),
            b"filenames": [b"x.png"] * samples}


def write_cifar(folder, dump=lambda entry: pickle.dumps(entry, 2), samples=4):
    entries = {}
    for seed, name in enumerate([f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]):
        entries[name] = cifar_entry(samples, seed)
        (folder / name).write_bytes(dump(entries[name]))
    return entries


def as_python2(entry):
    """The bytes that Python 2 wrote, as in the published archive: str for bytes, and numpy.core."""
    pixels = entry[b"data"].tobytes()
    short = lambda text: b"U" + bytes([len(text)]) + text
    array = (b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00t" + short(b"b") + b"tR"
             + b"(K\x01(K" + bytes([len(entry[b"data"])]) + b"M\x00\x0ct"  # version 1, shape (N, 3072)
             + b"cnumpy\ndtype\n(" + short(b"u1") + b"K\x00K\x01tR"
             + b"(K\x03" + short(b"|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
             + b"\x89T" + struct.pack("<i", len(pixels)) + pixels + b"tb")
    labels = b"](" + b"".join(b"K" + bytes([label]) for label in entry[b"labels"]) + b"e"
    return b"\x80\x02}(" + short(b"data") + array + short(b"labels") + labels + b"u."


DUMPS = {f"protocol {p}": (lambda entry, p=p: pickle.dumps(entry, p)) for p in range(6)}
DUMPS["python 2"] = as_python2
relabel = lambda entry, labels: pickle.dumps(entry | {b"labels": labels})
DUMPS["str keys"] = lambda entry: pickle.dumps({key.decode(): value for key, value in entry.items()})
DUMPS["label array"] = lambda entry: relabel(entry, np.array(entry[b"labels"], ">i4"))
DUMPS["label scalars"] = lambda entry: relabel(entry, [np.int64(label) for label in entry[b"labels"]])
DUMPS["Fortran order"] = lambda entry: pickle.dumps(entry | {b"data": np.asfortranarray(entry[b"data"])}, 2)


@pytest.mark.parametrize("dump", list(DUMPS.values()), ids=list(DUMPS))
def test_cifar_in_every_form_it_may_be_pickled(tmp_path, dump):
    entries = write_cifar(tmp_path, dump)
    data = load(tmp_path)
    assert data.info["image_shape"] == [3, 32, 32] and data.info["classes"] == 10
    assert (len(data.train), len(data.valid)) == (20, 4)
    np.testing.assert_array_equal(data.train.images[4:8].reshape(4, 3072), entries["data_batch_2"][b"data"])
    np.testing.assert_array_equal(data.train.labels[16:], entries["data_batch_5"][b"labels"])
    np.testing.assert_array_equal(data.valid.images.reshape(4, 3072), entries["test_batch"][b"data"])
    # Green, row 1, column 2.
    assert data.train.images[0, 1, 1, 2] == entries["data_batch_1"][b"data"][0, 1024 + 32 + 2]


@pytest.mark.parametrize("form", ["protocol 2", "protocol 5", "python 2"])
def test_cifar_truncated_anywhere(tmp_path, form):
    write_cifar(tmp_path, DUMPS[form], samples=1)
    path = tmp_path / "data_batch_3"
    whole = path.read_bytes()
    for size in [*range(400), *range(400, len(whole) - 100, 397), *range(len(whole) - 100, len(whole))]:
        path.write_bytes(whole[:size])
        with pytest.raises(DataError, match="data_batch_3 is not a readable CIFAR-10 batch"):
            read_batch(path)
    with pytest.raises(DataError, match="data_batch_3"):
        load(tmp_path)


def test_cifar_with_flipped_bytes_never_ends_in_another_error(tmp_path):
    path = tmp_path / "batch"
    whole = bytearray(as_python2(cifar_entry(1, 0)))
    rng = np.random.default_rng(0)
    edges = [*range(190), *range(len(whole) - 40, len(whole))]  # all but the pixels
    for place in edges:
        damaged = whole.copy()
        damaged[place] ^= int(rng.integers(1, 256))
        path.write_bytes(damaged)
        try:
            images, labels = read_batch(path)
        except DataError as error:
            assert "batch" in str(error)
        else:
            assert images.dtype == np.uint8 and len(images) == len(labels)


class Attack:
    def __init__(self, call, *arguments):
        self.reduced = call, arguments

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize("protocol", [0, 2, 5])
@pytest.mark.parametrize("call, argument", [(os.mkdir, "made"), (eval, "1"), (getattr, "x"), (np.load, "x")])
def test_cifar_pickle_cannot_call_anything(tmp_path, monkeypatch, protocol, call, argument):
    monkeypatch.chdir(tmp_path)
    write_cifar(tmp_path)
    entry = cifar_entry(4, 0) | {b"more": Attack(call, argument)}
    (tmp_path / "test_batch").write_bytes(pickle.dumps(entry, protocol))
    with pytest.raises(DataError, match=r"test_batch.*which is refused"):
        load(tmp_path)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("change, message", [
    ({b"data": np.zeros((4, 3071), np.uint8)}, r"shape \(4, 3071\), expected uint8 of \(N, 3072\)"),
    ({b"data": np.zeros((4, 3072), np.int16)}, "int16"),
    ({b"data": np.zeros((4, 3072), np.float32)}, "float32"),
    ({b"data": np.zeros(4, object)}, "object"),
    ({b"data": [1, 2]}, "is a list, expected an array"),
    ({b"data": np.zeros((0, 3072), np.uint8), b"labels": []}, "hold nothing"),
    ({b"labels": [0, 1, 2]}, "4 images but 3 labels"),
    ({b"labels": [0, 1, 10, 2]}, "sample 2 has label 10, expected 0 to 9"),
    ({b"labels": [0, -1, 1, 2]}, "sample 1 has label -1"),
    ({b"labels": [0, 1.5, 1, 2]}, "not a list of integers"),
    ({b"labels": [[0], [1, 2], [1], [2]]}, "not a list of integers"),
    ({b"labels": "abcd"}, "not a list of integers"),
])
def test_cifar_odd_contents(tmp_path, change, message):
    write_cifar(tmp_path)
    (tmp_path / "data_batch_2").write_bytes(pickle.dumps(cifar_entry(4, 0) | change, 2))
    with pytest.raises(DataError, match=rf"data_batch_2.*{message}"):
        load(tmp_path)


def test_cifar_odd_files(tmp_path):
    write_cifar(tmp_path)
    path = tmp_path / "data_batch_1"
    good = path.read_bytes()
    path.write_bytes(good + b"x")
    with pytest.raises(DataError, match=rf"goes on after its pickle ended at byte {len(good)}"):
        load(tmp_path)
    path.write_bytes(pickle.dumps([1, 2]))
    with pytest.raises(DataError, match="holds a list, expected a dictionary"):
        load(tmp_path)
    path.write_bytes(pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"fine_labels": [1]}))
    with pytest.raises(DataError, match=r"no 'labels'.*CIFAR-100 is not supported"):
        load(tmp_path)
    path.unlink()
    (tmp_path / "data_batch_4").unlink()
    with pytest.raises(DataError, match="lacks data_batch_1, data_batch_4 of CIFAR-10"):
        load(tmp_path)
