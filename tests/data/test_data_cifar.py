"""CIFAR-10 files: read in every form they may be pickled, refused by name when damaged or hostile."""

import os
import pickle
import struct

import numpy as np
import pytest

from minipar.data import load
from minipar.data.cifar import read_batch
from minipar.errors import DataError


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
