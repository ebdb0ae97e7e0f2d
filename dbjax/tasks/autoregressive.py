"""Autoregressive text: each next token is generated, given those before it (DiffusionBlocks,
section 4.4).

Noised: the embedding of the next token, z = y + sigma eps, at every position of a sequence at
once. Condition: the clean tokens before it. Loss: the cross-entropy of the token. Answer:
token by token, each denoised by all blocks in turn, with a cache of the clean past for each
block. Metric: a bound on the nats per token, block by block; the cross-entropy per noise level
(at sigma_max z says nothing, so that it is that of a next-token model); and of what is written
its likelihood to a judge, and diversity.

With task.end_to_end the same network predicts the next token, with nothing noised.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dbjax import data
from dbjax import schedule
from dbjax import targets
from dbjax.models.lm import CausalLM
from dbjax.tasks import masked

save = masked.save  # text is text

_COLD = 1e-6  # the temperature of the likeliest token
_HELD_OUT = 512  # sequences, at most, that cross-entropies are measured on
_LEVELS = 3  # noise levels of each block that are reported
_STRATA = 4  # noise levels of each block that the bound is measured at, for each sequence


@dataclasses.dataclass(frozen=True)
class AutoregressiveTask:
  """The task as ONE block sees it; equal for blocks with as many layers."""

  network: CausalLM
  length: int
  eos: int  # closes a document; -1: there is one only
  sigma_data: float
  likelihood: bool
  weight: str
  learned: bool
  end_to_end: bool

  def init(self, key: jax.Array):
    """Parameters of a new block: a pytree of float32."""
    tokens = jnp.zeros((1, self.length), jnp.int32)
    if self.end_to_end:
      return self.network.init(key, tokens, tokens, method="next_token")["params"]
    noisy = jnp.zeros((1, self.length, self.network.embedding_width))
    params = self.network.init(key, tokens, noisy, jnp.zeros((1, 1)), tokens)["params"]
    if self.learned:  # the same for all blocks, whatever their key
      params = {**params, "shared": targets.unit(
          jax.random.normal(jax.random.key(0), self._table_shape))}
    return params

  def abstract_batch(self, num: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes and dtypes of a batch of `num`, as `draw` takes it."""
    return dict(tokens=jax.ShapeDtypeStruct(
        (num, self.length), data.token_dtype(self.network.vocab_size)))

  def abstract_shared(self) -> dict[str, jax.ShapeDtypeStruct]:
    """The frozen table, if it is."""
    if self.learned or self.end_to_end:
      return {}
    return dict(table=jax.ShapeDtypeStruct(self._table_shape, jnp.float32))

  def draw(self, key: jax.Array, batch: dict[str, jax.Array],
           interval: schedule.Interval) -> dict[str, jax.Array]:
    """Everything random in the loss, for the whole batch at once.

    Returns:
      tokens (N, L) int32, sigma (N,), one level for a sequence, and noise (N, L, E).
    """
    sigma_key, noise_key = jax.random.split(key)
    tokens = batch["tokens"].astype(jnp.int32)
    if self.end_to_end:
      return dict(tokens=tokens)
    return dict(tokens=tokens, sigma=schedule.sample_sigma(sigma_key, tokens.shape[:1], interval),
                noise=jax.random.normal(noise_key, (*tokens.shape, self.network.embedding_width)))

  def loss(self, params, drawn: dict[str, jax.Array], shared=None) -> jax.Array:
    """The (weighted) cross-entropy in nats per token, mean over all: float32 scalar."""
    tokens = drawn["tokens"]
    if self.end_to_end:
      return jnp.mean(targets.token_cross_entropy(self.next_token(params, tokens), tokens))
    sigma = drawn["sigma"]
    z = self.table(params, shared)[tokens] + sigma[:, None, None] * drawn["noise"]
    logits = self.logits(params, shared, tokens, z, sigma)
    return targets.cross_entropy(logits, tokens, sigma[:, None], self.weight, self.sigma_data)

  def table(self, params, shared) -> jax.Array:
    """The embedding of the tokens: (V, E), unit rows."""
    return targets.unit(params["shared"]) if self.learned else shared["table"]

  def logits(self, params, shared, tokens: jax.Array, z: jax.Array,
             sigma: jax.Array) -> jax.Array:
    """tokens (N, L), z (N, L, E), sigma (N,) -> (N, L, V): position i is that of token i."""
    logits = self.network.apply(
        {"params": _own(params)}, tokens, targets.linear_estimate(z, sigma[:, None]),
        jnp.log(sigma)[:, None] / 4, segments(tokens, self.eos))
    return logits + self._told(params, shared, z, sigma[:, None])

  def _told(self, params, shared, z: jax.Array, sigma: jax.Array) -> jax.Array | float:
    """What z tells by itself, if that is not left to the network."""
    if not self.likelihood:
      return 0.0
    return targets.log_likelihood(z, self.table(params, shared), sigma)

  def next_token(self, params, tokens: jax.Array) -> jax.Array:
    """The plain network's logits of tokens (N, L): (N, L, V)."""
    return self.network.apply({"params": params}, tokens, segments(tokens, self.eos),
                              method="next_token")

  @property
  def _table_shape(self) -> tuple[int, int]:
    return self.network.vocab_size, self.network.embedding_width

  # One position at a time, given the clean past in a cache.

  def empty_cache(self, params, num: int):
    """Room for the past of `num` sequences."""
    return self.network.apply({"params": _own(params)}, num, self.length, method="empty_cache")

  def append(self, params, tokens: jax.Array, cache, position: jax.Array):
    """The cache with a clean token (N,) more, at `position`."""
    return self.network.apply({"params": _own(params)}, tokens, cache, position, method="append")

  def query(self, params, shared, z: jax.Array, sigma: jax.Array, cache, position: jax.Array,
            temperature: jax.Array) -> jax.Array:
    """Logits (N, V) at `position` from z (N, E) of level sigma ()."""
    c_noise = jnp.full(z.shape[:1], jnp.log(sigma) / 4)
    logits = self.network.apply({"params": _own(params)}, targets.linear_estimate(z, sigma),
                                c_noise, cache, position, method="query")
    return logits / temperature + self._told(params, shared, z, sigma)


