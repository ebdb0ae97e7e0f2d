"""What protections cost: a step that passes over bad batches, against one that does not.

Both are compiled for one device and take turns of ten steps, from the same weights, on the same
batch. Printed are the medians of the turns, and the median of the ratios of neighbours.
"""

import argparse
from collections.abc import Callable
import functools
import time
from typing import Any

import jax
import numpy as np
import optax

from dbjax import block as block_lib
from dbjax import config as config_lib
from dbjax import data
from dbjax import task as task_lib

_TURN = 10  # steps


def plain_step(task: Any, state: Any, batch: Any, block: int, interval: Any) -> tuple[Any, Any]:
  """`block.train_step` as it would be without protections."""
  key = block_lib.block_key(task.config.seed, block, state.step, block_lib.DRAW)
  drawn = task.draw(key, batch, interval)
  loss, grads = jax.value_and_grad(functools.partial(task.loss, frozen=None))(state.params, drawn)
  updates, opt_state = block_lib.optimizer(task).update(grads, state.opt_state, state.params)
  params, step = optax.apply_updates(state.params, updates), state.step + 1
  decay = jax.numpy.minimum(task.config.train.ema_decay, (1 + step) / (10 + step))
  ema = jax.tree.map(lambda e, p: e + (1 - decay) * (p - e), state.ema, params)
  return (state.replace(step=step, params=params, ema=ema, opt_state=opt_state),
          dict(loss=loss, grad_norm=optax.tree.norm(grads)))


def taker(step: Callable, task: Any, batch: Any) -> Callable[[], float]:
  """A function that takes a turn, and returns milliseconds per step."""
  interval = task.make_schedule(task.config).training_interval(0)
  state, step = block_lib.init(task, 0), jax.jit(functools.partial(step, task), donate_argnums=0)
  state, _ = step(state, batch, 0, interval)  # compiles

  def take() -> float:
    nonlocal state
    jax.block_until_ready(state)
    begin = time.perf_counter()
    for _ in range(_TURN):
      state, _ = step(state, batch, 0, interval)
    jax.block_until_ready(state)
    return 1e3 * (time.perf_counter() - begin) / _TURN

  return take


def main(arguments: list[str]):
  parser = argparse.ArgumentParser(prog="dbjax.bench guard", description=__doc__)
  parser.add_argument("--config", default="digits")
  parser.add_argument("--turns", type=int, default=15)
  given = parser.parse_args(arguments)
  config = config_lib.resolve(config_lib.read(given.config))
  task = task_lib.make_task(config, 0)
  batch = data.load(config).batch(0, 0, config.train.batch_size)
  guarded, plain = (taker(step, task, batch) for step in (block_lib.train_step, plain_step))
  times = np.array([(guarded(), plain()) for _ in range(given.turns)])
  ratios = times[:, 0] / times[:, 1]
  print(f"{given.config}, a step of block 0: guarded {np.median(times[:, 0]):.2f} ms, plain "
        f"{np.median(times[:, 1]):.2f} ms; ratio {np.median(ratios):.3f} "
        f"({np.quantile(ratios, 0.25):.3f} to {np.quantile(ratios, 0.75):.3f})")
