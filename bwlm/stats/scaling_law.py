"""Scaling law L = E + A / N^a + B / D^b of size N and training tokens D: the objective of a fit, and its minimiser.

N counts the matrices of the blocks and the output layer, as nanochat does. Other papers count otherwise: Hoffmann et
al. all parameters, Kaplan et al. (2020) the blocks alone. Exponents of small models depend on this choice (Pearce and
Song 2024, arXiv:2406.12907), so compare exponents only under the same count.

Suffixes of arrays: N runs, R resamples, P coordinates of a law, T terms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Final, Literal

import numpy as np
import pandas as pd
from scipy.optimize import minimize, nnls

from bwlm.stats.columns import FloatArray

CONVENTION: Final = "N counts the matrices of the blocks and the output layer, without the token embedding"
DELTA: Final = 1e-3  # threshold of the Huber loss, in log loss: beyond 0.1 % a run counts as an outlier

Term = Literal["parameters", "tokens"]
COEFFICIENT_AND_EXPONENT: Final[dict[Term, tuple[str, str]]] = {"parameters": ("A", "a"), "tokens": ("B", "b")}

_EXPONENTS: Final = (0.05, 0.1, 0.2, 0.3, 0.45, 0.7, 1.0, 1.5)  # grid of the starts
_LARGEST_EXPONENT: Final = 3.0
_STARTS: Final = 6  # best points of the grid, each a start of L-BFGS-B (in simulations all led to one minimum)


@dataclass(frozen=True)
class Law:
    """Law L = E + A / N^a + B / D^b in nats per token; a term that was not fitted has the coefficient 0."""

    E: float
    A: float = 0.0
    a: float = 0.0
    B: float = 0.0
    b: float = 0.0

    def loss(self, parameters: Any, tokens: Any) -> FloatArray:
        """Return the loss in nats per token at N `parameters` and D `tokens`."""
        n, d = np.asarray(parameters, dtype=np.float64), np.asarray(tokens, dtype=np.float64)
        return np.asarray(self.E + self.A * n**-self.a + self.B * d**-self.b)


def objective(law: Law, parameters: FloatArray, tokens: FloatArray, losses: FloatArray) -> float:
    """Return the objective of `fit`: the sum over runs of Huber(log L_predicted - log L), delta 1e-3.

    Huber(r) = r^2 / 2 if |r| <= delta, else delta (|r| - delta / 2). Hoffmann et al. 2022, arXiv:2203.15556,
    Approach 3. It is the sum and not the mean: see `_minimise`.
    """
    residual_n = np.log(law.loss(parameters, tokens)) - np.log(losses)
    return float(DELTA**2 * _huber(residual_n / DELTA).sum())


def unknowns(terms: Sequence[Term]) -> list[str]:
    """Return the names of the fitted numbers: E, then a coefficient and an exponent for each term."""
    return ["E", *(name for term in terms for name in COEFFICIENT_AND_EXPONENT[term])]


def fit_law(runs: pd.DataFrame, terms: tuple[Term, ...], resampled_rn: FloatArray | None) -> tuple[Law, list[Law]]:
    """Return the law with the lowest objective from many starts, and the law of each resample, started from there.

    `runs` has the columns parameters, tokens, loss; `resampled_rn` holds log losses [R, N], None without resamples.
    """
    problem = _Problem.from_runs(runs, terms)
    log_loss_n = np.log(runs["loss"].to_numpy(dtype=np.float64))
    minima = [_minimise(problem, start_p, log_loss_n) for start_p in _starts(problem, log_loss_n)]
    best_p = min(minima, key=lambda one: one[0])[1]
    if resampled_rn is None:
        return problem.law(best_p), []
    return problem.law(best_p), [problem.law(_minimise(problem, best_p, drawn_n)[1]) for drawn_n in resampled_rn]


@dataclass(frozen=True)
class _Problem:
    """Inputs of one fit, in coordinates in which L-BFGS-B converges quickly.

    A coordinate vector holds log E, then for each term the log of its share of the loss at the geometric mean of its
    variable, and its exponent times the spread (standard deviation) of the variable's log. A and a themselves are
    strongly correlated: A is the share at N = 1.
    """

    terms: tuple[Term, ...]
    log_mean: list[float]
    spread: list[float]
    u_tn: FloatArray  # standardised log of each term's variable

    @classmethod
    def from_runs(cls, runs: pd.DataFrame, terms: tuple[Term, ...]) -> _Problem:
        logs = np.log(runs[list(terms)].to_numpy(dtype=np.float64).T)
        mean, spread = logs.mean(axis=1), logs.std(axis=1)
        return cls(terms, mean.tolist(), spread.tolist(), (logs - mean[:, None]) / spread[:, None])

    def law(self, point_p: FloatArray) -> Law:
        values = {"E": float(np.exp(point_p[0]))}
        for term, share, scaled, mean, spread in zip(
            self.terms, point_p[1::2], point_p[2::2], self.log_mean, self.spread, strict=True
        ):
            coefficient, exponent = COEFFICIENT_AND_EXPONENT[term]
            values[exponent] = float(scaled / spread)
            values[coefficient] = float(np.exp(share + scaled / spread * mean))
        return Law(**values)

    def log_parts(self, point_p: FloatArray) -> FloatArray:
        """Return the log of E and of each term [1 + T, N]."""
        constant = np.full((1, self.u_tn.shape[1]), point_p[0])
        return np.concatenate([constant, point_p[1::2, None] - point_p[2::2, None] * self.u_tn])

    def value_and_gradient(self, point_p: FloatArray, log_loss_n: FloatArray) -> tuple[float, FloatArray]:
        """Return the objective over delta^2, and its gradient [P]."""
        parts = self.log_parts(point_p)
        predicted_n = np.logaddexp.reduce(parts, axis=0)
        z_n = (predicted_n - log_loss_n) / DELTA
        pull = np.exp(parts - predicted_n) * (np.clip(z_n, -1.0, 1.0) / DELTA)  # d objective / d log of each part
        gradient_p = np.empty_like(point_p)
        gradient_p[0] = pull[0].sum()
        gradient_p[1::2] = pull[1:].sum(axis=1)
        gradient_p[2::2] = -(pull[1:] * self.u_tn).sum(axis=1)
        return float(_huber(z_n).sum()), gradient_p

    def bounds(self, log_loss_n: FloatArray) -> list[tuple[float, float]]:
        share = (float(log_loss_n.min()) - 15.0, float(log_loss_n.max()) + 1.0)
        return [share, *(bound for spread in self.spread for bound in (share, (0.0, _LARGEST_EXPONENT * spread)))]


def _huber(z_n: FloatArray) -> FloatArray:
    """Return Huber's loss of each value, with delta 1."""
    size_n = np.abs(z_n)
    return np.where(size_n <= 1.0, 0.5 * z_n**2, size_n - 0.5)


