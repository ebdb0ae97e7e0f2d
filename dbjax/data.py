"""Data sets, and the order in which they are seen.

Batch n is a function of (seed, n) alone: the same for every block, for any number of
hosts, and after a resume, without replaying what came before. So there is no iterator
state to save: a batch is asked for by its step.

The digits are bundled. Every other name is a data set of TFDS (tensorflow.org/datasets)
that has been prepared in `data.dir`, as ARRAY_RECORD or TFRECORD (see `dbjax.records`).
`data.feature` says what is generated: "image", decoded to uint8, or, as `dbjax.prepare`
writes them, "latent", floats, or "tokens", sequences of a text.
"""

from collections.abc import Iterator
import contextlib
import dataclasses
import functools
import json
from typing import Any
import zlib

from absl import flags
from etils import epath
import grain
import numpy as np
from PIL import Image

from dbjax import records
from dbjax import text
from dbjax.cli import UserError

_CACHE_BYTES = 2**30  # a data set that is smaller, once decoded, stays in memory
_SIGMA_DATA_IMAGES = 2000


@dataclasses.dataclass(frozen=True)
class Images:
  """image (N, H, W, C) uint8 or, of latents, float; label (N,) int32."""

  image: np.ndarray
  label: np.ndarray

  @property
  def identity(self) -> str:
    """A fingerprint."""
    return f"{zlib.crc32(self.image.tobytes()):08x}"

  def __len__(self) -> int:
    return len(self.label)

  @property
  def shape(self) -> tuple[int, int, int]:
    return self.image.shape[1:]

  @property
  def num_classes(self) -> int:
    return int(self.label.max()) + 1

  def take(self, index: np.ndarray) -> dict[str, np.ndarray]:
    """The images and labels of these numbers: a batch."""
    return dict(image=self.image[index], label=self.label[index])


