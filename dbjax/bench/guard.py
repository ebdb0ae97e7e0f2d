"""What protections cost: an update that passes over bad batches, against one that does not.

A step is a gradient and an update of weights, moments and EMA; only the update is guarded. Both
updates are compiled for one device and take turns, with one of the whole step between them, from
the same weights and the same gradient. Printed are the medians of the turns, and what guarding
adds, in percent of a step.
"""

import argparse
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

from dbjax import block as block_lib
from dbjax import config as config_lib
from dbjax import data
from dbjax import task as task_lib
from dbjax.bench import race
from dbjax.bench import step as step_bench

_TURN = 10  # updates


def plain_update(task: Any, state: Any, loss: Any, grads: Any) -> tuple[Any, Any]:
  """`block.update` as it would be without protections."""
  updates, opt_state = block_lib.optimizer(task).update(grads, state.opt_state, state.params)
  params, step = optax.apply_updates(state.params, updates), state.step + 1
  decay = jax.numpy.minimum(task.config.train.ema_decay, (1 + step) / (10 + step))
  ema = jax.tree.map(lambda e, p: e + (1 - decay) * (p - e), state.ema, params)
  return (state.replace(step=step, params=params, ema=ema, opt_state=opt_state),
          dict(loss=loss, grad_norm=optax.tree.norm(grads)))


def taker(update: Callable, task: Any) -> Callable[[], float]:
  """A function that takes a turn, and returns the seconds of an update."""
  state, loss = block_lib.init(task, 0), np.float32(1)
  grads = jax.tree.map(lambda x: jax.numpy.full_like(x, 1e-3), state.params)
  update = jax.jit(update, static_argnums=0, donate_argnums=1)
  state, _ = update(task, state, loss, grads)  # compiles

  def turn() -> Any:
    nonlocal state
    for _ in range(_TURN):
      state, _ = update(task, state, loss, grads)
    return state

  return lambda: race.seconds_of(turn) / _TURN


def main(arguments: list[str]):
  parser = argparse.ArgumentParser(prog="python -m dbjax.bench guard", description=__doc__)
  parser.add_argument("--config", default="digits")
  parser.add_argument("--turns", type=int, default=30)
  given = parser.parse_args(arguments)
  race.at_least(given, turns=1)
  config = config_lib.resolve(config_lib.read(given.config))
  task = task_lib.make_task(config, 0)
  step = step_bench.stepper(config, data.load(config).batch(0, 0, task.config.train.batch_size))
  times = race.race({"guarded": taker(block_lib.update, task), "plain": taker(plain_update, task),
                     "step": lambda: step(1)}, given.turns)
  guard, bare, whole = (1e3 * np.median(seconds) for seconds in times.values())
  added = 100 * (times["guarded"] - times["plain"]) / np.median(times["step"])
  print(f"{given.config}, block 0: an update takes {guard:.2f} ms guarded, {bare:.2f} ms plain, a "
        f"whole step {whole:.1f} ms; guarding adds {np.median(added):.2f}% of a step "
        f"({np.quantile(added, 0.25):.2f} to {np.quantile(added, 0.75):.2f})")
