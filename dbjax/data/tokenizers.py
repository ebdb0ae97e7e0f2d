"""Tokenizers: text to numbers, and back.

A tokenizer's name says all of it. A config holds it, and so does a data set beside its
dataset_info.json, in tokenizer.json:

text8              27 symbols: the space is 0, a to z are 1 to 26; nothing ends a document.
bytes              the 256 bytes of UTF-8; 256 ends a document.
sentencepiece-CRC  a SentencePiece model, Llama's too, or one of single characters, in the
                   file tokenizer.model, whose CRC-32 this is, in hexadecimal.
"""

from collections.abc import Iterable, Iterator
import io
import json
import random
import re
import string
from typing import Any
import zlib

from etils import epath
import numpy as np

from dbjax.errors import UserError

BUILT_IN = ("text8", "bytes")
MODEL, _MADE = "tokenizer.model", "tokenizer.json"
_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_SPELLED = str.maketrans({**{str(i): f" {word} " for i, word in enumerate(_DIGITS)},
                          **dict(zip(string.ascii_uppercase, string.ascii_lowercase))})
_SENTENCES = 1_000_000  # that a SentencePiece model is trained on, at most
_SENTENCE = 1000  # characters at most: the trainer ignores what is above 4192 bytes


class Tokenizer:
  """Text to numbers, and back.

  Attributes:
    name: see above.
    vocab_size: above all tokens.
    eos: the token that ends a document; None if there is none.
    model: the content of tokenizer.model; None for a built-in one.
  """

  name: str
  vocab_size: int
  eos: int | None
  model: bytes | None = None

  def encode(self, text: str) -> np.ndarray:
    """(n,) int32. Raises UserError at a character that it does not have."""
    raise NotImplementedError

  def decode(self, tokens: np.ndarray) -> str:
    """Of tokens (n,): what `encode` was given, without the ends of documents."""
    raise NotImplementedError

  def piece(self, token: int) -> str:
    """What one token stands for, with the spaces that it brings."""
    return self.decode(np.array([token]))

  def save(self, directory: epath.PathLike):
    """Writes what `load` and `read` need there."""
    if self.model is not None:
      (epath.Path(directory) / MODEL).write_bytes(self.model)
    made = dict(tokenizer=self.name, vocab_size=self.vocab_size,
                eos=-1 if self.eos is None else self.eos)
    (epath.Path(directory) / _MADE).write_text(json.dumps(made) + "\n")


class _Text8(Tokenizer):
  """Matt Mahoney's 27 symbols."""

  name, vocab_size, eos = "text8", 27, None

  def encode(self, text):
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    letter = (codes >= ord("a")) & (codes <= ord("z"))
    wrong = np.flatnonzero(~letter & (codes != ord(" ")))
    if len(wrong):
      raise UserError(f"the tokenizer text8 has no character {text[wrong[0]]!r}, only a to z and "
                      "the space: --normalize=text8 spells the text so")
    return np.where(letter, codes - 96, 0).astype(np.int32)

  def decode(self, tokens):
    return np.frombuffer(b" abcdefghijklmnopqrstuvwxyz", np.uint8)[tokens].tobytes().decode()


class _Bytes(Tokenizer):
  """UTF-8."""

  name, vocab_size, eos = "bytes", 257, 256

  def encode(self, text):
    return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

  def decode(self, tokens):
    tokens = np.asarray(tokens)
    return tokens[tokens < 256].astype(np.uint8).tobytes().decode("utf-8", "replace")


class SentencePiece(Tokenizer):
  """A SentencePiece model: the content of its file."""

  def __init__(self, model: bytes):
    """Raises UserError: it is none."""
    import sentencepiece  # pylint: disable=g-import-not-at-top

    self.model, self.name = model, f"sentencepiece-{zlib.crc32(model):08x}"
    try:
      self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    except RuntimeError:
      raise UserError("not a SentencePiece model, or a damaged one: copy it again") from None
    self.vocab_size, eos = self._processor.vocab_size(), self._processor.eos_id()
    self.eos = eos if eos >= 0 else None

  def encode(self, text):
    tokens = np.array(self._processor.encode(text), np.int32)
    unknown = np.flatnonzero(tokens == self._processor.unk_id())
    if len(unknown):
      piece = self._processor.encode(text, out_type=str)[unknown[0]]
      raise UserError(f"the tokenizer {self.name} has no token for {piece[:20]!r}: remove what it "
                      "does not know, or take a model with byte_fallback")
    return tokens

  def decode(self, tokens):
    return self._processor.decode(np.asarray(tokens).tolist())

  def piece(self, token):
    return self._processor.id_to_piece(token).replace("▁", " ")  # decode strips them


def load(name: str, directory: epath.PathLike | None = None) -> Tokenizer:
  """The tokenizer of this name; a SentencePiece model lies in `directory`.

  Raises:
    UserError: there is no such tokenizer, or its model is missing, damaged, or another one.
  """
  if name in BUILT_IN:
    return dict(text8=_Text8, bytes=_Bytes)[name]()
  if not re.fullmatch("sentencepiece-[0-9a-f]{8}", name) or directory is None:
    raise UserError(f"data.tokenizer={name}: expected {', '.join(BUILT_IN)}, or "
                    "sentencepiece-CRC with the CRC-32 of a tokenizer.model")
  found = read_model(epath.Path(directory) / MODEL)
  if found.name != name:
    raise UserError(f"data.tokenizer={name}: {directory}/{MODEL} is {found.name}: copy the model "
                    "that belongs to it there")
  return found


