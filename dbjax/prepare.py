"""Makes a data set that `dbjax.data` reads: in TFDS's own format, without TensorFlow.

    python -m dbjax.prepare --what=fashion_mnist --source=/usr/share/datasets/fashion-mnist
    python -m dbjax.prepare --what=folder --source=DIR --name=mine
    python -m dbjax.prepare --what=latents --source=imagenet2012 --name=imagenet2012_latent \\
        --splits=train,validation --image_size=256 --encode=my_vae:encode

fashion_mnist  the four files of Zalando's Fashion-MNIST, as Debian's dataset-fashion-mnist
               has them, become TFDS's data set of that name.
folder         DIR/SPLIT/CLASS/*.png or *.jpg; classes are numbered in the order of their names.
latents        every image of a TFDS data set, prepared beforehand, cropped to a square of
               --image_size if they come in all sizes, and given to
               encode(images uint8 (N, H, W, 3)) -> (N, h, w, c), the mean of your VAE's
               posterior. Stored as `latent`, float16, for
               --config.data.feature=latent. Scale it as the model shall see it: dbjax.main
               measures its standard deviation, and says what sigma_data must be.

Other data sets of TFDS: tfds build NAME --file_format=array_record. All land in --data_dir.
"""

from collections.abc import Iterator, Mapping, Sequence
import gzip
import io
from typing import Any
import zlib

from absl import flags
from etils import epath
import numpy as np
from PIL import Image

from dbjax import cli
from dbjax import data
from dbjax.cli import UserError

_ENCODE_AT_ONCE = 16


def write(data_dir: epath.PathLike, dataset: str, features: Any,
          splits: Mapping[str, Iterator[dict[str, Any]]], version: str = "1.0.0") -> epath.Path:
  """Writes a TFDS data set as ARRAY_RECORD.

  Args:
    data_dir: where TFDS keeps its data sets.
    dataset: its name.
    features: a `tfds.features.FeaturesDict`.
    splits: examples of each; an image is a file object with its PNG or JPEG.
    version: three numbers.

  Returns:
    Its directory.

  Raises:
    UserError: it exists.
  """
  import tensorflow_datasets as tfds  # pylint: disable=g-import-not-at-top

  class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    name = dataset
    VERSION = tfds.core.Version(version)

    def _info(self):
      return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, _):
      return {split: enumerate(examples) for split, examples in splits.items()}

    def _generate_examples(self):
      raise AssertionError("the splits are generators already")

  builder = Builder(data_dir=data_dir, file_format="array_record")
  path = epath.Path(builder.data_path)
  if path.exists():
    raise UserError(f"{path} exists: remove it first, or choose another --name")
  builder.download_and_prepare()
  return path


def fashion_mnist(source: epath.Path) -> tuple[Any, dict[str, Iterator]]:
  """Features and splits of TFDS's fashion_mnist, from the original files."""
  import tensorflow_datasets as tfds  # pylint: disable=g-import-not-at-top

  def read(name, header, *shape):
    path = source / name
    try:
      content = gzip.decompress(path.read_bytes())
      return np.frombuffer(content, np.uint8, offset=header).reshape(-1, *shape)
    except FileNotFoundError:
      raise UserError(f"{path} does not exist: --source must be the directory of Fashion-MNIST's "
                      "four .gz files (Debian: apt install dataset-fashion-mnist)") from None
    except (EOFError, OSError, ValueError, zlib.error) as e:
      raise UserError(f"{path} is damaged or truncated ({e}): download it again") from e

  def split(prefix, total):
    images = read(f"{prefix}-images-idx3-ubyte.gz", 16, 28, 28)
    labels = read(f"{prefix}-labels-idx1-ubyte.gz", 8)
    if (len(images), len(labels)) != (total, total):
      raise UserError(f"{source}/{prefix}-*: {len(images)} images and {len(labels)} labels, "
                      f"expected {total} of each")
    return (dict(image=_png(x), label=int(y)) for x, y in zip(images, labels))

  features = tfds.features.FeaturesDict(dict(
      image=tfds.features.Image(shape=(28, 28, 1)),
      label=tfds.features.ClassLabel(num_classes=10)))
  return features, dict(train=split("train", 60_000), test=split("t10k", 10_000))


