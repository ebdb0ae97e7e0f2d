"""Texts: tokenizers, the cutting of a corpus, and what is read back of it."""

import bz2
import gzip
import io
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
import tracemalloc
import uuid

from conftest import as_tfrecord
from conftest import load_config
from conftest import ROOT
from etils import epath
import numpy as np
import pytest

from dbjax import config as config_lib
from dbjax import data
from dbjax import prepare
from dbjax.data import records
from dbjax.data import text as text_lib
from dbjax.data import tokenizers
from dbjax.errors import UserError
from dbjax.sources import png
from dbjax.sources import Source
from dbjax.sources import text as text_source


def corpus(lines, seed=0, words=("in", "the", "beginning", "was", "Wörd", "naïve", "1913", "end.")):
  rng = random.Random(seed)
  return [" ".join(rng.choice(words) for _ in range(rng.randrange(1, 20))) for _ in range(lines)]


LINES = corpus(200)


@pytest.fixture(scope="module")
def model():
  return tokenizers.train(LINES, 320)


@pytest.fixture
def source(tmp_path):
  path = tmp_path / "corpus.txt"
  path.write_text("\n".join(LINES) + "\n")
  return path


def made(source, tmp_path, name="mine", **options):
  """Prepares a data set as main does: its directory."""
  options = {"tokenizer": "bytes", "length": 32, **options}
  return prepare.write(tmp_path / "tfds", name,
                       text_source.source(str(source), str(tmp_path / "tfds"), **options))


def text_config(path, **overrides):
  """A config that fits a data set; `overrides` of its data."""
  shape = json.loads((path / "features.json").read_text())
  shape = shape["featuresDict"]["features"]["tokens"]["tensor"]["shape"]["dimensions"]
  fields = dict(name=path.parent.name, dir=str(path.parents[1]), train="train", held_out="test",
                length=int(shape[0]), **tokenizers.read(path)) | overrides
  return config_lib.resolve(load_config("gcide_masked", **{
      "train.batch_size": 8, "model.num_layers": 3, "model.width": 16, "model.num_heads": 2,
      **{f"data.{name}": value for name, value in fields.items()}}))


def rows(tokens):
  """As a list that can be compared, in one order."""
  return sorted(map(tuple, np.asarray(tokens).tolist()))


def cut(tokens, length):
  """By hand."""
  return [tokens[i:i + length] for i in range(0, len(tokens) - length + 1, length)]


def check(path, train, test, length=32):
  """Every sequence of both splits, against tokens cut by hand."""
  dataset = data.load(text_config(path))
  for split, tokens in [(dataset.train, train), (dataset.held_out, test)]:
    got = split.take(np.arange(len(split)))
    assert list(got) == ["tokens"] and got["tokens"].dtype == np.uint16
    assert rows(got["tokens"]) == rows(cut(list(tokens), length))


def test_text8_form_of_examples():
  for given, expected in [
      ("Anarchism originated in 1789!", " anarchism originated in one seven eight nine"),
      ("a1b", " a one b"), ("  two\t\nlines ", " two lines"), ("don't", " don t"),
      ("Café ÉTÉ \u212a\u0130", " caf t"), ("", ""), ("...", ""), ("007", " zero zero seven")]:
    assert tokenizers.text8_form(given) == expected


def test_the_form_of_lines_is_that_of_the_whole():
  whole = "\n".join(LINES)
  assert "".join(map(tokenizers.text8_form, whole.split("\n"))) == tokenizers.text8_form(whole)
  assert set(tokenizers.text8_form(whole)) <= set(" abcdefghijklmnopqrstuvwxyz")


@pytest.mark.parametrize("name", ["text8", "bytes", "sentencepiece", "characters"])
def test_a_tokenizer_loses_nothing(name, model, tmp_path):
  made = {"sentencepiece": model, "characters": tokenizers.train(LINES, None)}
  tokenizer = made[name] if name in made else tokenizers.load(name)
  for line in [*LINES[:50], "", " a", "a  b ", "two\nlines\n\n", "漢字 \U0001f600 </s>"]:
    line = tokenizers.text8_form(line) if name == "text8" else line
    tokens = tokenizer.encode(line)
    assert tokens.dtype == np.int32 and tokens.ndim == 1
    assert all(0 <= t < tokenizer.vocab_size and t != tokenizer.eos for t in tokens)
    assert tokenizer.decode(tokens) == line
    if tokenizer.eos is not None:
      assert tokenizer.decode([*tokens, tokenizer.eos]) == line
  tokenizer.save(tmp_path)
  again = tokenizers.load(tokenizer.name, tmp_path)
  assert tokenizers.read(epath.Path(tmp_path)) == dict(
      tokenizer=tokenizer.name, vocab_size=tokenizer.vocab_size,
      eos=-1 if tokenizer.eos is None else tokenizer.eos)
  np.testing.assert_array_equal(again.encode("a b"), tokenizer.encode("a b"))


