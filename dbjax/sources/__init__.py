"""What `dbjax.prepare` makes data sets of: a file for each kind of source."""

from collections.abc import Callable, Iterator, Mapping
import dataclasses
import io
from typing import Any

from etils import epath
import numpy as np
from PIL import Image


@dataclasses.dataclass(frozen=True)
class Source:
  """Examples to be written as a data set of TFDS.

  Attributes:
    features: a `tfds.features.FeaturesDict`.
    splits: the examples of each, read as they are written; an image is a file object with its PNG
      or JPEG.
    sizes: how many examples of each, where that is known beforehand.
    report: called when all are read: what there was, in lines.
    fields: called then: {name: value} that a config should say of them.
    save: called then: writes what else belongs to the data set into its directory.
  """

  features: Any
  splits: Mapping[str, Iterator[dict[str, Any]]]
  sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)
  report: Callable[[], str] = lambda: ""
  fields: Callable[[], dict[str, Any]] = dict
  save: Callable[[epath.Path], None] = lambda directory: None


def png(image: np.ndarray) -> io.BytesIO:
  """An image (H, W), (H, W, 1) or (H, W, 3) uint8 as a file."""
  file = io.BytesIO()
  Image.fromarray(image[..., 0] if image.shape[2:] == (1,) else image).save(file, "PNG")
  file.seek(0)
  return file
