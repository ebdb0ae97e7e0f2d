"""Images in folders, as people have them.

    SPLIT/CLASS/.../FILE    where all folders are called as splits are: train, test, validation, ...
    CLASS/.../FILE          a share of them is held out, evenly taken
    SPLIT/FILE, FILE        no classes, so no labels

Classes are numbered in the order of their names. What is hidden or an operating system's own
(.ipynb_checkpoints, ._x.png, __MACOSX, Thumbs.db) and what is no image is passed over, and counted.
Whatever else makes a file another thing than it looks like is either done right or refused, in one
line that names it:

    EXIF rotation               applied
    transparency                laid over a background
    an animation                its first frame
    16 bits                     divided by 257
    palettes, CMYK, LAB, ...    converted; to grey only where all images are grey
    32 bits, floating point     refused: nobody says what is black and what is white
    damaged, enormous           refused
"""

from collections import Counter
from collections.abc import Iterable, Sequence
import dataclasses
import io
import os
from typing import Any
import unicodedata
import warnings

from etils import epath
import numpy as np
from PIL import Image
from PIL import ImageColor
from PIL import ImageOps

from dbjax import metrics
from dbjax import pictures
from dbjax.data import records
from dbjax.data.tfds import center_crop
from dbjax.errors import UserError
from dbjax.sources import png
from dbjax.sources import Source

SPLITS = ("train", "training", "test", "testing", "val", "valid", "validation", "dev", "eval",
          "held_out", "holdout")
SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff",
            ".pbm", ".pgm", ".ppm", ".pnm", ".apng")
_NOT_OURS = ("__macosx", "thumbs.db", "desktop.ini", "@eadir", "$recycle.bin",
             "system volume information")
_GREY = ("1", "L", "LA", "La", "I;16", "I;16L", "I;16B", "I;16N", "I", "F")
_ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")
_MODES = {"L": "grey", "1": "black and white", "P": "a palette"}
_ORIENTATION = 0x0112  # the EXIF tag
_ROWS = 20  # of a table of classes
_SHOWN, _THUMBNAIL = 40, 64  # images in the preview, and their size if they have none in common
PREVIEW = "preview.png"

# A large image is no mistake; what Pillow holds to be an attack is refused.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


@dataclasses.dataclass(frozen=True)
class Files:
  """Which files there are.

  Attributes:
    splits: of each (file, class); of images without classes the class is "".
    passed_over: {why: how many}.
  """

  splits: dict[str, list[tuple[epath.Path, str]]]
  passed_over: Counter

  @property
  def classes(self) -> list[str]:
    """In the order in which they are numbered."""
    return sorted({name for files in self.splits.values() for _, name in files})


def source(path: epath.Path, *, names: Sequence[str] = (), held_out: float = 0.05,
           image_size: int | None = None, background: str = "white") -> Source:
  """The images in a folder.

  Args:
    path: of it.
    names: of the folders in it that are splits; by default those called as splits are.
    held_out: the share that becomes the split test, where there is no other split.
    image_size: height and width to which images are cropped and scaled; None: as they are.
    background: what shows through, as in HTML: white, #ff0000.

  Raises:
    UserError: there are no images, or it is not clear of which class and split they are, or one
      cannot be read. In part as the splits are read: they are not in memory.
  """
  import tensorflow_datasets as tfds  # pylint: disable=g-import-not-at-top

  try:
    colour = ImageColor.getrgb(background)[:3]
  except ValueError:
    raise UserError(f"--background={background}: expected a colour, such as white, black or "
                    "#ff0000") from None
  found = find(path, names, held_out)
  classes = found.classes
  channels = 3 if any(_is_coloured(file) for files in found.splits.values()
                      for file, _ in files) else 1
  made = Made(found, channels, image_size, colour)
  label = {"label": tfds.features.ClassLabel(names=classes)} if classes != [""] else {}
  features = tfds.features.FeaturesDict(
      {"image": tfds.features.Image(shape=(image_size, image_size, channels)), **label})

  def examples(split):
    for number, (_, name) in enumerate(found.splits[split]):
      yield dict(image=made.read(split, number)) | ({"label": name} if label else {})

  return Source(features, {split: examples(split) for split in found.splits},
                report=made.report, fields=made.fields, save=made.save)