def test_the_numbers_of_text8_and_bytes():
  assert tokenizers.load("text8").encode(" abz").tolist() == [0, 1, 2, 26]
  assert tokenizers.load("bytes").encode("aé").tolist() == [97, 0xC3, 0xA9]
  assert tokenizers.load("bytes").decode([97, 0xC3]) == "a\ufffd"  # as a sample may be cut
  with pytest.raises(UserError, match="text8 has no character 'é', only a to z"):
    tokenizers.load("text8").encode("a café")


def test_a_model_is_trained_to_the_same_bytes(model):
  again = tokenizers.train(iter(LINES), 320)
  assert again.model == model.model and again.name == model.name
  assert model.vocab_size == 320 and model.eos == 1
  assert len(model.encode(LINES[0])) < len(LINES[0]) / 2  # it has learned the words
  lines = [line + "\n" for line in LINES]  # the pieces of a stream are as the whole
  np.testing.assert_array_equal(np.concatenate([model.encode(line) for line in lines]),
                                model.encode("".join(lines)))
  assert tokenizers.train(LINES[:100], 320).name != model.name

def test_a_vocabulary_that_does_not_suit_the_text():
  with pytest.raises(UserError, match="^--vocab_size=9999 is too high .*at most [0-9]+$") as high:
    tokenizers.train(LINES, 9999)
  most = int(str(high.value).split()[-1])
  assert tokenizers.train(LINES, most).vocab_size == most
  with pytest.raises(UserError, match=f"^--vocab_size={most + 1} is too high .* {most}$"):
    tokenizers.train(LINES, most + 1)
  least = len(set("".join(LINES))) + 256 + 2  # as where single characters are all there are
  with pytest.raises(UserError, match=f"^--vocab_size={least - 1} is too low .*at least {least}$"):
    tokenizers.train(LINES, least - 1)
  assert tokenizers.train(LINES, least).vocab_size == least
  for size in (-5, 10**10):  # whatever else the library says, without its own code
    with pytest.raises(UserError, match=f"^--vocab_size={size}: SentencePiece learns no") as other:
      tokenizers.train(LINES, size)
    assert not any(x in str(other.value) for x in (".cc", "[(", "INTERNAL", "INVALID", "\n"))
  for size in (300, None):
    with pytest.raises(UserError, match="no vocabulary can be learned .* lines are empty"):
      tokenizers.train(["\n\n", ""], size)



def test_single_characters_are_all_there_are():
  letters = tokenizers.train(LINES, None)
  assert letters.vocab_size == len(set("".join(LINES))) + 256 + 2  # bytes; unknown, the end
  assert len(letters.encode(LINES[0])) == len(LINES[0])
  assert len(letters.encode("漢")) == 3


def test_what_a_given_model_does_not_know_is_named():
  import sentencepiece  # pylint: disable=g-import-not-at-top

  file = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(LINES), model_writer=file, vocab_size=28, minloglevel=2)
  given = tokenizers.SentencePiece(file.getvalue())
  assert len(given.encode("the beginning"))
  with pytest.raises(UserError, match="has no token for '漢字': remove what it does not know"):
    given.encode("in 漢字 was")


def test_lines_to_learn_from_are_sampled_evenly_and_always_alike():
  sample = tokenizers._sample(range(10_000), 1000)
  assert sample == tokenizers._sample(range(10_000), 1000) and len(set(sample)) == 1000
  assert abs(np.mean(sample) - 5000) < 4 * 10_000 / 12 ** 0.5 / 1000 ** 0.5
  assert tokenizers._sample("abc", 5) == list("abc")


def test_packing_loses_only_the_end():
  rng = np.random.default_rng(0)
  parts = [rng.integers(0, 99, n) for n in [0, 3, 70, 1, 16, 0, 0, 5, 200, 2]]
  *whole, rest = tokenizers.pack(parts, 16)
  np.testing.assert_array_equal(np.concatenate([*whole, rest]), np.concatenate(parts))
  assert all(x.shape == (16,) for x in whole) and len(rest) == 297 % 16
  *whole, rest = tokenizers.pack([np.arange(32)], 16)
  assert len(whole) == 2 and len(rest) == 0


def test_packing_copies_no_more_than_a_sequence():
  huge = np.zeros(10**6, np.int32)
  tracemalloc.start()
  for _ in tokenizers.pack([huge[:5], huge], 1000):
    pass
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert peak < huge.nbytes / 10


def test_lines_are_closed_and_cut_in_order(source, tmp_path):
  path = made(source, tmp_path, documents="line", held_out=0.1)
  closed = lambda lines: [t for line in lines for t in (*line.encode(), 256)]
  train, test = closed(LINES[:180]), closed(LINES[180:])
  check(path, train, test)
  target = tmp_path / "other/mine/1.0.0"
  as_tfrecord(path, target)
  shutil.copy(path / "tokenizer.json", target)
  check(target, train, test)  # the other format


def test_a_share_that_is_no_number_is_refused(source, tmp_path):
  with pytest.raises(UserError, match="^--held_out=nan: expected a finite number, from 0 to 1"):
    made(source, tmp_path, held_out=float("nan"))


