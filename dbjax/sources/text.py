"""Text in files, or in the records of a data set, cut into sequences of tokens.

Files are UTF-8, or UTF-16 or UTF-32 where they begin with the mark of it (BOM), plain or packed
as .gz, .dz or .bz2. In a folder all files are read, those of folders in it too, in the order of
their paths; what is hidden or an operating system's own, and what has no text, is passed over and
counted. A file that is no text, or has NUL characters, is refused in one line that names it.

With the tokenizer bytes a text is kept as it is, with \\r\\n at the ends of its lines if it has
them; for all other tokenizers a line ends with \\n, whatever it ended with. A line that is a
document loses its end.
"""

import bz2
import codecs
from collections import Counter
from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import functools
import gzip
import io
import itertools
import shlex
from typing import Any, BinaryIO, TextIO
import zlib

from etils import epath
import numpy as np

from dbjax import metrics
from dbjax import paths
from dbjax.data import records
from dbjax.data import tokenizers
from dbjax.data.text import token_dtype
from dbjax.errors import UserError
from dbjax.sources import held_out_share
from dbjax.sources import is_pipe
from dbjax.sources import Source
from dbjax.sources import walk

VOCAB_SIZE = 8000  # of a SentencePiece model that is trained, unless another is given
_READ_AT_ONCE = 1000  # records of a text
_PIECE = 2**20  # characters of a stream, to the end of a line
_LONGEST = 4 * _PIECE  # characters of a line, or of a document, that are encoded at once
_SHOWN = 300  # characters of the first sequence
_BLOCK = 2**16  # bytes, where a file is no text
_PACKED: dict[str, tuple[Callable, str]] = {
    ".gz": (gzip.open, "gzip"), ".dz": (gzip.open, "gzip"), ".bz2": (bz2.open, "bzip2")}
_MARKS = ((codecs.BOM_UTF32_LE, "UTF-32LE"), (codecs.BOM_UTF32_BE, "UTF-32BE"),  # before UTF-16
          (codecs.BOM_UTF16_LE, "UTF-16LE"), (codecs.BOM_UTF16_BE, "UTF-16BE"),
          (codecs.BOM_UTF8, "UTF-8"), (b"", "UTF-8"))

_Parts = dict[str, Callable[[], Iterator[str]]]  # {split: reads it anew}, documents or pieces


@dataclasses.dataclass
class _Files:
  """Which files there are.

  Attributes:
    given: what they were found in, or the only one.
    paths: of those that are read, in the order in which they are.
    passed_over: {why: how many}.
  """

  given: epath.Path
  paths: list[epath.Path]
  passed_over: Counter


