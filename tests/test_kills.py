"""Killed with -9 at random moments, over and over, a run ends as if nothing had been.

DBJAX_KILLS=50 kills more often than the suite has time for.
"""

import os
import random
import signal
import subprocess
import sys
import threading

import chex
from conftest import BIT_EQUAL
from conftest import ROOT
from conftest import states_of
import jax
import pytest

from dbjax import config as config_lib
from dbjax import loop

KILLS = int(os.environ.get("DBJAX_KILLS", "3"))
OVERRIDES = {"train.turn": "7", "train.num_steps": 60, "checkpoint.every_steps": 5,
             "checkpoint.keep": 1, "log.every_steps": 20}


def live(workdir, flags, seconds):
  """Starts a run and kills it so long after its first words; True if it ended before."""
  process = subprocess.Popen(
      [sys.executable, "-m", "dbjax.main", "--config=configs/digits.py", f"--workdir={workdir}",
       *flags], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
      env={**os.environ, "XLA_FLAGS": BIT_EQUAL})
  process.stdout.readline()
  timer = threading.Timer(seconds, process.kill)
  timer.start()
  _, errors = process.communicate()
  timer.cancel()
  assert process.returncode in (0, -signal.SIGKILL), errors
  assert "Traceback" not in errors and "error:" not in errors, errors
  return process.returncode == 0


@pytest.mark.slow
def test_killed_at_random_moments_is_bit_equal(tiny, tmp_path):
  """Stepping, saving, restoring, reading back, between blocks: wherever it falls."""
  config = config_lib.resolve(tiny(**OVERRIDES))
  loop.train(config, tmp_path / "reference", devices=jax.devices()[:1])
  expected = states_of(config, tmp_path / "reference")
  flags = [f"--config.{k}={v}" for k, v in config_lib.flatten(tiny(**OVERRIDES)).items()
           if v is not None and not isinstance(v, list)]
  rng, kills, number = random.Random(0), 0, 0
  while kills < KILLS:
    number += 1
    workdir = tmp_path / f"killed{number}"
    while kills < KILLS and not live(workdir, flags, rng.uniform(0, 4)):
      kills += 1
    while not live(workdir, flags, 600):
      pass
    chex.assert_trees_all_equal(states_of(config, workdir), expected)
    left = [p.name for p in workdir.rglob("*") if "tmp" in p.name or "owner" in p.name
            or "deleted" in p.name]
    assert not left
  print(f"{kills} kills over {number} runs")