def test_a_stream_is_held_out_by_characters(source, tmp_path, monkeypatch):
  monkeypatch.setattr(text_source, "_PIECE", 100)  # the cut falls into the midst of a piece
  whole = source.read_text()
  end = len(whole) - round(0.2 * len(whole))
  check(made(source, tmp_path, held_out=0.2),
        [*whole[:end].encode(), 256], [*whole[end:].encode(), 256])
  letters = lambda s: [" abcdefghijklmnopqrstuvwxyz".index(c) for c in tokenizers.text8_form(s)]
  check(made(source, tmp_path, "chars", held_out=0.2, tokenizer="text8", normalize="text8"),
        letters(whole[:end]), letters(whole[end:]))


def test_documents_of_a_folder(tmp_path):
  folder = tmp_path / "in"
  folder.mkdir()
  paragraphs = ["\n".join(corpus(3, seed)) for seed in range(40)]
  content = ["\n\n".join(paragraphs[i:i + 10]).encode() + b"\n \n" for i in range(0, 40, 10)]
  (folder / "b.txt.gz").write_bytes(gzip.compress(content[1]))
  (folder / "a.txt").write_bytes(b"\xef\xbb\xbf" + content[0])  # with a mark of its encoding
  (folder / "d.dict.dz").write_bytes(gzip.compress(content[3]))
  (folder / "c.bz2").write_bytes(bz2.compress(content[2]))
  closed = lambda documents: [t for d in documents for t in (*d.encode(), 256)]
  check(made(folder, tmp_path, documents="paragraph", held_out=0.25),
        closed(paragraphs[:30]), closed(paragraphs[30:]))
  files = [c.decode() for c in content]
  check(made(folder, tmp_path, "files", documents="file", held_out=0.25),
        closed(files[:3]), closed(files[3:]))


def test_records_of_a_data_set_of_tfds_are_documents(tmp_path, monkeypatch):
  import tensorflow_datasets as tfds

  monkeypatch.setattr(text_source, "_READ_AT_ONCE", 7)
  features = tfds.features.FeaturesDict(dict(text=tfds.features.Text()))
  prepare.write(tmp_path / "tfds", "lm", Source(features, {
      s: (dict(text=line) for line in corpus(50, seed))
      for seed, s in enumerate(["train", "test"])}))
  expected = []
  for split in ("train", "test"):
    of_split = records.Split("lm", split, str(tmp_path / "tfds"))
    lines = [e["text"] for e in of_split.read(np.arange(50))]
    expected.append([t for line in lines for t in (*line, 256)])
  check(made("lm", tmp_path), *expected)
  with pytest.raises(UserError, match="--source=mine: it has tokens, expected text"):
    made("mine", tmp_path, "again")
  prepare.write(tmp_path / "tfds", "latin", Source(features, {
      s: (dict(text=line.encode("latin-1")) for line in LINES[:10]) for s in ("train", "test")}))
  with pytest.raises(UserError, match=r"record 0 of .*latin-train.* or one of the 7 .*utf-8"):
    made("latin", tmp_path, "again")
  with pytest.raises(UserError, match="--documents=line: each record of the data set lm is a docu"):
    made("lm", tmp_path, "lines", documents="line")
  with pytest.raises(UserError, match="^--held_out=0.1: the data set lm has the splits t.*, t.* a"):
    made("lm", tmp_path, "held", held_out=0.1)


def test_a_model_is_trained_on_train_and_lies_beside_the_data(source, tmp_path):
  path = made(source, tmp_path, tokenizer="sentencepiece", vocab_size=320, documents="line",
              held_out=0.1)
  expected = tokenizers.train(LINES[:180], 320)
  assert (path / "tokenizer.model").read_bytes() == expected.model
  closed = lambda lines: [t for line in lines for t in (*expected.encode(line), 1)]
  check(path, closed(LINES[:180]), closed(LINES[180:]))
  config = text_config(path)
  assert text_lib.tokenizer(config).name == config.data.tokenizer == expected.name
  given = made(source, tmp_path, "given", tokenizer="sentencepiece", documents="line",
               model=str(path / "tokenizer.model"))
  assert tokenizers.read(given) == tokenizers.read(path)
  shutil.copy(path / "tokenizer.model", tmp_path)  # a checkpoint that has left its data
  config = config_lib.changed(config, **{"data.dir": "/nowhere"})
  assert text_lib.tokenizer(config, tmp_path).name == expected.name
  with pytest.raises(UserError, match="data.name=mine: not found in /nowhere"):
    text_lib.tokenizer(config)


def test_a_tokenizer_that_belongs_to_no_file(source, tmp_path, model):
  assert text_lib.tokenizer(load_config("text8", **{"data.name": "none"})).name == "text8"
  with pytest.raises(UserError, match="data.tokenizer=words: expected text8, bytes, or sentenc"):
    tokenizers.load("words", tmp_path)
  model.save(tmp_path)
  with pytest.raises(UserError, match=f"sentencepiece-00000000: .* is {model.name}: copy the mod"):
    tokenizers.load("sentencepiece-00000000", tmp_path)
  (tmp_path / "tokenizer.model").write_bytes(b"no model")
  with pytest.raises(UserError, match="tokenizer.model: not a SentencePiece model"):
    tokenizers.load(model.name, tmp_path)
  with pytest.raises(UserError, match="missing.model cannot be read .*No such file"):
    made(source, tmp_path, tokenizer="sentencepiece", model=str(tmp_path / "missing.model"))


