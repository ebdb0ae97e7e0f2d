"""Texts: tokenizers, the cutting of a corpus, and what is read back of it."""

import bz2
import gzip
import io
import json
import pickle
import random
import shutil

from conftest import as_tfrecord
from conftest import load_config
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
  with pytest.raises(UserError, match="--vocab_size=9999 does not suit this text: .*too high"):
    tokenizers.train(LINES, 9999)


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


def test_lines_are_closed_and_cut_in_order(source, tmp_path, capsys):
  path = made(source, tmp_path, documents="line", held_out=0.1)
  closed = lambda lines: [t for line in lines for t in (*line.encode(), 256)]
  train, test = closed(LINES[:180]), closed(LINES[180:])
  check(path, train, test)
  assert f"train: {len(train) // 32} sequences of 32 tokens; the last {len(train) % 32} tokens " \
      "are left out" in capsys.readouterr().out
  target = tmp_path / "other/mine/1.0.0"
  as_tfrecord(path, target)
  shutil.copy(path / "tokenizer.json", target)
  check(target, train, test)  # the other format


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
    (b"caf\xe9 au lait", {}, r"in.txt is not UTF-8 \(byte 0xe9\): convert it with iconv"),
    (b"", {}, "--source=.*in.txt: there is no text in it"),
    (b" \n\n", dict(documents="line"), "there is no text in it"),
    (b"short " * 9, {}, "in.txt: its split test has 4 tokens, fewer than --length=32"),
    (b"abc " * 99 + b"?", dict(tokenizer="text8"), "the tokenizer text8 has no character '\\?'"),
    (b"a\nb\n", dict(tokenizer="text8", documents="line"),
     "--documents=line: text8 has no token that ends a document, so words would merge"),
    (b"a\nb\n", dict(tokenizer="sentencepiece"), "--vocab_size=8000 does not suit this text"),
    (b"a\nb\n", dict(tokenizer="bytes", model="m"), "--model=m: --tokenizer=bytes has no use for"),
])
def test_a_source_that_is_no_text_is_refused(tmp_path, content, options, message):
  (tmp_path / "in.txt").write_bytes(content)
  with pytest.raises(UserError, match=message):
    made(tmp_path / "in.txt", tmp_path, **options)
  assert not (tmp_path / "tfds/mine/1.0.0").exists()  # nothing half written


def test_a_source_that_is_missing_or_damaged(tmp_path):
  with pytest.raises(UserError, match="--source=nothing: there is no such file or folder, nor a"):
    made("nothing", tmp_path)
  for name, content in [("in.gz", gzip.compress(b"text" * 99)[:-9]), ("in.bz2", b"no bz2")]:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name} cannot be read .*damaged, truncated"):
      made(tmp_path / name, tmp_path)


def test_the_command_says_what_to_set(source, tmp_path, command):
  done = command("prepare", "--what=text", f"--source={source}", "--name=mine", "--length=32",
                 "--tokenizer=text8", "--normalize=text8", f"--data_dir={tmp_path}")
  assert done.returncode == 0, done.stderr
  assert f"--config.data.name=mine --config.data.dir={tmp_path} --config.data.tokenizer=text8 " \
      "--config.data.vocab_size=27 --config.data.eos=-1 --config.data.length=32" in done.stdout
  data.load(text_config(tmp_path / "mine/1.0.0"))
