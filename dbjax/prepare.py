"""Makes a data set that `dbjax.data` reads: in TFDS's own format, without TensorFlow.

    python -m dbjax.prepare --what=fashion_mnist --source=/usr/share/datasets/fashion-mnist
    python -m dbjax.prepare --what=folder --source=DIR --name=mine
    python -m dbjax.prepare --what=latents --source=imagenet2012 --name=imagenet2012_latent \\
        --splits=train,validation --image_size=256 --encode=my_vae:encode
    python -m dbjax.prepare --what=text --source=FILE --name=mine --tokenizer=bytes

fashion_mnist  the four files of Zalando's Fashion-MNIST, as Debian's dataset-fashion-mnist
               has them, become TFDS's data set of that name.
folder         DIR/SPLIT/CLASS/*.png or *.jpg; classes are numbered in the order of their names.
latents        every image of a TFDS data set, prepared beforehand, cropped to a square of
               --image_size if they come in all sizes, and given to
               encode(images uint8 (N, H, W, 3)) -> (N, h, w, c), the mean of your VAE's
               posterior. Stored as `latent`, float16, for
               --config.data.feature=latent. Scale it as the model shall see it: dbjax.main
               measures its standard deviation, and says what sigma_data must be.
text           a file of UTF-8, or all files of a folder in the order of their names, plain or .gz,
               .dz or .bz2; or the name of a TFDS data set with a feature `text`, such as lm1b,
               prepared beforehand, with its splits train and test. Documents (--documents),
               each with the token that ends it where the --tokenizer has one, follow one
               another and are cut every --length tokens: `tokens`, for
               --config.data.feature=tokens. The last --held_out share becomes the split test.
               A SentencePiece model is given (--model, Llama's too) or trained on the split
               train (--vocab_size, or characters: all that it has); it is kept beside the data.

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

Other data sets of TFDS: tfds build NAME --file_format=array_record. All land in --data_dir.
"""

import bz2
from collections.abc import Callable, Iterator, Mapping, Sequence
import functools
import gzip
import io
import itertools
import re
from typing import Any
import zlib

from absl import flags
from etils import epath
import numpy as np
from PIL import Image

from dbjax import cli
from dbjax import lookup
from dbjax.data import records
from dbjax.data import tokenizers
from dbjax.data.text import token_dtype
from dbjax.data.tfds import read_split
from dbjax.errors import UserError