def test_batches_are_a_function_of_seed_and_step(source, tmp_path):
  path = made(source, tmp_path)
  dataset, again = (data.load(text_config(path)) for _ in range(2))
  whole = again.batch(3, 5, 8)["tokens"]
  np.testing.assert_array_equal(dataset.batch(3, 5, 8)["tokens"], whole)
  assert (whole != dataset.batch(3, 6, 8)["tokens"]).any()
  for hosts in (2, 4):
    parts = [data.load(text_config(path)).batch(3, 5, 8, r)["tokens"]
             for r in np.split(np.arange(8), hosts)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
  stream = dataset.stream(3, range(5, 40), 8)  # over the seam of an epoch
  for step, batch in zip(range(5, 40), stream, strict=True):
    np.testing.assert_array_equal(batch["tokens"], again.batch(3, step, 8)["tokens"])


def test_what_was_read_stays_in_memory_and_is_not_pickled(source, tmp_path, monkeypatch):
  path = made(source, tmp_path)
  train = data.load(text_config(path)).train
  every = train.take(np.arange(len(train)))["tokens"]
  copy = pickle.loads(pickle.dumps(train))
  assert len(pickle.dumps(train)) < every.nbytes
  assert copy.identity == train.identity
  np.testing.assert_array_equal(copy.take(np.arange(len(train)))["tokens"], every)
  monkeypatch.setattr(train, "_split", None)
  np.testing.assert_array_equal(train.take(np.array([3, 0, 3]))["tokens"], every[[3, 0, 3]])


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
  where = tmp_path_factory.mktemp("prepared")
  (where / "corpus.txt").write_text("\n".join(LINES))
  return made(where / "corpus.txt", where)


@pytest.mark.parametrize("overrides, message", [
    (dict(name="nothing"), "data.name=nothing: not found in .*dbjax.prepare"),
    (dict(tokenizer="text8"), "data.tokenizer=text8: mine was prepared with bytes: set data.toke"),
    (dict(vocab_size=256), "data.vocab_size=256: mine was prepared with 257: set data.vocab_size="),
    (dict(length=64), "data.length=64: mine was prepared with 32: set data.length=32"),
    (dict(held_out="validation"), "mine has no split validation: expected t"),
    (dict(train="train[:7]"), "mine: 7 examples to train on are fewer than train.batch_size=8"),
])
def test_a_config_that_does_not_fit_is_refused(prepared, overrides, message):
  with pytest.raises(UserError, match=message):
    data.load(text_config(prepared, **overrides))


def test_a_data_set_that_is_no_text_or_has_no_tokenizer(prepared, tmp_path):
  import tensorflow_datasets as tfds

  for shape, feature, message in [
      ((8,), "token", "data.feature=tokens: bad has token"),
      ((8, 2), "tokens", r"data.feature=tokens: in bad it has the shape \(8, 2\), not \(length"),
      ((8,), "tokens", "tokenizer.json is missing or damaged: prepare the data set again")]:
    features = tfds.features.FeaturesDict(
        {feature: tfds.features.Tensor(shape=shape, dtype=np.int64)})
    path = prepare.write(tmp_path, "bad", Source(features, {
        s: iter([{feature: np.zeros(shape, np.int64)}] * 8) for s in ("train", "test")}))
    with pytest.raises(UserError, match=message):
      data.load(text_config(prepared, name="bad", dir=str(tmp_path)))
    shutil.rmtree(path)


def test_a_token_out_of_the_vocabulary_is_named(prepared, tmp_path):
  import tensorflow_datasets as tfds

  tokens = np.zeros((20, 32), np.uint16)
  tokens[7, 5] = 257
  features = tfds.features.FeaturesDict(dict(
      tokens=tfds.features.Tensor(shape=(32,), dtype=np.uint16, encoding="bytes")))
  path = prepare.write(tmp_path, "mine", Source(features, {
      s: (dict(tokens=x) for x in tokens) for s in ("train", "test")}))
  shutil.copy(prepared / "tokenizer.json", path)
  dataset = data.load(text_config(path))
  with pytest.raises(UserError, match=r"record \d+ of .*mine-train.* has the token 257: expected 0"
                     " to 256"):
    dataset.batch(0, 0, 20)


def test_a_vocabulary_of_more_than_16_bits():
  assert text_lib.token_dtype(2**16) == np.uint16 and text_lib.token_dtype(2**16 + 1) == np.int32


@pytest.mark.parametrize("content, options, message", [
    (b"caf\xe9 au lait", {}, r"in.txt is not UTF-8 \(0xe9 at byte 3\): convert it from"),
    (b"", {}, "--source=.*in.txt: there is no text in it"),
    (b" \n\n", dict(documents="line"), "there is no text in it"),
    (b"short " * 9, {}, "in.txt: its split test has 4 tokens, fewer than --length=32"),
    (b"abc " * 99 + b"?", dict(tokenizer="text8"), "the tokenizer text8 has no character '\\?'"),
    (b"a\nb\n", dict(tokenizer="text8", documents="line"),
     "--documents=line: text8 has no token that ends a document, so words would merge"),
    (b"a\nb\n", dict(tokenizer="sentencepiece", held_out=0.5),
     "--vocab_size=8000 is too high for this text: it may be at most 259"),
    (b"\n" * 99, dict(tokenizer="characters"), "no vocabulary .* all of its lines are empty"),
    (b"\n \r\n", dict(documents="paragraph"), "there is no text in it"),
    (b"a", {}, "--held_out=0.05: of the 1 characters of .*in.txt 1 are trained on and 0 held out"),
    (b"a\nb\n", dict(documents="line", held_out=1), "of the 2 documents .* 0 are trained on and 2"),
    (b"a\nb\n", dict(documents="line"), "of the 2 documents .* 2 are trained on and 0 held out"),
    (b"short " * 9, dict(held_out=0.95), "its split train has 4 tokens, fewer than --length=32"),
    (b"a\nb\n", dict(tokenizer="bytes", model="m"), "--model=m: --tokenizer=bytes has no use for"),
    (b"a\nb\n", dict(vocab_size=300), "--vocab_size=300: only a SentencePiece model that is train"),
    (b"a\nb\n", dict(tokenizer="characters", vocab_size=300), "--vocab_size=300: only a Sentence"),
])
def test_a_source_that_is_no_text_is_refused(tmp_path, content, options, message):
  (tmp_path / "in.txt").write_bytes(content)
  with pytest.raises(UserError, match=message) as refused:
    made(tmp_path / "in.txt", tmp_path, **options)
  assert "\n" not in str(refused.value)
  assert not (tmp_path / "tfds").exists()  # before anything is written


def test_a_source_that_is_missing_or_damaged(tmp_path):
  with pytest.raises(UserError, match="--source=nothing: there is no such file or folder, nor a"):
    made("nothing", tmp_path)
  for name, content in [("in.gz", gzip.compress(b"text" * 99)[:-9]), ("in.bz2", b"no bz2")]:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name} cannot be read .*damaged, truncated"):
      made(tmp_path / name, tmp_path)


