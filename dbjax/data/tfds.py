"""Data sets of TFDS (tensorflow.org/datasets), prepared as ARRAY_RECORD or TFRECORD.

`data.feature` says what is generated: "image", decoded to uint8, or, as `dbjax.prepare`
writes them, "latent", floats, or "tokens", sequences of a text. TensorFlow is not needed.
"""

import json
import shlex
from typing import Any

import numpy as np
from PIL import Image

from dbjax.data import records
from dbjax.data.dataset import Dataset
from dbjax.data.text import token_dtype
from dbjax.errors import UserError

_CACHE_BYTES = 2**30  # a data set that is smaller, once decoded, stays in memory


def load(config: Any) -> Dataset:
  """The splits data.train and data.held_out of a data set of TFDS.

  Raises:
    UserError: it is not there or damaged, or has no such split or feature.
  """
  d = config.data
  if records.find(d.name, d.dir) is None:
    records.directory(d.name, d.dir, _command(d))  # raises
  splits = [records.Split(d.name, d[part], d.dir, f"data.{part}") for part in ("train", "held_out")]
  if d.feature == "tokens":
    return Dataset(*(Sequences(split, d.vocab_size) for split in splits))
  return Dataset(*(Records(split, d.image_size, d.feature, keep=True) for split in splits))


def _command(d: Any) -> str:
  """What makes the data set that config.data names, with FILE and DIR for the user's own."""
  where = shlex.quote(str(records.data_dir(d.dir)))
  ours = "python -m dbjax.prepare --what={} --source={} " + f"--name={d.name} --data_dir={where}"
  if d.feature == "tokens":
    kind = d.tokenizer.partition("-")[0]  # of sentencepiece-CRC
    own = dict(text8=" --normalize=text8", sentencepiece=f" --vocab_size={d.vocab_size}")
    return (ours.format("text", "FILE") + f" --tokenizer={kind} --length={d.length}"
            + own.get(kind, ""))
  if d.feature == "latent":
    return ours.format("latents", "IMAGES") + " --encode=my_vae:encode"
  if not records.known_to_tfds(d.name):
    return ours.format("folder", "DIR") + f" --image_size={d.image_size}"
  build = f"tfds build {d.name} --file_format=array_record --data_dir={where}"
  return build + (", or " + ours.format("fashion_mnist", "/usr/share/datasets/fashion-mnist")
                  if d.name == "fashion_mnist" else "")


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
    num_classes = 1 if label is None else getattr(label, "num_classes", None)
    if num_classes is None:
      raise UserError(f"data.name={name}: its label is {label}, expected a ClassLabel")
    self.num_classes = num_classes
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
