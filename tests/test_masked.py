"""Masked diffusion against sums over all masks, known distributions and numpy."""

import functools
import itertools

from conftest import load_config
from conftest import random_params
from flax.traverse_util import flatten_dict
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special
from scipy import stats

from dbjax import config as config_lib
from dbjax import data
from dbjax import task as task_lib
from dbjax.model import Model
from dbjax.tasks import masked

V, L = 3, 2
MASKS = np.array(list(itertools.product([False, True], repeat=L)))
TEXTS = np.array(list(itertools.product(range(V), repeat=L)))
KINDS = pytest.mark.parametrize("kind", ["linear", "cosine"])


def make_config(kind="linear", num_blocks=2, **overrides):
  """Blocks of one layer, without overlap."""
  return config_lib.resolve(load_config("gcide_masked", **{
      "num_blocks": num_blocks, "schedule.alpha": kind, "schedule.gamma": 0.0,
      "data.vocab_size": V, "data.length": L, "model.num_layers": num_blocks, "model.width": 8,
      "model.num_heads": 2, "model.unroll": 1, "sample.num_steps": 40, "sample.batch_size": 4000,
      **overrides}))


@functools.cache
def make_task(kind="linear"):
  return task_lib.make_task(make_config(kind), 0)


TASK = make_task()


@pytest.fixture(scope="module")
def params():
  return [random_params(TASK.network, *TASK.call(1).inputs, seed=s) for s in range(2)]


def probability(noise, mask):
  """Of a mask, where each token is masked with this one."""
  return np.prod(np.where(mask, noise[..., None], 1 - noise[..., None]), axis=-1)


logits = jax.jit(TASK.logits)  # a function of alpha: in linear time 1 - alpha
ALPHA = {"linear": lambda t: 1 - t, "cosine": lambda t: 1 - np.cos(np.pi / 2 * (1 - t))}
WEIGHT = {"linear": lambda t: 1 / t, "cosine": lambda t: np.pi / 2 * np.tan(np.pi / 2 * (1 - t))}


def brute_force(of_block, text, num_blocks=1, num=64):
  """Nats per token of each block: the sum over all masks, integrated by Gauss and Legendre.

  Over alpha, in which the weight is 1 / (1 - alpha), whatever the schedule.
  """
  nodes, weights = np.polynomial.legendre.leggauss(num)
  shares = np.zeros(num_blocks)
  for b in range(num_blocks):
    alphas = (b + (nodes + 1) / 2) / num_blocks
    for mask in MASKS:
      all_of = [np.tile(a, (num, 1)) for a in (text, mask)]
      p = special.log_softmax(
          np.float64(logits(of_block[b], *all_of, np.float32(1 - alphas))), axis=-1)
      ce = -np.where(mask, p[:, np.arange(L), text], 0).sum(1) / L
      shares[b] += np.sum(
          weights / 2 / num_blocks * probability(1 - alphas, mask) * ce / (1 - alphas))
  return shares


@KINDS
def test_the_mean_loss_is_the_sum_over_all_masks(kind, params):
  """Quadrature over t in place of `draw`; the bound does not depend on the schedule."""
  task, text = make_task(kind), np.array([2, 0])
  nodes, weights = np.polynomial.legendre.leggauss(64)
  times, total = (nodes + 1) / 2, 0
  losses = jax.jit(task.losses)
  for mask in MASKS:
    drawn = dict(tokens=np.tile(text, (64, 1)), masked=np.tile(mask, (64, 1)),
                 time=np.float32(times))
    ours = np.float64(losses(params[0], drawn))
    total += np.sum(weights / 2 * probability(1 - ALPHA[kind](times), mask) * ours)
    if mask[0] and not mask[1]:  # one by itself
      p = special.log_softmax(np.float64(logits(
          params[0], drawn["tokens"], drawn["masked"], np.float32(1 - ALPHA[kind](times)))), -1)
      np.testing.assert_allclose(ours, -WEIGHT[kind](times) * p[:, 0, 2] / L, rtol=1e-4)
  np.testing.assert_allclose(total, brute_force(params, text)[0], rtol=1e-4)


