"""Tables of targets against their definition, a language whose neighbours are known, and numpy."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from scipy import special

from dbjax import targets
from dbjax.errors import UserError


class Corpus:
  """A data set of these tokens."""

  def __init__(self, tokens):
    self.train, self.tokens = self, tokens

  def __len__(self):
    return len(self.tokens)

  def take(self, index):
    return dict(tokens=self.tokens[index])


def make(kind, num, width, corpus=None):
  config = SimpleNamespace(task=SimpleNamespace(embedding=str(kind)),
                           model=SimpleNamespace(embedding_width=width))
  return targets.make_table(config, num, corpus)


def pairs(num_classes, num=1000, length=20):
  """Words 2c and 2c + 1 are used alike: after them come those of c + 1, or sometimes c + 2."""
  rng = np.random.default_rng(0)
  steps = rng.choice([1, 2], (num, length), p=[0.8, 0.2])
  classes = (rng.integers(0, num_classes, (num, 1)) + steps.cumsum(1)) % num_classes
  return Corpus((2 * classes + rng.integers(0, 2, classes.shape)).astype(np.uint16))


def test_random_rows_are_those_of_philox():
  drawn = np.random.Generator(np.random.Philox(0)).standard_normal((7, 5))
  table = make("random", 7, 5)
  assert table.dtype == np.float32 and table.shape == (7, 5)
  np.testing.assert_allclose(table, drawn / np.sqrt((drawn**2).sum(1))[:, None], rtol=1e-6)
  np.testing.assert_array_equal(make("random", 7, 5), table)


@pytest.mark.parametrize("width", [10, 30, 40])
def test_pmi_puts_interchangeable_words_together(width):
  """30 words: the vocabulary is larger than the table's width, and smaller."""
  corpus = pairs(15)
  table = make("pmi", 30, width, corpus)
  assert table.shape == (30, width) and table.dtype == np.float32
  np.testing.assert_allclose(np.linalg.norm(table, axis=1), 1, rtol=1e-6)
  np.testing.assert_array_equal(make("pmi", 30, width, pairs(15)), table)
  cosine = table @ table.T - 2 * np.eye(30)
  np.testing.assert_array_equal(cosine.argmax(1), np.arange(30) ^ 1)
  shuffled = np.random.default_rng(1).permuted(corpus.tokens.ravel()).reshape(-1, 20)
  cosine = (t := make("pmi", 30, width, Corpus(shuffled))) @ t.T - 2 * np.eye(30)
  assert np.mean(cosine.argmax(1) == np.arange(30) ^ 1) < 0.3  # the control: it is the order


def test_pmi_against_its_definition():
  """Pairs counted one by one; a table's scalar products are the root of the matrix's square."""
  tokens = np.random.default_rng(2).integers(0, 5, (12, 7)) ** 2 // 4  # of 0, 1, 2, 4
  counts = np.full((5, 5), 1 / 5)  # 3 is never seen
  for row in tokens:
    for i in range(7):
      for j in range(7):
        counts[row[i], row[j]] += 0 < abs(i - j) <= 4
  p = counts / counts.sum()
  information = np.maximum(np.log(p / np.outer(p.sum(1), p.sum(0))), 0)
  values, vectors = np.linalg.eigh(information @ information)
  gram = vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T
  expected = gram / np.sqrt(np.outer(gram.diagonal(), gram.diagonal()))
  table = make("pmi", 5, 8, Corpus(tokens.astype(np.uint16)))
  np.testing.assert_allclose(table @ table.T, expected, rtol=0, atol=1e-4)


def test_pmi_of_a_vocabulary_too_large_to_count():
  with pytest.raises(UserError, match="task.embedding=pmi: a vocabulary of 20001 tokens is too"):
    make("pmi", 20_001, 8, pairs(3))


def test_a_table_from_a_file(tmp_path):
  path, rows = tmp_path / "table.npy", np.random.default_rng(0).normal(size=(6, 4))
  np.save(path, rows)
  np.testing.assert_allclose(
      make(path, 6, 4), rows / np.linalg.norm(rows, axis=1, keepdims=True), rtol=1e-6)
  for shape in ((4, 6), (6, 5), (7, 4)):
    with pytest.raises(UserError) as error:
      make(path, *shape)
    assert f"table.npy has the shape (6, 4): expected {shape}: a row for each" in str(error.value)
  for wrong in (0, np.nan, np.inf):
    np.save(path, np.where(np.arange(6)[:, None] == 2, wrong, rows))
    with pytest.raises(UserError, match="table.npy: some rows are zero or not finite"):
      make(path, 6, 4)
  np.savez(tmp_path / "two.npz", rows)
  np.save(tmp_path / "words.npy", np.full((6, 4), "word"))
  np.save(tmp_path / "waves.npy", rows * 1j)
  for content in (b"no array", b"", *((tmp_path / name).read_bytes()
                                      for name in ("two.npz", "words.npy", "waves.npy"))):
    path.write_bytes(content)
    with pytest.raises(UserError, match="table.npy is no .npy file"):
      make(path, 6, 4)
  with pytest.raises(UserError, match="expected random, pmi, or a file .npy"):
    make(tmp_path, 6, 4)
  with pytest.raises(UserError, match="nowhere.npy: expected random, pmi, or a file .npy"):
    make(tmp_path / "nowhere.npy", 6, 4)


