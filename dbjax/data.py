"""Data sets, and the order in which they are seen.

Batch n is a function of (seed, n) alone: the same for every block, for any number of
hosts, and after a resume, without replaying what came before. So there is no iterator
state to save: a batch is asked for by its step.

The digits are bundled. Every other name is a data set of TFDS (tensorflow.org/datasets)
that has been prepared in `data.dir`, as ARRAY_RECORD or TFRECORD; both are read record by
record, without TensorFlow. `data.feature` says what is generated: "image", decoded to
uint8, or "latent", floats as `dbjax.prepare` writes them.
"""

from collections.abc import Iterator, Sequence
import contextlib
import dataclasses
import functools
import json
import os
import re
import struct
from typing import Any
import zlib

from absl import flags
from etils import epath
import grain
import numpy as np
from PIL import Image

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
    """The global batch of `step`: image (batch_size, H, W, C), label (batch_size,) int32.

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
    UserError: it is not there or damaged, or its images or labels are not what the config
      says.
  """
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
  if len(dataset.train) < config.train.batch_size:
    raise UserError(f"data.name={d.name}: {len(dataset.train)} images to train on are fewer than "
                    f"train.batch_size={config.train.batch_size}")
  measured = measure_sigma_data(dataset.train)
  if measured == 0:
    raise UserError(f"data.name={d.name}: all its images are the same")
  if not 0.8 < config.sigma_data / measured < 1.25:
    raise UserError(f"sigma_data={config.sigma_data:g}: {d.name} has standard deviation "
                    f"{measured:.3g}, which it must be near: set sigma_data={measured:.2g}")
  return dataset


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


def data_dir(given: str) -> epath.Path:
  """Where TFDS keeps its data sets."""
  default = os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
  return epath.Path(given or default).expanduser()


def splits(name: str, given_dir: str) -> list[str]:
  """The splits of a prepared TFDS data set. Raises UserError where there is none."""
  return list(_info(name, given_dir).splits)


def read_split(name: str, split: str, given_dir: str, size: int, feature: str = "image",
               keep: bool = True) -> "Records":
  """One split of a prepared TFDS data set, a slice such as train[:90%] too.

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
  info = _info(name, given_dir)
  try:
    files = info.splits[split].file_instructions
  except (KeyError, ValueError, AssertionError):
    raise UserError(f"{name} has no split {split}: expected {', '.join(info.splits)}, or a part "
                    "such as train[:90%]") from None
  if not files:
    raise UserError(f"{name}: the split {split} is empty")
  return Records(name, info.features, files, size, feature, keep)


def _info(name: str, given_dir: str):
  import tensorflow_datasets as tfds  # pylint: disable=g-import-not-at-top

  where = data_dir(given_dir)
  directory = _prepared(where / name)
  if directory is None:
    raise UserError(f"data.name={name}: not found in {where}; set data.dir, or prepare it: "
                    f"tfds build {name} --file_format=array_record --data_dir={where}, "
                    "or see python -m dbjax.prepare --help")
  try:
    info = tfds.builder_from_directory(directory).info
    assert info.features is not None, "features.json is missing"
    return info
  except Exception as e:  # TFDS raises almost anything here
    raise UserError(f"data.name={name}: {directory} cannot be read ({_words(e)}): prepare it "
                    "again") from e


def _prepared(path: epath.Path) -> epath.Path | None:
  """The directory of a data set's highest version, or of the one that `path` names."""
  if (path / "dataset_info.json").exists():
    return path
  if not path.exists():
    return None
  versions = [p for p in path.iterdir() if re.fullmatch(r"\d+\.\d+\.\d+", p.name)
              and (p / "dataset_info.json").exists()]
  return max(versions, key=lambda p: tuple(map(int, p.name.split("."))), default=None)


