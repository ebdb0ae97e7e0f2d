"""What `dbjax.prepare` makes data sets of: a file for each kind of source."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
import io
import os
from typing import Any

from etils import epath
import numpy as np
from PIL import Image

from dbjax.errors import UserError
from dbjax.fields import between
from dbjax.fields import Field

HELD_OUT = 0.05  # the share that becomes the split test, unless another is given
_NOT_OURS = ("__macosx", "thumbs.db", "desktop.ini", "@eadir", "$recycle.bin",
             "system volume information")


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


def held_out_share(held_out: float | None) -> float:
  """The share that is held out: a number as given, or the default. Raises UserError: it is none."""
  return Field(HELD_OUT, range=between(0, 1)).check(
      "--held_out", HELD_OUT if held_out is None else held_out)


def png(image: np.ndarray) -> io.BytesIO:
  """An image (H, W), (H, W, 1) or (H, W, 3) uint8 as a file."""
  file = io.BytesIO()
  Image.fromarray(image[..., 0] if image.shape[2:] == (1,) else image).save(file, "PNG")
  file.seek(0)
  return file


def listed(folder: epath.Path, passed_over: Counter) -> Iterator[epath.Path]:
  """What lies in a folder, by name, but for what is hidden or an operating system's own.

  That is counted in `passed_over`, {why: how many}.
  """
  for path in sorted(folder.iterdir(), key=lambda x: x.name):
    if path.name.startswith(".") or path.name.lower() in _NOT_OURS:
      passed_over["hidden, or the system's own"] += 1
    else:
      yield path


def walk(folder: epath.Path, passed_over: Counter, known: Sequence[str] = (),
         around: Sequence[str] = ()) -> Iterator[epath.Path]:
  """The files in a folder and in the folders inside it, in the order of their paths.

  Args:
    folder: to look in; links are followed, but not in a circle.
    passed_over: {why: how many}.
    known: suffixes of files, at which nobody looks further.
    around: the real paths of the folders that it lies in.
  """
  real = os.path.realpath(folder)
  if real in around:
    passed_over["a link to a folder around it"] += 1
    return
  for path in listed(folder, passed_over):
    if path.suffix.lower() in known:
      yield path
    elif path.is_dir():
      yield from walk(path, passed_over, known, (*around, real))
    elif not path.exists():
      raise UserError(f"{path} is a broken link: there is no {os.readlink(path)}; mend or remove "
                      "it")
    elif is_pipe(path):
      passed_over["neither a file nor a folder"] += 1
    else:
      yield path


def is_pipe(path: epath.Path) -> bool:
  """Whether it is a pipe, a socket or a device, of what the operating system knows."""
  return os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)
