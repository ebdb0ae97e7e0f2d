"""What a chip sends to others in one training step, on TPU slices from 1 to 1,024 chips.

The real step is compiled for each slice, which need not be there, and its collectives are read out
of the compiled program. All schemes train every layer on the same global batch, BATCH examples a
chip: so they do the same work, and what differs is what they send.

end to end, data parallel    the whole network on every chip; gradients are summed over all chips
end to end, FSDP             the whole network split over all chips
blocks, data parallel        each block on its own row of the mesh, data parallel inside it
blocks, FSDP                 each block on its own row, split over it

Bytes are those that a chip sends in a ring (`hlo.Collective.sent`). Beside them stand those of the
closed formula, from nothing but the shapes of the parameters (`formula`).
"""

import argparse
from collections import defaultdict
import importlib.util
from pathlib import Path
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dbjax import config as config_lib
from dbjax import hlo
from dbjax import plan
from dbjax import program
from dbjax import sharding
from dbjax import task as task_lib
from dbjax.bench import race
from dbjax.errors import UserError

BATCH = 8  # examples a chip, in a step of all blocks
# v5e ends at 256 chips: one kind for all.
SLICES = {1: "v5p:1x1x1", 4: "v5p:2x2x1", 16: "v5p:2x2x4", 64: "v5p:4x4x4", 256: "v5p:4x8x8",
          1024: "v5p:8x8x16"}
MODELS = {
    "DiT-L/2": ("imagenet256_latent", {}),
    "LM": ("lm1b", {"data.tokenizer": "sentencepiece-00000000"}),
}


class Scheme(NamedTuple):
  """How a network is spread over chips."""

  name: str
  blocks: bool
  fsdp: bool


SCHEMES = (
    Scheme("end to end, data parallel", False, False), Scheme("end to end, FSDP", False, True),
    Scheme("blocks, data parallel", True, False), Scheme("blocks, FSDP", True, True))


def make_config(model: str, scheme: Scheme, chips: int, num_blocks: int = 4) -> Any:
  """The resolved config of a model on that many chips."""
  name, fields = MODELS[model]
  config = config_lib.resolve(config_lib.read(name, {
      **fields, "num_blocks": num_blocks, "model.unroll": 1, "train.batch_size": BATCH * chips}))
  rows = min(num_blocks, chips) if scheme.blocks else 1
  config = config if scheme.blocks else plan.end_to_end(config)
  fsdp = chips // rows if scheme.fsdp else 1
  while config.model.width % fsdp:
    fsdp //= 2
  return config_lib.changed(config, **{"mesh.block": rows, "mesh.data": -1, "mesh.fsdp": fsdp})


def measure(config: Any, devices: list[jax.Device]) -> dict[str, Any]:
  """A row of figures: what a chip sends in a step of `config`, compiled for `devices`."""
  begin = time.perf_counter()
  mesh, task = sharding.make_mesh(config, devices), task_lib.make_task(config, 0)
  compiled = program.compile_step(task, mesh, mesh.shape["block"])
  sent = defaultdict(float)
  for c in hlo.collectives(compiled.as_text()):
    sent[hlo.axes(c, mesh.shape)] += c.count * c.sent
  expected = formula(task, mesh)
  return {
      "mesh": ",".join(map(str, mesh.shape.values())), "MB": sum(sent.values()) / 1e6,
      "formula": expected / 1e6, "ratio": sum(sent.values()) / expected if expected else None,
      "across blocks": sum(n for axes, n in sent.items() if "block" in axes) / 1e6,
      "compiled in s": time.perf_counter() - begin}
