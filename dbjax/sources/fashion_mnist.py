"""Fashion-MNIST: the four files of Zalando, as Debian's dataset-fashion-mnist has them."""

import gzip
import zlib

from etils import epath
import numpy as np

from dbjax.errors import UserError
from dbjax.sources import png
from dbjax.sources import Source


def source(path: epath.Path) -> Source:
  """TFDS's fashion_mnist, from the original files in a directory.

  Raises:
    UserError: they are not there, or damaged.
  """
  import tensorflow_datasets as tfds  # pylint: disable=g-import-not-at-top

  def read(name, header, *shape):
    file = path / name
    try:
      content = gzip.decompress(file.read_bytes())
      return np.frombuffer(content, np.uint8, offset=header).reshape(-1, *shape)
    except FileNotFoundError:
      raise UserError(f"{file} does not exist: --source must be the directory of Fashion-MNIST's "
                      "four .gz files (Debian: apt install dataset-fashion-mnist)") from None
    except (EOFError, OSError, ValueError, zlib.error) as e:
      raise UserError(f"{file} is damaged or truncated ({e}): download it again") from e

  def split(prefix, total):
    images = read(f"{prefix}-images-idx3-ubyte.gz", 16, 28, 28)
    labels = read(f"{prefix}-labels-idx1-ubyte.gz", 8)
    if (len(images), len(labels)) != (total, total):
      raise UserError(f"{path}/{prefix}-*: {len(images)} images and {len(labels)} labels, "
                      f"expected {total} of each")
    return (dict(image=png(x), label=int(y)) for x, y in zip(images, labels))

  features = tfds.features.FeaturesDict(dict(
      image=tfds.features.Image(shape=(28, 28, 1)),
      label=tfds.features.ClassLabel(num_classes=10)))
  return Source(features, dict(train=split("train", 60_000), test=split("t10k", 10_000)),
                dict(train=60_000, test=10_000))
