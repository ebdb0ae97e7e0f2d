"""Recurrent-depth text: the loss of one pass, Huginn's runs of the core, and writing both ways."""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from scipy import special
from test_dit import random_params

from dbjax import sample
from dbjax.models.lm import RecurrentLM
from dbjax.schedule import make_schedule
from dbjax.tasks import recurrent

V, L, E, EOS = 6, 5, 4, 5
NETWORK = RecurrentLM(prelude=1, core=1, coda=1, width=8, num_heads=2, vocab_size=V,
                      embedding_width=E)
TASK = recurrent.RecurrentTask(NETWORK, L, EOS, 0.5, True, "none", False, False, 4, 2)
HUGINN = dataclasses.replace(TASK, end_to_end=True)
SCHEDULE = make_schedule(SimpleNamespace(P_mean=-1.2, P_std=1.2, sigma_min=0.002, sigma_max=80.0,
                                         partition="equal_mass", gamma=0.1), 1)
ROWS = np.random.default_rng(0).normal(size=(V, E))
TABLE = np.float32(ROWS / np.linalg.norm(ROWS, axis=1, keepdims=True))
SHARED = dict(table=jnp.asarray(TABLE))
TOKENS = np.array([[0, 1, 2, 3, 4], [2, EOS, 1, 0, 3]])
SEGMENT = np.array([[0] * 5, [0, 0, 1, 1, 1]])

draw = jax.jit(HUGINN.draw)
loss = jax.jit(HUGINN.loss)
next_token = jax.jit(HUGINN.next_token)


@functools.cache
def params():
  return random_params(NETWORK, np.zeros((1, L), int), np.zeros((1, L, E)), np.zeros((1, L)),
                       np.zeros((1, L), int))


def cross_entropy(logits, tokens):
  log_p = special.log_softmax(np.float64(logits), axis=-1)
  return -np.take_along_axis(log_p, tokens[..., None], -1)[..., 0]


def test_the_loss_of_one_pass():
  rng = np.random.default_rng(1)
  sigma, noise = np.float32([0.3, 2.0]), np.float32(rng.normal(size=(2, L, E)))
  s = sigma[:, None, None].astype(np.float64)
  z = TABLE[TOKENS] + s * noise
  logits = jax.jit(NETWORK.apply)(
      {"params": params()}, TOKENS, np.float32(z / (1 + 4 * s**2)),
      np.log(sigma)[:, None] / 4, SEGMENT)
  drawn = dict(tokens=TOKENS, sigma=sigma, noise=noise)
  silent = dataclasses.replace(TASK, likelihood=False)
  ours = jax.jit(silent.loss)(params(), drawn, SHARED)
  np.testing.assert_allclose(ours, cross_entropy(logits, TOKENS).mean(), rtol=1e-5)


def test_the_loss_of_huginn_is_that_of_so_many_runs():
  """Of a state and its runs, as one pass after another has it."""
  x = dict(tokens=TOKENS, state=np.float32(np.random.default_rng(2).normal(size=(2, L, 8))))
  apply = functools.partial(NETWORK.apply, {"params": params()})
  mask = (SEGMENT[:, :, None] == SEGMENT[:, None])[:, None] & np.tri(L, dtype=bool)

  @jax.jit
  def improve(state):
    context = apply(TOKENS, SEGMENT, mask, method="_context")
    return apply(state, context, mask, method="_improve")

  read = jax.jit(lambda state: apply(state, method=lambda m, s: m._logits(
      m.stack["coda"](s, m._clean(), mask), m._clean())))
  state, found = x["state"], []
  for runs in (1, 2, 3, 4):
    state = improve(state)
    found.append(loss(params(), x | dict(runs=np.full(2, runs))))
    np.testing.assert_allclose(found[-1], cross_entropy(read(state), TOKENS).mean(), rtol=1e-5)
  assert np.abs(np.diff(found)).min() > 1e-4  # a run more is another loss


@pytest.mark.parametrize("iterations", [4, 32])
def test_the_number_of_runs_is_a_poisson_of_a_lognormal(iterations):
  """Huginn, section 3.3: 1 + Poisson(tau), ln tau ~ N(ln r - s^2 / 2, s), s = 1/2."""
  task, num = dataclasses.replace(HUGINN, iterations=iterations), 8000
  tokens = dict(tokens=np.zeros((3, L), np.uint16))
  runs = jax.jit(jax.vmap(lambda key: task.draw(key, tokens, SCHEDULE.training_interval(0))[
      "runs"]))(jax.random.split(jax.random.key(0), num))
  runs = np.asarray(runs)
  assert np.all(runs == runs[:, :1]) and runs.min() >= 1  # all of a batch alike
  variance = iterations + iterations**2 * np.expm1(0.25)
  mean = runs[:, 0].mean()
  assert abs(mean - iterations - 1) < 4 * np.sqrt(variance / num)
  assert runs[:, 0].var() == pytest.approx(variance, rel=0.12)


