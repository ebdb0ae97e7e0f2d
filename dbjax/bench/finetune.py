"""Does it help next tokens that a block trains on what its predecessors make?

    python -m dbjax.bench finetune --workdir=DIR [--judge=DIR2] [--num_steps=100]

Blocks that were trained apart never see the states that Euler's sampler reaches: see
exposure.py, for images. Here each block but the first is trained further on those: z = y +
sigma eps at a level of its predecessors, brought down to its own by the sampler's steps, and the
cross-entropy of the token. It is then a function of the blocks before it, which the invariant
forbids: an experiment, and no way to train. DIR2 is a plain network that judges what is written.
"""

import argparse
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dbjax import data
from dbjax import loading
from dbjax import metrics
from dbjax import solvers
from dbjax import targets
from dbjax import writing
from dbjax.errors import UserError
from dbjax.model import Model
from dbjax.quality import texts
from dbjax.tasks.autoregressive import AutoregressiveTask
from dbjax.tasks.autoregressive import load_judge


def fine_tune(model: Model, dataset: data.Dataset, num_steps: int = 100,
              learning_rate: float = 2e-4) -> Model:
  """The model with all blocks but the first trained further, one after another.

  Args:
    model: of next tokens, by two blocks or more.
    dataset: that it was trained on; batches go on where training stopped.
    num_steps: of AdamW, per block.
    learning_rate: constant.

  Returns:
    A model; the first block is as it was.

  Raises:
    UserError: if the sampler has no step for some block.
  """
  config, params = model.config, list(model.params)
  steps = writing.make_plan(model.schedule, model.options({})).steps
  if len({block for block, _, _ in steps}) < len(params):
    raise UserError(f"sample.num_steps={config.sample.num_steps}: too few for each of "
                        f"{len(params)} blocks to have one: train with more")
  optimizer = optax.chain(optax.clip_by_global_norm(config.optimizer.clip_norm),
                          optax.adamw(learning_rate, weight_decay=config.optimizer.weight_decay))
  for b in range(1, len(params)):
    state = jax.jit(optimizer.init)(params[b])
    for i in range(num_steps):
      tokens = dataset.batch(config.seed, model.steps[b] + i, config.train.batch_size)["tokens"]
      params[b], state = _step(model.tasks, steps, b, optimizer, tuple(params), state, model.frozen,
                               tokens.astype(np.int32), model.key(b, i))
  return dataclasses.replace(model, params=tuple(jax.device_get(params)))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _step(tasks, steps, b, optimizer, params, state, frozen, tokens, key):
  """One step of block b -> its parameters, state of the optimizer."""
  start_key, noise_key = jax.random.split(key)
  table = tasks[b].table(params[b], frozen)
  before = [i for i, (block, _, _) in enumerate(steps) if block < b]
  start = jax.random.randint(start_key, tokens.shape[:1], 0, len(before))
  noise = jax.random.normal(noise_key, (*tokens.shape, table.shape[1]))
  noised = lambda sigma: table[tokens] + sigma * noise

  def loss(mine):
    z, nats = noised(steps[0][1]), []
    for i, (block, sigma, sigma_next) in enumerate(steps):
      if block > b:
        break
      z = jnp.where((i <= start)[:, None, None], noised(sigma), z)
      logits = tasks[block].logits(mine if block == b else params[block], frozen, tokens, z,
                                   jnp.full(len(tokens), sigma, jnp.float32))
      if block == b:
        nats.append(jnp.mean(targets.token_cross_entropy(logits, tokens)))
      d = targets.bridge(logits, table, "soft", 0)
      # Each step is of a trained sampler: no gradient goes through it.
      z = jax.lax.stop_gradient(solvers.euler_step(z, d, sigma, sigma_next))
    return sum(nats) / len(nats)

  updates, state = optimizer.update(jax.grad(loss)(params[b]), state, params[b])
  return optax.apply_updates(params[b], updates), state


def written(model: Model, judge: Model | None, solver: str, num_steps: int,
            bridge: str = "soft") -> dict[str, float]:
  """Figures of what a model writes in one way; see `texts.figures`."""
  config = model.config
  tokens, _ = model.sample(config.evaluate.num_samples, seed=config.seed, solver=solver,
                           num_steps=num_steps, bridge=bridge)
  return texts.figures(tokens, config.data.eos, judge)


def main(argv: list[str]):
  parser = argparse.ArgumentParser(prog="python -m dbjax.bench finetune", description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--workdir", required=True, help="of a model of next tokens")
  parser.add_argument("--judge", help="workdir of a plain network of the same tokens")
  parser.add_argument("--num_steps", type=int, default=100, help="of each block but the first")
  parser.add_argument("--learning_rate", type=float, default=2e-4, help="constant")
  args = parser.parse_args(argv)
  model = loading.load(args.workdir)
  if not isinstance(model.tasks[0], AutoregressiveTask) or len(model.tasks) < 2 or (
      model.tasks[0].joint):
    raise UserError(f"--workdir={args.workdir} holds {model.config.task.name} in "
                    f"{len(model.tasks)} block(s): expected autoregressive in two or more, with a "
                    "frozen table")
  tuned = fine_tune(model, model.dataset(), args.num_steps, args.learning_rate)
  judge = args.judge and load_judge(args.judge, model.config)
  rows = [dict(blocks=name, solver=solver,
               **written(each, judge, solver, model.config.sample.num_steps))
          for name, each in (("apart", model), ("fine-tuned", tuned))
          for solver in ("euler", "ancestral")]
  print(metrics.table(list(rows[0]), [list(row.values()) for row in rows]))
