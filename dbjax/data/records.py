"""The records of TFDS data sets on disk, without TensorFlow.

A data set prepared as ARRAY_RECORD or TFRECORD is read record by record, in any order; what
is in a record is decoded by `dbjax.data`.
"""

from collections.abc import Sequence
import os
import re
import struct
from typing import Any

from etils import epath
import numpy as np

from dbjax import paths
from dbjax.errors import UserError
from dbjax.fields import did_you_mean


def data_dir(given: str) -> epath.Path:
  """Where TFDS keeps its data sets."""
  default = os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
  return paths.expand(given or default, "data.dir")


def splits(name: str, given_dir: str) -> list[str]:
  """The splits of a prepared data set. Raises UserError where there is none."""
  return list(_info(name, given_dir).splits)


def find(name: str, given_dir: str) -> epath.Path | None:
  """The directory of a prepared data set, in its highest version; None where there is none."""
  path = data_dir(given_dir) / name
  if (path / "dataset_info.json").exists():
    return path
  if not path.is_dir():
    return None
  versions = [p for p in path.iterdir() if re.fullmatch(r"\d+\.\d+\.\d+", p.name)
              and (p / "dataset_info.json").exists()]
  return max(versions, key=lambda p: tuple(map(int, p.name.split("."))), default=None)


def directory(name: str, given_dir: str, command: str = "python -m dbjax.prepare --help"
              ) -> epath.Path:
  """As `find`, but raises UserError where there is none.

  Args:
    name: of the data set.
    given_dir: where; empty for TFDS's default.
    command: that prepares it there, for the words of the error.
  """
  found = find(name, given_dir)
  if found is None:
    where = data_dir(given_dir)
    try:
      there = [path.name for path in where.iterdir() if find(path.name, given_dir)]
    except OSError:  # no such directory, or none that may be read
      there = []
    raise UserError(f"data.name={name}: not found in {where}{did_you_mean(name, there)}; set "
                    f"data.dir, or prepare it: {command}")
  return found


def known_to_tfds(name: str) -> bool:
  """Whether `tfds build` can make it. The names alone are read, in a tenth of a second."""
  import tensorflow_datasets as tfds  # pylint: disable=g-import-not-at-top

  return re.split("[/:]", name)[0] in tfds.list_builders(with_community_datasets=False)


class Split:
  """One split of a prepared data set, a slice such as train[:90%] too.

  Attributes:
    name: of the data set.
    features: what its records hold, a `tfds.features.FeaturesDict`.
    files: a fingerprint: (file, first record, records, bytes) of each.
  """

  def __init__(self, name: str, split: str, given_dir: str, field: str = ""):
    """A split.

    Args:
      name: of the data set.
      split: of it, or a part of one.
      given_dir: where; empty for TFDS's default.
      field: of the config that names the split, for the words of an error.

    Raises:
      UserError: it is not there, or damaged, or has no such split.
    """
    info, words = _info(name, given_dir), f"{field}={split}: " if field else ""
    try:
      self._files = info.splits[split].file_instructions
    except (KeyError, ValueError, AssertionError):
      raise UserError(f"{words}{name} has no split {split}: expected {', '.join(info.splits)}, or "
                      "a part such as train[:90%]") from None
    if not self._files:
      raise UserError(f"{words}{name}: the split {split} is empty")
    self.name, self.features = name, info.features
    form = _ArrayRecords if ".array_record" in str(self._files[0].filename) else _TFRecords
    self._records = form(self._files)
    paths = [epath.Path(f.filename) for f in self._files]
    self.files = [(path.name, f.skip, f.take, path.stat().length)
                  for path, f in zip(paths, self._files)]

  def __len__(self) -> int:
    return len(self._records)

  def read(self, numbers: np.ndarray) -> list[dict[str, Any]]:
    """The examples of these numbers. Raises whatever is raised at a damaged one."""
    return [self.features.deserialize_example_np(r) for r in self._records.read(numbers)]

  def locate(self, number: int) -> str:
    """Which record of which file it is."""
    shard, row = _shards(self._files, np.array([number]))
    return f"record {row[0]} of {self._files[shard[0]].filename}"


def words(error) -> str:
  """What an error says, in one line that is not too long."""
  return " ".join(str(error).split())[:200] or type(error).__name__


def _info(name: str, given_dir: str):
  import tensorflow_datasets as tfds  # pylint: disable=g-import-not-at-top

  path = directory(name, given_dir)
  try:
    info = tfds.builder_from_directory(path).info
    assert info.features is not None, "features.json is missing"
    return info
  except Exception as e:  # TFDS raises almost anything here
    raise UserError(f"data.name={name}: {path} cannot be read ({words(e)}): prepare it "
                    "again") from e


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
  return UserError(f"{path} cannot be read ({words(why)}): it is missing or truncated, prepare "
                   "the data set again")
