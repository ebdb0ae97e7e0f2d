"""Images and their labels: what a config says of them, and whether it is so."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dbjax.data.dataset import Arrays
from dbjax.data.dataset import batches
from dbjax.data.dataset import some
from dbjax.errors import UserError
from dbjax.fields import above
from dbjax.fields import Field
from dbjax.fields import JOINT
from dbjax.fields import one_of

_MEASURED = 2000  # images, at most, that are looked at
_AT_ONCE = 50  # of them

FIELDS = {
    "data.feature": Field("image", "what is read: pixels, or the latents of a VAE",
                          one_of("image", "latent"), JOINT),
    "data.image_size": Field(int, "height and width", above(0), JOINT),
    "data.channels": Field(3, "1 is grey", above(0), JOINT),
    "data.num_classes": Field(int, "of the labels", above(0), JOINT),
    "task.flip": Field(False, "mirror half of the images"),
}


def shape(config: Any) -> tuple[int, int, int]:
  """(H, W, C) of an image."""
  d = config.data
  return d.image_size, d.image_size, d.channels


def check(config: Any, dataset: Any):
  """Raises UserError where images or labels are not what the config says."""
  d = config.data
  height, width, channels = dataset.train.take(np.arange(1))["image"].shape[1:]
  if (height, width, channels) != shape(config):
    raise UserError(f"data.image_size={d.image_size}, data.channels={d.channels}: the images of "
                    f"{d.name} are {height} x {width} with {channels} channels")
  for part, examples in (("train", dataset.train), ("held_out", dataset.held_out)):
    num_classes = getattr(examples, "num_classes", None)
    least, most = 0, num_classes and num_classes - 1
    if num_classes is None:  # nobody says: see
      labels = (examples.arrays if isinstance(examples, Arrays) else
                examples.take(some(len(examples), _MEASURED)))["label"]
      least, most = int(labels.min()), int(labels.max())
    if least < 0 or most >= d.num_classes or num_classes not in (None, d.num_classes):
      raise UserError(f"data.num_classes={d.num_classes}: {d.name} has labels from {least} to "
                      f"{most} ({part})")


def check_patches(config: Any):
  """Raises UserError where patches, if the network has some, do not cover the image."""
  size, patch = config.data.image_size, config.model.get("patch_size", 1)
  if size % patch:
    raise UserError(f"data.image_size={size} is not a multiple of model.patch_size={patch}")


def check_sigma_data(config: Any, dataset: Any):
  """Raises UserError where the images, which are noised, have another standard deviation."""
  name, measured = config.data.name, measure_sigma_data(dataset.train)
  if not np.isfinite(measured):
    raise UserError(f"data.name={name}: it has numbers that are not finite: prepare it again")
  if measured < 1e-6:  # rounding
    raise UserError(f"data.name={name}: all its images are the same")
  if not 0.8 < config.sigma_data / measured < 1.25:
    raise UserError(f"sigma_data={config.sigma_data:g}: {name} has standard deviation "
                    f"{measured:.3g}, which it must be near: set sigma_data={measured:.2g}")


def measure_sigma_data(examples: Any) -> float:
  """The standard deviation of images in [-1, 1], or of latents, from some 2,000 of them."""
  return mean_and_deviation(examples)[1]


def mean_and_deviation(examples: Any) -> tuple[float, float]:
  """Of the values of some 2,000 images in [-1, 1], or of latents; few are in memory at once."""
  sums = np.zeros(3)
  for _, batch in batches(examples, _AT_ONCE, _MEASURED):
    x = batch["image"].astype(np.float64)
    if batch["image"].dtype == np.uint8:
      x = x / 127.5 - 1
    sums += x.size, x.sum(), np.square(x).sum()
  mean = sums[1] / sums[0]
  return float(mean), float(np.sqrt(max(sums[2] / sums[0] - mean**2, 0)))


def to_float(image: np.ndarray | jax.Array) -> jax.Array:
  """uint8 (over the wire) to float32 in [-1, 1]; latents only to float32."""
  y = jnp.asarray(image, jnp.float32)
  return y / 127.5 - 1 if image.dtype == jnp.uint8 else y
