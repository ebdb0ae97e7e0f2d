"""Text in files, or in the records of a data set, cut into sequences of tokens."""

import bz2
from collections.abc import Callable, Iterator
import functools
import gzip
import io
import itertools
import zlib

from etils import epath
import numpy as np

from dbjax import paths
from dbjax.data import records
from dbjax.data import tokenizers
from dbjax.data.text import token_dtype
from dbjax.errors import UserError
from dbjax.sources import Source

_READ_AT_ONCE = 1000  # records of a text
_PIECE = 2**20  # characters of a stream, to the end of a line


def source(given: str, data_dir: str, tokenizer: str, length: int, documents: str = "stream",
           normalize: str | None = None, held_out: float = 0.05, model: str | None = None,
           vocab_size: int = 8000) -> Source:
  """A text, cut into sequences; its tokenizer lies beside them.

  Args:
    given: a file, a folder of files, or the name of a TFDS data set whose records are the
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

  path = paths.expand(given, "--source")
  if path.exists():
    parts = _parts_of_files(path, documents, held_out)
  else:
    documents, parts = "record", _parts_of_records(given, data_dir)
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
  return Source(
      features, {s: _sequences(given, s, x, length, dtype) for s, x in tokens.items()},
      fields=lambda: {"data.length": length, "data.tokenizer": coder.name,
                      "data.vocab_size": coder.vocab_size,
                      "data.eos": -1 if coder.eos is None else coder.eos},
      save=coder.save)


def _coder(tokenizer: str, model: str | None, vocab_size: int,
           train: Callable[[], Iterator[str]]) -> tokenizers.Tokenizer:
  """The tokenizer that --tokenizer, --model and --vocab_size ask for."""
  if model and tokenizer != "sentencepiece":
    raise UserError(f"--model={model}: --tokenizer={tokenizer} has no use for it")
  if tokenizer in tokenizers.BUILT_IN:
    return tokenizers.load(tokenizer)
  if model:
    return tokenizers.read_model(paths.expand(model, "--model"))
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
