"""Autoregressive text: who sees what, what is written, and figures of texts by hand."""

import dataclasses
import functools
from types import SimpleNamespace

from conftest import load_config
from conftest import random_params
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
from scipy import special
from scipy import stats

from dbjax import config as config_lib
from dbjax import data
from dbjax import targets
from dbjax import task as task_lib
from dbjax import writing
from dbjax.bench import finetune
from dbjax.model import Model
from dbjax.quality import texts as quality
from dbjax.tasks import autoregressive

V, L, E, EOS = 6, 6, 4, 5


def make_config(num_blocks=2, **overrides):
  """Blocks of one layer, with the noise of EDM."""
  return config_lib.resolve(load_config("kjv", **{
      "num_blocks": num_blocks, "data.vocab_size": V, "data.length": L, "data.eos": EOS,
      "schedule.P_mean": -1.2, "schedule.P_std": 1.2, "schedule.sigma_min": 0.002,
      "schedule.sigma_max": 80.0, "schedule.gamma": 0.1, "sigma_data": 0.5,
      "model.num_layers": num_blocks, "model.width": 8, "model.num_heads": 2, "model.unroll": 1,
      "model.embedding_width": E, "sample.num_steps": 3, "sample.temperature": 0.5,
      "sample.batch_size": 4, "sample.top_k": 2, **overrides}))


@functools.cache
def make_task(**overrides):
  return task_lib.make_task(make_config(**overrides), 0)


END_TO_END = {"task.end_to_end": True}
TASK, PLAIN = make_task(), make_task(num_blocks=1, **END_TO_END)
LEARNED = make_task(**{"task.shared_embeddings": True, "train.turn": "together"})
SILENT = make_task(**{"task.likelihood": False})
SCHEDULE = TASK.make_schedule(TASK.config)
ROWS = np.random.default_rng(0).normal(size=(V, E))
TABLE = np.float32(ROWS / np.linalg.norm(ROWS, axis=1, keepdims=True))
FROZEN = {targets.TABLE: jnp.asarray(TABLE)}

rng = np.random.default_rng(1)
TOKENS = np.array([[0, 1, 2, 3, 4, 0], [2, 2, EOS, 1, 0, 3]])
Z = np.float32(rng.normal(size=(2, L, E)))
SIGMA = np.float32([0.3, 2.0])

of_task = jax.jit(TASK.logits)
logits = lambda params, *args: of_task(params, FROZEN, *args)
next_token = jax.jit(PLAIN.next_token)


@functools.cache
def params():
  """Of two blocks."""
  return tuple(random_params(TASK.network, *TASK.call(1).inputs, seed=s) for s in range(2))


def test_segments_by_hand():
  given = np.array([[1, EOS, 2, 3, EOS, EOS, 4], [EOS, 1, 1, 1, 1, 1, EOS]])
  np.testing.assert_array_equal(autoregressive.segments(given, EOS),
                                [[0, 0, 1, 1, 1, 2, 3], [0, 1, 1, 1, 1, 1, 1]])
  np.testing.assert_array_equal(autoregressive.segments(given, -1), np.zeros((2, 7)))
  for i in range(7):  # an eos says nothing of itself: only of what comes after it
    for token in (0, EOS):
      changed = given.copy()
      changed[:, i] = token
      np.testing.assert_array_equal(autoregressive.segments(changed, EOS)[:, :i + 1],
                                    autoregressive.segments(given, EOS)[:, :i + 1])


@pytest.mark.parametrize("plain", [False, True], ids=["denoiser", "end_to_end"])
def test_a_token_moves_later_positions_of_its_document_only(plain):
  run = (lambda tokens: next_token(params()[0], tokens)) if plain else (
      lambda tokens: logits(params()[0], tokens, Z, SIGMA))
  before = run(TOKENS)
  for i in range(L):
    for token in (EOS, 4):
      changed = TOKENS.copy()
      changed[:, i] = token
      moved = np.abs(run(changed) - before).max(-1)
      assert not moved[:, :i + 1].any()  # neither its own position nor one before it
      for n in range(2):
        if TOKENS[n, i] == token:
          assert not moved[n].any()
        elif EOS in (token, TOKENS[n, i]):  # a document more or less
          assert i == L - 1 or moved[n, i + 1] > 1e-5
        else:
          document = autoregressive.segments(TOKENS, EOS)[n]
          sees = (document == document[i]) & (np.arange(L) > i)
          assert np.all(moved[n, sees] > 1e-5) and not moved[n, ~sees].any()


