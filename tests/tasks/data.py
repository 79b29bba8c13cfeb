"""Real data sets for the tests of this package, where the machine has them."""

from __future__ import annotations

from pathlib import Path

import pytest

_TASKS = Path(__file__).parents[3] / "shared" / "data" / "tasks"


def real(folder: str) -> str:
    """The folder of a real data set; skips the test if it is not there."""
    if not (_TASKS / folder).is_dir():
        pytest.skip(f"needs {_TASKS / folder}")
    return str(_TASKS / folder)
