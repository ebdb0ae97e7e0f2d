"""Masked diffusion of text (MD4, arXiv 2406.04329; DiffusionBlocks, section 4.3).

Noised: tokens, each masked with probability 1 - alpha(t). Condition: none. Loss: the
cross-entropy of the masked tokens times -alpha'(t) / (1 - alpha(t)), whose integral over t
bounds -ln p(text) (MD4, equation 8). Answer: ancestral sampling, which unmasks token by
token. Metric: the bound in bits per token, a sum over the blocks' own intervals of alpha.

Documents that share a sequence see each other: were they kept apart, the masks would tell
where they end, and the bound would not count those bits.
"""

import dataclasses
import functools
from typing import Any

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np

from dbjax import data
from dbjax import schedule
from dbjax import targets
from dbjax.models.lm import MaskedLM


@dataclasses.dataclass(frozen=True)
class MaskedTask:
  """The task as ONE block sees it; equal for blocks with as many layers."""

  network: MaskedLM
  length: int
  alpha: str

  def init(self, key: jax.Array):
    """Parameters of a new block: a pytree of float32."""
    tokens = jnp.zeros((1, self.length), jnp.int32)
    return self.network.init(key, tokens, jnp.zeros(1), tokens)["params"]

  def abstract_batch(self, num: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes and dtypes of a batch of `num`, as `draw` takes it."""
    return dict(tokens=jax.ShapeDtypeStruct(
        (num, self.length), data.token_dtype(self.network.vocab_size)))

  def abstract_shared(self) -> dict[str, Any]:
    """Blocks share nothing but the vocabulary."""
    return {}

  def draw(self, key: jax.Array, batch: dict[str, jax.Array],
           interval: schedule.TimeInterval) -> dict[str, jax.Array]:
    """Everything random in the loss, for the whole batch at once.

    Returns:
      tokens (N, L) int32, masked (N, L) bool, time (N,).
    """
    time_key, mask_key = jax.random.split(key)
    tokens = batch["tokens"].astype(jnp.int32)
    time = schedule.sample_time(time_key, len(tokens), interval)
    noise = 1 - schedule.alpha_of(self.alpha, time)
    masked = jax.random.uniform(mask_key, tokens.shape) < noise[:, None]
    return dict(tokens=tokens, masked=masked, time=time)

  def loss(self, params, drawn: dict[str, jax.Array], shared=None) -> jax.Array:
    """Nats per token and unit of t, mean over all: float32 scalar.

    Over all of t it is the bound itself, in nats per token.
    """
    return jnp.mean(self.losses(params, drawn))

  def losses(self, params, drawn: dict[str, jax.Array]) -> jax.Array:
    """Those of each sequence: (N,)."""
    logits = self.logits(params, drawn["tokens"], drawn["masked"], drawn["time"])
    ce = targets.token_cross_entropy(logits, drawn["tokens"])
    return (schedule.mask_weight(self.alpha, drawn["time"])
            * jnp.mean(jnp.where(drawn["masked"], ce, 0), axis=1))

  def logits(self, params, tokens: jax.Array, masked: jax.Array, time: jax.Array) -> jax.Array:
    """Of every token, from those that are not masked: (N, L, V); tokens, masked (N, L)."""
    seen = jnp.where(masked, self.network.vocab_size, tokens)
    # alpha says how many are masked, whatever the schedule; the embedding wants a span of 3.
    level = 3 * schedule.alpha_of(self.alpha, time)
    return self.network.apply({"params": params}, seen, level, jnp.zeros_like(tokens))


def make_task(config, block: int) -> MaskedTask:
  """The task of a resolved config for one block."""
  m, d = config.model, config.data
  network = MaskedLM(config.layers_per_block[block], m.width, m.num_heads, d.vocab_size,
                     m.mlp_ratio, jnp.dtype(m.dtype), m.remat, m.unroll)
  return MaskedTask(network, d.length, config.schedule.alpha)


def shared(config, dataset) -> dict[str, Any]:
  """What blocks share: nothing."""
  return {}


def generate(model: Any, index: np.ndarray, seed: int, **overrides) -> tuple[np.ndarray, None]:
  """Sequences number `index`: (n, L) int32, by ancestral sampling (MD4, section 3).

  Between two times each masked token is unmasked with probability (alpha' - alpha) / (1 -
  alpha), as the block of alpha has it.
  """
  options, task, route = model.options(overrides), model.tasks[0], model.router()
  times = model.schedule.grid(options["num_steps"])
  alphas = np.asarray(schedule.alpha_of(task.alpha, times), np.float64)
  keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(seed)))(index)
  tokens = jnp.zeros((len(index), task.length), jnp.int32)
  masked = jnp.ones_like(tokens, bool)
  for step, time in enumerate(times[:-1]):
    of_block, params = route(alphas[step])
    last = step == len(times) - 2
    chance = 1.0 if last else (alphas[step + 1] - alphas[step]) / (1 - alphas[step])
    tokens, masked = _unmask(of_block, params, keys, step, tokens, masked, jnp.float32(time),
                             jnp.float32(chance), jnp.float32(options["temperature"]))
  return np.asarray(tokens), None


@functools.partial(jax.jit, static_argnums=0)
def _unmask(task, params, keys, step, tokens, masked, time, chance, temperature):
  logits = task.logits(params, tokens, masked, jnp.full(len(tokens), time))

  def of_one(key, logits, tokens, masked):
    token_key, mask_key = jax.random.split(jax.random.fold_in(key, step))
    drawn = jnp.argmax(logits + temperature * jax.random.gumbel(token_key, logits.shape), -1)
    now = masked & (jax.random.uniform(mask_key, masked.shape) < chance)
    return jnp.where(now, drawn, tokens), masked & ~now

  return jax.vmap(of_one)(keys, logits, tokens, masked)


def save(model: Any, samples: np.ndarray, labels: None, path: epath.Path) -> epath.Path:
  """The texts as .txt, one a paragraph."""
  path = path.with_name(f"{path.name}.txt")
  tokenizer = data.tokenizer_of(model.config, model.workdir)
  path.write_text("\n\n".join(tokenizer.decode(x) for x in samples) + "\n")
  return path


def evaluate(model: Any, dataset: data.Dataset, options: dict[str, Any]) -> dict[str, Any]:
  """The bound on held-out text, block by block and in all.

  The part of t below MIN_TIME is bounded by what a uniform guess costs. Tokens are the
  characters where the tokenizer is text8's.

  Returns:
    bits_per_token: rows of block ("all" the last), alpha_from, alpha_to, bits, and error, the
    standard error over sequences.
  """
  held_out, size = dataset.held_out, model.config.sample.batch_size
  total = min(len(held_out), options.get("num_samples") or model.config.evaluate.num_samples)
  rows, sums = [], np.zeros(total)
  for b, (task, params) in enumerate(zip(model.tasks, model.params)):
    params = jax.device_put(params)
    interval = model.schedule.interval(b)
    interval = interval._replace(lo=np.maximum(interval.lo, np.float32(schedule.MIN_TIME)))
    span = float(interval.hi - interval.lo)
    nats = np.concatenate([
        _losses(task, params, model.key(b, i), held_out.take(np.arange(i, min(i + size, total))),
                interval) for i in range(0, total, size)])
    nats = np.asarray(nats, np.float64) * span
    if b == len(model.tasks) - 1:
      rest = 1 - float(schedule.alpha_of(task.alpha, schedule.MIN_TIME))
      nats = nats + rest * np.log(task.network.vocab_size)
    rows.append(_bits(b, *model.schedule.boundaries[b:b + 2], nats))
    sums += nats
  rows.append(_bits("all", 0.0, 1.0, sums))
  return dict(bits_per_token=rows)


def _bits(block, alpha_from, alpha_to, nats: np.ndarray) -> dict[str, Any]:
  bits = nats / np.log(2)
  return dict(block=block, alpha_from=float(alpha_from), alpha_to=float(alpha_to),
              bits=float(bits.mean()), error=float(bits.std() / len(bits) ** 0.5))


@functools.partial(jax.jit, static_argnums=0)
def _losses(task, params, key, batch, interval):
  return task.losses(params, task.draw(key, batch, interval))