def test_z_moves_its_own_position_only():
  before = logits(params()[0], TOKENS, Z, SIGMA)
  for i in range(L):
    z = Z.copy()
    z[:, i] += 1
    moved = np.abs(logits(params()[0], TOKENS, z, SIGMA) - before).max(-1)
    np.testing.assert_array_equal(moved > 0, np.tile(np.arange(L) == i, (2, 1)))


def test_loss_agrees_with_numpy_given_the_logits():
  """Also that the network sees the linear estimate of the noised row of the token itself, and
  c_noise; and Bayes' rule: to its logits is added how likely each token makes z.
  """
  noise = np.float32(rng.normal(size=(2, L, E)))
  drawn = dict(tokens=TOKENS, sigma=SIGMA, noise=noise)
  s = SIGMA[:, None, None].astype(np.float64)
  z = TABLE[TOKENS] + s * noise
  p = {"params": params()[0]}
  of_network = jax.jit(TASK.network.apply)(
      p, TOKENS, np.float32(z / (1 + 4 * s**2)), np.log(SIGMA)[:, None] / 4,
      np.array([[0] * 6, [0, 0, 0, 1, 1, 1]]))
  np.testing.assert_allclose(
      jax.jit(SILENT.logits)(params()[0], FROZEN, TOKENS, np.float32(z), SIGMA), of_network,
      rtol=0, atol=1e-5)
  density = stats.norm.logpdf(z[:, :, None], TABLE, s[..., None]).sum(-1)
  log_p = special.log_softmax(np.float64(of_network) + density, axis=-1)
  np.testing.assert_allclose(
      special.log_softmax(np.float64(logits(params()[0], TOKENS, np.float32(z), SIGMA)), axis=-1),
      log_p, rtol=0, atol=1e-4)
  ce = -np.take_along_axis(log_p, TOKENS[..., None], -1)[..., 0]
  w = (SIGMA[:, None] ** 2 + 0.25) / (0.5 * SIGMA[:, None]) ** 2
  tasks = [make_task(**{"task.weight": way}) for way in ("none", "edm", "edm_batch_mean")]
  ours = jax.jit(lambda p, d: [task.loss(p, d, FROZEN) for task in tasks])(params()[0], drawn)
  np.testing.assert_allclose(ours, [ce.mean(), (w * ce).mean(), w.mean() * ce.mean()], rtol=1e-5)
  both = params()[0] | {targets.TABLE: 3 * TABLE}  # whose rows are brought to norm 1
  np.testing.assert_allclose(jax.jit(LEARNED.loss)(both, drawn), ours[0], rtol=1e-5)


@pytest.mark.parametrize("learned", [False, True])
def test_denoise_is_the_mean_embedding_under_the_softmax(learned):
  mean = targets.bridge(logits(params()[0], TOKENS, Z, SIGMA), TABLE, "soft", 0)
  d = jax.jit(LEARNED.denoise)(params()[0] | {targets.TABLE: 3 * TABLE}, {}, Z, SIGMA, TOKENS) if (
      learned) else jax.jit(TASK.denoise)(params()[0], FROZEN, Z, SIGMA, TOKENS)
  assert d.shape == (2, L, E) and np.std(d) > 0.05
  np.testing.assert_allclose(d, mean, rtol=0, atol=1e-5)


def test_what_is_drawn():
  num = 3000
  tokens = rng.integers(0, V, (num, L)).astype(np.uint16)
  x = jax.device_get(jax.jit(TASK.draw)(jax.random.key(0), dict(tokens=tokens),
                                        SCHEDULE.training_interval(1)))
  np.testing.assert_array_equal(x["tokens"], tokens)
  lo, hi = SCHEDULE.training_range(1)
  assert x["sigma"].shape == (num,) and lo <= x["sigma"].min() and x["sigma"].max() <= hi * 1.001
  assert x["noise"].shape == (num, L, E)
  np.testing.assert_allclose(np.cov(x["noise"].reshape(num, -1).T), np.eye(L * E), atol=0.12)


