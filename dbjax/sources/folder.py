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
    a link to another of them   passed over: it could be trained on and held out
"""

from collections import Counter
from collections.abc import Iterator, Sequence
import dataclasses
import fnmatch
import functools
import io
import os
import unicodedata
import warnings

from etils import epath
import numpy as np
from PIL import Image
from PIL import ImageColor
from PIL import ImageOps

from dbjax.data import records
from dbjax.data.tfds import center_crop
from dbjax.errors import UserError
from dbjax.sources import held_out_share
from dbjax.sources import listed
from dbjax.sources import png
from dbjax.sources import Source
from dbjax.sources import walk

Found = dict[str, dict[str, list[epath.Path]]]  # {split: {class: images}}
SPLITS = ("train", "training", "test", "testing", "val", "valid", "validation", "dev", "eval",
          "held_out", "holdout")
SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff",
            ".pbm", ".pgm", ".ppm", ".pnm", ".apng")
_GREY = ("1", "L", "LA", "La", "I;16", "I;16L", "I;16B", "I;16N", "I", "F")
_ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")
_MODES = {"L": "grey", "1": "black and white", "P": "a palette"}
_ORIENTATION = 0x0112  # the EXIF tag
_PNG, _PNG_DEPTH, _PNG_KIND = b"\x89PNG\r\n\x1a\n", 24, 25  # its first bytes; where two others are

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


def source(path: epath.Path, *, names: Sequence[str] = (), held_out: float | None = None,
           image_size: int | None = None, background: str = "white", skip: Sequence[str] = ()
           ) -> Source:
  """The images in a folder.

  Args:
    path: of it.
    names: of the folders in it that are splits; by default those called as splits are.
    held_out: the share that becomes the split test, where there is no other split [0.05].
    image_size: height and width to which images are cropped and scaled; None: as they are.
    background: what shows through, as in HTML: white, #ff0000.
    skip: files and folders that are left out, by their names: stop.png, *_old.

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
  found = find(path, names, held_out, skip)
  classes = found.classes
  channels = 3 if any(_is_coloured(file) for files in found.splits.values()
                      for file, _ in files) else 1
  reader = _Reader(found.passed_over, channels, image_size, colour)
  label = {"label": tfds.features.ClassLabel(names=classes)} if classes != [""] else {}
  features = tfds.features.FeaturesDict(
      {"image": tfds.features.Image(shape=(image_size, image_size, channels)), **label})

  def examples(split):
    files = found.splits[split]  # sorted by class: a slice of them would have a few classes only
    for i in np.random.default_rng(0).permutation(len(files)):
      file, name = files[i]
      yield dict(image=reader.read(file)) | ({"label": name} if label else {})

  return Source(features, {split: examples(split) for split in found.splits},
                sizes={split: len(files) for split, files in found.splits.items()},
                report=reader.report, fields=reader.fields)


def find(path: epath.Path, names: Sequence[str] = (), held_out: float | None = None,
         skip: Sequence[str] = ()) -> Files:
  """The image files in a folder, of which split and class; see `source`."""
  passed_over, share = Counter[str](), held_out_share(held_out)
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
  for why, which in (("named by --skip", functools.partial(_named, path, skip)),
                     ("an image that is here already", _doubled)):
    if files := which(found):
      passed_over[why] += len(files)
      found = _without(found, files)
  _check_classes(path, found)
  splits = {split: [(file, name) for name in sorted(classes) for file in classes[name]]
            for split, classes in found.items()
            if any(classes.values())}
  if len(splits) == 1:
    (files,) = splits.values()
    splits = _hold_out(path, files, share)
  elif held_out is not None:
    raise UserError(f"--held_out={held_out:g}: {path} has the splits {', '.join(splits)} already: "
                    "leave it out")
  return Files(splits, passed_over)


def _named(path: epath.Path, skip: Sequence[str], found: Found) -> set[epath.Path]:
  """The images of these names, and those in folders of them."""
  named, used = set(), set()
  for file in _all(found):
    parts = file.relative_to(path).parts
    fitting = {pattern for pattern in skip if any(fnmatch.fnmatch(x, pattern) for x in parts)}
    used |= fitting
    named |= {file} if fitting else set()
  if unused := [pattern for pattern in skip if pattern not in used]:
    raise UserError(f"--skip={unused[0]}: no image in {path} is called so, nor a folder around one")
  return named


def _doubled(found: Found) -> set[epath.Path]:
  """Links, and what lies in linked folders, of which another name is found too: else one image
  could be trained on and held out. What is no link stays, or else the first name.
  """
  real = {file: os.path.realpath(file) for file in _all(found)}
  seen = {os.path.abspath(file) for file in real}
  doubled = set()
  for file, target in real.items():
    if target == os.path.abspath(file):
      continue
    doubled |= {file} if target in seen else set()
    seen.add(target)
  return doubled


def _all(found: Found) -> Iterator[epath.Path]:
  return (file for classes in found.values() for files in classes.values() for file in files)


def _without(found: Found, files: set[epath.Path]) -> Found:
  """What is found without these; a class of which nothing is left is none."""
  return {split: {name: left for name, old in classes.items()
                  if (left := [file for file in old if file not in files]) or not old}
          for split, classes in found.items()}


