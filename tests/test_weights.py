"""Weights of every config after 20 steps, beside those on record.

weights.json was made by the same steps. On the processor that it names, with its jaxlib and its
XLA_FLAGS (the quick suite has others), weights are equal bit by bit; elsewhere products are summed
in another order. It was made anew when AdamW's b1 and b2 became inputs of the step, of which 1 - b1
is computed in float32: norms and losses had changed by less than 1e-6 where networks compute in
float32, and by less than 2e-4 where they do in bfloat16.
"""

import json
import os
from pathlib import Path
import zlib

from conftest import small_config
from conftest import synthetic_batch
import jax
import numpy as np
import pytest

from dbjax import block as block_lib
from dbjax import task as task_lib

RECORDED = json.loads(Path(__file__).with_name("weights.json").read_text())


def train(config, block):
  """Block `block` after 20 steps: crc of its weights, their norm, and the last loss."""
  task = task_lib.make_task(config, block)
  state = block_lib.init(task, block)
  step = jax.jit(block_lib.train_step, static_argnums=0)
  interval, frozen = task.make_schedule(config).training_interval(block), task.frozen(config)
  for n in range(20):
    state, metrics = step(task, state, synthetic_batch(task, n), block, interval, frozen)
  leaves = [np.asarray(x) for x in jax.tree.leaves((state.params, state.ema))]
  return dict(crc=f"{zlib.crc32(b''.join(sorted(x.tobytes() for x in leaves))):08x}",
              norm=float(np.sqrt(sum(np.square(x, dtype=np.float64).sum() for x in leaves))),
              loss=float(metrics["loss"]))


def as_recorded():
  """Whether this processor, this jaxlib and these XLA_FLAGS made the record."""
  names = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
           if line.startswith("model name")] if Path("/proc/cpuinfo").exists() else []
  return names[:1] == [RECORDED["cpu"]] and jax.lib.__version__ == RECORDED["jaxlib"] and (
      os.environ["XLA_FLAGS"] == RECORDED["flags"])


FEW = ("digits", "digits_classify", "kjv")


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[pytest.mark.nightly] * (name not in FEW))
    for name in RECORDED["weights"]])
def test_weights_are_those_of_before(name):
  config = small_config(name)
  for block, expected in RECORDED["weights"][name].items():
    found = train(config, int(block))
    np.testing.assert_allclose([found["norm"], found["loss"]],
                               [expected["norm"], expected["loss"]], rtol=1e-4)
    if as_recorded():
      assert found["crc"] == expected["crc"]
