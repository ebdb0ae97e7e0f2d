"""DiffusionBlocks by hand: no config, no workdir, plain optax. Three blocks learn signals.

    python configs/examples/by_hand.py --out=by_hand.png

Takes 65 s of CPU time. The last batch's loss is 0.38, 0.34, 0.43 in blocks 0, 1, 2, and most of the
thirty signals in the picture are clean.

Blocks are trained one after another here, and could be anywhere: nothing passes between them. The
data and the network are those of signals.py.
"""

import argparse
from pathlib import Path
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import signals  # beside this file

import dbjax

BLOCKS, STEPS, LENGTH, SIGMA_DATA = 3, 400, 64, 0.7

schedule = dbjax.make_schedule({}, BLOCKS)  # EDM's noise; {"sigma_max": 40.0} is another
network = signals.Net(num_layers=2)  # of one block
optimizer = optax.adamw(optax.cosine_decay_schedule(4e-3, STEPS))


def denoise(params, z, sigma, label):
  """D(z, sigma) of one block. z (N, length), sigma (N,), label (N,) int32 -> (N, length)."""
  f = lambda x, c_noise: network.apply(params, x, c_noise, label)
  return dbjax.denoise(f, z, sigma, SIGMA_DATA)


def loss(params, batch, key, interval):
  """How well a block denoises at the noise levels of its own interval."""
  y, (sigma_key, noise_key) = batch["signal"], jax.random.split(key)
  sigma = dbjax.sample_sigma(sigma_key, (len(y),), interval)
  z = y + sigma[:, None] * jax.random.normal(noise_key, y.shape)
  error = jnp.mean((denoise(params, z, sigma, batch["label"]) - y) ** 2, axis=1)
  return jnp.mean(dbjax.edm_weight(sigma, SIGMA_DATA) * error)


def init(key):
  """A block's weights, and its optimizer's state."""
  params = network.init(key, jnp.zeros((1, LENGTH)), jnp.zeros(1), jnp.zeros(1, jnp.int32))
  return params, optimizer.init(params)


@jax.jit
def step(params, opt_state, batch, key, interval):
  """One step of one block."""
  value, grads = jax.value_and_grad(loss)(params, batch, key, interval)
  updates, opt_state = optimizer.update(grads, opt_state, params)
  return optax.apply_updates(params, updates), opt_state, value


def train(block, data, num_steps):
  """The weights of a block after its training."""
  key, rng = jax.random.key(block), np.random.default_rng(block)
  (params, opt_state), interval = init(key), schedule.training_interval(block)
  for n in range(num_steps):
    batch = data.take(rng.integers(0, len(data), 64))
    params, opt_state, value = step(params, opt_state, batch, jax.random.fold_in(key, n), interval)
  print(f"block {block}, of noise {interval.hi:.3g} to {interval.lo:.3g}: loss {value:.3f}")
  return params


def sample(blocks, label, key):
  """One signal a label: the solver asks that block for D whose noise it is. (N,) -> (N, length)."""
  compiled = jax.jit(denoise)

  def route(z, sigma):
    params = blocks[int(schedule.block_of(sigma))]
    return compiled(params, z, jnp.full(len(z), sigma), label)

  noise = schedule.sigma_max * jax.random.normal(key, (len(label), LENGTH))
  return np.asarray(dbjax.heun(route, noise, schedule.karras_grid(25)))


def step_of_any_task(config, block, batch, optimizer):
  """The same step for any task of dbjax, or your own. -> (weights, loss) after it.

  Args:
    config: by dbjax.resolve(dbjax.read_config("digits")).
    block: its number.
    batch: by dbjax.load_data(config).batch(seed, step, batch_size).
    optimizer: of optax.
  """
  task = dbjax.make_task(config, block)
  interval = task.make_schedule(config).training_interval(block)
  params, frozen = task.init(jax.random.key(0)), task.frozen(config)
  drawn = jax.jit(task.draw)(jax.random.key(1), batch, interval)
  value, grads = jax.jit(jax.value_and_grad(task.loss))(params, drawn, frozen)
  updates, _ = optimizer.update(grads, optimizer.init(params), params)
  return optax.apply_updates(params, updates), value


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--steps", type=int, default=STEPS, help="of each block")
  parser.add_argument("--out", type=Path, default=Path("by_hand.png"), help="the picture")
  args = parser.parse_args()
  data, _ = signals.load(types.SimpleNamespace(data=types.SimpleNamespace(length=LENGTH)))
  blocks = [train(b, data, args.steps) for b in range(BLOCKS)]
  label = np.arange(30, dtype=np.int32) % 3
  drawn = sample(blocks, label, jax.random.key(0))
  print(dbjax.pictures.save_grid(args.out, dbjax.pictures.curves(drawn), signals.KINDS[label], 10))


if __name__ == "__main__":
  main()
