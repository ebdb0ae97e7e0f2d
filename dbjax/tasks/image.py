"""Image generation: a label-conditional denoiser of pixels or latents (method: EDM, DiT).

Noised: the image y in [-1, 1], or its latent. Condition: its class, dropped now and then so that
one network also learns the unconditional denoiser, for guidance (arXiv 2207.12598).
Loss: w(sigma) |D(y + sigma eps, sigma, label) - y|^2. Answer: the last denoised z.
Metric: is it the class that was asked for, and is it distributed as the data are.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dbjax import denoiser
from dbjax import schedule
from dbjax.models.dit import DiT


@dataclasses.dataclass(frozen=True)
class ImageTask:
  """The task as ONE block sees it; equal for blocks with as many layers."""

  network: DiT
  image_shape: tuple[int, int, int]
  sigma_data: float
  label_drop: float
  flip: bool = False
  dtype: Any = jnp.uint8  # of the data: pixels, or float16 latents

  def init(self, key: jax.Array):
    """Parameters of a new block: a pytree of float32."""
    z = jnp.zeros((1, *self.image_shape))
    return self.network.init(key, z, jnp.zeros(1), jnp.zeros(1, jnp.int32))["params"]

  def abstract_batch(self, num: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes and dtypes of a batch of `num`, as `draw` takes it."""
    return dict(image=jax.ShapeDtypeStruct((num, *self.image_shape), self.dtype),
                label=jax.ShapeDtypeStruct((num,), jnp.int32))

  def draw(self, key: jax.Array, batch: dict[str, jax.Array],
           interval: schedule.Interval) -> dict[str, jax.Array]:
    """Everything random in the loss, for the whole batch at once.

    Args:
      key: of this block and step.
      batch: image (N, H, W, C) uint8 or latents, label (N,) int32.
      interval: of the block.

    Returns:
      y (N, H, W, C), z (N, H, W, C), sigma (N,), label (N,), leading axis N.
    """
    sigma_key, noise_key, drop_key = jax.random.split(key, 3)
    y = to_float(batch["image"])
    if self.flip:
      y = random_flip(jax.random.fold_in(key, 3), y)  # 0 to 2 are those of the split
    sigma = schedule.sample_sigma(sigma_key, y.shape[:1], interval)
    z = y + sigma[:, None, None, None] * jax.random.normal(noise_key, y.shape)
    dropped = jax.random.bernoulli(drop_key, self.label_drop, sigma.shape)
    label = jnp.where(dropped, self.network.num_classes, batch["label"])
    return dict(y=y, z=z, sigma=sigma, label=label)

  def loss(self, params, drawn: dict[str, jax.Array]) -> jax.Array:
    """EDM's weighted L2 (arXiv 2206.00364, equation 2), mean over all: float32 scalar."""
    error = self.denoise(params, drawn["z"], drawn["sigma"], drawn["label"]) - drawn["y"]
    weight = denoiser.edm_weight(drawn["sigma"], self.sigma_data)
    return jnp.mean(weight * jnp.mean(jnp.square(error), axis=(1, 2, 3)))

  def denoise(self, params, z: jax.Array, sigma: jax.Array, label: jax.Array) -> jax.Array:
    """D(z, sigma, label). z (N, H, W, C), sigma (N,), label (N,) -> (N, H, W, C)."""
    network = lambda x, c_noise: self.network.apply({"params": params}, x, c_noise, label)
    return denoiser.denoise(network, z, sigma, self.sigma_data)

  def denoise_guided(self, params, z: jax.Array, sigma: jax.Array, label: jax.Array,
                     guidance: jax.Array) -> jax.Array:
    """D_none + guidance (D_label - D_none): twice the cost of `denoise`, which is guidance 1."""
    twice = lambda x: jnp.concatenate([x, x])
    none = jnp.full_like(label, self.network.num_classes)
    labels = jnp.concatenate([label, none])
    d_label, d_none = jnp.split(self.denoise(params, twice(z), twice(sigma), labels), 2)
    return d_none + guidance * (d_label - d_none)

  def prior(self, key: jax.Array, sigma_max: float) -> jax.Array:
    """Where a sample starts: (H, W, C) of pure noise."""
    return sigma_max * jax.random.normal(key, self.image_shape)

  def answer(self, z: jax.Array) -> np.ndarray:
    """The sampler's last z as images: (N, H, W, C) uint8; latents as they are, float32."""
    if self.dtype != jnp.uint8:
      return np.asarray(z)
    return np.asarray(jnp.clip(jnp.round(127.5 * (z + 1)), 0, 255).astype(jnp.uint8))

  def picture(self, answers: np.ndarray) -> np.ndarray:
    """Answers to look at: uint8, one or three channels; of latents the first three."""
    if answers.dtype == np.uint8:
      return answers
    values = 127.5 * (answers[..., :3 if answers.shape[-1] > 2 else 1] / (3 * self.sigma_data) + 1)
    return np.clip(np.round(values), 0, 255).astype(np.uint8)


def make_task(config, block: int) -> ImageTask:
  """The task of a resolved config for one block."""
  m, d = config.model, config.data
  network = DiT(config.layers_per_block[block], m.width, m.num_heads, m.patch_size, d.num_classes,
                m.mlp_ratio, jnp.dtype(m.dtype), m.remat, m.unroll)
  shape = (d.image_size, d.image_size, d.channels)
  dtype = jnp.uint8 if d.feature == "image" else jnp.float16
  return ImageTask(network, shape, config.sigma_data, config.task.label_drop, config.task.flip,
                   dtype)


def to_float(image: jax.Array) -> jax.Array:
  """uint8 (over the wire) to float32 in [-1, 1]; latents only to float32."""
  y = image.astype(jnp.float32)
  return y / 127.5 - 1 if image.dtype == jnp.uint8 else y


def random_flip(key: jax.Array, image: jax.Array) -> jax.Array:
  """Mirrors each image (N, H, W, C) left to right, or not."""
  flipped = jax.random.bernoulli(key, shape=image.shape[:1])
  return jnp.where(flipped[:, None, None, None], image[:, :, ::-1], image)


def fit_judge(images: np.ndarray, labels: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
  """A classifier of images (N, H, W, C) uint8 by their pixels: an SVC. For small images."""
  from sklearn import svm  # pylint: disable=g-import-not-at-top

  flat = lambda x: np.asarray(x, np.float64).reshape(len(x), -1) / 127.5 - 1
  judge = svm.SVC().fit(flat(images), labels)
  return lambda x: judge.predict(flat(x))
