"""How text is written: token by token, each denoised by all blocks in turn.

The solver "euler" moves z towards D, the mean embedding, as the paper does; "ancestral" draws a
token from the softmax, and z at the next level given z here and that token. For perfect blocks
tokens have the blocks' own distribution by the second in any number of steps, by the first in
the limit of many.
"""

from collections.abc import Mapping
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dbjax import schedule
from dbjax import solvers
from dbjax import targets

SOLVERS = ("ancestral", "euler")
COLD = 1e-6  # the temperature of the likeliest token


class Plan(NamedTuple):
  """How a token is denoised.

  Attributes:
    steps: (block, sigma, sigma_next) of each denoising step, from sigma_max on.
    solver: one of SOLVERS.
    bridge, top_k: from logits to D, for euler: see `targets.bridge`.
  """

  steps: tuple[tuple[int, float, float], ...]
  solver: str
  bridge: str
  top_k: int


def make_plan(noise: schedule.Schedule, options: Mapping[str, Any]) -> Plan:
  """The plan of config.sample."""
  sigmas = noise.grid(options["grid"], options["num_steps"])
  blocks = map(int, noise.block_of(sigmas[:-1]))
  return Plan(steps=tuple(zip(blocks, map(float, sigmas[:-1]), map(float, sigmas[1:]))),
              solver=options["solver"], bridge=options["bridge"], top_k=options["top_k"])


def temperature(options: Mapping[str, Any]) -> jax.Array:
  """What logits are divided by: never 0."""
  return jnp.float32(max(options["temperature"], COLD))


@functools.partial(jax.jit, static_argnums=(0, 1))
def write(tasks, plan, params, frozen, keys, temperature):
  """Texts (N, L) int32, with all blocks on the device.

  A document that ends makes the rest of its sequence eos.

  Args:
    tasks: one a block, of next tokens. Static, as is `plan`.
    plan: of each token.
    params, frozen: of the blocks.
    keys: (N,), one a text.
    temperature: that the network's logits are divided by at every step, ().
  """
  return _write(tasks, plan, params, frozen, keys, temperature)[0]


@functools.partial(jax.jit, static_argnums=(0, 1))
def settle(tasks, plan, params, frozen, keys, temperature):
  """What `write` does, step by step: the likeliest token at each denoising step, and in the last
  place the one that is drawn: (N, K, L) int32.
  """
  tokens, likeliest = _write(tasks, plan, params, frozen, keys, temperature)
  return jnp.concatenate([likeliest[:, :-1], tokens[:, None]], 1)


def _write(tasks, plan, params, frozen, keys, temperature):
  """Texts (N, L), and the likeliest token at each step (N, K, L)."""
  task, num, data = tasks[0], len(keys), tasks[0].config.data
  table = task.table(params[0], frozen)

  def write_one(carry, position):
    caches, over = carry
    start, end, between = jnp.moveaxis(
        jax.vmap(lambda key: jax.random.split(jax.random.fold_in(key, position), 3))(keys), 1, 0)
    z, likeliest = plan.steps[0][1] * _normal(start, table.shape[1]), []
    for step, (block, sigma, sigma_next) in enumerate(plan.steps):
      logits = tasks[block].query(params[block], frozen, z, jnp.float32(sigma), caches[block],
                                  position, temperature)
      likeliest.append(jnp.argmax(logits, -1))
      if plan.solver == "ancestral":
        here = jax.vmap(jax.random.fold_in, (0, None))(between, step)
        z = _ancestral(here, z, logits, table, sigma, sigma_next)
      else:
        d = targets.bridge(logits, table, plan.bridge, plan.top_k)
        z = solvers.euler_step(z, d, sigma, sigma_next)
    token, over = choose(end, logits, over, data.eos)
    caches = tuple(t.append(p, token, c, position) for t, p, c in zip(tasks, params, caches))
    return (caches, over), (token, jnp.stack(likeliest))

  caches = tuple(t.empty_cache(p, num) for t, p in zip(tasks, params))
  start = caches, jnp.zeros(num, bool)
  tokens, likeliest = jax.lax.scan(write_one, start, jnp.arange(data.length))[1]
  return tokens.T, likeliest.transpose(2, 1, 0)


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
def write_plainly(task, params, keys, temperature):
  """Texts (N, L) int32 by the plain network; as `write`."""
  data = task.config.data

  def write_one(carry, position):
    token, cache, over = carry
    logits, cache = task.apply(params, token, cache, position, method="query_next")
    here = jax.vmap(jax.random.fold_in, (0, None))(keys, position)
    token, over = choose(here, logits / temperature, over, data.eos)
    return (token, cache, over), token

  num = len(keys)
  start = (jnp.full(num, data.vocab_size), task.empty_cache(params, num),
           jnp.zeros(num, bool))
  return jax.lax.scan(write_one, start, jnp.arange(data.length))[1].T


def choose(keys, logits, over, eos: int):
  """Tokens (N,) drawn from softmax(logits), and which documents are over."""
  token = jnp.where(over, eos, _draw(keys, logits))
  return token, over | (token == eos)
