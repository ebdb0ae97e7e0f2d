"""Solvers of the probability-flow ODE dz / dsigma = (z - D(z, sigma)) / sigma.

From sigma_max to 0 it turns noise into a sample (EDM, arXiv 2206.00364, section 3). At each noise
level one block is the denoiser D. A solver sees nothing of that: what it remembers belongs to the
trajectory and crosses the seams.

Between two evaluations of D a solver computes nothing but sums: so it is a table of numbers, a row
an evaluation (`Table`), and any stretch of it can be one compiled loop.
"""

from collections.abc import Callable
import functools
import itertools
from typing import NamedTuple

import jax
import numpy as np

from dbjax import schedule
from dbjax.fields import Field
from dbjax.fields import FREE
from dbjax.fields import one_of

Denoise = Callable[[jax.Array, float], jax.Array]  # (z, sigma) -> D


class Table(NamedTuple):
  """A solver on a grid of noise levels: K evaluations of D, float64.

  After evaluation k, with d = D(z, sigma[k]), z and a memory m of its shape become

      z' = move[k, 0] z + move[k, 1] d + move[k, 2] m
      m' = keep[k, 0] z + keep[k, 1] d + keep[k, 2] m

  Attributes:
    sigma: (K,) descending.
    move, keep: (K, 3).
  """

  sigma: np.ndarray
  move: np.ndarray
  keep: np.ndarray


def advance(z, d, m, move, keep) -> tuple:
  """The next z and m, by one row of a table."""
  return move[0] * z + move[1] * d + move[2] * m, keep[0] * z + keep[1] * d + keep[2] * m


def euler_table(sigmas: np.ndarray) -> Table:
  """Order 1: z' = (s'/s) z + (1 - s'/s) D(z, s). One evaluation a step."""
  ratio = sigmas[1:] / sigmas[:-1]
  move = np.stack([ratio, 1 - ratio, 0 * ratio], 1)
  return Table(sigmas[:-1], move, np.zeros_like(move))


def heun_table(sigmas: np.ndarray) -> Table:
  """Order 2: EDM's Algorithm 1 without churn. Two evaluations a step, one in a step to 0.

  The first moves z by Euler's step, and remembers where half of that step leads; the second adds
  half a step of the slope that it finds.
  """
  rows = []
  for sigma, sigma_next in itertools.pairwise(sigmas):
    ratio, half = sigma_next / sigma, (sigma_next - sigma) / 2
    rows.append((sigma, (ratio, 1 - ratio, 0), (1 + half / sigma, -half / sigma, 0)))
    if sigma_next > 0:
      rows.append((sigma_next, (half / sigma_next, -half / sigma_next, 1), (0, 0, 0)))
  return Table(*map(np.array, zip(*rows)))


def dpmpp_2m_table(sigmas: np.ndarray) -> Table:
  """Order 2, multistep: DPM-Solver++(2M) (arXiv 2211.01095, Algorithm 2). One evaluation a step.

  D is extrapolated in lambda = -ln sigma to the middle of the step, from the last two
  evaluations; the first step and a step to 0 are Euler's.
  """
  table, steps = euler_table(sigmas), len(sigmas) - 1
  ratio, share = sigmas[1:] / sigmas[:-1], np.zeros(steps)
  h = -np.log(ratio, out=np.zeros(steps), where=ratio > 0)
  share[1:] = h[1:] / (2 * h[:-1])  # of the last difference of D
  move = np.stack([ratio, (1 - ratio) * (1 + share), -(1 - ratio) * share], 1)
  return table._replace(move=move, keep=np.tile([0.0, 1.0, 0.0], (steps, 1)))


TABLES = {"euler": euler_table, "heun": heun_table, "dpmpp_2m": dpmpp_2m_table}


def solve(solver: str, denoise: Denoise, z: jax.Array, sigmas: np.ndarray) -> jax.Array:
  """The ODE, from the first of the noise levels to the last, by any denoiser.

  Args:
    solver: one of `TABLES`.
    denoise: D(z, sigma).
    z: (N, ...) noise of level sigmas[0].
    sigmas: descending, at most the last is 0.

  Returns:
    (N, ...) at level sigmas[-1].
  """
  m = 0 * z
  for sigma, move, keep in zip(*TABLES[solver](np.asarray(sigmas, np.float64))):
    z, m = advance(z, denoise(z, float(sigma)), m, move.tolist(), keep.tolist())
  return z


euler, heun, dpmpp_2m = (functools.partial(solve, solver) for solver in TABLES)


def euler_step(z: jax.Array, d: jax.Array, sigma: float, sigma_next: float) -> jax.Array:
  """z at sigma_next, from z and D at sigma: all but `ratio` of the noise is taken away."""
  ratio = sigma_next / sigma
  return ratio * z + (1 - ratio) * d


# Of tasks whose noise is Gaussian, and whose answer is where it flows to.
FIELDS = {
    **schedule.FIELDS,
    "sample.solver": Field("euler", "of the probability flow", one_of(*TABLES), FREE),
}