@dataclasses.dataclass(frozen=True)
class Dataset:
  """What to train on, and what is held out. Each has `len` and `take(numbers)`."""

  train: Any
  held_out: Any

  def batch(self, seed: int, step: int, batch_size: int,
            rows: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """The global batch of `step`: image (batch_size, H, W, C) and label (batch_size,) int32, or
    tokens (batch_size, L).

    Each epoch is a new permutation; a batch may span two. `rows`, ascending, are the
    numbers of those rows of the batch that are wanted: all by default.
    """
    total = len(self.train)
    position = step * batch_size + (np.arange(batch_size) if rows is None else rows)
    epoch = position // total
    index = np.concatenate([_permutation(seed, e, total)[position[epoch == e] % total]
                            for e in range(epoch[0], epoch[-1] + 1)])
    return self.train.take(index)

  def stream(self, seed: int, steps: range, batch_size: int, rows: np.ndarray | None = None,
             workers: int = 0) -> Iterator[dict[str, np.ndarray]]:
    """The batches of `steps`, some loaded ahead: by threads, or by processes (`workers`).

    A generator, to be closed when it is left before its end.
    """
    load = functools.partial(_batch, self, seed, batch_size, rows)
    if isinstance(self.train, Images):
      yield from map(load, steps)
      return
    ahead = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
    batches = grain.MapDataset.source(steps).map(load).to_iter_dataset(ahead)
    if workers:
      if not flags.FLAGS.is_parsed():  # in a notebook; Grain has flags
        flags.FLAGS.mark_as_parsed()
      batches = batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
    with contextlib.closing(iter(batches)) as iterator:
      yield from iterator


def _batch(dataset, seed, batch_size, rows, step):
  return dataset.batch(seed, int(step), batch_size, rows)


def load(config) -> Dataset:
  """The data set of `config.data`.

  Raises:
    UserError: it is not there or damaged, or its images, labels or tokens are not what the
      config says.
  """
  dataset = _load_text(config) if config.data.feature == "tokens" else _load_images(config)
  if len(dataset.train) < config.train.batch_size:
    what = "sequences" if config.data.feature == "tokens" else "images"
    raise UserError(f"data.name={config.data.name}: {len(dataset.train)} {what} to train on are "
                    f"fewer than train.batch_size={config.train.batch_size}")
  if config.task.name == "image":  # it is the images that are noised
    _check_sigma_data(config, dataset)
  return dataset


def _load_images(config) -> Dataset:
  d = config.data
  if d.name == "digits" and (d.train, d.held_out, d.feature) != ("train", "test", "image"):
    raise UserError(f"data.train={d.train}, data.held_out={d.held_out}, data.feature={d.feature}: "
                    "digits has only train, test and image")
  dataset = _digits() if d.name == "digits" else Dataset(*(
      read_split(d.name, split, d.dir, d.image_size, d.feature) for split in (d.train, d.held_out)))
  height, width, channels = dataset.train.shape
  if (height, width, channels) != (d.image_size, d.image_size, d.channels):
    raise UserError(f"data.image_size={d.image_size}, data.channels={d.channels}: the images of "
                    f"{d.name} are {height} x {width} with {channels} channels")
  if dataset.train.num_classes != d.num_classes:
    raise UserError(f"data.num_classes={d.num_classes}: {d.name} has labels from 0 to "
                    f"{dataset.train.num_classes - 1}")
  return dataset


def _check_sigma_data(config, dataset: Dataset):
  name, measured = config.data.name, measure_sigma_data(dataset.train)
  if measured == 0:
    raise UserError(f"data.name={name}: all its images are the same")
  if not 0.8 < config.sigma_data / measured < 1.25:
    raise UserError(f"sigma_data={config.sigma_data:g}: {name} has standard deviation "
                    f"{measured:.3g}, which it must be near: set sigma_data={measured:.2g}")


def _load_text(config) -> Dataset:
  d = config.data
  dataset = Dataset(*(Sequences(records.Split(d.name, split, d.dir), d.vocab_size)
                      for split in (d.train, d.held_out)))
  made = text.read(records.directory(d.name, d.dir))
  for field, found in (made | dict(length=dataset.train.length)).items():
    if d[field] != found:
      raise UserError(f"data.{field}={d[field]}: {d.name} was prepared with {found}: set "
                      f"data.{field}={found}, or prepare it again")
  return dataset


def token_dtype(vocab_size: int) -> np.dtype:
  """What tokens are stored as: uint16 if it holds them, else int32."""
  return np.dtype(np.uint16 if vocab_size <= 2**16 else np.int32)


def tokenizer_of(config, workdir: epath.PathLike | None = None) -> text.Tokenizer:
  """The tokenizer of a config of a text: its model from `workdir`, or else from the data set.

  Raises:
    UserError: neither has a model, or it is another one.
  """
  d = config.data
  if d.tokenizer in text.BUILT_IN:
    return text.load(d.tokenizer)
  if workdir is not None and (epath.Path(workdir) / text.MODEL).exists():
    return text.load(d.tokenizer, workdir)
  return text.load(d.tokenizer, records.directory(d.name, d.dir))


def measure_sigma_data(images: Any) -> float:
  """The standard deviation of images in [-1, 1], or of latents, from some 2,000 of them."""
  index = np.linspace(0, len(images) - 1, min(len(images), _SIGMA_DATA_IMAGES)).astype(int)
  image = images.take(np.unique(index))["image"]
  return float(image.astype(np.float32).std() / (127.5 if image.dtype == np.uint8 else 1))


@functools.lru_cache(maxsize=4)
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


def read_split(name: str, split: str, given_dir: str, size: int, feature: str = "image",
               keep: bool = True) -> "Records":
  """One split of a prepared TFDS data set of images, a slice such as train[:90%] too.

  Args:
    name: of the data set.
    split: of it.
    given_dir: where; empty for TFDS's default.
    size: height and width; images that come in all sizes are cropped and resized.
    feature: "image" or "latent".
    keep: a small data set in memory, once it is decoded.

  Raises:
    UserError: it is not there, or damaged, or has no such split or feature.
  """
  return Records(records.Split(name, split, given_dir), size, feature, keep)


class _OnDisk:
  """Examples of a split on disk, each read and decoded when asked for.

  Attributes:
    identity: a fingerprint of the files and of what is made of them.
  """

  def __init__(self, split: records.Split, feature: str, arrays: dict[str, tuple], keep: bool):
    """`arrays`: the shape and dtype of each in an example, that of `feature` first."""
    self._split, self._feature = split, feature
    self._dtypes = {name: np.dtype(dtype) for name, (_, dtype) in arrays.items()}
    shape, dtype = next(iter(arrays.values()))
    self.identity = json.dumps([split.name, feature, shape, split.files])
    size = len(split) * int(np.prod(shape)) * np.dtype(dtype).itemsize
    cached = len(split) if keep and size <= _CACHE_BYTES else 0
    self._cache = {name: np.empty((cached, *s), d) for name, (s, d) in arrays.items()}
    self._decoded = np.zeros(cached, bool)

  def __len__(self) -> int:
    return len(self._split)

  def __getstate__(self):  # a process that loads ahead keeps nothing
    return self.__dict__ | dict(_decoded=self._decoded[:0],
                                _cache={name: x[:0] for name, x in self._cache.items()})

  def take(self, index: np.ndarray) -> dict[str, np.ndarray]:
    """The examples of these numbers: a batch. Raises UserError at a bad record."""
    if not len(self._decoded):
      return self._read(index)
    missing = np.unique(index[~self._decoded[index]])
    if len(missing):
      for name, x in self._read(missing).items():
        self._cache[name][missing] = x
      self._decoded[missing] = True
    return {name: x[index] for name, x in self._cache.items()}

  def _read(self, index):
    try:
      examples = [self._decode(example) for example in self._split.read(index)]
    except Exception as e:
      if len(index) > 1:  # which one?
        parts = [self._read(index[i:i + 1]) for i in range(len(index))]
        return {name: np.concatenate([p[name] for p in parts]) for name in self._dtypes}
      where = self._split.locate(index[0])
      if isinstance(e, UserError):
        raise UserError(f"{where} {e}") from e
      raise UserError(f"{where} cannot be read ({records.words(e)}): the file is damaged, "
                      "prepare the data set again") from e
    return {name: np.stack([e[name] for e in examples]).astype(dtype)
            for name, dtype in self._dtypes.items()}

  def _decode(self, example: dict[str, Any]) -> dict[str, Any]:
    """Of what TFDS decoded, the arrays. Raises UserError: "has ...", what it must not have."""
    raise NotImplementedError


class Records(_OnDisk):
  """Images or latents, and their labels.

  Attributes:
    shape: (H, W, C) of an image.
    num_classes: 1 if there are no labels.
  """

  def __init__(self, split: records.Split, size: int, feature: str, keep: bool):
    name, features = split.name, split.features
    shape = _shape(split, feature)
    if len(shape) != 3 or shape[2] is None:
      raise UserError(f"data.feature={feature}: in {name} it has the shape {shape}, not "
                      "(height, width, channels)")
    self._resize, self._size = None in shape, size
    self.shape = (size, size, shape[2]) if self._resize else tuple(shape)
    if feature == "image" and features[feature].np_dtype != np.uint8:
      raise UserError(f"data.feature=image: in {name} it is "
                      f"{np.dtype(features[feature].np_dtype)}, expected uint8")
    label = features["label"] if "label" in features else None
    self.num_classes = 1 if label is None else getattr(label, "num_classes", None)
    if self.num_classes is None:
      raise UserError(f"data.name={name}: its label is {label}, expected a ClassLabel")
    dtype = np.uint8 if feature == "image" else np.float16
    super().__init__(split, feature, dict(image=(self.shape, dtype), label=((), np.int32)), keep)

  def _decode(self, example):
    image, label = example[self._feature], example.get("label", 0)
    if not 0 <= label < self.num_classes:
      raise UserError(f"has the label {label}: expected 0 to {self.num_classes - 1}; does this "
                      "split have labels?")
    return dict(image=center_crop(image, self._size) if self._resize else image, label=label)


class Sequences(_OnDisk):
  """Sequences of a text, as `dbjax.prepare` cuts them: `take` gives tokens (n, length).

  Attributes:
    length: in tokens.
    vocab_size: above all tokens; they are uint16 if that holds them, else int32.
  """

  def __init__(self, split: records.Split, vocab_size: int, keep: bool = True):
    shape = _shape(split, "tokens")
    if len(shape) != 1 or None in shape:
      raise UserError(f"data.feature=tokens: in {split.name} it has the shape {shape}, not "
                      "(length,)")
    (self.length,), self.vocab_size = shape, vocab_size
    super().__init__(split, "tokens", dict(tokens=(shape, token_dtype(vocab_size))), keep)

  def _decode(self, example):
    tokens = example["tokens"]
    wrong = tokens[(tokens < 0) | (tokens >= self.vocab_size)]
    if len(wrong):
      raise UserError(f"has the token {wrong[0]}: expected 0 to {self.vocab_size - 1}, prepare "
                      "the data set again")
    return dict(tokens=tokens)


def _shape(split: records.Split, feature: str) -> tuple[int | None, ...]:
  if feature not in split.features:
    raise UserError(f"data.feature={feature}: {split.name} has "
                    f"{', '.join(sorted(split.features))}")
  return tuple(split.features[feature].shape)


def center_crop(image: np.ndarray, size: int) -> np.ndarray:
  """The largest central square of an image (H, W, C) uint8, resized: (size, size, C)."""
  height, width = image.shape[:2]
  side = min(height, width)
  top, left = (height - side) // 2, (width - side) // 2
  square = image[top:top + side, left:left + side]
  # Pillow's filters widen when they shrink, so that nothing aliases.
  resize = lambda channel: np.asarray(Image.fromarray(channel).resize(
      (size, size), Image.Resampling.BICUBIC))
  return np.stack([resize(square[..., c]) for c in range(image.shape[2])], axis=-1)
