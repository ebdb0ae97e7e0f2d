"""What cutting costs: a step of all B blocks, one after the other, over the end-to-end step; a
whole run of them, in turns and with its checkpoints, over the end-to-end run; and samples by B
blocks over those of the whole network, with as many evaluations.

An evaluation by one of B blocks is 1/B of the whole network's, and a step of all blocks trains as
many layers as the end-to-end step: so all ratios would be 1 if nothing were computed B times.
"""

import argparse
from collections.abc import Callable
import contextlib
import functools
import io
import tempfile
from typing import Any

import jax
import numpy as np

from dbjax import block as block_lib
from dbjax import config as config_lib
from dbjax import data
from dbjax import loop
from dbjax import task as task_lib
from dbjax.bench import race
from dbjax.bench import step
from dbjax.model import Model

_EVALUATIONS = 12  # of a sample: three steps of each of four blocks
_STEPS, _TURN = 300, 100  # of a run: a turn ends with a checkpoint


def untrained(config: Any) -> Model:
  """A model of blocks at step 0."""
  tasks = tuple(task_lib.make_task(config, b) for b in range(config.num_blocks))
  params = tuple(jax.device_get(block_lib.init_params(task, b)) for b, task in enumerate(tasks))
  return Model(config=config, schedule=tasks[0].make_schedule(config), tasks=tasks, params=params,
               steps=(0,) * len(tasks), frozen=tasks[0].frozen(config))


def sampler(config: Any, num: int) -> Callable[[], float]:
  """A turn: seconds that `num` samples take, all at once."""
  model = untrained(config)
  return lambda: race.seconds_of(lambda: model.sample(
      num, batch_size=num, num_steps=_EVALUATIONS, solver="euler"))


def run(config: Any) -> float:
  """Seconds of a whole run, from data to the last checkpoint."""
  with tempfile.TemporaryDirectory() as workdir, contextlib.redirect_stdout(io.StringIO()):
    return race.seconds_of(lambda: loop.train(config, workdir).steps)


def main(argv: list[str]):
  parser = argparse.ArgumentParser(prog="python -m dbjax.bench blocks", description=__doc__)
  args = race.arguments(parser, argv, rounds=15, quick=6)
  digits = lambda blocks: config_lib.resolve(config_lib.read("digits", {"num_blocks": blocks}))
  images = data.load(digits(1)).batch(0, 0, digits(1).train.batch_size)
  _compare("digits, 6 layers of width 128, 16 tokens", digits, (1, 2, 3, 6), images, 500,
           args.rounds, args.json)
  runs = {f"B = {b}": config_lib.changed(digits(b), **{
      "train.num_steps": _STEPS, "train.turn": str(_TURN), "checkpoint.every_steps": _TURN,
      "sample.every_steps": 0}) for b in (1, 2, 3)}
  times = race.race({name: functools.partial(run, config) for name, config in runs.items()},
                    max(args.rounds // 2, 3))
  race.report("run", f"digits: a run of {_STEPS} steps of each block, in turns of {_TURN}, each "
              "with a checkpoint", race.against(times, "B = 1"), args.json)
  dit = lambda blocks: step.make_config("dit", **{
      "num_blocks": blocks, "model.num_layers": 12, "model.unroll": 12})
  _compare("DiT-S/2, 12 layers of width 384, 256 tokens", dit, (1, 3) if args.quick else
           (1, 2, 3, 4), step.random_batch(dit(1)), 16 if args.quick else 32,
           max(args.rounds // 2, 3), args.json)


def _compare(title: str, config: Callable[[int], Any], counts: tuple[int, ...], batch: Any,
             num: int, rounds: int, path: str):
  takers = {f"B = {b}": (b, step.stepper(config(b), batch)) for b in counts}
  steps = {name: lambda b=b, take=take: take(b) for name, (b, take) in takers.items()}
  times = race.race(steps, rounds)
  race.report("blocks", f"{title}: a training step of all blocks, batch "
              f"{config(1).train.batch_size}", race.against(times, "B = 1"), path)
  del takers, steps
  times = race.race({f"B = {b}": sampler(config(b), num) for b in counts}, rounds)
  rows = race.against(times, "B = 1")
  for b, row in zip(counts, rows):
    row["B times, over B = 1"] = float(np.median(b * times[f"B = {b}"] / times["B = 1"]))
  race.report("sample", f"{title}: {num} samples, {_EVALUATIONS} evaluations each", rows, path)
