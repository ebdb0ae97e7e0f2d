"""EDM preconditioning (arXiv 2206.00364, Table 1): a denoiser around any network.

    D(z, sigma) = c_skip z + c_out F(c_in z, c_noise)

The scalings give F inputs and targets of unit variance at every noise level, if the
data have standard deviation sigma_data.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def denoise(network: Callable[[jax.Array, jax.Array], jax.Array], z: jax.Array,
            sigma: jax.Array, sigma_data: float) -> jax.Array:
  """D(z, sigma): an estimate of y from z = y + sigma eps.

  Args:
    network: F(c_in z, c_noise), from (N, ...) and (N,) to (N, ...).
    z: (N, ...) noised data.
    sigma: (N,) noise levels, above 0.
    sigma_data: standard deviation of the data.

  Returns:
    (N, ...), float32.
  """
  variance = sigma**2 + sigma_data**2
  c_skip = sigma_data**2 / variance
  c_out = sigma * sigma_data * jax.lax.rsqrt(variance)
  c_in = input_scale(sigma, sigma_data)
  c_noise = noise_level(sigma)
  wide = lambda c: c.reshape(c.shape + (1,) * (z.ndim - 1))
  f = network(wide(c_in) * z, c_noise).astype(jnp.float32)
  return wide(c_skip) * z + wide(c_out) * f


def input_scale(sigma: jax.Array, sigma_data: float) -> jax.Array:
  """c_in(sigma): c_in z has unit variance at every noise level."""
  return jax.lax.rsqrt(sigma**2 + sigma_data**2)


def noise_level(sigma: jax.Array) -> jax.Array:
  """c_noise(sigma): how a network is told the noise level."""
  return jnp.log(sigma) / 4


def edm_weight(sigma: jax.Array, sigma_data: float) -> jax.Array:
  """w(sigma) = 1 / c_out^2: the loss of an untrained F is 1 at every noise level."""
  return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