def _check_classes(path: epath.Path, found: Found):
  """Raises UserError where it is not clear which classes there are."""
  sizes = Counter[str]()
  for classes in found.values():
    for name, files in classes.items():
      sizes[name] += len(files)
  if not sizes.total():
    raise UserError(f"--source={path}: there are no images in it, of {', '.join(SUFFIXES)}; "
                    "expected SPLIT/CLASS/FILE or CLASS/FILE")
  known: dict[str, str] = {}
  for name, size in sizes.items():
    if name != name.strip() or "\n" in name:
      raise UserError(f"{path}: the class {name!r} begins or ends with a space, or has a line "
                      "break: rename its folders")
    if name != name.encode(errors="ignore").decode():  # some bytes are no letters
      raise UserError(f"{path}: the name of the class {name!a} is no UTF-8: rename its folders")
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
  found: dict[str, list[epath.Path]] = {}
  for folder in folders:
    # One system writes the same letters in another way than the next.
    name = unicodedata.normalize("NFC", folder.name)
    found.setdefault(name, []).extend(_images(folder, passed_over))
  return found


def _images(folder: epath.Path, passed_over: Counter) -> list[epath.Path]:
  """All images in a folder and in the folders inside it."""
  return [path for path in walk(folder, passed_over, SUFFIXES) if _is_image(path, passed_over)]


def _list(folder: epath.Path, passed_over: Counter) -> tuple[list[epath.Path], list[epath.Path]]:
  """The folders in a folder, and the images."""
  folders, files = [], []
  for path in listed(folder, passed_over):
    if path.suffix.lower() not in SUFFIXES and path.is_dir():
      folders.append(path)
    elif _is_image(path, passed_over):
      files.append(path)
  return folders, files


def _is_image(path: epath.Path, passed_over: Counter) -> bool:
  suffix = path.suffix.lower()
  if suffix not in SUFFIXES:
    passed_over[f"no image: {suffix or 'no suffix'}"] += 1
  return suffix in SUFFIXES


def _hold_out(path: epath.Path, files: list[tuple[epath.Path, str]], share: float
              ) -> dict[str, list[tuple[epath.Path, str]]]:
  """Two splits of one: every so-manieth file is held out."""
  if share in (0, 1):
    raise UserError(f"--held_out={share:g}: of the {len(files):,} images of {path} none is "
                    f"{'trained on' if share else 'held out'}: set a share between 0 and 1")
  number = min(max(round(share * len(files)), 1), len(files) - 1)
  if not number:
    raise UserError(f"--source={path}: one image cannot be trained on and be held out too")
  held_out = set(((np.arange(number) + 0.5) * len(files) / number).astype(int).tolist())
  return dict(train=[x for i, x in enumerate(files) if i not in held_out],
              test=[x for i, x in enumerate(files) if i in held_out])


class _Reader:
  """Reads the files of a folder, and keeps in mind what they were like."""

  def __init__(self, passed_over: Counter, channels: int, size: int | None, colour: Sequence[int]):
    self._passed_over, self._mode, self._size = passed_over, "RGB" if channels == 3 else "L", size
    self._colour = tuple(colour)
    self._changed, self._sizes = Counter[str](), Counter[tuple[int, int]]()

  def read(self, file: epath.Path) -> io.BytesIO:
    """A file as a PNG or JPEG in the mode and size of the data set."""
    content, image, plain, changes = _read(file, self._mode, self._colour)
    self._sizes[image.size] += 1
    self._changed.update(changes)
    if self._size and image.size != (self._size, self._size):
      self._changed[f"scaled to {self._size} x {self._size}"] += 1
      return png(center_crop(np.atleast_3d(np.asarray(image)), self._size))
    return io.BytesIO(content) if plain else png(np.asarray(image))

  def report(self) -> str:
    """What the files were like, and what was done to them."""
    count = lambda counter: ", ".join(f"{n:,} {what}" for what, n in counter.most_common())
    span = lambda x: str(x[0]) if min(x) == max(x) else f"{min(x)} to {max(x)}"
    width, height = map(span, zip(*self._sizes))
    lines = [f"{self._sizes.total():,} files of {width} x {height} pixels (width x height), stored "
             f"{'grey' if self._mode == 'L' else 'in colour'}"]
    lines += [f"changed: {count(self._changed)}"] if self._changed else []
    lines += [f"passed over: {count(self._passed_over)}"] if self._passed_over else []
    return "\n".join(lines)

  def fields(self) -> dict[str, int]:
    """The size, where all have one."""
    sizes = {side for size in self._sizes for side in size}
    return {"data.image_size": self._size or sizes.pop()} if self._size or len(sizes) == 1 else {}


def _is_coloured(file: epath.Path) -> bool:
  try:
    with file.open("rb") as content:
      head = content.read(_PNG_KIND + 1)
      if head.startswith(_PNG) and head[_PNG_KIND:] in (b"\0", b"\4"):  # grey, and with alpha
        return False
      with Image.open(content) as image:
        if image.mode not in ("P", "PA"):
          return image.mode not in _GREY
        palette = np.reshape(image.getpalette("RGB") or [], (-1, 3))
        return bool((palette != palette[:, :1]).any())
  except Exception as e:  # Pillow raises almost anything
    raise _unreadable(file, e) from e


def _read(file: epath.Path, mode: str, colour: tuple[int, ...]
          ) -> tuple[bytes, Image.Image, bool, list[str]]:
  """A file's content; its image in a mode; whether the file is just that; what was changed."""
  try:
    content = file.read_bytes()
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
    halved = image.format == "PNG" and content[_PNG_DEPTH] == 16  # by Pillow, if not grey
    changes += ["of 16 bits"] * (deep or halved)
    if not (changes or clear) and image.mode == mode:
      return content, image, image.format in ("PNG", "JPEG"), changes
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
    return content, image.convert(mode), False, changes
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