def find(path: epath.Path, names: Sequence[str] = (), held_out: float = 0.05) -> Files:
  """The image files in a folder, of which split and class; see `source`."""
  passed_over = Counter()
  if not path.is_dir():
    raise UserError(f"--source={path}: expected a folder of images, SPLIT/CLASS/FILE or CLASS/FILE")
  folders, loose = _list(path, passed_over)
  splits = _splits(path, folders, names)
  if splits and (loose or len(splits) < len(folders)):
    stray = loose[0] if loose else next(x for x in folders if x not in splits)
    raise UserError(f"{stray} lies beside the splits {', '.join(x.name for x in splits)}: move it "
                    "away, or name the folders that are splits, as in --splits=train,test")
  if splits:
    found = {x.name: _classes(*_list(x, passed_over), passed_over) for x in splits}
  else:
    found = {"": _classes(folders, loose, passed_over)}
  _check_classes(path, found)
  splits = {split: [(file, name) for name in sorted(classes) for file in classes[name]]
            for split, classes in found.items() if any(classes.values())}
  return Files(splits if len(splits) > 1 else _hold_out(path, *splits.values(), held_out),
               passed_over)


def _check_classes(path: epath.Path, found: dict[str, dict[str, list[epath.Path]]]):
  """Raises UserError where it is not clear which classes there are."""
  sizes = Counter()
  for classes in found.values():
    for name, files in classes.items():
      sizes[name] += len(files)
  if not sizes.total():
    raise UserError(f"--source={path}: there are no images in it, of {', '.join(SUFFIXES)}; "
                    "expected SPLIT/CLASS/FILE or CLASS/FILE")
  known = {}
  for name, size in sizes.items():
    if name != name.strip() or "\n" in name:
      raise UserError(f"{path}: the class {name!r} begins or ends with a space, or has a line "
                      "break: rename its folders")
    if known.setdefault(name.casefold(), name) != name:
      raise UserError(f"{path}: the classes {known[name.casefold()]} and {name} differ in case "
                      "only: rename one, or put their images together")
    if not size and name:
      raise UserError(f"{path}: the class {name} has no images: remove its folders, or fill them")
  if "" in sizes and len(sizes) > 1 and sizes[""]:
    raise UserError(f"--source={path}: some splits have folders of classes, and others do not")


def _splits(path: epath.Path, folders: list[epath.Path], names: Sequence[str]) -> list[epath.Path]:
  """Those folders that are splits; none where all are classes."""
  missing = set(names).difference(x.name for x in folders)
  if missing:
    raise UserError(f"--splits={','.join(names)}: {path} has no folder {min(missing)}, only "
                    f"{', '.join(x.name for x in folders)}")
  if names:
    return [x for x in folders if x.name in names]
  known = [x for x in folders if x.name.lower() in SPLITS]
  # Among airplane and bus, train is a class.
  return known if len(known) == len(folders) or any(_list(x, Counter())[0] for x in known) else []


def _classes(folders: list[epath.Path], files: list[epath.Path], passed_over: Counter
             ) -> dict[str, list[epath.Path]]:
  """The images of a split by class: the folders in it, or "" where there are none."""
  if not folders:
    return {"": files}
  if files:
    raise UserError(f"{files[0]} lies beside folders of classes, such as {folders[0].name}: move "
                    "it into one of them, or away")
  found = {}
  for folder in folders:
    # One system writes the same letters in another way than the next.
    name = unicodedata.normalize("NFC", folder.name)
    found.setdefault(name, []).extend(_inside(folder, passed_over, ()))
  return found


def _inside(folder: epath.Path, passed_over: Counter, around: Sequence[str]) -> list[epath.Path]:
  """All images in a folder and in the folders inside it, in the order of their names."""
  real = os.path.realpath(folder)
  if real in around:
    passed_over["a link to a folder around it"] += 1
    return []
  folders, files = _list(folder, passed_over)
  return files + [x for inner in folders for x in _inside(inner, passed_over, (*around, real))]


