"""Recurrent-depth text: Huginn (arXiv 2502.05171) as a denoiser (DiffusionBlocks, section 4.5).

A network whose core is run over and over is trained by backpropagation through its runs. As
a denoiser of the next token's embedding it is trained in ONE pass, and its iterations are
denoising steps. Nothing is split: B = 1. All else is as in `autoregressive.py`.

With task.end_to_end it is Huginn itself: the core runs a random number of times about
task.iterations, with gradients through the last task.backprop of them.
"""

from collections.abc import Mapping
import functools
from typing import Any

import jax
import jax.numpy as jnp

from dbjax import data
from dbjax import schedule
from dbjax import targets
from dbjax import writing
from dbjax.errors import UserError
from dbjax.fields import above
from dbjax.fields import Field
from dbjax.fields import JOINT
from dbjax.model import Model
from dbjax.network import Call
from dbjax.tasks.autoregressive import AutoregressiveTask
from dbjax.tasks.autoregressive import segments

_SPREAD = 0.5  # of ln of the mean number of runs (section 3.3)


class RecurrentTask(AutoregressiveTask):
  """The task: of a network of one block."""

  FIELDS = {
      **AutoregressiveTask.FIELDS,
      "num_blocks": Field(1, "nothing is split", above(0), JOINT),
      "model.network": Field("dbjax.models.recurrent_lm:RecurrentLM", "module:Class",
                             role=JOINT),
      "task.iterations": Field(32, "end to end: runs of the core in the mean", above(0)),
      "task.backprop": Field(8, "end to end: runs that gradients go through", above(0)),
  }

  @classmethod
  def fill(cls, config: Any):
    """Raises UserError where the network would be split."""
    super().fill(config)
    if config.num_blocks != 1:
      raise UserError(f"num_blocks={config.num_blocks}: the task recurrent splits nothing, its "
                      "core is one block: set num_blocks=1")

  def call(self, num: int) -> Call:
    """As of `AutoregressiveTask`; end to end `iterate`: tokens, segment, the first state (N, L, D),
    and two whole numbers: runs, and those with gradients.
    """
    call = super().call(num)
    if not self.config.task.end_to_end:
      return call
    state = jax.ShapeDtypeStruct((num, self.config.data.length, self.config.model.width),
                                 jnp.float32)
    return Call((*call.inputs, state, 1, 1), call.output, "iterate")

  def draw(self, key: jax.Array, batch: Mapping[str, jax.Array],
           interval: schedule.Interval) -> dict[str, jax.Array]:
    """As `AutoregressiveTask.draw`; end to end tokens (N, L), runs (N,), all equal, and the first
    state (N, L, D).
    """
    t = self.config.task
    if not t.end_to_end:
      return super().draw(key, batch, interval)
    mean_key, runs_key, state_key = jax.random.split(key, 3)
    tokens = batch["tokens"].astype(jnp.int32)
    mean = t.iterations * jnp.exp(_SPREAD * jax.random.normal(mean_key) - _SPREAD**2 / 2)
    runs = 1 + jax.random.poisson(runs_key, mean)
    return dict(tokens=tokens, runs=jnp.full(tokens.shape[:1], runs), state=jax.random.normal(
        state_key, (*tokens.shape, self.config.model.width)))

  def loss(self, params: Any, drawn: Mapping[str, jax.Array], frozen: Any = None) -> jax.Array:
    """The cross-entropy in nats per token, mean over all: float32 scalar."""
    if not self.config.task.end_to_end:
      return super().loss(params, drawn, frozen)
    tokens = drawn["tokens"]
    logits = self.apply(params, tokens, segments(tokens, self.config.data.eos), drawn["state"],
                        drawn["runs"][0], self.config.task.backprop, method="iterate")
    return jnp.mean(targets.token_cross_entropy(logits, tokens))

  def next_token(self, params: Any, tokens: jax.Array) -> jax.Array:
    """Huginn's logits of tokens (N, L) after task.iterations runs: (N, L, V).

    All texts begin with one state, or a text's would be that of its place in a batch.
    """
    state = jax.random.normal(jax.random.key(0), (tokens.shape[1], self.config.model.width))
    state = jnp.broadcast_to(state, (*tokens.shape, self.config.model.width))
    return self.apply(params, tokens, segments(tokens, self.config.data.eos), state,
                      self.config.task.iterations, 1, method="iterate")

  def write_plainly(self, params: Any, keys: jax.Array, temperature: jax.Array) -> jax.Array:
    """Texts (N, L). Huginn itself has no cache here: it reads all for each token."""
    return _write_plainly(self, params, keys, temperature)

  def evaluate(self, model: Model, dataset: data.Dataset, options: Mapping[str, Any]
               ) -> dict[str, list[dict[str, Any]]]:
    """As `AutoregressiveTask.evaluate`, and compute: see there."""
    return super().evaluate(model, dataset, options) | dict(compute=[compute(self)])


def compute(task: RecurrentTask) -> dict[str, float]:
  """What a token costs, in evaluations of one layer; a gradient counts as two more.

  Returns:
    training: of one token. One pass carries two streams through core and coda; Huginn runs
    the core task.iterations + 1 times in the mean, task.backprop of them with a gradient.
    writing: of one token, in config.sample.num_steps, with a cache of all that is clean.
  """
  n, t = task.network, task.config.task
  if t.end_to_end:
    runs = t.iterations + 1
    with_gradient = min(t.backprop, runs)
    training = 3 * (n.prelude + n.coda + n.core * with_gradient) + n.core * (runs - with_gradient)
    return dict(training=training, writing=n.prelude + n.core * t.iterations + n.coda)
  return dict(training=3 * (n.prelude + 2 * (n.core + n.coda)),
              writing=n.prelude + (task.config.sample.num_steps + 1) * (n.core + n.coda))


@functools.partial(jax.jit, static_argnums=0)
def _write_plainly(task, params, keys, temperature):

  def write_one(carry, position):
    tokens, over = carry
    logits = task.next_token(params, tokens)[:, position]
    here = jax.vmap(jax.random.fold_in, (0, None))(keys, position)
    token, over = writing.choose(here, logits / temperature, over, task.config.data.eos)
    return (tokens.at[:, position].set(token), over), None

  start = jnp.zeros((len(keys), task.config.data.length), jnp.int32), jnp.zeros(len(keys), bool)
  return jax.lax.scan(write_one, start, jnp.arange(task.config.data.length))[0][0]