_ENCODE_AT_ONCE = 16
_READ_AT_ONCE = 1000  # records of a text
_PIECE = 2**20  # characters of a stream, to the end of a line


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
    UserError: it exists, or its name is none.
  """
  if not re.fullmatch(r"[A-Za-z]\w*", dataset):
    raise UserError(f"--name={dataset}: expected letters, digits and underscores, such as my_text")
  import tensorflow_datasets as tfds  # pylint: disable=g-import-not-at-top

  class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    name = dataset
    VERSION = tfds.core.Version(version)

    def _info(self):
      # Our own order is random: kept, slices of images and of their latents are the same images.
      return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

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

  splits = {s: read_split(name, s, data_dir, image_size)
            for s in names or records.splits(name, data_dir)}

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


def text(source: str, data_dir: str, tokenizer: str, length: int, documents: str = "stream",
         normalize: str | None = None, held_out: float = 0.05, model: str | None = None,
         vocab_size: int = 8000) -> tuple[Any, dict[str, Iterator], tokenizers.Tokenizer]:
  """Features and splits of a text, cut into sequences, and its tokenizer.

  Args:
    source: a file, a folder of files, or the name of a TFDS data set whose records are the
      documents.
    data_dir: where TFDS keeps its data sets.
    tokenizer: "text8", "bytes", "characters" (those of the split train; bytes for others) or
      "sentencepiece".
    length: of a sequence, in tokens.
    documents: of files, what is a document: "stream" (all of them are one), "file", "line" or
      "paragraph".
    normalize: "text8" for `tokenizers.text8_form`.
    held_out: the share of the documents, or of a stream's characters, that becomes test.
    model: a file with a SentencePiece model; one is trained if there is none.
    vocab_size: of one that is trained.

  Raises:
    UserError: there is no such source, or it has no text or too little, or cannot be read. In
      part as the splits are read: they are not in memory.
  """
  import tensorflow_datasets as tfds  # pylint: disable=g-import-not-at-top

  path = epath.Path(source).expanduser()
  if path.exists():
    parts = _parts_of_files(path, documents, held_out)
  else:
    documents, parts = "record", _parts_of_records(source, data_dir)
  if normalize:
    parts = {s: lambda part=part: filter(None, map(tokenizers.text8_form, part()))
             for s, part in parts.items()}
  coder = _coder(tokenizer, model, vocab_size, parts["train"])
  if coder.eos is None and documents != "stream" and normalize is None:
    raise UserError(f"--documents={documents}: {coder.name} has no token that ends a document, so "
                    "words would merge: set --normalize=text8, or of files --documents=stream")
  dtype = token_dtype(coder.vocab_size)
  features = tfds.features.FeaturesDict(dict(
      tokens=tfds.features.Tensor(shape=(length,), dtype=dtype, encoding="bytes")))
  tokens = {s: _tokens(coder, part(), documents) for s, part in parts.items()}
  return features, {s: _sequences(source, s, x, length, dtype) for s, x in tokens.items()}, coder


def _coder(tokenizer: str, model: str | None, vocab_size: int,
           train: Callable[[], Iterator[str]]) -> tokenizers.Tokenizer:
  """The tokenizer that --tokenizer, --model and --vocab_size ask for."""
  if model and tokenizer != "sentencepiece":
    raise UserError(f"--model={model}: --tokenizer={tokenizer} has no use for it")
  if tokenizer in tokenizers.BUILT_IN:
    return tokenizers.load(tokenizer)
  if model:
    return tokenizers.read_model(epath.Path(model).expanduser())
  return tokenizers.train(train(), None if tokenizer == "characters" else vocab_size)


def _tokens(coder: tokenizers.Tokenizer, part: Iterator[str], documents: str
            ) -> Iterator[np.ndarray]:
  """The tokens of a split, piece by piece; each document is closed, or all that is a stream."""
  end = [] if coder.eos is None else [np.array([coder.eos])]
  encoded = map(coder.encode, part)
  if documents == "stream":
    yield from itertools.chain(encoded, end)
  else:
    for document in encoded:
      yield from (document, *end)


def _sequences(source: str, split: str, tokens: Iterator[np.ndarray], length: int, dtype: np.dtype
               ) -> Iterator[dict[str, np.ndarray]]:
  """The examples of a split; at the end it prints how many there were."""
  number = 0
  for sequence in tokenizers.pack(tokens, length):
    if len(sequence) == length:  # all but the last
      number += 1
      yield dict(tokens=sequence.astype(dtype))
  if not number:
    raise UserError(f"--source={source}: its split {split} has {len(sequence)} tokens, fewer "
                    f"than --length={length}: a shorter length, a longer text or another "
                    "--held_out is needed")
  print(f"{split}: {number:,} sequences of {length} tokens; the last {len(sequence)} tokens "
        "are left out")


def _parts_of_records(name: str, data_dir: str) -> dict[str, Callable[[], Iterator[str]]]:
  """What reads the documents of train and test anew."""
  if records.find(name, data_dir) is None:
    raise UserError(f"--source={name}: there is no such file or folder, nor a data set of this "
                    f"name in {records.data_dir(data_dir)}")
  splits = {s: records.Split(name, s, data_dir) for s in ("train", "test")}
  for split in splits.values():
    if "text" not in split.features:
      raise UserError(f"--source={name}: it has {', '.join(sorted(split.features))}, expected text")
  return {s: functools.partial(_of_records, split) for s, split in splits.items()}


def _parts_of_files(path: epath.Path, documents: str,
                    held_out: float) -> dict[str, Callable[[], Iterator[str]]]:
  """What reads train and test anew: their documents, or pieces of a stream."""
  files = sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]
  every = lambda: (d for file in files for d in _of_file(file, documents) if d)
  stream = documents == "stream"
  total = sum(len(d) if stream else 1 for d in every())
  if not total:
    raise UserError(f"--source={path}: there is no text in it")
  cut, end = _characters if stream else itertools.islice, total - round(held_out * total)
  return dict(train=lambda: cut(every(), 0, end), test=lambda: cut(every(), end, total))


def _of_records(split: records.Split) -> Iterator[str]:
  for i in range(0, len(split), _READ_AT_ONCE):
    index = np.arange(i, min(i + _READ_AT_ONCE, len(split)))
    try:
      yield from [example["text"].decode() for example in split.read(index)]
    except Exception as e:
      raise UserError(f"{split.locate(i)}, or one of the {_READ_AT_ONCE} from there on, cannot be "
                      f"read ({records.words(e)}): prepare {split.name} again") from e


def _of_file(path: epath.Path, kind: str) -> Iterator[str]:
  """The documents of a file, or the pieces of a stream."""
  unpack = {".gz": gzip.open, ".dz": gzip.open, ".bz2": bz2.open}.get(path.suffix, lambda f: f)
  try:
    with path.open("rb") as raw, io.TextIOWrapper(unpack(raw), "utf-8-sig") as file:
      if kind == "stream":
        yield from iter(lambda: "".join(file.readlines(_PIECE)), "")
      elif kind == "file":
        yield file.read()
      elif kind == "line":
        yield from (line.rstrip("\n") for line in file if line.strip())
      else:
        yield from ("".join(lines).strip() for blank, lines in itertools.groupby(
            file, lambda line: not line.strip()) if not blank)
  except UnicodeDecodeError as e:
    raise UserError(f"{path} is not UTF-8 (byte {e.object[e.start]:#x}): convert it with iconv "
                    "-f, or drop what is not with iconv -c -f UTF-8 -t UTF-8") from e
  except (EOFError, OSError, zlib.error) as e:
    raise UserError(f"{path} cannot be read ({e}): it is damaged, truncated or locked") from e


def _characters(pieces: Iterator[str], start: int, stop: int) -> Iterator[str]:
  """Those from `start` to `stop`."""
  for piece in pieces:
    if start < len(piece) and stop > 0:
      yield piece[max(start, 0):stop]
    start, stop = start - len(piece), stop - len(piece)


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
  elif what == "text":
    name = cli.require("name")
    *made, tokenizer = text(source, f.data_dir, cli.require("tokenizer"), f.length, f.documents,
                            f.normalize, f.held_out, f.model, f.vocab_size)
  else:
    name = cli.require("name")
    encode = lookup.find(cli.require("encode"), "--encode")
    made = latents(source, f.data_dir, f.image_size, encode, f.splits)
  version = "3.0.1" if what == "fashion_mnist" else "1.0.0"  # TFDS's own
  path = write(records.data_dir(f.data_dir), name, *made, version)
  fields = dict(name=name, dir=path.parents[1])
  if what == "text":
    tokenizer.save(path)
    fields |= tokenizers.read(path) | dict(length=f.length)
  print(f"{path}: use it with", *(f"--config.data.{k}={v}" for k, v in fields.items()))


if __name__ == "__main__":
  flags.DEFINE_enum("what", None, ["fashion_mnist", "folder", "latents", "text"],
                    "What to prepare.")
  flags.DEFINE_string("source", None, "A directory; of latents, the name of a TFDS data set; of "
                      "text, either, or a file.")
  flags.DEFINE_string("name", None, "Of the new data set.")
  flags.DEFINE_string("data_dir", "", "Where TFDS keeps its data sets [TFDS_DATA_DIR, or "
                      "~/tensorflow_datasets].")
  flags.DEFINE_string("encode", None, "Of latents: module:function.")
  flags.DEFINE_integer("image_size", 256, "Of the images that become latents, where they are of "
                       "all sizes.", lower_bound=1)
  flags.DEFINE_list("splits", [], "That become latents [all].")
  flags.DEFINE_enum("tokenizer", None, [*tokenizers.BUILT_IN, "characters", "sentencepiece"],
                    "Of text.")
  flags.DEFINE_integer("length", 256, "Of text: tokens in a sequence.", lower_bound=2)
  flags.DEFINE_string("model", None, "Of text: the file of a SentencePiece model [trains one].")
  flags.DEFINE_integer("vocab_size", 8000, "Of text: of a model that is trained.", lower_bound=2)
  flags.DEFINE_enum("documents", "stream", ["stream", "file", "line", "paragraph"], "Of text in "
                    "files: what a document is; stream: all is one.")
  flags.DEFINE_enum("normalize", None, ["text8"], "Of text: lower case, digits spelled, all else "
                    "a space.")
  flags.DEFINE_float("held_out", 0.05, "Of text in files: the share of the split test.",
                     lower_bound=0, upper_bound=1)
  cli.run(main, __doc__)
