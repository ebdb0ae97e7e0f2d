"""The solvers against Gaussian data, whose every denoiser and trajectory has a closed form."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_dit import random_params

from dbjax import config as config_lib
from dbjax import sample
from dbjax import tasks
from dbjax.schedule import make_schedule

MU = np.array([0.4, -0.3, 0.1])
COV = np.array([[0.5, 0.2, -0.1], [0.2, 0.3, 0.05], [-0.1, 0.05, 0.1]])
VALUES, VECTORS = np.linalg.eigh(COV)
SOLVERS = pytest.mark.parametrize("solver", list(sample.SOLVERS))


def schedule(num_blocks):
  return make_schedule(SimpleNamespace(P_mean=-1.2, P_std=1.2, sigma_min=0.002, sigma_max=80.0,
                                       partition="equal_mass", gamma=0.05), num_blocks)


def linear(scale):
  """The matrix with the data's eigenvectors and eigenvalues scale(VALUES)."""
  return VECTORS * scale(VALUES) @ VECTORS.T


def expert(lo, hi):
  """The denoiser of N(MU, COV), float64, for one block's noise only."""

  def denoise(z, sigma):
    assert lo <= sigma <= hi
    return MU + (z - MU) @ linear(lambda v: v / (v + sigma**2))

  return denoise


def chain(num_blocks):
  """D(z, sigma) by `num_blocks` experts, and the list of those that were called."""
  split = schedule(num_blocks)
  experts = [expert(lo, hi) for hi, lo in zip(split.boundaries, split.boundaries[1:])]
  called = []

  def denoise(z, sigma):
    block = int(split.block_of(sigma))
    called.append(block)
    return experts[block](z, sigma)

  return denoise, called


def exact(z, sigma_from, sigma_to):
  """The probability-flow ODE of N(MU, COV) from z at sigma_from to sigma_to."""
  return MU + (z - MU) @ linear(lambda v: np.sqrt((v + sigma_to**2) / (v + sigma_from**2)))


@SOLVERS
@pytest.mark.parametrize("grid", ["karras", "equal_mass"])
def test_a_perfect_denoiser_lands_on_less_of_the_same_noise(solver, grid):
  rng = np.random.default_rng(0)
  y, eps = rng.uniform(-1, 1, (4, 5)), rng.normal(size=(4, 5))
  solve, sigmas = sample.SOLVERS[solver], schedule(3).grid(grid, 12)
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
  end = sample.SOLVERS[solver](denoise, np.vstack([np.zeros(3), np.eye(3)]),
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
    end = sample.SOLVERS[solver](denoise, start, sigmas)
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
  np.testing.assert_allclose(sample.dpmpp_2m(denoise, start, sigmas), expected, rtol=0, atol=1e-12)
  forgetful = start  # the positive control: each block begins anew
  for block in range(3):
    first, last = np.flatnonzero(np.equal(called[:10], block))[[0, -1]]
    forgetful = sample.dpmpp_2m(denoise, forgetful, sigmas[first:last + 2])
  assert np.abs(forgetful - expected).max() > 1e-3


@pytest.mark.parametrize("solver, evaluations", [("euler", 18), ("heun", 35), ("dpmpp_2m", 18)])
def test_number_of_evaluations(solver, evaluations):
  denoise, called = chain(3)
  sample.SOLVERS[solver](denoise, np.zeros((1, 3)), schedule(3).karras_grid(18))
  assert len(called) == evaluations


@dataclasses.dataclass(frozen=True)
class Expert:
  """A task whose D is that of N(MU, COV), and NaN unless block, weights and sigma agree."""

  block: int

  def denoise(self, params, z, sigma, label):
    values = jnp.asarray(VALUES)
    d = MU + ((z - MU) @ VECTORS * (values / (values + sigma[:, None] ** 2))) @ VECTORS.T
    mine = (params["block"][0] == self.block) & (params["lo"] <= sigma) & (sigma <= params["hi"])
    return jnp.where(mine[:, None], d, jnp.nan)


def experts(num_blocks):
  split = schedule(num_blocks)
  params = tuple(dict(block=np.full(12_345, b, np.float32), lo=np.float32(lo), hi=np.float32(hi))
                 for b, (hi, lo) in enumerate(zip(split.boundaries, split.boundaries[1:])))
  return sample.Model(None, split, tuple(map(Expert, range(num_blocks))), params,
                      (0,) * num_blocks)


@SOLVERS
@pytest.mark.parametrize("num_blocks", [1, 3])
def test_a_model_routes_each_sigma_to_its_block(solver, num_blocks):
  start = 80 * np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
  sigmas = schedule(num_blocks).karras_grid(20)
  ours = sample.SOLVERS[solver](experts(num_blocks).denoiser(jnp.zeros(4, int)), start, sigmas)
  expected = sample.SOLVERS[solver](chain(num_blocks)[0], start.astype(np.float64), sigmas)
  np.testing.assert_allclose(ours, expected, rtol=0, atol=80 * 1e-6)  # float32 of the start


def test_only_one_block_is_on_the_device():
  denoise = experts(3).denoiser(jnp.zeros(4, int))
  resident = lambda: [int(x[0]) for x in jax.live_arrays() if x.shape == (12_345,)]
  assert resident() == []
  for sigma, block in [(80.0, 0), (1.0, 0), (0.3, 1), (0.1, 2), (0.002, 2), (0.6, 0)]:
    denoise(jnp.zeros((4, 3)), sigma)
    assert resident() == [block]


@pytest.fixture
def model(tiny):
  """Three blocks of a tiny DiT with random weights."""
  config = config_lib.resolve(tiny())
  of_blocks = tuple(tasks.make_task(config, b) for b in range(3))
  weights = tuple(random_params(of_blocks[0].network, np.zeros((1, 8, 8, 1)), np.zeros(1),
                                np.zeros(1, int), seed=b) for b in range(3))
  return sample.Model(config, make_schedule(config.schedule, 3), of_blocks, weights, (0,) * 3)


def test_generate(model):
  draw = lambda n, **options: sample.collect(model.generate(n, **options))
  whole, labels = draw(10, batch_size=10)
  assert whole.shape == (10, 8, 8, 1) and whole.dtype == np.uint8
  np.testing.assert_array_equal(labels, np.arange(10))
  assert len(np.unique(whole)) > 100  # neither flat nor saturated

  def assert_same(samples, expected):  # another batch size sums in another order
    difference = np.abs(samples.astype(int) - expected)
    assert difference.max() <= 1 and np.mean(difference > 0) < 0.01

  parts = list(model.generate(10, batch_size=4))
  assert [len(label) for _, label in parts] == [4, 4, 2]
  assert_same(np.concatenate([x for x, _ in parts]), whole)
  np.testing.assert_array_equal(np.concatenate([label for _, label in parts]), labels)
  tail, labels = draw(4, first=6, batch_size=4)
  assert_same(tail, whole[6:])
  np.testing.assert_array_equal(labels, np.arange(6, 10))

  assert np.mean(draw(10, batch_size=10, seed=1)[0] != whole) > 0.5
  threes, labels = draw(10, batch_size=10, labels=(3, 1))
  np.testing.assert_array_equal(labels, [3, 1] * 5)
  differ = np.any(threes != whole, axis=(1, 2, 3))  # only those asked for another class
  np.testing.assert_array_equal(differ, np.arange(10) != 1)
