"""Makes a data set that `dbjax.data` reads: in TFDS's own format, without TensorFlow.

    python -m dbjax.prepare --what=fashion_mnist --source=/usr/share/datasets/fashion-mnist
    python -m dbjax.prepare --what=folder --source=DIR --name=mine
    python -m dbjax.prepare --what=latents --source=imagenet2012 --name=imagenet2012_latent \\
        --splits=train,validation --image_size=256 --encode=my_vae:encode
    python -m dbjax.prepare --what=text --source=FILE --name=mine --tokenizer=bytes

fashion_mnist  the four files of Zalando's Fashion-MNIST, as Debian's dataset-fashion-mnist
               has them, become TFDS's data set of that name.
folder         images as DIR/SPLIT/CLASS/FILE or DIR/CLASS/FILE; of the latter the share --held_out
               becomes the split test. Classes are numbered in the order of their names. Photos are
               cropped and scaled once, here, with --image_size. What becomes of transparency,
               rotation and unusual files: python -m pydoc dbjax.sources.folder.
latents        every image of a TFDS data set, prepared beforehand, cropped to a square of
               --image_size if they come in all sizes, and given to
               encode(images uint8 (N, H, W, 3)) -> (N, h, w, c), the mean of your VAE's
               posterior. Stored as `latent`, float16, for
               --config.data.feature=latent. Scale it as the model shall see it: dbjax.main
               measures its standard deviation, and says what sigma_data must be.
text           a file of UTF-8, or of UTF-16 or UTF-32 with its mark, or all files of a folder and
               of those in it, in the order of their paths, plain or .gz, .dz or .bz2; or the name
               of a TFDS data set with a feature `text`, such as lm1b, prepared beforehand, with its
               splits train and test. Documents (--documents), each with the token that ends it
               where the --tokenizer has one, follow one another and are cut every --length tokens:
               `tokens`, for --config.data.feature=tokens. The last --held_out share becomes the
               split test. A SentencePiece model is given (--model, Llama's too) or trained on the
               split train (--vocab_size, or characters: all that it has); it is kept beside the
               data. What becomes of line ends, hidden files and what is no text:
               python -m pydoc dbjax.sources.text.

Drawings in colour from Debian; some files are too large to be read, some are not sorted:

    apt install openclipart-png
    python -m dbjax.prepare --what=folder --source=/usr/share/openclipart/png --name=openclipart \\
        --image_size=32 --held_out=0.1 --skip='unsorted,buttons,stop_sign_*,microchip_v.2_*'

Real text from Debian, here by characters as in text8, and by words:

    apt install dict-gcide bible-kjv bible-kjv-text
    zcat /usr/share/dictd/gcide.dict.dz | iconv -c -f UTF-8 -t UTF-8 \\
        | sed 's/\\[1913 Webster\\]//g' > gcide.txt
    bible -f gen1:1-rev22:21 | sed 's/^[^ ]* //' > kjv.txt  # a verse a line
    python -m dbjax.prepare --what=text --source=gcide.txt --name=gcide_chars \\
        --tokenizer=text8 --normalize=text8 --length=256
    python -m dbjax.prepare --what=text --source=kjv.txt --name=kjv_chars \\
        --tokenizer=text8 --normalize=text8 --length=256
    python -m dbjax.prepare --what=text --source=kjv.txt --name=kjv_sp \\
        --tokenizer=sentencepiece --vocab_size=4000 --length=128 --documents=line

At the end it prints a table of what there is, and the config fields that fit; beside images it
writes a picture of forty, preview.png. A preparation that fails or is stopped leaves no data set.

Other data sets of TFDS: tfds build NAME --file_format=array_record. All land in --data_dir.
"""

import collections
import contextlib
import os
import re
import shlex
from typing import Any
import uuid

from absl import flags
from etils import epath

from dbjax import cli
from dbjax import lookup
from dbjax.data import records
from dbjax.data import tokenizers
from dbjax.errors import UserError
from dbjax.sources import fashion_mnist
from dbjax.sources import folder
from dbjax.sources import HELD_OUT
from dbjax.sources import latents
from dbjax.sources import report
from dbjax.sources import Source
from dbjax.sources import text

_KINDS = dict(  # of --what, that have a use for a flag
    tokenizer=["text"], length=["text"], model=["text"], vocab_size=["text"], documents=["text"],
    normalize=["text"], encode=["latents"], background=["folder"], skip=["folder"],
    image_size=["folder", "latents"], splits=["folder", "latents"], held_out=["folder", "text"])