def folder(source: epath.Path) -> tuple[Any, dict[str, Iterator]]:
  """Features and splits of source/SPLIT/CLASS/*."""
  import tensorflow_datasets as tfds  # pylint: disable=g-import-not-at-top

  subdirectories = lambda path: sorted(p.name for p in path.iterdir() if p.is_dir())
  splits = subdirectories(source) if source.is_dir() else []
  classes = sorted({c for s in splits for c in subdirectories(source / s)})
  files = {s: [p for c in classes if (source / s / c).exists()
               for p in sorted((source / s / c).iterdir())
               if p.suffix.lower() in (".png", ".jpg", ".jpeg")] for s in splits}
  if not any(files.values()):
    raise UserError(f"--source={source}: expected SPLIT/CLASS/*.png or *.jpg in it")

  def read(path):
    try:
      with Image.open(io.BytesIO(path.read_bytes())) as image:
        image.load()
        return image
    except OSError as e:
      raise UserError(f"{path} is no image that can be read ({e}): mend or remove it") from e

  mode = "L" if read(next(p for f in files.values() for p in f)).mode == "L" else "RGB"

  def picture(path):
    image = read(path)  # every one: a damaged file shall show now
    same = image.mode == mode
    return io.BytesIO(path.read_bytes()) if same else _png(np.asarray(image.convert(mode)))

  features = tfds.features.FeaturesDict(dict(
      image=tfds.features.Image(shape=(None, None, len(mode))),
      label=tfds.features.ClassLabel(names=classes)))
  return features, {s: (dict(image=picture(p), label=p.parent.name) for p in paths)
                    for s, paths in files.items() if paths}


def latents(name: str, data_dir: str, image_size: int, encode,
            names: Sequence[str] = ()) -> tuple[Any, dict[str, Iterator]]:
  """Features and splits (all, or those of these names) of the latents of a TFDS data set."""
  import tensorflow_datasets as tfds  # pylint: disable=g-import-not-at-top

  splits = {s: data.read_split(name, s, data_dir, image_size)
            for s in names or data.splits(name, data_dir)}

  def encoded(images):
    for i in range(0, len(images), _ENCODE_AT_ONCE):
      batch = images.take(np.arange(i, min(i + _ENCODE_AT_ONCE, len(images))))
      for latent, label in zip(np.asarray(encode(batch["image"])), batch["label"]):
        yield dict(latent=latent.astype(np.float16), label=int(label))

  first = next(iter(splits.values()))
  shape = np.asarray(encode(first.take(np.arange(1))["image"])).shape[1:]
  if len(shape) != 3:
    raise UserError(f"--encode: it made an array of shape {(1, *shape)} of one image, expected "
                    "(1, height, width, channels)")
  features = tfds.features.FeaturesDict(dict(
      latent=tfds.features.Tensor(shape=shape, dtype=np.float16, encoding="bytes"),
      label=tfds.features.ClassLabel(num_classes=first.num_classes)))
  return features, {s: encoded(images) for s, images in splits.items()}


def _png(image: np.ndarray) -> io.BytesIO:
  file = io.BytesIO()
  Image.fromarray(image).save(file, "PNG")
  file.seek(0)
  return file


def main():
  f = flags.FLAGS
  what, source = cli.require("what"), cli.require("source")
  if what == "fashion_mnist":
    name, made = f.name or "fashion_mnist", fashion_mnist(epath.Path(source))
  elif what == "folder":
    name, made = cli.require("name"), folder(epath.Path(source))
  else:
    name = cli.require("name")
    made = latents(source, f.data_dir, f.image_size, cli.function("encode"), f.splits)
  version = "3.0.1" if what == "fashion_mnist" else "1.0.0"  # TFDS's own
  path = write(data.data_dir(f.data_dir), name, *made, version)
  print(f"{path}: use it with --config.data.name={name} --config.data.dir={path.parents[1]}")


if __name__ == "__main__":
  flags.DEFINE_enum("what", None, ["fashion_mnist", "folder", "latents"], "What to prepare.")
  flags.DEFINE_string("source", None, "A directory; of latents, the name of a TFDS data set.")
  flags.DEFINE_string("name", None, "Of the new data set.")
  flags.DEFINE_string("data_dir", "", "Where TFDS keeps its data sets [TFDS_DATA_DIR, or "
                      "~/tensorflow_datasets].")
  flags.DEFINE_string("encode", None, "Of latents: module:function.")
  flags.DEFINE_integer("image_size", 256, "Of the images that become latents, where they are of "
                       "all sizes.", lower_bound=1)
  flags.DEFINE_list("splits", [], "That become latents [all].")
  cli.run(main, __doc__)