ODD = "naïve 漢字 \U0001f600\r\nold mac\rtwo\n\nlines, the last not closed"


def read(source, documents="stream", held_out=0.5, length=2, **options):
  """All tokens of both splits, but for what is left over."""
  splits = text_source.source(str(source), "/nowhere", documents=documents, held_out=held_out,
                              length=length, **{"tokenizer": "bytes", **options}).splits
  return {s: np.concatenate([x["tokens"] for x in split]).tolist() for s, split in splits.items()}


def halves(text, encode=lambda text: [*text.encode(), 256]):
  """What `read` returns of a stream, by hand."""
  end = len(text) - round(len(text) / 2)
  return {s: np.ravel(cut(encode(part), 2)).tolist()
          for s, part in [("train", text[:end]), ("test", text[end:])]}


@pytest.mark.parametrize("suffix", ["txt", "gz", "bz2"])
@pytest.mark.parametrize("mark, encoding", [
    (b"", "utf-8"), (b"\xef\xbb\xbf", "utf-8"),
    (b"\xff\xfe", "utf-16-le"), (b"\xfe\xff", "utf-16-be"),
    (b"\xff\xfe\0\0", "utf-32-le"), (b"\0\0\xfe\xff", "utf-32-be")])
def test_a_mark_says_the_encoding(tmp_path, suffix, mark, encoding):
  pack = dict(txt=bytes, gz=gzip.compress, bz2=bz2.compress)[suffix]
  path = tmp_path / f"in.{suffix}"
  path.write_bytes(pack(mark + ODD.encode(encoding)))
  assert read(path) == halves(ODD)


def test_bytes_alone_keep_the_ends_of_lines(tmp_path):
  path = tmp_path / "in.txt"
  path.write_bytes(ODD.encode())
  closed = lambda *documents: [t for d in documents for t in (*d.encode(), 256)]
  pairs = lambda tokens: np.ravel(cut(tokens, 2)).tolist()
  lines = ["naïve 漢字 \U0001f600", "old mac", "two", "lines, the last not closed"]
  assert read(path, "line", held_out=0.25) == dict(
      train=pairs(closed(*lines[:3])), test=pairs(closed(lines[3])))
  assert read(path, "paragraph") == dict(
      train=pairs(closed("naïve 漢字 \U0001f600\r\nold mac\rtwo")), test=pairs(closed(lines[3])))
  unix = ODD.replace("\r\n", "\n").replace("\r", "\n")
  coder = tokenizers.train([unix[:len(unix) - round(len(unix) / 2)]], None)
  assert read(path, tokenizer="characters") == halves(unix, lambda x: [*coder.encode(x), 1])


