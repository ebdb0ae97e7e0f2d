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

from collections.abc import Mapping
from typing import Any

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np

from dbjax import data
from dbjax import denoiser
from dbjax import loading
from dbjax import schedule
from dbjax import targets
from dbjax import writing
from dbjax.data import text
from dbjax.errors import UserError
from dbjax.fields import above
from dbjax.fields import at_least
from dbjax.fields import Field
from dbjax.fields import FREE
from dbjax.fields import JOINT
from dbjax.fields import one_of
from dbjax.model import Model
from dbjax.network import Call
from dbjax.quality import texts
from dbjax.task import Input
from dbjax.task import Program
from dbjax.task import SEED
from dbjax.task import Strip
from dbjax.tasks import masked

_HELD_OUT = 512  # sequences, at most, that cross-entropies are measured on


class AutoregressiveTask(targets.EmbeddedTask):
  """The task as ONE block sees it; equal for blocks that are alike."""

  FIELDS = {
      **schedule.FIELDS, **text.FIELDS, **targets.FIELDS,
      "model.network": Field("dbjax.models.causal_lm:CausalLM", "module:Class", role=JOINT),
      "schedule.P_mean": Field(0.0, "mean of ln sigma in training", role=JOINT),
      "schedule.P_std": Field(1.0, "standard deviation of ln sigma", above(0), JOINT),
      "schedule.sigma_min": Field(0.25, "the least noise", above(0), JOINT),
      "schedule.sigma_max": Field(10.0, "the most noise", above(0), JOINT),
      "schedule.gamma": Field(0.1, "overlap of the blocks' intervals", at_least(0), JOINT),
      "task.likelihood": Field(True, "what z tells by itself is added to the logits: blocks need "
                               "not learn to read it", role=JOINT),
      "sample.solver": Field("ancestral", "euler is the paper's", one_of(*writing.SOLVERS), FREE),
      "sample.grid": Field("equal_mass", "noise levels", one_of(*schedule.GRIDS), FREE),
      "sample.num_steps": Field(8, "denoising steps of a token; 0: as many as blocks", at_least(0),
                                FREE),
      "sample.temperature": Field(1.0, "of tokens; 0 is the likeliest", at_least(0), FREE),
  }
  EVALUATE = {
      "judge": Field("", "the workdir of a plain network, which judges what is written"),
  }
  OFFERS = {"vocab_size": "data.vocab_size", "embedding_width": "model.embedding_width"}

  check_data = staticmethod(text.check)
  files = staticmethod(text.files)

  @classmethod
  def frozen(cls, config: Any, dataset: Any = None) -> dict[str, np.ndarray]:
    """The table of the tokens, unless it is learned."""
    if config.task.shared_embeddings or config.task.end_to_end:
      return {}
    return {targets.TABLE: targets.make_table(config, config.data.vocab_size, dataset)}

  def call(self, num: int) -> Call:
    """Logits (N, L, V) of every token: tokens (N, L) int32, what z tells of each (N, L, E),
    c_noise (N, 1), segment (N, L) int32. End to end: tokens, segment, by `next_token`.

    To write text, a network has empty_cache, append and query too, and the plain one query_next:
    see `models/causal_lm.py`.
    """
    d, array = self.config.data, jax.ShapeDtypeStruct
    tokens, output = array((num, d.length), jnp.int32), (num, d.length, d.vocab_size)
    if self.config.task.end_to_end:
      return Call((tokens, tokens), output, "next_token")
    z = array((num, d.length, self.config.model.embedding_width), jnp.float32)
    return Call((tokens, z, array((num, 1), jnp.float32), tokens), output)

  @property
  def joint(self) -> tuple[str, ...]:
    """The table of the tokens, if it is learned."""
    t = self.config.task
    return (targets.TABLE,) * (t.shared_embeddings and not t.end_to_end)

  def abstract_batch(self, num: int) -> dict[str, jax.ShapeDtypeStruct]:
    """tokens (N, L), uint16 if it holds the vocabulary, else int32."""
    d = self.config.data
    return dict(tokens=jax.ShapeDtypeStruct((num, d.length), text.token_dtype(d.vocab_size)))

  def abstract_frozen(self) -> dict[str, jax.ShapeDtypeStruct]:
    """The frozen table, if it is."""
    if self.joint or self.config.task.end_to_end:
      return {}
    return {targets.TABLE: jax.ShapeDtypeStruct(self._table_shape, jnp.float32)}

  def draw(self, key: jax.Array, batch: Mapping[str, jax.Array],
           interval: schedule.Interval) -> dict[str, jax.Array]:
    """Everything random in the loss, for the whole batch at once.

    Returns:
      tokens (N, L) int32, sigma (N,), one level for a sequence, and noise (N, L, E).
    """
    sigma_key, noise_key = jax.random.split(key)
    tokens = batch["tokens"].astype(jnp.int32)
    if self.config.task.end_to_end:
      return dict(tokens=tokens)
    shape = (*tokens.shape, self.config.model.embedding_width)
    return dict(tokens=tokens, sigma=schedule.sample_sigma(sigma_key, tokens.shape[:1], interval),
                noise=jax.random.normal(noise_key, shape))

  def show(self, drawn: Mapping[str, np.ndarray], path: epath.Path) -> epath.Path:
    """The texts as .txt, each under the noise level of its tokens' embeddings."""
    path, tokenizer = path.with_name(f"{path.name}.txt"), text.tokenizer(self.config)
    levels = drawn.get("sigma", np.zeros(len(drawn["tokens"])))
    path.write_text("\n\n".join(f"sigma = {sigma:.3f}\n{tokenizer.decode(x)}" for sigma, x in zip(
        levels, drawn["tokens"])) + "\n")
    return path

  def loss(self, params: Any, drawn: Mapping[str, jax.Array], frozen: Any = None) -> jax.Array:
    """The (weighted) cross-entropy in nats per token, mean over all: float32 scalar."""
    tokens, t = drawn["tokens"], self.config.task
    if t.end_to_end:
      return jnp.mean(targets.token_cross_entropy(self.next_token(params, tokens), tokens))
    sigma = drawn["sigma"]
    z = self.table(params, frozen)[tokens] + sigma[:, None, None] * drawn["noise"]
    logits = self.logits(params, frozen, tokens, z, sigma)
    return targets.cross_entropy(logits, tokens, sigma[:, None], t.weight, self.config.sigma_data)

  def logits(self, params: Any, frozen: Any, tokens: jax.Array, z: jax.Array,
             sigma: jax.Array) -> jax.Array:
    """tokens (N, L), z (N, L, E), sigma (N,) -> (N, L, V): position i is that of token i."""
    logits = self.apply(
        params, tokens, targets.linear_estimate(z, sigma[:, None]),
        denoiser.noise_level(sigma)[:, None], segments(tokens, self.config.data.eos))
    return logits + self.likelihood(params, frozen, z, sigma[:, None])

  def denoise(self, params: Any, frozen: Any, z: jax.Array, sigma: jax.Array,
              tokens: jax.Array) -> jax.Array:
    """D(z, sigma) of every token, given those before it: z (N, L, E), sigma (N,), tokens (N, L)."""
    logits = self.logits(params, frozen, tokens, z, sigma)
    return targets.bridge(logits, self.table(params, frozen), "soft", 0)

  def likelihood(self, params: Any, frozen: Any, z: jax.Array, sigma: jax.Array
                 ) -> jax.Array | float:
    """What z tells of each token by itself, if that is not left to the network."""
    if not self.config.task.likelihood:
      return 0.0
    return targets.log_likelihood(z, self.table(params, frozen), sigma)

  def next_token(self, params: Any, tokens: jax.Array) -> jax.Array:
    """The plain network's logits of tokens (N, L): (N, L, V)."""
    return self.apply(params, tokens, segments(tokens, self.config.data.eos), method="next_token")

  @property
  def _table_shape(self) -> tuple[int, int]:
    return self.config.data.vocab_size, self.config.model.embedding_width

  # One position at a time, given the clean past in a cache.

  def empty_cache(self, params: Any, num: int) -> Any:
    """Room for the past of `num` sequences."""
    return self.apply(params, num, self.config.data.length, method="empty_cache")

  def append(self, params: Any, tokens: jax.Array, cache: Any, position: jax.Array) -> Any:
    """The cache with a clean token (N,) more, at `position`."""
    return self.apply(params, tokens, cache, position, method="append")

  def query(self, params: Any, frozen: Any, z: jax.Array, sigma: jax.Array, cache: Any,
            position: jax.Array, temperature: jax.Array) -> jax.Array:
    """Logits (N, V) at `position` from z (N, E) of level sigma ()."""
    c_noise = jnp.full(z.shape[:1], denoiser.noise_level(sigma))
    logits = self.apply(params, targets.linear_estimate(z, sigma), c_noise, cache, position,
                        method="query")
    return logits / temperature + self.likelihood(params, frozen, z, sigma)

  def generate(self, model: Model, index: np.ndarray, seed: int, options: Mapping[str, Any]
               ) -> tuple[np.ndarray, None]:
    """Sequences number `index`: (n, L) int32. All blocks are on the device. See `writing.py`."""
    keys, hot = model.keys(seed, index), writing.temperature(options)
    return np.asarray(self._write(model, keys, hot, options)), None

  def _write(self, model: Model, keys: jax.Array, temperature: jax.Array,
             options: Mapping[str, Any]) -> jax.Array:
    """Texts (n, L) of keys (n,)."""
    if self.config.task.end_to_end:
      return self.write_plainly(model.params[0], keys, temperature)
    plan = writing.make_plan(model.schedule, options)
    return writing.write(model.tasks, plan, model.params, model.frozen, keys, temperature)

  def program(self, model: Model, options: Mapping[str, Any]) -> Program:
    """Texts, as tokens (N, L), of a seed and their numbers; a temperature of 0 is next to it."""
    run = lambda model, seed, index, temperature: self._write(
        model, model.keys(seed, index), jnp.maximum(temperature, writing.COLD), options)
    return Program(SEED | dict(temperature=Input(values=(options["temperature"],), shared=True)),
                   run)

  def strip(self, model: Model, number: int, seed: int, options: Mapping[str, Any]
            ) -> Strip | None:
    """Of each token of a text the likeliest one by each denoising step, given those before it; None
    of the plain network.
    """
    if self.config.task.end_to_end:
      return None
    plan = writing.make_plan(model.schedule, options)
    likeliest = writing.settle(model.tasks, plan, model.params, model.frozen,
                               model.keys(seed, np.array([number])), writing.temperature(options))
    blocks, levels, _ = zip(*plan.steps)
    return Strip(np.array(blocks), np.array([f"σ {s:.2g}" for s in levels]),
                 {"tokens": text.pieces(self.config, model.workdir, np.asarray(likeliest[0]))},
                 f"Text {number}, each token given those before it")

  def headline(self, tables: Mapping[str, Any]) -> dict[str, float]:
    """What a token of held-out text costs, and how likely a judge finds what is written."""
    rows = tables.get("bound") or tables["cross_entropy"]
    found, written = {"nats per token, lower is better": rows[-1]["nats"]}, tables["written"][0]
    if "perplexity" in written:
      found["perplexity of samples, lower is better"] = written["perplexity"]
    return found

  def write_plainly(self, params: Any, keys: jax.Array, temperature: jax.Array) -> jax.Array:
    """Texts (N, L) by the plain network."""
    return writing.write_plainly(self, params, keys, temperature)

  save = masked.MaskedTask.save  # text is text

  def evaluate(self, model: Model, dataset: data.Dataset, options: Mapping[str, Any]
               ) -> dict[str, list[dict[str, Any]]]:
    """Cross-entropies on held-out text, and what is written.

    Returns:
      cross_entropy: rows of block, sigma, nats per token; bound, unless the network is plain: see
      `texts.bound`; written: a row of figures of the samples beside that of as much held-out text,
      if 512 sequences have as much: see `texts.figures`.
    """
    judge = load_judge(options["judge"], self.config) if options["judge"] else None
    few = dataset.held_out.take(data.some(len(dataset.held_out), _HELD_OUT))
    tokens = few["tokens"].astype(np.int32)
    result = dict(cross_entropy=texts.cross_entropy(model, tokens))
    if not self.config.task.end_to_end:
      result["bound"] = texts.bound(model, tokens)
    written, _ = model.sample(options["num_samples"], seed=self.config.seed)
    eos = self.config.data.eos
    as_many = -(-int(texts.is_counted(written, eos).sum()) // tokens.shape[1])  # full sequences
    result["written"] = [dict(text="samples", **texts.figures(written, eos, judge)),
                         dict(text="held out", **texts.figures(tokens[:as_many], eos, judge))]
    return result


def load_judge(workdir: str, config: Any) -> Model:
  """The model that tells how likely a text is. Raises UserError where it cannot."""
  judge = loading.load(workdir)
  theirs = judge.config
  if not isinstance(judge.tasks[0], AutoregressiveTask) or not theirs.task.end_to_end:
    raise UserError(f"--judge={workdir}: expected a model that predicts the next token, "
                    "trained with --config.task.end_to_end=True")
  for field in ("tokenizer", "vocab_size", "eos", "length"):
    if theirs.data[field] != config.data[field]:
      raise UserError(f"--judge={workdir} was trained with data.{field}={theirs.data[field]}, "
                      f"--workdir with {config.data[field]}: expected the same")
  return judge


def segments(tokens: jax.Array, eos: int) -> jax.Array:
  """The number of the document in its sequence that each token is of: (N, L) int32.

  It is known from the tokens before alone: it tells nothing of the one to come.
  """
  closed = (tokens == eos).astype(jnp.int32)
  return jnp.cumsum(closed, axis=1) - closed
