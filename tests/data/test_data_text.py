"""Vocabulary, windows, splits, and text files, good and bad."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minipar.data import Vocabulary, WindowDataset, docs_text, load, read_text
from minipar.errors import DataError, UsageError


def test_docs_are_ascii_english_of_the_measured_size():
    data = load("docs", seq_len=64)
    assert 400_000 < data.info["characters"] < 550_000
    assert 85 <= data.info["vocabulary_size"] <= 97
    text = docs_text()
    assert text.isascii() and "statement" in text and text == docs_text()
    assert data.info["kind"] == "text" and data.info["name"] == "docs"
    assert data.info["train_samples"] == len(data.train) and data.info["valid_samples"] == len(data.valid)
    assert data.info["train_characters"] + data.info["valid_characters"] == len(text)
    assert data.info["valid_characters"] == len(text) // 10
    assert load("docs", kind="text").info["name"] == "docs"
    json.dumps(dict(data.info))


def test_splits_are_the_text_in_order():
    data = load("docs", seq_len=50)
    text = docs_text()
    inputs, targets = data.train.fetch(np.array([0, 7]))
    assert inputs.shape == targets.shape == (2, 50)
    assert inputs.dtype == targets.dtype == np.int64
    assert data.vocabulary.decode(inputs[1]) == text[350:400]
    assert data.vocabulary.decode(targets[1]) == text[351:401]
    start = len(text) - len(text) // 10
    assert data.vocabulary.decode(data.valid.fetch(np.array([0]))[0][0]) == text[start:start + 50]


@given(st.text(min_size=1, max_size=60))
def test_vocabulary_round_trip(text):
    vocabulary = Vocabulary.of(text)
    ids = vocabulary.encode(text)
    assert ids.dtype == np.int64 and ids.shape == (len(text),)
    assert vocabulary.decode(ids) == text
    assert [vocabulary.characters[i] for i in ids] == list(text)
    assert vocabulary.characters == "".join(sorted(set(text)))
    assert Vocabulary.from_dict(json.loads(json.dumps(vocabulary.to_dict()))) == vocabulary


def test_vocabulary_refuses_what_it_does_not_know():
    vocabulary = Vocabulary.of("abc")
    with pytest.raises(UsageError, match=r"'ä' at position 2"):
        vocabulary.encode("abä")
    with pytest.raises(UsageError, match=r"'\\n' at position 0"):
        vocabulary.encode("\n")
    with pytest.raises(UsageError, match=r"id 3 at position 1.*0 to 2"):
        vocabulary.decode([0, 3])
    with pytest.raises(UsageError, match="id -1"):
        vocabulary.decode(np.array([-1]))
    assert vocabulary.encode("").shape == (0,) and vocabulary.decode([]) == ""
    assert len(vocabulary) == 3 and vocabulary != Vocabulary.of("abd")


@pytest.mark.parametrize("saved", [{}, {"kind": "words", "characters": "ab"}, {"kind": "characters"}, "ab",
                                   {"kind": "characters", "characters": "ba"},
                                   {"kind": "characters", "characters": "aa"},
                                   {"kind": "characters", "characters": ""}])
def test_vocabulary_from_damaged_dict(saved):
    with pytest.raises(DataError):
        Vocabulary.from_dict(saved)


@settings(max_examples=50)
@given(st.integers(1, 12), st.integers(2, 60))
def test_windows_lie_side_by_side_and_drop_the_rest(seq_len, length):
    ids = np.arange(length, dtype=np.uint8)
    if length < seq_len + 1:
        with pytest.raises(UsageError, match=f"{length} characters.*{seq_len + 1}"):
            WindowDataset(ids, seq_len)
        return
    dataset = WindowDataset(ids, seq_len)
    inputs, targets = dataset.fetch(np.arange(len(dataset)))
    used = len(dataset) * seq_len
    assert length - 1 - seq_len < used <= length - 1  # no further window would fit
    np.testing.assert_array_equal(inputs.ravel(), np.arange(used))
    np.testing.assert_array_equal(targets.ravel(), np.arange(1, used + 1))
    np.testing.assert_array_equal(dataset.targets(np.arange(len(dataset))), targets)


def test_a_fetched_window_is_a_copy():
    dataset = WindowDataset(np.arange(20), 4)
    dataset.fetch(np.array([0]))[0][:] = -1
    assert dataset.ids[0] == 0


def test_no_samples_fetched_is_legal():
    inputs, targets = WindowDataset(np.arange(20), 4).fetch(np.array([], np.int64))
    assert inputs.shape == targets.shape == (0, 4)


def test_text_file(tmp_path):
    path = tmp_path / "höhe.txt"
    path.write_bytes(("\ufeff" + "Höhe über Null\r\n" * 40).encode())
    data = load(path, seq_len=8)
    assert read_text(path).startswith("Höhe") and "\r\n" in read_text(path)
    assert data.info["name"] == str(path) and "ö" in data.vocabulary.characters
    assert load(str(path), kind="text", seq_len=8).info == data.info


def test_a_short_text_gives_validation_one_window_or_is_refused(tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("abcdefghij" * 2)  # 20 characters: exactly two windows of 9 + 1
    data = load(path, seq_len=9)
    assert (len(data.train), len(data.valid)) == (1, 1)
    path.write_text("abcdefghij" * 2 + "k")
    assert load(path, seq_len=9).info["valid_characters"] == 10
    path.write_text("abcdefghij" * 2)
    with pytest.raises(UsageError, match=r"20 characters.*seq_len 10 take at least 22"):
        load(path, seq_len=10)


def test_bad_text_files(tmp_path):
    path = tmp_path / "bad.txt"
    path.write_bytes(b"fine so far \xff and on")
    with pytest.raises(DataError, match=r"bad.txt is not UTF-8 text: byte 0xff at offset 12"):
        load(path)
    path.write_bytes(b"")
    with pytest.raises(DataError, match="is empty"):
        load(path)
    path.write_bytes("\ufeff".encode())
    with pytest.raises(DataError, match="is empty"):
        load(path)
    with pytest.raises(UsageError, match="a folder: text is read from one file"):
        load(tmp_path, kind="text")


@pytest.mark.parametrize("seq_len", [0, -1, 2.5, True, "64"])
def test_bad_seq_len(seq_len):
    with pytest.raises(UsageError, match="seq_len must be a whole number"):
        load("docs", seq_len=seq_len)


@pytest.mark.parametrize("kind", [None, "text", "images"])
def test_unknown_source_lists_what_is_known(kind):
    with pytest.raises(UsageError, match=r"'docz'.*docs, digits.*path"):
        load("docz", kind=kind)


def test_wrong_kind():
    with pytest.raises(UsageError, match="docs is text, and images is wanted: use digits"):
        load("docs", kind="images")
    with pytest.raises(UsageError, match="digits is images, and text is wanted: use docs"):
        load("digits", kind="text")
    with pytest.raises(UsageError, match="unknown kind of data 'sound'"):
        load("docs", kind="sound")