def test_at_huge_sigma_z_says_nothing():
  sigma = np.full(2, 1e5, np.float32)
  noise = np.float32(1e5 * rng.normal(size=(2, L, E)))
  change = [np.abs(logits(params()[0], TOKENS, TABLE[TOKENS] + n, s)
                   - logits(params()[0], TOKENS, TABLE[TOKENS[::-1]] + n, s)).max()
            for n, s in ((noise, sigma), (noise * 3e-6, np.full(2, 0.3, np.float32)))]
  assert change[0] < 1e-3 and change[1] > 0.1


def model(task=TASK, **overrides):
  """A model of blocks like `task`, under a config with other fields of config.sample."""
  config = config_lib.changed(task.config, **overrides)
  task, num_blocks = dataclasses.replace(task, config=config), config.num_blocks
  return Model(config=config, schedule=task.make_schedule(config), tasks=(task,) * num_blocks,
               params=params()[:num_blocks], steps=(0,) * num_blocks,
               frozen={} if config.task.end_to_end else FROZEN)


def write(of, index, seed=0, **options):
  """Texts number `index`: (n, L)."""
  tokens, labels = of.tasks[0].generate(of, np.array(index), seed, of.options(options))
  assert labels is None and tokens.dtype == np.int32 and tokens.shape == (len(index), L)
  return tokens


def euler(bridge, z, scores, sigma, sigma_next, _):
  d = TABLE[scores.argmax()] if bridge == "hard" else special.softmax(scores) @ TABLE
  return z + (sigma_next - sigma) * (z - d) / sigma


def ancestral(_, z, scores, sigma, sigma_next, key):
  """DDPM's: y is drawn, and z at the next level given y and z here."""
  of_token, of_noise = jax.random.split(key)
  y = TABLE[np.argmax(scores + jax.random.gumbel(of_token, (V,)))]
  variance = max(0, sigma_next**2 - sigma_next**4 / sigma**2)
  return (y + (sigma_next / sigma) ** 2 * (z - y)
          + np.sqrt(variance) * np.asarray(jax.random.normal(of_noise, (E,))))


@pytest.mark.parametrize("solver, bridge", [(euler, "soft"), (euler, "hard"), (ancestral, "soft")])
def test_what_is_written_follows_from_the_whole_text_without_a_cache(solver, bridge):
  """Position by position, in numpy, with `logits` of all that is written so far."""
  of = model(**{"sample.solver": solver.__name__, "sample.bridge": bridge})
  boundary = of.schedule.boundaries[1]

  def scores(text, position, z, sigma):
    whole = logits(params()[int(sigma < boundary)], text[None],
                   np.tile(np.float32(z), (1, L, 1)), np.float32([sigma]))
    told = z @ TABLE.T / sigma**2  # by z itself, which no temperature changes
    return told + (np.float64(whole[0, position]) - told) / 0.5

  index, key = [1, 6], jax.random.key(7)
  expected = [references.write(
      scores, functools.partial(solver, bridge), jax.random.fold_in(key, i),
      of.schedule.equal_mass_grid(3), width=E, length=L, eos=EOS) for i in index]
  np.testing.assert_array_equal(write(of, index, 7), expected)
  assert len(np.unique(expected)) > 1


def test_the_plain_network_s_text_follows_from_the_whole():
  tokens = write(model(PLAIN), [0, 1], temperature=0.0)
  np.testing.assert_array_equal(tokens[0], tokens[1])  # no noise, no temperature: no chance
  over = False
  for position in range(L):
    answer = next_token(params()[0], np.where(np.arange(L) < position, tokens, 0))[0, position]
    expected = EOS if over else int(np.argmax(answer))
    assert tokens[0, position] == expected
    over |= expected == EOS


@pytest.mark.parametrize("task, options", [
    (TASK, {}), (TASK, dict(solver="euler")), (PLAIN, {})],
    ids=["ancestral", "euler", "end_to_end"])
def test_a_text_is_a_function_of_its_number(task, options):
  of, options = model(task), options | dict(temperature=1.0)
  whole = write(of, range(10), **options)
  np.testing.assert_array_equal(write(of, range(6, 10), **options), whole[6:])
  assert np.any(whole != write(of, range(10), 1, **options))
  assert len(np.unique(whole, axis=0)) > 5
  for row in whole:  # a document that ends makes the rest eos
    end = np.flatnonzero(row == EOS)
    assert not len(end) or np.all(row[end[0]:] == EOS)
  assert np.any(whole == EOS)


