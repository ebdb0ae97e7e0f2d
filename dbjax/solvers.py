"""Solvers of the probability-flow ODE dz / dsigma = (z - D(z, sigma)) / sigma.

From sigma_max to 0 it turns noise into a sample (EDM, arXiv 2206.00364, section 3). At each noise
level one block is the denoiser D. A solver sees nothing of that: what it remembers, z and past
values of D, belongs to the trajectory and crosses the seams.
"""

from collections.abc import Callable
import itertools

import jax
import numpy as np

from dbjax import schedule
from dbjax.fields import Field
from dbjax.fields import FREE
from dbjax.fields import one_of

Denoise = Callable[[jax.Array, float], jax.Array]  # (z, sigma) -> D


def euler(denoise: Denoise, z: jax.Array, sigmas: np.ndarray) -> jax.Array:
  """Order 1: z' = (s'/s) z + (1 - s'/s) D(z, s). One evaluation a step.

  Args:
    denoise: D(z, sigma).
    z: (N, ...) noise of level sigmas[0].
    sigmas: descending, at most the last is 0.

  Returns:
    (N, ...) at level sigmas[-1].
  """
  for sigma, sigma_next in itertools.pairwise(sigmas):
    z = euler_step(z, denoise(z, sigma), sigma, sigma_next)
  return z


def heun(denoise: Denoise, z: jax.Array, sigmas: np.ndarray) -> jax.Array:
  """Order 2: EDM's Algorithm 1 without churn. Two evaluations a step, one in a step to 0."""
  for sigma, sigma_next in itertools.pairwise(sigmas):
    slope = (z - denoise(z, sigma)) / sigma
    ahead = z + (sigma_next - sigma) * slope
    if sigma_next > 0:
      slope = (slope + (ahead - denoise(ahead, sigma_next)) / sigma_next) / 2
      ahead = z + (sigma_next - sigma) * slope
    z = ahead
  return z


def dpmpp_2m(denoise: Denoise, z: jax.Array, sigmas: np.ndarray) -> jax.Array:
  """Order 2, multistep: DPM-Solver++(2M) (arXiv 2211.01095, Algorithm 2). One evaluation a step.

  D is extrapolated in lambda = -ln sigma to the middle of the step, from the last two
  evaluations; the first step and a step to 0 are Euler's.
  """
  last, h_last = None, None
  for sigma, sigma_next in itertools.pairwise(sigmas):
    d = denoised = denoise(z, sigma)
    if sigma_next > 0:
      h = np.log(sigma / sigma_next)
      if last is not None:
        d = denoised + h / (2 * h_last) * (denoised - last)
      last, h_last = denoised, h
    z = euler_step(z, d, sigma, sigma_next)
  return z


def euler_step(z: jax.Array, d: jax.Array, sigma: float, sigma_next: float) -> jax.Array:
  """z at sigma_next, from z and D at sigma: all but `ratio` of the noise is taken away."""
  ratio = sigma_next / sigma
  return ratio * z + (1 - ratio) * d


SOLVERS = {"euler": euler, "heun": heun, "dpmpp_2m": dpmpp_2m}

# Of tasks whose noise is Gaussian, and whose answer is where it flows to.
FIELDS = {
    **schedule.FIELDS,
    "sample.solver": Field("euler", "of the probability flow", one_of(*SOLVERS), FREE),
}