def source(given: str, data_dir: str, tokenizer: str, length: int, documents: str = "stream",
           normalize: str | None = None, held_out: float | None = None, model: str | None = None,
           vocab_size: int | None = None) -> Source:
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
    held_out: of files, the share of the documents, or of a stream's characters, that becomes
      test [0.05].
    model: a file with a SentencePiece model; one is trained if there is none.
    vocab_size: of one that is trained [8000].

  Raises:
    UserError: there is no such source, or it has no text or too little, or cannot be read. In
      part as the splits are read: they are not in memory.
  """
  import tensorflow_datasets as tfds  # pylint: disable=g-import-not-at-top

  path, share = paths.expand(given, "--source"), held_out_share(held_out)
  asked, documents = documents, documents if path.exists() else "record"
  coder = _given(tokenizer, model, vocab_size)
  if coder and coder.eos is None and documents != "stream" and normalize is None:
    raise UserError(f"--documents={documents}: {coder.name} has no token that ends a document, so "
                    "words would merge: set --normalize=text8, or of files --documents=stream")
  if path.exists():
    found = _find(path)
    parts = _parts_of_files(found, documents, share, "" if tokenizer == "bytes" else None)
  else:
    found, parts = None, _parts_of_records(given, data_dir)
    if asked != "stream":
      raise UserError(f"--documents={asked}: each record of the data set {given} is a document: "
                      "leave it out")
    if held_out is not None:
      raise UserError(f"--held_out={held_out:g}: the data set {given} has the splits "
                      f"{', '.join(parts)} already: leave it out")
  if normalize:
    parts = {s: lambda part=part: filter(None, map(tokenizers.text8_form, part()))
             for s, part in parts.items()}
  coder = coder or tokenizers.train(parts["train"](),
                                    None if tokenizer == "characters" else vocab_size or VOCAB_SIZE)
  features = tfds.features.FeaturesDict(dict(tokens=tfds.features.Tensor(
      shape=(length,), dtype=token_dtype(coder.vocab_size), encoding="bytes")))
  splits = {s: _Split(f"--source={given}: its split {s}", part(), coder, length, documents)
            for s, part in parts.items()}
  return Source(
      features, {s: _begun(split.examples()) for s, split in splits.items()},
      report=lambda: _report(splits, coder, documents, found),
      fields=lambda: {"data.tokenizer": coder.name, "data.vocab_size": coder.vocab_size,
                      "data.eos": -1 if coder.eos is None else coder.eos, "data.length": length},
      save=coder.save)


def _given(tokenizer: str, model: str | None, vocab_size: int | None
           ) -> tokenizers.Tokenizer | None:
  """The tokenizer that the flags ask for; None where one is to be trained."""
  if model and tokenizer != "sentencepiece":
    raise UserError(f"--model={model}: --tokenizer={tokenizer} has no use for it")
  if vocab_size is not None and (model or tokenizer != "sentencepiece"):
    raise UserError(f"--vocab_size={vocab_size}: only a SentencePiece model that is trained has a "
                    "use for it: leave it out")
  if tokenizer in tokenizers.BUILT_IN:
    return tokenizers.load(tokenizer)
  return tokenizers.read_model(paths.expand(model, "--model")) if model else None


def _begun(examples: Iterator[Any]) -> Iterator[Any]:
  """The same; what is wrong with the first of them is raised now, before anything is written."""
  return itertools.chain([next(examples)], examples)


class _Split:
  """Cuts a split into sequences of tokens, and counts what it reads.

  Attributes:
    read: documents, or characters of a stream.
    characters, tokens, sequences: how many there were.
    first: sequence (length,) of tokens.
  """

  def __init__(self, name: str, part: Iterator[str], coder: tokenizers.Tokenizer, length: int,
               documents: str):
    self._name, self._part, self._coder, self._length = name, part, coder, length
    self._stream = documents == "stream"
    self.read = self.characters = self.tokens = self.sequences = 0
    self.first = np.zeros(0, int)

  def examples(self) -> Iterator[dict[str, np.ndarray]]:
    """All of them, once. Raises UserError where there is none."""
    dtype = token_dtype(self._coder.vocab_size)
    for sequence in tokenizers.pack(self._encoded(), self._length):
      self.tokens += len(sequence)
      if len(sequence) < self._length:  # the last
        break
      self.first = self.first if self.sequences else sequence
      self.sequences += 1
      yield dict(tokens=sequence.astype(dtype))
    if not self.sequences:
      raise UserError(f"{self._name} has {self.tokens} tokens, fewer than --length={self._length}: "
                      "a shorter length, a longer text or another --held_out is needed")

  def _encoded(self) -> Iterator[np.ndarray]:
    """The tokens, piece by piece; each document is closed, or all that is a stream."""
    end = [] if self._coder.eos is None else [np.array([self._coder.eos])]
    for document in self._part:
      self.read += len(document) if self._stream else 1
      self.characters += len(document)
      for piece in _cut(document):
        try:
          yield self._coder.encode(piece)
        except UserError as e:
          raise UserError(f"{self._name}: {e}") from None
      yield from [] if self._stream else end
    yield from end if self._stream else []


def _cut(document: str) -> Iterator[str]:
  """Pieces of a document that is very long, at the end of a line or after a space if there is one:
  a SentencePiece model takes many times a text's size of memory."""
  start = 0
  while len(document) - start > _LONGEST:
    within = start, start + _LONGEST
    end = document.rfind("\n", *within) + 1 or document.rfind(" ", *within) + 1 or within[1]
    yield document[start:end]
    start = end
  yield document[start:] if start else document


def _report(splits: dict[str, _Split], coder: tokenizers.Tokenizer, documents: str,
            files: _Files | None) -> str:
  """How much there was, and the beginning of what the network will see."""
  rows = [(name, *(f"{n:,}" for n in (s.read, s.tokens, s.sequences, s.tokens % len(s.first))),
           s.characters / s.tokens) for name, s in splits.items()]
  lines = [metrics.table(["split", "characters" if documents == "stream" else "documents",
                          "tokens", "sequences", "tokens left over", "characters per token"], rows)]
  if files:
    lines.append(f"files read: {len(files.paths):,}")
    counts = ", ".join(f"{n:,} {why}" for why, n in files.passed_over.most_common())
    lines += [f"passed over: {counts}"] if counts else []
  name, split = next(iter(splits.items()))
  ends = np.flatnonzero(split.first == coder.eos)
  text = "<eos>".join(map(coder.decode, np.split(split.first, ends)))
  lines.append(f"{name} begins with {text[:_SHOWN]!r}{'...' * (len(text) > _SHOWN)}")
  return "\n".join(lines)


