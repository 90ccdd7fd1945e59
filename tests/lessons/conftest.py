"""One process that all submissions of a test run are forked from."""

from collections.abc import Iterator

import pytest

from minipar.grading.sandbox import Nursery


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    with Nursery() as nursery:
        yield nursery
