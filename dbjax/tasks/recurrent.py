"""Recurrent-depth text: Huginn (arXiv 2502.05171) as a denoiser (DiffusionBlocks, section 4.5).

A network whose core is run over and over is trained by backpropagation through its runs. As
a denoiser of the next token's embedding it is trained in ONE pass, and its iterations are
denoising steps. Nothing is split: B = 1. All else is as in `autoregressive.py`.

With task.end_to_end it is Huginn itself: the core runs a random number of times about
task.iterations, with gradients through the last task.backprop of them.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dbjax import schedule
from dbjax.models.lm import RecurrentLM
from dbjax.tasks import autoregressive
from dbjax.tasks.autoregressive import segments

_SPREAD = 0.5  # of ln of the mean number of runs (section 3.3)


@dataclasses.dataclass(frozen=True)
class RecurrentTask(autoregressive.AutoregressiveTask):
  """The task: of a network of one block."""

  network: RecurrentLM
  iterations: int
  backprop: int

  def init(self, key: jax.Array):
    """Parameters: a pytree of float32."""
    if not self.end_to_end:
      return super().init(key)
    tokens = jnp.zeros((1, self.length), jnp.int32)
    state = jnp.zeros((1, self.length, self.network.width))
    return self.network.init(key, tokens, tokens, state, 1, 1, method="iterate")["params"]

  def draw(self, key: jax.Array, batch: dict[str, jax.Array],
           interval: schedule.Interval) -> dict[str, jax.Array]:
    """As `AutoregressiveTask.draw`; end to end tokens (N, L), runs (N,), all equal, and the first
    state (N, L, D).
    """
    if not self.end_to_end:
      return super().draw(key, batch, interval)
    mean_key, runs_key, state_key = jax.random.split(key, 3)
    tokens = batch["tokens"].astype(jnp.int32)
    mean = self.iterations * jnp.exp(_SPREAD * jax.random.normal(mean_key) - _SPREAD**2 / 2)
    runs = 1 + jax.random.poisson(runs_key, mean)
    return dict(tokens=tokens, runs=jnp.full(tokens.shape[:1], runs), state=jax.random.normal(
        state_key, (*tokens.shape, self.network.width)))

  def loss(self, params, drawn: dict[str, jax.Array], shared=None) -> jax.Array:
    """The cross-entropy in nats per token, mean over all: float32 scalar."""
    if not self.end_to_end:
      return super().loss(params, drawn, shared)
    tokens = drawn["tokens"]
    logits = self.network.apply(
        {"params": params}, tokens, segments(tokens, self.eos), drawn["state"], drawn["runs"][0],
        self.backprop, method="iterate")
    return jnp.mean(autoregressive.targets.token_cross_entropy(logits, tokens))

  def next_token(self, params, tokens: jax.Array) -> jax.Array:
    """Huginn's logits of tokens (N, L) after task.iterations runs: (N, L, V).

    All texts begin with one state, or a text's would be that of its place in a batch.
    """
    state = jax.random.normal(jax.random.key(0), (tokens.shape[1], self.network.width))
    state = jnp.broadcast_to(state, (*tokens.shape, self.network.width))
    return self.network.apply({"params": params}, tokens, segments(tokens, self.eos), state,
                              self.iterations, 1, method="iterate")


def make_task(config, block: int) -> RecurrentTask:
  """The task of a resolved config."""
  m, d, t = config.model, config.data, config.task
  network = RecurrentLM(
      m.prelude, m.num_layers - m.prelude - m.coda, m.coda, m.width, m.num_heads, d.vocab_size,
      m.embedding_width, m.mlp_ratio, jnp.dtype(m.dtype), m.remat, m.unroll)
  return RecurrentTask(network, d.length, d.eos, config.sigma_data, t.likelihood, t.weight,
                       t.shared_embeddings, t.end_to_end, t.iterations, t.backprop)


save, shared = autoregressive.save, autoregressive.shared  # as there


def generate(model: Any, index: np.ndarray, seed: int, **overrides) -> tuple[np.ndarray, None]:
  """As `autoregressive.generate`. Huginn itself has no cache here: it reads all for each token."""
  if not model.tasks[0].end_to_end:
    return autoregressive.generate(model, index, seed, **overrides)
  keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(seed)))(index)
  temperature = autoregressive.temperature(model.options(overrides))
  return np.asarray(_write_plainly(model.tasks[0], model.params[0], keys, temperature)), None


def evaluate(model: Any, dataset: Any, options: dict[str, Any]) -> dict[str, Any]:
  """As `autoregressive.evaluate`, and compute: see there."""
  counted = compute(model.tasks[0], model.config.sample.num_steps)
  return autoregressive.evaluate(model, dataset, options) | dict(compute=[counted])


def compute(task: RecurrentTask, num_steps: int) -> dict[str, float]:
  """What a token costs, in evaluations of one layer; a gradient counts as two more.

  Args:
    task: of the whole network.
    num_steps: denoising steps in generation.

  Returns:
    training: of one token. One pass carries two streams through core and coda; Huginn runs
    the core task.iterations + 1 times in the mean, task.backprop of them with a gradient.
    writing: of one token, with a cache of all that is clean.
  """
  n = task.network
  if task.end_to_end:
    runs = task.iterations + 1
    with_gradient = min(task.backprop, runs)
    training = 3 * (n.prelude + n.coda + n.core * with_gradient) + n.core * (runs - with_gradient)
    return dict(training=training, writing=n.prelude + n.core * task.iterations + n.coda)
  return dict(training=3 * (n.prelude + 2 * (n.core + n.coda)),
              writing=n.prelude + (num_steps + 1) * (n.core + n.coda))


@functools.partial(jax.jit, static_argnums=0)
def _write_plainly(task, params, keys, temperature):

  def write_one(carry, position):
    tokens, over = carry
    logits = task.next_token(params, tokens)[:, position]
    here = jax.vmap(jax.random.fold_in, (0, None))(keys, position)
    token, over = autoregressive.choose(here, logits / temperature, over, task.eos)
    return (tokens.at[:, position].set(token), over), None

  start = jnp.zeros((len(keys), task.length), jnp.int32), jnp.zeros(len(keys), bool)
  return jax.lax.scan(write_one, start, jnp.arange(task.length))[0][0]