def test_temperature_is_that_of_a_softmax():
  scores = np.tile(np.float32([1.0, 0.0, -1.0, 0.5, 2.0, -3.0]), (20_000, 1))
  keys = jax.random.split(jax.random.key(0), 20_000)
  over = np.arange(20_000) < 5
  for temperature in (1.0, 0.5, 2.0):
    token, ended = jax.jit(writing.choose, static_argnums=3)(
        keys, scores / np.float32(temperature), over, EOS)
    shares = np.bincount(token[5:], minlength=V) / (20_000 - 5)
    np.testing.assert_allclose(shares, special.softmax(scores[0] / temperature), atol=0.015)
    assert np.all(token[:5] == EOS)
    np.testing.assert_array_equal(ended, token == EOS)


def test_figures_of_texts_by_hand():
  texts = np.array([[1, 1, 2, 3], [1, 1, 2, 4]])
  f = quality.figures(texts, -1)
  assert f["distinct_1"] == 4 / 8  # 1, 2, 3, 4
  assert f["distinct_2"] == 4 / 6  # 11, 12, 23, 24
  assert f["distinct_4"] == 2 / 2
  assert f["entropy"] == pytest.approx(0.5 * 1 + 0.25 * 2 + 2 * 0.125 * 3)
  assert f["repeats"] == 2 / 6 and "perplexity" not in f
  dull = quality.figures(np.full((3, 5), 7), -1)
  assert dull["entropy"] == 0 and dull["repeats"] == 1 and dull["distinct_2"] == 1 / 12


def nats_of(texts):
  """What each token costs the plain network: (N, L)."""
  log_p = special.log_softmax(np.float64(next_token(params()[0], texts)), axis=-1)
  return -np.take_along_axis(log_p, texts[..., None], -1)[..., 0]


def test_perplexity_is_that_of_the_grader():
  texts = rng.integers(0, V, (6, L))  # a batch of 4, and one of 2
  f = quality.figures(texts, -1, model(PLAIN))
  assert f["perplexity"] == pytest.approx(np.exp(nats_of(texts).mean()), rel=1e-5)


def test_the_room_after_a_document_is_not_counted():
  f = quality.figures(np.array([[1, 2, EOS, EOS, EOS], [3, 3, 3, 3, EOS]]), EOS)
  assert f["tokens"] == 8 and f["distinct_1"] == 4 / 8 and f["repeats"] == 3 / 6
  assert f["distinct_2"] == 4 / 6  # 1 2, 2 EOS, 3 3, 3 EOS
  assert f["distinct_4"] == 2 / 2
  texts = np.array([[1, 2, EOS, EOS, EOS, EOS]])
  f = quality.figures(texts, EOS, model(PLAIN))
  assert f["perplexity"] == pytest.approx(np.exp(nats_of(texts)[0, :3].mean()), rel=1e-5)


