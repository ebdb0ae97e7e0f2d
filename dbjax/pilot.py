"""A pilot: a short training of the whole network in memory, which tells of the noise."""

import contextlib
import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from dbjax import block as block_lib
from dbjax import config as config_lib
from dbjax import data
from dbjax import task as task_lib

_HELD_OUT = 1000  # examples, about, that a loss is averaged over


def short(config: Any, num_steps: int) -> Any:
  """A resolved config of so many steps, in which the learning rate falls to 0, but for the
  optimizer that wants it constant.
  """
  o = config.optimizer
  return config_lib.changed(config, **{
      "train.num_steps": num_steps, "optimizer.warmup_steps": min(o.warmup_steps, num_steps // 4),
      "optimizer.schedule": "constant" if o.name == "schedule_free" else "cosine"})


def train(task: task_lib.Task, dataset: data.Dataset, frozen: Any) -> Any:
  """The averaged weights of a task's only block after train.num_steps, in memory."""
  config = task.config
  interval = task.make_schedule(config).training_interval(0)
  step = jax.jit(functools.partial(block_lib.train_step, task), donate_argnums=0)
  state = block_lib.init(task, 0)
  with contextlib.closing(dataset.stream(
      config.seed, range(config.train.num_steps), config.train.batch_size)) as batches:
    for batch in batches:
      state, _ = step(state, batch, np.int32(0), interval, frozen)
  return state.ema


def losses(task: task_lib.Task, params: Any, held_out: Any, frozen: Any, sigmas: np.ndarray
           ) -> np.ndarray:
  """The loss in each cell of sigmas (K + 1,), by the same examples and draws in each: (K,)."""
  size = min(task.config.train.batch_size, len(held_out), _HELD_OUT)
  num = min(len(held_out), _HELD_OUT) // size
  cells = dataclasses.replace(task.make_schedule(task.config), boundaries=tuple(sigmas), gamma=0.0)
  intervals = [cells.training_interval(k) for k in range(cells.num_blocks)]
  stacked = jax.tree.map(lambda *x: np.stack(x), *intervals)
  key = lambda number: block_lib.block_key(task.config.seed, 0, number, block_lib.EVALUATE)
  passes = range(max(1, _HELD_OUT // (num * size)))
  parts = [batch for _, batch in data.batches(held_out, size, _HELD_OUT)][:num]  # of one size
  found = np.stack([_losses(task, params, frozen, key(p * num + i), part, stacked)
                    for p in passes for i, part in enumerate(parts)])
  return found.mean(axis=0, dtype=np.float64)


@functools.partial(jax.jit, static_argnums=0)
def _losses(task, params, frozen, key, batch, intervals):
  return jax.lax.map(lambda x: task.loss(params, task.draw(key, batch, x), frozen), intervals)