def _parts_of_records(name: str, data_dir: str) -> _Parts:
  """What reads the documents of train and test anew."""
  if records.find(name, data_dir) is None:
    raise UserError(f"--source={name}: there is no such file or folder, nor a data set of this "
                    f"name in {records.data_dir(data_dir)}")
  splits = {s: records.Split(name, s, data_dir) for s in ("train", "test")}
  for split in splits.values():
    if "text" not in split.features:
      raise UserError(f"--source={name}: it has {', '.join(sorted(split.features))}, expected text")
  return {s: functools.partial(_of_records, split) for s, split in splits.items()}


def _of_records(split: records.Split) -> Iterator[str]:
  for i in range(0, len(split), _READ_AT_ONCE):
    index = np.arange(i, min(i + _READ_AT_ONCE, len(split)))
    try:
      yield from [example["text"].decode() for example in split.read(index)]
    except Exception as e:
      raise UserError(f"{split.locate(i)}, or one of the {_READ_AT_ONCE} from there on, cannot be "
                      f"read ({records.words(e)}): prepare {split.name} again") from e


def _find(path: epath.Path) -> _Files:
  """The file, or the files in a folder."""
  found = _Files(path, [path], Counter())
  if path.is_dir():
    try:
      found.paths = list(walk(path, found.passed_over))
    except OSError as e:
      raise UserError(f"{e.filename} cannot be read ({e.strerror}): allow it to be read, or "
                      "move it away") from e
  elif is_pipe(path):
    raise UserError(f"--source={path}: expected a file or a folder; a pipe can be read only once: "
                    "write what comes out of it into a file")
  return found


def _parts_of_files(files: _Files, documents: str, held_out: float, newline: str | None) -> _Parts:
  """What reads train and test anew: their documents, or pieces of a stream.

  Reads all of them once, to count; takes files that have no text out of `files`.
  """
  stream = documents == "stream"
  sizes = {file: sum(len(d) if stream else 1 for d in _of_file(file, documents, newline))
           for file in files.paths}
  total = sum(sizes.values())
  if not total:
    raise UserError(f"--source={files.given}: there is no text in it")
  files.paths = [file for file in files.paths if sizes[file]]
  files.passed_over += Counter({"without text": len(sizes) - len(files.paths)})
  end = total - round(held_out * total)
  if not 0 < end < total:
    unit = "characters" if stream else "documents"
    raise UserError(f"--held_out={held_out}: of the {total:,} {unit} of {files.given} {end:,} are "
                    f"trained on and {total - end:,} held out, expected some of each: another "
                    "share, a longer text or other --documents are needed")
  every = lambda: (d for file in files.paths for d in _of_file(file, documents, newline))
  cut = _characters if stream else itertools.islice
  return dict(train=lambda: cut(every(), 0, end), test=lambda: cut(every(), end, total))


def _characters(pieces: Iterator[str], start: int, stop: int) -> Iterator[str]:
  """Those from `start` to `stop`."""
  for piece in pieces:
    if stop <= 0:
      break
    if start < len(piece):
      yield piece[max(start, 0):stop]
    start, stop = start - len(piece), stop - len(piece)


def _of_file(path: epath.Path, kind: str, newline: str | None) -> Iterator[str]:
  """The documents of a file, or the pieces of a stream; none of them is empty."""
  try:
    yield from _decoded(path, kind, newline)
  except (EOFError, OSError, zlib.error) as e:
    raise UserError(f"{path} cannot be read ({e}): it is damaged, truncated or locked") from e


def _decoded(path: epath.Path, kind: str, newline: str | None) -> Iterator[str]:
  """As `_of_file`, but of a file that can be read."""
  try:
    with _unpacked(path) as (raw, encoding):
      with io.TextIOWrapper(raw, encoding, newline=newline) as file:
        for document in filter(None, _documents(file, kind)):
          if "\0" in document:
            raise _no_text(path)
          yield document
  except UnicodeDecodeError as e:
    raise _no_text(path) from e


def _documents(file: TextIO, kind: str) -> Iterator[str]:
  """The documents of an open file, or the pieces of a stream."""
  if kind == "stream":
    yield from _pieces(file)
  elif kind == "file":
    yield file.read()
  elif kind == "line":
    yield from (line.rstrip("\r\n") for line in file if line.strip())
  else:
    yield from ("".join(lines).strip() for blank, lines in itertools.groupby(
        file, lambda line: not line.strip()) if not blank)


