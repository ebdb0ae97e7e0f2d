"""Recurrent-depth text: the loss of one pass, Huginn's runs of the core, and writing both ways."""

import functools

from conftest import load_config
from conftest import random_params
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
from scipy import special

from dbjax import config as config_lib
from dbjax import targets
from dbjax import task as task_lib
from dbjax.errors import UserError
from dbjax.model import Model
from dbjax.tasks import recurrent

V, L, E, EOS = 6, 5, 4, 5


@functools.cache
def make_task(**overrides):
  """Prelude, core and coda of one layer each, with the noise of EDM."""
  return task_lib.make_task(config_lib.resolve(load_config("kjv_recurrent", **{
      "data.vocab_size": V, "data.length": L, "data.eos": EOS, "task.iterations": 4,
      "task.backprop": 2, "schedule.P_mean": -1.2, "schedule.P_std": 1.2,
      "schedule.sigma_min": 0.002, "schedule.sigma_max": 80.0, "model.num_layers": 3,
      "model.width": 8, "model.num_heads": 2, "model.unroll": 1, "model.embedding_width": E,
      "sample.solver": "euler", "sample.num_steps": 3, "sample.batch_size": 6, **overrides})), 0)


TASK, HUGINN = make_task(), make_task(**{"task.end_to_end": True})
NETWORK = TASK.network
SCHEDULE = TASK.make_schedule(TASK.config)
ROWS = np.random.default_rng(0).normal(size=(V, E))
TABLE = np.float32(ROWS / np.linalg.norm(ROWS, axis=1, keepdims=True))
FROZEN = {targets.TABLE: jnp.asarray(TABLE)}
TOKENS = np.array([[0, 1, 2, 3, 4], [2, EOS, 1, 0, 3]])
SEGMENT = np.array([[0] * 5, [0, 0, 1, 1, 1]])

draw = jax.jit(HUGINN.draw)
loss = jax.jit(HUGINN.loss)
next_token = jax.jit(HUGINN.next_token)


@functools.cache
def params():
  return random_params(NETWORK, *TASK.call(1).inputs)


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
  silent = make_task(**{"task.likelihood": False})
  ours = jax.jit(silent.loss)(params(), drawn, FROZEN)
  np.testing.assert_allclose(ours, cross_entropy(logits, TOKENS).mean(), rtol=1e-5)


def test_the_loss_of_huginn_is_that_of_so_many_runs():
  """Of a state and its runs, as one pass after another has it."""
  x = dict(tokens=TOKENS, state=np.float32(np.random.default_rng(2).normal(size=(2, L, 8))))
  apply = functools.partial(NETWORK.apply, {"params": params()})

  @jax.jit
  def improve(state):
    context = apply(TOKENS, SEGMENT, method="_context")
    return apply(state, context, SEGMENT, method="_improve")

  read = jax.jit(lambda state: apply(state, method=lambda m, s: m._logits(
      m.stack["coda"](s, m._clean(), SEGMENT), m._clean())))
  state, found = x["state"], []
  for runs in (1, 2, 3, 4):
    state = improve(state)
    found.append(loss(params(), x | dict(runs=np.full(2, runs))))
    np.testing.assert_allclose(found[-1], cross_entropy(read(state), TOKENS).mean(), rtol=1e-5)
  assert np.abs(np.diff(found)).min() > 1e-4  # a run more is another loss


@pytest.mark.parametrize("iterations", [4, 32])
def test_the_number_of_runs_is_a_poisson_of_a_lognormal(iterations):
  """Huginn, section 3.3: 1 + Poisson(tau), ln tau ~ N(ln r - s^2 / 2, s), s = 1/2."""
  task, num = make_task(**{"task.end_to_end": True, "task.iterations": iterations}), 8000
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


def write(task, index, seed=0, **options):
  """Texts number `index`: (n, L)."""
  of = Model(config=task.config, schedule=SCHEDULE, tasks=(task,), params=(params(),), steps=(0,),
             frozen={} if task is HUGINN else FROZEN)
  return task.generate(of, np.array(index), seed, of.options(options))[0]