def _minimise(problem: _Problem, start_p: FloatArray, log_loss_n: FloatArray) -> tuple[float, FloatArray]:
    """Run L-BFGS-B from one start; return the objective over delta^2, and the coordinates [P].

    Its tolerances are absolute for values under 1, so an objective of 1e-6 (let alone its mean over runs) would stop it
    at the start, as Besiroglu et al. 2024, arXiv:2404.10102, found in published fits. Hence the sum, over delta^2.
    """
    result = minimize(
        problem.value_and_gradient,
        start_p,
        args=(log_loss_n,),
        jac=True,
        method="L-BFGS-B",
        bounds=problem.bounds(log_loss_n),
        options={"maxiter": 2000, "maxfun": 4000, "ftol": 1e-13, "gtol": 1e-7, "maxcor": 20},
    )
    return float(result.fun), np.asarray(result.x)


def _starts(problem: _Problem, log_loss_n: FloatArray) -> list[FloatArray]:
    """Return the best points of a grid of exponents; E, A and B by non-negative least squares of relative errors."""
    starts = []
    for exponents in product(_EXPONENTS, repeat=len(problem.terms)):
        scaled = np.array(exponents) * problem.spread
        columns = np.concatenate([np.ones((1, len(log_loss_n))), np.exp(-scaled[:, None] * problem.u_tn)])
        shares, _ = nnls((columns / np.exp(log_loss_n)).T, np.ones(len(log_loss_n)))
        start_p = np.empty(1 + 2 * len(scaled))
        shares = np.log(np.maximum(shares, 1e-3 * np.exp(log_loss_n.mean())))  # the log of a share of 0 has no way back
        start_p[0], start_p[1::2], start_p[2::2] = shares[0], shares[1:], scaled
        starts.append(start_p)
    return sorted(starts, key=lambda start_p: problem.value_and_gradient(start_p, log_loss_n)[0])[:_STARTS]
