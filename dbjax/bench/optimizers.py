"""What an optimizer holds for each parameter, and what it makes of as many steps.

Three blocks of the digits are trained on the same batches and draws, with the same clipping, weight
decay and warm-up; only `optimizer.name` and what goes with it differ, and the learning rate, which
falls as a cosine, but for schedule_free. Three rates are tried with the first seed, a factor of two
apart, and more where the best is the first or the last; that with the least held-out loss is used
with the other seeds. Losses are of the weights themselves, not of their average; but schedule_free
is seen by its own.
"""

import argparse
from collections.abc import Callable, Mapping
import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import optax

from dbjax import block as block_lib
from dbjax import config as config_lib
from dbjax import data
from dbjax import optimizers as optimizers_lib
from dbjax import task as task_lib
from dbjax.bench import blocks
from dbjax.bench import race
from dbjax.task import Task

_LAST = 50  # steps, that the training loss is a mean over
_HALF = {"optimizer.moments_dtype": "bfloat16"}

# Of each: the fields of its config, and the learning rate in the middle of those to try.
OPTIMIZERS = {
    "AdamW": ({}, 4e-3),
    "AdamW, first moment bfloat16": (_HALF, 4e-3),
    "Muon": ({"optimizer.name": "muon"}, 4e-3),
    "Muon, first moments bfloat16": ({"optimizer.name": "muon", **_HALF}, 4e-3),
    "schedule-free AdamW": (
        {"optimizer.name": "schedule_free", "optimizer.schedule": "constant"}, 8e-3),
    "Adafactor": ({"optimizer.name": "adafactor"}, 4e-3),
    "Adafactor, momentum bfloat16": ({"optimizer.name": "adafactor", **_HALF}, 4e-3),
    "Adafactor, no momentum": ({"optimizer.name": "adafactor", "optimizer.b1": 0.0}, 4e-3),
    "Lion": ({"optimizer.name": "lion"}, 1e-3),
    "Lion, momentum bfloat16": ({"optimizer.name": "lion", **_HALF}, 1e-3),
}


def _with_rate(task: Task, rate: Any) -> optax.GradientTransformation:
  """The optimizer of a task whose highest learning rate is 1, with one that may be traced."""
  shape = optimizers_lib.learning_rate(task.config)
  return optimizers_lib.optimizer(task, rate=lambda n: rate * shape(n))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(1, 2))
def _step(task: Task, params: Any, state: Any, rate: Any, key: jax.Array, batch: Any, interval: Any
          ) -> tuple[Any, Any, jax.Array]:
  loss, grads = jax.value_and_grad(task.loss)(params, task.draw(key, batch, interval))
  updates, state = _with_rate(task, rate).update(grads, state, params)
  return optax.apply_updates(params, updates), state, loss


def train(config: Any, seed: int, rate: float) -> dict[str, Any]:
  """All blocks of a config, one after the other.

  Args:
    config: resolved, with a warm-up; its own seed only draws the noise of the held-out losses.
    seed: of weights, batches and draws.
    rate: the highest.

  Returns:
    loss: mean of all blocks' last training losses; held_out: each block's loss on held-out data.
  """
  dataset, params, last = data.load(config), [], []
  config = config_lib.changed(config, **{"optimizer.learning_rate": 1.0})
  for b in range(config.num_blocks):
    task = task_lib.make_task(config, b)
    interval = task.make_schedule(config).training_interval(b)
    weights = jax.jit(task.init)(block_lib.block_key(seed, b, 0, block_lib.INIT))
    state, losses = jax.jit(_with_rate(task, rate).init)(weights), []
    for n in range(config.train.num_steps):
      weights, state, loss = _step(
          task, weights, state, rate, block_lib.block_key(seed, b, n, block_lib.DRAW),
          dataset.batch(seed, n, config.train.batch_size), interval)
      losses.append(loss)
    own = optimizers_lib.own_average(config, state, weights)
    params.append(jax.device_get(weights if own is None else own))
    last.append(np.mean(losses[-_LAST:]))
  model = dataclasses.replace(blocks.untrained(config), params=tuple(params))
  return dict(loss=float(np.mean(last)), held_out=model.losses(dataset.held_out))


def bytes_held(config: Any) -> float:
  """Of the state of a config's optimizer, per parameter."""
  state = block_lib.abstract_state(task_lib.make_task(config, 0))
  size = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
  return size(state.opt_state) / (size(state.params) / 4)


def scan(make: Callable[[float], dict[str, Any]], middle: float) -> dict[float, dict[str, Any]]:
  """What is made with learning rates a factor of two apart, so many that the best has neighbours.

  Args:
    make: rate -> as `train` returns.
    middle: of the first three.
  """
  found = {rate: make(rate) for rate in (middle / 2, middle, 2 * middle)}
  while True:
    rates = sorted(found)
    best = min(rates, key=lambda rate: _mean(found[rate]))
    if best not in (rates[0], rates[-1]):
      return {rate: found[rate] for rate in rates}
    rate = best / 2 if best == rates[0] else 2 * best
    found[rate] = make(rate)


def _mean(found: dict[str, Any]) -> float:
  """The mean of the blocks' held-out losses; infinite where one has diverged."""
  return float(np.nan_to_num(np.mean(found["held_out"]), nan=np.inf))


def compare(config: Any, optimizers: Mapping[str, Any], seeds: range, path: str):
  """The tables of learning rates, and of what optimizers make with the best of them.

  Args:
    config: resolved.
    optimizers: as OPTIMIZERS.
    seeds: two or more.
    path: of the file of figures, or "".
  """
  scans, rows = [], []
  for name, (fields, middle) in optimizers.items():
    own = config_lib.changed(config, **fields)
    first = scan(functools.partial(train, own, seeds[0]), middle)
    best = min(first, key=lambda rate: _mean(first[rate]))
    runs = [first[best], *(train(own, seed, best) for seed in seeds[1:])]
    scans.append({"optimizer": name, "rates": ", ".join(f"{rate:g}" for rate in first),
                  "held-out loss": ", ".join(f"{_mean(found):.4f}" for found in first.values())})
    held_out = np.array([found["held_out"] for found in runs])
    rows.append({
        "optimizer": name, "bytes a parameter": bytes_held(own), "rate": best,
        "training loss": _spread([found["loss"] for found in runs]),
        "held-out loss": _spread(held_out.mean(1)),
        **{f"of block {b}": _spread(column) for b, column in enumerate(held_out.T)}})
    print(*scans[-1].values(), *rows[-1].values(), sep=" | ", flush=True)
  title = (f"digits, {config.num_blocks} blocks, {config.train.num_steps} steps of batch "
           f"{config.train.batch_size}")
  race.report("rates", f"{title}, seed {seeds[0]}", scans, path)
  race.report("optimizers", f"{title}: mean of {len(seeds)} seeds (least to most)", rows, path)


def _spread(values: Any) -> str:
  return f"{np.mean(values):.4f} ({min(values):.4f} to {max(values):.4f})"


def main(argv: list[str]):
  parser = argparse.ArgumentParser(prog="python -m dbjax.bench optimizers", description=__doc__)
  args = race.arguments(parser, argv)
  config = config_lib.resolve(config_lib.read("digits", {
      "train.num_steps": 100 if args.quick else 300, "optimizer.warmup_steps": 20}))
  compare(config, OPTIMIZERS, range(3), args.json)
