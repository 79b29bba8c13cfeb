"""Runs of several sizes as the input of `scaling`: each direction at its best learning rate, on the test half."""

from __future__ import annotations

import pandas as pd

from bwlm.analysis.findings import Findings, find
from bwlm.analysis.result import Analysis
from bwlm.analysis.scaling import analyse, scaling_parameters
from bwlm.analysis.tables import best_on_test, load_gap_table, sizes
from bwlm.errors import UserError
from bwlm.record.lineage import ExperimentFolder


def scaling(folders: list[ExperimentFolder]) -> Analysis:
    """Fits the law per direction, predicts the largest size, and says what the gap does with size.

    Raises `UserError` if no run has finished, or sizes are too few.
    """
    findings = find(folders)
    runs = losses_by_size(folders, findings)
    sentences, table, chart = analyse(runs, findings.gaps)
    return Analysis("scaling", "Loss over size and data", sentences, table, chart, findings.skipped)


def losses_by_size(folders: list[ExperimentFolder], findings: Findings) -> pd.DataFrame:
    """run, direction, seed, size, parameters, tokens, loss (nats per token) of the finished runs at the best rates."""
    finished = [folder for folder in folders if folder.status().state == "finished"]
    if not finished or not findings.best:
        raise UserError("scaling: no run has finished")
    rows = best_on_test(load_gap_table(finished, sizes(folders)), findings.best)
    summed = rows.groupby(["run", "direction", "seed", "size"], as_index=False)[["nll", "tokens"]].sum()
    configs = {folder.id: folder.config() for folder in finished}
    return pd.DataFrame(
        {
            **{name: summed[name] for name in ("run", "direction", "seed", "size")},
            "parameters": [scaling_parameters(configs[run].shape) for run in summed["run"]],
            "tokens": [configs[run].steps * configs[run].experiment.budget.batch_tokens for run in summed["run"]],
            "loss": summed["nll"] / summed["tokens"],
        }
    )