class Records:
  """One split of a TFDS data set on disk; a record is read and decoded when asked for.

  Attributes:
    shape: (H, W, C) of an image.
    num_classes: 1 if there are no labels.
    identity: a fingerprint of the files and of what is made of them.
  """

  def __init__(self, name: str, features, files, size: int, feature: str, keep: bool):
    if feature not in features:
      raise UserError(f"data.feature={feature}: {name} has {', '.join(sorted(features))}")
    shape = features[feature].shape
    if len(shape) != 3 or shape[2] is None:
      raise UserError(f"data.feature={feature}: in {name} it has the shape {shape}, not "
                      "(height, width, channels)")
    self._resize = None in shape
    self.shape = (size, size, shape[2]) if self._resize else tuple(shape)
    if feature == "image" and features[feature].np_dtype != np.uint8:
      raise UserError(f"data.feature=image: in {name} it is "
                      f"{np.dtype(features[feature].np_dtype)}, expected uint8")
    label = features["label"] if "label" in features else None
    self.num_classes = 1 if label is None else getattr(label, "num_classes", None)
    if self.num_classes is None:
      raise UserError(f"data.name={name}: its label is {label}, expected a ClassLabel")
    self._features, self._feature, self._size, self._files = features, feature, size, files
    form = _ArrayRecords if ".array_record" in str(files[0].filename) else _TFRecords
    self._records = form(files)
    self.identity = json.dumps([name, feature, self.shape, [
        (epath.Path(f.filename).name, f.skip, f.take, epath.Path(f.filename).stat().length)
        for f in files]])
    self._dtype = np.dtype("uint8" if feature == "image" else "float16")
    total = len(self._records)
    cached = keep and total * int(np.prod(self.shape)) * self._dtype.itemsize <= _CACHE_BYTES
    self._image = np.empty((total if cached else 0, *self.shape), self._dtype)
    self._label = np.full(total if cached else 0, -1, np.int32)  # -1: not decoded yet

  def __len__(self) -> int:
    return len(self._records)

  def __getstate__(self):  # a process that loads ahead keeps nothing
    return self.__dict__ | dict(_image=self._image[:0], _label=self._label[:0])

  def take(self, index: np.ndarray) -> dict[str, np.ndarray]:
    """The images and labels of these numbers: a batch. Raises UserError at a bad record."""
    if not len(self._label):
      return self._read(index)
    missing = np.unique(index[self._label[index] < 0])
    if len(missing):
      new = self._read(missing)
      self._image[missing] = new["image"]
      self._label[missing] = new["label"]
    return dict(image=self._image[index], label=self._label[index])

  def _read(self, index):
    try:
      examples = [self._decode(record) for record in self._records.read(index)]
    except Exception as e:
      if len(index) > 1:  # which one?
        return {k: np.concatenate([self._read(index[i:i + 1])[k] for i in range(len(index))])
                for k in ("image", "label")}
      raise UserError(f"{self._locate(index[0])} cannot be read ({_words(e)}): the file is "
                      "damaged, prepare the data set again") from e
    image, label = zip(*examples)
    wrong = [i for i, y in enumerate(label) if not 0 <= y < self.num_classes]
    if wrong:
      raise UserError(f"{self._locate(index[wrong[0]])} has the label {label[wrong[0]]}: expected "
                      f"0 to {self.num_classes - 1}; does this split have labels?")
    return dict(image=np.stack(image).astype(self._dtype), label=np.array(label, np.int32))

  def _decode(self, record: bytes):
    example = self._features.deserialize_example_np(record)
    image = example[self._feature]
    if self._resize:
      image = center_crop(image, self._size)
    return image, example.get("label", 0)

  def _locate(self, number: int) -> str:
    shard, row = _shards(self._files, np.array([number]))
    return f"record {row[0]} of {self._files[shard[0]].filename}"


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


def _shards(files, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Where records of a split lie: (number of the file, number of the record in it)."""
  ends = np.cumsum([f.take for f in files])
  shard = np.searchsorted(ends, numbers, side="right")
  first = ends - [f.take for f in files] - [f.skip for f in files]
  return shard, numbers - first[shard]


class _ArrayRecords:
  """Random access to the records of ArrayRecord files; also on gs://."""

  def __init__(self, files):
    from array_record.python import array_record_data_source  # pylint: disable=g-import-not-at-top
    from array_record.python import array_record_module  # pylint: disable=g-import-not-at-top

    for f in files:
      try:
        reader = array_record_module.ArrayRecordReader(str(f.filename))
        found = reader.num_records()
        reader.close()
      except Exception as e:
        raise _unreadable(f.filename, e) from e
      _check_count(f, found)
    self._source = array_record_data_source.ArrayRecordDataSource(files)

  def __len__(self) -> int:
    return len(self._source)

  def read(self, numbers: np.ndarray) -> Sequence[bytes]:
    return self._source.__getitems__(numbers.tolist())


class _TFRecords:
  """Random access to the records of TFRecord files, by an index made once.

  A record is its length (uint64), a checksum of that (4 bytes), the data, and theirs.
  """

  def __init__(self, files):
    self._files = files
    self._offsets = [self._index(f) for f in files]

  def __len__(self) -> int:
    return sum(f.take for f in self._files)

  def read(self, numbers: np.ndarray) -> Sequence[bytes]:
    return [self._read_one(self._files[shard], self._offsets[shard][row])
            for shard, row in zip(*_shards(self._files, numbers))]

  def _read_one(self, f, offset: int) -> bytes:
    import google_crc32c  # pylint: disable=g-import-not-at-top

    with epath.Path(f.filename).open("rb") as file:
      file.seek(offset)
      size, _ = struct.unpack("<QI", file.read(12))
      data, (checksum,) = file.read(size), struct.unpack("<I", file.read(4))
    crc = google_crc32c.value(data)
    if ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32 != checksum:
      raise ValueError("its checksum is wrong")
    return data

  def _index(self, f) -> np.ndarray:
    path, offsets, offset = epath.Path(f.filename), [], 0
    try:
      total = path.stat().length
      with path.open("rb") as file:
        while offset < total:
          offsets.append(offset)
          file.seek(offset)
          offset += struct.unpack("<Q", file.read(8))[0] + 16
    except Exception as e:
      raise _unreadable(path, e) from e
    if offset != total:
      raise _unreadable(path, "it ends in the middle of a record")
    _check_count(f, len(offsets))
    return np.array(offsets, np.int64)


def _check_count(f, found: int):
  if found != f.examples_in_shard:
    raise _unreadable(f.filename, f"it has {found} records, not {f.examples_in_shard}")


def _unreadable(path, why) -> UserError:
  return UserError(f"{path} cannot be read ({_words(why)}): it is missing or truncated, prepare "
                   "the data set again")


def _words(error) -> str:
  return " ".join(str(error).split())[:200] or type(error).__name__