def _list(folder: epath.Path, passed_over: Counter) -> tuple[list[epath.Path], list[epath.Path]]:
  """The folders in a folder, and the images; what is neither is counted."""
  folders, files = [], []
  for path in sorted(folder.iterdir(), key=lambda x: x.name):
    suffix = path.suffix.lower()
    if path.name.startswith(".") or path.name.lower() in _NOT_OURS:
      passed_over["hidden, or the system's own"] += 1
    elif suffix in SUFFIXES:
      files.append(path)
    elif path.is_dir():
      folders.append(path)
    else:
      passed_over[f"no image: {suffix or 'no suffix'}"] += 1
  return folders, files


def _hold_out(path: epath.Path, files: list[tuple[epath.Path, str]], share: float
              ) -> dict[str, list[tuple[epath.Path, str]]]:
  """Two splits of one: every so-manieth file is held out."""
  number = min(max(round(share * len(files)), 1), len(files) - 1)
  if not number:
    raise UserError(f"--source={path}: one image cannot be trained on and be held out too")
  held_out = set(((np.arange(number) + 0.5) * len(files) / number).astype(int).tolist())
  return dict(train=[x for i, x in enumerate(files) if i not in held_out],
              test=[x for i, x in enumerate(files) if i in held_out])


class Made:
  """Images as they are stored, and what is seen of them on the way."""

  def __init__(self, found: Files, channels: int, size: int | None, colour: Sequence[int]):
    self._found, self._mode, self._size = found, "RGB" if channels == 3 else "L", size
    self._colour = tuple(colour)
    self._first = next(iter(found.splits))
    total = len(found.splits[self._first])
    self._shown_at = set((np.arange(_SHOWN) * total // _SHOWN).tolist())
    self._shown, self._labels = [], []
    self._seen, self._changed, self._sizes = Counter(), Counter(), Counter()
    self._values = np.zeros(256, np.int64)  # how many values of the first split are 0, 1, ...

  def read(self, split: str, number: int) -> io.BytesIO:
    """A file of a split as a PNG or JPEG in the mode and size of the data set."""
    file, name = self._found.splits[split][number]
    content = file.read_bytes()
    image, plain, changes = _as_mode(content, file, self._mode, self._colour)
    self._sizes[image.size] += 1
    pixels = np.atleast_3d(np.asarray(image))
    if self._size and image.size != (self._size, self._size):
      pixels, plain = center_crop(pixels, self._size), False
      changes.append(f"scaled to {self._size} x {self._size}")
    if split == self._first:
      self._values += np.bincount(pixels.ravel(), minlength=256)
      if number in self._shown_at:
        self._shown.append(center_crop(pixels, self._size or _THUMBNAIL))
        self._labels.append(name)
    self._changed.update(changes)
    self._seen[name, split] += 1
    return io.BytesIO(content) if plain else png(pixels)

  def report(self) -> str:
    """How many images of which class, size and kind, and what was done to them."""
    splits, classes = list(self._found.splits), self._found.classes
    rows = [(name or "images", *(self._seen[name, s] for s in splits)) for name in classes]
    if len(rows) > _ROWS:
      rows[_ROWS:] = [(f"... {len(rows) - _ROWS} more", *([None] * len(splits)))]
    rows.append(("all", *(sum(self._seen[c, s] for c in classes) for s in splits)))
    lines = [metrics.table(["class", *splits], rows)]
    lines += [f"note: {s} has no images of {', '.join(missing[:5])}" + ", ..." * (len(missing) > 5)
              for s in splits if (missing := [c for c in classes if not self._seen[c, s]])]
    sides = np.array(list(self._sizes))
    (width, height), (most_wide, most_high) = sides.min(0), sides.max(0)
    count = lambda counter: ", ".join(f"{n:,} {what}" for what, n in counter.most_common())
    lines.append(f"{self._sizes.total():,} images of {width} to {most_wide} x {height} to "
                 f"{most_high} pixels (width x height), stored in {self._mode}")
    lines += [f"changed: {count(self._changed)}"] if self._changed else []
    lines += [f"passed over: {count(self._found.passed_over)}"] if self._found.passed_over else []
    mean, std = self._moments()
    lines.append(f"{self._first}: mean {mean:.3f} and standard deviation {std:.3f} in [-1, 1]")
    return "\n".join(lines)

  def fields(self) -> dict[str, Any]:
    """What a config says of them."""
    classes, sizes = self._found.classes, list(self._sizes)
    same = len(sizes) == 1 and sizes[0][0] == sizes[0][1]
    size = self._size or (sizes[0][0] if same else None)
    return {**dict(zip(("data.train", "data.held_out"), _roles(self._found.splits))),
            **({"data.image_size": size} if size else {}),
            "data.channels": len(self._mode), "data.num_classes": len(classes),
            "sigma_data": round(self._moments()[1], 2)}

  def save(self, directory: epath.Path):
    """Writes forty of them to look at."""
    labels = np.array(self._labels) if any(self._labels) else None
    pictures.save_grid(directory / PREVIEW, np.array(self._shown), labels, 10)

  def _moments(self) -> tuple[float, float]:
    x, n = np.arange(256) / 127.5 - 1, self._values / self._values.sum()
    return float(mean := n @ x), float((n @ (x - mean) ** 2) ** 0.5)


def _roles(splits: Iterable[str]) -> tuple[str, str]:
  """Which of the splits to train on, and which is held out."""
  splits = list(splits)
  train = next((s for s in splits if s.lower().startswith("train")), splits[0])
  others = [s for s in splits if s != train]
  return train, next((s for s in others if s.lower().startswith("test")), others[0])


def _is_coloured(file: epath.Path) -> bool:
  try:
    with file.open("rb") as content, Image.open(content) as image:
      palette = image.mode in ("P", "PA") and np.reshape(image.getpalette("RGB"), (-1, 3))
      return bool(np.any(palette != palette[:, :1])) if palette is not False else (
          image.mode not in _GREY)
  except Exception as e:  # Pillow raises almost anything
    raise _unreadable(file, e) from e


def _as_mode(content: bytes, file: epath.Path, mode: str, colour: tuple[int, ...]
             ) -> tuple[Image.Image, bool, list[str]]:
  """An image in a mode; whether the file is just that; and in words what was changed."""
  try:
    image = Image.open(io.BytesIO(content))
    image.load()
    frames = getattr(image, "is_animated", False) and image.format != "MPO"  # a camera's preview
    turned = image.getexif().get(_ORIENTATION, 1) in range(2, 9)
    deep = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    if image.mode in ("I", "F") and not deep:
      raise UserError(f"{file} has numbers of 32 bits, and nobody says which is white: save it "
                      "with 8 or 16 bits")
    clear = image.mode in _ALPHA or "transparency" in image.info
    changes = ["first frame of several"] * bool(frames) + ["turned as EXIF says"] * turned
    deep_colour = image.format == "PNG" and content[24] == 16 and not deep  # Pillow has made it 8
    changes += ["of 16 bits"] * (deep or deep_colour)
    if not (changes or clear) and image.mode == mode:
      return image, image.format in ("PNG", "JPEG"), changes
    if turned:
      image = ImageOps.exif_transpose(image)
    if deep:
      image = Image.fromarray(np.round(np.asarray(image) / 257).astype(np.uint8))
    if clear:
      changes.append("transparent, over the background")
      base = Image.new("RGBA", image.size, (*colour, 255))
      base.alpha_composite(image.convert("LA" if image.mode == "La" else image.mode
                                         ).convert("RGBA"))
      image = base.convert(mode)
    if image.mode != mode:
      changes.append(f"from {_MODES.get(image.mode, image.mode)}")
    return image.convert(mode), False, changes
  except UserError:
    raise
  except Exception as e:  # Pillow raises almost anything
    raise _unreadable(file, e) from e


def _unreadable(file: epath.Path, error: Exception) -> UserError:
  if isinstance(error, Image.UnidentifiedImageError):
    return UserError(f"{file} is no image of a kind that Pillow reads: mend or remove it")
  if isinstance(error, Image.DecompressionBombError):
    return UserError(f"{file} is too large ({records.words(error)}): scale it down, or remove it")
  return UserError(f"{file} is no image that can be read ({records.words(error)}): mend or remove "
                   "it")
