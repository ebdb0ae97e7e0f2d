"""EDM's preconditioning against its formulas, and the unit variances that they are for."""

import jax.numpy as jnp
import numpy as np
import pytest

from dbjax import denoiser

SIGMA_DATA = 0.75
SIGMA = np.geomspace(0.002, 80, 13)


def denoise(network, z, sigma=SIGMA):
  """denoiser.denoise of z (N, H) -> (N, H) float64."""
  sigma = jnp.asarray(sigma, jnp.float32)
  z = jnp.broadcast_to(jnp.asarray(z, jnp.float32), (len(sigma), np.shape(z)[-1]))
  return np.asarray(denoiser.denoise(network, z, sigma, SIGMA_DATA), np.float64)


def scalings():
  """c_skip, c_out, c_in, c_noise at each of SIGMA, as `denoise` applies them."""
  seen = {}

  def look(x, c_noise):
    seen.update(c_in=np.asarray(x, np.float64)[:, 0], c_noise=np.asarray(c_noise, np.float64))
    return 0 * x

  c_skip = denoise(look, [1.0])[:, 0]
  c_out = denoise(lambda x, _: jnp.ones_like(x), [0.0])[:, 0]
  return c_skip, c_out, seen["c_in"], seen["c_noise"]


def test_the_scalings_are_edms():
  variance = SIGMA**2 + SIGMA_DATA**2
  expected = [SIGMA_DATA**2 / variance, SIGMA * SIGMA_DATA / np.sqrt(variance),
              1 / np.sqrt(variance), np.log(SIGMA) / 4]
  for ours, formula in zip(scalings(), expected):
    np.testing.assert_allclose(ours, formula, rtol=1e-6)


def test_the_networks_input_and_target_have_unit_variance():
  y = SIGMA_DATA * np.array([1, 1, -1, -1])  # with eps, exact moments of independent y and eps
  eps = np.array([1, -1, 1, -1])
  c_skip, c_out, c_in, _ = (c[:, None] for c in scalings())
  z = y + SIGMA[:, None] * eps
  np.testing.assert_allclose(np.var(c_in * z, axis=1), 1, rtol=1e-5)
  np.testing.assert_allclose(np.var((y - c_skip * z) / c_out, axis=1), 1, rtol=1e-5)


def test_the_weighted_loss_of_an_untrained_network_is_1():
  y, eps = SIGMA_DATA * np.array([1, 1, -1, -1]), np.array([1, -1, 1, -1])
  d = denoise(lambda x, _: 0 * x, y + SIGMA[:, None] * eps)
  weight = denoiser.edm_weight(SIGMA, SIGMA_DATA)
  # At sigma = 0.002 the error itself, 0.002, is known to 6e-8 / 0.002 = 3e-5 in float32.
  np.testing.assert_allclose(weight * np.mean((d - y) ** 2, axis=1), 1, rtol=6e-5)


def test_the_weight_is_the_inverse_square_of_c_out():
  np.testing.assert_allclose(denoiser.edm_weight(SIGMA, SIGMA_DATA), 1 / scalings()[1] ** 2,
                             rtol=1e-6)
  assert denoiser.edm_weight(0.002, 0.5) == pytest.approx(250_004)  # method.md: 250,000


def test_each_image_has_its_own_sigma():
  rng = np.random.default_rng(0)
  z, f = rng.normal(size=(2, 3, 4, 5, 2)).astype(np.float32)
  sigma = np.array([0.01, 1, 30], np.float32)
  ours = denoiser.denoise(lambda x, _: jnp.asarray(f, jnp.bfloat16), z, sigma, 0.5)
  assert ours.dtype == np.float32
  f = np.asarray(jnp.asarray(f, jnp.bfloat16), np.float64)
  for i, s in enumerate(sigma.astype(np.float64)):
    expected = 0.25 / (s**2 + 0.25) * z[i] + 0.5 * s / np.sqrt(s**2 + 0.25) * f[i]
    np.testing.assert_allclose(ours[i], expected, rtol=0, atol=2e-6)
