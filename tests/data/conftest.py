"""Every test of the data package leaves no background thread behind."""

import gc

import pytest
from data_helpers import prefetchers


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    if prefetchers():
        gc.collect()  # one held in a reference cycle may end here
    assert prefetchers() == []