def test_what_is_drawn_of_huginn():
  x = jax.device_get(draw(jax.random.key(0), dict(tokens=TOKENS.astype(np.uint16)),
                          SCHEDULE.training_interval(0)))
  assert set(x) == {"tokens", "runs", "state"} and x["state"].shape == (2, L, 8)
  np.testing.assert_array_equal(x["tokens"], TOKENS)
  other = draw(jax.random.key(1), dict(tokens=TOKENS), SCHEDULE.training_interval(0))
  assert not np.any(x["state"] == other["state"])


def model(end_to_end, temperature):
  config = ml_collections.ConfigDict(dict(
      seed=0, task=dict(name="recurrent"), sample=dict(
          solver="euler", bridge="soft", top_k=1, grid="equal_mass", num_steps=3,
          temperature=temperature, batch_size=6)))
  task, shared = (HUGINN, {}) if end_to_end else (TASK, SHARED)
  return sample.Model(config, SCHEDULE, (task,), (params(),), (0,), shared)


def test_huginn_reads_a_text_alike_wherever_it_lies_in_a_batch():
  logits = np.asarray(next_token(params(), np.tile(TOKENS, (3, 1))))
  np.testing.assert_allclose(logits[2:4], logits[:2], rtol=0, atol=1e-5)
  np.testing.assert_allclose(next_token(params(), TOKENS[1:]), logits[1:2], rtol=0, atol=1e-5)


@pytest.mark.parametrize("end_to_end", [False, True])
def test_a_text_is_a_function_of_its_number(end_to_end):
  of = model(end_to_end, 3.0)  # hot: this network loves one token
  whole = sample.collect(of.generate(6))[0]
  assert whole.shape == (6, L) and whole.dtype == np.int32
  assert whole.min() >= 0 and whole.max() < V and len(np.unique(whole, axis=0)) > 3
  np.testing.assert_array_equal(sample.collect(of.generate(2, first=3, batch_size=2))[0],
                                whole[3:5])
  assert np.any(whole != sample.collect(of.generate(6, seed=1))[0])
  for row in whole:  # a document that ends makes the rest eos
    end = np.flatnonzero(row == EOS)
    assert not len(end) or np.all(row[end[0]:] == EOS)


def test_what_is_written_follows_from_the_whole_text():
  """Both ways, of the likeliest tokens, position by position; one pass by Euler in numpy."""
  logits = jax.jit(TASK.logits)
  plain, tokens = (recurrent.generate(model(e, 0.0), np.arange(2), 7)[0] for e in (True, False))
  sigmas, over, over_plain = SCHEDULE.equal_mass_grid(3), np.zeros(2, bool), np.zeros(2, bool)
  for i in range(L):
    z = 80 * np.stack([jax.random.normal(jax.random.split(jax.random.fold_in(
        jax.random.fold_in(jax.random.key(7), n), i), 3)[0], (E,)) for n in range(2)])
    before = lambda t, i=i: np.where(np.arange(L) < i, t, 0)
    for sigma, sigma_next in zip(sigmas, sigmas[1:]):
      every = np.tile(z[:, None], (1, L, 1)).astype(np.float32)
      answer = np.float64(logits(params(), SHARED, before(tokens), every,
                                 np.full(2, sigma, np.float32)))[:, i]
      told = z @ TABLE.T / sigma**2  # by z itself, which no temperature changes
      answer = 1e6 * (answer - told) + told
      z = z + (sigma_next - sigma) * (z - special.softmax(answer, -1) @ TABLE) / sigma
    expected = np.where(over, EOS, answer.argmax(-1))
    np.testing.assert_array_equal(tokens[:, i], expected)
    over |= expected == EOS
    expected = np.where(over_plain, EOS, next_token(params(), before(plain))[:, i].argmax(-1))
    np.testing.assert_array_equal(plain[:, i], expected)
    over_plain |= expected == EOS


def test_a_new_network_has_the_parameters_of_its_way():
  of = lambda task: set(jax.eval_shape(task.init, jax.random.key(0)))
  assert of(TASK) - of(HUGINN) == {"level", "noisy_embedding"}
  assert of(dataclasses.replace(TASK, learned=True)) - of(TASK) == {"shared"}
