"""Latents: what the encoder of a VAE makes of the images of a data set."""

from collections.abc import Callable, Sequence

import numpy as np

from dbjax.data import records
from dbjax.data.tfds import read_split
from dbjax.errors import UserError
from dbjax.sources import Source

_ENCODE_AT_ONCE = 16


def source(name: str, data_dir: str, image_size: int, encode: Callable,
           names: Sequence[str] = ()) -> Source:
  """The latents of the splits of a TFDS data set: of all, or of those of these names."""
  import tensorflow_datasets as tfds  # pylint: disable=g-import-not-at-top

  splits = {s: read_split(name, s, data_dir, image_size)
            for s in names or records.splits(name, data_dir)}

  def encoded(images):
    for i in range(0, len(images), _ENCODE_AT_ONCE):
      batch = images.take(np.arange(i, min(i + _ENCODE_AT_ONCE, len(images))))
      for latent, label in zip(np.asarray(encode(batch["image"])), batch["label"]):
        yield dict(latent=latent.astype(np.float16), label=int(label))

  first = next(iter(splits.values()))
  shape = np.asarray(encode(first.take(np.arange(1))["image"])).shape[1:]
  if len(shape) != 3:
    raise UserError(f"--encode: it made an array of shape {(1, *shape)} of one image, expected "
                    "(1, height, width, channels)")
  features = tfds.features.FeaturesDict(dict(
      latent=tfds.features.Tensor(shape=shape, dtype=np.float16, encoding="bytes"),
      label=tfds.features.ClassLabel(num_classes=first.num_classes)))
  return Source(features, {s: encoded(images) for s, images in splits.items()},
                {s: len(images) for s, images in splits.items()})
