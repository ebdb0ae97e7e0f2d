"""Masked diffusion against sums over all masks, known distributions and numpy."""

import dataclasses
import itertools

from flax.traverse_util import flatten_dict
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from scipy import special
from scipy import stats
from test_dit import random_params

from dbjax import sample
from dbjax.models.lm import MaskedLM
from dbjax.schedule import Masking
from dbjax.tasks import masked

V, L = 3, 2
NETWORK = MaskedLM(num_layers=1, width=8, num_heads=2, vocab_size=V)
TASK = masked.MaskedTask(NETWORK, L, "linear")
MASKS = np.array(list(itertools.product([False, True], repeat=L)))
TEXTS = np.array(list(itertools.product(range(V), repeat=L)))
KINDS = pytest.mark.parametrize("kind", ["linear", "cosine"])


@pytest.fixture(scope="module")
def params():
  return [random_params(NETWORK, np.zeros((1, L), int), np.zeros(1), np.zeros((1, L), int), seed=s)
          for s in range(2)]


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
  task, text = dataclasses.replace(TASK, alpha=kind), np.array([2, 0])
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
  num, masking = 20_000, Masking("cosine", 2, 0.0)
  task = dataclasses.replace(TASK, alpha="cosine")
  tokens = np.random.default_rng(0).integers(0, V, (num, L)).astype(np.uint16)
  x = jax.device_get(jax.jit(task.draw)(jax.random.key(0), dict(tokens=tokens),
                                        masking.training_interval(1)))
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


def of(tasks, params, num_steps=40):
  """A model of these blocks."""
  options = dict(num_steps=num_steps, temperature=1.0, batch_size=4000)
  config = ml_collections.ConfigDict(dict(seed=0, sample=options, task=dict(name="masked")))
  return sample.Model(config, Masking(tasks[0].alpha, len(tasks), 0.0), tuple(tasks),
                      tuple(params), (0,) * len(tasks))


class Texts:
  """Held-out texts; `evaluate` asks for no more."""

  def __init__(self, tokens):
    self.held_out, self.tokens = self, np.asarray(tokens, np.uint16)

  def __len__(self):
    return len(self.tokens)

  def take(self, index):
    return dict(tokens=self.tokens[index])


@KINDS
def test_evaluate_sums_the_blocks_to_the_bound(kind, params):
  """Two blocks with different weights, each on its own half of alpha."""
  text = np.array([1, 1])
  model = of([dataclasses.replace(TASK, alpha=kind)] * 2, params)
  rows = masked.evaluate(model, Texts(np.tile(text, (8000, 1))), dict(num_samples=8000))
  rows = rows["bits_per_token"]
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


@dataclasses.dataclass(frozen=True)
class Perfect(masked.MaskedTask):
  """The true posterior of each token of a known distribution."""

  joint: tuple = ()
  block: int = 0

  def logits(self, params, tokens, masked, time):
    jax.debug.callback(lambda t: CALLS.append((self.block, float(t[0]))), time)
    joint = jnp.array(self.joint).reshape(V, V)
    first = jnp.where(masked[:, 1:], joint.sum(1), joint.T[tokens[:, 1]])
    second = jnp.where(masked[:, :1], joint.sum(0), joint[tokens[:, 0]])
    return jnp.log(jnp.stack([first, second], axis=1))


def perfect(joint, kind="linear", num_blocks=1, **options):
  fields = {f.name: getattr(TASK, f.name) for f in dataclasses.fields(TASK)} | dict(alpha=kind)
  tasks = [Perfect(**fields, joint=tuple(map(float, np.ravel(joint))), block=b)
           for b in range(num_blocks)]
  return of(tasks, [dict(x=np.zeros(1))] * num_blocks, **options)


@KINDS
@pytest.mark.parametrize("joint", [INDEPENDENT, JOINT], ids=["independent", "joint"])
def test_the_bound_of_a_perfect_model_is_the_entropy(kind, joint):
  """In any order of unmasking: the bound is tight."""
  num = 20_000
  texts = TEXTS[np.random.default_rng(0).choice(len(TEXTS), num, p=joint.ravel())]
  result = masked.evaluate(perfect(joint, kind, 2), Texts(texts), dict(num_samples=num))
  entropy = -(joint * np.log2(joint)).sum() / L
  row = result["bits_per_token"][-1]
  assert row["bits"] == pytest.approx(entropy, abs=4 * row["error"]) and row["error"] < 0.03


@pytest.mark.parametrize("kind, num_steps, num_blocks", [("linear", 200, 2), ("cosine", 200, 3)])
def test_ancestral_sampling_draws_from_the_distribution(kind, num_steps, num_blocks):
  num, model = 4000, perfect(JOINT, kind, num_blocks, num_steps=num_steps)
  CALLS.clear()
  samples = masked.generate(model, np.arange(num), 0)[0]
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
  samples = masked.generate(perfect(JOINT, num_steps=1), np.arange(4000), 3)[0]
  counts = np.bincount(V * samples[:, 0] + samples[:, 1], minlength=V * V)
  alone = np.outer(JOINT.sum(1), JOINT.sum(0))
  assert stats.chisquare(counts, 4000 * alone.ravel()).pvalue > 1e-3


def test_samples_are_functions_of_their_numbers(params):
  model = of([TASK] * 2, params, num_steps=6)
  whole = masked.generate(model, np.arange(50), 0)[0]
  np.testing.assert_array_equal(masked.generate(model, np.array([7, 3]), 0)[0], whole[[7, 3]])
  assert np.any(masked.generate(model, np.arange(50), 1)[0] != whole)
  cold = masked.generate(model, np.arange(50), 0, temperature=0.0, num_steps=1)[0]
  every = np.ones((1, L), bool)
  likeliest = np.argmax(logits(params[0], np.zeros((1, L), int), every, np.ones(1)), -1)
  np.testing.assert_array_equal(cold, np.tile(likeliest, (50, 1)))


def test_gradients_reach_every_parameter(params):
  x = dict(tokens=TEXTS, masked=np.tile([True, False], (len(TEXTS), 1)),
           time=np.linspace(0.1, 0.9, len(TEXTS), dtype=np.float32))
  for path, g in flatten_dict(jax.jit(jax.grad(TASK.loss))(params[0], x), sep="/").items():
    assert np.abs(g).max() > 1e-6, path
