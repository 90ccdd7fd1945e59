"""Shared by all tests: one BLAS thread, so that timings and last bits do not depend on the machine; Ctrl-C heard."""

import signal

import pytest
from threadpoolctl import threadpool_limits


def pytest_configure():
    """Hear Ctrl-C and a closing terminal, and let started programs hear them, where they have been turned off.

    A shell does so for what it puts into the background, nohup too; what is ignored stays ignored in every child.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session", autouse=True)
def one_blas_thread():
    with threadpool_limits(1, user_api="blas"):
        yield
