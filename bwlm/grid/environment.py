"""What Ray itself reads from the environment, checked where it would end the process without a word."""

from __future__ import annotations

import os
import re
import subprocess
import sys

from bwlm.errors import UserError


def check_ray_settings() -> None:
    """Raises `UserError` that names the variables if Ray cannot even be imported with its settings.

    Ray's own settings are `RAY_` and a lower-case name. A value that Ray cannot read ends the process that imports it,
    so another process tries it first; where there is no such variable, nothing is tried.
    """
    settings = sorted(name for name in os.environ if re.match(r"RAY_[a-z]", name))
    if not settings:
        return
    done = subprocess.run([sys.executable, "-c", "import ray"], capture_output=True, check=False)
    if done.returncode:
        raise UserError(
            f"{', '.join(settings)}: Ray cannot be imported with these settings in the environment: unset them, or "
            "give them values of the type that Ray wants"
        )