LONG = "It was, as ever, naïve. " * 3000
RUSSIAN = "Ветер, ветер — на всём божьем свете! " * 50
DAMAGED = LONG[:30_000] + "{}" + LONG[30_000:]  # at byte 31,250 of UTF-8


@pytest.mark.skipif(not shutil.which("iconv"), reason="has no iconv")
@pytest.mark.parametrize("suffix", ["txt", "gz"])
@pytest.mark.parametrize("content, message, mended", [
    (LONG.encode("utf-16-le"), r"seems, UTF-16LE \(NUL at byte 1\): convert it", LONG),
    (LONG.encode("utf-16-be"), r"seems, UTF-16BE \(NUL at byte 0\): convert it", LONG),
    (LONG.encode("utf-32-le"), r"seems, UTF-32LE \(NUL at byte 1\): convert it", LONG),
    (RUSSIAN.encode("utf-16-le"), r"seems, UTF-16LE \(NUL at byte 11\): convert it", RUSSIAN),
    (DAMAGED.format("\0").encode(), r"has NUL characters \(NUL at byte 31,250\)", LONG),
    (b"ab\0cd\0", r"has NUL characters \(NUL at byte 2\): remove them", "abcd"),
    (b"\xef\xbb\xbfab\0cd\0", r"not UTF-8 throughout \(NUL at byte 5\): drop", "abcd"),
    (b"\xff\xfe" + DAMAGED.format("\0").encode("utf-16-le"),
     r"not UTF-16LE throughout \(NUL at byte 60,002\): drop", LONG),
    (b"\xfe\xff" + DAMAGED.format("\udc00").encode("utf-16-be", "surrogatepass"),
     r"not UTF-16BE throughout \(0xdc at byte 60,002\): drop", LONG),
    (DAMAGED.format("\udce9").encode(errors="surrogateescape"),
     r"not UTF-8 \(0xe9 at byte 31,250\): .*; or drop what is wrong", LONG),
    (RUSSIAN.encode() + "х".encode()[:1], r"not UTF-8 \(0xd1 at byte 3,300\): ", RUSSIAN),
])
def test_what_the_message_says_mends_it(tmp_path, suffix, content, message, mended):
  path = tmp_path / f"a file.{suffix}"
  path.write_bytes(gzip.compress(content) if suffix == "gz" else content)
  with pytest.raises(UserError, match=message) as refused:
    read(path)
  message = str(refused.value)
  assert "\n" not in message and message.startswith(str(path))
  subprocess.run(message.rpartition(" with ")[2], shell=True, cwd=tmp_path, check=False,
                 stderr=subprocess.DEVNULL)
  assert read(tmp_path / "NEW.txt") == halves(mended)


@pytest.mark.skipif(not shutil.which("iconv"), reason="has no iconv")
def test_another_encoding_can_be_named(tmp_path):
  (tmp_path / "in.txt").write_bytes(LONG.encode("cp1252"))
  with pytest.raises(UserError, match=r"in.txt is not UTF-8 \(0xef at byte 19\)") as refused:
    read(tmp_path / "in.txt")
  name, command = str(refused.value).partition("such as ")[2].split("; ")[0].split(", with ")
  subprocess.run(command.replace("ENCODING", name), shell=True, cwd=tmp_path, check=True)
  assert (tmp_path / "NEW.txt").read_text() == LONG


def test_the_place_of_a_fault_does_not_depend_on_blocks(tmp_path, monkeypatch):
  path = tmp_path / "in.txt"
  for block in range(4, 9):
    monkeypatch.setattr(text_source, "_BLOCK", block)
    for content, byte in [
        ("é漢a".encode() + b"\xff", 6), ("é漢\U0001f600é\0".encode(), 11), (b"abcdef\xe6\xbc", 6),
        (b"\xff\xfe" + "é\U0001f600a\0".encode("utf-16-le"), 10),
        (b"\xff\xfe" + "é\U0001f600a".encode("utf-16-le") + b"b", 10),
        ("é漢a\0".encode() + b"\xff", 6), ("é漢a".encode() + b"\xff\0", 6)]:
      path.write_bytes(content)
      with pytest.raises(UserError, match=rf" at byte {byte}\)"):
        read(path)


def test_a_file_that_is_no_text(tmp_path):
  folder = tmp_path / "in"
  folder.mkdir()
  (folder / "a.txt").write_text("a text")
  for content, where in [(png(np.zeros((9, 9), np.uint8)).read(), "0x89 at byte 0"),
                         (b"\x7fELF\1\1\0\0\xfe\xff", "NUL at byte 6"),
                         ("吾輩は 猫".encode("utf-16-le"), "0x8f at byte 3")]:
    (folder / "b").write_bytes(content)
    with pytest.raises(UserError, match=rf"in/b is no text, or .* \({where}\): move it away"):
      read(folder)