def _own(params):
  return {name: p for name, p in params.items() if name != "shared"}


def segments(tokens: jax.Array, eos: int) -> jax.Array:
  """The number of the document in its sequence that each token is of: (N, L) int32.

  It is known from the tokens before alone: it tells nothing of the one to come.
  """
  closed = (tokens == eos).astype(jnp.int32)
  return jnp.cumsum(closed, axis=1) - closed


def make_task(config, block: int) -> AutoregressiveTask:
  """The task of a resolved config for one block."""
  m, d, t = config.model, config.data, config.task
  network = CausalLM(config.layers_per_block[block], m.width, m.num_heads, d.vocab_size,
                     m.embedding_width, m.mlp_ratio, jnp.dtype(m.dtype), m.remat, m.unroll)
  return AutoregressiveTask(network, d.length, d.eos, config.sigma_data, t.likelihood, t.weight,
                            t.shared_embeddings, t.end_to_end)


def shared(config, dataset) -> dict[str, Any]:
  """What blocks share: the frozen table of the tokens."""
  if config.task.shared_embeddings or config.task.end_to_end:
    return {}
  return dict(table=targets.make_table(config, config.data.vocab_size, dataset))


def generate(model: Any, index: np.ndarray, seed: int, **overrides) -> tuple[np.ndarray, None]:
  """Sequences number `index`: (n, L) int32. All blocks are on the device.

  At every step the network's logits are divided by the temperature. A document that ends makes
  the rest of its sequence eos. The solver "euler" moves z towards D, the mean embedding, as the
  paper does; "ancestral" draws a token from the softmax, and z at the next level given z here and
  that token. For perfect blocks tokens have the blocks' own distribution by the second in any
  number of steps, by the first in the limit of many.
  """
  options = model.options(overrides)
  keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(seed)))(index)
  hot = temperature(options)
  if model.tasks[0].end_to_end:
    return np.asarray(_write_plainly(model.tasks[0], model.params[0], keys, hot)), None
  plan = steps_of(model.schedule, options)
  move = tuple(options[name] for name in ("solver", "bridge", "top_k"))
  tokens = _write(model.tasks, plan, move, model.params, model.shared, keys, hot)
  return np.asarray(tokens), None


