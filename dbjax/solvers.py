"""Solvers of the probability-flow ODE dz / dsigma = (z - D(z, sigma)) / sigma.

From sigma_max to 0 it turns noise into a sample (EDM, arXiv 2206.00364, section 3). At each noise
level one block is the denoiser D. A solver sees nothing of that: what it remembers belongs to the
trajectory and crosses the seams.

Between two evaluations of D a solver computes nothing but sums: so it is a table of numbers, a row
an evaluation (`Table`), and any stretch of it can be one compiled loop. Before an evaluation it may
also add noise (`Churn`): then it solves a stochastic equation of the same marginals.
"""

from collections.abc import Callable, Mapping
import functools
import math
from typing import Any, NamedTuple

import jax
import numpy as np

from dbjax import schedule
from dbjax.errors import UserError
from dbjax.fields import above
from dbjax.fields import at_least
from dbjax.fields import Field
from dbjax.fields import FREE
from dbjax.fields import one_of

ALL_NOISE = 1e20  # above any sigma whose square float32 holds

Denoise = Callable[[jax.Array, float], jax.Array]  # (z, sigma) -> D


class Table(NamedTuple):
  """A solver on a grid of noise levels: K evaluations of D, float64.

  Before evaluation k noise is added to z, of standard deviation noise[k]: it is then of level
  sigma[k]. After it, with d = D(z, sigma[k]), z and a memory m of its shape become

      z' = move[k, 0] z + move[k, 1] d + move[k, 2] m
      m' = keep[k, 0] z + keep[k, 1] d + keep[k, 2] m

  Attributes:
    sigma: (K,), descending where no noise is added.
    move, keep: (K, 3).
    noise: (K,).
  """

  sigma: np.ndarray
  move: np.ndarray
  keep: np.ndarray
  noise: np.ndarray


class Churn(NamedTuple):
  """How much noise is added on the way (EDM, arXiv 2206.00364, Algorithm 2).

  The noise level that a step is raised to is denoised by the block of that level. So Heun's steps
  near a seam ask its two blocks in turn, and their weights come and go more often.

  Attributes:
    amount: S_churn, over all steps; 0: none.
    least, most: S_tmin and S_tmax; only steps from these levels add noise, both included.
    scale: S_noise, of its standard deviation.
  """

  amount: float = 0.0
  least: float = 0.0
  most: float = ALL_NOISE
  scale: float = 1.0

  def raised(self, sigmas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The levels (K,) to which z is raised where a step begins, and what is added for it (K,).

    Algorithm 2's gamma, but none is raised above the first of `sigmas` (K + 1,): no block has
    learned more noise than that.
    """
    begin, gamma = sigmas[:-1], min(self.amount / (len(sigmas) - 1), math.sqrt(2) - 1)
    churned = (self.least <= begin) & (begin <= self.most)
    hat = np.minimum(begin * (1 + np.where(churned, gamma, 0)), sigmas[0])
    return hat, self.scale * np.sqrt(hat**2 - begin**2)


_STILL = Churn()


def advance(z, d, m, move, keep) -> tuple:
  """The next z and m, by one row of a table."""
  return move[0] * z + move[1] * d + move[2] * m, keep[0] * z + keep[1] * d + keep[2] * m


def euler_table(sigmas: np.ndarray, churn: Churn = _STILL) -> Table:
  """Order 1: z' = (s'/s) z + (1 - s'/s) D(z, s). One evaluation a step."""
  begin, noise = churn.raised(sigmas)
  ratio = sigmas[1:] / begin
  move = np.stack([ratio, 1 - ratio, 0 * ratio], 1)
  return Table(begin, move, np.zeros_like(move), noise)


def heun_table(sigmas: np.ndarray, churn: Churn = _STILL) -> Table:
  """Order 2: EDM's Algorithm 2, without churn its Algorithm 1. Two evaluations a step, one in a
  step to 0.

  The first moves z by Euler's step, and remembers where half of that step leads; the second adds
  half a step of the slope that it finds.
  """
  rows = []
  for sigma, noise, sigma_next in zip(*churn.raised(sigmas), sigmas[1:]):
    ratio, half = sigma_next / sigma, (sigma_next - sigma) / 2
    rows.append((sigma, (ratio, 1 - ratio, 0), (1 + half / sigma, -half / sigma, 0), noise))
    if sigma_next > 0:
      rows.append((sigma_next, (half / sigma_next, -half / sigma_next, 1), (0, 0, 0), 0))
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
_CHURNED = ("euler", "heun")  # a multistep method remembers D of a z without the noise


def table(options: Mapping[str, Any], sigmas: np.ndarray) -> Table:
  """The table of options["solver"] on noise levels, with the churn that the options ask for.

  Raises:
    UserError: the solver knows no churn.
  """
  churn = churn_of(options)
  return TABLES[options["solver"]](sigmas, *[churn] * (churn is not None))


def churn_of(options: Mapping[str, Any], prefix: str = "") -> Churn | None:
  """What a sampler's options say of churn: None where they say nothing, or that there is none.

  Args:
    options: such as config.sample, with the fields of `CHURN` or without.
    prefix: of their names in an error.

  Raises:
    UserError: the solver knows no churn, or its interval is the wrong way round.
  """
  if not options.get("churn"):
    return None
  if options["solver"] not in _CHURNED:
    raise UserError(f"{prefix}churn={options['churn']:g}: expected 0 with {prefix}solver="
                    f"{options['solver']}, whose steps remember the last one's D; set it to 0, or "
                    f"{prefix}solver to {' or '.join(_CHURNED)}")
  check_interval(options, "churn", prefix)
  return Churn(*(options[name] for name in ("churn", "churn_from", "churn_to", "churn_noise")))


def check_interval(options: Mapping[str, Any], name: str, prefix: str = ""):
  """Raises UserError where options[name_from] is above options[name_to]."""
  least, most = options[f"{name}_from"], options[f"{name}_to"]
  if least > most:
    raise UserError(f"{prefix}{name}_from={least:g} is above {prefix}{name}_to={most:g}: expected "
                    "two noise levels, the lower one first; exchange them")


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
  for sigma, move, keep, _ in zip(*TABLES[solver](np.asarray(sigmas, np.float64))):
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

# Of those among them whose solver may add noise.
CHURN = {
    "sample.churn": Field(0.0, "noise added on the way, by euler and heun: EDM's S_churn; 0: none",
                          at_least(0), FREE),
    "sample.churn_from": Field(0.0, "none is added below this sigma: S_tmin", at_least(0), FREE),
    "sample.churn_to": Field(ALL_NOISE, "none is added above this sigma: S_tmax", at_least(0),
                             FREE),
    "sample.churn_noise": Field(1.0, "factor of that noise: S_noise", above(0), FREE),
}
