"""The solvers against Gaussian data, whose every denoiser and trajectory has a closed form."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from references import chain
from references import COV
from references import edm_schedule as schedule
from references import linear
from references import MU
from references import VALUES

from dbjax import solvers

SOLVERS = pytest.mark.parametrize("solver", list(solvers.TABLES))


def exact(z, sigma_from, sigma_to):
  """The probability-flow ODE of N(MU, COV) from z at sigma_from to sigma_to."""
  return MU + (z - MU) @ linear(lambda v: np.sqrt((v + sigma_to**2) / (v + sigma_from**2)))


@SOLVERS
@pytest.mark.parametrize("grid", ["karras", "equal_mass"])
def test_a_perfect_denoiser_lands_on_less_of_the_same_noise(solver, grid):
  rng = np.random.default_rng(0)
  y, eps = rng.uniform(-1, 1, (4, 5)), rng.normal(size=(4, 5))
  solve, sigmas = functools.partial(solvers.solve, solver), schedule(3).grid(grid, 12)
  for i in range(len(sigmas) - 1):
    z = solve(lambda z, sigma: y, y + sigmas[i] * eps, sigmas[i:i + 2])
    np.testing.assert_allclose(z, y + sigmas[i + 1] * eps, rtol=0, atol=1e-13 * (1 + sigmas[i]))
  y32, eps32 = jnp.float32(y), jnp.float32(eps)
  z = solve(lambda z, sigma: y32, y32 + 80 * eps32, sigmas[:6])
  np.testing.assert_allclose(z, y + sigmas[5] * eps, rtol=0, atol=80 * 1e-6)  # float32 of 80 eps


@SOLVERS
@pytest.mark.parametrize("num_blocks", [1, 3, 6])
def test_gaussian_data_come_out_with_their_mean_and_covariance(solver, num_blocks):
  """The solver is affine here, z -> z A + b: pushing a basis gives the moments exactly."""
  denoise, called = chain(num_blocks)
  end = solvers.solve(solver, denoise, np.vstack([np.zeros(3), np.eye(3)]),
                      schedule(num_blocks).karras_grid(200))
  mean, matrix = end[0], end[1:] - end[0]
  prior = np.sqrt(VALUES.max()) / 80  # the start N(0, 80^2) lacks that share of MU
  steps = {"euler": 0.015, "heun": 3e-4, "dpmpp_2m": 3e-4}[solver]  # the order is tested below
  np.testing.assert_allclose(mean, MU, rtol=0, atol=prior * np.abs(MU).max() + steps)
  np.testing.assert_allclose(80**2 * matrix.T @ matrix, COV, rtol=0, atol=steps)
  assert sorted(called) == called and set(called) == set(range(num_blocks))


@pytest.mark.parametrize("num_blocks", [1, 3, 6])
@pytest.mark.parametrize("solver, order", [("euler", 1), ("heun", 2), ("dpmpp_2m", 2)])
def test_order_of_convergence(solver, order, num_blocks):
  """Against the exact ODE; each expert asserts that it is asked for its own noise only."""
  denoise, _ = chain(num_blocks)
  start = 80 * np.random.default_rng(0).normal(size=(20, 3))
  errors = []
  for steps in (100, 200, 400):
    sigmas = schedule(num_blocks).karras_grid(steps + 1)[:-1]  # the step to 0 is always Euler's
    end = solvers.solve(solver, denoise, start, sigmas)
    errors.append(np.linalg.norm(end - exact(start, 80, 0.002)))
  orders = np.log2(np.divide(errors[:-1], errors[1:]))
  np.testing.assert_allclose(orders, order, atol=0.04)
  assert abs(orders[1] - order) < abs(orders[0] - order)  # it tends to that


def test_2m_is_its_definition_also_across_seams():
  """Algorithm 2 of arXiv 2211.01095, in lambda = -ln sigma."""
  denoise, called = chain(3)
  sigmas = schedule(3).karras_grid(10)
  start = 80 * np.random.default_rng(0).normal(size=(4, 3))
  lam = -np.log(sigmas[:-1])
  d = [denoise(start, sigmas[0])]
  z = sigmas[1] / sigmas[0] * start - np.expm1(lam[0] - lam[1]) * d[0]
  for i in range(2, 10):
    h, h_last = lam[i] - lam[i - 1], lam[i - 1] - lam[i - 2]
    d.append(denoise(z, sigmas[i - 1]))
    between = d[-1] + h / (2 * h_last) * (d[-1] - d[-2])
    z = sigmas[i] / sigmas[i - 1] * z - np.expm1(-h) * between
  expected = denoise(z, sigmas[9])
  np.testing.assert_allclose(solvers.dpmpp_2m(denoise, start, sigmas), expected, rtol=0, atol=1e-12)
  forgetful = start  # the positive control: each block begins anew
  for block in range(3):
    first, last = np.flatnonzero(np.equal(called[:10], block))[[0, -1]]
    forgetful = solvers.dpmpp_2m(denoise, forgetful, sigmas[first:last + 2])
  assert np.abs(forgetful - expected).max() > 1e-3


@pytest.mark.parametrize("solver, evaluations", [("euler", 18), ("heun", 35), ("dpmpp_2m", 18)])
def test_number_of_evaluations(solver, evaluations):
  denoise, called = chain(3)
  solvers.solve(solver, denoise, np.zeros((1, 3)), schedule(3).karras_grid(18))
  assert len(called) == evaluations
