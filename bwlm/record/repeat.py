"""Command that trains a run or a grid again."""

from __future__ import annotations

import shlex

from pydantic import BaseModel

from bwlm.config import Experiment
from bwlm.phases import PHASES
from bwlm.record.grids import GRID_FILE
from bwlm.record.run_config import RunConfig
from bwlm.settings_file import written_settings

_STORAGE = '"$BWLM_STORAGE"'


def grid_command(name: str, storage: str = _STORAGE) -> str:
    """Return the command with the grid file beside the report, which holds the changes of `--set`."""
    return f"bwlm grid run {storage}/grids/{name}/{GRID_FILE}"


def repeat_command(config: RunConfig, storage: str = _STORAGE) -> str:
    """Return the command that trains a run again; `storage` is a word of the shell, by default the variable's."""
    return grid_command(config.grid, storage) if config.grid else train_command(config.id, config.experiment)


def train_command(run: str, experiment: Experiment) -> str:
    """Return `bwlm train` with every setting that is not its default, except where and with how many workers it ran."""
    words = ["bwlm", "train", "--id", run]
    for flag in ("phase", "parent", "direction", "depth", "lr", "seed"):
        if (value := getattr(experiment, flag)) is not None:
            words += [f"--{flag}", str(value)]
    sections = {name for name, value in experiment if isinstance(value, BaseModel)} - {"resources"}
    settings = experiment.model_dump(include=sections | {"tasks", "differs"}, exclude_defaults=True)
    if not PHASES[experiment.phase].is_first:  # the defaults below are the phase's or the parent's: always write them
        settings.setdefault("model", {})["document_mask"] = experiment.model.document_mask
        settings.setdefault("optim", {})["init_lr_frac"] = experiment.optim.init_lr_frac
    return shlex.join([*words, *(word for setting in written_settings(settings) for word in ("--set", setting))])
