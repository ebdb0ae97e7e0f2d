"""What it costs that a block never trains on what its predecessors really produce.

The loss at each noise level on the states that the sampler itself reaches, beside that on
truly noised data. A state z of the sampler has no y to compare D(z) with. But for z = y +
sigma eps, with y of ANY distribution, Stein's unbiased risk estimate gives the same loss
without it:

    E |D(z) - y|^2 = E [ |D(z) - z|^2 + 2 sigma^2 div D(z) ] - d sigma^2

(div by Hutchinson's estimator, one probe; |z - mean|^2, whose mean is known, as control
variate.) Evaluated on both kinds of states it agrees on them where the sampler's states
are distributed as noised data are. So a gap of either sign is a departure from that, in
units of the loss; 0 is a perfect chain. It sees only what D reacts to: where D is little
more than c_skip z, at the highest noise or in an untrained block, any state has gap 0.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dbjax import denoiser
from dbjax.model import Model

_LEVELS = 4  # noise levels per block, out of those that the sampler visits
_KEPT = 2**28  # numbers, at most, in all states of a trajectory: 1 GiB


def exposure(model: Model, y: jax.Array, label: jax.Array) -> list[dict[str, Any]]:
  """Loss per noise level on noised data and on the sampler's trajectory.

  Args:
    model: all blocks, a `model.Model`.
    y: (N, H, W, C) images in [-1, 1], or latents; of which the first sample.batch_size are
      used, or fewer where they are large.
    label: (N,) theirs, for which the trajectory is sampled, without guidance: the loss is that
      of the unguided D.

  Returns:
    One dict per level, from the highest noise: block, sigma, loss (against y), sure and
    sure_trajectory (Stein's estimate on noised data and on the trajectory), gap (their
    difference) and gap_error, its standard error; None of a single image.
  """
  options = model.options({})
  sigmas = model.table(options).sigma
  # Not where Heun asks a second time in a step: that z is not corrected yet.
  begins = np.flatnonzero(np.append(sigmas[1:] < sigmas[:-1], True))
  begin = dict(sorted(zip(sigmas[begins], begins), reverse=True))
  room = max(2, _KEPT // (y[0].size * len(sigmas)))
  y, label = (jnp.asarray(x[:min(options["batch_size"], room)]) for x in (y, label))
  mine = [[s for s in begin if model.schedule.block_of(s) == b] for b in range(len(model.tasks))]
  spread = lambda n: np.unique(np.linspace(0, n - 1, min(_LEVELS, n)).round().astype(int))
  chosen = [[of_block[i] for i in spread(len(of_block))] for of_block in mine]
  of = model.config.seed, np.arange(len(label))
  states = model.trace(model.start(*of), options, _seeing_z, label, keys=model.keys(*of))[1]

  rows = []
  for b, task, params in model.blocks():
    for i, sigma in enumerate(chosen[b]):
      loss, sure, sure_trajectory = jax.device_get(_losses(
          task, params, model.frozen, model.key(b, i), y, states[begin[sigma]], jnp.float32(sigma),
          label))
      gap = sure_trajectory - sure
      rows.append(dict(
          block=b, sigma=float(sigma), loss=float(loss.mean()), sure=float(sure.mean()),
          sure_trajectory=float(sure_trajectory.mean()), gap=float(gap.mean()),
          gap_error=float(gap.std() / len(gap) ** 0.5) if len(gap) > 1 else None))
  return rows


def _seeing_z(task, params, frozen, z, sigma, label):
  return task.denoise(params, frozen, z, sigma, label), z


@functools.partial(jax.jit, static_argnums=0)
def _losses(task, params, frozen, key, y, visited, sigma, label):
  """Per-image losses at one noise level: (loss, sure, sure on the trajectory), each (N,)."""
  noise_key, probe_key = jax.random.split(key)
  sigmas = jnp.full(y.shape[:1], sigma)
  weight = denoiser.edm_weight(sigma, task.config.sigma_data)
  mean = lambda x: jnp.mean(x, axis=tuple(range(1, x.ndim)))
  probe = jax.random.rademacher(probe_key, y.shape, y.dtype)

  # The best linear D shrinks z towards the mean image: then |D - z|^2 is shrink |z - center|^2.
  center = jnp.mean(y, axis=0)
  spread = jnp.mean((y - center) ** 2) + sigma**2  # of z, per pixel
  shrink = (sigma**2 / spread) ** 2

  def sure(z):
    d, d_probe = jax.jvp(lambda z: task.denoise(params, frozen, z, sigmas, label), (z,), (probe,))
    risk = mean((d - z) ** 2) + sigma**2 * (2 * mean(probe * d_probe) - 1)
    return weight * (risk - shrink * (mean((z - center) ** 2) - spread)), d

  risk, d = sure(y + sigma * jax.random.normal(noise_key, y.shape))
  return weight * mean((d - y) ** 2), risk, sure(visited)[0]