def test_what_is_drawn():
  num, task = 20_000, make_task("cosine")
  tokens = np.random.default_rng(0).integers(0, V, (num, L)).astype(np.uint16)
  x = jax.device_get(jax.jit(task.draw)(jax.random.key(0), dict(tokens=tokens),
                                        task.make_schedule(task.config).training_interval(1)))
  np.testing.assert_array_equal(x["tokens"], tokens)
  noise = 1 - ALPHA["cosine"](np.float64(x["time"]))
  assert 0 <= noise.min() and noise.max() <= 0.5 + 1e-6
  error = np.sqrt((noise * (1 - noise)).sum())
  assert np.abs((x["masked"] - noise[:, None]).sum(0)).max() < 4 * error
  both = x["masked"].all(1) - noise**2  # given the time they are independent
  assert abs(both.sum()) < 4 * np.sqrt((noise**2 * (1 - noise**2)).sum())
  weighted = (x["masked"] - noise[:, None]) * (noise - noise.mean())[:, None]
  assert abs(weighted.mean()) < 4 * weighted.std() / np.sqrt(num)  # and as the time has it


def test_a_masked_token_is_not_seen(params):
  rng, run = np.random.default_rng(1), jax.jit(TASK.logits)
  tokens, time = rng.integers(0, V, (8, L)), np.float32(rng.random(8))
  for mask in MASKS:
    mask_all = np.tile(mask, (8, 1))
    before = run(params[0], tokens, mask_all, time)
    for i in range(L):
      changed = tokens.copy()
      changed[:, i] = (changed[:, i] + 1) % V
      moved = np.abs(run(params[0], changed, mask_all, time) - before).max((1, 2))
      assert np.all(moved == 0 if mask[i] else moved > 1e-4)


def model_of(config, tasks, params=({}, {}, {})):
  """A model of these blocks."""
  return Model(config=config, schedule=tasks[0].make_schedule(config), tasks=tuple(tasks),
               params=tuple(params[:len(tasks)]), steps=(0,) * len(tasks))


def write(model, index, seed=0, **options):
  """Samples number `index`."""
  return model.tasks[0].generate(model, index, seed, model.options(options))[0]


def bound_rows(model, texts):
  """The rows of the bound on held-out texts."""
  texts = data.Arrays(tokens=np.asarray(texts, np.uint16))
  dataset = data.Dataset(train=texts, held_out=texts)
  return model.tasks[0].evaluate(model, dataset, dict(num_samples=len(texts)))["bits_per_token"]


@KINDS
def test_evaluate_sums_the_blocks_to_the_bound(kind, params):
  """Two blocks with different weights, each on its own half of alpha."""
  text = np.array([1, 1])
  config = make_config(kind)
  model = model_of(config, [make_task(kind)] * 2, params)
  rows = bound_rows(model, np.tile(text, (8000, 1)))
  assert [r["block"] for r in rows] == [0, 1, "all"]
  assert [(r["alpha_from"], r["alpha_to"]) for r in rows] == [(0, 0.5), (0.5, 1), (0, 1)]
  expected, crossed = (brute_force(p, text, 2) / np.log(2) for p in (params, params[::-1]))
  for row, bits in zip(rows, [*expected, expected.sum()]):
    assert row["bits"] == pytest.approx(bits, abs=4 * row["error"])
  assert rows[2]["bits"] == pytest.approx(rows[0]["bits"] + rows[1]["bits"], rel=1e-9)
  assert rows[2]["error"] < 0.03 * rows[2]["bits"]
  assert abs(crossed[0] - expected[0]) > 10 * rows[0]["error"]  # the control


# P(second | first), and P(first).
FIRST = np.array([0.5, 0.3, 0.2])
SECOND = np.array([[0.8, 0.1, 0.1], [0.05, 0.05, 0.9], [0.3, 0.6, 0.1]])
JOINT = FIRST[:, None] * SECOND
INDEPENDENT = np.outer(FIRST, [0.1, 0.2, 0.7])
CALLS = []