def steps_of(noise: schedule.Schedule, options: dict[str, Any]) -> tuple[tuple, ...]:
  """(block, sigma, sigma_next) of each denoising step of a token, from sigma_max on."""
  sigmas = noise.grid(options["grid"], options["num_steps"])
  return tuple(zip(map(int, noise.block_of(sigmas[:-1])), sigmas[:-1], sigmas[1:]))


def temperature(options: dict[str, Any]) -> jax.Array:
  """What logits are divided by: never 0."""
  return jnp.float32(max(options["temperature"], _COLD))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _write(tasks, plan, move, params, shared, keys, temperature):
  """Token by token, by `plan`: (block, sigma, sigma_next) of steps; `move` is (solver, bridge,
  top_k). (N, L).
  """
  task, num, (solver, bridge, top_k) = tasks[0], len(keys), move
  table = task.table(params[0], shared)

  def write_one(carry, position):
    caches, over = carry
    start, end, way = jnp.moveaxis(
        jax.vmap(lambda key: jax.random.split(jax.random.fold_in(key, position), 3))(keys), 1, 0)
    z = plan[0][1] * _normal(start, table.shape[1])
    for step, (block, sigma, sigma_next) in enumerate(plan):
      logits = tasks[block].query(params[block], shared, z, jnp.float32(sigma), caches[block],
                                  position, temperature)
      if solver == "ancestral":
        here = jax.vmap(jax.random.fold_in, (0, None))(way, step)
        z = _ancestral(here, z, logits, table, sigma, sigma_next)
      else:
        d = targets.bridge(logits, table, bridge, top_k)
        z = sigma_next / sigma * z + (1 - sigma_next / sigma) * d
    token, over = choose(end, logits, over, task.eos)
    caches = tuple(t.append(p, token, c, position) for t, p, c in zip(tasks, params, caches))
    return (caches, over), token

  caches = tuple(t.empty_cache(p, num) for t, p in zip(tasks, params))
  start = caches, jnp.zeros(num, bool)
  return jax.lax.scan(write_one, start, jnp.arange(task.length))[1].T


def _ancestral(keys, z, logits, table, sigma, sigma_next):
  """y drawn from softmax(logits), and z (N, E) at sigma_next given y and z: DDPM (arXiv
  2006.11239), equation 7, for z = y + sigma eps.
  """
  token_keys, noise_keys = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
  y, kept = table[_draw(token_keys, logits)], (sigma_next / sigma) ** 2
  return y + kept * (z - y) + sigma_next * (1 - kept) ** 0.5 * _normal(noise_keys, z.shape[1])


def _normal(keys, width: int):
  return jax.vmap(lambda key: jax.random.normal(key, (width,)))(keys)


def _draw(keys, logits):
  """Tokens (N,) from softmax(logits)."""
  noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:]))(keys)
  return jnp.argmax(logits + noise, -1)


@functools.partial(jax.jit, static_argnums=0)
def _write_plainly(task, params, keys, temperature):
  """Token by token, by the plain network."""

  def write_one(carry, position):
    token, cache, over = carry
    logits, cache = task.network.apply({"params": params}, token, cache, position,
                                       method="query_next")
    here = jax.vmap(jax.random.fold_in, (0, None))(keys, position)
    token, over = choose(here, logits / temperature, over, task.eos)
    return (token, cache, over), token

  num = len(keys)
  start = (jnp.full(num, task.network.vocab_size), task.empty_cache(params, num),
           jnp.zeros(num, bool))
  return jax.lax.scan(write_one, start, jnp.arange(task.length))[1].T