def _pieces(file: TextIO) -> Iterator[str]:
  """As file.readlines(_PIECE) has them; but a very long line is cut, where it can after a space."""
  rest = ""
  while piece := rest + file.read(_PIECE) + (line := file.readline(_LONGEST)):
    end = len(piece)
    if len(line) == _LONGEST and not line.endswith(("\n", "\r")):
      end = piece.rfind(" ", end - _LONGEST) + 1 or end
    yield piece[:end]
    rest = piece[end:]


@contextlib.contextmanager
def _unpacked(path: epath.Path) -> Iterator[tuple[BinaryIO, str]]:
  """The bytes of a file behind the mark of its encoding, and that."""
  unpack, _ = _PACKED.get(path.suffix, (lambda raw: raw, None))
  with path.open("rb") as raw, unpack(raw) as file:
    head = file.read(4)
    mark, encoding = next(x for x in _MARKS if head.startswith(x[0]))
    file.seek(len(mark))
    yield file, encoding


def _no_text(path: epath.Path) -> UserError:
  """Says where a file is no text, and what mends it."""
  with _unpacked(path) as (file, encoding):
    begin = file.tell()
    head = file.read(_BLOCK)
    file.seek(begin)
    nul, where = _fault(file, encoding)
  drop, no_nul = f"iconv -c -f {encoding} -t UTF-8", "tr -d '\\000'"
  convert = lambda known: _command(path, f"iconv -f {known} -t UTF-8")
  if begin:  # nobody but a text has such a mark
    return UserError(f"{path} is not {encoding} throughout ({where}): drop what is not with "
                     f"{_command(path, drop, *[no_nul] * nul)}")
  if b"\0" in head and (wide := _wide(head)):
    return UserError(f"{path} is not UTF-8 but, it seems, {wide} ({where}): convert it with "
                     f"{convert(wide)}")
  if b"\0" in head and not _decodes(head, encoding):
    return UserError(f"{path} is no text, or in an encoding that it does not name ({where}): move "
                     f"it away, or convert it with {convert('ENCODING')}")
  if nul:
    return UserError(f"{path} has NUL characters ({where}): remove them with "
                     f"{_command(path, no_nul)}")
  return UserError(f"{path} is not UTF-8 ({where}): convert it from what it is in, such as "
                   f"WINDOWS-1252, with {convert('ENCODING')}; or drop what is wrong with "
                   f"{_command(path, drop)}")


def _fault(file: BinaryIO, encoding: str) -> tuple[bool, str]:
  """The first fault of an open file: whether it is a NUL; and which byte it is."""
  decoder, wrong = codecs.getincrementaldecoder(encoding)(), None
  for block in itertools.chain(iter(lambda: file.read(_BLOCK), b""), [b""]):
    begin = file.tell() - len(block) - len(decoder.getstate()[0])  # of what is decoded now
    try:
      text = decoder.decode(block, final=not block)
    except UnicodeDecodeError as e:
      text = e.object[:e.start].decode(encoding)
      wrong = f"{e.object[e.start]:#04x} at byte {begin + e.start:,}"
    before, nul, _ = text.partition("\0")
    if nul:
      return True, f"NUL at byte {begin + len(before.encode(encoding)):,}"
    if wrong:
      return False, wrong
  return False, "it has changed since it was read"


def _wide(head: bytes) -> str | None:
  """The encoding of UTF-16 or UTF-32 without a mark, if that is what it looks like."""
  for encoding in ("UTF-32LE", "UTF-32BE", "UTF-16LE", "UTF-16BE"):
    text = _decodes(head, encoding)
    # Two characters of ASCII, taken as one, are Chinese: of that it is not known.
    if text and "\0" not in text and sum(c < "\u3000" for c in text) > 0.9 * len(text):
      return encoding
  return None


def _decodes(head: bytes, encoding: str) -> str | None:
  """The beginning of a text; None if it is none."""
  try:
    return codecs.getincrementaldecoder(encoding)().decode(head)
  except UnicodeDecodeError:
    return None


def _command(path: epath.Path, *filters: str) -> str:
  """What makes a new file of a file through programs."""
  _, packer = _PACKED.get(path.suffix, (None, None))
  first, *others = [f"{packer} -dc"] * bool(packer) + list(filters)
  return f"{' | '.join([f'{first} < {shlex.quote(str(path))}', *others])} > NEW.txt"
