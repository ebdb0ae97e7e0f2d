"""A long run: nothing of ours grows, and nothing is compiled again.

DBJAX_LONG=10000 takes so many steps, where the suite takes fewer. Memory grows by less than 0.1 MB
a checkpoint. At least half of that is kept by TensorStore 0.1.86: its `KvStore.Spec(..).to_json()`,
which Orbax calls for every array, loses 257 bytes at each call.
"""

import os
from pathlib import Path
import resource
import threading

import jax
import numpy as np
import pytest

from dbjax import config as config_lib
from dbjax import loop

STEPS = int(os.environ.get("DBJAX_LONG", "1200"))


def held():
  """Threads, open files, and bytes in memory of this process."""
  pages = int(Path("/proc/self/statm").read_text().split()[1])
  return (threading.active_count(), len(os.listdir("/proc/self/fd")),
          pages * resource.getpagesize())


@pytest.mark.slow
def test_nothing_grows(tiny, tmp_path, monkeypatch):
  """Of two blocks in turns of ten steps, with a checkpoint at every twentieth."""
  seen, compiled, before = [], [], loop.metrics.Progress.add

  def add(self, *args):
    before(self, *args)
    add.steps += 1
    seen.append(held())

  add.steps = 0
  monkeypatch.setattr(loop.metrics.Progress, "add", add)
  jax.monitoring.register_event_duration_secs_listener(
      lambda event, *_, **__: compiled.append(add.steps) if "backend_compile" in event else None)
  config = config_lib.resolve(tiny(**{
      "num_blocks": 2, "model.num_layers": 2, "train.num_steps": STEPS // 2, "train.turn": "10",
      "checkpoint.every_steps": 20, "log.every_steps": 10}))
  loop.train(config, tmp_path, devices=jax.devices()[:1])
  # The least of each tenth of the run, since a save may be under way at any one step.
  threads, files, memory = np.array(seen).reshape(10, -1, 3).min(axis=1).T
  print("threads, files, MB:", threads.tolist(), files.tolist(), (memory // 10**6).tolist())
  assert not [step for step in compiled if step > STEPS // 5]
  # The first tenth is the start. A pool of threads may fill late, by one or two; what was kept at
  # every checkpoint would be a thread or a file for each of them.
  kept = STEPS // 20 // 2
  assert min(threads[5:]) - min(threads[1:5]) < kept / 10
  assert min(files[5:]) - min(files[1:5]) < kept / 10
  assert max(memory[5:]) < max(memory[1:5]) + 40e6