def write(data_dir: epath.PathLike, dataset: str, source: Source,
          version: str = "1.0.0") -> epath.Path:
  """Writes a TFDS data set as ARRAY_RECORD, whole or not at all.

  Args:
    data_dir: where TFDS keeps its data sets.
    dataset: its name.
    source: of its examples.
    version: three numbers.

  Returns:
    Its directory.

  Raises:
    UserError: it exists, or its name is none, or the source cannot be read.
  """
  if not re.fullmatch(r"[A-Za-z]\w*", dataset):
    raise UserError(f"--name={dataset}: expected letters, digits and underscores, such as my_text")
  for split in source.splits:
    if not re.fullmatch(r"\w+", split):
      raise UserError(f"the split {split!a}: expected letters, digits and underscores; "
                      "rename its folder, or take whole splits")
  path = epath.Path(data_dir) / dataset / version
  if (there := records.find(dataset, os.fspath(data_dir))) or path.exists():
    raise UserError(f"{there or path} exists: remove it first, or choose another --name")
  import tensorflow_datasets as tfds  # pylint: disable=g-import-not-at-top

  class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    name = dataset
    VERSION = tfds.core.Version(version)

    def _info(self):
      # Our own order is random: kept, slices of images and of their latents are the same images.
      return tfds.core.DatasetInfo(builder=self, features=source.features, disable_shuffling=True)

    def _split_generators(self, _):
      return {split: enumerate(examples) for split, examples in source.splits.items()}

    def _generate_examples(self):
      raise AssertionError("the splits are generators already")

  fresh = epath.Path(data_dir) / f".{dataset}.{uuid.uuid4().hex}"
  try:
    builder = Builder(data_dir=fresh, file_format="array_record")
    tfds.disable_progress_bar()  # they do not know how much is left; `report.watched` does
    with contextlib.redirect_stdout(None):  # TFDS names the directory that is soon elsewhere
      builder.download_and_prepare()
    made = epath.Path(builder.data_path)
    source.save(made)
    path.parent.mkdir(parents=True, exist_ok=True)
    made.rename(path)
  except OSError as e:
    raise UserError(f"{path} cannot be written ({e.strerror or e}): make room, or choose another "
                    "--data_dir") from e
  finally:
    if fresh.exists():
      fresh.rmtree()
  return path


def main():
  f = flags.FLAGS
  source, name, version = _source(cli.require("what"), cli.require("source"))
  seen = collections.Counter[tuple[str, Any]]()
  path = write(records.data_dir(f.data_dir), name, report.watched(source, seen), version)
  words, fields = ("", {}) if f.what == "text" else report.of_images(path, seen)
  print(*filter(None, [words, source.report()]), sep="\n")
  fields = {"data.name": name, "data.dir": path.parents[1], **fields, **source.fields()}
  print(f"{path}: use it with", *(f"--config.{k}={shlex.quote(str(v))}" for k, v in fields.items()))


def _source(what: str, given: str) -> tuple[Source, str, str]:
  """What the flags say: the source, and the name and version of the new data set."""
  f = flags.FLAGS
  for name, kinds in _KINDS.items():
    if f[name].present and what not in kinds:
      raise UserError(f"{f[name].serialize()}: expected only with --what={' or '.join(kinds)}, and "
                      f"not with {what}: leave it out")
  if what == "fashion_mnist":
    return fashion_mnist.source(cli.path("source")), f.name or what, "3.0.1"  # as in TFDS
  name = cli.require("name")
  if what == "folder":
    source = folder.source(cli.path("source"), names=f.splits, held_out=f.held_out,
                           image_size=f.image_size, background=f.background, skip=f.skip)
  elif what == "text":
    source = text.source(given, f.data_dir, cli.require("tokenizer"), f.length, f.documents,
                         f.normalize, f.held_out, f.model, f.vocab_size)
  else:
    encode = lookup.find(cli.require("encode"), "--encode")
    source = latents.source(given, f.data_dir, f.image_size or 256, encode, f.splits)
  return source, name, "1.0.0"


if __name__ == "__main__":
  flags.DEFINE_enum("what", None, ["fashion_mnist", "folder", "latents", "text"],
                    "What to prepare.")
  flags.DEFINE_string("source", None, "A directory; of latents, the name of a TFDS data set; of "
                      "text, either, or a file.")
  flags.DEFINE_string("name", None, "Of the new data set.")
  flags.DEFINE_string("data_dir", "", "Where TFDS keeps its data sets [TFDS_DATA_DIR, or "
                      "~/tensorflow_datasets].")
  flags.DEFINE_string("encode", None, "Of latents: module:function.")
  flags.DEFINE_integer("image_size", None, "Images are cropped to a square of this size, in pixels "
                       "[of a folder: as they are; of latents: 256].", lower_bound=1)
  flags.DEFINE_list("splits", [], "Of a folder: those in it that are splits [train, test, ...]; of "
                    "latents: those that become some [all].")
  flags.DEFINE_string("background", "white", "Of a folder: the colour behind what is transparent.")
  flags.DEFINE_list("skip", [], "Of a folder: names of files and folders in it that are left out.")
  flags.DEFINE_enum("tokenizer", None, [*tokenizers.BUILT_IN, "characters", "sentencepiece"],
                    "Of text.")
  flags.DEFINE_integer("length", 256, "Of text: tokens in a sequence.", lower_bound=2)
  flags.DEFINE_string("model", None, "Of text: the file of a SentencePiece model [trains one].")
  flags.DEFINE_integer("vocab_size", None, "Of text: of a SentencePiece model that is trained "
                       f"[{text.VOCAB_SIZE}].", lower_bound=2)
  flags.DEFINE_enum("documents", "stream", ["stream", "file", "line", "paragraph"], "Of text in "
                    "files: what a document is; stream: all is one.")
  flags.DEFINE_enum("normalize", None, ["text8"], "Of text: lower case, digits spelled, all else "
                    "a space.")
  flags.DEFINE_float("held_out", None, "Of text in files, and of a folder without splits: the "
                     f"share that becomes the split test [{HELD_OUT}].",
                     lower_bound=0, upper_bound=1)
  cli.run(main, __doc__)
