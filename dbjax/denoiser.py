"""EDM preconditioning (arXiv 2206.00364, Table 1): a denoiser around any network.

    D(z, sigma) = c_skip z + c_out F(c_in z, c_noise)

The scalings give F inputs and targets of unit variance at every noise level, if the
data have standard deviation sigma_data.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

_FREQUENCIES = np.geomspace(0.25, 8, 8, dtype=np.float32)  # of ln sigma, which spans about 10
LOG_VARIANCE = "log_variance"  # the parameter of `log_variance`
NEW_LOG_VARIANCE = np.zeros(1 + 2 * len(_FREQUENCIES), np.float32)


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


def log_variance(weights: jax.Array, sigma: jax.Array) -> jax.Array:
  """u(sigma) of EDM2 (arXiv 2312.02696, equation 14): ln of the error that is left at each level.

  With the loss exp(-u) error + u it is learned beside the network, and all levels then push the
  network equally. Samplers have no use for it.

  Args:
    weights: like NEW_LOG_VARIANCE, which are u = 0: a constant, then of cosines and sines.
    sigma: (N,).

  Returns:
    (N,) float32.
  """
  angles = jnp.log(sigma)[:, None] * _FREQUENCIES
  features = jnp.concatenate([jnp.ones_like(angles[:, :1]), jnp.cos(angles), jnp.sin(angles)], 1)
  return features @ weights


def direction_error(d: jax.Array, y: jax.Array, z: jax.Array, sigma: jax.Array,
                    sigma_data: float) -> jax.Array:
  """1 - the cosine of the angle between F and what it should be, about.

  LightningDiT (arXiv 2501.01423) has an angle at each position; this one is of the whole image.

  Args:
    d, y, z: (N, ...): denoised, clean and noised.
    sigma: (N,).
    sigma_data: of the data.

  Returns:
    (N,), from 0.005, which is that of a perfect F, to 2.
  """
  wide = (len(sigma), *[1] * (z.ndim - 1))
  skipped = (sigma_data**2 / (sigma**2 + sigma_data**2)).reshape(wide) * z
  f, target = (x.reshape(len(x), -1) for x in (d - skipped, y - skipped))  # both times c_out
  square = jnp.sum(target**2, 1)
  # An F of 0, as a new network's, has no direction: it counts as one of a tenth of the length.
  norms = jnp.sqrt((jnp.sum(f**2, 1) + 1e-2 * square) * square + 1e-30)
  return 1 - jnp.sum(f * target, 1) / norms
