"""Comparison of a run with the forward runs that differ from it in the direction alone."""

from __future__ import annotations

from bwlm.analysis.commands.gap import GAP_HEADER, gap_columns, gap_sentence
from bwlm.analysis.commands.result import markdown_table
from bwlm.analysis.runs.document_losses import document_losses, gap_table
from bwlm.analysis.runs.findings import one_window
from bwlm.analysis.runs.labels import sizes
from bwlm.directions import BASELINE
from bwlm.errors import UserError
from bwlm.phases import PHASES
from bwlm.record.experiment import ExperimentFolder, list_experiments
from bwlm.record.fingerprint import VARIED
from bwlm.record.health import readable
from bwlm.stats.gaps import Gap, gap, judge

_FREE = frozenset(VARIED) - {"lr"}


def baseline_section(folder: ExperimentFolder) -> list[str]:
    """Return the section on the gap to the forward baseline, or on why there is none and what to run for it."""
    title = "## Against the forward baseline"
    experiment = folder.config().experiment
    if not PHASES[experiment.phase].compared:
        return [title, f"Not compared: in {experiment.phase} each direction learns to write text of its own."]
    if experiment.direction == BASELINE:
        return [title, "This run reads forward: it is the baseline of the other directions with its settings."]
    if folder.status().state != "finished":
        return [title, f"Nothing yet: the run is {folder.status().state}."]
    try:
        to_forward = gap_to_forward(folder)
    except UserError as error:
        return [title, f"Nothing yet: {error}."]
    grid = folder.config().grid
    family = [f"The report of its grid, {grid}, judges all pairs together: quote that verdict."] if grid else []
    sentence = gap_sentence(to_forward)
    table = markdown_table(GAP_HEADER, [gap_columns(to_forward)])
    return [title, f"{sentence[0].upper()}{sentence[1:]}.", *family, table, _READING]


def gap_to_forward(folder: ExperimentFolder) -> Gap:
    """Return the judged gap of the run's direction to forward, over all seeds of its storage that both finished.

    All these runs have the run's settings, also its learning rate. The gap is measured on the test half of the windows.
    Raises `UserError` if no finished forward run has the settings and the seed.
    """
    own = folder.config()
    pair = (BASELINE, own.experiment.direction)
    same = [
        other
        for other in readable(list_experiments(folder.path.parent))[0]
        if other.status().state == "finished"
        and (config := other.config()).experiment.direction in pair
        and _settings(config.compared) == _settings(own.compared)
    ]
    losses = document_losses(same)
    runs = losses.folders
    seeds = {run.config().experiment.seed for run in runs if run.config().experiment.direction == BASELINE}
    if own.experiment.seed not in seeds:
        raise UserError(
            f"no finished forward run with these settings and seed {own.experiment.seed} lies in {folder.path.parent}: "
            "train it with `--direction forward` and all other settings as below"
            + ("" if PHASES[own.experiment.phase].is_first else ", from a forward parent trained like this run's")
        )
    table = gap_table(losses, sizes(runs))
    test = table[table["half"].eq("test")].drop(columns="half")
    if test.empty:
        raise UserError(one_window(folder))
    [judged] = judge([gap(test, *pair, str(test["size"].iloc[0]))])
    return judged


def _settings(identity: dict[str, object]) -> dict[str, object]:
    return {name: value for name, value in identity.items() if name not in _FREE}


_READING = """Both directions have this run's learning rate; only a grid can tell the best rate of each. The gap is
measured on the test half of the validation windows, over the seeds that both were trained with."""
