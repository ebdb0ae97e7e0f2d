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
from dbjax.errors import UserError

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


CHURNED = pytest.mark.parametrize("churn", [
    solvers.Churn(30.0), solvers.Churn(4.0, 0.05, 50.0, 1.003), solvers.Churn(8.0, 0.01, 2.0)])


def algorithm_2(denoise, z, t, churn, normals, second):
  """EDM, arXiv 2206.00364, as it is printed, but never above t[0]; `second`: lines 7 to 9."""
  steps = len(t) - 1
  for i in range(steps):
    gamma = min(churn.amount / steps, np.sqrt(2) - 1) if churn.least <= t[i] <= churn.most else 0
    t_hat = min(t[i] + gamma * t[i], t[0])
    z_hat = z + np.sqrt(t_hat**2 - t[i] ** 2) * churn.scale * normals[i]
    d = (z_hat - denoise(z_hat, t_hat)) / t_hat
    z = z_hat + (t[i + 1] - t_hat) * d
    if second and t[i + 1] != 0:
      d_next = (z - denoise(z, t[i + 1])) / t[i + 1]
      z = z_hat + (t[i + 1] - t_hat) * (d / 2 + d_next / 2)
  return z


@CHURNED
@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_churn_is_algorithm_2(solver, churn):
  """And who denoises what is raised across a seam is the block of that noise: each asserts it."""
  denoise, sigmas = chain(3)[0], schedule(3).karras_grid(20)
  rng = np.random.default_rng(0)
  start, normals = 80 * rng.normal(size=(4, 3)), rng.normal(size=(20, 4, 3))
  expected = algorithm_2(denoise, start, sigmas, churn, normals, solver == "heun")
  options = dict(solver=solver, churn=churn.amount, churn_from=churn.least, churn_to=churn.most,
                 churn_noise=churn.scale)
  z, m, table = start, 0 * start, solvers.table(options, sigmas)
  for k, (sigma, move, keep, noise) in enumerate(zip(*table)):
    z = z + noise * normals[k // 2 if solver == "heun" else k]
    z, m = solvers.advance(z, denoise(z, sigma), m, move, keep)
  np.testing.assert_allclose(z, expected, rtol=0, atol=1e-11)
  assert table.sigma.max() == 80 and table.noise[0] == 0
  assert np.abs(z - solvers.solve(solver, denoise, start, sigmas)).max() > 0.01


def variances(table):
  """Of samples, along each axis of the data: a solver's steps are affine in z and m."""
  spread = np.einsum("v,ij->vij", 80.0**2 + VALUES, [[1, 0], [0, 0]])
  for sigma, move, keep, noise in zip(*table):
    shrink = VALUES / (VALUES + sigma**2)
    step = np.stack([[row[0] + row[1] * shrink, np.full(3, row[2])] for row in (move, keep)])
    step = step.transpose(2, 0, 1)
    spread[:, 0, 0] += noise**2
    spread = step @ spread @ step.transpose(0, 2, 1)
  return spread[:, 0, 0]


@pytest.mark.parametrize("churn", [
    solvers.Churn(), solvers.Churn(40.0), solvers.Churn(80.0, 0.05, 50.0)])
@pytest.mark.parametrize("solver, order", [("euler", 1), ("heun", 2)])
def test_churn_keeps_the_variance_of_gaussian_data(solver, order, churn):
  """But for the error of its steps, which vanishes with the solver's order."""
  end = VALUES + 0.002**2  # the last step, from there to 0, is Euler's whatever the solver
  of = lambda steps, churn: variances(solvers.TABLES[solver](
      schedule(3).karras_grid(steps + 1)[:-1], churn))
  errors = [np.abs(of(steps, churn) / end - 1).max() for steps in (400, 800, 1600)]
  np.testing.assert_allclose(np.log2(np.divide(errors[:-1], errors[1:])), order, atol=0.2)
  assert errors[-1] < {"euler": 0.03, "heun": 5e-4}[solver]
  if churn.amount:  # where the noise is too strong it does not
    assert np.all(of(1600, churn._replace(scale=1.1)) > 1.05 * VALUES)


def test_which_levels_are_raised_and_by_how_much():
  sigmas = np.array([8.0, 4.0, 2.0, 1.0, 0.0])
  for churn, expected in [
      (solvers.Churn(), [8, 4, 2, 1]), (solvers.Churn(0.4), [8, 4.4, 2.2, 1.1]),
      (solvers.Churn(100), [8, *np.sqrt(2) * sigmas[1:4]]),
      (solvers.Churn(0.4, 2, 4), [8, 4.4, 2.2, 1]), (solvers.Churn(0.4, 2.1, 3.9), [8, 4, 2, 1])]:
    for scale in (1.0, 1.5):
      hat, noise = churn._replace(scale=scale).raised(sigmas)
      np.testing.assert_allclose(hat, expected, rtol=1e-14)
      np.testing.assert_allclose(noise, scale * np.sqrt(np.square(expected) - sigmas[:4] ** 2),
                                 atol=1e-14)


@SOLVERS
def test_no_churn_is_the_table_of_before(solver):
  sigmas = schedule(3).karras_grid(9)
  plain = dict(solver=solver)
  for options in (plain, plain | dict(churn=0.0, churn_from=2.0, churn_to=1.0, churn_noise=3.0)):
    table = solvers.table(options, sigmas)
    np.testing.assert_array_equal(table.noise, 0)
    assert np.isin(table.sigma, sigmas).all()
    if solver == "euler":
      ratio = sigmas[1:] / sigmas[:-1]
      np.testing.assert_array_equal(table.move, np.stack([ratio, 1 - ratio, 0 * ratio], 1))
    if solver == "heun":
      s, t = sigmas[:2]
      np.testing.assert_array_equal(table.move[:2], [
          (t / s, 1 - t / s, 0), ((t - s) / 2 / t, -(t - s) / 2 / t, 1)])


@pytest.mark.parametrize("given, words", [
    (dict(solver="dpmpp_2m"), "churn=30: expected 0 with solver=dpmpp_2m, .* euler or heun$"),
    (dict(churn_from=3.0, churn_to=2.0), "churn_from=3 is above churn_to=2: expected"),
])
def test_churn_that_makes_no_sense_is_refused(given, words):
  options = dict(solver="heun", churn=30.0, churn_from=0.0, churn_to=1e20, churn_noise=1.0) | given
  with pytest.raises(UserError, match=f"^{words}") as e:
    solvers.table(options, schedule(3).karras_grid(9))
  assert "\n" not in str(e.value)
  with pytest.raises(UserError, match="^sample.churn.* sample.(solver|churn_to)="):
    solvers.churn_of(options, "sample.")