def read_model(path: epath.Path) -> SentencePiece:
  """The SentencePiece model in a file. Raises UserError: it cannot be read."""
  try:
    return SentencePiece(path.read_bytes())
  except OSError as e:
    raise UserError(f"{path} cannot be read ({e.strerror}): a SentencePiece model is expected "
                    "there") from e
  except UserError as e:
    raise UserError(f"{path}: {e}") from None


def read(directory: epath.Path) -> dict[str, Any]:
  """What a config says of a data set's tokenizer: tokenizer (its name), vocab_size and eos, -1
  if there is none.

  Raises:
    UserError: the data set has no tokenizer.
  """
  path = directory / _MADE
  try:
    made = json.loads(path.read_text())
    return {name: made[name] for name in ("tokenizer", "vocab_size", "eos")}
  except (OSError, ValueError, KeyError, TypeError) as e:
    raise UserError(f"{path} is missing or damaged: prepare the data set again, with python -m "
                    "dbjax.prepare --what=text") from e


def train(documents: Iterable[str], vocab_size: int | None) -> SentencePiece:
  """Trains a SentencePiece model with a fallback to bytes, that keeps every character.

  The same documents give the same bytes. At most a million lines are learned from.

  Args:
    documents: the text.
    vocab_size: of BPE; None for single characters, all that there are.

  Raises:
    UserError: `vocab_size` is too large for so little text, or too small for its characters.
  """
  import sentencepiece  # pylint: disable=g-import-not-at-top

  sentences = (line[i:i + _SENTENCE] for document in documents
               for line in document.splitlines() for i in range(0, len(line), _SENTENCE))
  file = io.BytesIO()
  kind: dict[str, Any] = (
      dict(model_type="bpe", vocab_size=vocab_size) if vocab_size else
      dict(model_type="char", use_all_vocab=True, character_coverage=1.0))
  try:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_sample(sentences, _SENTENCES)), model_writer=file,
        byte_fallback=True, num_threads=1, **kind,
        normalization_rule_name="identity", remove_extra_whitespaces=False,
        add_dummy_prefix=False, allow_whitespace_only_pieces=True, bos_id=-1, eos_id=1, unk_id=0,
        minloglevel=2)
  except (RuntimeError, ValueError) as e:
    raise _untrained(str(e), vocab_size) from None
  return SentencePiece(file.getvalue())


def _untrained(why: str, vocab_size: int | None) -> UserError:
  """What SentencePiece's trainer says, in the words of a user."""
  if most := re.search(r"too high .* <= (\d+)", why):
    return UserError(f"--vocab_size={vocab_size} is too high for this text: it may be at most "
                     f"{most[1]}")
  if least := re.search(r"smaller than required_chars\. \d+ vs (\d+)", why):
    return UserError(f"--vocab_size={vocab_size} is too low for the characters of this text, and "
                     f"256 bytes for all others: it must be at least {least[1]}")
  if "sentences_.empty()" in why:
    return UserError("no vocabulary can be learned from this text: all of its lines are empty")
  # "INTERNAL: src/a.cc(78) [(size) > (0)] Words." has words only behind its last bracket.
  words = " ".join(why.rpartition("] ")[2].split()).removeprefix("INVALID_ARGUMENT: ")
  kind = f"--vocab_size={vocab_size}" if vocab_size else "--tokenizer=characters"
  return UserError(f"{kind}: SentencePiece learns no vocabulary from this text "
                   f"({words or 'it does not say why'}): try another --vocab_size or a longer text")


def _sample(lines: Iterable[str], most: int) -> list[str]:
  """At most so many, each as likely as any other, the same ones at every call."""
  kept, rng = [], random.Random(0)
  for n, line in enumerate(lines):
    if n < most:
      kept.append(line)
    elif (place := rng.randrange(n + 1)) < most:
      kept[place] = line
  return kept


def text8_form(text: str) -> str:
  """Matt Mahoney's: a to z and single spaces; digits are spelled, all else is a space.

  As in his text8 a space precedes the first word, none follows the last: the forms of two
  lines, one after the other, are that of both. (mattmahoney.net/dc/textdata.html)
  """
  words = re.findall("[a-z]+", text.translate(_SPELLED))
  return "".join(f" {word}" for word in words)


def pack(parts: Iterable[np.ndarray], length: int) -> Iterator[np.ndarray]:
  """Tokens (n,) of any n in turn -> sequences (length,), and then what is left over, shorter."""
  sequence, filled = np.empty(length, np.int32), 0
  for part in parts:
    while len(part):
      taken, part = part[:length - filled], part[length - filled:]
      sequence[filled:filled + len(taken)] = taken
      filled += len(taken)
      if filled == length:
        yield sequence
        sequence, filled = np.empty(length, np.int32), 0
  yield sequence[:filled]
