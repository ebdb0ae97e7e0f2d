"""Data sets, and the order in which they are seen.

Batch n is a function of (seed, n) alone: the same for every block, for any number of
hosts, and after a resume, without replaying what came before. So there is no iterator
state to save: a batch is asked for by its step.
"""

import dataclasses
import functools

import numpy as np

from dbjax.cli import UserError


@dataclasses.dataclass(frozen=True)
class Images:
  """image (N, H, W, C) uint8, label (N,) int32."""

  image: np.ndarray
  label: np.ndarray

  def __len__(self) -> int:
    return len(self.label)


@dataclasses.dataclass(frozen=True)
class Dataset:
  train: Images
  held_out: Images

  def batch(self, seed: int, step: int, batch_size: int,
            rows: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """The global batch of `step`: image (batch_size, H, W, C) uint8, label (batch_size,).

    Each epoch is a new permutation; a batch may span two. `rows`, ascending, are the
    numbers of those rows of the batch that are wanted: all by default.
    """
    total = len(self.train)
    position = step * batch_size + (np.arange(batch_size) if rows is None else rows)
    epoch = position // total
    index = np.concatenate([_permutation(seed, e, total)[position[epoch == e] % total]
                            for e in range(epoch[0], epoch[-1] + 1)])
    return dict(image=self.train.image[index], label=self.train.label[index])


def load(config) -> Dataset:
  """The data set of `config.data`.

  Raises:
    UserError: its images or labels are not what the config says.
  """
  d = config.data
  if d.name != "digits":
    raise UserError(f"data.name={d.name!r}: this version can plan a run on it, but not read it; "
                    "data.name=digits is bundled")
  dataset = _digits()
  shape, expected = dataset.train.image.shape[1:], (d.image_size, d.image_size, d.channels)
  if shape != expected:
    raise UserError(f"data.image_size={d.image_size}, data.channels={d.channels}: the images of "
                    f"{d.name} are {shape[0]} x {shape[1]} with {shape[2]} channels")
  if dataset.train.label.max() != d.num_classes - 1:
    raise UserError(f"data.num_classes={d.num_classes}: {d.name} has labels from 0 to "
                    f"{dataset.train.label.max()}")
  return dataset


@functools.lru_cache(maxsize=64)
def _permutation(seed: int, epoch: int, total: int) -> np.ndarray:
  return np.random.default_rng([seed, epoch]).permutation(total)


def _digits() -> Dataset:
  """The 1,797 digits that scikit-learn bundles: 1,500 to train on, 297 held out."""
  from sklearn import datasets  # pylint: disable=g-import-not-at-top

  digits = datasets.load_digits()
  image = np.round(digits.images[..., None] * (255 / 16)).astype(np.uint8)
  label = digits.target.astype(np.int32)
  order = np.random.default_rng(0).permutation(len(label))  # they come sorted by writer
  train, held_out = order[:1500], order[1500:]
  return Dataset(Images(image[train], label[train]), Images(image[held_out], label[held_out]))