def test_damage_behind_a_fault_is_one_line_too(tmp_path):
  path = tmp_path / "in.gz"
  path.write_bytes(gzip.compress(random.Random(0).randbytes(9999))[:5000])
  with pytest.raises(UserError, match="in.gz cannot be read .*damaged, truncated"):
    read(path)


def test_what_lies_in_a_folder(tmp_path):
  folder = tmp_path / "in"
  for name, content in {
      "b.txt": "second\n", "a/z.txt": "first, ", "a/deep/y.txt": "before all, ", "c.txt": "",
      "d.txt": "third", ".DS_Store": "no", "a/._z.txt": "no", "Thumbs.db": "no",
      "desktop.ini": "no", "__MACOSX/z.txt": "no", ".ipynb_checkpoints/b.txt": "no",
      ".git/config": "no"}.items():
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
  (folder / "a/around").symlink_to(folder)
  (tmp_path / "outside.txt").write_text(" fourth")
  (folder / "e.txt").symlink_to(tmp_path / "outside.txt")
  source = text_source.source(str(folder), "", "bytes", 4, held_out=0.2)
  text = "before all, first, second\nthird fourth"  # 38 characters, of which 8 are held out
  tokens = {s: [t for x in split for t in x["tokens"]] for s, split in source.splits.items()}
  assert {s: bytes(x).decode() for s, x in tokens.items()} == dict(train=text[:28], test=text[30:])
  lines = source.report().splitlines()
  assert "files read: 5" in lines and "passed over: 7 hidden, or the system's own, 1 a link to a " \
      "folder around it, 1 without text" in lines
  (folder / "f.txt").symlink_to(tmp_path / "nowhere")
  with pytest.raises(UserError, match="in/f.txt is a broken link: there is no .*nowhere; mend"):
    read(folder)


def test_a_folder_without_text_and_a_pipe(tmp_path):
  folder = tmp_path / "in"
  folder.mkdir()
  for name in (None, "a.txt", "b.gz"):
    if name:
      (folder / name).write_bytes(b"")
    with pytest.raises(UserError, match="--source=.*in: there is no text in it"):
      read(folder)
  os.mkfifo(tmp_path / "pipe")
  with pytest.raises(UserError, match="--source=.*pipe: .* a pipe can be read only once"):
    read(tmp_path / "pipe")
  (folder / "c").symlink_to(tmp_path / "pipe")  # which would wait for ever
  (folder / "d").write_text("a text")
  assert read(folder) == halves("a text")


def test_pieces_of_ordinary_text_end_where_those_of_readlines_do(monkeypatch):
  rng = random.Random(0)
  for size in range(1, 40):
    text = "".join(rng.choice(["a", "bc ", "\n", "\n\n", "漢字\n"]) for _ in range(500))
    monkeypatch.setattr(text_source, "_PIECE", size)
    for whole in (text, text + "\n", text + "end"):
      file, expected = io.StringIO(whole), []
      while lines := file.readlines(size):
        expected.append("".join(lines))
      assert list(text_source._pieces(io.StringIO(whole))) == expected and len(expected) > 5


def test_a_line_that_is_very_long_is_cut_after_a_space(monkeypatch):
  monkeypatch.setattr(text_source, "_PIECE", 10)
  monkeypatch.setattr(text_source, "_LONGEST", 30)
  spaced = " ".join(LINES[:20])
  for text in (spaced, "x" * 500, f"a line\n{spaced}\nanother\n{'x' * 99} {'y' * 99}\nthe end"):
    pieces = list(text_source._pieces(io.StringIO(text)))
    assert "".join(pieces) == text and max(map(len, pieces)) <= 10 + 2 * 30
    assert text != spaced or all(p.endswith(" ") for p in pieces[:-1])
  for document in (spaced, "x" * 500, "\n".join(LINES[:20]), "short", "", "y" * 31):
    pieces = list(text_source._cut(document))
    assert "".join(pieces) == document and max(map(len, pieces)) <= 30
    assert document != spaced or all(p.endswith(" ") for p in pieces[:-1])
  assert list(text_source._cut("a b\n" + "c " * 14)) == ["a b\n", "c " * 14]
  assert list(text_source._cut("y" * 30)) == ["y" * 30]


def test_cutting_changes_no_token_of_a_document(tmp_path, monkeypatch):
  folder = tmp_path / "in"
  folder.mkdir()
  for name in "ab":
    (folder / name).write_text("\n".join(LINES))
  options = dict(documents="file", length=8)
  sizes = dict(bytes=None, sentencepiece=320)
  texts = lambda: {t: read(folder, tokenizer=t, vocab_size=n, **options) for t, n in sizes.items()}
  expected = texts()
  monkeypatch.setattr(text_source, "_LONGEST", 500)
  encode, encoded = tokenizers.SentencePiece.encode, []
  monkeypatch.setattr(tokenizers.SentencePiece, "encode",
                      lambda self, text: encoded.append(len(text)) or encode(self, text))
  assert texts() == expected
  assert max(encoded) <= 500


