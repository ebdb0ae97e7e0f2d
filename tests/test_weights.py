"""Weights of every config after 20 steps, beside those recorded before the library was opened.

weights.json was made at commit c030bcc by the same steps. On the processor that it names, with
its jaxlib, weights are equal bit by bit; elsewhere products are summed in another order.
"""

import json
from pathlib import Path
import zlib

import jax
import numpy as np
import pytest

from dbjax import block as block_lib
from dbjax import config as config_lib
from dbjax import task as task_lib

RECORDED = json.loads(Path(__file__).with_name("weights.json").read_text())
BATCH = 4


def small(name):
  """A resolved config in which a step takes milliseconds."""
  config = config_lib.flatten(config_lib.read(name))
  recurrent = config["task.name"] == "recurrent"
  fields = {"num_blocks": 1 if recurrent else 2, "model.num_layers": 6 if recurrent else 4,
            "model.width": 16, "model.num_heads": 2, "model.unroll": 1, "train.num_steps": 30,
            "train.batch_size": BATCH, "optimizer.warmup_steps": 5,
            "optimizer.learning_rate": 1e-2}
  if "data.length" in config:
    fields |= {"data.length": 12, "data.vocab_size": 19, "data.tokenizer": "bytes"}
  else:
    fields |= {"data.image_size": 8, "model.patch_size": 4}
  if "model.embedding_width" in config:
    fields["model.embedding_width"] = 8
  return config_lib.unflatten(config | fields)


def batch_of(task, config, step):
  """The batch of a step: of random pixels, labels, tokens."""
  rng = np.random.Generator(np.random.Philox([step, 7]))
  above = dict(image=256, label=config.data.get("num_classes"),
               tokens=config.data.get("vocab_size"))
  return {name: rng.standard_normal(x.shape).astype(x.dtype)
          if np.issubdtype(x.dtype, np.floating)
          else rng.integers(0, above[name], x.shape).astype(x.dtype)
          for name, x in sorted(task.abstract_batch(BATCH).items())}


def train(config, block):
  """Block `block` after 20 steps: crc of its weights, their norm, and the last loss."""
  task = task_lib.make_task(config, block)
  state = block_lib.init(task, block)
  step = jax.jit(block_lib.train_step, static_argnums=0)
  interval, frozen = task.make_schedule(config).training_interval(block), task.frozen(config)
  for n in range(20):
    state, metrics = step(task, state, batch_of(task, config, n), block, interval, frozen)
  leaves = [np.asarray(x) for x in jax.tree.leaves((state.params, state.ema))]
  return dict(crc=f"{zlib.crc32(b''.join(sorted(x.tobytes() for x in leaves))):08x}",
              norm=float(np.sqrt(sum(np.square(x, dtype=np.float64).sum() for x in leaves))),
              loss=float(metrics["loss"]))


def same_machine():
  """Whether this processor and this jaxlib made the record."""
  names = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
           if line.startswith("model name")] if Path("/proc/cpuinfo").exists() else []
  return names[:1] == [RECORDED["cpu"]] and jax.lib.__version__ == RECORDED["jaxlib"]


@pytest.mark.parametrize("name", RECORDED["weights"])
def test_weights_are_those_of_before(name):
  config = small(name)
  for block, expected in RECORDED["weights"][name].items():
    found = train(config, int(block))
    np.testing.assert_allclose([found["norm"], found["loss"]],
                               [expected["norm"], expected["loss"]], rtol=1e-4)
    if same_machine():
      assert found["crc"] == expected["crc"]
