"""The handwritten digits that scikit-learn bundles: 1,797 grey images of 8 x 8."""

from importlib import metadata
from typing import Any

import numpy as np

from dbjax.data.dataset import Arrays
from dbjax.data.dataset import Dataset
from dbjax.errors import UserError


def load(config: Any) -> Dataset:
  """1,500 digits to train on, 297 held out: image (8, 8, 1) uint8, label int32.

  Raises:
    UserError: config.data asks for a split or a feature that there is not.
  """
  d = config.data
  if (d.train, d.held_out, d.get("feature", "image")) != ("train", "test", "image"):
    raise UserError(f"data.train={d.train}, data.held_out={d.held_out}, data.feature={d.feature}: "
                    "digits has only train, test and image")
  # The file, not sklearn.datasets.load_digits: to import scikit-learn takes a second.
  place = metadata.distribution("scikit-learn").locate_file("sklearn/datasets/data/digits.csv.gz")
  table = np.loadtxt(str(place), delimiter=",")
  image = np.round(table[:, :-1].reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
  label = table[:, -1].astype(np.int32)
  order = np.random.default_rng(0).permutation(len(label))  # they come sorted by writer
  train, held_out = order[:1500], order[1500:]
  return Dataset(train=Arrays(image=image[train], label=label[train]),
                 held_out=Arrays(image=image[held_out], label=label[held_out]))