class Perfect(masked.MaskedTask):
  """The true posterior of each token of a known distribution; writes down when it is asked."""

  law, block = INDEPENDENT, 0  # of a subclass for each

  def logits(self, params, tokens, masked, time):
    jax.debug.callback(lambda t: CALLS.append((self.block, float(t[0]))), time)
    law = jnp.asarray(self.law)
    first = jnp.where(masked[:, 1:], law.sum(1), law.T[tokens[:, 1]])
    second = jnp.where(masked[:, :1], law.sum(0), law[tokens[:, 0]])
    return jnp.log(jnp.stack([first, second], axis=1))


def perfect(law, kind="linear", num_blocks=1, **overrides):
  config = make_config(kind, num_blocks, **overrides)
  return model_of(config, [
      type("Perfect", (Perfect,), dict(law=law, block=b))(config=config, network=TASK.network)
      for b in range(num_blocks)])


@KINDS
@pytest.mark.parametrize("joint", [INDEPENDENT, JOINT], ids=["independent", "joint"])
def test_the_bound_of_a_perfect_model_is_the_entropy(kind, joint):
  """In any order of unmasking: the bound is tight."""
  num = 20_000
  texts = TEXTS[np.random.default_rng(0).choice(len(TEXTS), num, p=joint.ravel())]
  entropy = -(joint * np.log2(joint)).sum() / L
  row = bound_rows(perfect(joint, kind, 2), texts)[-1]
  assert row["bits"] == pytest.approx(entropy, abs=4 * row["error"]) and row["error"] < 0.03


@pytest.mark.parametrize("kind, num_steps, num_blocks", [("linear", 200, 2), ("cosine", 200, 3)])
def test_ancestral_sampling_draws_from_the_distribution(kind, num_steps, num_blocks):
  num, model = 4000, perfect(JOINT, kind, num_blocks, **{"sample.num_steps": num_steps})
  CALLS.clear()
  samples = write(model, np.arange(num))
  jax.effects_barrier()
  assert samples.shape == (num, L) and samples.min() >= 0 and samples.max() < V
  counts = np.bincount(V * samples[:, 0] + samples[:, 1], minlength=V * V)
  assert stats.chisquare(counts, num * JOINT.ravel()).pvalue > 1e-3
  alone = np.outer(JOINT.sum(1), JOINT.sum(0))
  assert stats.chisquare(counts, num * alone.ravel()).pvalue < 1e-9  # the control
  blocks, times = map(np.array, zip(*CALLS))
  np.testing.assert_allclose(times, np.linspace(1, 0, num_steps + 1)[:-1], rtol=0, atol=1e-6)
  alphas = ALPHA[kind](times.astype(np.float64))
  np.testing.assert_array_equal(blocks, np.floor(num_blocks * alphas + 1e-5))


def test_one_step_unmasks_everything_at_once():
  """Then tokens are independent, and none is left masked."""
  samples = write(perfect(JOINT), np.arange(4000), 3, num_steps=1)
  counts = np.bincount(V * samples[:, 0] + samples[:, 1], minlength=V * V)
  alone = np.outer(JOINT.sum(1), JOINT.sum(0))
  assert stats.chisquare(counts, 4000 * alone.ravel()).pvalue > 1e-3


def test_samples_are_functions_of_their_numbers(params):
  model = model_of(TASK.config, [TASK] * 2, params)
  whole = write(model, np.arange(50), num_steps=6)
  np.testing.assert_array_equal(write(model, np.array([7, 3]), num_steps=6), whole[[7, 3]])
  assert np.any(write(model, np.arange(50), 1, num_steps=6) != whole)
  cold = write(model, np.arange(50), temperature=0.0, num_steps=1)
  every = np.ones((1, L), bool)
  likeliest = np.argmax(logits(params[0], np.zeros((1, L), int), every, np.ones(1)), -1)
  np.testing.assert_array_equal(cold, np.tile(likeliest, (50, 1)))


def test_gradients_reach_every_parameter(params):
  x = dict(tokens=TEXTS, masked=np.tile([True, False], (len(TEXTS), 1)),
           time=np.linspace(0.1, 0.9, len(TEXTS), dtype=np.float32))
  for path, g in flatten_dict(jax.jit(jax.grad(TASK.loss))(params[0], x), sep="/").items():
    assert np.abs(g).max() > 1e-6, path
