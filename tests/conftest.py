"""Shared by all tests: one BLAS thread, so that timings and last bits do not depend on the machine."""

import pytest
from threadpoolctl import threadpool_limits


@pytest.fixture(scope="session", autouse=True)
def one_blas_thread():
    with threadpool_limits(1, user_api="blas"):
        yield