TABLE = make("random", 6, 4)
LOGITS = np.float32(2 * np.random.default_rng(3).normal(size=(5, 2, 6)))
bridge = jax.jit(targets.bridge, static_argnums=(2, 3))


def test_the_soft_bridge_is_the_posterior_mean():
  """Row i with probability p_i, noised: Bayes' rule gives the logits, and the mean by itself."""
  rng = np.random.default_rng(4)
  prior, sigma = rng.dirichlet(np.ones(6)), 0.7
  z = rng.normal(size=(9, 4))
  likelihood = np.exp(-((z[:, None] - TABLE) ** 2).sum(-1) / (2 * sigma**2))
  mean = (likelihood * prior) @ TABLE / (likelihood @ prior)[:, None]
  logits = z @ TABLE.T / sigma**2 + np.log(prior)  # rows are of one length
  np.testing.assert_allclose(bridge(np.float32(logits), TABLE, "soft", 1), mean, rtol=0, atol=1e-5)


def test_bridges_against_numpy():
  p = special.softmax(LOGITS.astype(np.float64), axis=-1)
  mean = p @ TABLE
  check = lambda kind, k, expected: np.testing.assert_allclose(
      bridge(LOGITS, TABLE, kind, k), expected, rtol=0, atol=1e-6)
  check("soft", 2, mean)
  check("normalized", 2, mean / np.sqrt((mean**2).sum(-1, keepdims=True)))
  check("hard", 2, TABLE[LOGITS.argmax(-1)])
  check("top_k", 1, TABLE[LOGITS.argmax(-1)])
  check("top_k", 6, mean)
  check("top_k", 99, mean)
  for k in (2, 3):
    kept = np.where(p >= np.sort(p, axis=-1)[..., -k:-k + 1 or None].min(-1, keepdims=True), p, 0)
    assert np.all((kept > 0).sum(-1) == k)
    check("top_k", k, kept / kept.sum(-1, keepdims=True) @ TABLE)


def test_cross_entropy_and_its_weights():
  rng = np.random.default_rng(5)
  logits, target = 3 * rng.normal(size=(8, 6)), rng.integers(0, 6, 8)
  sigma = np.exp(rng.normal(size=8))
  loss = -np.log(special.softmax(logits, axis=-1))[np.arange(8), target]
  w = (sigma**2 + 0.6**2) / (0.6 * sigma) ** 2
  released = (loss * w[:, None]).mean()  # (N,) times (N, 1): an (N, N) matrix
  assert abs(released / np.mean(w * loss) - 1) > 0.05
  for weight, expected in (("none", loss.mean()), ("edm", np.mean(w * loss)),
                           ("edm_batch_mean", released)):
    ours = targets.cross_entropy(*map(np.float32, (logits, target, sigma)), weight, 0.6)
    np.testing.assert_allclose(ours, expected, rtol=1e-5)
  np.testing.assert_allclose(targets.token_cross_entropy(np.float32(logits), target), loss,
                             rtol=1e-5)


def test_one_sigma_for_a_sequence():
  rng = np.random.default_rng(6)
  logits, target = rng.normal(size=(4, 3, 6)), rng.integers(0, 6, (4, 3))
  sigma = np.exp(rng.normal(size=(4, 1)))
  loss = -np.log(np.take_along_axis(special.softmax(logits, -1), target[..., None], -1))[..., 0]
  w = (sigma**2 + 0.25) / (0.5 * sigma) ** 2
  ours = targets.cross_entropy(*map(np.float32, (logits, target, sigma)), "edm", 0.5)
  np.testing.assert_allclose(ours, np.mean(w * loss), rtol=1e-5)


def test_unit_rows():
  rows = np.float32(np.random.default_rng(7).normal(size=(3, 4)))
  np.testing.assert_allclose(
      targets.unit(rows), rows / np.sqrt((rows**2).sum(1, keepdims=True)), rtol=1e-6)


@pytest.mark.parametrize("sigma", [0.05, 0.3, 4.0])
def test_linear_estimate_is_the_regression_of_y_on_z(sigma):
  """Each row has a level of its own."""
  rng, width = np.random.default_rng(0), 6
  y = rng.normal(size=(400_000, width))
  y /= np.linalg.norm(y, axis=1, keepdims=True)
  z = y + sigma * rng.normal(size=y.shape)
  slope = (y * z).sum() / (z * z).sum()
  ours = targets.linear_estimate(np.float32(z[:2, None]), np.float32([[sigma], [1e6]]))
  np.testing.assert_allclose(ours[0, 0], slope * z[0], rtol=0.02)
  assert np.abs(ours[1]).max() < 1e-5
