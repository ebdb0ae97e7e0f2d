"""What the loop adds to a step: data, metrics, progress and checkpoints, over the bare step.

The loop trains block 0 of the digits, and says itself, in metrics.jsonl, how fast it goes once all
is compiled; the bare step takes the same batch again and again.
"""

import argparse
import contextlib
import io
import tempfile

import numpy as np

from dbjax import config as config_lib
from dbjax import data
from dbjax import loop
from dbjax.bench import race
from dbjax.bench import step

_STEPS, _INTERVAL = 240, 40


def main(argv: list[str]):
  parser = argparse.ArgumentParser(prog="python -m dbjax.bench loop", description=__doc__)
  args = race.arguments(parser, argv, rounds=7, quick=3)
  make = lambda **fields: config_lib.resolve(config_lib.read("digits", {
      "train.num_steps": _STEPS, "train.blocks": (0,), "sample.every_steps": 0,
      "log.every_steps": _INTERVAL, **fields}))
  config = make()
  bare = step.stepper(config, data.load(config).batch(0, 0, config.train.batch_size))

  def looped(every: int) -> float:
    with tempfile.TemporaryDirectory() as workdir, contextlib.redirect_stdout(io.StringIO()):
      history = loop.train(make(**{"checkpoint.every_steps": every}), workdir)
    per_step = config.train.batch_size / history.metrics[0]["examples_per_s"]
    return float(np.median(per_step[1:]))  # the first interval compiles

  times = race.race({
      "bare step": lambda: bare(_INTERVAL) / _INTERVAL, "loop": lambda: looped(_STEPS),
      f"loop, a checkpoint every {_INTERVAL} steps": lambda: looped(_INTERVAL)}, args.rounds)
  race.report("loop", "digits, a step of one block", race.against(times, "bare step"), args.json)
