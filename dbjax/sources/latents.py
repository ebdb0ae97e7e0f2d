"""Latents: what the encoder of a VAE makes of the images of a data set."""

from collections.abc import Callable, Sequence

import numpy as np

from dbjax.data import records
from dbjax.data.tfds import read_split
from dbjax.errors import UserError
from dbjax.lookup import own_words
from dbjax.sources import Source

_ENCODE_AT_ONCE = 16


def source(name: str, data_dir: str, image_size: int, encode: Callable,
           names: Sequence[str] = ()) -> Source:
  """The latents of the splits of a TFDS data set: of all, or of those of these names.

  Raises:
    UserError: there is no such data set, or the encoder fails or makes something else than
      latents; in part as the splits are read.
  """
  import tensorflow_datasets as tfds  # pylint: disable=g-import-not-at-top

  splits = {s: read_split(name, s, data_dir, image_size)
            for s in names or records.splits(name, data_dir)}

  def encoded(images):
    for i in range(0, len(images), _ENCODE_AT_ONCE):
      batch = images.take(np.arange(i, min(i + _ENCODE_AT_ONCE, len(images))))
      for latent, label in zip(_encode(encode, batch["image"], shape), batch["label"]):
        yield dict(latent=latent.astype(np.float16), label=int(label))

  first = next(iter(splits.values()))
  shape = _encode(encode, first.take(np.arange(1))["image"]).shape[1:]
  features = tfds.features.FeaturesDict(dict(
      latent=tfds.features.Tensor(shape=shape, dtype=np.float16, encoding="bytes"),
      label=tfds.features.ClassLabel(num_classes=first.num_classes)))
  return Source(features, {s: encoded(images) for s, images in splits.items()},
                {s: len(images) for s, images in splits.items()})


def _encode(encode: Callable, images: np.ndarray, shape: tuple[int, ...] = ()) -> np.ndarray:
  """The latents (n, h, w, c) of images (n, H, W, C), by a user's function that is not trusted."""
  try:
    made = np.asarray(encode(images))
  except UserError:
    raise
  except Exception as e:  # whatever the user's function raises
    raise UserError(f"--encode: {own_words(e, 'it')}") from e
  if made.ndim != 4 or made.shape != (len(images), *(shape or made.shape[1:])):
    expected = ", ".join(map(str, shape)) or "height, width, channels"
    raise UserError(f"--encode made an array of shape {made.shape} of {len(images)} images, "
                    f"expected ({len(images)}, {expected})")
  if made.dtype.kind != "f" or not np.isfinite(made.astype(np.float16)).all():
    raise UserError(f"--encode made {made.dtype}, expected finite numbers that float16 holds")
  return made