_OF_A_LINE = """
import resource, sys
from dbjax.sources import text
def read(path):
  made = text.source(path, "", "bytes", 4096, documents=sys.argv[1], held_out=0.01)
  return sum(1 for split in made.splits.values() for _ in split)
read("small.txt")  # what the libraries take
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(read("big.txt"), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.nightly
@pytest.mark.parametrize("documents, most", [("stream", 1), ("line", 6)])
def test_a_line_of_100_megabytes_takes_little_memory(tmp_path, documents, most):
  lines = "".join(f"{'word ' * 10}\n" * 1000 for _ in range(100))
  (tmp_path / "small.txt").write_text(lines)
  (tmp_path / "big.txt").write_text("word " * (2 * 10**7) + "\n" + lines)
  done = subprocess.run([sys.executable, "-c", _OF_A_LINE, documents], cwd=tmp_path, check=True,
                        capture_output=True, text=True, timeout=300,
                        env={**os.environ, "PYTHONPATH": str(ROOT)})
  sequences, memory = map(int, done.stdout.split())
  assert abs(sequences * 4096 - 105_100_000) < 4096 * 3 and memory < most * 10**8


def test_the_report_says_what_there_is_and_how_it_begins(tmp_path, model):
  path = tmp_path / "in.txt"
  path.write_text("ab\u200b\ncd\n" + "x" * 502 + "\ny\nend.\n")
  source = text_source.source(str(path), "", "bytes", 6, documents="line", held_out=0.4)
  assert [len(list(split)) for split in source.splits.values()] == [85, 1]
  assert source.report().splitlines() == [
      "split  documents  tokens  sequences  tokens left over  characters per token",
      "train          3     512         85                 2                0.9902",
      " test          2       7          1                 1                0.7143",
      "files read: 1", r"train begins with 'ab\u200b<eos>'"]
  path.write_text("tab\t" + "x" * 4000)
  (tmp_path / "x.model").write_bytes(model.model)
  source = text_source.source(str(path), "", "sentencepiece", 310, held_out=0.1,
                              model=str(tmp_path / "x.model"))
  assert [len(list(split)) for split in source.splits.values()] == [11, 1]
  lines = source.report().splitlines()
  assert lines[0].split()[1] == "characters" and lines[1].split()[1:4] == ["3,604", "3,605", "11"]
  assert lines[-1] == r"train begins with 'tab\t" + "x" * 296 + "'..."


def test_a_vocabulary_is_not_learned_where_nothing_is_held_out(source, tmp_path, monkeypatch):
  monkeypatch.setattr(tokenizers, "train", lambda *_: pytest.fail("learns a vocabulary"))
  with pytest.raises(UserError, match="--held_out=0.001: of the 200 documents .* 0 held out"):
    made(source, tmp_path, tokenizer="sentencepiece", documents="line", held_out=0.001)


def test_after_a_failure_on_the_way_nothing_lies_in_the_data_directory(tmp_path, monkeypatch):
  monkeypatch.setattr(text_source, "_PIECE", 100)
  path, where = tmp_path / "in.txt", tmp_path / "tfds"
  options = dict(tokenizer="text8", length=16)
  lines = "words without end " * 100
  path.write_text(lines + "?" + lines)
  monkeypatch.setattr(text_source, "_LONGEST", 50)  # it begins well
  made_by_tfds = []
  monkeypatch.setattr(uuid, "uuid4", lambda: made_by_tfds.append(1) or uuid.UUID(int=7))
  with pytest.raises(UserError, match="its split train: the tokenizer text8 has no character '.'"):
    made(path, tmp_path, **options)
  assert made_by_tfds and not list(where.rglob("*"))  # it was on its way
  path.write_text(lines * 2)
  assert made(path, tmp_path, **options) == where / "mine/1.0.0"
  assert [x.name for x in where.iterdir()] == ["mine"]
  assert [x.name for x in (where / "mine").iterdir()] == ["1.0.0"]


def test_the_command_says_what_to_set(source, tmp_path, command):
  done = command("prepare", "--what=text", f"--source={source}", "--name=mine", "--length=32",
                 "--tokenizer=text8", "--normalize=text8", f"--data_dir={tmp_path}")
  assert done.returncode == 0, done.stderr
  assert f"--config.data.name=mine --config.data.dir={tmp_path} --config.data.tokenizer=text8 " \
      "--config.data.vocab_size=27 --config.data.eos=-1 --config.data.length=32" in done.stdout
  data.load(text_config(tmp_path / "mine/1.0.0"))


@pytest.mark.parametrize("part, token", [("train", 27), ("held_out", 65535)])
def test_tokens_of_ones_own_are_those_of_the_vocabulary(part, token):
  config = config_lib.resolve(load_config("text8", **{"data.length": 16, "train.batch_size": 2}))
  parts = {name: dict(tokens=np.arange(64, dtype=np.uint16).reshape(4, 16) % 27)
           for name in ("train", "held_out")}
  parts[part]["tokens"][2, 3] = token
  with pytest.raises(UserError, match=f"vocab_size=27: .* has tokens from 0 to {token} .{part}."):
    data.load(config, (parts["train"], parts["held_out"]))
