"""Characters as numbers and back: the vocabulary of a text, saved with a run so that it can write again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from minipar.errors import DataError, UsageError


class Vocabulary:
    """The distinct characters of a text in sorted order; a character's id is its place among them.

    >>> Vocabulary.of("hello").characters
    'ehlo'
    >>> Vocabulary("ehlo").encode("hole")
    array([1, 3, 2, 0])
    """

    def __init__(self, characters: str) -> None:
        if not characters or list(characters) != sorted(set(characters)):
            raise DataError("a vocabulary is a non-empty string of distinct characters in sorted order; "
                            "build one from a text with Vocabulary.of(text)")
        self.characters = characters
        self._codes = _code_points(characters)  # sorted, so that encode is one binary search

    @classmethod
    def of(cls, text: str) -> Vocabulary:
        """The vocabulary of `text`. DataError if it is empty."""
        if not text:
            raise DataError("the text is empty: a vocabulary needs at least one character")
        return cls("".join(sorted(set(text))))

    def __len__(self) -> int:
        return len(self.characters)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and self.characters == other.characters

    def __hash__(self) -> int:
        return hash(self.characters)

    def __repr__(self) -> str:
        return f"Vocabulary({self.characters!r})"

    def encode(self, text: str) -> npt.NDArray[np.int64]:
        """The ids of `text`, int64 (len(text),). UsageError names the first character it does not know."""
        codes = _code_points(text)
        ids = np.minimum(np.searchsorted(self._codes, codes), len(self) - 1)
        unknown = np.flatnonzero(self._codes[ids] != codes)
        if unknown.size:
            place = int(unknown[0])
            raise UsageError(f"character {text[place]!r} at position {place} is not among the {len(self)} "
                             "characters of the training text: leave it out or train on a text that has it")
        return ids.astype(np.int64, copy=False)

    def decode(self, ids: Iterable[int] | npt.NDArray[Any]) -> str:
        """The text of `ids`, integers (length,). UsageError names the first id out of range."""
        characters = []
        for place, number in enumerate(ids):
            if not 0 <= number < len(self):
                raise UsageError(f"id {number} at position {place} is outside the vocabulary: "
                                 f"ids run from 0 to {len(self) - 1}")
            characters.append(self.characters[number])
        return "".join(characters)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form, saved with a run so that its text can be generated again."""
        return {"kind": "characters", "characters": self.characters}

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> Vocabulary:
        """The inverse of `to_dict`. DataError if `saved` is not such a form."""
        if not isinstance(saved, Mapping) or saved.get("kind") != "characters" \
                or not isinstance(saved.get("characters"), str):
            raise DataError("the saved vocabulary is not one of characters: expected "
                            "{'kind': 'characters', 'characters': '...'}")
        return cls(saved["characters"])


def _code_points(text: str) -> npt.NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4").astype(np.uint32, copy=False)
