"""Texts cut into sequences of tokens: what a config says of them, and whether it is so."""

from collections.abc import Iterator, Mapping
import re
from typing import Any

from etils import epath
import numpy as np

from dbjax.data import records
from dbjax.data import tokenizers
from dbjax.data.dataset import some
from dbjax.errors import UserError
from dbjax.fields import above
from dbjax.fields import at_least
from dbjax.fields import Field
from dbjax.fields import JOINT
from dbjax.fields import one_of
from dbjax.fields import Range

_LOOKED_AT = 1000  # sequences

FIELDS = {
    "data.feature": Field("tokens", "what is read", one_of("tokens"), JOINT),
    "data.length": Field(256, "tokens of a sequence", at_least(2), JOINT),
    "data.vocab_size": Field(int, "above all tokens", above(0), JOINT),
    "data.tokenizer": Field(str, "text8, bytes or sentencepiece-CRC",
                            Range(bool, "text8, bytes or sentencepiece-..."), JOINT),
    "data.eos": Field(-1, "the token that closes a document; -1: none does", at_least(-1), JOINT),
}


def check(config: Any, dataset: Any):
  """Raises UserError where a text was prepared otherwise than the config says."""
  d = config.data
  found = records.find(d.name, d.dir)
  _compare(d, tokenizers.read(found) if found is not None else {})
  # Only now, since tokens of another vocabulary cannot be read.
  _compare(d, dict(length=dataset.train.take(np.arange(1))["tokens"].shape[1]))
  for part, examples in (("train", dataset.train), ("held_out", dataset.held_out)):
    if getattr(examples, "vocab_size", None) == d.vocab_size:
      continue  # they see to it as they are read
    tokens = examples.take(some(len(examples), _LOOKED_AT))["tokens"]
    if tokens.min() < 0 or tokens.max() >= d.vocab_size:
      raise UserError(f"data.vocab_size={d.vocab_size}: {d.name} has tokens from {tokens.min()} to "
                      f"{tokens.max()} ({part})")


def _compare(d: Any, made: Mapping[str, Any]):
  for field, value in made.items():
    if d[field] != value:
      raise UserError(f"data.{field}={d[field]}: {d.name} was prepared with {value}: set "
                      f"data.{field}={value}, or prepare it again")


def token_dtype(vocab_size: int) -> np.dtype:
  """What tokens are stored as: uint16 if it holds them, else int32."""
  return np.dtype(np.uint16 if vocab_size <= 2**16 else np.int32)


def tokenizer(config: Any, workdir: epath.PathLike | None = None) -> tokenizers.Tokenizer:
  """The tokenizer of a config: its model from `workdir`, or else from the data set.

  Raises:
    UserError: neither has a model, or it is another one.
  """
  d = config.data
  if d.tokenizer in tokenizers.BUILT_IN:
    return tokenizers.load(d.tokenizer)
  if workdir is not None and (epath.Path(workdir) / tokenizers.MODEL).exists():
    return tokenizers.load(d.tokenizer, workdir)
  return tokenizers.load(d.tokenizer, records.directory(d.name, d.dir))


def pieces(config: Any, workdir: epath.PathLike | None, tokens: np.ndarray) -> np.ndarray:
  """What each of the tokens (...) stands for, alone: (...) str of one line, never empty."""
  known, numbers = tokenizer(config, workdir), np.unique(tokens)
  words = ["¶" if n == config.data.eos else re.sub("[^ -~\u00a1-\uffff]", "□", known.piece(int(n)))
           or "□" for n in numbers]
  return np.array(words)[np.searchsorted(numbers, tokens)]


def runs(tokens: np.ndarray, marked: np.ndarray) -> Iterator[tuple[bool, np.ndarray]]:
  """(whether they are marked, tokens (n,)) of each run of tokens (L,) that are alike in it."""
  ends = [*(np.flatnonzero(marked[1:] != marked[:-1]) + 1), len(tokens)]
  for start, end in zip([0, *ends], ends):
    yield bool(marked[start]), tokens[start:end]


def files(config: Any, workdir: epath.Path | None = None) -> dict[str, bytes]:
  """What must lie beside a model so that its texts can be read: see `Task.files`."""
  model = tokenizer(config, workdir).model
  return {} if model is None else {tokenizers.MODEL: model}
