"""Masked diffusion of text (MD4, arXiv 2406.04329; DiffusionBlocks, section 4.3).

Noised: tokens, each masked with probability 1 - alpha(t). Condition: none. Loss: the
cross-entropy of the masked tokens times -alpha'(t) / (1 - alpha(t)), whose integral over t
bounds -ln p(text) (MD4, equation 8). Answer: ancestral sampling, which unmasks token by
token. Metric: the bound in bits per token, a sum over the blocks' own intervals of alpha.

Documents that share a sequence see each other: were they kept apart, the masks would tell
where they end, and the bound would not count those bits.
"""

from collections.abc import Mapping
import functools
from typing import Any

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np

from dbjax import data
from dbjax import masking
from dbjax import targets
from dbjax.data import text
from dbjax.fields import at_least
from dbjax.fields import Field
from dbjax.fields import FREE
from dbjax.fields import JOINT
from dbjax.fields import one_of
from dbjax.model import Model
from dbjax.model import padded
from dbjax.network import Call
from dbjax.task import Input
from dbjax.task import Program
from dbjax.task import SEED
from dbjax.task import Strip
from dbjax.task import Task


class MaskedTask(Task):
  """The task as ONE block sees it; equal for blocks that are alike."""

  FIELDS = {
      **text.FIELDS,
      "model.network": Field("dbjax.models.masked_lm:MaskedLM", "module:Class", role=JOINT),
      "schedule.alpha": Field("linear", "share of tokens that are not masked, over time",
                              one_of("linear", "cosine"), JOINT),
      "sample.num_steps": Field(256, "of unmasking; 0: as many as blocks", at_least(0), FREE),
      "sample.temperature": Field(1.0, "of tokens; 0 is the likeliest", at_least(0), FREE),
  }
  OFFERS = {"vocab_size": "data.vocab_size"}

  @classmethod
  def make_schedule(cls, config: Any) -> masking.Masking:
    """The masks, and their split into blocks."""
    return masking.make_masking(config.schedule, config.num_blocks)

  check_data = staticmethod(text.check)
  files = staticmethod(text.files)

  def call(self, num: int) -> Call:
    """Logits of all tokens from those that are not masked: tokens (N, L) int32, V where masked,
    level (N,), segment (N, L) int32 -> (N, L, V).
    """
    d = self.config.data
    tokens = jax.ShapeDtypeStruct((num, d.length), jnp.int32)
    return Call((tokens, jax.ShapeDtypeStruct((num,), jnp.float32), tokens),
                (num, d.length, d.vocab_size))

  def abstract_batch(self, num: int) -> dict[str, jax.ShapeDtypeStruct]:
    """tokens (N, L), uint16 if it holds the vocabulary, else int32."""
    d = self.config.data
    return dict(tokens=jax.ShapeDtypeStruct((num, d.length), text.token_dtype(d.vocab_size)))

  def draw(self, key: jax.Array, batch: Mapping[str, jax.Array],
           interval: masking.TimeInterval) -> dict[str, jax.Array]:
    """Everything random in the loss, for the whole batch at once.

    Returns:
      tokens (N, L) int32, masked (N, L) bool, time (N,).
    """
    time_key, mask_key = jax.random.split(key)
    tokens = batch["tokens"].astype(jnp.int32)
    time = masking.sample_time(time_key, len(tokens), interval)
    noise = 1 - masking.alpha_of(self.config.schedule.alpha, time)
    masked = jax.random.uniform(mask_key, tokens.shape) < noise[:, None]
    return dict(tokens=tokens, masked=masked, time=time)

  def show(self, drawn: Mapping[str, np.ndarray], path: epath.Path) -> epath.Path:
    """The texts as .txt, each under its time: what is masked is _, a token each."""
    path, tokenizer = path.with_name(f"{path.name}.txt"), text.tokenizer(self.config)
    write = lambda tokens, masked: "".join(
        "_" * len(run) if hidden else tokenizer.decode(run)
        for hidden, run in text.runs(tokens, masked))
    path.write_text("\n\n".join(f"t = {t:.3f}\n{write(*x)}" for t, *x in zip(
        drawn["time"], drawn["tokens"], drawn["masked"])) + "\n")
    return path

  def loss(self, params: Any, drawn: Mapping[str, jax.Array], frozen: Any = None) -> jax.Array:
    """Nats per token and unit of t, mean over all: float32 scalar.

    Over all of t it is the bound itself, in nats per token.
    """
    return jnp.mean(self.losses(params, drawn))

  def losses(self, params: Any, drawn: Mapping[str, jax.Array]) -> jax.Array:
    """Those of each sequence: (N,)."""
    logits = self.logits(params, drawn["tokens"], drawn["masked"], drawn["time"])
    ce = targets.token_cross_entropy(logits, drawn["tokens"])
    return (masking.mask_weight(self.config.schedule.alpha, drawn["time"])
            * jnp.mean(jnp.where(drawn["masked"], ce, 0), axis=1))

  def logits(self, params: Any, tokens: jax.Array, masked: jax.Array, time: jax.Array
             ) -> jax.Array:
    """Of every token, from those that are not masked: (N, L, V); tokens, masked (N, L)."""
    seen = jnp.where(masked, self.config.data.vocab_size, tokens)
    # alpha says how many are masked, whatever the schedule; the embedding wants a span of 3.
    level = 3 * masking.alpha_of(self.config.schedule.alpha, time)
    return self.apply(params, seen, level, jnp.zeros_like(tokens))

  def generate(self, model: Model, index: np.ndarray, seed: int, options: Mapping[str, Any]
               ) -> tuple[np.ndarray, None]:
    """Sequences number `index`: (n, L) int32, by ancestral sampling (MD4, section 3).

    Between two times each masked token is unmasked with probability (alpha' - alpha) / (1 -
    alpha), as the block of alpha has it.
    """
    keys, hot = model.keys(seed, index), jnp.float32(options["temperature"])
    return np.asarray(self._unmask_all(model, keys, options["num_steps"], hot)), None

  def _unmask_all(self, model: Model, keys: jax.Array, num_steps: int, temperature: jax.Array
                  ) -> jax.Array:
    """Texts (n, L) of keys (n,)."""
    alphas, plan = self._plan(model, num_steps, temperature)
    carry = self._all_masked(len(keys))
    for start, stop, task, params in model.stretches(alphas):
      carry = _unmask(task, params, carry, keys, plan, start, stop)
    return carry[0]

  def _plan(self, model: Model, num_steps: int, temperature: jax.Array) -> tuple[np.ndarray, Any]:
    """alpha (K,) at each step, and what `_unmask` takes: times, chances, the temperature."""
    times = model.schedule.grid(num_steps)
    with jax.ensure_compile_time_eval():  # the plan is known, whatever is traced around it
      alphas = np.asarray(masking.alpha_of(self.config.schedule.alpha, times), np.float64)
    chances = np.append(np.diff(alphas)[:-1] / (1 - alphas[:-2]), 1.0)  # at the end, of all
    return alphas[:-1], (padded(times[:-1]), padded(chances), temperature)

  def _all_masked(self, num: int) -> tuple[jax.Array, jax.Array]:
    """Tokens and whether masked, (num, L)."""
    tokens = jnp.zeros((num, self.config.data.length), jnp.int32)
    return tokens, jnp.ones_like(tokens, bool)

  def program(self, model: Model, options: Mapping[str, Any]) -> Program:
    """Texts, as tokens (N, L), of a seed and their numbers."""
    run = lambda model, seed, index, temperature: self._unmask_all(
        model, model.keys(seed, index), options["num_steps"], temperature)
    return Program(SEED | dict(temperature=Input(values=(options["temperature"],), shared=True)),
                   run)

  def strip(self, model: Model, number: int, seed: int, options: Mapping[str, Any]
            ) -> Strip | None:
    """The tokens that are unmasked after each step."""
    alphas, plan = self._plan(
        model, options["num_steps"], jnp.float32(options["temperature"]))
    carry, keys, rows = self._all_masked(1), model.keys(seed, np.array([number])), []
    for start, stop, task, params in model.stretches(alphas):
      for k in range(start, stop):
        carry = _unmask(task, params, carry, keys, plan, k, k + 1)
        rows.append(jax.device_get([x[0] for x in carry]))
    tokens, masked = (np.array(x) for x in zip(*rows))
    words = text.pieces(self.config, model.workdir, tokens)
    return Strip(model.schedule.block_of(alphas), np.array(
        [f"{share:.0%} written" for share in 1 - masked.mean(1)]),
                 {"tokens": np.where(masked, "", words)}, f"Text {number}")

  def headline(self, tables: Mapping[str, Any]) -> dict[str, float]:
    """The bound of all blocks together."""
    return {"bits per token, lower is better": tables["bits_per_token"][-1]["bits"]}

  def save(self, model: Model, samples: np.ndarray, labels: None, path: epath.Path) -> epath.Path:
    """The texts as .txt, one a paragraph."""
    path = path.with_name(f"{path.name}.txt")
    tokenizer = text.tokenizer(model.config, model.workdir)
    path.write_text("\n\n".join(tokenizer.decode(x) for x in samples) + "\n")
    return path

  def evaluate(self, model: Model, dataset: data.Dataset, options: Mapping[str, Any]
               ) -> dict[str, list[dict[str, Any]]]:
    """The bound on held-out text, block by block and in all.

    The part of t below MIN_TIME is bounded by what a uniform guess costs. Tokens are the
    characters where the tokenizer is text8's.

    Returns:
      bits_per_token: rows of block ("all" the last), alpha_from, alpha_to, bits, and error, the
      standard error over sequences.
    """
    parts = list(data.batches(dataset.held_out, self.config.sample.batch_size,
                              options["num_samples"]))
    rows, sums = [], np.zeros(())
    for b, task, params in model.blocks():
      interval = model.schedule.interval(b)
      interval = interval._replace(lo=np.maximum(interval.lo, np.float32(masking.MIN_TIME)))
      span = float(interval.hi - interval.lo)
      nats = np.concatenate([_losses(task, params, model.key(b, index[0]), batch, interval)
                             for index, batch in parts]).astype(np.float64) * span
      if b == len(model.tasks) - 1:
        rest = 1 - float(masking.alpha_of(self.config.schedule.alpha, masking.MIN_TIME))
        nats = nats + rest * np.log(self.config.data.vocab_size)
      rows.append(_bits(b, model.schedule.boundaries[b:b + 2], nats))
      sums = sums + nats
    return dict(bits_per_token=[*rows, _bits("all", (0.0, 1.0), sums)])


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _unmask(task, params, carry, keys, plan, start, stop):
  """Steps start to stop, all of them one block's. carry: tokens and whether masked, (N, L)."""
  times, chances, temperature = plan

  def step(k, carry):
    tokens, masked = carry
    logits = task.logits(params, tokens, masked, jnp.full(len(tokens), times[k]))

    def of_one(key, logits, tokens, masked):
      token_key, mask_key = jax.random.split(jax.random.fold_in(key, k))
      drawn = jnp.argmax(logits + temperature * jax.random.gumbel(token_key, logits.shape), -1)
      now = masked & (jax.random.uniform(mask_key, masked.shape) < chances[k])
      return jnp.where(now, drawn, tokens), masked & ~now

    return jax.vmap(of_one)(keys, logits, tokens, masked)

  return jax.lax.fori_loop(start, stop, step, carry)


def _bits(block, alphas, nats: np.ndarray) -> dict[str, Any]:
  bits = nats / np.log(2)
  return dict(block=block, alpha_from=float(alphas[0]), alpha_to=float(alphas[1]),
              bits=float(bits.mean()), error=float(bits.std() / len(bits) ** 0.5))


@functools.partial(jax.jit, static_argnums=0)
def _losses(task, params, key, batch, interval):
  return task.losses(params, task.draw(key, batch, interval))