def test_huginn_reads_a_text_alike_wherever_it_lies_in_a_batch():
  logits = np.asarray(next_token(params(), np.tile(TOKENS, (3, 1))))
  np.testing.assert_allclose(logits[2:4], logits[:2], rtol=0, atol=1e-5)
  np.testing.assert_allclose(next_token(params(), TOKENS[1:]), logits[1:2], rtol=0, atol=1e-5)


@pytest.mark.parametrize("task", [TASK, HUGINN], ids=["one_pass", "end_to_end"])
@pytest.mark.nightly
def test_a_text_is_a_function_of_its_number(task):
  hot = dict(temperature=3.0)  # this network loves one token
  whole = write(task, range(6), **hot)
  assert whole.shape == (6, L) and whole.dtype == np.int32
  assert whole.min() >= 0 and whole.max() < V and len(np.unique(whole, axis=0)) > 3
  np.testing.assert_array_equal(write(task, [3, 4], **hot), whole[3:5])
  assert np.any(whole != write(task, range(6), 1, **hot))
  for row in whole:  # a document that ends makes the rest eos
    end = np.flatnonzero(row == EOS)
    assert not len(end) or np.all(row[end[0]:] == EOS)


def test_what_is_written_in_one_pass_follows_from_the_whole_text():
  """Of the likeliest tokens, position by position, by Euler in numpy."""
  logits = jax.jit(TASK.logits)

  def scores(text, position, z, sigma):
    whole = logits(params(), FROZEN, text[None], np.tile(np.float32(z), (1, L, 1)),
                   np.float32([sigma]))
    told = z @ TABLE.T / sigma**2  # by z itself, which no temperature changes
    return told + 1e6 * (np.float64(whole[0, position]) - told)

  def euler(z, scores, sigma, sigma_next, _):
    return z + (sigma_next - sigma) * (z - special.softmax(scores) @ TABLE) / sigma

  expected = [references.write(
      scores, euler, jax.random.fold_in(jax.random.key(7), i), SCHEDULE.equal_mass_grid(3),
      width=E, length=L, eos=EOS) for i in range(2)]
  np.testing.assert_array_equal(write(TASK, [0, 1], 7, temperature=0.0), expected)


def test_what_huginn_writes_follows_from_the_whole_text():
  tokens, over = write(HUGINN, [0, 1], 7, temperature=0.0), np.zeros(2, bool)
  for i in range(L):
    answer = next_token(params(), np.where(np.arange(L) < i, tokens, 0))[:, i].argmax(-1)
    expected = np.where(over, EOS, answer)
    np.testing.assert_array_equal(tokens[:, i], expected)
    over |= expected == EOS


def test_a_new_network_has_the_parameters_of_its_way():
  of = lambda task: set(jax.eval_shape(task.init, jax.random.key(0)))
  assert of(TASK) - of(HUGINN) == {"level", "noisy_embedding"}
  learned = make_task(**{"task.shared_embeddings": True, "train.turn": "together"})
  assert of(learned) - of(TASK) == {targets.TABLE}


def test_nothing_is_split():
  with pytest.raises(UserError, match="num_blocks=2: the task recurrent splits nothing"):
    make_task(**{"num_blocks": 2, "model.num_layers": 4})
  with pytest.raises(UserError, match="model.num_layers=2: .*leave the core no layer: set 3"):
    make_task(**{"model.num_layers": 2})


def test_what_a_token_costs_by_hand():
  """In evaluations of one layer; a gradient is two more."""
  options = {"model.num_layers": 10, "model.prelude": 2, "model.coda": 3, "task.iterations": 7,
             "task.backprop": 4}  # a core of 5
  assert recurrent.compute(make_task(**options)) == dict(
      training=3 * (2 + 2 * (5 + 3)), writing=2 + 4 * (5 + 3))  # 3 steps, and the clean token
  assert recurrent.compute(make_task(**options, **{"task.end_to_end": True})) == dict(
      training=3 * (2 + 3 + 4 * 5) + 4 * 5, writing=2 + 7 * 5 + 3)  # 8 runs in the mean