def choose(keys, logits, over, eos: int):
  """Tokens (N,) drawn from softmax(logits), and which documents are over."""
  token = jnp.where(over, eos, _draw(keys, logits))
  return token, over | (token == eos)


def evaluate(model: Any, dataset: data.Dataset, options: dict[str, Any]) -> dict[str, Any]:
  """Cross-entropies on held-out text, and what is written.

  Args:
    model: all blocks, a `sample.Model`.
    dataset: that it was trained on.
    options: num_samples, sequences to write; judge, a `sample.Model` that predicts the next
      token of the same vocabulary, or None.

  Returns:
    cross_entropy: rows of block, sigma, nats per token; bound, unless the network is plain: see
    `bound`; written: a row of figures of the samples beside that of as much held-out text, if
    its first 512 sequences have as much: see `judge`.
  """
  total = min(len(dataset.held_out), _HELD_OUT)
  tokens = dataset.held_out.take(np.arange(total))["tokens"].astype(np.int32)
  result = dict(cross_entropy=_levels(model, tokens))
  if not model.tasks[0].end_to_end:
    result["bound"] = bound(model, tokens)
  num = options.get("num_samples") or model.config.evaluate.num_samples
  written = np.concatenate([x for x, _ in model.generate(num, seed=model.config.seed)])
  eos, grader = model.tasks[0].eos, options.get("judge")
  as_many = -(-int(_counted(written, eos).sum()) // tokens.shape[1])  # sequences, full ones
  result["written"] = [dict(text="samples", **judge(written, eos, grader)),
                       dict(text="held out", **judge(tokens[:as_many], eos, grader))]
  return result


def _levels(model, tokens: np.ndarray) -> list[dict[str, Any]]:
  """Nats per token at the ends of each block's interval, and between."""
  size, rows = model.config.sample.batch_size, []
  parts = [tokens[i:i + size] for i in range(0, len(tokens), size)]
  weights = [len(part) for part in parts]
  for b, (task, params) in enumerate(zip(model.tasks, model.params)):
    params = jax.device_put(params)
    ends = model.schedule.boundaries[b:b + 2]
    for sigma in [0.0] if task.end_to_end else np.geomspace(*ends, _LEVELS):
      nats = [_nats(task, params, model.shared, model.key(b, i), part, jnp.float32(sigma))
              for i, part in enumerate(parts)]
      rows.append(dict(block=b, sigma=float(sigma), nats=float(np.average(nats, weights=weights))))
  return rows


@functools.partial(jax.jit, static_argnums=0)
def _nats(task, params, shared, key, tokens, sigma):
  if task.end_to_end:
    return jnp.mean(_plain_nats(task, params, tokens))
  return jnp.mean(_unread(task, params, shared, key, tokens, sigma))


def bound(model: Any, tokens: np.ndarray) -> list[dict[str, Any]]:
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
  size, rows, total = model.config.sample.batch_size, [], np.zeros(len(tokens))
  parts = [(i, tokens[i:i + size]) for i in range(0, len(tokens), size)]

  def add(block, sigma_from, sigma_to, nats):
    rows.append(dict(
        block=block, sigma_from=sigma_from and float(sigma_from), sigma_to=float(sigma_to),
        nats=float(np.mean(nats)), error=float(np.std(nats) / len(nats) ** 0.5)))

  for b, (task, params) in enumerate(zip(model.tasks, model.params)):
    params = jax.device_put(params)
    hi, lo = model.schedule.boundaries[b:b + 2]
    nats = np.concatenate([
        _spent(task, params, model.shared, model.key(b, i), x, jnp.float32(hi), jnp.float32(lo))
        for i, x in parts]).astype(np.float64)
    add(b, hi, lo, nats)
    total += nats
  nats = np.concatenate([
      _unread(task, params, model.shared, model.key(b, i), x, jnp.float32(lo)) for i, x in parts])
  add("token", lo, 0, nats)
  start = np.full(len(tokens), 0.5 / float(model.schedule.boundaries[0]) ** 2)
  add("start", None, model.schedule.boundaries[0], start)
  add("all", None, 0, total + nats + start)
  return rows


@functools.partial(jax.jit, static_argnums=0)
def _spent(task, params, shared, key, tokens, hi, lo):
  """The integral over [lo, hi] for each sequence, by a level in each of `_STRATA`: (N,)."""
  span, table = jnp.log(hi / lo), task.table(params, shared)

  def of_one(carry, stratum):
    level_key, noise_key = jax.random.split(jax.random.fold_in(key, stratum))
    u = (stratum + jax.random.uniform(level_key, tokens.shape[:1])) / _STRATA
    sigma = lo * jnp.exp(u * span)
    noise = jax.random.normal(noise_key, (*tokens.shape, task.network.embedding_width))
    y = table[tokens]
    logits = task.logits(params, shared, tokens, y + sigma[:, None, None] * noise, sigma)
    d = targets.bridge(logits, table, "soft", 0)
    return carry, jnp.mean(jnp.sum((d - y) ** 2, -1), -1) / sigma**2

  return span * jnp.mean(jax.lax.scan(of_one, None, jnp.arange(_STRATA))[1], 0)


@functools.partial(jax.jit, static_argnums=0)
def _unread(task, params, shared, key, tokens, sigma):
  """-ln p(token | z at sigma), mean over each sequence: (N,)."""
  noise = jax.random.normal(key, (*tokens.shape, task.network.embedding_width))
  z = task.table(params, shared)[tokens] + sigma * noise
  logits = task.logits(params, shared, tokens, z, jnp.full(len(tokens), sigma))
  return jnp.mean(targets.token_cross_entropy(logits, tokens), -1)


def judge(tokens: np.ndarray, eos: int, grader: Any = None) -> dict[str, float]:
  """Figures of texts (n, L) int. An eos after another is room that was left empty: not counted.

  Args:
    tokens: the texts.
    eos: closes a document; -1: none does.
    grader: a `sample.Model` trained with task.end_to_end on the same vocabulary, or None.

  Returns:
    tokens, how many are counted; distinct_1, distinct_2, distinct_4: the share of n-grams (of
    shorter texts: of whole ones) that are different, which falls with their number; entropy: of
    single tokens, in bits; repeats: the share of tokens that equal the one before; and from a
    grader perplexity: exp of its cross-entropy per token.
  """
  counted = _counted(tokens, eos)
  figures = dict(tokens=int(counted.sum()))
  windows = lambda x, n: np.lib.stride_tricks.sliding_window_view(x, n, axis=1).reshape(-1, n)
  for n in (1, 2, 4):
    size = min(n, tokens.shape[1])
    grams = windows(tokens, size)[windows(counted, size).all(1)]
    figures[f"distinct_{n}"] = len(np.unique(grams, axis=0)) / max(len(grams), 1)
  p = np.unique(tokens[counted], return_counts=True)[1] / counted.sum()
  figures["entropy"] = float(-(p * np.log2(p)).sum())
  again = (tokens[:, 1:] == tokens[:, :-1])[counted[:, 1:]]
  figures["repeats"] = float(again.sum() / max(again.size, 1))
  if grader is not None:
    size = grader.config.sample.batch_size
    nats = np.concatenate([_plain_nats(grader.tasks[0], grader.params[0], tokens[i:i + size])
                           for i in range(0, len(tokens), size)])
    figures["perplexity"] = float(np.exp(nats[counted].mean(dtype=np.float64)))
  return figures


def _counted(tokens: np.ndarray, eos: int) -> np.ndarray:
  over = np.zeros(tokens.shape, bool)
  over[:, 1:] = (tokens[:, 1:] == eos) & (tokens[:, :-1] == eos)
  return ~over


@functools.partial(jax.jit, static_argnums=0)
def _plain_nats(task, params, tokens):
  """-ln p(token) of the plain network: (N, L)."""
  return targets.token_cross_entropy(task.next_token(params, tokens), tokens)
