"""Tiny runs, on one thread: what is compared bit for bit must add up in one order."""

from tests.train.conftest import one_thread
from tests.train.test_base import new_run

__all__ = ["new_run", "one_thread"]
