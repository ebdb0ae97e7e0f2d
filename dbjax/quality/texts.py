"""How good a model of next tokens is: what a text costs by it, and what it writes."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dbjax import targets
from dbjax.model import Model

_LEVELS = 3  # noise levels of each block that are reported
_STRATA = 4  # noise levels of each block that the bound is measured at, for each sequence


def cross_entropy(model: Model, tokens: np.ndarray) -> list[dict[str, Any]]:
  """Nats per token (N, L) at the ends of each block's interval, and between; of a plain network
  its only one, under sigma 0.
  """
  parts, rows = _parts(model, tokens), []
  for b, task, params in model.blocks():
    plain = task.config.task.end_to_end
    most, least = model.schedule.boundaries[b:b + 2]
    for sigma in [0.0] if plain else np.geomspace(most, least, _LEVELS):
      nats = np.concatenate([
          plain_cost(task, params, x).mean(1) if plain else
          _cost_at(task, params, model.frozen, model.key(b, i), x, jnp.float32(sigma))
          for i, (_, x) in enumerate(parts)])
      rows.append(dict(block=b, sigma=float(sigma), nats=float(nats.mean(dtype=np.float64))))
  return rows


def _parts(model: Model, tokens: np.ndarray) -> list[tuple[int, np.ndarray]]:
  size = model.config.sample.batch_size
  return [(i, tokens[i:i + size]) for i in range(0, len(tokens), size)]


def bound(model: Model, tokens: np.ndarray) -> list[dict[str, Any]]:
  """What a text costs at most, in nats per token: comparable with a plain network's.

  The variational bound of a diffusion model in continuous time (Kingma et al. 2021, arXiv
  2107.00630), given the past: with noise of variance sigma^2 it is

      integral |D(z, sigma) - y|^2 / sigma^2 d ln sigma  -  ln p(token | z at sigma_min)
      + |y|^2 / (2 sigma_max^2)

  which is what ancestral sampling in ever finer steps would have, not Euler's few. Intervals of
  blocks add up to the whole. It is tight where all D are posterior means of one model: then it is
  that model's likelihood.

  Returns:
    Rows of block ("token" the second term, "start" the third, "all" the sum), sigma_from and
    sigma_to (None: no limit), nats, and error, the standard error over sequences.
  """
  parts, rows, total = _parts(model, tokens), [], np.zeros(len(tokens))

  def add(block, sigma_from, sigma_to, nats):
    rows.append(dict(
        block=block, sigma_from=sigma_from and float(sigma_from), sigma_to=float(sigma_to),
        nats=float(np.mean(nats)), error=float(np.std(nats) / len(nats) ** 0.5)))

  for b, task, params in model.blocks():
    hi, lo = model.schedule.boundaries[b:b + 2]
    nats = np.concatenate([
        _cost_of_interval(task, params, model.frozen, model.key(b, i), x, jnp.float32(hi),
                          jnp.float32(lo))
        for i, x in parts]).astype(np.float64)
    add(b, hi, lo, nats)
    total += nats
  nats = np.concatenate([
      _cost_at(task, params, model.frozen, model.key(b, i), x, jnp.float32(lo)) for i, x in parts])
  add("token", lo, 0, nats)
  start = np.full(len(tokens), 0.5 / float(model.schedule.boundaries[0]) ** 2)
  add("start", None, model.schedule.boundaries[0], start)
  add("all", None, 0, total + nats + start)
  return rows


@functools.partial(jax.jit, static_argnums=0)
def _cost_of_interval(task, params, frozen, key, tokens, hi, lo):
  """The integral over [lo, hi] for each sequence, by a level in each of `_STRATA`: (N,)."""
  span, table = jnp.log(hi / lo), task.table(params, frozen)

  def of_one(carry, stratum):
    level_key, noise_key = jax.random.split(jax.random.fold_in(key, stratum))
    u = (stratum + jax.random.uniform(level_key, tokens.shape[:1])) / _STRATA
    sigma = lo * jnp.exp(u * span)
    noise = jax.random.normal(noise_key, (*tokens.shape, table.shape[1]))
    y = table[tokens]
    logits = task.logits(params, frozen, tokens, y + sigma[:, None, None] * noise, sigma)
    d = targets.bridge(logits, table, "soft", 0)
    return carry, jnp.mean(jnp.sum((d - y) ** 2, -1), -1) / sigma**2

  return span * jnp.mean(jax.lax.scan(of_one, None, jnp.arange(_STRATA))[1], 0)


@functools.partial(jax.jit, static_argnums=0)
def _cost_at(task, params, frozen, key, tokens, sigma):
  """-ln p(token | z at sigma), mean over each sequence: (N,)."""
  table = task.table(params, frozen)
  z = table[tokens] + sigma * jax.random.normal(key, (*tokens.shape, table.shape[1]))
  logits = task.logits(params, frozen, tokens, z, jnp.full(len(tokens), sigma))
  return jnp.mean(targets.token_cross_entropy(logits, tokens), -1)


@functools.partial(jax.jit, static_argnums=0)
def plain_cost(task, params, tokens):
  """-ln p(token) of the plain network: (N, L)."""
  return targets.token_cross_entropy(task.next_token(params, tokens), tokens)


def figures(tokens: np.ndarray, eos: int, grader: Model | None = None) -> dict[str, float]:
  """Figures of texts (n, L) int. An eos after another is room that was left empty: not counted.

  Args:
    tokens: the texts.
    eos: closes a document; -1: none does.
    grader: a `model.Model` trained with task.end_to_end on the same vocabulary, or None.

  Returns:
    tokens, how many are counted; distinct_1, distinct_2, distinct_4: the share of n-grams (of
    shorter texts: of whole ones) that are different, which falls with their number; entropy: of
    single tokens, in bits; repeats: the share of tokens that equal the one before; and from a
    grader perplexity: exp of its cross-entropy per token.
  """
  counted = is_counted(tokens, eos)
  found: dict[str, float] = dict(tokens=int(counted.sum()))
  windows = lambda x, n: np.lib.stride_tricks.sliding_window_view(x, n, axis=1).reshape(-1, n)
  for n in (1, 2, 4):
    size = min(n, tokens.shape[1])
    grams = windows(tokens, size)[windows(counted, size).all(1)]
    found[f"distinct_{n}"] = len(np.unique(grams, axis=0)) / max(len(grams), 1)
  p = np.unique(tokens[counted], return_counts=True)[1] / counted.sum()
  found["entropy"] = float(-(p * np.log2(p)).sum())
  again = (tokens[:, 1:] == tokens[:, :-1])[counted[:, 1:]]
  found["repeats"] = float(again.sum() / max(again.size, 1))
  if grader is not None:
    size = grader.config.sample.batch_size
    nats = np.concatenate([plain_cost(grader.tasks[0], grader.params[0], tokens[i:i + size])
                           for i in range(0, len(tokens), size)])
    found["perplexity"] = float(np.exp(nats[counted].mean(dtype=np.float64)))
  return found


def is_counted(tokens: np.ndarray, eos: int) -> np.ndarray:
  """Which tokens (n, L) are text: not the eos after another."""
  over = np.zeros(tokens.shape, bool)
  over[:, 1:] = (tokens[:, 1:] == eos) & (tokens[:, :-1] == eos)
  return ~over