def test_evaluate_has_each_block_at_its_levels():
  of = model()
  texts = np.random.default_rng(5).integers(0, V, (6, L))
  held_out = data.Arrays(tokens=texts.astype(np.uint16))
  result = of.tasks[0].evaluate(of, data.Dataset(train=held_out, held_out=held_out),
                                dict(num_samples=4, judge=""))
  rows = result["cross_entropy"]
  assert [r["block"] for r in rows] == [0, 0, 0, 1, 1, 1]
  middle = of.schedule.boundaries[1]
  np.testing.assert_allclose([r["sigma"] for r in rows], [
      80, (80 * middle) ** 0.5, middle, middle, (0.002 * middle) ** 0.5, 0.002])
  for row in rows:
    noise = np.concatenate([jax.random.normal(of.key(row["block"], i), (n, L, E))
                            for i, n in ((0, 4), (1, 2))])  # of batches of 4
    z, sigma = TABLE[texts] + row["sigma"] * noise, np.full(6, row["sigma"], np.float32)
    scores = np.float64(logits(params()[row["block"]], texts, np.float32(z), sigma))
    log_p = special.log_softmax(scores, axis=-1)
    nats = -np.take_along_axis(log_p, texts[..., None], -1).mean()
    last_bit = float(np.spacing(np.float32(scores.max())))  # 0.016 at sigma 0.002
    assert row["nats"] == pytest.approx(nats, rel=1e-4, abs=last_bit)
  assert [w["text"] for w in result["written"]] == ["samples", "held out"]
  samples, held_out = result["written"]
  assert held_out["tokens"] - samples["tokens"] in range(-L, L)  # as much of either
  rows = -(-samples["tokens"] // L)
  assert held_out == dict(text="held out", **quality.figures(texts[:rows], EOS))


class Oracle(autoregressive.AutoregressiveTask):
  """A perfect denoiser of tokens that are drawn one by one from `believed`."""

  believed = ()  # of a subclass

  def logits(self, params, frozen, tokens, z, sigma):
    distance = jnp.sum((z[..., None, :] - TABLE) ** 2, -1)
    return jnp.log(jnp.asarray(self.believed)) - distance / (2 * sigma[:, None, None] ** 2)

  def query(self, params, frozen, z, sigma, cache, position, temperature):
    return self.logits(params, frozen, None, z[:, None], sigma[None])[:, 0]

  def empty_cache(self, params, num):
    return ()

  def append(self, params, tokens, cache, position):
    return cache


def oracle(believed, num_blocks, **overrides):
  """A model of perfect blocks."""
  task = make_task(num_blocks=num_blocks, **overrides)
  cls = type("Oracle", (Oracle,), dict(believed=tuple(believed)))
  return dataclasses.replace(model(cls(config=task.config, network=task.network)),
                             params=({},) * num_blocks)


@pytest.mark.parametrize("solver, num_steps", [
    ("ancestral", 2), ("ancestral", 5), ("euler", 2),
    pytest.param("euler", 100, marks=pytest.mark.slow)])
def test_perfect_blocks_write_what_they_believe(solver, num_steps):
  """By ancestral sampling in two steps, by Euler in many: in two it is elsewhere."""
  believed = np.array([0.6, 0.2, 0.1, 0.05, 0.03, 0.02])
  of = oracle(believed, 2, **{"data.eos": -1, "sample.temperature": 1.0})
  texts = write(of, range(4000), solver=solver, num_steps=num_steps)
  found = np.bincount(texts.ravel(), minlength=V)
  chi2 = stats.chisquare(found, believed * texts.size).statistic
  if (solver, num_steps) == ("euler", 2):
    assert chi2 > 1000
  else:
    assert chi2 < stats.chi2.ppf(0.999, V - 1)


@pytest.mark.parametrize("believed", [(0.3, 0.3, 0.2, 0.1, 0.05, 0.05), (0.1,) * 4 + (0.3,) * 2])
def test_the_bound_of_perfect_blocks_is_the_likelihood(believed):
  """Whether what they believe is true or not: a posterior mean knows its prior's likelihood."""
  of = oracle(believed, 3, **{"sample.batch_size": 1500})
  texts = np.random.default_rng(0).choice(V, p=[0.3, 0.3, 0.2, 0.1, 0.05, 0.05], size=(4000, L))
  rows = quality.bound(of, texts)
  assert [r["block"] for r in rows] == [0, 1, 2, "token", "start", "all"]
  assert rows[-1]["nats"] == pytest.approx(sum(r["nats"] for r in rows[:-1]), rel=1e-6)
  assert rows[3]["nats"] < 1e-6 and rows[-1]["error"] < 0.02
  true = -np.log(np.array(believed))[texts].mean()
  assert abs(rows[-1]["nats"] - true) < 3 * rows[-1]["error"]


@pytest.mark.slow
def test_fine_tuning_is_on_what_the_sampler_makes():
  """Of a text that is known by heart: the second block learns to keep to it from any state."""
  apart = model(SILENT, **{
      "train.batch_size": 1, "optimizer.clip_norm": 1.0, "optimizer.weight_decay": 0.0,
      "sample.solver": "euler", "sample.num_steps": 6, "sample.temperature": 1.0})
  text = SimpleNamespace(batch=lambda *_: dict(tokens=TOKENS[:1].astype(np.uint16)))
  tuned = finetune.fine_tune(apart, text, 150, 1e-2)
  jax.tree.map(np.testing.assert_array_equal, tuned.params[0], apart.params[0])
  known = lambda model: (write(model, range(24), 1) == TOKENS[0]).all(1).mean()
  assert known(tuned) > 0.8 > 0.1 > known(apart)
